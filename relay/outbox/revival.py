"""Replay: deliveries that are over go back to pending; runs on the connection's thread, step by step."""

import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.model import State
from relay.outbox import Ended, order
from relay.outbox.statements import CODES, STATES

STEP = 500  # deliveries looked at in one step: a few milliseconds

Handle = tuple[int, int]  # event, endpoint

CANDIDATE = (
    "SELECT d.event, d.endpoint, d.state, e.type, e.accepted_at"
    " FROM deliveries d CROSS JOIN events e ON e.seq = d.event WHERE "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step found: the deliveries with their states, and where the next one starts."""

    found: list[tuple[Handle, State]]
    after: int | None
    held: list[Handle] = field(default_factory=list)  # pending ones that what was revived goes before


def find(db: sqlite3.Connection, ended: Ended, number: int | None, after: int) -> Step:
    """Find deliveries that are over: of one event, or of endpoint `number` past event `after`."""
    if ended.event_id is not None:
        rows, reached = _of_event(db, ended.event_id, number), None
    elif ended.state is State.DELIVERED:
        # No index says what was delivered, so this walks all events, a bounded number in a step.
        rows, reached = _delivered(db, number, after)
    else:
        # A literal, so that the state's partial index is seen to hold.
        where = f"d.endpoint = ? AND d.state = {CODES[ended.state or State.DEAD]} AND d.event > ?"
        rows = db.execute(CANDIDATE + where + " ORDER BY d.event LIMIT ?", (number, after, STEP)).fetchall()
        reached = rows[-1][0] if len(rows) == STEP else None
    found = [
        ((event, endpoint), STATES[state])
        for event, endpoint, state, type_, accepted_at in rows
        if _fits(ended, type_, accepted_at)
    ]
    return Step(found=found, after=reached)


def _of_event(db: sqlite3.Connection, event_id: str, number: int | None) -> list[Any]:
    row = db.execute("SELECT seq FROM events WHERE id = ?", (event_id,)).fetchone()
    if row is None:
        return []
    rows = db.execute(CANDIDATE + "d.event = ? AND d.state > 0", row).fetchall()
    return [each for each in rows if number in {None, each[1]}]


def _delivered(db: sqlite3.Connection, number: int | None, after: int) -> tuple[list[Any], int | None]:
    top = db.execute("SELECT max(seq) FROM events").fetchone()[0] or 0
    where = "d.event > ? AND d.event <= ? AND d.endpoint = ? AND d.state = 1"
    rows = db.execute(CANDIDATE + where, (after, after + STEP, number)).fetchall()
    return rows, after + STEP if after + STEP < top else None


def _fits(ended: Ended, type_: str, accepted_at: int) -> bool:
    return (
        ended.type in {None, type_}
        and (ended.since_ms is None or accepted_at >= ended.since_ms)
        and (ended.until_ms is None or accepted_at < ended.until_ms)
    )


def revive(
    db: sqlite3.Connection,
    handles: Sequence[Handle],
    due: Sequence[int],
    *,
    now_ms: int,
    in_flight: Collection[Handle] = (),
) -> list[Handle]:
    """Put these deliveries back to pending; what they were delivered with joins their other attempts.

    One that has a key goes before newer ones of its key, but not before one that is in flight. Returns the
    pending deliveries that have to wait for them.
    """
    heads = _heads(db, handles)
    db.executemany(
        "INSERT INTO attempts (event, endpoint, number, at, milliseconds, status, answer)"
        " SELECT event, endpoint, attempts, at, milliseconds, status, answer FROM deliveries"
        " WHERE event = ? AND endpoint = ? AND at IS NOT NULL",
        handles,
    )
    db.executemany(
        "UPDATE deliveries SET state = 0, due = ?, steps = 0, at = NULL, milliseconds = NULL, status = NULL,"
        " answer = NULL, since = ?, expired = NULL, held = key IS NOT NULL WHERE event = ? AND endpoint = ?",
        [(due_ms, now_ms, *handle) for handle, due_ms in zip(handles, due, strict=True)],
    )
    waiting: list[Handle] = []
    for (number, key), head in heads.items():
        if head is not None and (head, number) in in_flight:
            continue  # it passes on to what is older when its attempt is over
        order.go_before(db, head, number, key, now_ms)
        if head is not None:
            waiting.append((head, number))
    return waiting


def _heads(db: sqlite3.Connection, handles: Sequence[Handle]) -> dict[tuple[int, str], int | None]:
    """Return the oldest that is pending of each key at each endpoint."""
    heads: dict[tuple[int, str], int | None] = {}
    for event, number in handles:
        (key,) = db.execute(
            "SELECT key FROM deliveries WHERE event = ? AND endpoint = ?", (event, number)
        ).fetchone()
        if key is not None and (number, key) not in heads:
            heads[number, key] = order.oldest(db, number, key)
    return heads


def spaced(first_ms: int, spacing_ms: float, before: int, index: int) -> int:
    """Return when the next of so many is due, one `spacing_ms` after the other."""
    return first_ms + round((before + index) * spacing_ms)
