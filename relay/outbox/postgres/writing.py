"""One transaction: all that waits to be written goes in, what became of each comes out.

Outcomes first, so that the news of one is accepted only if it counts; then what is accepted; then the
tallies. A batch of whatever size takes the same number of round trips.
"""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from asyncpg import Connection

from relay.model import Attempt, Delivery, Health, Receipt, State, Submission, Verdict
from relay.outbox import accepting
from relay.outbox.accepting import Accepted, Keys, Known
from relay.outbox.postgres import statements
from relay.outbox.postgres.links import AgainError, transaction
from relay.outbox.postgres.schema import TURNS
from relay.outbox.postgres.statements import columns, plain
from relay.outbox.statements import CODES

Handle = tuple[int, int]  # event, endpoint
Claim = tuple[int, int, int]  # event, endpoint, epoch


class LapsedError(Exception):
    """We are taken for dead: what we held is free, and we have to join anew."""


class Record(NamedTuple):
    """What an attempt met, what follows, how the endpoint stands if that changed, and what to tell of it."""

    delivery: Delivery
    attempt: Attempt
    verdict: Verdict
    health: Health | None = None
    news: Sequence[Submission] = ()
    epoch: int = 0  # of the claim it is held by
    version: int = 0  # of what was known of the endpoint's health when this was concluded


@dataclass(slots=True)
class Ours:
    """What a relay knows when it writes."""

    relay: int
    numbers: Mapping[str, int]  # of the endpoints that events may be accepted for
    revision: int  # of the endpoints
    healths: Mapping[int, str | None]  # as they were last read or written
    versions: Mapping[int, int]  # that rise when another relay's conclusion is taken over


@dataclass(slots=True)
class Batch:
    """What waits for the next commit."""

    accepts: list[Sequence[Submission]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    releases: list[Claim] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How much waits: events and outcomes."""
        return sum(map(len, self.accepts)) + len(self.records)

    def submissions(self) -> list[Submission]:
        """All that may be accepted."""
        return [each for some in (*self.accepts, *(r.news for r in self.records)) for each in some]


@dataclass(slots=True)
class Written:
    """What a commit made of its batch, each list in the batch's order."""

    numbers: dict[str, int]  # of the endpoints that events may be accepted for
    revision: int
    accepted: list[Accepted] = field(default_factory=list)
    told: list[list[Receipt] | None] = field(default_factory=list)  # of each record; None: it does not count
    due: dict[str, int] = field(
        default_factory=dict
    )  # endpoint -> when the first of what is new there is due
    pending: int = 0  # how many more there are
    concluded: dict[int, str] = field(default_factory=dict)  # how endpoints stand, as we see it,
    healths: dict[int, str | None] = field(default_factory=dict)  # and as they do


@dataclass(slots=True)
class Tally:
    """What a batch changes of an endpoint's counts and of its last attempts."""

    pending: int = 0
    dead: int = 0
    success_ms: int | None = None
    failure_ms: int | None = None
    error: str | None = None


class Tallies(defaultdict[int, Tally]):
    """What a batch changes, by the endpoint's number."""

    def __init__(self) -> None:
        super().__init__(Tally)

    async def write(self, link: Connection, relay: int) -> None:
        rows = [
            (number, each.pending, each.dead, each.success_ms, each.failure_ms, each.error)
            for number, each in sorted(self.items())
        ]
        if rows:
            await link.execute(statements.TALLY, relay, *columns(rows, 6))


def turn(number: int, key: str) -> int:
    """Return which lock is that of a key at an endpoint; the same in every relay."""
    return zlib.crc32(f"{number} {key}".encode()) % TURNS


async def write(link: Connection, batch: Batch, ours: Ours) -> Written:
    """Write the batch in one transaction, on disk when this returns. Raises AgainError, LapsedError."""
    numbers, relay = ours.numbers, ours.relay
    submissions = batch.submissions()
    handles = [record.delivery.handle for record in batch.records]
    async with transaction(link):
        locked = await link.fetchrow(
            statements.LOCK,
            relay,
            sorted(_turns(batch.records, submissions, numbers)),
            *columns(handles, 2),
            len(submissions),
        )
        if locked is None:
            raise LapsedError
        written = Written(numbers=dict(numbers), revision=locked["revision"])
        if locked["revision"] != ours.revision:  # somebody changed endpoints
            live = dict(await link.fetch(statements.LIVE))
            written.numbers = {id_: live[id_] for id_ in numbers if id_ in live}
        tallies = Tallies()
        counted = await _record(link, batch.records, ours, tallies, written)
        if batch.releases:
            await link.execute(statements.RELEASE, relay, *columns(batch.releases, 3))
        new = await _accept(link, batch, counted, written)
        if new:
            await _insert(link, new, written, tallies, sorted(locked["numbers"]))
        await tallies.write(link, relay)
    written.pending = sum(each.pending for each in tallies.values())
    return written


def _turns(
    records: Sequence[Record], submissions: Sequence[Submission], numbers: Mapping[str, int]
) -> set[int]:
    turns = {
        turn(delivery.handle[1], delivery.event.key)
        for delivery, *_ in records
        if delivery.ordered and delivery.event.key is not None
    }
    for submission in submissions:
        key = submission.event.key
        if key is not None:
            turns.update(
                turn(numbers[owed.endpoint], key)
                for owed in submission.endpoints
                if owed.ordered and owed.endpoint in numbers
            )
    return turns


async def _record(
    link: Connection, records: Sequence[Record], ours: Ours, tallies: Tallies, written: Written
) -> set[Handle]:
    """Write outcomes; return which of them count."""
    if not records:
        return set()
    rows = [_row(record) for record in records]
    counted = {tuple(row) for row in await link.fetch(statements.RECORD, ours.relay, *columns(rows, 11))}
    kept = [record for record in records if record.delivery.handle in counted]
    for delivery, attempt, verdict, *_ in kept:
        _tally(tallies[delivery.handle[1]], attempt, verdict)
        if verdict.due_ms is not None:
            _due(written, delivery.endpoint, verdict.due_ms)
    failures = [
        (*delivery.handle, *_met(attempt), attempt.reason, plain(attempt.answer))
        for delivery, attempt, *_ in kept
        if attempt.reason is not None
    ]
    if failures:
        await link.execute(statements.ATTEMPTS, *columns(failures, 8))
    written.concluded = {
        delivery.handle[1]: orjson.dumps(health).decode()
        for delivery, _, _, health, _, _, version in kept
        if health is not None and version == ours.versions.get(delivery.handle[1], 0)
    }
    if written.concluded:
        rows = [(number, ours.healths.get(number), text) for number, text in written.concluded.items()]
        written.healths = dict(await link.fetch(statements.HEALTHS, *columns(rows, 3)))
    await _pass_on(link, kept, written)
    return counted


async def _pass_on(link: Connection, records: Sequence[Record], written: Written) -> None:
    """Let the next of each key go whose oldest is over, or was attempted; the turns are ours."""
    ordered = [(each.delivery, each.attempt.at_ms) for each in records if each.delivery.ordered]
    if not ordered:
        return
    names = {delivery.handle[1]: delivery.endpoint for delivery, _ in ordered}
    over = [(*delivery.handle, delivery.event.key, at_ms) for delivery, at_ms in ordered]
    for number, due_ms, held in await link.fetch(statements.NEXT_OF_KEY, *columns(over, 4)):
        if not held:
            _due(written, names[number], due_ms)


def _row(record: Record) -> Sequence[Any]:
    delivery, attempt, verdict, *_ = record
    last: Sequence[Any] = (None, None, None, None)
    if attempt.reason is None:
        last = (attempt.at_ms, attempt.milliseconds, attempt.status, plain(attempt.answer))
    follows = (CODES[verdict.state], verdict.due_ms, attempt.number, verdict.steps)
    return (*delivery.handle, record.epoch, *follows, *last)


def _met(attempt: Attempt) -> Sequence[Any]:
    return attempt.number, attempt.at_ms, attempt.milliseconds, attempt.status


def _tally(tally: Tally, attempt: Attempt, verdict: Verdict) -> None:
    if attempt.reason is None:
        tally.success_ms = attempt.at_ms
    else:
        tally.failure_ms, tally.error = attempt.at_ms, attempt.reason
    tally.pending -= verdict.state is not State.PENDING
    tally.dead += verdict.state is State.DEAD


def _due(written: Written, endpoint: str, due_ms: int) -> None:
    written.due[endpoint] = min(written.due.get(endpoint, due_ms), due_ms)


async def _accept(link: Connection, batch: Batch, counted: set[Handle], written: Written) -> list[Submission]:
    """Decide on what was submitted and on the news of what counts; return what is new."""
    told = [record.news if record.delivery.handle in counted else () for record in batch.records]
    accepts = [*batch.accepts, *told]
    every = [each for some in accepts for each in some]
    asked = [each.idempotency_key for each in every if each.idempotency_key is not None]
    known = {key: of for key, of in await _known(link, statements.KNOWN, asked) if key is not None}
    asked = [each.event.id for each in every if each.known_by_id]
    known_ids = {of[1].id: of for _, of in await _known(link, statements.KNOWN_IDS, asked)}
    accepted, new = accepting.decide(accepts, Keys(known.get, known_ids.get), written.numbers)
    written.accepted = accepted[: len(batch.accepts)]
    for record, receipts in zip(batch.records, accepted[len(batch.accepts) :], strict=True):
        counts = record.delivery.handle in counted and isinstance(receipts, list)
        written.told.append(receipts if counts else None)  # type: ignore[arg-type]
    return new


async def _known(link: Connection, statement: str, asked: list[str]) -> list[tuple[str | None, Known]]:
    """Return what is kept of what was asked for: its idempotency key, fingerprint and receipt."""
    if not asked:
        return []
    return [
        (
            key,
            (
                fingerprint,
                Receipt(id=id_, type=type_, timestamp=timestamp, endpoints=tuple(endpoints), duplicate=True),
            ),
        )
        for key, fingerprint, id_, type_, timestamp, endpoints in await link.fetch(statement, asked)
    ]


async def _insert(
    link: Connection,
    new: Sequence[Submission],
    written: Written,
    tallies: Tallies,
    event_numbers: Sequence[int],
) -> None:
    events: list[Sequence[Any]] = []
    deliveries: list[Sequence[Any]] = []
    pending = await _pending_keys(link, new, written.numbers)
    for seq, submission in zip(event_numbers, new, strict=False):
        event = submission.event
        events.append(
            (seq, event.id, event.type, event.timestamp, event.data, submission.digest, event.accepted_at_ms,
             event.key, event.traceparent, event.tracestate, submission.idempotency_key,
             submission.fingerprint)
        )  # fmt: skip
        for endpoint, format_, ordered in submission.endpoints:
            number = written.numbers[endpoint]
            key = event.key if ordered else None
            held = (number, key) in pending
            if key is not None:
                pending.add((number, key))
            deliveries.append((seq, number, event.accepted_at_ms, format_, key, held))
            tallies[number].pending += 1
            if not held:
                _due(written, endpoint, event.accepted_at_ms)
    # In the order of their keys, so that no two relays wait for each other.
    events.sort(key=lambda row: row[10] or "")
    kept = await link.fetchval(statements.ACCEPT, *columns(events, 12), *columns(deliveries, 6))
    if kept != len(events):
        raise AgainError("the same idempotency key came to another relay at the same moment")


async def _pending_keys(
    link: Connection, new: Sequence[Submission], numbers: Mapping[str, int]
) -> set[tuple[int, str | None]]:
    """Return which keys of what is new have something pending."""
    keys = {
        (numbers[owed.endpoint], each.event.key)
        for each in new
        for owed in each.endpoints
        if owed.ordered and each.event.key is not None
    }
    if not keys:
        return set()
    return {tuple(row) for row in await link.fetch(statements.PENDING_KEYS, *columns(list(keys), 2))}
