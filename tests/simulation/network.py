"""The scripted network: one receiver for each endpoint, each in one mood after the other.

It is the relay's sender: an attempt comes in, what it met goes out, as the seed's chance has it. What the
receiver itself made of the request goes into the journal, which is more than the relay may ever learn.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from random import Random

from relay.model import Endpoint, Message, Outcome
from tests.simulation.journal import Journal

LONGEST_FLOOR_SECONDS = 24 * 3600.0
REDIRECT = 301


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of one request: after how long, with which status or reason, and whether it was taken in.

    `wait_seconds` is what Retry-After asks for, or `until_ms` by the wall clock; neither if unreadable.
    """

    seconds: float
    status: int | None = None
    reason: str | None = None
    taken: bool = False
    retry_after: str | None = None
    wait_seconds: float | None = None
    until_ms: int | None = None
    unspent: bool = False

    def floor_seconds(self, wall_ms: int) -> float | None:
        """Return how long the endpoint has to be left alone from now on."""
        if self.until_ms is not None:
            return min(max(0.0, (self.until_ms - wall_ms) / 1000), LONGEST_FLOOR_SECONDS)
        return self.wait_seconds


Mood = Callable[[Random, Endpoint, int], Answer]  # an endpoint and the wall clock; what it does


def _soon(chance: Random) -> float:
    return chance.choice((0.0, 0.001, 0.02, 0.1, 0.4)) * chance.random()


def well(chance: Random, _endpoint: Endpoint, _wall_ms: int) -> Answer:
    return Answer(_soon(chance), chance.choice((200, 200, 201, 202, 204)), taken=True)


def slow(chance: Random, endpoint: Endpoint, _wall_ms: int) -> Answer:
    seconds = chance.random() * endpoint.timeout_seconds * 1.3
    if seconds >= endpoint.timeout_seconds:  # it may have been taken in, and nobody knows
        return Answer(endpoint.timeout_seconds, reason="timeout", taken=chance.random() < 0.5)
    return Answer(seconds, 200, taken=True)


def refusing(chance: Random, _endpoint: Endpoint, _wall_ms: int) -> Answer:
    status = chance.choice((500, 502, 503, 504, 400, 401, 403, 404, 422, REDIRECT))
    return Answer(_soon(chance), status, "redirect_refused" if status == REDIRECT else f"http_{status}")


def dead(chance: Random, endpoint: Endpoint, _wall_ms: int) -> Answer:
    reason = chance.choice(("conn_refused", "connect_timeout", "dns_error", "unreachable", "timeout"))
    return Answer(min(5.0, endpoint.timeout_seconds) if "timeout" in reason else _soon(chance), reason=reason)


def shaky(chance: Random, endpoint: Endpoint, wall_ms: int) -> Answer:
    """Half of it works; connections break before, during and after the receiver took it in."""
    kind = chance.random()
    if kind < 0.5:
        return well(chance, endpoint, wall_ms)
    if kind < 0.7:
        reason = chance.choice(("conn_reset", "conn_closed"))
        return Answer(_soon(chance), reason=reason, taken=chance.random() < 0.5)
    if kind < 0.75:
        return Answer(_soon(chance), reason="dns_error", unspent=True)
    return chance.choice((refusing, slow, dead))(chance, endpoint, wall_ms)


def busy(chance: Random, endpoint: Endpoint, wall_ms: int) -> Answer:
    """Refuses for now, with every kind of Retry-After."""
    kind = chance.random()
    if kind < 0.4:
        return well(chance, endpoint, wall_ms)
    if kind < 0.5:
        return refusing(chance, endpoint, wall_ms)
    status = chance.choice((429, 429, 503, 503, 500))
    text, wait_seconds, until_ms = _retry_after(chance, wall_ms)
    return Answer(
        _soon(chance), status, f"http_{status}",
        retry_after=text, wait_seconds=wait_seconds, until_ms=until_ms,
    )  # fmt: skip


def gone(chance: Random, _endpoint: Endpoint, _wall_ms: int) -> Answer:
    return Answer(_soon(chance), 410, "http_410")


def _retry_after(chance: Random, wall_ms: int) -> tuple[str | None, float | None, int | None]:
    """Return a header, and what it asks for if that can be read: so many seconds, or a wall-clock time."""
    kind = chance.random()
    if kind < 0.2:
        return None, None, None
    if kind < 0.35:
        return chance.choice(("soon", "-5", "1.5", "", "Wed, 99 Foo 2026 00:00:00 GMT")), None, None
    if kind < 0.6:
        seconds = chance.choice((0, 1, 7, 120, 1800))
        return f" {seconds} ", float(seconds), None
    if kind < 0.62:
        return str(10 ** chance.choice((6, 9, 40))), LONGEST_FLOOR_SECONDS, None
    ahead = chance.choice(
        (-3600, -1, 2, 60, 900, 40 * 86_400) if chance.random() < 0.1 else (-60, 3, 45, 600)
    )
    at = max(0, wall_ms // 1000 + ahead)
    return format_datetime(datetime.fromtimestamp(at, UTC), usegmt=True), None, at * 1000


@dataclass(frozen=True, slots=True)
class Spell:
    """A mood that lasts until a virtual time."""

    until: float
    mood: Mood


class Network:
    """All receivers; what is not said is well."""

    def __init__(self, journal: Journal, chance: Random, spells: Mapping[str, Sequence[Spell]]) -> None:
        self.own_addresses: frozenset[tuple[str, int]] = frozenset()
        self.bodies: dict[str, bytes] = {}  # by their digests
        self._journal = journal
        self._chance = chance
        self._spells = {id_: list(reversed(each)) for id_, each in spells.items()}

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        journal, number = self._journal, self._journal.number()
        now, wall_ms = journal.clock()
        digest = hashlib.sha256(message.body).hexdigest()[:16]
        self.bodies[digest] = message.body
        journal.note(
            "began", attempt=number, endpoint=endpoint.id, id=message.id, number=message.attempt,
            body=digest, timestamp=message.timestamp,
        )  # fmt: skip
        answer = self._mood(endpoint.id, now)(self._chance, endpoint, wall_ms)
        try:
            await asyncio.sleep(answer.seconds)
        except asyncio.CancelledError:
            taken = answer.taken and self._chance.random() < 0.5 and journal.alive
            journal.note("cut", attempt=number, taken=taken)
            raise
        journal.note(
            "answered", attempt=number, status=answer.status, reason=answer.reason, taken=answer.taken,
            floor_seconds=answer.floor_seconds(journal.clock()[1]), retry_after=answer.retry_after,
            unspent=answer.unspent,
        )  # fmt: skip
        return Outcome(
            milliseconds=round(answer.seconds * 1000),
            status=answer.status,
            reason=answer.reason,
            retry_after=answer.retry_after,
            unspent=answer.unspent,
        )

    def _mood(self, endpoint: str, now: float) -> Mood:
        spells = self._spells.get(endpoint, [])
        while spells and spells[-1].until <= now:
            spells.pop()
        return spells[-1].mood if spells else well
