"""Reaching an endpoint without sending anything: look-up, guard, connect, TLS; what was met comes out.

It goes the same way as an attempt, through the same guard and with the same trust, and ends where a request
would begin. The receiver sees a connection that says nothing.
"""

import asyncio
import ssl
from dataclasses import dataclass
from time import perf_counter

import aiohttp

from relay.model import Endpoint
from relay.sender import Sender, failed
from relay.tls import TlsFilesError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """How far it came; `reason` is None when all the way, else a name of contract section 6."""

    endpoint: str
    milliseconds: int
    reason: str | None = None
    detail: str | None = None
    address: str | None = None
    tls: str | None = None  # the version
    certificate_until: str | None = None  # as the certificate writes it


async def reach(sender: Sender, endpoint: Endpoint) -> Reached:
    """Connect to an endpoint and verify it, send nothing, hang up."""
    started = perf_counter()

    def since() -> int:
        return round((perf_counter() - started) * 1000)

    try:
        prepared = await sender.prepare(endpoint)
        connector = prepared.connections.session.connector
        assert connector is not None  # noqa: S101 - the session is open
        request = aiohttp.ClientRequest(
            "POST", prepared.url, loop=asyncio.get_running_loop(), **prepared.proxy
        )
        connection = await connector.connect(request, [], prepared.timeout)
    except TlsFilesError as error:
        return Reached(
            endpoint=endpoint.id, milliseconds=since(), reason="tls_error", detail=f"{error.key} {error}"
        )
    except (aiohttp.ClientError, OSError) as error:
        outcome = failed(error, since())
        return Reached(
            endpoint=endpoint.id, milliseconds=since(), reason=outcome.reason, detail=outcome.detail
        )
    try:
        return _reached(endpoint.id, since(), connection.transport)
    finally:
        connection.close()


def _reached(endpoint: str, milliseconds: int, transport: asyncio.Transport | None) -> Reached:
    place = transport.get_extra_info("peername") if transport is not None else None
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    certificate = tls.getpeercert() if isinstance(tls, ssl.SSLObject) else None
    return Reached(
        endpoint=endpoint,
        milliseconds=milliseconds,
        address=place[0] if place else None,
        tls=tls.version() if isinstance(tls, ssl.SSLObject) else None,
        certificate_until=str(certificate["notAfter"]) if certificate else None,
    )
