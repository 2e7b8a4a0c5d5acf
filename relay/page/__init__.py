"""The status page at `/`: what an operator sees and steers in a browser, or reads as text.

The server writes the same tables whether there are scripts or not, as HTML or, for `Accept: text/plain`, as
text; the script beside this file then keeps them up to date and adds what can be done, over the API like
anyone else. With tokens in the config only the script can show more than the sentence of state, because only
it can send one.
"""

import hashlib
from importlib import resources
from string import Template

from aiohttp import ETag, web

from relay import __version__
from relay.api.guard import Access
from relay.api.state import State
from relay.api.status import Status, look
from relay.model import State as DeliveryState
from relay.outbox import Query, Story
from relay.page import tables, writing

DEAD = 10  # shown at once
FILES = {"relay.css": "text/css", "relay.js": "text/javascript", "relay.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Page:
    """The handlers; while `access` wants tokens, what the page shows wants one too."""

    def __init__(self, state: State, access: Access) -> None:
        self._state = state
        self._access = access
        folder = resources.files("relay.page")
        self._frame = Template(folder.joinpath("index.html").read_text())
        self._files = {name: folder.joinpath(name).read_bytes() for name in FILES}

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self.show), web.get("/page/{file}", self.file)]

    async def show(self, request: web.Request) -> web.Response:
        status = await look(self._state)
        dead = () if self._guarded else await self._dead()
        headers = {**HEADERS, "Cache-Control": "no-store", "Vary": "Accept"}
        if wants_text(request.headers.get("Accept", "")):
            return web.Response(text=self._text(status, dead), headers=headers)
        return web.Response(text=self._html(status, dead), content_type="text/html", headers=headers)

    async def file(self, request: web.Request) -> web.Response:
        """Answer with a file of the page, or that it is the one the browser has."""
        name = request.match_info["file"]
        if name not in FILES:
            raise web.HTTPNotFound
        content = self._files[name]
        headers = {**HEADERS, "Cache-Control": "no-cache"}
        tag = ETag(hashlib.sha256(content).hexdigest()[:32])
        if tag in (request.if_none_match or ()):
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(body=content, content_type=FILES[name], charset="utf-8", headers=headers)
        response.etag = tag
        return response

    @property
    def _guarded(self) -> bool:
        return bool(self._access.keys)

    async def _dead(self) -> tuple[Story, ...]:
        page = await self._state.outbox.events(Query(limit=DEAD, state=DeliveryState.DEAD))
        return page.stories

    def _text(self, status: Status, dead: tuple[Story, ...]) -> str:
        head = f"relay {__version__}, {tables.when(status.at)}\n{status.sentence}\n"
        if self._guarded:
            return head
        parts = [head, f"Last hour: {tables.hour(status)}\n"]
        parts += [writing.text(each) for each in tables.every(status, dead)]
        return "\n".join(parts)

    def _html(self, status: Status, dead: tuple[Story, ...]) -> str:
        shown = {} if self._guarded else {each.id: each for each in tables.every(status, dead)}
        return self._frame.substitute(
            sentence=writing.escaped(status.sentence),
            stands=stands(status),
            version=writing.escaped(__version__),
            at=writing.escaped(status.at),
            when=tables.when(status.at),
            hidden="hidden" if self._guarded else "",
            guarded="The rest needs a token and a script that sends it." if self._guarded else "",
            hour="" if self._guarded else writing.escaped(tables.hour(status)),
            **{name: writing.html(name, shown.get(name)) for name in tables.HEADINGS},
        )


def stands(status: Status) -> str:
    """Say in a word whether somebody has to look: well, troubled, or not ready."""
    if not status.ready:
        return "not"
    down = any(each.state in {"down", "gone"} for each in status.endpoints)
    source = any(each.error or each.refused for each in status.sources)
    return "troubled" if down or source or status.dead else "well"


def wants_text(accept: str) -> bool:
    """Tell whether text is what a client asks for: it names text/plain, and HTML not at all or as worse."""
    weights = {"text/plain": 0.0, "text/html": 0.0}
    for each in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in each.split(";"))
        if media_type in weights:
            weights[media_type] = next((_weight(part) for part in parameters if part.startswith("q=")), 1.0)
    return weights["text/plain"] > weights["text/html"]


def _weight(parameter: str) -> float:
    try:
        return float(parameter.removeprefix("q="))
    except ValueError:
        return 0.0
