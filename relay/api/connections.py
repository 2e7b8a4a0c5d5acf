"""Connections to the API: how many at once, how long they may be idle, and what broken HTTP is told.

aiohttp speaks HTTP. Here it is kept within bounds: a stranger who opens connections and says nothing, or
says it very slowly, takes neither the descriptors nor the patience that others need. Whatever is refused
before a handler sees it is `application/problem+json` too, and nobody's broken bytes are an error of ours.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, cast
from weakref import WeakSet

from aiohttp import HttpVersion10, StreamReader, web

from relay.api.answers import unavailable
from relay.api.problems import Problem, of_framework

log = logging.getLogger("relay.api")

IDLE_SECONDS = 75.0  # between two requests
HEAD_SECONDS = 10.0  # from a head's first byte to its last
UNREAD_BODY_SECONDS = 5.0  # for a body nobody wants, so that whoever sends it comes to read the answer
REFUSED_SECONDS = 1.0
MOST_REFUSED = 32  # that are given this time at once
BUFFER_BYTES = 64 << 10  # of a body that is not being read

# Nobody learns which versions run here, and no browser guesses what an answer might be.
ALWAYS = {"Server": "relay", "X-Content-Type-Options": "nosniff"}

FULL = "too many connections: try again in a moment, or close some that are idle"
LATE = f"the head of the request did not arrive within {HEAD_SECONDS:.0f} s"
BROKEN = "this is not well-formed HTTP/1.1"


class Connections:
    """Makes the connections of one listener.

    At `most`, the one that has been idle longest makes room for the next; when all are at work, the next is
    answered 503.
    """

    def __init__(self, runner: web.AppRunner, *, most: int) -> None:
        """Expects a runner that is set up."""
        server = runner.server
        if server is None:
            raise RuntimeError("the runner is not set up")
        server.request_handler = _tracked(server.request_handler)
        self._server = server
        self._most = most
        # Weak: one that never comes about counts no longer than it lives.
        self._open: WeakSet[Connection] = WeakSet()
        self._idle: dict[Connection, None] = {}  # the one that is idle longest comes first
        self._refused = 0

    def __call__(self) -> asyncio.Protocol:
        """Return the protocol for a connection that was just accepted."""
        if len(self._open) >= self._most and not self._end_one():
            return Refused(self)
        connection = Connection(self._server, self)
        self._open.add(connection)
        return connection

    def idle(self, connection: "Connection") -> None:
        self.busy(connection)
        self._idle[connection] = None

    def busy(self, connection: "Connection") -> None:
        self._idle.pop(connection, None)

    def closed(self, connection: "Connection") -> None:
        self.busy(connection)
        self._open.discard(connection)

    def refuse(self) -> bool:
        """Count one that is refused; tell whether there is time for it to read why."""
        self._refused += 1
        return self._refused <= MOST_REFUSED

    def refused(self) -> None:
        self._refused -= 1

    def _end_one(self) -> bool:
        for connection in self._idle:
            self.closed(connection)
            connection.force_close()
            return True
        return False


class Connection(web.RequestHandler):
    """One connection: ended when a head takes too long, and known to be idle or at work."""

    def __init__(self, server: web.Server, connections: Connections) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=UNREAD_BODY_SECONDS,
            read_bufsize=BUFFER_BYTES,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type] # which is how aiohttp is told to write none
        )
        self._connections = connections
        self._at_work = False
        self._unread: StreamReader | None = None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.idle(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._in_time()
        self._connections.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._unread is not None:  # what came belongs to a body, its end perhaps
            self._unread = None if self._unread.is_eof() else self._unread
        elif not self._at_work and self._late is None and b"\r\n\r\n" not in data:
            self._late = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._end_late)

    def begin(self) -> None:
        """Note that a whole head is here and its request is at work."""
        self._at_work = True
        self._in_time()
        self._connections.busy(self)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if not resp.prepared:
            resp.headers.update(ALWAYS)
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._at_work = False
            self._unread = None if request.content.is_eof() else request.content
            if self.transport is not None:
                self._connections.idle(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what came to no handler, or out of one as an error, without repeating any of it."""
        if status == HTTPStatus.BAD_REQUEST:
            log.debug("request_broken", extra={"reason": type(exc).__name__})
            problem = Problem(400, BROKEN, kind="not-http")
        else:
            log.error("request_failed", exc_info=exc)
            problem = Problem(500, "the relay failed on this request; its log says how")
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, so there can be no other")
        response = problem.response()
        response.force_close()
        return response

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end_late(self) -> None:
        if self.transport is not None:
            self.transport.write(raw(Problem(408, LATE)))
        self.force_close()


class Refused(asyncio.Protocol):
    """A connection too many: told so, and given a moment to read it."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast("asyncio.Transport", transport)
        stream.write(raw(unavailable(FULL)))
        if self._connections.refuse():
            # Closed at once with a request unread, it would be reset, and the answer lost with it.
            stream.write_eof()
            self._end = asyncio.get_running_loop().call_later(REFUSED_SECONDS, stream.close)
        else:
            stream.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.refused()
        if self._end is not None:
            self._end.cancel()


def raw(problem: Problem) -> bytes:
    """Write an answer where there is no request to answer."""
    response = problem.response()
    body = response.body if isinstance(response.body, bytes) else b""
    headers = {**ALWAYS, **response.headers, "Content-Length": str(len(body)), "Connection": "close"}
    lines = [
        f"HTTP/1.1 {response.status} {response.reason}",
        *(f"{each}: {headers[each]}" for each in headers),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _tracked(handler: Callable[[Any], Awaitable[web.StreamResponse]]) -> Callable[..., Awaitable[Any]]:
    """Let the connection know when a request begins; what the framework raises becomes an answer of ours."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if isinstance(request.protocol, Connection):
            request.protocol.begin()
        if request.version < HttpVersion10:
            return _no_version(request)
        try:
            return await handler(request)
        except web.HTTPException as error:
            return of_framework(error).response()

    return handle


def _no_version(request: web.BaseRequest) -> web.StreamResponse:
    """Refuse what has the form of HTTP/0.9: whatever speaks that did not mean us.

    The answer is written here, because aiohttp's would be of the same version.
    """
    problem = Problem(400, BROKEN, kind="not-http")
    if request.transport is not None:
        request.transport.write(raw(problem))
        request.protocol.force_close()
    return problem.response()
