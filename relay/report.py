"""What a lane says of what happened: lines of the log, counts, and events of the relay's own.

The relay's own events (`relay.endpoint.down` and so on, contract section 6) go through the same outbox to
endpoints that subscribe to them by name. They are never about themselves: an endpoint is not told of its own
state, and nothing is told of a delivery of theirs, or there would be no end.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from relay.canonical import JSON
from relay.clock import Clock
from relay.metrics import Tally
from relay.model import Delivery, Health, Outcome, Standing, State, Submission, Verdict
from relay.outbox import Expired
from relay.subscription import OWN_PREFIX

log = logging.getLogger("relay.delivery")

SUMMED_UP_SECONDS = 60.0
FAILURES = ("attempt_failed", "delivery_dead", "attempt_unspent", "deliveries_expired")
TURNS = {
    Standing.DOWN: ("endpoint_down", "relay.endpoint.down"),
    Standing.UP: ("endpoint_recovered", "relay.endpoint.recovered"),
    Standing.GONE: ("endpoint_gone", "relay.endpoint.gone"),
}

Fields = dict[str, object]


class MakesNews(Protocol):
    """Makes an event of the relay's own about endpoint `of`: none or one to be kept (see `Ingest.news`)."""

    def __call__(self, type_: str, data: Mapping[str, JSON], *, of: str) -> list[Submission]: ...


class Reporter:
    """Says what happened at one endpoint; the events it returns are the caller's to keep.

    Every failure is counted, but the log is told of one of a kind, and from then on of all together once a
    minute: a receiver that is down all night must not fill the disk. At debug level every attempt is told.
    """

    def __init__(self, endpoint: str, make_news: MakesNews, clock: Clock, tally: Tally) -> None:
        self._endpoint = endpoint
        self._make_news = make_news
        self._clock = clock
        self._tally = tally
        self._quiet_since: float | None = None
        self._told: set[str] = set()  # since then
        self._untold: Counter[str] = Counter()
        self._latest: Fields = {}

    def attempted(
        self,
        delivery: Delivery,
        number: int,
        outcome: Outcome,
        verdict: Verdict,
        next_ms: int | None = None,
    ) -> None:
        """Say how an attempt ended, and at what time at the earliest the next one comes."""
        self._tally.attempted(outcome.reason, outcome.milliseconds)
        if outcome.reason is None:
            if not delivery.replayed:  # how long a person thought about it is no lag of ours
                self._tally.lag.observe((self._clock.now_ms() - delivery.event.accepted_at_ms) / 1000)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("attempt_delivered", extra=self._fields(delivery, number, outcome))
            if self._untold and self._is_time():
                self._sum_up()
            return
        fields = self._fields(delivery, number, outcome)
        if verdict.state is State.PENDING:
            if next_ms is not None:
                fields["retry_in_seconds"] = max(0, next_ms - self._clock.now_ms()) / 1000
            self._tell(logging.WARNING, "attempt_failed", fields)
        else:
            self._tally.dead += 1
            self._tell(logging.ERROR, "delivery_dead", fields)

    def unspent(self, delivery: Delivery, number: int, outcome: Outcome) -> None:
        """Say that an attempt could not be made, for which the receiver cannot be blamed."""
        self._tally.unspent += 1
        self._tell(logging.WARNING, "attempt_unspent", self._fields(delivery, number, outcome))

    def ended(self) -> None:
        """Say what has not been said yet: nothing comes after this."""
        if self._untold:
            self._sum_up()

    def turned(self, before: Health, after: Health, outcome: Outcome) -> list[Submission]:
        """Say that the endpoint went down, recovered or is gone, if it did."""
        if before.standing is after.standing:
            return []
        line, type_ = TURNS[after.standing]
        fields: dict[str, JSON] = {
            "endpoint": self._endpoint,
            "reason": outcome.reason,
            "failures": after.failures or before.failures,
        }
        log.log(logging.INFO if after.standing is Standing.UP else logging.ERROR, line, extra=fields)
        return self._make_news(type_, fields, of=self._endpoint)

    def dead(self, event_id: str, type_: str, attempts: int, reason: str | None) -> list[Submission]:
        """Return the news that a delivery is dead."""
        if type_.startswith(OWN_PREFIX):
            return []
        data: dict[str, JSON] = {
            "endpoint": self._endpoint,
            "id": event_id,
            "event": type_,
            "attempts": attempts,
            "reason": reason,
        }
        return self._make_news("relay.delivery.dead", data, of=self._endpoint)

    def expired(self, expired: Sequence[Expired]) -> list[Submission]:
        """Say that deliveries have waited too long."""
        self._tally.dead += len(expired)
        self._tally.expired += len(expired)
        fields: Fields = {"endpoint": self._endpoint, "deliveries": len(expired)}
        self._tell(logging.ERROR, "deliveries_expired", fields, count=len(expired))
        return [
            news for each in expired for news in self.dead(each.event_id, each.type, each.attempts, "max_age")
        ]

    # How failures are summed up

    def _tell(self, level: int, line: str, fields: Fields, count: int = 1) -> None:
        if self._untold and self._is_time():
            self._hold_back(line, fields, count)
            self._sum_up()
        elif self._is_time() or line not in self._told:
            if self._is_time():
                self._quiet_since = self._clock.monotonic()
                self._told.clear()
            self._told.add(line)
            log.log(level, line, extra=fields)
        else:
            self._hold_back(line, fields, count)
            log.debug(line, extra=fields)

    def _hold_back(self, line: str, fields: Fields, count: int) -> None:
        self._untold[line] += count
        if line != "deliveries_expired":
            self._latest = fields

    def _is_time(self) -> bool:
        since = self._quiet_since
        return since is None or self._clock.monotonic() - since >= SUMMED_UP_SECONDS

    def _sum_up(self) -> None:
        untold, now = self._untold, self._clock.monotonic()
        since = self._quiet_since if self._quiet_since is not None else now
        dead = untold["delivery_dead"] + untold["deliveries_expired"]
        fields: Fields = self._latest | {
            "endpoint": self._endpoint,
            "failures": untold["attempt_failed"] + untold["delivery_dead"],
            "dead": dead or None,
            "unspent": untold["attempt_unspent"] or None,
            "seconds": round(now - since, 1),
        }
        log.log(logging.ERROR if dead else logging.WARNING, "endpoint_failing", extra=fields)
        self._quiet_since = now
        self._told = set(FAILURES)
        self._untold.clear()
        self._latest = {}

    def _fields(self, delivery: Delivery, number: int, outcome: Outcome) -> Fields:
        return {
            "event_id": delivery.event.id,
            "endpoint": self._endpoint,
            "attempt": number,
            "status": outcome.status,
            "milliseconds": outcome.milliseconds,
            "reason": outcome.reason,
            "detail": outcome.detail,
        }
