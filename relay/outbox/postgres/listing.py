"""Looking at what is kept; rows in, stories out. A page looks at a bounded number of events, as on SQLite."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from asyncpg import Connection

from relay.model import Attempt, Health, Standing, State
from relay.outbox import Backlog, DeliveryStory, Page, Past, Query, Story
from relay.outbox.listing import END, EXAMINED
from relay.outbox.postgres import statements
from relay.outbox.statements import CODES, STATES, read_health

# Of different relays, numbers rise with the time of acceptance but for so much.
SKEW_MS = 60_000

EVENTS = (
    "SELECT seq, id, type, timestamp, data, accepted_at, key AS event_key, traceparent,"
    " tracestate FROM relay.events"
    " WHERE seq = ANY ($1::bigint[])"
)


async def story(link: Connection, event_id: str) -> Story | None:
    seq = await link.fetchval("SELECT seq FROM relay.events WHERE id = $1", event_id)
    found = await _stories(link, [seq]) if seq is not None else {}
    return found.get(seq)


async def page(link: Connection, query: Query) -> Page:
    """List events, newest first."""
    before = query.before if query.before is not None else END
    if query.until_ms is not None:
        before = min(before, await _first_since(link, query.until_ms + SKEW_MS))
    looked = await link.fetch(
        "SELECT seq, type, accepted_at FROM relay.events WHERE seq = ANY ($1::bigint[]) ORDER BY seq DESC",
        await _candidates(link, query, before),
    )
    owed: dict[int, list[tuple[str, State]]] = defaultdict(list)
    for event, endpoint, state in await link.fetch(
        "SELECT d.event, p.id, d.state FROM relay.deliveries d"
        " JOIN relay.endpoints p ON p.number = d.endpoint WHERE d.event = ANY ($1::bigint[])",
        [row[0] for row in looked],
    ):
        owed[event].append((endpoint, STATES[state]))
    found: list[int] = []
    next_before = None
    for place, (seq, type_, accepted_at) in enumerate(looked, start=1):
        if query.since_ms is not None and accepted_at < query.since_ms - SKEW_MS:
            break  # everything after it is older still
        if _matches(query, type_, accepted_at, owed[seq]):
            found.append(seq)
        if len(found) == query.limit or place == EXAMINED:
            next_before = seq
            break
    stories = await _stories(link, found)
    return Page(stories=tuple(stories[seq] for seq in found if seq in stories), next_before=next_before)


async def _candidates(link: Connection, query: Query, before: int) -> list[int]:
    """Return numbers of events that may match: by state from its partial index, else all."""
    if query.state in {None, State.DELIVERED}:
        rows = await link.fetch(
            "SELECT seq FROM relay.events WHERE seq < $1 ORDER BY seq DESC LIMIT $2", before, EXAMINED
        )
    else:
        # A literal, so that the state's partial index is seen to hold.
        code = CODES[query.state or State.PENDING]
        rows = await link.fetch(
            "SELECT DISTINCT of_one.event FROM relay.endpoints p CROSS JOIN LATERAL ("  # noqa: S608
            f" SELECT d.event FROM relay.deliveries d WHERE d.endpoint = p.number AND d.state = {code}"
            " AND d.event < $1 ORDER BY d.event DESC LIMIT $2) of_one"
            " WHERE $3::text IS NULL OR p.id = $3 ORDER BY of_one.event DESC LIMIT $2",
            before,
            EXAMINED,
            query.endpoint,
        )
    return [row[0] for row in rows]


async def _first_since(link: Connection, at_ms: int) -> int:
    """Return about the number of the first event accepted at or after a time."""
    low, high = 0, (await link.fetchval("SELECT max(seq) FROM relay.events") or 0) + 1
    while low < high:
        middle = (low + high) // 2
        row = await link.fetchrow(
            "SELECT seq, accepted_at FROM relay.events WHERE seq >= $1 ORDER BY seq LIMIT 1", middle
        )
        if row is not None and row[1] < at_ms:
            low = row[0] + 1
        else:
            high = middle
    return low


def _matches(query: Query, type_: str, accepted_at: int, owed: Sequence[tuple[str, State]]) -> bool:
    if query.type is not None and type_ != query.type:
        return False
    if query.since_ms is not None and accepted_at < query.since_ms:
        return False
    if query.until_ms is not None and accepted_at >= query.until_ms:
        return False
    if query.endpoint is None and query.state is None:
        return True
    return any(
        query.endpoint in {None, endpoint} and query.state in {None, state} for endpoint, state in owed
    )


async def _stories(link: Connection, seqs: Sequence[int]) -> dict[int, Story]:
    attempts: dict[tuple[int, int], list[Attempt]] = defaultdict(list)
    for event, number, *of_attempt in await link.fetch(
        "SELECT event, endpoint, number, at, milliseconds, status, reason, answer FROM relay.attempts"
        " WHERE event = ANY ($1::bigint[]) ORDER BY event, endpoint, number",
        seqs,
    ):
        attempts[event, number].append(_attempt(of_attempt))
    deliveries: dict[int, list[DeliveryStory]] = defaultdict(list)
    for row in await link.fetch(
        "SELECT d.event, d.endpoint AS number, p.id, p.paused, p.health, d.state, d.held, d.due, d.attempts,"
        " d.at, d.milliseconds, d.status, d.answer, d.expired FROM relay.deliveries d"
        " JOIN relay.endpoints p ON p.number = d.endpoint WHERE d.event = ANY ($1::bigint[]) ORDER BY p.id",
        seqs,
    ):
        deliveries[row["event"]].append(_delivery(row, attempts[row["event"], row["number"]]))
    return {
        row["seq"]: Story(
            event=statements.event(row),
            deliveries=tuple(sorted(deliveries[row["seq"]], key=lambda each: each.endpoint)),
        )
        for row in await link.fetch(EVENTS, seqs)
    }


def _delivery(row: Any, attempts: Sequence[Attempt]) -> DeliveryStory:
    last: list[Attempt] = []
    if row["at"] is not None:  # the one that ended it well is kept in its own row
        met = (row["attempts"], row["at"], row["milliseconds"], row["status"], None, row["answer"])
        last = [_attempt(met)]
    held = row["held"] or row["paused"]
    return DeliveryStory(
        endpoint=row["id"],
        state=STATES[row["state"]],
        due_ms=None if held else _next_attempt_ms(row["due"], read_health(row["health"])),
        attempts=(*attempts, *last),
        expired_at_ms=row["expired"],
    )


def _next_attempt_ms(due_ms: int | None, health: Health) -> int | None:
    if due_ms is None or health.standing is Standing.GONE:
        return None
    probe_ms = health.probe_at_ms if health.standing is Standing.DOWN else 0
    return max(due_ms, health.not_before_ms, probe_ms)


def _attempt(row: Sequence[Any]) -> Attempt:
    number, at, milliseconds, status, reason, answer = row
    return Attempt(
        number=number, at_ms=at, milliseconds=milliseconds, status=status, reason=reason, answer=answer
    )


async def backlog(link: Connection, numbers: Mapping[str, int]) -> dict[str, Backlog]:
    """Add up what all relays counted."""
    rows = await link.fetch(
        "SELECT endpoint, sum(pending)::bigint, sum(dead)::bigint FROM relay.tallies"
        " WHERE endpoint = ANY ($1::int[]) GROUP BY endpoint",
        list(numbers.values()),
    )
    counts = {number: Backlog(pending=pending, dead=dead) for number, pending, dead in rows}
    return {id_: counts.get(number, Backlog(pending=0, dead=0)) for id_, number in numbers.items()}


async def pasts(link: Connection) -> dict[str, Past]:
    """Tell of every endpoint since when something waits and how its last attempts went."""
    rows = await link.fetch("""
        SELECT p.id, p.health, (
            SELECT e.accepted_at FROM relay.events e WHERE e.seq = (
                SELECT d.event FROM relay.deliveries d
                WHERE d.endpoint = p.number AND d.state = 0 ORDER BY d.event LIMIT 1)
        ) AS oldest, (
            SELECT max(t.last_success_at) FROM relay.tallies t WHERE t.endpoint = p.number
        ) AS success, f.last_failure_at AS failure, f.last_error AS error
        FROM relay.endpoints p LEFT JOIN LATERAL (
            SELECT t.last_failure_at, t.last_error FROM relay.tallies t
            WHERE t.endpoint = p.number AND t.last_failure_at IS NOT NULL
            ORDER BY t.last_failure_at DESC LIMIT 1
        ) f ON true""")
    return {
        row["id"]: Past(
            oldest_pending_ms=row["oldest"],
            last_success_at_ms=row["success"],
            last_failure_at_ms=row["failure"],
            last_error=row["error"],
            health=read_health(row["health"]),
        )
        for row in rows
    }


async def last_seen(link: Connection) -> int | None:
    """Return the latest time that anything was accepted or attempted."""
    found: int | None = await link.fetchval(
        "SELECT greatest(max(last_success_at), max(last_failure_at), (SELECT accepted_at FROM relay.events"
        " ORDER BY seq DESC LIMIT 1)) FROM relay.tallies"
    )
    return found
