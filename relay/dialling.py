"""Connections to receivers: a way there in, a session out whose every dial is judged.

`Way` says how an endpoint is reached: which addresses may be dialled, what is shown and trusted in TLS,
through which proxy. A pooled connection is not dialled again, so endpoints with different ways never share
a session. `open_session` is the one place in the relay that builds one.
"""

import asyncio
import errno
import functools
import socket
import ssl
from asyncio import sslproto
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage
from aiohttp.streams import StreamReader
from aiohttp.tracing import Trace

from relay import egress
from relay.lookup import Names
from relay.model import Proxy, TlsFiles

BODY_READ = 16 * 1024
_ADDRESSES_PER_NAME = 4
_UNREAD_HEADS = 8
_TLS_READ_BUFFER = 32 * 1024
_CONNECT_SHARE = 0.9  # of the time for connecting: to the proxy, until it says that the tunnel stands
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, never bound

IsOwn = Callable[[str, int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How an endpoint is reached."""

    allow: tuple[egress.Network, ...]
    plain: bool = False  # without TLS, so to this machine only
    tls: TlsFiles | None = None
    proxy: Proxy | None = None


class RefusedError(OSError):
    """A dial that the guard refused; `why` says more.

    An OSError of constant errno and text, because aiohttp loses every other when several addresses fail.
    """

    def __init__(self, why: str) -> None:
        super().__init__(errno.EACCES, "refused by the relay's own rules")
        self.why = why


class ProxyError(OSError):
    """No tunnel came about, so nothing was asked of the receiver; `why` says more."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EHOSTUNREACH, "the proxy made no tunnel")
        self.why = why


def open_session(way: Way, names: Names, is_own: IsOwn, context: ssl.SSLContext) -> aiohttp.ClientSession:
    """Build the session of a way: the one place where this is done, because every way out is judged."""
    if hasattr(sslproto.SSLProtocol, "max_size"):
        # asyncio would keep 256 KiB to read into for every TLS connection; answers are small.
        sslproto.SSLProtocol.max_size = _TLS_READ_BUFFER
    guard = Guard(way, names, is_own) if way.proxy is None else ProxyGuard(way, way.proxy, names, is_own)
    return aiohttp.ClientSession(
        connector=Connector(guard, context),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        read_bufsize=BODY_READ,
    )


class Guard(AbstractResolver):
    """Judges every dial of one way: names, literals, and names that changed since they were looked up."""

    def __init__(self, way: Way, names: Names, is_own: IsOwn) -> None:
        self._way = way
        self._names = names
        self._is_own = is_own

    def check(self, address: str, port: int) -> None:
        """Raise RefusedError unless a receiver may be at this address."""
        reason = egress.judge(address, self._way.allow)
        if reason is None and self._way.plain and egress.judge(address, ()) != "loopback":
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
        addresses = await self._names.addresses(host)
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
            for address in chosen(addresses)
        ]

    async def tunnel(self, host: str, port: int) -> None:
        """Judge what a proxy is to be asked for; without one there is none to ask."""

    async def close(self) -> None:
        """Nothing is kept open."""


class ProxyGuard(Guard):
    """Lets nothing be dialled but the proxy, and judges what that is asked for as far as we can know it."""

    def __init__(self, way: Way, proxy: Proxy, names: Names, is_own: IsOwn) -> None:
        super().__init__(way, names, is_own)
        self._proxy = proxy
        literal = egress.canonical(proxy.host)
        self._own_addresses = {str(literal)} if literal is not None else set()

    def dial(self, info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, place = info
        self._check_proxy(place[0], place[1])
        return socket.socket(family, kind, protocol)

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        if (host, port) != (self._proxy.host, self._proxy.port):
            raise RefusedError(f"{host} is not the proxy")
        addresses = chosen(await self._names.addresses(host))
        self._own_addresses = {str(egress.canonical(address)) for address in addresses}
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=0, proto=0, flags=socket.AI_NUMERICHOST
            )
            for address in addresses
        ]

    async def tunnel(self, host: str, port: int) -> None:
        """Judge a receiver before the proxy is asked; a name that only the proxy knows is its to judge."""
        if egress.canonical(host) is not None:
            self.check(host, port)
            return
        for address in await self._names.addresses_soon(host) or ():
            self.check(address, port)

    def _check_proxy(self, address: str, port: int) -> None:
        """Raise RefusedError unless this is the proxy, at an address that the config can open at all."""
        ip = egress.canonical(address)
        if ip is None or str(ip) not in self._own_addresses or port != self._proxy.port:
            raise RefusedError(f"{address} is not the proxy")
        reason = egress.judge(address, (ip_network(ip),))
        if reason is None and self._is_own(address, port):
            reason = "the relay itself"
        if reason is not None:
            raise RefusedError(f"{address} is {reason}")


def chosen(addresses: Sequence[str]) -> Sequence[str]:
    """Return those of a name's addresses that are tried: the first few, of both families if there are."""
    first, rest = addresses[:_ADDRESSES_PER_NAME], addresses[_ADDRESSES_PER_NAME:]
    if len({":" in address for address in first}) == 1:
        other = next((address for address in rest if (":" in address) != (":" in first[0])), None)
        if other is not None:
            return (*first[:-1], other)
    return first


class Connector(aiohttp.TCPConnector):
    """Makes connections that are judged by the guard and cut off as `Connection` says; lanes bound them.

    aiohttp has no public way to say some of this; tests with hostile receivers and proxies notice a change.
    """

    def __init__(self, guard: Guard, ssl_context: ssl.SSLContext) -> None:
        # Names are remembered in one place for all sessions, and not here.
        super().__init__(
            limit=0, ssl=ssl_context, resolver=guard, socket_factory=guard.dial, use_dns_cache=False
        )
        connection: type[ResponseHandler] = Connection
        self._factory = functools.partial(connection, loop=self._loop)
        self._guard = guard
        self._asking: dict[aiohttp.ClientRequest, asyncio.Timeout] = {}  # the proxy for a tunnel

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - not ours
    ) -> ResponseHandler:
        if req.proxy is None:
            return await super()._create_connection(req, traces, timeout)
        await self._guard.tunnel(req.host, req.port or 0)
        try:
            async with asyncio.timeout((timeout.connect or 0) * _CONNECT_SHARE) as self._asking[req]:
                return await super()._create_connection(req, traces, timeout)
        except (aiohttp.ClientError, OSError) as error:
            if req in self._asking:
                raise ProxyError(_refusal(error)) from error
            raise
        finally:
            self._asking.pop(req, None)

    async def _start_tls_connection(
        self,
        underlying_transport: asyncio.Transport,
        req: aiohttp.ClientRequest,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - not ours
        client_error: type[Exception] = aiohttp.ClientConnectorError,
    ) -> tuple[asyncio.BaseTransport, ResponseHandler]:
        self._asking.pop(req).reschedule(None)  # the tunnel stands: from here on it is the receiver
        return await super()._start_tls_connection(underlying_transport, req, timeout, client_error)


def _refusal(error: Exception) -> str:
    """Say what came of asking a proxy."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"it answered {error.status} {error.message}"
    if isinstance(error.__cause__, RefusedError):
        return error.__cause__.why
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return str(error.__cause__ or error) or type(error).__name__


class Connection(ResponseHandler):
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
        """End the connection, and the body that is being read: nothing more of it will come."""
        body = self._payload
        if body is not None and not body.is_eof():
            body.set_exception(aiohttp.ClientPayloadError("the answer is broken"))
        super().set_exception(*error)
        if self.transport is not None:
            self.transport.abort()

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Take one answer's head; a receiver that sends them unasked would fill the memory."""
        super().feed_data(data, size)
        if len(self) > _UNREAD_HEADS and self.exception() is None:
            self.set_exception(HttpProcessingError(message="more answers than requests"))


def listens(address: str, port: int, listening: Collection[tuple[str, int]]) -> bool:
    """Tell whether a listener is at this address, also one on every address of this machine."""
    ip = str(egress.canonical(address))
    hosts = {host for host, taken in listening if taken == port}
    return ip in hosts or (bool(hosts & _EVERY_ADDRESS) and _is_local(ip))


def _is_local(address: str) -> bool:
    """Tell whether an address is one of this machine's: what is sent there would be sent from there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # picks the source address; a datagram socket sends nothing yet
        except OSError:
            return False
        return bool(probe.getsockname()[0] == address)
