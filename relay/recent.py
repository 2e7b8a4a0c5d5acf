"""What happened lately, in memory alone: an hour of counts, and how the last attempts at each endpoint went.

One cheap call comes in for what is accepted and for each attempt; the status page and `GET /v1/status` look.
All of it is bounded and begins anew with every start: what has to be kept is the outbox's.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from relay.model import Attempt, Event

MINUTES = 60
MINUTE_MS = 60_000
ATTEMPTS = 200  # remembered of each endpoint
FAILURES_EACH = 10  # remembered of each endpoint, so that a noisy one hides no other
FAILURES = 50  # told of


@dataclass(slots=True)
class Minute:
    """What was counted in one minute; `number` is minutes since 1970."""

    number: int = -1
    accepted: int = 0
    delivered: int = 0
    failed: int = 0


class Failure(NamedTuple):
    """A failed attempt, and whether its delivery was given up with it."""

    endpoint: str
    event_id: str
    type: str
    attempt: Attempt
    dead: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fared:
    """How the last attempts at an endpoint went, 200 at the most."""

    attempts: int = 0
    delivered: int = 0
    p95_milliseconds: int | None = None  # of all of them


class Recent:
    """The record; times come in as arguments."""

    def __init__(self) -> None:
        self._minutes = [Minute() for _ in range(MINUTES)]
        self._current = self._minutes[0]
        self._attempts: dict[str, deque[int]] = {}  # milliseconds; of a failed one their complement, below 0
        self._failures: dict[str, deque[Failure]] = {}

    def accepted(self, events: int, now_ms: int) -> None:
        """Count events that were accepted."""
        self._minute(now_ms).accepted += events

    def attempted(self, endpoint: str, event: Event, attempt: Attempt, now_ms: int, *, dead: bool) -> None:
        """Take note of one attempt; `dead` says that its delivery was given up."""
        attempts = self._attempts.get(endpoint)
        if attempts is None:
            attempts = self._attempts[endpoint] = deque(maxlen=ATTEMPTS)
        if attempt.reason is None:
            self._minute(now_ms).delivered += 1
            attempts.append(attempt.milliseconds)
            return
        self._minute(now_ms).failed += 1
        attempts.append(~attempt.milliseconds)
        failures = self._failures.setdefault(endpoint, deque(maxlen=FAILURES_EACH))
        failures.append(Failure(endpoint, event.id, event.type, attempt, dead))

    def keep_only(self, endpoints: Collection[str]) -> None:
        """Forget what was told of endpoints that are no longer there."""
        for of_endpoint in (self._attempts, self._failures):
            for gone in of_endpoint.keys() - set(endpoints):
                del of_endpoint[gone]

    def minutes(self, now_ms: int) -> list[Minute]:
        """Return the last hour, oldest first, this minute last."""
        current = now_ms // MINUTE_MS
        known = {each.number: each for each in self._minutes}
        numbers = range(current - MINUTES + 1, current + 1)
        return [known.get(number) or Minute(number) for number in numbers]

    def fared(self, endpoint: str) -> Fared:
        """Sum up the last attempts at an endpoint."""
        attempts = self._attempts.get(endpoint)
        if not attempts:
            return Fared()
        took = sorted(each if each >= 0 else ~each for each in attempts)
        return Fared(
            attempts=len(took),
            delivered=sum(each >= 0 for each in attempts),
            p95_milliseconds=took[-(-len(took) * 95 // 100) - 1],
        )

    def failures(self) -> list[Failure]:
        """Return the latest failed attempts, newest first."""
        every = [failure for of_endpoint in self._failures.values() for failure in of_endpoint]
        every.sort(key=lambda failure: failure.attempt.at_ms, reverse=True)
        return every[:FAILURES]

    def _minute(self, now_ms: int) -> Minute:
        number = now_ms // MINUTE_MS
        if self._current.number != number:
            self._current = self._minutes[number % MINUTES]
            if self._current.number != number:  # an hour old, or of a time before the clock was set
                self._current = self._minutes[number % MINUTES] = Minute(number)
        return self._current
