"""What moves many deliveries, step by step: each step a transaction of its own, with bounded work.

Whoever moves a delivery locks it first and looks then whether it is claimed: claims are made behind the same
lock.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from asyncpg import Connection

from relay.model import State
from relay.outbox import Ended, Expired
from relay.outbox.patience import STEP, TOLERATED_MS, Step, too_old
from relay.outbox.postgres import statements
from relay.outbox.postgres.links import transaction
from relay.outbox.postgres.statements import columns
from relay.outbox.postgres.writing import Tallies, turn
from relay.outbox.statements import CODES

Handle = tuple[int, int]  # event, endpoint

CANCEL_STEP = 1000
PENDING, DEAD = CODES[State.PENDING], CODES[State.DEAD]

LOCK_TURNS = "SELECT number FROM relay.turns WHERE number = ANY ($1::int[]) ORDER BY number FOR UPDATE"
LOCK_DELIVERIES = """
    SELECT d.event, d.endpoint, d.state, d.key FROM unnest($1::bigint[], $2::int[]) AS t (event, endpoint)
    JOIN relay.deliveries d ON d.event = t.event AND d.endpoint = t.endpoint
    ORDER BY d.event, d.endpoint FOR UPDATE OF d"""
CLAIMED = """
    SELECT c.event, c.endpoint FROM unnest($1::bigint[], $2::int[]) AS t (event, endpoint)
    JOIN relay.claims c ON c.event = t.event AND c.endpoint = t.endpoint"""


async def cancel(link: Connection, *, relay: int, number: int) -> int:
    """Cancel some of what is pending for an endpoint, the newest first, and forget how it stood."""
    async with transaction(link):
        events = [
            row[0]
            for row in await link.fetch(
                "UPDATE relay.deliveries SET state = 3, due = NULL, held = false"
                " WHERE endpoint = $1 AND state = 0 AND event IN (SELECT event FROM relay.deliveries"
                " WHERE endpoint = $1 AND state = 0 ORDER BY event DESC LIMIT $2) RETURNING event",
                number,
                CANCEL_STEP,
            )
        ]
        await link.execute(
            "DELETE FROM relay.claims WHERE endpoint = $1 AND event = ANY ($2::bigint[])", number, events
        )
        await link.execute("UPDATE relay.endpoints SET health = NULL WHERE number = $1", number)
        tallies = Tallies()
        if events:
            tallies[number].pending -= len(events)
        await tallies.write(link, relay)
    return len(events)


WAITING = """
    SELECT d.event, d.since, d.key, d.attempts, e.accepted_at, e.id, e.type
    FROM relay.deliveries d JOIN relay.events e ON e.seq = d.event
    WHERE d.endpoint = $1 AND d.state = 0 AND d.event > $2 ORDER BY d.event LIMIT $3"""
END = """
    UPDATE relay.deliveries SET state = 2, due = NULL, held = false, expired = $3
    WHERE endpoint = $1 AND event = ANY ($2::bigint[]) AND state = 0"""


async def expire(
    link: Connection,
    *,
    relay: int,
    number: int,
    after: int,
    before_ms: int,
    age_from_ms: int,
    now_ms: int,
) -> Step:
    """End pending deliveries past event `after` whose age counts from a time or earlier, the oldest first."""
    async with transaction(link):
        rows = await link.fetch(WAITING, number, after, STEP)
        claimed = await _claimed(link, [(row[0], number) for row in rows])
        old, oldest_ms, enough = too_old(
            rows,
            before_ms=before_ms,
            age_from_ms=age_from_ms,
            now_ms=now_ms,
            in_flight=lambda event: (event, number) in claimed,
        )
        ended: set[int] = set()
        if old:
            await _lock_turns(link, ((number, row[2]) for row in old))
            free = await _unclaimed(link, [(row[0], number) for row in old])
            ended = {event for event, _ in free}
            await link.execute(END, number, list(ended), now_ms)
            await _pass_on(link, ((number, row[2], row[0]) for row in old if row[0] in ended), now_ms)
            tallies = Tallies()
            tallies[number].pending -= len(ended)
            tallies[number].dead += len(ended)
            await tallies.write(link, relay)
    return Step(
        expired=[Expired(event_id=row[5], type=row[6], attempts=row[3]) for row in old if row[0] in ended],
        ended=[(event, number) for event in ended],
        oldest_ms=oldest_ms,
        after=rows[-1][0] if len(rows) == STEP and not enough else None,
    )


async def _claimed(link: Connection, handles: Sequence[Handle]) -> set[Handle]:
    return {(event, endpoint) for event, endpoint in await link.fetch(CLAIMED, *columns(handles, 2))}


async def _unclaimed(link: Connection, handles: Sequence[Handle]) -> list[Handle]:
    """Lock those of these that are pending and nobody's; nobody can claim them then."""
    rows = await link.fetch(LOCK_DELIVERIES, *columns(handles, 2))
    pending = [(event, endpoint) for event, endpoint, state, _ in rows if state == PENDING]
    claimed = await _claimed(link, pending)
    return [each for each in pending if each not in claimed]


async def _lock_turns(link: Connection, keys: Iterable[tuple[int, str | None]]) -> None:
    turns = sorted({turn(number, key) for number, key in keys if key is not None})
    if turns:
        await link.execute(LOCK_TURNS, turns)


async def _pass_on(link: Connection, over: Iterable[tuple[int, str | None, int]], now_ms: int) -> None:
    """Let the oldest of each key go, given endpoint, key and who went before; the turns are ours."""
    rows = {(number, key): event for number, key, event in over if key is not None}
    if rows:
        arrays = columns([(event, number, key, now_ms) for (number, key), event in rows.items()], 4)
        await link.execute(statements.NEXT_OF_KEY, *arrays)


TOO_LATE = """
    UPDATE relay.deliveries SET due = $3, since = least(since, $2)
    WHERE endpoint = $1 AND state = 0 AND event IN (
        SELECT event FROM relay.deliveries AS d
        WHERE endpoint = $1 AND state = 0 AND NOT held AND due > $3 AND (since IS NULL OR EXISTS (
            SELECT 1 FROM relay.attempts AS a WHERE a.event = d.event AND a.endpoint = d.endpoint
            AND a.number = d.attempts AND a.at > d.since)) LIMIT $4)"""
# Those of a replay are spaced out on purpose until attempted: they keep their distances and begin now.
REPLAYED = """
    UPDATE relay.deliveries SET due = due - (since - $2), since = $2
    WHERE endpoint = $1 AND state = 0 AND event IN (
        SELECT event FROM relay.deliveries
        WHERE endpoint = $1 AND state = 0 AND NOT held AND due > $2 AND since > $3 LIMIT $4)"""
OVERTAKEN = """
    UPDATE relay.deliveries SET due = due + $3 - $2 WHERE endpoint = $1 AND state = 0 AND event IN (
        SELECT event FROM relay.deliveries
        WHERE endpoint = $1 AND state = 0 AND NOT held AND due > $2 AND due <= $3 LIMIT $4)"""


async def advance(link: Connection, *, number: int, now_ms: int, latest_ms: int) -> bool:
    """Bring forward what is due later than can be by rights; True if more may be left."""
    late = _count(await link.execute(TOO_LATE, number, now_ms, latest_ms, STEP))
    replayed = await link.execute(REPLAYED, number, now_ms, now_ms + TOLERATED_MS, STEP)
    return max(late, _count(replayed)) == STEP


async def postpone(link: Connection, *, number: int, before_ms: int, now_ms: int) -> bool:
    """Put off what was not due at `before_ms` and is now, by as much; True if more may be left."""
    return _count(await link.execute(OVERTAKEN, number, before_ms, now_ms, STEP)) == STEP


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])


CANDIDATE = (
    "SELECT d.event, d.endpoint, d.state, e.type, e.accepted_at"
    " FROM relay.deliveries d JOIN relay.events e ON e.seq = d.event WHERE "
)


async def find(
    link: Connection, *, ended: Ended, number: int | None, after: int
) -> tuple[list[Handle], int | None]:
    """Find deliveries that are over, of one event or of an endpoint past event `after`; where to go on."""
    reached = None
    if ended.event_id is not None:
        where = "e.id = $1 AND d.state > 0 AND ($2::int IS NULL OR d.endpoint = $2) ORDER BY d.endpoint"
        rows = await link.fetch(CANDIDATE + where, ended.event_id, number)
    elif ended.state is State.DELIVERED:
        # No index says what was delivered, so this walks all events, a bounded number in a step.
        seen = await link.fetch(
            "SELECT seq FROM relay.events WHERE seq > $1 ORDER BY seq LIMIT $2", after, STEP
        )
        last = seen[-1][0] if seen else after
        where = "d.event > $1 AND d.event <= $2 AND d.endpoint = $3 AND d.state = 1 ORDER BY d.event"
        rows = await link.fetch(CANDIDATE + where, after, last, number)
        reached = last if len(seen) == STEP else None
    else:
        # A literal, so that the state's partial index is seen to hold.
        state = CODES[ended.state or State.DEAD]
        where = f"d.endpoint = $1 AND d.state = {state} AND d.event > $2 ORDER BY d.event LIMIT $3"
        rows = await link.fetch(CANDIDATE + where, number, after, STEP)
        reached = rows[-1][0] if len(rows) == STEP else None
    found = [
        (event, endpoint)
        for event, endpoint, _, type_, accepted_at in rows
        if ended.type in {None, type_}
        and (ended.since_ms is None or accepted_at >= ended.since_ms)
        and (ended.until_ms is None or accepted_at < ended.until_ms)
    ]
    return found, reached


# What it was delivered with joins its other attempts.
KEEP_ATTEMPTS = """
    INSERT INTO relay.attempts (event, endpoint, number, at, milliseconds, status, answer)
    SELECT d.event, d.endpoint, d.attempts, d.at, d.milliseconds, d.status, d.answer
    FROM unnest($1::bigint[], $2::int[]) AS t (event, endpoint)
    JOIN relay.deliveries d ON d.event = t.event AND d.endpoint = t.endpoint WHERE d.at IS NOT NULL
    ON CONFLICT DO NOTHING"""
REVIVE = """
    UPDATE relay.deliveries d SET state = 0, due = t.due, steps = 0, at = NULL, milliseconds = NULL,
        status = NULL, answer = NULL, since = $1, expired = NULL, held = d.key IS NOT NULL
    FROM unnest($2::bigint[], $3::int[], $4::bigint[]) AS t (event, endpoint, due)
    WHERE d.event = t.event AND d.endpoint = t.endpoint"""
HEADS = """
    SELECT t.endpoint, t.key, (
        SELECT d.event FROM relay.deliveries d
        WHERE d.endpoint = t.endpoint AND d.key = t.key AND d.state = 0 ORDER BY d.event LIMIT 1
    ) FROM unnest($1::int[], $2::text[]) AS t (endpoint, key)"""


async def revive(
    link: Connection,
    *,
    relay: int,
    ended: Ended,
    number: int | None,
    after: int,
    now_ms: int,
    due_ms: Callable[[int], int],
) -> tuple[int, int | None]:
    """Put one step of them back to pending; return how many, and where to go on.

    One that has a key goes before newer ones of its key, but not before one that is in flight.
    """
    async with transaction(link):
        found, reached = await find(link, ended=ended, number=number, after=after)
        live = set(dict(await link.fetch(statements.LIVE)).values())
        found = [each for each in found if each[1] in live]
        keyed = await link.fetch(
            "SELECT DISTINCT d.endpoint, d.key FROM unnest($1::bigint[], $2::int[]) AS t (event, endpoint)"
            " JOIN relay.deliveries d ON d.event = t.event AND d.endpoint = t.endpoint"
            " WHERE d.key IS NOT NULL",
            *columns(found, 2),
        )
        keys = [(endpoint, key) for endpoint, key in keyed]
        await _lock_turns(link, keys)
        heads = {(endpoint, key): head for endpoint, key, head in await link.fetch(HEADS, *columns(keys, 2))}
        flying = await _in_flight(link, [(head, key[0]) for key, head in heads.items() if head is not None])
        locked = await link.fetch(LOCK_DELIVERIES, *columns(found, 2))
        over = {(event, endpoint): state for event, endpoint, state, _ in locked if state != PENDING}
        handles = [each for each in found if each in over]
        await link.execute(KEEP_ATTEMPTS, *columns(handles, 2))
        rows = [(*handle, due_ms(index)) for index, handle in enumerate(handles)]
        await link.execute(REVIVE, now_ms, *columns(rows, 3))
        first = [
            (endpoint, key, head if head is not None else -1)
            for (endpoint, key), head in heads.items()
            if (head, endpoint) not in flying  # it passes on to what is older when its attempt is over
        ]
        await _pass_on(link, first, now_ms)
        await _tally(link, relay, over, handles)
    return len(handles), reached


async def _in_flight(link: Connection, handles: Sequence[Handle]) -> set[Handle]:
    """Lock these, so that nobody can claim them any more, and return which somebody has."""
    await link.execute(LOCK_DELIVERIES, *columns(handles, 2))
    return await _claimed(link, handles)


async def _tally(link: Connection, relay: int, states: dict[Handle, Any], handles: Sequence[Handle]) -> None:
    tallies = Tallies()
    for handle in handles:
        tallies[handle[1]].pending += 1
        tallies[handle[1]].dead -= states[handle] == DEAD
    await tallies.write(link, relay)


async def forget(link: Connection, *, relay: int, before_ms: int, after: int, limit: int) -> int | None:
    """Look at up to `limit` events past number `after`, the oldest first, and delete those that are over.

    Returns the number reached, or None when no older event is left to look at.
    """
    async with transaction(link):
        rows = await link.fetch(
            "SELECT seq, accepted_at FROM relay.events WHERE seq > $1 ORDER BY seq LIMIT $2", after, limit
        )
        old = [seq for seq, accepted_at in rows if accepted_at < before_ms]
        owed = await link.fetch(
            "SELECT event, endpoint, state FROM relay.deliveries WHERE event = ANY ($1::bigint[])"
            " ORDER BY event, endpoint FOR UPDATE",
            old,
        )
        over = sorted(set(old) - {event for event, _, state in owed if state == PENDING})
        tallies = Tallies()
        for event, number, state in owed:
            if state == DEAD and event in over:
                tallies[number].dead -= 1
        for table, column in (("attempts", "event"), ("deliveries", "event"), ("events", "seq")):
            await link.execute(f"DELETE FROM relay.{table} WHERE {column} = ANY ($1::bigint[])", over)  # noqa: S608
        await tallies.write(link, relay)
    return old[-1] if len(old) == limit else None
