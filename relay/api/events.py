"""`/v1/events`: submitting events, one or many, and looking at what became of them (contract 3 and 4)."""

import re

import orjson
from aiohttp import web

from relay import canonical
from relay.api import bodies
from relay.api.problems import Problem
from relay.api.state import State
from relay.ingest import Draft, InvalidError, idempotency_key, iso, traceparent
from relay.ingest import Problem as Mistake
from relay.model import Attempt, Receipt
from relay.outbox import ConflictError, DeliveryStory, FullError, Page, Query, Story

LARGEST_BATCH = 16 << 20
MOST_IN_BATCH = 1000
DEFAULT_LIMIT = 50
LARGEST_LIMIT = 200
RETRY_AFTER_SECONDS = 5


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
        ]

    async def submit(self, request: web.Request) -> web.Response:
        bodies.content_type(request, bodies.JSON)
        value = bodies.parse(await bodies.read(request, self._state.max_event_size))
        headers = request.headers
        key = headers.get("Idempotency-Key")
        try:
            draft = Draft(
                value=value,
                idempotency_key=idempotency_key(key) if key is not None else None,
                traceparent=traceparent(headers.get("traceparent")),
            )
        except InvalidError as error:
            raise invalid(error.problems) from None
        (receipt,) = await self._keep([draft])
        return answer(_receipt(receipt), status=200 if receipt.duplicate else 202)

    async def submit_batch(self, request: web.Request) -> web.Response:
        media_type = bodies.content_type(request, bodies.JSON, bodies.NDJSON)
        body = await bodies.read(request, LARGEST_BATCH)
        values, prefix = _lines(body) if media_type == bodies.NDJSON else _members(body)
        if len(values) > MOST_IN_BATCH:
            raise invalid([("#", f"holds {len(values)} events, at most {MOST_IN_BATCH} are taken at once")])
        if len(body) > self._state.max_event_size:
            self._refuse_large(values, prefix)
        parent = traceparent(request.headers.get("traceparent"))
        receipts = await self._keep(_drafts(values, prefix, parent))
        return answer({"events": [_receipt(receipt) for receipt in receipts]}, status=202)

    async def listing(self, request: web.Request) -> web.Response:
        page = await self._state.outbox.events(_query(request))
        return answer(_page(page))

    async def show(self, request: web.Request) -> web.Response:
        story = await self._state.outbox.story(request.match_info["id"])
        if story is None:
            raise Problem(404, "there is no event of this id; it may have been forgotten after the retention")
        return answer(_story(story))

    async def _keep(self, drafts: list[Draft]) -> list[Receipt]:
        if self._state.refusing is not None:
            raise unavailable(self._state.refusing)
        try:
            return await self._state.ingest.submit(drafts)
        except InvalidError as error:
            raise invalid(error.problems) from None
        except ConflictError as error:
            detail = "this idempotency key was used before for other content"
            raise invalid([(drafts[index].pointer, detail) for index in error.indexes]) from None
        except FullError as error:
            raise unavailable(str(error)) from None

    def _refuse_large(self, values: list[canonical.JSON], prefix: str) -> None:
        limit = self._state.max_event_size
        sizes = [_size(value) for value in values]
        large = [(f"{prefix}{index}", f"is {size} bytes") for index, size in enumerate(sizes) if size > limit]
        if large:
            raise Problem(413, f"one event may have {limit} bytes", errors=large)


def _size(value: canonical.JSON) -> int:
    try:
        return len(canonical.encode(value))
    except canonical.Unrepresentable:
        return 0  # refused for that reason in a moment


def _members(body: bytes) -> tuple[list[canonical.JSON], str]:
    value = bodies.parse(body)
    events = value.get("events") if isinstance(value, dict) else None
    if not isinstance(events, list):
        raise invalid([("#/events", "must be a list of events")])
    return list(events), "#/events/"


def _lines(body: bytes) -> tuple[list[canonical.JSON], str]:
    """Parse NDJSON: one value a line, empty lines passed over; places count the values."""
    values: list[canonical.JSON] = []
    mistakes: list[Mistake] = []
    for number, line in enumerate(body.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append(canonical.parse(line))
        except canonical.NotJSON as error:
            mistakes.append((f"#/{len(values) + len(mistakes)}", f"line {number}: {error}"))
    if mistakes:
        raise Problem(400, "some lines are not JSON", errors=mistakes)
    return values, "#/"


def _drafts(values: list[canonical.JSON], prefix: str, parent: str | None) -> list[Draft]:
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
        drafts.append(Draft(value=value, pointer=f"{prefix}{index}", idempotency_key=key, traceparent=parent))
    if mistakes:
        raise invalid(mistakes)
    return drafts


def _query(request: web.Request) -> Query:
    limit = request.query.get("limit", str(DEFAULT_LIMIT))
    cursor = request.query.get("cursor")
    mistakes: list[Mistake] = []
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= LARGEST_LIMIT:
        mistakes.append(("#limit", f"must be 1 to {LARGEST_LIMIT}"))
    if cursor is not None and not re.fullmatch(r"[0-9]{1,18}", cursor):
        mistakes.append(("#cursor", "must be the next_cursor of the page before"))
    mistakes += [(f"#{name}", "is not a filter") for name in request.query if name not in {"limit", "cursor"}]
    if mistakes:
        raise invalid(mistakes)
    return Query(limit=int(limit), before=int(cursor) if cursor is not None else None)


def answer(content: object, status: int = 200) -> web.Response:
    return web.Response(
        body=orjson.dumps(content), status=status, headers={"Content-Type": "application/json"}
    )


def invalid(mistakes: tuple[Mistake, ...] | list[Mistake]) -> Problem:
    detail = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else f"{mistakes[0][0]} {mistakes[0][1]}"
    return Problem(422, detail, errors=mistakes)


def unavailable(detail: str) -> Problem:
    return Problem(503, detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def _receipt(receipt: Receipt) -> dict[str, object]:
    return {
        "id": receipt.id,
        "event": receipt.type,
        "timestamp": receipt.timestamp,
        "endpoints": receipt.endpoints,
        "duplicate": receipt.duplicate,
    }


def _page(page: Page) -> dict[str, object]:
    cursor = str(page.next_before) if page.next_before is not None else None
    return {"data": [_story(story) for story in page.stories], "next_cursor": cursor}


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
    return {
        "endpoint": delivery.endpoint,
        "state": delivery.state,
        "attempts": [_attempt(attempt) for attempt in delivery.attempts],
        "next_attempt_at": iso(delivery.due_ms) if delivery.due_ms is not None else None,
    }


def _attempt(attempt: Attempt) -> dict[str, object]:
    return {
        "number": attempt.number,
        "at": iso(attempt.at_ms),
        "status": attempt.status,
        "milliseconds": attempt.milliseconds,
        "error": attempt.reason,
        "answer": attempt.answer,
    }
