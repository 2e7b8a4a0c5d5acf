"""A receiver that answers each path in a way of its own, mostly bad, and what the sender must make of it.

`SET` is the whole set: for each path what it does and the outcome that contract section 6 demands.
`HostileReceiver` is a real TLS server on a real socket; every flood it makes is bounded in bytes and time.
"""

import asyncio
import gzip
import re
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Self

from relay.egress import Policy
from relay.model import Endpoint, Message, Outcome
from relay.sender import Sender, open_sender
from tests.receiver import Receiver

OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
FLOOD_BYTES = 64 << 20
FLOOD_SECONDS = 5.0
LOOPBACK = Policy(allow_private=(ip_network("127.0.0.0/8"), ip_network("::1/128")))


@dataclass(frozen=True, slots=True)
class Arrived:
    """One request as it arrived."""

    path: str
    headers: Mapping[str, str]  # by lower-cased name
    body: bytes


@dataclass(frozen=True, slots=True)
class Talk:
    """A connection, with what was asked on it; helps to misbehave."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    request: Arrived

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def flood(self, piece: bytes, every: float = 0.0) -> None:
        """Say the same for as long as anybody listens, within bounds."""
        until, sent = time.monotonic() + FLOOD_SECONDS, 0
        while sent < FLOOD_BYTES and time.monotonic() < until:
            await self.say(piece)
            sent += len(piece)
            await asyncio.sleep(every)

    async def listen(self) -> None:
        """Say nothing until the other side goes."""
        while await self.reader.read(65536):
            pass

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


Act = Callable[[Talk], Awaitable[bool | None]]  # True: ready for another request


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a path does, and the outcome it must have: a status, or the name of a failure, or both."""

    act: Act
    status: int | None
    reason: str | None
    reads_body: bool = True


def saying(data: bytes, *, then: str = "stay") -> Act:
    """Answer with these bytes, and then stay for the next request, wait, close or reset."""

    async def act(talk: Talk) -> bool:
        await talk.say(data)
        if then == "wait":
            await talk.listen()
        elif then == "reset":
            talk.reset()
        return then == "stay"

    return act


def flooding(head: bytes, piece: bytes, every: float = 0.0) -> Act:
    async def act(talk: Talk) -> None:
        await talk.say(head)
        await talk.flood(piece, every)

    return act


async def silence(talk: Talk) -> None:
    await talk.listen()


async def never_reading(talk: Talk) -> None:
    talk.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(FLOOD_SECONDS)
    talk.writer.transport.abort()


def head(status: int, *lines: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\n" % status + b"".join(line + b"\r\n" for line in lines) + EMPTY


def bomb() -> bytes:
    packed = gzip.compress(bytes(64 << 20))
    return OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
LONG = OK + b"Content-Length: 1000000000000\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
HOARD = b"a" * 65536

DELIVERED: dict[str, Act] = {
    "ok": saying(OK + EMPTY),
    "close": saying(OK + b"Connection: close\r\n" + EMPTY, then="close"),
    "closes afterwards": saying(OK + EMPTY, then="close"),
    "endless body": flooding(LONG, HOARD),
    "endless chunks": flooding(CHUNKED, b"10000\r\n" + HOARD + b"\r\n"),
    "endless body without length": flooding(OK + b"\r\n", HOARD),
    "dripping body": flooding(LONG, b"a", 0.05),
    "short body": saying(OK + b"Content-Length: 100\r\n\r\nhello", then="close"),
    "short chunks": saying(CHUNKED + b"5\r\nhello\r\n", then="close"),
    "reset after the head": saying(OK + b"Content-Length: 100\r\n\r\n", then="reset"),
    "reset in the body": saying(OK + b"Content-Length: 100\r\n\r\nhello", then="reset"),
    "broken chunk": saying(CHUNKED + b"zz\r\nhello", then="wait"),
    "endless chunk size": flooding(CHUNKED, b"1" * 65536),
    "endless chunk extension": flooding(CHUNKED + b"5;a=", HOARD),
    "endless trailer": flooding(CHUNKED + b"0\r\n", b"A: b\r\n" * 1000),
    "gzip bomb": saying(bomb()),
    "broken gzip": saying(OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\njunk"),
    "unknown encoding": saying(OK + b"Content-Encoding: x-none\r\nContent-Length: 4\r\n\r\njunk"),
    "early hints": saying(EARLY + OK + EMPTY),
    "continue": saying(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + EMPTY),
    "five early hints": saying(EARLY * 5 + OK + EMPTY),
    "answers unasked": flooding(OK + EMPTY, (OK + EMPTY) * 50),
    "cookies": saying(head(200, *(b"Set-Cookie: a%d=%s" % (each, b"b" * 80) for each in range(60)))),
    "a header a hundred times": saying(head(200, *[b"Date: Thu, 01 Jan 1970 00:00:00 GMT"] * 100)),
    "state to be kept": saying(
        head(200, b"Strict-Transport-Security: max-age=1", b'Alt-Svc: h2="evil.example:443"', b"Location: /")
    ),
    "not text": saying(OK + b"Content-Length: 4\r\n\r\n\xff\xfe\x00<"),
    "HTTP/1.0": saying(b"HTTP/1.0 200 OK\r\n\r\nhello", then="close"),
}

STATUSES = (
    300,
    304,
    400,
    401,
    403,
    404,
    405,
    409,
    410,
    413,
    415,
    422,
    429,
    451,
    500,
    502,
    503,
    504,
    600,
    999,
)
REDIRECTS = (301, 302, 303, 307, 308)

FAILED: dict[str, tuple[Act, str]] = {
    "silence": (silence, "timeout"),
    "dripping head": (flooding(OK + b"X-A: ", b"a", 0.05), "timeout"),
    "half a head": (saying(OK + b"Content-Le", then="wait"), "timeout"),
    "dripping interim answers": (flooding(b"", b"HTTP/1.1 103 X\r\n\r\n", 0.02), "timeout"),
    "endless interim answers": (flooding(b"", b"HTTP/1.1 103 X\r\n\r\n" * 50), "protocol_error"),
    "closed at once": (saying(b"", then="close"), "conn_closed"),
    "closed in the status line": (saying(b"HTTP/1.1 20", then="close"), "conn_closed"),
    "closed in a header": (saying(OK + b"Content-Le", then="close"), "conn_closed"),
    "closed after interim": (saying(EARLY, then="close"), "conn_closed"),
    "reset at once": (saying(b"", then="reset"), "conn_reset"),
    "reset in the status line": (saying(b"HTTP/1.1 20", then="reset"), "conn_reset"),
    "endless headers": (flooding(OK, b"X-A: b\r\n" * 100), "protocol_error"),
    "endless header": (flooding(OK, HOARD), "protocol_error"),
    "endless status line": (flooding(b"HTTP/1.1 200 ", HOARD), "protocol_error"),
    "two megabytes of header": (saying(OK + b"X: " + b"a" * (2 << 20) + b"\r\n\r\n"), "protocol_error"),
    "two hundred headers": (saying(head(200, *[b"X: y"] * 200)), "protocol_error"),
    "another protocol": (saying(b"SSH-2.0-OpenSSH_9.2\r\n", then="wait"), "protocol_error"),
    "HTTP/2": (saying(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", then="wait"), "protocol_error"),
    "four digits": (saying(b"HTTP/1.1 1000 X\r\n" + EMPTY), "protocol_error"),
    "two digits": (saying(b"HTTP/1.1 20 X\r\n" + EMPTY), "protocol_error"),
    "two lengths": (saying(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"), "protocol_error"),
    "a negative length": (saying(OK + b"Content-Length: -1\r\n\r\n"), "protocol_error"),
    "a NUL in a header": (saying(OK + b"X-A: a\x00b\r\n" + EMPTY), "protocol_error"),
    "a space before the colon": (saying(OK + b"X-A : b\r\n" + EMPTY), "protocol_error"),
    "endless junk": (flooding(b"", b"\x00\xff" * 32768), "protocol_error"),
}


def paths() -> Iterator[tuple[str, Behaviour]]:
    for name, act in DELIVERED.items():
        yield name, Behaviour(act, 200, None)
    for status in (201, 202, 204, 205, 206, 299):
        yield f"status {status}", Behaviour(saying(head(status)), status, None)
    for status in STATUSES:
        yield f"status {status}", Behaviour(saying(head(status)), status, f"http_{status}")
    for status in REDIRECTS:
        aside = head(status, b"Location: https://127.0.0.1:1/")
        yield f"redirect {status}", Behaviour(saying(aside), status, "redirect_refused")
        yield f"redirect {status} to nowhere", Behaviour(saying(head(status)), status, "redirect_refused")
    upgrade = b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    yield "status 101", Behaviour(saying(upgrade, then="wait"), 101, "http_101")
    yield (
        "endless failure",
        Behaviour(
            flooding(b"HTTP/1.1 500 X\r\nContent-Length: 1000000000000\r\n\r\n", HOARD), 500, "http_500"
        ),
    )
    for name, (act, reason) in FAILED.items():
        yield name, Behaviour(act, None, reason)
    yield "never reads", Behaviour(never_reading, None, "timeout", reads_body=False)
    yield "answers before the body", Behaviour(saying(OK + EMPTY, then="close"), 200, None, reads_body=False)


SET = {"/" + re.sub(r"[^a-z0-9]+", "-", name.lower()): behaviour for name, behaviour in paths()}


class HostileReceiver:
    """Answers as `SET` says, by path, on a certificate for these names and 127.0.0.1."""

    def __init__(self, *names: str, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[Arrived] = []
        self.connections = 0
        self.open = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            Receiver.authority.issue_cert("127.0.0.1", *names).configure_cert(context)
        self._context = context

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"https://{host}:{self.port}{path}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await self.quiet()

    async def quiet(self, within: float = 5.0) -> None:
        """Wait until every connection is over. Raises TimeoutError."""
        async with asyncio.timeout(within):
            while self._tasks:
                await asyncio.wait(self._tasks)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            await self._part(writer)
            self.open -= 1
            self._tasks.discard(task)

    async def _part(self, writer: asyncio.StreamWriter) -> None:
        """Close a connection, by force if it does not let itself be closed."""
        writer.close()
        try:
            async with asyncio.timeout(0.5):
                await writer.wait_closed()
        except (TimeoutError, asyncio.CancelledError):
            writer.transport.abort()
        except OSError:
            pass

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        path = first.split()[1].partition("?")[0]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        behaviour = SET[path]
        size = int(headers["content-length"]) if behaviour.reads_body else 0
        request = Arrived(path, headers, await reader.readexactly(size))
        self.requests.append(request)
        return bool(await behaviour.act(Talk(reader, writer, request)))


def right(path: str, outcome: Outcome) -> bool:
    """Tell whether this is what the contract says of a path, and nothing is kept that should not be."""
    behaviour = SET[path]
    return (
        (outcome.status, outcome.reason) == (behaviour.status, behaviour.reason)
        and not outcome.unspent
        and len(outcome.answer or "") <= 1024
    )


def to(url: str, *, timeout_seconds: float = 5.0, **settings: object) -> Endpoint:
    defaults = {"id": "main", "events": ("*",), "sign": (), "retry_schedule": (), "concurrency": 1}
    return Endpoint(url=url, timeout_seconds=timeout_seconds, **(defaults | settings))  # type: ignore[arg-type]


def message(size: int = 26) -> Message:
    return Message(
        id="evt_1",
        type="post.published",
        body=b'{"event":"post.published"}'.ljust(size),
        content_type="application/json",
        attempt=1,
        timestamp=1_768_471_200,
    )


@asynccontextmanager
async def loopback_sender(policy: Policy = LOOPBACK, **settings: object) -> AsyncIterator[Sender]:
    """Open a sender that may go to this machine and trusts the receivers of the tests."""
    trusting = ssl.create_default_context()
    Receiver.authority.configure_trust(trusting)
    settings = {"version": "1.2.3", "ssl_context": trusting} | settings
    async with open_sender(policy=policy, **settings) as sender:  # type: ignore[arg-type]
        yield sender


async def try_all(
    base: str, sender: Sender, timeout_seconds: float, paths: Iterable[str] = SET
) -> dict[str, Outcome]:
    """Make one attempt to each path, all at once."""
    async with asyncio.TaskGroup() as tasks:
        attempts = {
            path: tasks.create_task(
                sender.send(
                    to(base + path, id=path.strip("/"), timeout_seconds=timeout_seconds),
                    message(26 if SET[path].reads_body else 256 << 10),
                )
            )
            for path in paths
        }
    return {path: attempt.result() for path, attempt in attempts.items()}
