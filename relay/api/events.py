"""`/v1/events`: submitting events, one or many, and looking at what became of them (contract 3 and 4)."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import orjson
from aiohttp import web

from relay import canonical, cloudevents
from relay.api import bodies
from relay.api.answers import Mistake, answer, invalid, page, unavailable
from relay.api.problems import Problem
from relay.api.selection import read_query, unknown
from relay.api.state import State
from relay.ingest import Draft, InvalidError, Trace, Turn, idempotency_key, iso, trace
from relay.model import Attempt, Receipt
from relay.outbox import ConflictError, DeliveryStory, Ended, Story

LARGEST_BATCH = 16 << 20
MOST_IN_BATCH = 1000
MOST_CONTAINERS = 1_000_000  # whose memory is many times that of their text
LARGEST_REPLAY = 4 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What a way to submit calls two things that answers speak of."""

    type: str
    identity: str


ORDINARY = Words(type="event", identity="idempotency key")
STRUCTURED = Words(type="type", identity="pair of source and id")
BINARY = Words(type="ce-type", identity="pair of source and id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How one submitted event is read: headers and body in, its draft out."""

    read: Callable[[Mapping[str, str], bytes], Draft]
    words: Words


class Events:
    """The handlers; all rules are `ingest`'s and `outbox`'s."""

    def __init__(self, state: State) -> None:
        self._state = state

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/events", self.submit),
            web.post("/v1/events/batch", self.submit_batch),
            web.get("/v1/events", self.listing, allow_head=False),
            web.get("/v1/events/{id}", self.show, allow_head=False),
            web.post("/v1/events/{id}/replay", self.replay),
            web.get("/v1/event-types", self.types, allow_head=False),
        ]

    async def submit(self, request: web.Request) -> web.Response:
        way = _way(request)
        if len(request.headers.getall("Idempotency-Key", ())) > 1:
            raise invalid([("#", "the header Idempotency-Key is there twice")])
        body = await bodies.read(request, self._state.max_event_size)
        try:
            draft = way.read(request.headers, body)
        except canonical.NotJSON as error:
            raise Problem(400, str(error)) from None
        except InvalidError as error:
            raise invalid(error.problems) from None
        (receipt,) = await self._keep([draft], way.words)
        return answer(_receipt(receipt), status=200 if receipt.duplicate else 202)

    async def submit_batch(self, request: web.Request) -> web.Response:
        media_type = bodies.content_type(request, bodies.JSON, bodies.NDJSON, cloudevents.BATCHED)
        if "Idempotency-Key" in request.headers:
            raise invalid(
                [("#", "the header Idempotency-Key is for one event: give each its idempotency_key")]
            )
        body = await bodies.read(request, LARGEST_BATCH)
        if body.count(b"{") + body.count(b"[") > MOST_CONTAINERS:
            raise Problem(413, f"at most {MOST_CONTAINERS} objects and lists are taken at once")
        values, prefix = BATCHES[media_type](body)
        if len(values) > MOST_IN_BATCH:
            raise invalid([("#", f"holds more events than the {MOST_IN_BATCH} that are taken at once")])
        if len(body) > self._state.max_event_size:
            await self._refuse_large(values, prefix)
        parent = _trace(request.headers)
        if media_type == cloudevents.BATCHED:
            receipts = await self._keep(_cloudevents(values, parent), STRUCTURED)
        else:
            receipts = await self._keep(_drafts(values, prefix, parent))
        return answer({"events": [_receipt(receipt) for receipt in receipts]}, status=202)

    async def listing(self, request: web.Request) -> web.Response:
        found = await self._state.outbox.events(read_query(request.query))
        cursor = str(found.next_before) if found.next_before is not None else None
        return answer(page([_story(story) for story in found.stories], cursor))

    async def show(self, request: web.Request) -> web.Response:
        story = await self._state.outbox.story(request.match_info["id"])
        if story is None:
            raise Problem(404, "there is no event of this id; it may have been forgotten after the retention")
        return answer(_story(story))

    async def replay(self, request: web.Request) -> web.Response:
        """Send an event again: all its deliveries that are over, or that of one endpoint."""
        id_ = request.match_info["id"]
        values = await bodies.members(request, LARGEST_REPLAY, optional=True)
        if not values.keys() <= {"endpoint"}:
            raise invalid([("#", "must be an object with at most the member endpoint")])
        endpoint = values.get("endpoint")
        known = self._state.ingest.subscriptions.endpoints
        if endpoint is not None and not (isinstance(endpoint, str) and endpoint in known):
            raise invalid([("#/endpoint", "is not the id of an endpoint")])
        outbox = self._state.outbox
        if await outbox.story(id_) is None:
            raise Problem(404, "there is no event of this id; it may have been forgotten after the retention")
        try:
            count = await outbox.revive(Ended(event_id=id_, endpoint=endpoint), self._state.clock.now_ms())
        finally:
            self._state.wake(self._state.ingest.subscriptions.endpoints)
        return answer({"count": count})

    async def types(self, _request: web.Request) -> web.Response:
        return answer(
            page(
                [
                    {
                        "event": each.type,
                        "description": each.description,
                        "sample": each.sample,
                        "schema": each.schema,
                    }
                    for each in self._state.catalogue.types.values()
                ],
                None,
            )
        )

    async def _keep(self, drafts: list[Draft], words: Words = ORDINARY) -> list[Receipt]:
        if self._state.refusing is not None:
            raise unavailable(self._state.refusing)
        try:
            receipts = await self._state.ingest.submit(drafts)
        except InvalidError as error:
            raise invalid(_renamed(error.problems, drafts, words)) from None
        except ConflictError as error:
            detail = f"this {words.identity} was used before for other content"
            raise invalid([(drafts[index].pointer, detail) for index in error.indexes]) from None
        for receipt in receipts:
            if receipt.duplicate:
                self._state.metrics.duplicates += 1
            else:
                self._state.metrics.accepted += 1
        return receipts

    async def _refuse_large(self, values: list[canonical.JSON], prefix: str) -> None:
        limit = self._state.max_event_size
        large: list[Mistake] = []
        turn = Turn()
        for index, value in enumerate(values):
            await turn.over()
            if (size := _size(value)) > limit:
                large.append((f"{prefix}{index}", f"is {size} bytes"))
        if large:
            raise Problem(413, f"one event may have {limit} bytes", errors=large)


def _trace(headers: Mapping[str, str]) -> Trace | None:
    return trace(headers.get("traceparent"), headers.get("tracestate"))


def _way(request: web.Request) -> Way:
    """Return how to read what is submitted. Raises 415, and 422 for two idempotency keys."""
    if cloudevents.is_binary(request.headers):
        way = CLOUDEVENT_BINARY
    elif bodies.content_type(request, bodies.JSON, cloudevents.STRUCTURED) == bodies.JSON:
        return JSON
    else:
        way = CLOUDEVENT
    if "Idempotency-Key" in request.headers:
        detail = "the header Idempotency-Key cannot stand beside a CloudEvent: its source and id are the key"
        raise invalid([("#", detail)])
    return way


def _read(headers: Mapping[str, str], body: bytes) -> Draft:
    key = headers.get("Idempotency-Key")
    return Draft(
        value=canonical.parse(body),
        idempotency_key=idempotency_key(key) if key is not None else None,
        trace=_trace(headers),
    )


def _read_structured(headers: Mapping[str, str], body: bytes) -> Draft:
    return cloudevents.structured(canonical.parse(body), trace=_trace(headers))


def _read_binary(headers: Mapping[str, str], body: bytes) -> Draft:
    return cloudevents.binary(headers, body, trace=_trace(headers))


JSON = Way(read=_read, words=ORDINARY)
CLOUDEVENT = Way(read=_read_structured, words=STRUCTURED)
CLOUDEVENT_BINARY = Way(read=_read_binary, words=BINARY)


def _renamed(problems: Iterable[Mistake], drafts: Iterable[Draft], words: Words) -> list[Mistake]:
    """Let mistakes point to the type by the name that the sender gave it."""
    names = {f"{draft.pointer}/event": f"{draft.pointer}/{words.type}" for draft in drafts}
    return [(names.get(pointer, pointer), detail) for pointer, detail in problems]


def _size(value: canonical.JSON) -> int:
    """Measure one event; its data alone may have as many levels as a text of its own."""
    parts = [value] if not isinstance(value, dict) else [*value, *value.values()]
    try:
        return sum(len(canonical.encode(part)) for part in parts)
    except canonical.Unrepresentable:
        return 0  # refused for that reason in a moment


def _members(body: bytes) -> tuple[list[canonical.JSON], str]:
    value = bodies.parse(body)
    if not isinstance(value, dict):
        raise invalid([("#", "must be an object with the member events")])
    events = value.get("events")
    mistakes = unknown(value, ("events",))
    if not isinstance(events, list):
        raise invalid([*mistakes, ("#/events", "must be a list of events")])
    if mistakes:
        raise invalid(mistakes)
    return list(events), "#/events/"


def _elements(body: bytes) -> tuple[list[canonical.JSON], str]:
    value = bodies.parse(body)
    if not isinstance(value, list):
        raise invalid([("#", "must be a list of CloudEvents")])
    return value, "#/"


def _lines(body: bytes) -> tuple[list[canonical.JSON], str]:
    """Parse NDJSON: one value a line, empty lines passed over; places count the values."""
    values: list[canonical.JSON] = []
    mistakes: list[Mistake] = []
    number, counted = 1, 0
    for found in islice(LINE.finditer(body), MOST_IN_BATCH + 1):  # one more is too many already
        number, counted = number + body.count(b"\n", counted, found.start()), found.start()
        try:
            values.append(canonical.parse(found[0]))
        except canonical.NotJSON as error:
            mistakes.append((f"#/{len(values) + len(mistakes)}", f"line {number}: {error}"))
    if mistakes:
        raise Problem(400, "some lines are not JSON", errors=mistakes)
    return values, "#/"


LINE = re.compile(rb"[^\s][^\n]*")
BATCHES = {bodies.JSON: _members, bodies.NDJSON: _lines, cloudevents.BATCHED: _elements}


def _cloudevents(values: list[canonical.JSON], parent: Trace | None) -> list[Draft]:
    try:
        return cloudevents.batched(values, trace=parent)
    except InvalidError as error:
        raise invalid(error.problems) from None


def _drafts(values: list[canonical.JSON], prefix: str, parent: Trace | None) -> list[Draft]:
    drafts: list[Draft] = []
    mistakes: list[Mistake] = []
    for index, value in enumerate(values):
        key = None
        if isinstance(value, dict) and "idempotency_key" in value:
            given = value.pop("idempotency_key")
            key = given if isinstance(given, str) else ""
            try:
                idempotency_key(key)
            except InvalidError:
                mistakes.append(
                    (f"{prefix}{index}/idempotency_key", "must be 1 to 255 visible ASCII characters")
                )
        drafts.append(Draft(value=value, pointer=f"{prefix}{index}", idempotency_key=key, trace=parent))
    if mistakes:
        raise invalid(mistakes)
    return drafts


def _receipt(receipt: Receipt) -> dict[str, object]:
    return {
        "id": receipt.id,
        "event": receipt.type,
        "timestamp": receipt.timestamp,
        "endpoints": receipt.endpoints,
        "duplicate": receipt.duplicate,
    }


def _story(story: Story) -> dict[str, object]:
    event = story.event
    return {
        "id": event.id,
        "event": event.type,
        "timestamp": event.timestamp,
        "data": orjson.Fragment(event.data),
        "accepted_at": iso(event.accepted_at_ms),
        "deliveries": [_delivery(delivery) for delivery in story.deliveries],
    }


def _delivery(delivery: DeliveryStory) -> dict[str, object]:
    shown: dict[str, object] = {
        "endpoint": delivery.endpoint,
        "state": delivery.state,
        "attempts": [_attempt(attempt) for attempt in delivery.attempts],
        "next_attempt_at": iso(delivery.due_ms) if delivery.due_ms is not None else None,
    }
    if delivery.expired_at_ms is not None:
        shown["expired_at"] = iso(delivery.expired_at_ms)
    return shown


def _attempt(attempt: Attempt) -> dict[str, object]:
    return {
        "number": attempt.number,
        "at": iso(attempt.at_ms),
        "status": attempt.status,
        "milliseconds": attempt.milliseconds,
        "error": attempt.reason,
        "answer": attempt.answer,
    }
