"""`/v1/webhooks`: endpoints as the API shows and changes them, and test events (contract section 4)."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from aiohttp import web

from relay.api import bodies
from relay.api.answers import answer, invalid, page
from relay.api.problems import Problem
from relay.api.selection import read_selection
from relay.api.state import State
from relay.config import SettingsError, WrongValueError, parse_duration
from relay.endpoints import DEFAULT_OVERLAP_SECONDS, ConflictError, Registered, UnknownEndpointError
from relay.ingest import iso
from relay.model import Outcome
from relay.outbox import Backlog, Past
from relay.rehearsal import rehearse

LARGEST_SETTINGS = 64 << 10
LONGEST_OVERLAP_SECONDS = 30 * 24 * 3600.0
MASK = "***"
RATE = re.compile(r"([1-9][0-9]{0,5})/([sm])")


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

    async def listing(self, request: web.Request) -> web.Response:
        return answer(page([await self._shown(each) for each in self._state.endpoints.all()], None))

    async def show(self, request: web.Request) -> web.Response:
        return answer(await self._shown(self._named(request)))

    async def put(self, request: web.Request) -> web.Response:
        values = await bodies.members(request, LARGEST_SETTINGS)
        if not isinstance(values.get("id", ""), str):
            raise invalid([("#/id", "must be text")])
        try:
            registered, secret = await self._state.endpoints.put(values)
        except (SettingsError, ConflictError) as error:
            raise refused(error) from None
        shown = await self._shown(registered)
        return answer(shown | {"secret": secret}, status=201) if secret is not None else answer(shown)

    async def patch(self, request: web.Request) -> web.Response:
        id_ = self._named(request).endpoint.id
        values = await bodies.members(request, LARGEST_SETTINGS)
        try:
            return answer(await self._shown(await self._state.endpoints.patch(id_, values)))
        except (SettingsError, ConflictError) as error:
            raise refused(error) from None

    async def remove(self, request: web.Request) -> web.Response:
        try:
            cancelled = await self._state.endpoints.remove(self._named(request).endpoint.id)
        except ConflictError as error:
            raise refused(error) from None
        return answer({"cancelled": cancelled})

    async def pause(self, request: web.Request) -> web.Response:
        registered = await self._state.endpoints.pause(self._named(request).endpoint.id, paused=True)
        return answer(await self._shown(registered))

    async def resume(self, request: web.Request) -> web.Response:
        registered = await self._state.endpoints.pause(self._named(request).endpoint.id, paused=False)
        return answer(await self._shown(registered))

    async def rotate(self, request: web.Request) -> web.Response:
        id_ = self._named(request).endpoint.id
        values = await bodies.members(request, LARGEST_SETTINGS, optional=True)
        refuse_unknown(values, "overlap")
        overlap_seconds = _overlap(values.get("overlap"))
        try:
            registered, secret = await self._state.endpoints.rotate(id_, overlap_seconds)
        except ConflictError as error:
            raise refused(error) from None
        until_ms = registered.overlap_until_ms
        return answer(
            {"id": id_, "secret": secret, "overlap_until": iso(until_ms) if until_ms is not None else None}
        )

    async def replay(self, request: web.Request) -> web.Response:
        id_ = self._named(request).endpoint.id
        values = await bodies.members(request, LARGEST_SETTINGS, optional=True)
        refuse_unknown(values, "state", "since", "until", "event", "rate", "dry_run")
        ended = read_selection(values, endpoint=id_)
        spacing_ms = _spacing(values.get("rate"))
        dry_run = values.get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise invalid([("#/dry_run", "must be true or false")])
        if dry_run:
            return answer({"count": await self._state.outbox.count(ended), "dry_run": True})
        now_ms = self._state.clock.now_ms()
        count = await self._state.outbox.revive(ended, now_ms, spacing_ms)
        self._state.wake([id_])
        return answer({"count": count, "dry_run": False})

    async def test(self, request: web.Request) -> web.Response:
        values = await bodies.members(request, LARGEST_SETTINGS)
        refuse_unknown(values, "event", "endpoint")
        type_ = values.get("event")
        known = self._state.catalogue.types.get(type_) if isinstance(type_, str) else None
        if known is None:
            raise invalid([("#/event", "must be a type of the catalogue")])
        wanting = self._state.ingest.subscriptions.wanting(known.type)
        if (id_ := values.get("endpoint")) is not None:
            wanting = tuple(each for each in wanting if each.id == id_)
        if not wanting:
            raise invalid([("#/endpoint" if id_ is not None else "#/event", "nobody is subscribed to it")])
        rehearsed = await rehearse(
            known.type, known.sample, wanting, sender=self._state.sender, clock=self._state.clock
        )
        return answer({"data": [{"endpoint": each.endpoint, **_met(each.outcome)} for each in rehearsed]})

    def _named(self, request: web.Request) -> Registered:
        id_ = request.match_info["id"]
        try:
            return self._state.endpoints.get(id_)
        except UnknownEndpointError:
            raise Problem(404, "there is no endpoint of this id") from None

    async def _shown(self, registered: Registered) -> dict[str, object]:
        id_ = registered.endpoint.id
        backlog = (await self._state.outbox.backlog()).get(id_)
        past = (await self._state.outbox.pasts()).get(id_)
        return shown(registered, backlog, past, self._state.clock.now_ms())


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
        "state": "paused" if registered.paused else "active",
        "pending": backlog.pending if backlog else 0,
        "dead": backlog.dead if backlog else 0,
        "oldest_pending_seconds": max(0, now_ms - oldest_ms) / 1000 if oldest_ms is not None else None,
        "last_success_at": _at(past.last_success_at_ms) if past else None,
        "last_failure_at": _at(past.last_failure_at_ms) if past else None,
        "last_error": past.last_error if past else None,
        "description": endpoint.description,
        "format": endpoint.format,
        "signatures": endpoint.signatures,
        "headers": {name: MASK for name, _ in endpoint.headers},
        "timeout": duration(endpoint.timeout_seconds),
        "retry_schedule": [duration(seconds) for seconds in endpoint.retry_schedule],
        "concurrency": endpoint.concurrency,
    }


def masked(url: str) -> str:
    """Keep the names of a URL's query and hide the values, which often are tokens."""
    parts = urlsplit(url)
    names = [(name, MASK) for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    return parts._replace(query=urlencode(names, safe="*")).geturl()


def duration(seconds: float) -> str:
    """Write a length of time the way it is read: 90061.5 -> "1d1h1m1s500ms"."""
    rest = round(seconds * 1000)
    text = ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def refused(error: SettingsError | ConflictError) -> Problem:
    return invalid(error.problems) if isinstance(error, SettingsError) else Problem(409, str(error))


def refuse_unknown(values: Mapping[str, Any], *known: str) -> None:
    unknown = [
        (f"#/{name}", f"unknown member; known are {', '.join(known)}") for name in values if name not in known
    ]
    if unknown:
        raise invalid(unknown)


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


def _spacing(rate: object) -> float:
    """Return the milliseconds from one replayed delivery to the next."""
    if rate is None:
        return 0.0
    match = RATE.fullmatch(rate) if isinstance(rate, str) else None
    if match is None:
        raise invalid([("#/rate", 'must be a rate such as "50/s" or "1000/m"')])
    return (1000 if match[2] == "s" else 60_000) / int(match[1])


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
