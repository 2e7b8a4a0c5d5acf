"""Order by key: of the deliveries of one key at one endpoint only the oldest that is pending is not held.

Runs on the connection's thread, inside its transaction. Every question is a seek: what is held is in no index
of what is due, and looking for something older than each candidate would walk over the whole backlog.
"""

import sqlite3

Handle = tuple[int, int]  # event, endpoint

OLDEST = (
    "SELECT event FROM deliveries WHERE endpoint = ? AND key = ? AND state = 0 AND key IS NOT NULL"
    " ORDER BY event LIMIT 1"
)
HOLD = "UPDATE deliveries SET held = 1 WHERE event = ? AND endpoint = ? AND state = 0"
# What only waited for its turn is due now, whatever the clock said when it was accepted.
LET_GO = (
    "UPDATE deliveries SET held = 0, due = iif(attempts = 0 AND since IS NULL, min(due, ?), due)"
    " WHERE event = ? AND endpoint = ? AND state = 0 RETURNING due"
)


class Heads:
    """Which keys have something pending, asked once a transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._pending: set[tuple[int, str]] = set()

    def holds_back(self, number: int, key: str) -> bool:
        """Tell whether something older of this key is pending; from now on something is."""
        if (number, key) in self._pending:
            return True
        self._pending.add((number, key))
        return oldest(self._db, number, key) is not None


def oldest(db: sqlite3.Connection, number: int, key: str) -> int | None:
    """Return the event of the oldest pending delivery of a key."""
    row = db.execute(OLDEST, (number, key)).fetchone()
    return row[0] if row else None


def pass_on(db: sqlite3.Connection, handle: Handle, key: str, now_ms: int) -> int | None:
    """Let the oldest of a key go, now that `handle` was attempted or is over.

    Returns when the one that may go now is due; None if that is `handle` itself or nothing is left.
    """
    event, number = handle
    first = oldest(db, number, key)
    if first is None or first == event:
        return None
    db.execute(HOLD, (event, number))  # still pending, but an older one was replayed meanwhile
    return _let_go(db, first, number, now_ms)


def go_before(db: sqlite3.Connection, before: int | None, number: int, key: str, now_ms: int) -> None:
    """Let the oldest of a key go instead of `before`, which was the oldest until something was replayed."""
    first = oldest(db, number, key)
    if first is not None and first != before:
        if before is not None:
            db.execute(HOLD, (before, number))
        _let_go(db, first, number, now_ms)


def _let_go(db: sqlite3.Connection, event: int, number: int, now_ms: int) -> int:
    (row,) = db.execute(LET_GO, (now_ms, event, number)).fetchall()
    return int(row[0])
