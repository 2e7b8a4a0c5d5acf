"""Sources: rows that several relays share, that come a second time, that wait; on a real PostgreSQL.

What is tried here cannot be seen from outside a process: who has which row in hand, what is forgotten when.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from relay.catalogue import Catalogue, EventType
from relay.clock import SystemClock
from relay.ingest import Ingest, InvalidError
from relay.metrics import Metrics
from relay.model import Secret, Source
from relay.outbox import FullError, Outbox, Query, open_outbox
from relay.retention import forget
from relay.sources import database
from relay.sources.database import AwayError, opened
from relay.sources.reader import Pass, Reader
from relay.sources.readers import MARGIN_MS, Readers
from relay.sources.rows import Row, Waiting, draft, fitting, in_order
from relay.sources.script import script
from relay.subscription import Subscriptions
from tests import postgres


def waiting(*rows: tuple[int, str | None]) -> list[Waiting]:
    return [Waiting(seq, f"evt_{seq}", key, 10) for seq, key in rows]


def test_a_row_waits_while_an_older_one_of_its_key_is_in_other_hands():
    ours = waiting((2, "a"), (3, "b"), (4, None), (6, "a"), (7, "b"))
    every = {"a": [2, 5, 6], "b": [1, 3, 7]}
    assert [each.seq for each in in_order(ours, every)] == [2, 4]
    assert in_order(ours, {"a": [2, 6], "b": [3, 7]}) == ours


def test_as_many_rows_are_read_as_memory_is_meant_for_and_one_at_least():
    rows = [Waiting(seq, "", None, size) for seq, size in ((1, 50), (2, 40), (3, 20))]
    assert [each.seq for each in fitting(rows, 95)] == [1, 2]
    assert [each.seq for each in fitting(rows, 10)] == [1]
    assert fitting([], 10) == []


def row(**changes: object) -> Row:
    plain = Row(1, f"evt_{'0' * 32}", "a", "{}", None, None, None, None, None, None, 1_700_000_000_000)
    return plain._replace(**changes)


def test_a_row_becomes_a_draft_that_keeps_its_id():
    assert draft(row()).id == f"evt_{'0' * 32}"
    assert draft(row(idempotency_key="mine")).idempotency_key == "mine"
    for changes in ({"id": "evt_forged"}, {"idempotency_key": "a b"}, {"data": "nonsense"}):
        with pytest.raises(InvalidError):
            draft(row(**changes))


class Shop:
    """A source, and all that its readers share."""

    def __init__(self, url: str, outbox: Outbox) -> None:
        self.source = Source(id="shop", url=Secret(url))
        self.outbox = outbox
        self.clock = SystemClock()
        self.metrics = Metrics()
        self.max_event_size = 1 << 18
        self.ingest = Ingest(
            outbox=outbox, subscriptions=Subscriptions([]), clock=self.clock, wake=lambda _: None
        )

    async def kept(self) -> list[object]:
        """Return what the outbox holds, in the order of acceptance, as (id, key)."""
        page = await self.outbox.events(Query(limit=1000))
        return [(story.event.id, story.event.key) for story in reversed(page.stories)]


@pytest.fixture
async def app(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(script("public"))
    yield connection
    await connection.close()


@pytest.fixture
async def shop(postgres_url: str, tmp_path: Path) -> AsyncIterator[Shop]:
    async with open_outbox(tmp_path / "relay.db") as outbox:
        yield Shop(postgres_url, outbox)


@pytest.fixture
async def any_shop(
    postgres_url: str, open_store: Callable[[], AbstractAsyncContextManager[Outbox]]
) -> AsyncIterator[Shop]:
    """The same on each kind of outbox."""
    async with open_store() as outbox:
        yield Shop(postgres_url, outbox)


@asynccontextmanager
async def reading(*readers: Reader) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        for each in readers:
            tasks.create_task(each.run())
        yield
        for each in readers:
            each.stop()


async def left(connection: asyncpg.Connection, count: int = 0) -> None:
    async with asyncio.timeout(15):
        while await connection.fetchval("SELECT count(*) FROM relay_submissions") != count:
            await asyncio.sleep(0.02)


async def submit(connection: asyncpg.Connection, key: str | None = None, event: str = "a") -> str:
    id_: str = await connection.fetchval("SELECT relay_submit($1, '{}', key => $2)", event, key)
    return id_


async def kept_and_killed(shop: Shop, reader: Reader) -> None:
    """Do what a relay does that is killed between keeping and deleting."""
    with pytest.raises(ZeroDivisionError):
        async with opened(shop.source) as connection, connection.transaction():
            seqs = [each.seq for each in await connection.take(10)]
            await reader._keep(await connection.contents(seqs), Pass())
            raise ZeroDivisionError


async def test_readers_share_the_rows_and_keep_each_keys_order(app, any_shop):
    """One outbox, several relays: nothing twice, and of a key nothing before what was submitted earlier."""
    ids = {key: [] for key in (*"abcde", None)}
    readers = [Reader(any_shop.source, any_shop) for _ in range(3)]
    async with reading(*readers):
        for number in range(300):
            key = list(ids)[number % 6]
            ids[key].append(await submit(app, key))
        await left(app)
    kept = await any_shop.kept()
    assert len(kept) == 300
    for key in "abcde":
        assert [id_ for id_, of in kept if of == key] == ids[key]
    assert {id_ for id_, of in kept if of is None} == set(ids[None])
    assert any_shop.metrics.accepted == 300


async def test_what_one_relay_has_in_hand_no_other_takes_and_nobody_passes_it(app, shop):
    """The first relay is in the middle of its work: the second takes what is free, and waits with the key."""
    first, second = await submit(app, "k"), await submit(app)
    async with opened(shop.source) as theirs, opened(shop.source) as ours:
        async with theirs.transaction():
            assert [each.id for each in await theirs.take(10)] == [first, second]
            third, fourth = await submit(app, "k"), await submit(app, "other")
            reader = Reader(shop.source, shop)
            passed = await reader._take(ours)
            assert [id_ for id_, _ in await shop.kept()] == [fourth]
            assert not passed.more  # or it would ask without end
        passed = await reader._take(ours)
    assert [id_ for id_, _ in await shop.kept()] == [fourth, first, second, third]


async def test_a_relay_that_hangs_with_rows_in_hand_loses_them(app, shop, monkeypatch):
    """SIGSTOP, a disk that hangs, a network that swallows everything: the database lets the rows go."""
    monkeypatch.setattr(database, "BEGIN", database.BEGIN.replace("30s", "300ms"))
    id_ = await submit(app)
    async with opened(shop.source) as hung:
        with pytest.raises(AwayError):
            async with hung.transaction():
                assert len(await hung.take(10)) == 1
                async with reading(Reader(shop.source, shop)):
                    await left(app)
                await hung.settle([1], {})
    assert await shop.kept() == [(id_, None)]


async def test_a_repeat_under_other_rules_is_done_with_and_not_refused(app, any_shop):
    """Kept, killed before the deletion, and meanwhile the catalogue has lost the type: it was sent."""
    id_ = await submit(app)
    reader = Reader(any_shop.source, any_shop)
    await kept_and_killed(any_shop, reader)
    any_shop.ingest.learn(Catalogue([EventType(type="other")]))
    other = await submit(app)
    async with reading(reader):
        await left(app, 1)
    assert [each for each, _ in await any_shop.kept()] == [id_]
    assert await app.fetchval("SELECT id FROM relay_submissions") == other


async def test_a_full_outbox_is_done_with_what_it_has_and_leaves_the_rest(app, shop, monkeypatch):
    """Else nothing could be forgotten until there is room, and there is none until something is forgotten."""
    id_ = await submit(app)
    reader = Reader(shop.source, shop)
    await kept_and_killed(shop, reader)
    rest = await submit(app)

    async def full(_submissions: object) -> object:
        raise FullError("there is no room")

    monkeypatch.setattr(shop.outbox, "accept", full)
    async with reading(reader):
        await left(app, 1)
        async with asyncio.timeout(5):
            while reader.standing.error != "there is no room":
                await asyncio.sleep(0.01)
        assert reader.settled_ms > 0
    assert await app.fetchval("SELECT id FROM relay_submissions") == rest
    assert [each for each, _ in await shop.kept()] == [id_]


async def test_what_may_come_a_second_time_is_not_forgotten(app, any_shop):
    """A source that is away may hold rows whose events are kept: they have to be recognised later."""
    id_ = await submit(app)
    readers = Readers(any_shop, [any_shop.source])
    await kept_and_killed(any_shop, Reader(any_shop.source, any_shop))
    later = any_shop.clock.now_ms() + 10 * MARGIN_MS

    class Later(SystemClock):
        def now_ms(self) -> int:
            return later

    async def forgotten() -> bool:
        try:
            async with asyncio.timeout(0.3):
                await forget(any_shop.outbox, Later(), lambda: 1.0, readers.settled_ms)
        except TimeoutError:
            pass
        return await any_shop.outbox.story(id_) is None

    assert not await forgotten()  # nobody has looked since the start
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(readers.run())
        await left(app)
        async with asyncio.timeout(5):
            while readers.settled_ms() <= 0:
                await asyncio.sleep(0.01)
        assert not await forgotten()  # another relay may still have it in hand
        await readers.stop()
    (reader,) = readers._readers.values()
    reader.settled_ms = later  # as a look does that is so much later
    assert await forgotten()


@pytest.fixture
def restartable() -> Iterator[postgres.Postgres]:
    try:
        with postgres.running() as server:
            yield server
    except LookupError as error:
        pytest.skip(str(error))


async def test_a_server_that_answers_no_more_is_given_up_and_comes_back(shop, monkeypatch, restartable):
    """Half-open: the connection stands, and nothing comes. Only a time-out of our own notices."""
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 0.3)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 0.3)
    connection = await asyncpg.connect(restartable.url)
    await connection.execute(script("public"))
    reader = Reader(Source(id="shop", url=Secret(restartable.url)), shop)
    async with reading(reader):
        first = await submit(connection)
        await left(connection)
        restartable.signal(signal.SIGSTOP)
        async with asyncio.timeout(10):
            while reader.standing.error is None:
                await asyncio.sleep(0.02)
        assert "in time" in reader.standing.error
        restartable.signal(signal.SIGCONT)
        second = await submit(connection)
        await left(connection)
        async with asyncio.timeout(5):
            while reader.standing.error is not None:
                await asyncio.sleep(0.02)
    await connection.close()
    assert [id_ for id_, _ in await shop.kept()] == [first, second]


async def test_without_notify_rows_are_found_by_looking(app, shop):
    """A pooler in transaction mode loses hints, and other engines have none."""
    portable = script("public", portable=True)
    assert "notify" not in portable.lower()
    assert "autovacuum" not in portable
    await app.execute(portable)
    async with reading(Reader(shop.source, shop)):
        id_ = await submit(app)
        await left(app)
    assert await shop.kept() == [(id_, None)]


async def test_another_schema_has_all_of_it(app, shop, postgres_url):
    await app.execute('CREATE SCHEMA "Events"')
    await app.execute(script("Events"))
    await app.execute(script("Events"))  # changes nothing
    source = Source(id="events", url=Secret(postgres_url), schema="Events")
    async with reading(Reader(source, shop)):
        id_ = await app.fetchval("""SELECT "Events".relay_submit('a', '{}')""")
        async with asyncio.timeout(10):
            while await shop.kept() != [(id_, None)]:
                await asyncio.sleep(0.02)
    assert await app.fetchval("SELECT count(*) FROM relay_submissions") == 0


@pytest.mark.parametrize("name", ["WAITS", "TAKE", "OF_KEYS", "CONTENTS"])
async def test_no_statement_looks_at_more_rows_than_it_takes(app, name):
    """Neither at what waits behind nor at what was refused, however much that is."""
    await app.execute("""
        INSERT INTO relay_submissions (id, event, data, key, submitted_at, refusal)
        SELECT 'evt_' || n, 'a', '{}', 'key-' || n % 1000, now(), CASE WHEN n < 15000 THEN 'no' END
        FROM generate_series(1, 30000) AS n;
        ANALYZE relay_submissions""")
    arguments = {
        "TAKE": (10,),
        "OF_KEYS": (["key-1", "key-2"], 20_000),
        "CONTENTS": ([15_001, 15_002, 15_003],),
    }.get(name, ())
    sql = getattr(database, name).replace("{table}", "relay_submissions")
    plan = await app.fetch(f"EXPLAIN (ANALYZE, TIMING off) {sql}", *arguments)
    text = "\n".join(line[0] for line in plan)
    assert "Seq Scan" not in text, text
    visited = [float(rows) for rows in re.findall(r"actual rows=([0-9.]+)", text)]
    assert visited
    assert max(visited) <= 20, text


async def test_of_transactions_that_overlap_one_carries_the_hint(app, postgres_url):
    """NOTIFY lets commits queue up: while one transaction carries it, others go without."""
    other = await asyncpg.connect(postgres_url)
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    async with app.transaction():
        await submit(app)
        async with other.transaction():
            await submit(other)
            assert await app.fetchval(held) == 1
            assert await other.fetchval(held) == 0
    await other.close()


async def test_the_outboxes_own_database_has_the_function_by_itself(postgres_url):
    """In the schema that is the relay's: no migration is needed, and no relay refuses to start."""
    async with open_outbox(Secret(postgres_url)) as outbox:
        shop = Shop(postgres_url, outbox)
        several = [Readers(shop, own=Secret(postgres_url)) for _ in range(3)]  # they start together
        app = await asyncpg.connect(postgres_url)
        async with asyncio.TaskGroup() as tasks:
            for each in several:
                await each.check([])
                tasks.create_task(each.run())
            ids = [await app.fetchval("SELECT relay.relay_submit('a', $1)", str(n)) for n in range(20)]
            async with asyncio.timeout(10):
                while len(await shop.kept()) < len(ids):
                    await asyncio.sleep(0.02)
            for each in several:
                await each.stop()
        assert [each.standings().keys() for each in several] == [{"outbox"}] * 3
        assert {id_ for id_, _ in await shop.kept()} == set(ids)
        await app.close()


async def test_a_row_that_was_kept_before_is_a_repeat_whatever_became_of_it(app, any_shop):
    """Kept, killed, and then edited or copied by somebody: an id is one event, and no relay falls over it."""
    ids = [await submit(app) for _ in range(3)]
    await app.execute("UPDATE relay_submissions SET idempotency_key = 'first' WHERE id = $1", ids[0])
    await kept_and_killed(any_shop, Reader(any_shop.source, any_shop))
    await app.execute("UPDATE relay_submissions SET idempotency_key = 'second' WHERE id = $1", ids[0])
    await app.execute(
        "UPDATE relay_submissions SET idempotency_key = 'third', event = 'b' WHERE id = $1", ids[1]
    )
    copied = await submit(app)
    await app.execute("""
        INSERT INTO relay_submissions (id, event, data, idempotency_key, submitted_at)
        SELECT id, event, data, 'fourth', now() FROM relay_submissions""")
    async with reading(Reader(any_shop.source, any_shop)):
        await left(app)
    assert {id_ for id_, _ in await any_shop.kept()} == {*ids, copied}
    assert any_shop.metrics.accepted == 1
    assert any_shop.metrics.duplicates == 7
