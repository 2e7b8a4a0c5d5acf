"""What a move brings: the rows of an SQLite outbox in, a database that relays may work on out.

The row of `relay.moves` says how far it has come, and is committed with what it tells of: a move that was
killed goes on where the database stands. Until all is here no relay joins (`schema.refuse_part`).
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Any

from asyncpg import Connection

from relay.outbox import MovedError
from relay.outbox.postgres import schema
from relay.outbox.postgres.statements import columns, plain
from relay.outbox.statements import STATES, last_seq

BATCH_EVENTS = 1000
BATCH_BYTES = 8 << 20  # of data

# What both stores have, under the same names; how an endpoint fared is in `tallies` here.
COLUMNS = {
    "endpoints": ("number", "id", "settings", "paused", "health"),
    "events": (
        "seq", "id", "type", "timestamp", "data", "digest", "accepted_at", "key", "traceparent", "tracestate",
        "idempotency_key", "fingerprint",
    ),
    "deliveries": (
        "event", "endpoint", "state", "held", "due", "format", "key", "attempts", "steps", "at",
        "milliseconds", "status", "answer", "since", "expired",
    ),
    "attempts": ("event", "endpoint", "number", "at", "milliseconds", "status", "reason", "answer"),
}  # fmt: skip
FARED = ("number", "last_success_at", "last_failure_at", "last_error")
# What is written otherwise here.
OTHERWISE: Mapping[str, Callable[[Any], Any]] = {"paused": bool, "held": bool, "answer": plain}

TABLE = """CREATE TABLE IF NOT EXISTS relay.moves (
    token text PRIMARY KEY,
    source text NOT NULL,
    event bigint NOT NULL DEFAULT 0,
    done boolean NOT NULL DEFAULT false
)"""
USED = (
    "SELECT EXISTS (SELECT 1 FROM relay.relays) OR EXISTS (SELECT 1 FROM relay.endpoints)"
    " OR EXISTS (SELECT 1 FROM relay.events)"
)
TALLIES = """
    INSERT INTO relay.tallies (endpoint, relay, pending, dead, last_success_at, last_failure_at, last_error)
    SELECT t.number, 0, coalesce(c.pending, 0), coalesce(c.dead, 0), t.success, t.failure, t.error
    FROM unnest($1::int[], $2::bigint[], $3::bigint[], $4::text[]) AS t (number, success, failure, error)
    LEFT JOIN (
        SELECT endpoint, count(*) FILTER (WHERE state = 0) AS pending,
            count(*) FILTER (WHERE state = 2) AS dead
        FROM relay.deliveries WHERE state IN (0, 2) GROUP BY endpoint
    ) c ON c.endpoint = t.number"""
# The next number is drawn after the last one ever given, also where what had it is long gone.
NEXT_EVENT = "SELECT setval('relay.event_numbers', $1::bigint, false)"
NEXT_ENDPOINT = "SELECT setval(pg_get_serial_sequence('relay.endpoints', 'number'), $1::bigint, false)"

COUNTED = ("endpoints", "events", "attempts")
ALL = "SELECT count(*) FROM {}"
BY_STATE = "SELECT state, count(*), count(at) FROM {}deliveries GROUP BY state"

Counts = dict[str, int]


class Stand(Enum):
    """What a database holds, in the eyes of one move."""

    NOTHING = auto()
    PART = auto()  # of what this move brings
    ALL = auto()  # of it
    OTHER_PART = auto()  # of another move
    OTHER = auto()  # an outbox


async def stand(link: Connection, token: str | None) -> Stand:
    """Look what is here, for the move with this token."""
    if not await schema.has(link, "version"):
        return Stand.NOTHING
    row = None
    if await schema.has(link, "moves"):
        row = await link.fetchrow("SELECT token, done FROM relay.moves")
    if row is None:
        return Stand.OTHER if await link.fetchval(USED) else Stand.NOTHING
    if row["token"] == token:
        return Stand.ALL if row["done"] else Stand.PART
    return Stand.OTHER if row["done"] else Stand.OTHER_PART


async def lock(link: Connection) -> None:
    """Let no relay join until the transaction is over."""
    # PostgreSQL has this, some others that speak its protocol have not.
    await link.execute("LOCK TABLE relay.relays IN EXCLUSIVE MODE")


async def begin(link: Connection, token: str, source: str) -> None:
    """Keep relays out from now on; what an earlier try has brought is gone."""
    await link.execute(TABLE)
    await link.execute("TRUNCATE relay.moves, relay.tallies")
    for table in COLUMNS:
        await link.execute(f"TRUNCATE relay.{table}")
    await link.execute("INSERT INTO relay.moves (token, source) VALUES ($1, $2)", token, source)


async def reached(link: Connection, token: str, db: sqlite3.Connection) -> int:
    """Count the events that are here."""
    last = await link.fetchval("SELECT event FROM relay.moves WHERE token = $1", token)
    (count,) = db.execute("SELECT count(*) FROM events WHERE seq <= ?", (last,)).fetchone()
    return int(count)


async def bring(link: Connection, token: str, db: sqlite3.Connection) -> int:
    """Bring the next events with all that belongs to them; return how many, 0 when all are here.

    What is sent is read as it goes, so that the largest batch takes no more memory than the smallest.
    """
    async with link.transaction():
        # Locked: the last commit of a move that was killed may still be under way.
        after = await link.fetchval("SELECT event FROM relay.moves WHERE token = $1 FOR UPDATE", token)
        if after is None:
            raise MovedError("what was moved so far is gone from the database: start the move again")
        last, count = _end_of_batch(db, after)
        if count:
            await _copy(link, db, "events", "seq > ? AND seq <= ?", after, last)
            await _copy(link, db, "deliveries", "event > ? AND event <= ?", after, last)
            await _copy(link, db, "attempts", "event > ? AND event <= ?", after, last)
            await link.execute("UPDATE relay.moves SET event = $2 WHERE token = $1", token, last)
    return count


async def settle(link: Connection, db: sqlite3.Connection) -> None:
    """Bring what is not of single events: endpoints, counts, which numbers come next."""
    async with link.transaction():
        await link.execute("TRUNCATE relay.endpoints, relay.tallies")
        await _copy(link, db, "endpoints", "true")
        fared = db.execute(f"SELECT {', '.join(FARED)} FROM endpoints").fetchall()  # noqa: S608 - our own words
        await link.execute(TALLIES, *columns(fared, len(FARED)))
        await link.execute(NEXT_EVENT, last_seq(db) + 1)
        await link.execute(NEXT_ENDPOINT, max((number for number, *_ in fared), default=0) + 1)
    # Until it is told, PostgreSQL takes new tables for small ones, and reads them from end to end.
    await link.execute("ANALYZE " + ", ".join(f"relay.{table}" for table in COLUMNS))


async def finish(link: Connection, token: str) -> None:
    """Let relays in."""
    await link.execute("UPDATE relay.moves SET done = true WHERE token = $1", token)


async def counts(link: Connection) -> Counts:
    """Count what is here; as `counts_of`."""
    rows = {table: await link.fetchval(ALL.format(f"relay.{table}")) for table in COUNTED}
    return _counts(rows, await link.fetch(BY_STATE.format("relay.")))


def counts_of(db: sqlite3.Connection) -> Counts:
    """Count endpoints, events, attempts, and deliveries by state."""
    rows = {table: db.execute(ALL.format(table)).fetchone()[0] for table in COUNTED}
    return _counts(rows, db.execute(BY_STATE.format("")))


def _counts(rows: Counts, by_state: Any) -> Counts:
    found = {STATES[state]: (count, attempts) for state, count, attempts in by_state}
    # The attempt that ended a delivery well is kept in its row.
    rows = rows | {"attempts": rows["attempts"] + sum(attempts for _, attempts in found.values())}
    return rows | {f"{state} deliveries": found.get(state, (0, 0))[0] for state in STATES}


def _end_of_batch(db: sqlite3.Connection, after: int) -> tuple[int, int]:
    """Return the number of the last event that goes with the next batch, and how many go."""
    last, count, size = after, 0, 0
    for last, length in db.execute(  # noqa: B007 - where it ends is the result
        "SELECT seq, length(data) FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, BATCH_EVENTS)
    ):
        count, size = count + 1, size + length
        if size >= BATCH_BYTES:
            break
    return last, count


async def _copy(link: Connection, db: sqlite3.Connection, table: str, which: str, *values: int) -> None:
    await link.copy_records_to_table(
        table, schema_name="relay", columns=COLUMNS[table], records=_rows(db, table, which, values)
    )


def _rows(db: sqlite3.Connection, table: str, which: str, values: Sequence[int]) -> Iterator[Sequence[Any]]:
    names = COLUMNS[table]
    otherwise = [(place, OTHERWISE[name]) for place, name in enumerate(names) if name in OTHERWISE]
    which = f"SELECT {', '.join(names)} FROM {table} WHERE {which}"  # noqa: S608 - our own words
    for row in db.execute(which, values):
        written = list(row)
        for place, write in otherwise:
            written[place] = write(written[place])
        yield written
