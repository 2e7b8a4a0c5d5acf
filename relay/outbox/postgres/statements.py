"""The SQL of the hot path. Every statement takes arrays, so its cost in round trips is that of one row.

Under READ COMMITTED a statement sees what was committed before it began, but a row that it locks as it is
now. So whatever must be looked at behind a lock is in a later statement than the lock, or in the locked row
itself.
"""

from collections.abc import Sequence
from typing import Any

from relay.model import Delivery, Event

# What a batch will touch, locked in one order by everybody: our own row, turns, deliveries. Numbers for
# events are drawn behind the turns. No row: we are taken for dead, and what we held is no longer ours.
LOCK = """
    WITH me AS MATERIALIZED (
        SELECT revision FROM relay.relays WHERE id = $1 FOR NO KEY UPDATE
    ), turns AS MATERIALIZED (
        SELECT number FROM relay.turns
        WHERE number = ANY ($2::int[]) AND (SELECT count(*) FROM me) = 1 ORDER BY number FOR UPDATE
    ), touched AS MATERIALIZED (
        SELECT d.event FROM unnest($3::bigint[], $4::int[]) AS t (event, endpoint)
        JOIN relay.deliveries d ON d.event = t.event AND d.endpoint = t.endpoint
        WHERE (SELECT count(*) FROM turns) >= 0
        ORDER BY d.event, d.endpoint FOR UPDATE OF d
    )
    SELECT revision, (
        SELECT array_agg(nextval('relay.event_numbers')) FROM generate_series(1, $5::int)
        WHERE (SELECT count(*) FROM touched) >= 0
    ) AS numbers FROM me"""

REVISION = "SELECT revision FROM relay.relays WHERE id = $1"

LIVE = "SELECT id, number FROM relay.endpoints WHERE live"

KNOWN = """
    SELECT e.idempotency_key, e.fingerprint, e.id, e.type, e.timestamp, (
        SELECT coalesce(array_agg(p.id ORDER BY p.id), '{}') FROM relay.deliveries d
        JOIN relay.endpoints p ON p.number = d.endpoint WHERE d.event = e.seq
    ) FROM relay.events e WHERE e.idempotency_key = ANY ($1::text[])"""

KNOWN_IDS = KNOWN.replace("e.idempotency_key = ANY", "e.id = ANY")

PENDING_KEYS = """
    SELECT t.endpoint, t.key FROM unnest($1::int[], $2::text[]) AS t (endpoint, key)
    WHERE EXISTS (
        SELECT 1 FROM relay.deliveries d WHERE d.endpoint = t.endpoint AND d.key = t.key AND d.state = 0
    )"""

ACCEPT = """
    WITH kept AS (
        INSERT INTO relay.events (seq, id, type, timestamp, data, digest, accepted_at, key, traceparent,
            tracestate, idempotency_key, fingerprint)
        SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::bytea[],
            $7::bigint[], $8::text[], $9::text[], $10::text[], $11::text[], $12::bytea[])
        ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING seq
    ), owed AS (
        INSERT INTO relay.deliveries (event, endpoint, due, format, key, held)
        SELECT * FROM unnest($13::bigint[], $14::int[], $15::bigint[], $16::text[], $17::text[], $18::bool[])
    )
    SELECT count(*) FROM kept"""

# An outcome counts if nobody else holds the delivery and no attempt was made since ours began. So it does
# when our claim was lost but nobody has claimed since: the attempt was made, whatever became of the claim.
RECORD = """
    WITH done AS MATERIALIZED (
        SELECT * FROM unnest($2::bigint[], $3::int[], $4::bigint[], $5::smallint[], $6::bigint[], $7::int[],
            $8::int[], $9::bigint[], $10::bigint[], $11::int[], $12::text[])
        AS t (event, endpoint, epoch, state, due, attempts, steps, at, milliseconds, status, answer)
    ), gone AS (
        DELETE FROM relay.claims c USING done
        WHERE c.event = done.event AND c.endpoint = done.endpoint AND c.relay = $1 AND c.epoch = done.epoch
    )
    UPDATE relay.deliveries d SET state = done.state, due = done.due, attempts = done.attempts,
        steps = done.steps, at = done.at, milliseconds = done.milliseconds, status = done.status,
        answer = done.answer
    FROM done
    WHERE d.event = done.event AND d.endpoint = done.endpoint AND d.state = 0
        AND d.attempts = done.attempts - 1
        AND NOT EXISTS (
            SELECT 1 FROM relay.claims c WHERE c.event = done.event AND c.endpoint = done.endpoint
            AND (c.relay <> $1 OR c.epoch <> done.epoch)
        )
    RETURNING d.event, d.endpoint"""

# A record that is tried again after its commit was cut off may find its attempt there.
ATTEMPTS = """
    INSERT INTO relay.attempts (event, endpoint, number, at, milliseconds, status, reason, answer)
    SELECT * FROM unnest($1::bigint[], $2::int[], $3::int[], $4::bigint[], $5::bigint[], $6::int[],
        $7::text[], $8::text[])
    ON CONFLICT DO NOTHING"""

# What another relay has found meanwhile stands: a conclusion counts only if it was drawn from what is there.
HEALTHS = """
    WITH told AS MATERIALIZED (
        SELECT e.number, e.health AS known, t.before, t.health
        FROM unnest($1::int[], $2::text[], $3::text[]) AS t (number, before, health)
        JOIN relay.endpoints e ON e.number = t.number ORDER BY e.number FOR UPDATE OF e
    ), changed AS (
        UPDATE relay.endpoints e SET health = told.health FROM told
        WHERE e.number = told.number AND told.known IS NOT DISTINCT FROM told.before
    )
    SELECT number, CASE WHEN known IS NOT DISTINCT FROM before THEN health ELSE known END FROM told"""

# Of a key that had an attempt or an end, the oldest goes: what only waited for its turn is due now, whatever
# the clock said when it was accepted.
NEXT_OF_KEY = """
    WITH over AS MATERIALIZED (
        SELECT t.*, (
            SELECT d.event FROM relay.deliveries d
            WHERE d.endpoint = t.endpoint AND d.key = t.key AND d.state = 0 ORDER BY d.event LIMIT 1
        ) AS first FROM unnest($1::bigint[], $2::int[], $3::text[], $4::bigint[])
        AS t (event, endpoint, key, at)
    )
    UPDATE relay.deliveries d SET held = d.event <> over.first,
        due = CASE WHEN d.event = over.first AND d.attempts = 0 AND d.since IS NULL
            THEN least(d.due, over.at) ELSE d.due END
    FROM over
    WHERE d.endpoint = over.endpoint AND d.state = 0 AND over.first <> over.event
        AND d.event IN (over.first, over.event)
    RETURNING d.endpoint, d.due, d.held"""

TALLY = """
    INSERT INTO relay.tallies AS t (relay, endpoint, pending, dead, last_success_at, last_failure_at,
        last_error)
    SELECT $1, * FROM unnest($2::int[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[])
    ON CONFLICT (endpoint, relay) DO UPDATE SET
        pending = t.pending + excluded.pending,
        dead = t.dead + excluded.dead,
        last_success_at = coalesce(excluded.last_success_at, t.last_success_at),
        last_failure_at = coalesce(excluded.last_failure_at, t.last_failure_at),
        last_error = coalesce(excluded.last_error, t.last_error)"""

# A claim is lost with a server that crashes before it is on disk; then it is simply nobody's, so its commit
# need not wait for the disk. Two that pick the same are told apart by the claim's key. Nobody is buried while
# he claims: a key share waits for a deletion and holds one up, but nothing else that is done to the row.
CLAIM = """
    WITH soon AS MATERIALIZED (
        SELECT set_config('synchronous_commit', 'off', true)
    ), me AS MATERIALIZED (
        SELECT id FROM relay.relays WHERE id = $6 FOR KEY SHARE
    ), picked AS MATERIALIZED (
        SELECT d.due, d.event, d.format, d.attempts, d.steps, d.key, d.since FROM relay.deliveries d
        WHERE d.endpoint = $1 AND d.state = 0 AND NOT d.held AND d.due <= $2 AND (d.due, d.event) > ($3, $4)
            AND (SELECT count(*) FROM soon) = 1 AND (SELECT count(*) FROM me) = 1
            AND NOT EXISTS (
                SELECT 1 FROM relay.claims c WHERE c.event = d.event AND c.endpoint = d.endpoint
            )
        ORDER BY d.due, d.event LIMIT $5 FOR UPDATE OF d SKIP LOCKED
    ), claimed AS (
        INSERT INTO relay.claims (event, endpoint, relay, epoch, call, until)
        SELECT event, $1, $6, nextval('relay.epochs'), $8, clock_timestamp() + $7::interval FROM picked
        WHERE EXISTS (SELECT 1 FROM relay.endpoints WHERE number = $1 AND live)
        ON CONFLICT DO NOTHING
        RETURNING event, epoch
    )
    SELECT p.due, p.event, p.format, p.attempts, p.steps, p.key, p.since, e.id, e.type, e.timestamp, e.data,
        e.accepted_at, e.key AS event_key, e.traceparent, e.tracestate, e.digest, c.epoch
    FROM claimed c JOIN picked p ON p.event = c.event JOIN relay.events e ON e.seq = c.event"""

NEXT_DUE = """
    SELECT t.endpoint, (
        SELECT d.due FROM relay.deliveries d
        WHERE d.endpoint = t.endpoint AND d.state = 0 AND NOT d.held
            AND NOT EXISTS (
                SELECT 1 FROM relay.claims c WHERE c.event = d.event AND c.endpoint = d.endpoint
            )
        ORDER BY d.due, d.event LIMIT 1
    ) AS due FROM unnest($1::int[]) AS t (endpoint)"""

LOST = "DELETE FROM relay.claims WHERE relay = $1 AND call = ANY ($2::bigint[]) RETURNING event"

RELEASE = """
    DELETE FROM relay.claims c
    USING unnest($2::bigint[], $3::int[], $4::bigint[]) AS t (event, endpoint, epoch)
    WHERE c.event = t.event AND c.endpoint = t.endpoint AND c.relay = $1 AND c.epoch = t.epoch"""


# All that one look at the neighbours wants to know: a few seeks for each endpoint.
LOOK = """
    SELECT t.endpoint, p.health, (
        SELECT d.due FROM relay.deliveries d
        WHERE d.endpoint = t.endpoint AND d.state = 0 AND NOT d.held
            AND NOT EXISTS (
                SELECT 1 FROM relay.claims c WHERE c.event = d.event AND c.endpoint = d.endpoint
            )
        ORDER BY d.due, d.event LIMIT 1
    ) AS due, (
        SELECT count(*) FROM relay.holders h JOIN relay.relays r ON r.id = h.relay
        WHERE h.endpoint = t.endpoint
    ) AS relays, (
        SELECT count(*) FROM relay.holders h JOIN relay.relays r ON r.id = h.relay
        WHERE h.endpoint = t.endpoint AND h.relay < $2
    ) AS place, EXISTS (
        SELECT 1 FROM relay.holders h WHERE h.endpoint = t.endpoint AND h.relay = $2
    ) AS ours
    FROM unnest($1::int[]) AS t (endpoint) JOIN relay.endpoints p ON p.number = t.endpoint"""


def columns(rows: Sequence[Sequence[Any]], count: int) -> list[list[Any]]:
    """Turn rows into the arrays of their columns."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]


def delivery(row: Any, number: int, endpoint: str) -> Delivery:
    """Make a delivery of a row of `CLAIM`."""
    return Delivery(
        handle=(row["event"], number), event=event(row), endpoint=endpoint, format=row["format"],
        attempts=row["attempts"], steps=row["steps"], due_ms=row["due"], digest=row["digest"],
        ordered=row["key"] is not None, replayed=row["since"] is not None, epoch=row["epoch"],
    )  # fmt: skip


def event(row: Any) -> Event:
    """Make an event of a row that has its columns; its key's is `event_key`."""
    return Event(
        id=row["id"], type=row["type"], timestamp=row["timestamp"], data=row["data"],
        accepted_at_ms=row["accepted_at"], key=row["event_key"], traceparent=row["traceparent"],
        tracestate=row["tracestate"],
    )  # fmt: skip


def plain(text: str | None) -> str | None:
    """Write a text so that it can be kept: PostgreSQL has no NUL in a text."""
    return text.replace("\x00", "\ufffd") if text is not None else None
