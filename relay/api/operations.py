"""What machines ask: `/livez` (the process answers), `/readyz` (it can keep events), `/openapi.json`."""

from importlib import resources

from aiohttp import web

from relay.api.problems import Problem
from relay.api.state import State


class Operations:
    """The handlers; a receiver's trouble never shows here (contract section 4)."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._description = resources.files("relay.api").joinpath("openapi.json").read_bytes()

    def routes(self) -> list[web.RouteDef]:
        return [*self.health(), web.get("/openapi.json", self.describe)]

    def health(self) -> list[web.RouteDef]:
        """Return what a second address serves, too."""
        return [web.get("/livez", self.live), web.get("/readyz", self.ready)]

    async def live(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(self, _request: web.Request) -> web.Response:
        why_not = self._state.unready or self._state.outbox.trouble()
        if why_not is not None:
            # Answered, not raised: at the second address no guard turns a problem into an answer.
            return Problem(503, why_not).response()
        return web.Response(text="ok\n")

    async def describe(self, _request: web.Request) -> web.Response:
        """Answer with the OpenAPI document, which is written by hand beside this file."""
        return web.Response(body=self._description, content_type="application/json")
