"""What a lane says of what happened: lines of the log, and events of the relay's own.

The relay's own events (`relay.endpoint.down` and so on, contract section 6) go through the same outbox to
endpoints that subscribe to them by name. They are never about themselves: an endpoint is not told of its own
state, and nothing is told of a delivery of theirs, or there would be no end.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from relay.canonical import JSON
from relay.model import Delivery, Health, Outcome, Standing, State, Submission, Verdict
from relay.outbox import Expired
from relay.subscription import OWN_PREFIX

log = logging.getLogger("relay.delivery")

TURNS = {
    Standing.DOWN: ("endpoint_down", "relay.endpoint.down"),
    Standing.UP: ("endpoint_recovered", "relay.endpoint.recovered"),
    Standing.GONE: ("endpoint_gone", "relay.endpoint.gone"),
}


class MakesNews(Protocol):
    """Makes an event of the relay's own about endpoint `of`: none or one to be kept (see `Ingest.news`)."""

    def __call__(self, type_: str, data: Mapping[str, JSON], *, of: str) -> list[Submission]: ...


class Reporter:
    """Says what happened at one endpoint; the events it returns are the caller's to keep."""

    def __init__(self, endpoint: str, make_news: MakesNews) -> None:
        self._endpoint = endpoint
        self._make_news = make_news

    def attempted(self, delivery: Delivery, number: int, outcome: Outcome, verdict: Verdict) -> None:
        if outcome.reason is None:
            if log.isEnabledFor(logging.DEBUG):
                log.debug("attempt_delivered", extra=self._fields(delivery, number, outcome))
        elif verdict.state is State.PENDING:
            fields = self._fields(delivery, number, outcome)
            log.warning("attempt_failed", extra=fields | {"next_attempt_at_ms": verdict.due_ms})
        else:
            log.error("delivery_dead", extra=self._fields(delivery, number, outcome))

    def unspent(self, delivery: Delivery, number: int, outcome: Outcome) -> None:
        """Say that an attempt could not be made, for which the receiver cannot be blamed."""
        log.warning("attempt_unspent", extra=self._fields(delivery, number, outcome))

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
        log.error("deliveries_expired", extra={"endpoint": self._endpoint, "deliveries": len(expired)})
        return [
            news for each in expired for news in self.dead(each.event_id, each.type, each.attempts, "max_age")
        ]

    def _fields(self, delivery: Delivery, number: int, outcome: Outcome) -> dict[str, object]:
        return {
            "event_id": delivery.event.id,
            "endpoint": self._endpoint,
            "attempt": number,
            "status": outcome.status,
            "milliseconds": outcome.milliseconds,
            "reason": outcome.reason,
            "detail": outcome.detail,
        }
