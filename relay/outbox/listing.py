"""Looking at what is kept: events with their deliveries and attempts; rows in, stories out.

Runs on the connection's thread. A page looks at a bounded number of events whatever it finds, so it may
hold fewer than asked for, or none, and still have a cursor to go on from.
"""

import heapq
import sqlite3
from collections.abc import Iterator
from typing import Any

from relay.model import Attempt, Event, State
from relay.outbox import DeliveryStory, Page, Query, Story
from relay.outbox.statements import CODES, STATES

EXAMINED = 300
EVENT = "SELECT seq, id, type, timestamp, data, accepted_at, key, traceparent, tracestate FROM events"
END = 1 << 62


def story(db: sqlite3.Connection, event_id: str) -> Story | None:
    row = db.execute(EVENT + " WHERE id = ?", (event_id,)).fetchone()
    return _story(db, row) if row else None


def page(db: sqlite3.Connection, query: Query) -> Page:
    """List events, newest first."""
    before = min(query.before if query.before is not None else END, _first_since(db, query.until_ms))
    stories: list[Story] = []
    examined = 0
    for seq in _candidates(db, query, before):
        row = db.execute(EVENT + " WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            continue
        examined += 1
        found = _story(db, row)
        if query.since_ms is not None and found.event.accepted_at_ms < query.since_ms:
            break  # everything after it is older still
        if _matches(query, found):
            stories.append(found)
        if len(stories) == query.limit or examined == EXAMINED:
            return Page(stories=tuple(stories), next_before=seq)
    return Page(stories=tuple(stories), next_before=None)


def _candidates(db: sqlite3.Connection, query: Query, before: int) -> Iterator[int]:
    """Yield numbers of events that may match, descending: by state from its partial index, else all."""
    if query.state in {None, State.DELIVERED}:
        rows = db.execute("SELECT seq FROM events WHERE seq < ? ORDER BY seq DESC", (before,))
        return (row[0] for row in rows)
    numbers = db.execute("SELECT number FROM endpoints AS p WHERE ? IS NULL OR id = ?", (query.endpoint,) * 2)
    return _merged([_of_state(db, number, query.state, before) for (number,) in numbers.fetchall()])


def _of_state(db: sqlite3.Connection, number: int, state: State | None, before: int) -> Iterator[int]:
    # A literal, so that the state's partial index is seen to hold.
    where = f"WHERE endpoint = ? AND state = {CODES[state or State.PENDING]} AND event < ?"
    rows = db.execute(f"SELECT event FROM deliveries {where} ORDER BY event DESC", (number, before))  # noqa: S608
    return (row[0] for row in rows)


def _merged(descending: list[Iterator[int]]) -> Iterator[int]:
    last = None
    for seq in heapq.merge(*descending, reverse=True):
        if seq != last:
            yield seq
        last = seq


def _first_since(db: sqlite3.Connection, at_ms: int | None) -> int:
    """Return the number of the first event accepted at or after a time; numbers rise with acceptance."""
    if at_ms is None:
        return END
    low, high = 0, (db.execute("SELECT max(seq) FROM events").fetchone()[0] or 0) + 1
    while low < high:
        middle = (low + high) // 2
        row = db.execute(
            "SELECT seq, accepted_at FROM events WHERE seq >= ? ORDER BY seq LIMIT 1", (middle,)
        ).fetchone()
        if row is not None and row[1] < at_ms:
            low = row[0] + 1
        else:
            high = middle
    return low


def _matches(query: Query, found: Story) -> bool:
    if query.type is not None and found.event.type != query.type:
        return False
    if query.endpoint is None and query.state is None:
        return True
    return any(
        query.endpoint in {None, each.endpoint} and query.state in {None, each.state}
        for each in found.deliveries
    )


# As `health.next_attempt_ms`, with what else may hold a delivery back: its key, and a person's pause.
NEXT_ATTEMPT = (
    "iif(d.held OR p.paused OR coalesce(json_extract(p.health, '$.standing'), '') = 'gone', NULL,"
    " max(d.due, coalesce(json_extract(p.health, '$.not_before_ms'), 0),"
    " iif(json_extract(p.health, '$.standing') = 'down', json_extract(p.health, '$.probe_at_ms'), 0)))"
)


def _story(db: sqlite3.Connection, row: Any) -> Story:
    seq, id_, type_, timestamp, data, accepted_at, key, parent, state = row
    event = Event(
        id=id_, type=type_, timestamp=timestamp, data=data,
        accepted_at_ms=accepted_at, key=key, traceparent=parent, tracestate=state,
    )  # fmt: skip
    deliveries = db.execute(
        f"SELECT d.endpoint, p.id, d.state, {NEXT_ATTEMPT}, d.attempts, d.at, d.milliseconds,"  # noqa: S608
        " d.status, d.answer, d.expired FROM deliveries d JOIN endpoints p ON p.number = d.endpoint"
        " WHERE d.event = ?",
        (seq,),
    ).fetchall()
    stories = [_delivery(db, seq, each) for each in deliveries]
    return Story(event=event, deliveries=tuple(sorted(stories, key=lambda each: each.endpoint)))


def _delivery(db: sqlite3.Connection, seq: int, row: Any) -> DeliveryStory:
    number, endpoint, state, due, count, at, milliseconds, status, answer, expired = row
    attempts = [
        _attempt(each)
        for each in db.execute(
            "SELECT number, at, milliseconds, status, reason, answer FROM attempts"
            " WHERE event = ? AND endpoint = ? ORDER BY number",
            (seq, number),
        )
    ]
    if at is not None:  # the one that ended it well is kept in its own row
        attempts.append(_attempt((count, at, milliseconds, status, None, answer)))
    return DeliveryStory(
        endpoint=endpoint,
        state=STATES[state],
        due_ms=due,
        attempts=tuple(attempts),
        expired_at_ms=expired,
    )


def _attempt(row: Any) -> Attempt:
    number, at, milliseconds, status, reason, answer = row
    return Attempt(
        number=number, at_ms=at, milliseconds=milliseconds, status=status, reason=reason, answer=answer
    )
