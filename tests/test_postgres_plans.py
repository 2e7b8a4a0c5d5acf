"""The hot statements seek: no plan of theirs sorts or walks over what is pending, however much that is."""

import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from relay.model import Secret
from relay.outbox import open_outbox
from relay.outbox.postgres import changes, statements
from tests.test_outbox import NOW

COUNT = 30_000  # events, each pending at two endpoints
FILL = """
    INSERT INTO relay.endpoints (number, id, live) VALUES (11, 'one', true), (12, 'other', true);
    INSERT INTO relay.events (seq, id, type, timestamp, data, digest, accepted_at, idempotency_key,
        fingerprint)
        SELECT n, 'evt_' || n, 'a.b', 't', '1', '1', {NOW} + n, 'k' || n, '1'
        FROM generate_series(1, {COUNT}) n;
    INSERT INTO relay.deliveries (event, endpoint, due, format, key, held)
        SELECT n, 11, {NOW} + n, 'event', NULL, false FROM generate_series(1, {COUNT}) n;
    INSERT INTO relay.deliveries (event, endpoint, due, format, key, held)
        SELECT n, 12, {NOW} + n, 'event', 'k' || n % 500, n > 500 FROM generate_series(1, {COUNT}) n;
    INSERT INTO relay.claims (event, endpoint, relay, epoch, call, until)
        SELECT n, 11, 1, n, n, now() + interval '1 minute' FROM generate_series(1, 64) n;
    INSERT INTO relay.holders VALUES (11, 1), (12, 1);
"""
MOST_VISITED = 400  # rows, of all nodes together: what is claimed is passed over, and a few are returned


@pytest.fixture
async def filled(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with open_outbox(Secret(postgres_url)):
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(FILL.replace("{NOW}", str(NOW)).replace("{COUNT}", str(COUNT)))
        await connection.execute("ANALYZE")
        # As it is once a statement has been run a few times.
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        yield connection
        await connection.close()


HANDLES = (list(range(100, 132)), [11] * 32)
PLANS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "claim": (statements.CLAIM, (11, NOW + COUNT, -1, -1, 32, 1, timedelta(seconds=9), 1)),
    "probe": (statements.CLAIM, (11, 1 << 62, NOW + 99, 99, 1, 1, timedelta(seconds=9), 1)),
    "due": (statements.NEXT_DUE, ([11, 12],)),
    "look": (statements.LOOK, ([11, 12], 1)),
    "known key": (statements.KNOWN, ([f"k{n}" for n in range(0, 32000, 1000)],)),
    "pending key": (statements.PENDING_KEYS, ([12] * 32, [f"k{n}" for n in range(32)])),
    "lock": (statements.LOCK, (1, [*range(32)], *HANDLES, 32)),
    "record": (
        statements.RECORD,
        (1, *HANDLES, [0] * 32, [1] * 32, [None] * 32, [1] * 32, [0] * 32, [NOW] * 32, [1] * 32, [200] * 32,
         [None] * 32),
    ),
    "next of key": (
        statements.NEXT_OF_KEY,
        ([*range(32)], [12] * 32, [f"k{n}" for n in range(32)], [NOW] * 32),
    ),
    "waits too long": (changes.WAITING, (11, 100, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
async def test_a_hot_statement_neither_sorts_nor_walks(filled, name):
    sql, values = PLANS[name]
    transaction = filled.transaction()
    await transaction.start()
    plan = json.loads(await filled.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {sql}", *values))[0][
        "Plan"
    ]
    await transaction.rollback()

    big = {"deliveries", "events"}
    walks = [each for each in nodes(plan) if each["Node Type"] == "Seq Scan" and each["Relation Name"] in big]
    visited = sum(
        each["Actual Loops"] * (each["Actual Rows"] + each.get("Rows Removed by Filter", 0))
        for each in nodes(plan)
        if each.get("Relation Name") in big
    )
    sorts = [each for each in nodes(plan) if "Sort" in each["Node Type"] and each["Actual Rows"] > 64]
    assert (walks, sorts) == ([], []), json.dumps(plan, indent=1)
    assert visited <= MOST_VISITED, json.dumps(plan, indent=1)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from nodes(each)


async def test_freeing_what_the_dead_claimed_walks_over_claims_alone(filled):
    """There are no more of them than attempts under way."""
    plan = await filled.fetch("EXPLAIN DELETE FROM relay.claims WHERE relay = 1")
    assert not any("deliveries" in row[0] or "events" in row[0] for row in plan)
