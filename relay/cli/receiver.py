"""A receiver on this machine: deliveries come in over HTTP or https, each is verified, answered, handed on.

What to answer is the caller's to say. Nothing is printed here.
"""

import asyncio
import json
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from relay.cli.arguments import Answer
from relay.cli.exits import CommandError
from relay.cli.verification import Scheme, Worth, all_verified, verify
from relay.clock import SystemClock
from relay.ingest import iso

HOST = "127.0.0.1"
DIGITS = re.compile(r"[0-9]{1,9}")
LARGEST_BODY = 32 * 1024 * 1024  # twice the largest event that a relay can be told to take


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request, as it is told to people and scripts; the names are those of the JSON."""

    at: str
    event: str | None
    id: str | None
    attempt: int | None
    signatures: dict[str, Worth]  # of those it carries, by scheme; none when there is no secret
    answered: int

    @property
    def verified(self) -> bool:
        return all_verified(self.signatures.values())


class Receiver:
    """Puts every request into `arrivals`; `answer` gives the answer, or its status, for an event's type."""

    def __init__(
        self,
        *,
        secret: str | None,
        answer: Callable[[str | None], Answer | int],
        generic: Mapping[str, Scheme] | None = None,
    ) -> None:
        self.arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self._secret = secret
        self._answer = answer
        self._generic = generic
        self._clock = SystemClock()

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        now_ms = self._clock.now_ms()
        event = event_type(headers, body)
        attempt = headers.get("webhook-attempt", "")
        answer = self._answer(event)
        if isinstance(answer, int):
            answer = Answer(answer)
        arrival = Arrival(
            at=iso(now_ms),
            event=event,
            id=headers.get("webhook-id"),
            attempt=int(attempt) if DIGITS.fullmatch(attempt) else None,
            signatures=self._verify(headers, body, now_ms // 1000),
            answered=answer.status,
        )
        await asyncio.sleep(answer.delay_seconds)
        self.arrivals.put_nowait(arrival)  # after the delay, for whoever has seen the last one may end us
        retry = {} if answer.retry_after is None else {"Retry-After": str(answer.retry_after)}
        return web.Response(status=answer.status, headers=retry)

    def _verify(self, headers: dict[str, str], body: bytes, now: int) -> dict[str, Worth]:
        return verify(headers, body, self._secret, now, self._generic) if self._secret else {}

    @asynccontextmanager
    async def listening(self, port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Take requests; yields the URL to send them to. Raises CommandError when the port is taken."""
        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_route("*", "/{path:.*}", self.take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await start(runner, port, tls)
            yield f"{'https' if tls else 'http'}://{HOST}:{runner.addresses[0][1]}/"
        finally:
            await runner.cleanup()


async def start(runner: web.AppRunner, port: int, tls: ssl.SSLContext | None) -> None:
    try:
        await web.TCPSite(runner, HOST, port, ssl_context=tls).start()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise CommandError(f"cannot listen on {HOST}:{port}: {why}") from error


def server_tls(cert: str, key: str | None) -> ssl.SSLContext:
    """Read a certificate to listen with. Raises CommandError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password of ours OpenSSL would ask the terminal for one.
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError:
        raise CommandError(
            f"{cert} and its key are not a certificate and its unencrypted key in PEM"
        ) from None
    except OSError as error:
        where = cert if key is None else f"{cert} or {key}"
        raise CommandError(f"{where} cannot be read: {error.strerror}") from None
    return context


def event_type(headers: dict[str, str], body: bytes) -> str | None:
    """Find the event's type, in whichever format it was sent."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    members = content if isinstance(content, dict) else {}
    found = members.get("event") or members.get("type") or headers.get("ce-type")
    return found if isinstance(found, str) else None
