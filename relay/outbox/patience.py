"""What waits too long, and what waits for a time that is not to be trusted; runs on the connection's thread.

A delivery's age counts from acceptance, from its latest replay, or from when its endpoint was last let go,
whichever is latest. Both walk step by step, so that accepts wait for milliseconds only.
"""

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from relay.outbox import Expired, order

STEP = 500  # deliveries looked at in one transaction
TOLERATED_MS = 60_000  # a clock that is this much behind what it said before was set


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step ended, when the next may have waited too long, and where to go on."""

    expired: list[Expired]
    ended: list[order.Handle]  # the same, by the store's own names
    oldest_ms: int | None  # the earliest time that an age counts from, of those left
    after: int | None  # None: all were looked at


WAITING = (
    "SELECT d.event, d.since, d.key, d.attempts, e.accepted_at, e.id, e.type"
    " FROM deliveries d CROSS JOIN events e ON e.seq = d.event"
    " WHERE d.endpoint = ? AND d.state = 0 AND d.event > ? ORDER BY d.event LIMIT ?"
)
END = (
    "UPDATE deliveries SET state = 2, due = NULL, held = 0, expired = ?"
    " WHERE event = ? AND endpoint = ? AND state = 0"
)


def expire(
    db: sqlite3.Connection,
    number: int,
    after: int,
    *,
    before_ms: int,
    age_from_ms: int,
    now_ms: int,
    in_flight: Callable[[tuple[int, int]], bool],
) -> Step:
    """End pending deliveries past event `after` whose age counts from a time or earlier, the oldest first."""
    rows = db.execute(WAITING, (number, after, STEP)).fetchall()
    old, oldest_ms, enough = too_old(
        rows,
        before_ms=before_ms,
        age_from_ms=age_from_ms,
        now_ms=now_ms,
        in_flight=lambda event: in_flight((event, number)),
    )
    for event, _, key, *_ in old:
        db.execute(END, (now_ms, event, number))
        if key is not None:
            order.pass_on(db, (event, number), key, now_ms)
    reached = rows[-1][0] if len(rows) == STEP and not enough else None
    return Step(
        expired=[Expired(event_id=id_, type=type_, attempts=attempts) for *_, attempts, _, id_, type_ in old],
        ended=[(row[0], number) for row in old],
        oldest_ms=oldest_ms,
        after=reached,
    )


def too_old(
    rows: Iterable[Any],
    *,
    before_ms: int,
    age_from_ms: int,
    now_ms: int,
    in_flight: Callable[[int], bool],
) -> tuple[list[Any], int | None, bool]:
    """Find among rows of `WAITING` those whose age counts from a time or earlier.

    Returns them, the earliest time that an age counts from, of those left, and whether all that come after
    them are younger.
    """
    old: list[Any] = []
    oldest_ms: int | None = None
    # What was accepted while this waited for its commit is of after `now_ms`, and as young as can be.
    latest_ms = now_ms + TOLERATED_MS
    for row in rows:
        event, since, _, _, accepted_at, *_ = row
        starts = [
            min(each, now_ms) for each in (accepted_at, since) if each is not None and each <= latest_ms
        ]
        start_ms = max(age_from_ms, *starts) if starts else age_from_ms or now_ms
        if start_ms <= before_ms and not in_flight(event):
            old.append(row)
            continue
        oldest_ms = start_ms if oldest_ms is None else min(oldest_ms, start_ms)
        if since is None and accepted_at <= now_ms and start_ms > before_ms:
            return old, oldest_ms, True
    return old, oldest_ms, False


TOO_LATE = (
    "UPDATE deliveries SET due = ?, since = min(since, ?) WHERE endpoint = ? AND state = 0 AND event IN"
    " (SELECT event FROM deliveries AS d"
    " WHERE endpoint = ? AND state = 0 AND held = 0 AND due > ? AND (since IS NULL OR EXISTS"
    " (SELECT 1 FROM attempts AS a WHERE a.event = d.event AND a.endpoint = d.endpoint"
    " AND a.number = d.attempts AND a.at > d.since)) LIMIT ?)"
)
# Those of a replay are spaced out on purpose until attempted: they keep their distances and begin now.
REPLAYED = (
    "UPDATE deliveries SET due = due - (since - ?), since = ? WHERE endpoint = ? AND state = 0 AND event IN"
    " (SELECT event FROM deliveries WHERE endpoint = ? AND state = 0 AND held = 0 AND due > ? AND since > ?"
    " LIMIT ?)"
)


def advance(db: sqlite3.Connection, number: int, now_ms: int, latest_ms: int) -> bool:
    """Bring forward what is due later than can be by rights; True if more may be left."""
    late = db.execute(TOO_LATE, (latest_ms, now_ms, number, number, latest_ms, STEP)).rowcount
    behind = (now_ms, now_ms, number, number, now_ms, now_ms + TOLERATED_MS, STEP)
    return max(late, db.execute(REPLAYED, behind).rowcount) == STEP


OVERTAKEN = (
    "UPDATE deliveries SET due = due + ? WHERE endpoint = ? AND state = 0 AND event IN"
    " (SELECT event FROM deliveries"
    " WHERE endpoint = ? AND state = 0 AND held = 0 AND due > ? AND due <= ? LIMIT ?)"
)


def postpone(db: sqlite3.Connection, number: int, before_ms: int, now_ms: int) -> bool:
    """Put off what was not due at `before_ms` and is now, by as much; True if more may be left."""
    values = (now_ms - before_ms, number, number, before_ms, now_ms, STEP)
    return db.execute(OVERTAKEN, values).rowcount == STEP
