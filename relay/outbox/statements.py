"""The SQL of the outbox: rows in, rows out; every function runs on the connection's own thread.

None of these opens a transaction: `sqlite.py` does, around whole batches. sqlite3 lets go of the GIL for
every step of a statement and has to win it back from a busy event loop, so cost goes by steps rather
than by rows: what is written is written in wide statements, many rows to a step.
"""

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import orjson

from relay.model import Delivery, Event, Health, Standing, State
from relay.outbox import KeptEndpoint, Past

STATES = (State.PENDING, State.DELIVERED, State.DEAD, State.CANCELLED)
CODES = {state: code for code, state in enumerate(STATES)}

Row = Sequence[object]

WIDEST = 32  # rows to a statement; each width is a statement of its own in the connection's cache


@cache
def _sql(before: str, columns: int, rows: int, after: str) -> str:
    row = f"({','.join('?' * columns)})"
    return f"{before} {','.join([row] * rows)} {after}"


def _wide(db: sqlite3.Connection, before: str, rows: Sequence[Row], after: str = "") -> None:
    """Run `before (row), (row), … after` over all rows."""
    for start in range(0, len(rows), WIDEST):
        chunk = rows[start : start + WIDEST]
        db.execute(_sql(before, len(chunk[0]), len(chunk), after), list(chain.from_iterable(chunk)))


def insert_events(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    _wide(
        db,
        "INSERT INTO events (seq, id, type, timestamp, data, digest, accepted_at, key, traceparent,"
        " tracestate, idempotency_key, fingerprint) VALUES",
        rows,
    )


def insert_deliveries(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    _wide(db, "INSERT INTO deliveries (event, endpoint, due, format, key, held) VALUES", rows)


def update_deliveries(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Write what follows from attempts; only on what is pending, so nothing ended is undone."""
    _wide(
        db,
        "WITH done (event, endpoint, state, due, attempts, steps, at, milliseconds, status, answer)"
        " AS (VALUES",
        rows,
        ") UPDATE deliveries SET state = done.state, due = done.due, attempts = done.attempts,"
        " steps = done.steps, at = done.at, milliseconds = done.milliseconds, status = done.status,"
        " answer = done.answer FROM done WHERE deliveries.event = done.event"
        " AND deliveries.endpoint = done.endpoint AND deliveries.state = 0",
    )


def insert_attempts(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    # A record that is tried again after a full disk may find its attempt there.
    _wide(
        db,
        "INSERT OR IGNORE INTO attempts (event, endpoint, number, at, milliseconds, status, reason, answer)"
        " VALUES",
        rows,
    )


KnownRow = tuple[int, str, str, str, bytes | None]  # seq, id, type, timestamp and fingerprint


def known_key(db: sqlite3.Connection, key: str) -> KnownRow | None:
    """Return what is to be known of the event submitted under this key."""
    row: KnownRow | None = db.execute(
        "SELECT seq, id, type, timestamp, fingerprint FROM events WHERE idempotency_key = ?", (key,)
    ).fetchone()
    return row


def known_id(db: sqlite3.Connection, id_: str) -> KnownRow | None:
    """Return the same of the event of this id."""
    row: KnownRow | None = db.execute(
        "SELECT seq, id, type, timestamp, fingerprint FROM events WHERE id = ?", (id_,)
    ).fetchone()
    return row


def endpoints_of(db: sqlite3.Connection, seq: int) -> tuple[str, ...]:
    rows = db.execute(
        "SELECT p.id FROM deliveries d JOIN endpoints p ON p.number = d.endpoint WHERE d.event = ?", (seq,)
    )
    return tuple(sorted(row[0] for row in rows))


CLAIM = """
    SELECT d.due, d.event, d.format, d.attempts, d.steps, d.key, d.since,
           e.id, e.type, e.timestamp, e.data, e.accepted_at, e.key, e.traceparent, e.tracestate, e.digest
    FROM deliveries d CROSS JOIN events e ON e.seq = d.event
    WHERE d.endpoint = ? AND d.state = 0 AND d.held = 0 AND d.due <= ? AND (d.due, d.event) > (?, ?)
    ORDER BY d.due, d.event LIMIT ?"""

NEXT_DUE = """
    SELECT due FROM deliveries
    WHERE endpoint = ? AND state = 0 AND held = 0 AND due > ? ORDER BY due LIMIT 1"""

EVER_MS = 1 << 62


def look(
    db: sqlite3.Connection, number: int, now_ms: int, after: tuple[int, int], limit: int
) -> tuple[list[Any], int | None]:
    """Return rows that are due after a place, and when the next after them is due (now: look again)."""
    rows = db.execute(CLAIM, (number, now_ms, *after, limit)).fetchall()
    if len(rows) == limit:
        return rows, now_ms
    later = db.execute(NEXT_DUE, (number, now_ms)).fetchone()
    return rows, later[0] if later else None


def following(db: sqlite3.Connection, number: int, after: tuple[int, int], limit: int) -> list[Any]:
    """Return rows that come after a place, due or not."""
    return db.execute(CLAIM, (number, EVER_MS, *after, limit)).fetchall()


def delivery(row: Any, number: int, endpoint: str) -> Delivery:
    """Make a delivery of a row of `look`."""
    due, seq, format_, attempts, steps, ordering_key, since, *of_event = row
    id_, type_, timestamp, data, accepted_at, key, parent, state, digest = of_event
    event = Event(
        id=id_, type=type_, timestamp=timestamp, data=data,
        accepted_at_ms=accepted_at, key=key, traceparent=parent, tracestate=state,
    )  # fmt: skip
    return Delivery(
        handle=(seq, number), event=event, endpoint=endpoint, format=format_,
        attempts=attempts, steps=steps, due_ms=due, digest=digest,
        ordered=ordering_key is not None, replayed=since is not None,
    )  # fmt: skip


def register(db: sqlite3.Connection, ids: Sequence[str]) -> dict[str, int]:
    """Give every endpoint its number, once and for all; return them."""
    db.executemany("INSERT INTO endpoints (id) VALUES (?) ON CONFLICT DO NOTHING", [(id_,) for id_ in ids])
    return dict(db.execute("SELECT id, number FROM endpoints"))


def keep_endpoint(db: sqlite3.Connection, id_: str, settings: bytes | None, paused: bool) -> int:  # noqa: FBT001
    """Keep an endpoint's settings; return its number."""
    row = db.execute(
        "INSERT INTO endpoints (id, settings, paused) VALUES (?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET settings = excluded.settings, paused = excluded.paused"
        " RETURNING number",
        (id_, settings, paused),
    ).fetchone()
    return int(row[0])


def kept_endpoints(db: sqlite3.Connection) -> list[KeptEndpoint]:
    rows = db.execute("SELECT id, settings, paused, health FROM endpoints ORDER BY number")
    return [
        KeptEndpoint(id=id_, settings=settings, paused=bool(paused), health=read_health(health))
        for id_, settings, paused, health in rows
    ]


def update_healths(db: sqlite3.Connection, healths: Mapping[int, Health]) -> None:
    """Note how endpoints stand, by number."""
    db.executemany(
        "UPDATE endpoints SET health = ? WHERE number = ?",
        [(orjson.dumps(health).decode(), number) for number, health in healths.items()],
    )


def read_health(text: str | None) -> Health:
    """Read what `update_healths` wrote; an endpoint that nothing is known of is up."""
    if text is None:
        return Health()
    values = orjson.loads(text)
    return Health(**values | {"standing": Standing(values["standing"])})


def last_seen(db: sqlite3.Connection) -> int | None:
    """Return what the clock said when anything was last accepted or attempted."""
    row = db.execute("SELECT seen FROM clock").fetchone()
    return row[0] if row else None


def update_last_seen(db: sqlite3.Connection, at_ms: int) -> None:
    db.execute("UPDATE clock SET seen = ?", (at_ms,))


def update_endpoints(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Note the last success, the last failure and its reason, where there was one."""
    db.executemany(
        "UPDATE endpoints SET last_success_at = coalesce(?, last_success_at),"
        " last_failure_at = coalesce(?, last_failure_at), last_error = coalesce(?, last_error)"
        " WHERE number = ?",
        rows,
    )


def pasts(db: sqlite3.Connection) -> dict[str, Past]:
    """Tell of every endpoint since when something waits and how its last attempts went."""
    rows = db.execute(
        "SELECT id, last_success_at, last_failure_at, last_error, health,"
        " (SELECT accepted_at FROM events WHERE seq ="
        " (SELECT min(event) FROM deliveries WHERE endpoint = number AND state = 0)) FROM endpoints"
    )
    return {
        id_: Past(
            oldest_pending_ms=oldest,
            last_success_at_ms=success,
            last_failure_at_ms=failure,
            last_error=error,
            health=read_health(health),
        )
        for id_, success, failure, error, health, oldest in rows
    }


def cancel(db: sqlite3.Connection, number: int, limit: int) -> int:
    """Cancel up to `limit` of what is pending for an endpoint, and forget how it stood; return how many.

    The newest first, so that what is left after a break still has the oldest of each key, which is not held.
    """
    db.execute("UPDATE endpoints SET health = NULL WHERE number = ? AND health IS NOT NULL", (number,))
    return db.execute(
        "UPDATE deliveries SET state = 3, due = NULL, held = 0 WHERE endpoint = ? AND event IN"
        " (SELECT event FROM deliveries WHERE endpoint = ? AND state = 0 ORDER BY event DESC LIMIT ?)",
        (number, number, limit),
    ).rowcount


DEAD_AND_OVER = """
    SELECT endpoint FROM deliveries WHERE state = 2 AND event IN (
        SELECT seq FROM events WHERE seq BETWEEN ? AND ? AND accepted_at < ?
        AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event = seq AND state = 0))"""

FORGET = """
    DELETE FROM events WHERE seq BETWEEN ? AND ? AND accepted_at < ?
    AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event = seq AND state = 0)"""


def forget(db: sqlite3.Connection, before_ms: int, after: int, limit: int) -> tuple[int | None, Counter[int]]:
    """Look at up to `limit` events past number `after`, the oldest first, and delete those that are over.

    Returns the number reached, or None when no older event is left to look at, and the dead deliveries
    that went, by endpoint.
    """
    rows = db.execute(
        "SELECT seq, accepted_at FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
    ).fetchall()
    old = [seq for seq, accepted_at in rows if accepted_at < before_ms]
    if not old:
        return None, Counter()
    looked_at = (old[0], old[-1], before_ms)
    dead = Counter(endpoint for (endpoint,) in db.execute(DEAD_AND_OVER, looked_at))
    db.execute(FORGET, looked_at)
    return (old[-1] if len(old) == limit else None), dead


def counts(db: sqlite3.Connection) -> tuple[dict[int, int], dict[int, int]]:
    """Count what is pending and what is dead, by endpoint number; both from partial indexes."""
    pending = db.execute("SELECT endpoint, count(*) FROM deliveries WHERE state = 0 GROUP BY endpoint")
    dead = db.execute("SELECT endpoint, count(*) FROM deliveries WHERE state = 2 GROUP BY endpoint")
    return dict(pending), dict(dead)


def last_seq(db: sqlite3.Connection) -> int:
    """Return the highest event number ever given, deleted events included."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
    return row[0] if row else 0


def used_bytes(db: sqlite3.Connection) -> int:
    """Return the size of what is in use: the file with its log ahead, less what is free inside."""
    pages, free = _pages(db)
    (size,) = db.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)


def shrink(db: sqlite3.Connection, pages: int, share: float, at_least: int) -> bool:
    """Give up to `pages` free pages back; True while more than a share of the file, and so many, are free."""
    total, free = _pages(db)
    if free <= max(at_least, total * share):
        return False
    db.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
    return True


def _pages(db: sqlite3.Connection) -> tuple[int, int]:
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    return pages, free
