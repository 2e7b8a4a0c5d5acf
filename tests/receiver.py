"""A receiver of webhooks for tests: a real server on a real socket, with TLS unless asked otherwise."""

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import trustme
from aiohttp import web
from multidict import CIMultiDictProxy


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it arrived; `at` is the loop's time."""

    method: str
    path: str  # with the query, as sent
    headers: CIMultiDictProxy[str]
    body: bytes
    at: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What to answer, after `delay` seconds."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0


class Receiver:
    """Keeps what it got in `requests` and answers as scripted by `answers`, then 200.

    Speaks TLS with a certificate for `host` that clients trust through `client_ssl`, or plain HTTP.
    """

    authority = trustme.CA()  # one for all receivers, so that one client can talk to several

    def __init__(
        self, *, tls: bool = True, host: str = "127.0.0.1", port: int = 0, expired: bool = False
    ) -> None:
        self.host = host
        self.port = port
        self.requests: list[Request] = []
        self._script: deque[Answer] = deque()
        self._arrived = asyncio.Condition()
        self._ssl = server_ssl(host, self.authority, expired=expired) if tls else None
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    @property
    def url(self) -> str:
        scheme = "http" if self._ssl is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/hook"

    @property
    def client_ssl(self) -> ssl.SSLContext:
        """What a client needs in order to trust every receiver."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def answers(self, *script: int | Answer) -> None:
        """Answer the next requests so, in this order; a number is a bare status."""
        self._script.extend(each if isinstance(each, Answer) else Answer(each) for each in script)

    async def wait_for(self, count: int, *, within: float = 5.0) -> list[Request]:
        """Return the requests as soon as there are so many. Raises TimeoutError."""
        async with asyncio.timeout(within), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)
        return self.requests

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, ssl_context=self._ssl)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        async with self._arrived:
            self.requests.append(
                Request(
                    method=request.method,
                    path=request.raw_path,
                    headers=request.headers,
                    body=body,
                    at=asyncio.get_running_loop().time(),
                )
            )
            self._arrived.notify_all()
            answer = self._script.popleft() if self._script else Answer()
        if answer.delay:
            await asyncio.sleep(answer.delay)
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


def server_ssl(host: str, authority: trustme.CA, *, expired: bool = False) -> ssl.SSLContext:
    """Return a server's context with a certificate for this host, which may be one of the past."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    until = datetime(2020, 1, 1, tzinfo=UTC) if expired else None
    authority.issue_cert(host, not_after=until).configure_cert(context)
    return context
