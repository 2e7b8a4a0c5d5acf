"""The receivers of a run: over TLS, at a path each, writing down what came before they answer it."""

import asyncio
import base64
import hashlib
import hmac
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

import orjson
import standardwebhooks
from aiohttp import web

from tests.durability.journal import CLOCK, Journal
from tests.durability.plan import Answer, Endpoint
from tests.receiver import Receiver, server_ssl

SECRET = "whsec_" + base64.b64encode(b"a ledger keeps what it is told").decode()
TOLERANCE_SECONDS = 300

Hook = Callable[[web.Request, int], Awaitable[None]]


class Ledger:
    """Serves all endpoints; `journal` gets a line for every request, and one for every answer sent.

    `before` and `after` are called around an answer: places to kill somebody.
    """

    def __init__(self, endpoints: Sequence[Endpoint], journal: Journal, *, seed: int) -> None:
        self.port = 0
        self.healed = False  # from then on everything is taken at once
        self.arrived = asyncio.Condition()
        self.requests = 0
        self.before: Hook | None = None
        self.after: Hook | None = None
        self._endpoints = {endpoint.id: endpoint for endpoint in endpoints}
        self._journal = journal
        self._seed = seed
        self._times: Counter[tuple[str, str]] = Counter()
        app = web.Application(client_max_size=1 << 20)
        app.router.add_post("/{endpoint}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    def url(self, endpoint: str) -> str:
        return f"https://127.0.0.1:{self.port}/{endpoint}"

    async def wait_for(self, count: int, *, within: float = 10.0) -> None:
        async with asyncio.timeout(within), self.arrived:
            await self.arrived.wait_for(lambda: self.requests >= count)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        context: ssl.SSLContext = server_ssl("127.0.0.1", Receiver.authority)
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        endpoint, id_ = request.match_info["endpoint"], request.headers.get("webhook-id", "")
        number, attempt = number_of(body), int(request.headers.get("webhook-attempt", 0))
        self._times[endpoint, id_] += 1
        answer = (
            Answer()
            if self.healed
            else self._endpoints[endpoint].answer(self._seed, number, attempt, self._times[endpoint, id_])
        )
        index = self.requests
        self._journal.write(
            kind="request",
            index=index,
            endpoint=endpoint,
            id=id_,
            n=number,
            attempt=attempt,
            timestamp=request.headers.get("webhook-timestamp"),
            sha256=hashlib.sha256(body).hexdigest(),
            verdicts=[library_says(request, body), own_verdict(request, body)],
            status=None if answer.cut else answer.status,
            delay=answer.delay,
        )
        async with self.arrived:
            self.requests += 1
            self.arrived.notify_all()
        if answer.delay:
            await asyncio.sleep(answer.delay)
        return await self._answer(request, answer, index)

    async def _answer(self, request: web.Request, answer: Answer, index: int) -> web.StreamResponse:
        if self.before is not None:
            await self.before(request, index)
        response = web.Response(status=answer.status)
        if answer.cut:
            assert request.transport is not None
            request.transport.abort()
        else:
            try:
                await response.prepare(request)
                await response.write_eof()
            except ConnectionResetError:  # whoever asked is gone: stopped waiting, or dead
                return response
        self._journal.write(kind="answered", index=index)
        if self.after is not None:
            await self.after(request, index)
        return response


def number_of(body: bytes) -> int:
    """Return which event this says it is; -1 for none of ours."""
    try:
        return int(orjson.loads(body)["data"]["n"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return -1


def library_says(request: web.Request, body: bytes) -> bool:
    try:
        standardwebhooks.Webhook(SECRET).verify(body, {k.lower(): v for k, v in request.headers.items()})
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


def own_verdict(request: web.Request, body: bytes) -> bool:
    """The same by hand, and the hex signature beside it."""
    id_, at = request.headers.get("webhook-id", ""), request.headers.get("webhook-timestamp", "")
    signed = hmac.digest(base64.b64decode(SECRET[6:]), f"{id_}.{at}.".encode() + body, "sha256")
    text = hmac.digest(SECRET.encode(), body, "sha256").hex()
    fresh = at.isdigit() and abs(CLOCK.now_ms() / 1000 - int(at)) <= TOLERANCE_SECONDS
    return (
        fresh
        and "v1," + base64.b64encode(signed).decode() in request.headers.get("webhook-signature", "").split()
        and hmac.compare_digest(text, request.headers.get("X-SocialSyncerAPI-Signature", ""))
    )
