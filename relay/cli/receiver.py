"""A receiver on this machine: deliveries come in over HTTP, each is verified, answered and handed on.

What to answer is the caller's to say. Nothing is printed here.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from relay.cli.exits import CommandError
from relay.cli.verification import Worth, verify
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
    signatures: dict[str, Worth]  # by scheme; none when there is no secret to verify with
    answered: int

    @property
    def verified(self) -> bool:
        return bool(self.signatures) and set(self.signatures.values()) == {Worth.VERIFIED}


class Receiver:
    """Puts every request into `arrivals`; `answer` gives the status for an event's type."""

    def __init__(self, *, secret: str | None, answer: Callable[[str | None], int]) -> None:
        self.arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self._secret = secret
        self._answer = answer
        self._clock = SystemClock()

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        now_ms = self._clock.now_ms()
        event = event_type(headers, body)
        attempt = headers.get("webhook-attempt", "")
        arrival = Arrival(
            at=iso(now_ms),
            event=event,
            id=headers.get("webhook-id"),
            attempt=int(attempt) if DIGITS.fullmatch(attempt) else None,
            signatures=verify(headers, body, self._secret, now_ms // 1000) if self._secret else {},
            answered=self._answer(event),
        )
        self.arrivals.put_nowait(arrival)
        return web.Response(status=arrival.answered)

    @asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[str]:
        """Take requests; yields the URL to send them to. Raises CommandError when the port is taken."""
        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_route("*", "/{path:.*}", self.take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await start(runner, port)
            yield f"http://{HOST}:{runner.addresses[0][1]}/"
        finally:
            await runner.cleanup()


async def start(runner: web.AppRunner, port: int) -> None:
    try:
        await web.TCPSite(runner, HOST, port).start()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise CommandError(f"cannot listen on {HOST}:{port}: {why}") from error


def event_type(headers: dict[str, str], body: bytes) -> str | None:
    """Find the event's type, in whichever format it was sent."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    members = content if isinstance(content, dict) else {}
    found = members.get("event") or members.get("type") or headers.get("ce-type")
    return found if isinstance(found, str) else None
