"""One attempt: an endpoint and a message in, what the attempt met out.

A network failure is a value here (`Outcome.reason`, a name of contract section 6), never an exception. A
complete response head with 2xx is success, whatever the body does afterwards. Nothing here retries,
remembers, or knows of deliveries.

How a connection comes about, and which never does, is `dialling.py`'s business.
"""

import asyncio
import logging
import math
import ssl
from collections.abc import AsyncIterator, Container, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from relay import egress
from relay.dialling import BODY_READ, ProxyError, RefusedError, Way, listens, open_session
from relay.lookup import Names
from relay.model import Endpoint, Message, Outcome, Proxy
from relay.tls import TlsFilesError, context_of

log = logging.getLogger("relay")

_CONNECT_SECONDS = 5.0
_BODY_SECONDS = 1.0  # the head has decided: what the body still says is not worth holding a slot for
_BODY_KEPT = 1024
_RETRY_AFTER_CHARACTERS = 128
_DETAIL_CHARACTERS = 200
_TURN_SECONDS = 10.0  # how long an attempt waits for its name's turn to be looked up, before it begins
_PREPARED_AT_MOST = 4096
_STATUS_REASONS = dict.fromkeys((301, 302, 303, 307, 308), "redirect_refused")


@asynccontextmanager
async def open_sender(
    *,
    policy: egress.Policy,
    version: str,
    own_addresses: frozenset[tuple[str, int]] = frozenset(),
    names: Names | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator["Sender"]:
    """Keep the connections of a sender open; tests bring their own look-ups and certificate authority."""
    sender = Sender(
        policy=policy,
        version=version,
        own_addresses=own_addresses,
        names=names or Names(),
        ssl_context=ssl_context or context_of(None),
    )
    try:
        yield sender
    finally:
        await sender.close()


@dataclass(slots=True)
class _Connections:
    """The session of one way; a `closing` one ends with the last attempt that is under way on it."""

    session: aiohttp.ClientSession
    attempts: int = 0
    closing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What is the same in every attempt to one endpoint."""

    endpoint: Endpoint
    url: URL
    name: str | None  # to be looked up before the attempt begins
    headers: CIMultiDict[str]
    timeout: aiohttp.ClientTimeout
    way: Way
    connections: _Connections
    proxy: Mapping[str, Any]  # as aiohttp wants to be told


class Sender:
    """Sends messages to endpoints; `own_addresses` are the relay's listeners, which are never dialled."""

    def __init__(
        self,
        *,
        policy: egress.Policy,
        version: str,
        own_addresses: frozenset[tuple[str, int]],
        names: Names,
        ssl_context: ssl.SSLContext,
    ) -> None:
        self.own_addresses = own_addresses
        self.policy = policy
        self._user_agent = f"relay/{version}"
        self._names = names
        self._ssl_context = ssl_context
        self._prepared: dict[str, _Prepared] = {}
        self._connections: dict[Way, _Connections] = {}

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Make one attempt. Raises nothing but what cancels it."""
        prepared = self._prepared.get(endpoint.id)
        if prepared is None or prepared.endpoint is not endpoint or prepared.connections.closing:
            try:
                prepared = await self.prepare(endpoint)
            except RefusedError as error:
                return failed(error, 0)
            except TlsFilesError as error:
                return _unspent(0, "tls_error", f"{error.key} {error}")
        connections = prepared.connections
        connections.attempts += 1
        try:
            return await self._attempt(prepared, message)
        finally:
            connections.attempts -= 1
            if connections.closing and not connections.attempts:
                await connections.session.close()

    async def _attempt(self, prepared: _Prepared, message: Message) -> Outcome:
        started = perf_counter()
        name = prepared.name
        if name is not None and not self._names.knows(name):
            # Waiting for others is not the receiver's doing: its time begins with the look-up.
            if not await self._names.begin(name, _TURN_SECONDS):
                return _unspent(_since(started), "dns_error", "too many look-ups are under way")
            started = perf_counter()
        try:
            response = await prepared.connections.session.post(
                prepared.url,
                data=message.body,
                headers=_headers(prepared, message),
                timeout=prepared.timeout,
                allow_redirects=False,
                **prepared.proxy,
            )
            body = await _excerpt(response)
        except (aiohttp.ClientError, OSError) as error:
            return failed(error, _since(started))
        except Exception as error:  # one delivery's fault must not end the lane of all the others
            log.exception("attempt_broke", extra={"endpoint": prepared.endpoint.id, "event_id": message.id})
            return Outcome(milliseconds=_since(started), reason="internal_error", detail=type(error).__name__)
        return _outcome(response, body, _since(started))

    async def change(self, policy: egress.Policy, endpoints: Container[str]) -> None:
        """Follow another policy from the next attempt on, and forget all endpoints but these.

        No connection from before is used again; attempts under way on one go on to their end.
        """
        self.policy = policy
        self._prepared = {id_: each for id_, each in self._prepared.items() if id_ in endpoints}
        for way in list(self._connections):
            await self._retire(way)

    async def close(self) -> None:
        for connections in self._connections.values():
            await connections.session.close()

    async def prepare(self, endpoint: Endpoint) -> _Prepared:
        """Do once what would be the same in every attempt. Raises RefusedError, TlsFilesError."""
        problem = egress.check_url(endpoint.url, self.policy)
        if problem is not None:
            raise RefusedError(f"the URL {problem}")
        url = URL(endpoint.url, encoded=True)  # exactly as it was given
        way = self._way(endpoint, plain=url.scheme == "http")
        before = self._prepared.pop(endpoint.id, None)
        if before is not None and (before.url != url or before.way != way) and not self._is_used(before.way):
            await self._retire(before.way)  # what led elsewhere, or trusted others, is not used again
        headers = CIMultiDict({"User-Agent": self._user_agent, "Accept-Encoding": "identity"})
        headers.update((name, value.reveal()) for name, value in endpoint.headers)
        prepared = _Prepared(
            endpoint=endpoint,
            url=url,
            name=_name(url) if way.proxy is None else None,
            headers=headers,
            timeout=_timeout(endpoint.timeout_seconds),
            way=way,
            connections=self._connect(way),
            proxy=self._asked(way.proxy),
        )
        if len(self._prepared) >= _PREPARED_AT_MOST:
            self._prepared.clear()
        self._prepared[endpoint.id] = prepared
        return prepared

    def _way(self, endpoint: Endpoint, *, plain: bool) -> Way:
        return Way(
            allow=self.policy.opened_to(endpoint.source, plain=plain),
            plain=plain,
            tls=endpoint.tls,
            proxy=endpoint.proxy
            if not plain
            else None,  # plain is to this machine, whatever a proxy takes that for
        )

    def _connect(self, way: Way) -> _Connections:
        connections = self._connections.get(way)
        if connections is None:
            context = self._ssl_context if way.tls is None else context_of(way.tls)
            session = open_session(way, self._names, self._is_own, context)
            connections = self._connections[way] = _Connections(session)
        return connections

    def _asked(self, proxy: Proxy | None) -> Mapping[str, Any]:
        if proxy is None:
            return {}
        headers = {"User-Agent": self._user_agent}
        if proxy.authorization is not None:
            headers["Proxy-Authorization"] = proxy.authorization.reveal()
        return {"proxy": URL.build(scheme="http", host=proxy.host, port=proxy.port), "proxy_headers": headers}

    def _is_own(self, address: str, port: int) -> bool:
        return listens(address, port, self.own_addresses)

    def _is_used(self, way: Way) -> bool:
        """Tell whether an endpoint goes this way; another one's change must not cost it its connections."""
        return any(each.way == way for each in self._prepared.values())

    async def _retire(self, way: Way) -> None:
        """Use the connections of a way no more, as soon as no attempt is under way on them."""
        connections = self._connections.pop(way, None)
        if connections is not None:
            connections.closing = True
            if not connections.attempts:
                await connections.session.close()


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
            while taken < BODY_READ and (chunk := await content.read(BODY_READ - taken)):
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
    (ProxyError, "unreachable"),
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


def failed(error: Exception, milliseconds: int) -> Outcome:
    """Name a failure and say for the operator what happened, without the URL: its query may be secret."""
    cause = error.__cause__
    return Outcome(
        milliseconds=milliseconds,
        reason=next(name for kind, name in _REASONS if isinstance(cause, kind) or isinstance(error, kind)),
        detail=_detail(cause or error),
        unspent=isinstance(cause or error, ProxyError),
    )


def _unspent(milliseconds: int, reason: str, detail: str) -> Outcome:
    """Say why an attempt could not even begin."""
    return Outcome(milliseconds=milliseconds, reason=reason, detail=detail, unspent=True)


def _detail(error: BaseException) -> str | None:
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection ended before a complete answer"
    text = str(error)
    if isinstance(error, RefusedError):
        text = error.why
    elif isinstance(error, ProxyError):
        text = f"the proxy: {error.why}"
    return " ".join(text.split())[:_DETAIL_CHARACTERS] or None


def _name(url: URL) -> str | None:
    """Return what has to be looked up for a URL; an address has not."""
    host = url.raw_host or ""
    return None if egress.canonical(host.lower()) is not None else host


def _since(started: float) -> int:
    return round((perf_counter() - started) * 1000)


def _timeout(seconds: float) -> aiohttp.ClientTimeout:
    """Return the deadline of a whole attempt, and of its connect: look-up, TCP and TLS handshake."""
    # A little less than the whole, so that what never connected is told from what never answered; and no
    # rounding up to full seconds, which is aiohttp's way from 5 s on.
    connect = min(_CONNECT_SECONDS, seconds * 0.9)
    return aiohttp.ClientTimeout(total=seconds, connect=connect, ceil_threshold=math.inf)
