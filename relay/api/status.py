"""`GET /v1/status`: how the relay and its endpoints stand and what happened lately, for page and tools.

The sentence that begins it is for people, and says first what keeps the relay from its work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from relay import __version__
from relay.api.answers import answer
from relay.api.state import State
from relay.api.webhooks import SENTENCES, masked, state_of
from relay.ingest import iso
from relay.model import Standing
from relay.outbox import Backlog, Past
from relay.recent import MINUTE_MS, Failure, Minute
from relay.registered import Registered
from relay.sources.reader import SourceStanding

NAMED = 3  # endpoints in trouble that the sentence names; the others it counts


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointStatus:
    """How one endpoint stands; `attempts` are the last ones, 200 at the most, and the rate is theirs."""

    id: str
    url: str
    description: str
    events: tuple[str, ...]
    source: str
    state: str
    since: str | None  # down or gone
    attempts: int
    success_rate: float | None
    p95_milliseconds: int | None
    pending: int
    dead: int
    oldest_pending_seconds: float | None
    next_attempt_at: str | None
    last_success_at: str | None
    last_failure_at: str | None
    last_error: str | None
    explanation: str | None  # of the last error


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """How one source stands: why nothing can be taken from it, since when, what waits for a person."""

    id: str
    error: str | None
    since: str | None
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MinuteStatus:
    """What was counted in the minute that began at `at`: events accepted; attempts, good or not."""

    at: str
    accepted: int
    delivered: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureStatus:
    """One failed attempt."""

    at: str
    endpoint: str
    event_id: str
    event: str
    number: int
    status: int | None
    milliseconds: int
    error: str
    explanation: str
    answer: str | None
    dead: bool  # the delivery was given up with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything."""

    sentence: str
    ready: bool
    at: str
    version: str
    pending: int
    dead: int
    endpoints: tuple[EndpointStatus, ...]
    sources: tuple[SourceStatus, ...]
    minutes: tuple[MinuteStatus, ...]
    failures: tuple[FailureStatus, ...]


class StatusRoutes:
    """The handler."""

    def __init__(self, state: State) -> None:
        self._state = state

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/status", self.show, allow_head=False)]

    async def show(self, _request: web.Request) -> web.Response:
        response = answer(await look(self._state))
        response.headers["Cache-Control"] = "no-store"
        return response


async def look(state: State) -> Status:
    """Gather what there is to say."""
    backlogs = await state.outbox.backlog()
    pasts = await state.outbox.pasts()
    now_ms = state.clock.now_ms()
    endpoints: list[EndpointStatus] = []
    for each in state.endpoints.all():
        id_ = each.endpoint.id
        due_ms = await state.outbox.due(id_)
        endpoints.append(_endpoint(each, backlogs.get(id_), pasts.get(id_), due_ms, state))
    sources = tuple(_source(id_, standing) for id_, standing in state.sources().items())
    trouble = state.unready or state.outbox.trouble()
    return Status(
        sentence=sentence(trouble, endpoints, now_ms, sources),
        ready=trouble is None,
        at=iso(now_ms),
        version=__version__,
        pending=sum(each.pending for each in endpoints),
        dead=sum(each.dead for each in endpoints),
        endpoints=tuple(endpoints),
        sources=sources,
        minutes=tuple(_minute(each) for each in state.ingest.recent.minutes(now_ms)),
        failures=tuple(_failure(each) for each in state.ingest.recent.failures()),
    )


def sentence(
    trouble: str | None,
    endpoints: Sequence[EndpointStatus],
    now_ms: int,
    sources: Sequence[SourceStatus] = (),
) -> str:
    """Say how all stands: "Ready. 3 endpoints, 12 waiting, 2 dead; crm is down since 10:02 UTC."."""
    opening = f"Not ready: {trouble.rstrip('.')}." if trouble is not None else "Ready."
    if not endpoints:
        return f"{opening} No endpoint yet: events are kept and go nowhere."
    count = f"{len(endpoints)} endpoint{'s' if len(endpoints) > 1 else ''}"
    waiting = sum(each.pending for each in endpoints)
    dead = sum(each.dead for each in endpoints)
    apart = [each for state in ("down", "gone", "paused") for each in endpoints if each.state == state]
    named = [_stands(each, now_ms) for each in apart[:NAMED]]
    if len(apart) > NAMED:
        named.append(f"{len(apart) - NAMED} more are down, gone or paused")
    named += [text for each in sources[:NAMED] if (text := _trouble_of(each, now_ms))]
    told = "; " + ", ".join(named) if named else ""
    return f"{opening} {count}, {waiting} waiting, {dead} dead{told}."


def explanation(reason: str) -> str:
    """Say in a few words what a reason of contract section 6 means."""
    return SENTENCES.get(reason) or f"the receiver answered {reason.removeprefix('http_')}"


def _stands(endpoint: EndpointStatus, now_ms: int) -> str:
    since = f" since {_of_day(endpoint.since, now_ms)}" if endpoint.since is not None else ""
    return f"{endpoint.id} is {endpoint.state}{since}"


def _trouble_of(source: SourceStatus, now_ms: int) -> str:
    if source.since is not None:
        return f"nothing comes from {source.id} since {_of_day(source.since, now_ms)}"
    return f"{source.refused} refused in {source.id}" if source.refused else ""


def _of_day(at: str, now_ms: int) -> str:
    """Shorten `2026-01-15T10:02:00.000Z` to the time of this day, or to day and time."""
    day, time = at[:10], at[11:16]
    return f"{time} UTC" if day == iso(now_ms)[:10] else f"{day} {time} UTC"


def _endpoint(
    registered: Registered, backlog: Backlog | None, past: Past | None, due_ms: int | None, state: State
) -> EndpointStatus:
    endpoint, now_ms = registered.endpoint, state.clock.now_ms()
    name = state_of(registered, past)
    fared = state.ingest.recent.fared(endpoint.id)
    oldest_ms = past.oldest_pending_ms if past else None
    last_error = past.last_error if past else None
    return EndpointStatus(
        id=endpoint.id,
        url=masked(endpoint.url),
        description=endpoint.description,
        events=endpoint.events,
        source=endpoint.source,
        state=name,
        since=_at(past.health.since_ms) if past and name in {"down", "gone"} else None,
        attempts=fared.attempts,
        success_rate=fared.delivered / fared.attempts if fared.attempts else None,
        p95_milliseconds=fared.p95_milliseconds,
        pending=backlog.pending if backlog else 0,
        dead=backlog.dead if backlog else 0,
        oldest_pending_seconds=max(0, now_ms - oldest_ms) / 1000 if oldest_ms is not None else None,
        next_attempt_at=_at(_next_ms(name, past, due_ms)),
        last_success_at=_at(past.last_success_at_ms) if past else None,
        last_failure_at=_at(past.last_failure_at_ms) if past else None,
        last_error=last_error,
        explanation=explanation(last_error) if last_error is not None else None,
    )


def _source(id_: str, standing: SourceStanding) -> SourceStatus:
    return SourceStatus(id=id_, error=standing.error, since=_at(standing.since_ms), refused=standing.refused)


def _next_ms(state: str, past: Past | None, due_ms: int | None) -> int | None:
    """Return when the endpoint is tried next, if something waits and nobody has to help."""
    if due_ms is None or state in {"paused", "gone"}:
        return None
    if past is None:
        return due_ms
    health = past.health
    return max(health.probe_at_ms if health.standing is Standing.DOWN else due_ms, health.not_before_ms)


def _minute(minute: Minute) -> MinuteStatus:
    return MinuteStatus(
        at=iso(minute.number * MINUTE_MS),
        accepted=minute.accepted,
        delivered=minute.delivered,
        failed=minute.failed,
    )


def _failure(failure: Failure) -> FailureStatus:
    attempt = failure.attempt
    reason = str(attempt.reason)
    return FailureStatus(
        at=iso(attempt.at_ms),
        endpoint=failure.endpoint,
        event_id=failure.event_id,
        event=failure.type,
        number=attempt.number,
        status=attempt.status,
        milliseconds=attempt.milliseconds,
        error=reason,
        explanation=explanation(reason),
        answer=attempt.answer,
        dead=failure.dead,
    )


def _at(at_ms: int | None) -> str | None:
    return iso(at_ms) if at_ms is not None else None
