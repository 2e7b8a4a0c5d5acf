"""One transaction: all that waits to be written goes in, what became of each comes out.

Runs on the connection's thread as one function, so no other statement can come between BEGIN and COMMIT.
"""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from relay.model import Attempt, Delivery, Health, Receipt, Submission, Verdict
from relay.outbox import accepting, order, statements
from relay.outbox.accepting import Accepted, Keys, Known
from relay.outbox.statements import CODES, Row

Change = Callable[[sqlite3.Connection], Any]


class Record(NamedTuple):
    """What an attempt met, what follows, and how the endpoint stands if that changed."""

    delivery: Delivery
    attempt: Attempt
    verdict: Verdict
    health: Health | None = None


@dataclass(slots=True)
class Batch:
    """What waits for the next commit."""

    accepts: list[Sequence[Submission]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How much waits: events, outcomes and other changes."""
        return sum(map(len, self.accepts)) + len(self.records) + len(self.changes)

    @property
    def seen_ms(self) -> int | None:
        """What the clock said of the latest attempt or event in it."""
        if self.records:
            return self.records[-1].attempt.at_ms
        if self.accepts and self.accepts[-1]:
            return self.accepts[-1][-1].event.accepted_at_ms
        return None


@dataclass(slots=True)
class Written:
    """What a commit made of its batch, each list in the batch's order."""

    last_seq: int
    accepted: list[Accepted] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # the endpoint of each new delivery
    fresh: list[Delivery] = field(default_factory=list)  # of them those that may be claimed
    passed_on: list[tuple[str, int]] = field(default_factory=list)  # endpoint, when the next of a key is due
    changed: list[Any] = field(default_factory=list)
    used_bytes: int | None = None


def write(
    db: sqlite3.Connection, batch: Batch, numbers: dict[str, int], last_seq: int, *, measure: bool
) -> Written:
    """Write the batch in one transaction, synced to disk when this returns; `measure` what is used then."""
    db.execute("BEGIN IMMEDIATE")
    try:
        written = _accept(db, batch.accepts, numbers, last_seq)
        written.passed_on = _record(db, batch.records)
        if (seen_ms := batch.seen_ms) is not None:
            statements.update_last_seen(db, seen_ms)
        written.changed = [change(db) for change in batch.changes]
        db.execute("COMMIT")
    except BaseException:
        # A full disk has already rolled the transaction back.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    if measure:
        written.used_bytes = statements.used_bytes(db)
    return written


def _record(db: sqlite3.Connection, records: Sequence[Record]) -> list[tuple[str, int]]:
    deliveries: list[Row] = []
    failures: list[Row] = []
    endpoints: dict[int, list[object]] = {}  # number -> last success, last failure, its reason
    healths: dict[int, Health] = {}
    for delivery, attempt, verdict, health in records:
        last_of = endpoints.setdefault(delivery.handle[1], [None, None, None])
        met: Row = (attempt.at_ms, attempt.milliseconds, attempt.status)
        if attempt.reason is None:
            last: Row = (*met, attempt.answer)
            last_of[0] = attempt.at_ms
        else:
            last = (None, None, None, None)
            last_of[1:] = attempt.at_ms, attempt.reason
            failures.append((*delivery.handle, attempt.number, *met, attempt.reason, attempt.answer))
        if health is not None:
            healths[delivery.handle[1]] = health
        follows: Row = (CODES[verdict.state], verdict.due_ms, attempt.number, verdict.steps)
        deliveries.append((*delivery.handle, *follows, *last))
    statements.update_deliveries(db, deliveries)
    statements.insert_attempts(db, failures)
    statements.update_endpoints(db, [(*last_of, number) for number, last_of in endpoints.items()])
    statements.update_healths(db, healths)
    return _passed_on(db, records)


def _passed_on(db: sqlite3.Connection, records: Sequence[Record]) -> list[tuple[str, int]]:
    """Let the next of each key go whose oldest is over."""
    passed_on: list[tuple[str, int]] = []
    for record in records:
        delivery, key = record.delivery, record.delivery.event.key
        if delivery.ordered and key is not None:
            due_ms = order.pass_on(db, delivery.handle, key, record.attempt.at_ms)
            if due_ms is not None:
                passed_on.append((delivery.endpoint, due_ms))
    return passed_on


def _accept(
    db: sqlite3.Connection, accepts: Sequence[Sequence[Submission]], numbers: dict[str, int], last_seq: int
) -> Written:
    written = Written(last_seq=last_seq)
    written.accepted, new = accepting.decide(
        accepts, Keys(partial(_known, db), partial(_known_id, db)), numbers
    )
    _insert(db, new, numbers, written)
    return written


def _known(db: sqlite3.Connection, key: str) -> Known | None:
    return _as_known(db, statements.known_key(db, key))


def _known_id(db: sqlite3.Connection, id_: str) -> Known | None:
    return _as_known(db, statements.known_id(db, id_))


def _as_known(db: sqlite3.Connection, row: statements.KnownRow | None) -> Known | None:
    if row is None:
        return None
    seq, id_, type_, timestamp, fingerprint = row
    endpoints = statements.endpoints_of(db, seq)
    return fingerprint, Receipt(id=id_, type=type_, timestamp=timestamp, endpoints=endpoints, duplicate=True)


def _insert(
    db: sqlite3.Connection, new: Sequence[Submission], numbers: dict[str, int], written: Written
) -> None:
    events: list[Row] = []
    deliveries: list[Row] = []
    heads = order.Heads(db)
    for submission in new:
        written.last_seq += 1
        seq, event = written.last_seq, submission.event
        events.append(
            (seq, event.id, event.type, event.timestamp, event.data, submission.digest, event.accepted_at_ms,
             event.key, event.traceparent, event.tracestate, submission.idempotency_key,
             submission.fingerprint)
        )  # fmt: skip
        for endpoint, format_, ordered in submission.endpoints:
            number = numbers[endpoint]
            key = event.key if ordered else None
            held = key is not None and heads.holds_back(number, key)
            deliveries.append((seq, number, event.accepted_at_ms, format_, key, held))
            delivery = Delivery(
                handle=(seq, number), event=event, endpoint=endpoint, format=format_,
                attempts=0, steps=0, due_ms=event.accepted_at_ms, digest=None,
                ordered=key is not None,
            )  # fmt: skip
            written.pending.append(number)
            if not held:
                written.fresh.append(delivery)
    statements.insert_events(db, events)
    statements.insert_deliveries(db, deliveries)
