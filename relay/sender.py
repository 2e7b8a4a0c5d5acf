"""One attempt: an endpoint and a message in, what the attempt met out.

A network failure is a value here (`Outcome.reason`, a name of contract section 6), never an exception. A
complete response head with 2xx is success, whatever the body does afterwards. Nothing here retries,
remembers, or knows of deliveries.

Where a connection may go is judged at every dial, by what `egress` says. A pooled connection skips the dial,
so endpoints that may dial different places never share a pool.
"""

import asyncio
import concurrent.futures
import errno
import functools
import logging
import math
import socket
import ssl
import threading
from asyncio import sslproto
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage
from aiohttp.streams import StreamReader
from multidict import CIMultiDict
from yarl import URL

from relay import egress
from relay.model import Endpoint, Message, Outcome

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# What may be dialled: the ranges that are open, and whether without TLS, so to this machine only.
_Right = tuple[tuple[egress.Network, ...], bool]

log = logging.getLogger("relay")

_CONNECT_SECONDS = 5.0
_BODY_SECONDS = 1.0  # the head has decided: what the body still says is not worth holding a slot for
_BODY_READ = 16 * 1024
_BODY_KEPT = 1024
_RETRY_AFTER_CHARACTERS = 128
_DETAIL_CHARACTERS = 200
_ADDRESSES_PER_NAME = 4
_UNREAD_HEADS = 8
_LOOK_UPS_AT_ONCE = 16
_PREPARED_AT_MOST = 4096
_TLS_READ_BUFFER = 32 * 1024
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, never bound
_STATUS_REASONS = dict.fromkeys((301, 302, 303, 307, 308), "redirect_refused")


@asynccontextmanager
async def open_sender(
    *,
    policy: egress.Policy,
    version: str,
    own_addresses: frozenset[tuple[str, int]] = frozenset(),
    resolve: Resolve | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator["Sender"]:
    """Keep the connections of a sender open; tests bring their own look-ups and certificate authority."""
    if hasattr(sslproto.SSLProtocol, "max_size"):
        # asyncio would keep 256 KiB to read into for every TLS connection; answers are small.
        sslproto.SSLProtocol.max_size = _TLS_READ_BUFFER
    context = ssl_context or ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    sender = Sender(
        policy=policy,
        version=version,
        own_addresses=own_addresses,
        resolve=resolve or _LookUps(),
        ssl_context=context,
    )
    try:
        yield sender
    finally:
        await sender.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What is the same in every attempt to one endpoint."""

    endpoint: Endpoint
    url: URL
    headers: CIMultiDict[str]
    timeout: aiohttp.ClientTimeout
    session: aiohttp.ClientSession


class Sender:
    """Sends messages to endpoints; `own_addresses` are the relay's listeners, which are never dialled."""

    def __init__(
        self,
        *,
        policy: egress.Policy,
        version: str,
        own_addresses: frozenset[tuple[str, int]],
        resolve: Resolve,
        ssl_context: ssl.SSLContext,
    ) -> None:
        self.own_addresses = own_addresses
        self._policy = policy
        self._user_agent = f"relay/{version}"
        self._resolve = resolve
        self._ssl_context = ssl_context
        self._prepared: dict[str, _Prepared] = {}
        self._sessions: dict[_Right, aiohttp.ClientSession] = {}

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Make one attempt. Raises nothing but what cancels it."""
        started = perf_counter()
        try:
            prepared = self._prepared.get(endpoint.id)
            if prepared is None or prepared.endpoint is not endpoint:
                prepared = self._prepare(endpoint)
            response = await prepared.session.post(
                prepared.url,
                data=message.body,
                headers=_headers(prepared, message),
                timeout=prepared.timeout,
                allow_redirects=False,
            )
            body = await _excerpt(response)
        except (aiohttp.ClientError, OSError) as error:
            reason, detail = _failure(error)
            return Outcome(milliseconds=_since(started), reason=reason, detail=detail)
        except Exception as error:  # one delivery's fault must not end the lane of all the others
            log.exception("attempt_broke", extra={"endpoint": endpoint.id, "event_id": message.id})
            return Outcome(milliseconds=_since(started), reason="internal_error", detail=type(error).__name__)
        return _outcome(response, body, _since(started))

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    def _prepare(self, endpoint: Endpoint) -> _Prepared:
        """Do once what would be the same in every attempt. Raises RefusedError."""
        problem = egress.check_url(endpoint.url, self._policy)
        if problem is not None:
            raise RefusedError(f"the URL {problem}")
        url = URL(endpoint.url, encoded=True)  # exactly as it was given
        plain = url.scheme == "http"
        allow = self._policy.opened_to(endpoint.source, plain=plain)
        headers = CIMultiDict({"User-Agent": self._user_agent, "Accept-Encoding": "identity"})
        headers.update((name, value.reveal()) for name, value in endpoint.headers)
        prepared = _Prepared(
            endpoint=endpoint,
            url=url,
            headers=headers,
            timeout=_timeout(endpoint.timeout_seconds),
            session=self._session((allow, plain)),
        )
        if len(self._prepared) >= _PREPARED_AT_MOST:
            self._prepared.clear()
        self._prepared[endpoint.id] = prepared
        return prepared

    def _session(self, right: _Right) -> aiohttp.ClientSession:
        """Return the session of this right: the one place where a session is built."""
        session = self._sessions.get(right)
        if session is None:
            guard = _Guard(right, self._is_own, self._resolve)
            session = self._sessions[right] = aiohttp.ClientSession(
                connector=_Connector(guard, self._ssl_context),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=_BODY_READ,
            )
        return session

    def _is_own(self, address: str, port: int) -> bool:
        """Tell whether the relay itself listens there, also when it listens on every address."""
        ip = str(egress.canonical(address))
        listening = {host for host, taken in self.own_addresses if taken == port}
        return ip in listening or (bool(listening & _EVERY_ADDRESS) and _is_local(ip))


class RefusedError(OSError):
    """A dial that the guard refused; `why` says more.

    An OSError of constant errno and text, because aiohttp loses every other when several addresses fail.
    """

    def __init__(self, why: str) -> None:
        super().__init__(errno.EACCES, "refused by the relay's own rules")
        self.why = why


class _Guard(AbstractResolver):
    """Judges every dial of one right: names, literals, and names that changed since they were looked up."""

    def __init__(self, right: _Right, is_own: Callable[[str, int], bool], resolve: Resolve) -> None:
        self._allow, self._plain = right
        self._is_own = is_own
        self._resolve = resolve

    def check(self, address: str, port: int) -> None:
        """Raise RefusedError unless this address may be dialled."""
        reason = egress.judge(address, self._allow)
        if reason is None and self._plain and egress.judge(address, ()) != "loopback":
            reason = "not loopback, and http is for loopback only"
        if reason is None and self._is_own(address, port):
            reason = "the relay itself"
        if reason is not None:
            raise RefusedError(f"{address} is {reason}")

    def dial(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """Make the socket for one dial, if it may be made."""
        family, kind, protocol, _, place = info
        self.check(place[0], place[1])
        return socket.socket(family, kind, protocol)

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        """Look a name up; one forbidden answer refuses it, whoever gave that meant us to go there."""
        addresses = await self._resolve(host, port)
        if not addresses:
            raise OSError(errno.EADDRNOTAVAIL, "the name has no address")
        for address in addresses:
            self.check(address, port)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses[:_ADDRESSES_PER_NAME]
        ]

    async def close(self) -> None:
        """Nothing is kept open."""


class _LookUps:
    """Asks the system's resolver, in daemon threads: a hanging one delays no other work and no exit."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_LOOK_UPS_AT_ONCE)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        async with self._slots:
            answer = concurrent.futures.Future[Sequence[str]]()
            answer.set_running_or_notify_cancel()  # the thread will answer, also when nobody waits any more
            threading.Thread(target=_ask, args=(host, port, answer), name="look-up", daemon=True).start()
            return await asyncio.wrap_future(answer)


def _ask(host: str, port: int, answer: concurrent.futures.Future[Sequence[str]]) -> None:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except OSError as error:
        answer.set_exception(error)
    else:
        answer.set_result([str(info[4][0]) for info in infos])


class _Connector(aiohttp.TCPConnector):
    """Makes connections that are judged by the guard and cut off as `_Connection` says; lanes bound them."""

    def __init__(self, guard: _Guard, ssl_context: ssl.SSLContext) -> None:
        super().__init__(limit=0, ssl=ssl_context, resolver=guard, socket_factory=guard.dial)
        # aiohttp has no public way to say this; tests with a flooding receiver notice if it changes.
        connection: type[ResponseHandler] = _Connection
        self._factory = functools.partial(connection, loop=self._loop)


class _Connection(ResponseHandler):
    """One connection, which ends by abort: after a mere close uvloop goes on receiving for 30 s."""

    def close(self) -> None:
        self.abort()

    def data_received(self, data: bytes) -> None:
        """Let a head count that came together with the beginning of a broken body."""
        head, end, body = data.partition(b"\r\n\r\n")
        super().data_received(head + end)
        if body:
            super().data_received(body)

    def set_exception(self, *error: BaseException) -> None:
        super().set_exception(*error)
        if self.transport is not None:
            self.transport.abort()

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Take one answer's head; a receiver that sends them unasked would fill the memory."""
        super().feed_data(data, size)
        if len(self) > _UNREAD_HEADS and self.exception() is None:
            self.set_exception(HttpProcessingError(message="more answers than requests"))


def _headers(prepared: _Prepared, message: Message) -> CIMultiDict[str]:
    headers = prepared.headers.copy()
    headers["Content-Type"] = message.content_type
    headers["webhook-id"] = message.id
    headers["webhook-timestamp"] = str(message.timestamp)
    headers["webhook-attempt"] = str(message.attempt)
    headers.extend(message.headers)
    for sign in prepared.endpoint.sign:
        headers.extend(sign(message))
    return headers


async def _excerpt(response: aiohttp.ClientResponse) -> bytes:
    """Return the beginning of the body, as far as it comes; what is longer or slower is cut off."""
    content = response.content
    kept = b""
    taken = 0
    try:
        if content.is_eof():
            return content.read_nowait(_BODY_KEPT)
        async with asyncio.timeout(_BODY_SECONDS):
            while taken < _BODY_READ and (chunk := await content.read(_BODY_READ - taken)):
                taken += len(chunk)
                kept += chunk[: _BODY_KEPT - len(kept)]
    except (aiohttp.ClientError, OSError):
        pass  # the head has decided
    finally:
        if response.connection is not None:  # not back in the pool, so something is unread or unsent
            response.close()
    return kept


def _outcome(response: aiohttp.ClientResponse, body: bytes, milliseconds: int) -> Outcome:
    status = response.status
    retry_after = response.headers.get("Retry-After")
    return Outcome(
        milliseconds=milliseconds,
        status=status,
        reason=None if 200 <= status <= 299 else _STATUS_REASONS.get(status, f"http_{status}"),
        answer=body.decode(errors="replace") if body else None,
        retry_after=retry_after[:_RETRY_AFTER_CHARACTERS] if retry_after is not None else None,
    )


# The first that fits counts: aiohttp's classes overlap.
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (RefusedError, "blocked_address"),
    (ssl.CertificateError, "tls_cert"),
    (ssl.SSLError, "tls_error"),
    (aiohttp.ClientConnectorDNSError, "dns_error"),
    (aiohttp.ConnectionTimeoutError, "connect_timeout"),
    (TimeoutError, "timeout"),
    (aiohttp.ServerDisconnectedError, "conn_closed"),
    (ConnectionRefusedError, "conn_refused"),
    (ConnectionError, "conn_reset"),
    (OSError, "unreachable"),
    (Exception, "protocol_error"),
)


def _failure(error: Exception) -> tuple[str, str | None]:
    """Name a failure and say for the operator what happened, without the URL: its query may be secret."""
    cause = error.__cause__
    reason = next(name for kind, name in _REASONS if isinstance(cause, kind) or isinstance(error, kind))
    return reason, _detail(cause or error)


def _detail(error: BaseException) -> str | None:
    if isinstance(error, RefusedError):
        return error.why
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection ended before a complete answer"
    return " ".join(str(error).split())[:_DETAIL_CHARACTERS] or None


def _since(started: float) -> int:
    return round((perf_counter() - started) * 1000)


def _timeout(seconds: float) -> aiohttp.ClientTimeout:
    """Return the deadline of a whole attempt, and of its connect: look-up, TCP and TLS handshake."""
    # A little less than the whole, so that what never connected is told from what never answered; and no
    # rounding up to full seconds, which is aiohttp's way from 5 s on.
    connect = min(_CONNECT_SECONDS, seconds * 0.9)
    return aiohttp.ClientTimeout(total=seconds, connect=connect, ceil_threshold=math.inf)


def _is_local(address: str) -> bool:
    """Tell whether an address is one of this machine's: what is sent there would be sent from there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # picks the source address; a datagram socket sends nothing yet
        except OSError:
            return False
        return bool(probe.getsockname()[0] == address)
