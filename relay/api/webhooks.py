"""`/v1/webhooks`: endpoints as the API shows and changes them, and test events (contract section 4)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from aiohttp import web

from relay import formats
from relay.api import bodies
from relay.api.answers import Mistake, answer, invalid, page, unavailable
from relay.api.problems import Problem
from relay.api.selection import read_replay, unknown
from relay.api.state import State
from relay.config import SettingsError, WrongValueError, parse_duration
from relay.endpoints import (
    DEFAULT_OVERLAP_SECONDS,
    ConflictError,
    Endpoints,
    UnknownEndpointError,
)
from relay.ingest import iso
from relay.model import Endpoint, Outcome, Standing
from relay.outbox import Backlog, Past
from relay.registered import Registered
from relay.rehearsal import rehearse

LARGEST_SETTINGS = 64 << 10
LONGEST_OVERLAP_SECONDS = 30 * 24 * 3600.0
MASK = "***"


class Webhooks:
    """The handlers; all rules are those of `endpoints` and `outbox`."""

    def __init__(self, state: State) -> None:
        self._state = state

    def routes(self) -> list[web.RouteDef]:
        one = "/v1/webhooks/settings/{id}"
        return [
            web.get("/v1/webhooks/settings", self.listing, allow_head=False),
            web.post("/v1/webhooks/settings", self.put),
            web.get(one, self.show, allow_head=False),
            web.patch(one, self.patch),
            web.delete(one, self.remove),
            web.post(f"{one}/pause", self.pause),
            web.post(f"{one}/resume", self.resume),
            web.post(f"{one}/rotate-secret", self.rotate),
            web.post(f"{one}/replay", self.replay),
            web.post("/v1/webhooks/test", self.test),
        ]

    async def listing(self, _request: web.Request) -> web.Response:
        return answer(page(await self._listed(self._state.endpoints.all()), None))

    async def show(self, request: web.Request) -> web.Response:
        return answer(await self._shown(self._named(request)))

    async def put(self, request: web.Request) -> web.Response:
        values = await bodies.members(request, LARGEST_SETTINGS)
        with self._change() as endpoints:
            registered, secret = await endpoints.put(values)
        settings = await self._shown(registered)
        return answer(settings) if secret is None else answer(settings | {"secret": secret}, status=201)

    async def patch(self, request: web.Request) -> web.Response:
        id_ = self._named(request).endpoint.id
        values = await bodies.members(request, LARGEST_SETTINGS)
        with self._change() as endpoints:
            registered = await endpoints.patch(id_, values)
        return answer(await self._shown(registered))

    async def remove(self, request: web.Request) -> web.Response:
        with self._change() as endpoints:
            return answer({"cancelled": await endpoints.remove(request.match_info["id"])})

    async def pause(self, request: web.Request) -> web.Response:
        return await self._pause(request, paused=True)

    async def resume(self, request: web.Request) -> web.Response:
        return await self._pause(request, paused=False)

    async def _pause(self, request: web.Request, *, paused: bool) -> web.Response:
        with self._change() as endpoints:
            registered = await endpoints.pause(request.match_info["id"], paused=paused)
        return answer(await self._shown(registered))

    async def rotate(self, request: web.Request) -> web.Response:
        id_ = self._named(request).endpoint.id
        values = await bodies.members(request, LARGEST_SETTINGS, optional=True)
        refuse(unknown(values, ("overlap",)))
        overlap_seconds = _overlap(values.get("overlap"))
        with self._change() as endpoints:
            registered, secret = await endpoints.rotate(id_, overlap_seconds)
        return answer({"id": id_, "secret": secret, "overlap_until": _at(registered.overlap_until_ms)})

    async def replay(self, request: web.Request) -> web.Response:
        id_ = self._named(request).endpoint.id
        values = await bodies.members(request, LARGEST_SETTINGS, optional=True)
        asked = read_replay(values, endpoint=id_)
        outbox = self._state.outbox
        if asked.dry_run:
            count = await outbox.count(asked.ended)
        else:
            try:
                count = await outbox.revive(asked.ended, self._state.clock.now_ms(), asked.spacing_ms)
            finally:  # also when it could go only half the way
                self._state.wake([id_])
        return answer({"count": count, "dry_run": asked.dry_run})

    async def test(self, request: web.Request) -> web.Response:
        values = await bodies.members(request, LARGEST_SETTINGS)
        refuse(unknown(values, ("event", "endpoint")))
        type_ = values.get("event")
        known = self._state.catalogue.types.get(type_) if isinstance(type_, str) else None
        if known is None:
            wrong = self._state.catalogue.wrong_type(type_) if isinstance(type_, str) else None
            raise invalid([("#/event", wrong or "must be a type of the catalogue in the config")])
        if known.sample is None:
            raise invalid([("#/event", "has no sample in the catalogue: add one to the config")])
        wanting = self._wanting(known.type, values.get("endpoint"))
        rehearsed = await rehearse(
            known.type, known.sample, wanting, sender=self._state.sender, clock=self._state.clock
        )
        return answer({"data": [{"endpoint": each.endpoint, **_met(each.outcome)} for each in rehearsed]})

    def _wanting(self, type_: str, id_: object) -> tuple[Endpoint, ...]:
        """Return who is subscribed to a type, or of them the one that was asked for. Raises 422."""
        subscriptions = self._state.ingest.subscriptions
        wanting = subscriptions.wanting(type_)
        if id_ is None:
            refuse([] if wanting else [("#/event", "nobody is subscribed to it")])
            return wanting
        if not isinstance(id_, str) or id_ not in subscriptions.endpoints:
            raise invalid([("#/endpoint", "is not the id of an endpoint")])
        wanting = tuple(each for each in wanting if each.id == id_)
        refuse([] if wanting else [("#/endpoint", f"is not subscribed to {type_}")])
        return wanting

    def _named(self, request: web.Request) -> Registered:
        try:
            return self._state.endpoints.get(request.match_info["id"])
        except UnknownEndpointError:
            raise no_endpoint() from None

    @contextmanager
    def _change(self) -> Iterator[Endpoints]:
        """Hand out the register for one change; what it refuses becomes an answer."""
        if self._state.refusing is not None:
            raise unavailable(self._state.refusing)
        try:
            yield self._state.endpoints
        except SettingsError as error:
            raise invalid(error.problems) from None
        except ConflictError as error:
            raise Problem(409, str(error)) from None
        except UnknownEndpointError:  # removed while the request was on its way
            raise no_endpoint() from None

    async def _shown(self, registered: Registered) -> dict[str, object]:
        (settings,) = await self._listed([registered])
        return settings

    async def _listed(self, registered: Sequence[Registered]) -> list[dict[str, object]]:
        backlogs = await self._state.outbox.backlog()
        pasts = await self._state.outbox.pasts()
        now_ms = self._state.clock.now_ms()
        return [
            shown(each, backlogs.get(each.endpoint.id), pasts.get(each.endpoint.id), now_ms)
            for each in registered
        ]


def shown(
    registered: Registered, backlog: Backlog | None, past: Past | None, now_ms: int
) -> dict[str, object]:
    """Write an endpoint for people: secrets not at all, header values and a URL's query masked."""
    endpoint = registered.endpoint
    oldest_ms = past.oldest_pending_ms if past else None
    return {
        "id": endpoint.id,
        "url": masked(endpoint.url),
        "events": endpoint.events,
        "source": endpoint.source,
        "state": state_of(registered, past),
        "pending": backlog.pending if backlog else 0,
        "dead": backlog.dead if backlog else 0,
        "oldest_pending_seconds": max(0, now_ms - oldest_ms) / 1000 if oldest_ms is not None else None,
        "last_success_at": _at(past.last_success_at_ms) if past else None,
        "last_failure_at": _at(past.last_failure_at_ms) if past else None,
        "last_error": past.last_error if past else None,
        "description": endpoint.description,
        "format": formats.name(endpoint.format),
        "signatures": endpoint.signatures,
        "headers": {name: MASK for name, _ in endpoint.headers},
        "timeout": duration(endpoint.timeout_seconds),
        "retry_schedule": [duration(seconds) for seconds in endpoint.retry_schedule],
        "concurrency": endpoint.concurrency,
        "rate": shown_rate(endpoint.rate),
        "order": endpoint.order,
    }


def state_of(registered: Registered, past: Past | None) -> str:
    """Say how an endpoint stands in the contract's words; a person's own word goes first."""
    if registered.paused:
        return "paused"
    standing = past.health.standing if past else Standing.UP
    return "active" if standing is Standing.UP else standing.value


def shown_rate(rate: float | None) -> str | None:
    """Write a rate the way it is read: 50.0 -> "50/s", 2.5 -> "150/m"."""
    if rate is None:
        return None
    return f"{round(rate)}/s" if rate == round(rate) else f"{round(rate * 60)}/m"


def masked(url: str) -> str:
    """Keep the names of a URL's query and hide the values, which often are tokens, as a lone name may be."""
    parts = urlsplit(url)
    members = [member.partition("=") for member in parts.query.split("&") if member]
    query = "&".join(f"{name}={MASK}" if equals else MASK for name, equals, _ in members)
    return parts._replace(query=query).geturl()


def duration(seconds: float) -> str:
    """Write a length of time the way it is read: 90061.5 -> "1d1h1m1s500ms"."""
    rest = round(seconds * 1000)
    text = ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def no_endpoint() -> Problem:
    return Problem(404, "there is no endpoint of this id")


def refuse(mistakes: list[Mistake]) -> None:
    """Raise 422 if there are any."""
    if mistakes:
        raise invalid(mistakes)


def _overlap(value: object) -> float:
    if value is None:
        return DEFAULT_OVERLAP_SECONDS
    try:
        seconds = parse_duration(value) if isinstance(value, str) else -1.0
    except WrongValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_OVERLAP_SECONDS:
        raise invalid([("#/overlap", 'must be a duration such as "24h", 30 days at most')])
    return seconds


def _at(at_ms: int | None) -> str | None:
    return iso(at_ms) if at_ms is not None else None


# What a failed test says; with the receiver's status for the rest.
SENTENCES = {
    "timeout": "the receiver did not answer in time",
    "connect_timeout": "no connection came about within 5 s",
    "conn_refused": "nothing listens at the receiver's address",
    "conn_reset": "the receiver broke off the connection",
    "conn_closed": "the receiver closed the connection without an answer",
    "unreachable": "the receiver's network cannot be reached",
    "dns_error": "the receiver's name cannot be resolved",
    "tls_cert": "the receiver's certificate does not verify",
    "tls_error": "no TLS connection came about",
    "protocol_error": "the receiver did not answer in HTTP",
    "redirect_refused": "the receiver redirects: set the URL it redirects to",
    "blocked_address": "the receiver's address is not one the relay may send to",
    "internal_error": "the relay failed; its log says how",
    "body_digest": "what lies on the disk is not what was accepted, so it was not sent",
}


def _met(outcome: Outcome) -> dict[str, object]:
    reason = outcome.reason
    sentence = (
        SENTENCES.get(reason, f"the receiver answered {outcome.status}") if reason is not None else None
    )
    return {
        "ok": reason is None,
        "status": outcome.status,
        "milliseconds": outcome.milliseconds,
        "error": f"{reason}: {sentence}" if reason is not None else None,
        "answer": outcome.answer,
    }
