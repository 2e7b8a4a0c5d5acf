"""What only the SQLite outbox promises: its file, its plans, and what it does when the disk fails."""

import asyncio
import hashlib
import os
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from relay.model import Health, Standing, State, Verdict
from relay.outbox import (
    DamagedError,
    Ended,
    FullError,
    HeldError,
    NewerSchemaError,
    Query,
    listing,
    open_outbox,
    order,
    patience,
    revival,
    schema,
    statements,
)
from tests.test_outbox import DEAD, DELIVERED, NOW, again, attempt, submission


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_commits_are_synced_and_logged_ahead(path):
    """NORMAL does not sync ordinary commits: 202 would not mean kept."""
    async with open_outbox(path) as outbox:
        pragmas = {
            name: await outbox._run(lambda db, name=name: db.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("journal_mode", "synchronous", "foreign_keys", "auto_vacuum", "application_id")
        }
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "auto_vacuum": 2,
        "application_id": 0x52454C59,
    }


async def test_files_are_the_relays_alone(path):
    """Secrets of API endpoints lie in the outbox in clear."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert modes == dict.fromkeys(("relay.db", "relay.db-wal", "relay.db-shm", "relay.db.lock"), 0o600)


async def test_a_second_relay_is_refused_and_told_by_whom(path):
    async with open_outbox(path):
        with pytest.raises(HeldError, match=rf"held by another relay \(process {os.getpid()}\)"):
            async with open_outbox(path):
                raise AssertionError
    async with open_outbox(path):
        pass


async def test_another_name_of_the_same_outbox_is_the_same_outbox(path):
    """Two relays on one file, each with a lock of its own, would deliver everything twice."""
    link = path.with_name("link.db")
    link.symlink_to(path)
    async with open_outbox(path):
        with pytest.raises(HeldError):
            async with open_outbox(link):
                raise AssertionError
    link.unlink()
    link.hardlink_to(path)
    with pytest.raises(DamagedError, match="has another name too"):
        async with open_outbox(link):
            raise AssertionError


async def test_a_folder_in_the_place_of_the_outbox_is_called_one(path):
    """It is what a container's engine makes of a mount whose file is missing; it has no hard link."""
    path.mkdir()
    with pytest.raises(DamagedError, match="is a folder or a device, not a file"):
        async with open_outbox(path):
            raise AssertionError


async def test_a_newer_schema_is_refused_and_not_touched(path):
    async with open_outbox(path):
        pass
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = digest(path)
    with pytest.raises(NewerSchemaError, match=r"has schema 99, this relay knows \d+: start the newer relay"):
        async with open_outbox(path):
            raise AssertionError
    assert digest(path) == before


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to be read\n" * 40, b"x" * 8192]
)
async def test_a_file_that_is_no_database_is_refused_and_not_touched(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="cannot be read as an outbox"):
        async with open_outbox(path):
            raise AssertionError
    assert path.read_bytes() == content


async def test_somebody_elses_database_is_refused_and_not_touched(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (a)")
    db.close()
    before = digest(path)
    with pytest.raises(DamagedError, match="is an SQLite database, but not an outbox"):
        async with open_outbox(path):
            raise AssertionError
    assert digest(path) == before


async def test_an_older_schema_is_brought_forward_with_what_it_holds(path, monkeypatch):
    """The next version is appended; a file of the version before gets only what is new."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
    newer = ("ALTER TABLE events ADD COLUMN note TEXT",)
    monkeypatch.setattr(schema, "VERSIONS", (*schema.VERSIONS, newer))
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        assert [each.event.id for each in await outbox.claim("main", 9, NOW)] == ["evt_a"]
        version = await outbox._run(lambda db: db.execute("PRAGMA user_version").fetchone()[0])
    assert version == len(schema.VERSIONS)


async def test_a_migration_that_fails_leaves_the_old_schema(path, monkeypatch):
    async with open_outbox(path):
        pass
    broken = ("ALTER TABLE events ADD COLUMN note TEXT", "ALTER TABLE nowhere ADD COLUMN note TEXT")
    monkeypatch.setattr(schema, "VERSIONS", (*schema.VERSIONS, broken))
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        async with open_outbox(path):
            raise AssertionError
    monkeypatch.undo()
    async with open_outbox(path) as outbox:
        columns = await outbox._run(
            lambda db: [row[1] for row in db.execute("PRAGMA table_info(events)").fetchall()]
        )
    assert "note" not in columns


def plans(db: sqlite3.Connection, run) -> list[str]:
    """Return the query plan of every statement that `run` executes."""
    statements_run: list[str] = []
    db.execute("BEGIN")
    db.set_trace_callback(statements_run.append)
    run(db)
    db.set_trace_callback(None)
    db.execute("ROLLBACK")
    distinct = {re.sub(r"\b\d+", "?", sql): sql for sql in statements_run}.values()
    return [row[3] for sql in distinct for row in db.execute("EXPLAIN QUERY PLAN " + sql)]


QUERIES = [
    Query(limit=9),
    Query(limit=9, type="post.published", before=400, since_ms=NOW - 1, until_ms=NOW + 1),
    *(Query(limit=9, endpoint="main", state=state) for state in State),
    *(Query(limit=9, state=state) for state in State),
]
ENDED = [Ended(event_id="evt_1"), *(Ended(endpoint="main", state=state) for state in list(State)[1:])]

HOT = {
    "accept": lambda db: (
        statements.insert_events(
            db, [(n, f"e{n}", "t", "z", b"1", b"d", NOW, None, None, None, f"k{n}", b"f") for n in (501, 502)]
        ),
        statements.insert_deliveries(db, [(501, 1, NOW, "event", None, 0), (502, 1, NOW, "event", None, 0)]),
    ),
    "idempotency": lambda db: (statements.known_key(db, "k1"), statements.endpoints_of(db, 1)),
    "claim": lambda db: statements.look(db, 1, NOW, (NOW - 1, 5), 10),
    "record": lambda db: (
        statements.update_deliveries(db, [(n, 1, 1, None, 1, 0, NOW, 5, 200, "ok") for n in (1, 2)]),
        statements.insert_attempts(db, [(n, 1, 1, NOW, 5, 500, "http_500", "no") for n in (1, 2)]),
    ),
    "story": lambda db: listing.story(db, "evt_1"),
    "page": lambda db: [listing.page(db, query) for query in QUERIES],
    "replay": lambda db: [revival.find(db, ended, 1, 0) for ended in ENDED]
    + [revival.revive(db, [(1, 1), (2, 1)], [NOW, NOW], now_ms=NOW)],
    "forget": lambda db: statements.forget(db, NOW + 1, 0, 10),
    "cancel": lambda db: statements.cancel(db, 1, 10),
    "probe": lambda db: statements.following(db, 1, (NOW, 5), 10),
    "expire": lambda db: patience.expire(
        db, 1, 0, before_ms=NOW, age_from_ms=0, now_ms=NOW + 9, in_flight=lambda handle: False
    ),
    "advance": lambda db: patience.advance(db, 1, now_ms=NOW, latest_ms=NOW + 9),
    "postpone": lambda db: patience.postpone(db, 1, before_ms=NOW, now_ms=NOW + 9),
    "accept in order": lambda db: [order.Heads(db).holds_back(1, key) for key in "kz"],
    "record in order": lambda db: order.pass_on(db, (1, 1), "k", NOW),
    "replay in order": lambda db: (
        statements.update_deliveries(db, [(n, 1, 2, None, 1, 0, None, None, None, None) for n in (1, 2)]),
        order.pass_on(db, (1, 1), "k", NOW),
        revival.revive(db, [(1, 1)], [NOW], now_ms=NOW),
    ),
    "health": lambda db: statements.update_healths(db, {1: Health()}),
}  # fmt: skip


@pytest.mark.parametrize("verb", HOT)
async def test_every_hot_statement_is_a_seek(path, verb):
    """A scan or a sort would cost more the more is pending."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission(f"{n}", key=f"key{n}") for n in range(500)])
        await outbox._run(
            lambda db: db.execute("UPDATE deliveries SET key = 'k', held = event > 1").fetchall()
        )
        found = await outbox._run(plans, HOT[verb])
    # Co-routines and materialised VALUES are the rows handed in; endpoints are as many as the config has.
    allowed = re.compile(
        r"SEARCH |SCAN \d+ CONSTANT|SCAN (done|p)\b|CO-ROUTINE|MATERIALIZE|LIST SUBQUERY"
        r"|CORRELATED SCALAR SUBQUERY"
    )
    assert [step for step in found if not allowed.match(step)] == []


async def test_a_claim_visits_as_many_rows_in_a_large_backlog_as_in_a_small_one(path):
    """The plan can look like seeks and still walk over the backlog, so count what the machine does."""

    def steps(db: sqlite3.Connection, place: tuple[int, int]) -> int:
        counted = 0

        def count() -> int:
            nonlocal counted
            counted += 1
            return 0

        db.set_progress_handler(count, 1)
        rows, _ = statements.look(db, 1, NOW, place, 10)
        db.set_progress_handler(None, 0)
        assert len(rows) == 10
        return counted

    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission(f"{n}") for n in range(100)])
        small = await outbox._run(steps, (NOW, 50))
        for start in range(100, 6000, 1000):
            await outbox.accept([submission(f"{n}") for n in range(start, start + 1000)])
        large = await outbox._run(steps, (NOW, 5000))  # all of the same due time, as after a bulk replay
    assert large <= small * 1.2


async def test_a_probe_hands_out_nothing_that_was_recorded_between_its_two_looks(path, monkeypatch):
    """What was in flight at the first look is over at the second, and would be sent once more."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
        (held,) = await outbox.claim("main", 1, NOW)
        run, looks = outbox._run, 0

        async def recorded_before_the_second(function, *arguments):
            nonlocal looks
            looks += function is statements.following
            if looks == 2:
                await outbox.record(held, attempt(held), DELIVERED)
            return await run(function, *arguments)

        monkeypatch.setattr(outbox, "_run", recorded_before_the_second)
        assert await outbox.probe("main") is None
        assert looks == 2


PENDING_OF_ONE_KEY = 300_000


def fill(db: sqlite3.Connection, count: int) -> None:
    """Have so many events of one key pending at endpoint 1, the first to be delivered next."""
    db.execute("BEGIN")
    db.execute(
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?) INSERT INTO events"
        " (id, type, timestamp, data, digest, accepted_at, key)"
        " SELECT 'evt_' || n, 'post.published', 'z', x'31', x'00', ?, 'k' FROM n",
        (count, NOW),
    )
    db.execute(
        "INSERT INTO deliveries (event, endpoint, due, format, key, held)"
        " SELECT seq, 1, ?, 'event', 'k', seq > 1 FROM events",
        (NOW,),
    )
    db.execute("COMMIT")


def steps_of(db: sqlite3.Connection, verb: str) -> int:
    """Count the steps of SQLite's machine that a verb takes, leaving everything as it was."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    db.execute("BEGIN")
    db.set_progress_handler(count, 1)
    HOT[verb](db)
    db.set_progress_handler(None, 0)
    db.execute("ROLLBACK")
    return counted


ON_ONE_KEY = [
    "claim", "probe", "expire", "advance", "accept in order", "record in order", "replay in order",
]  # fmt: skip


async def test_with_300_000_pending_of_one_key_every_verb_visits_as_many_rows_as_with_a_few(tmp_path, capsys):
    """A look for something older than each candidate would walk over all of them, in seeks."""
    steps: dict[str, list[int]] = {verb: [] for verb in ON_ONE_KEY}
    for count in (1_000, PENDING_OF_ONE_KEY):
        async with open_outbox(tmp_path / f"{count}.db", synchronous="off") as outbox:
            await outbox.register(["main"])
            await outbox._run(fill, count)
            for verb in ON_ONE_KEY:
                steps[verb].append(await outbox._run(steps_of, verb))
    with capsys.disabled():
        print(f"\nsteps with 1,000 and with {PENDING_OF_ONE_KEY:,} pending of one key: {steps}")
    assert [verb for verb, (small, large) in steps.items() if large > small * 1.3 + 20] == []


async def test_an_outbox_of_the_first_schema_is_brought_forward_with_what_is_pending(path):
    """An upgrade in the middle of a backlog: retries, deaths and attempts stay as they were."""
    db = sqlite3.connect(path)
    for statement in schema.VERSION_1:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    db.execute("PRAGMA user_version = 1")
    db.execute("INSERT INTO endpoints (id, paused, last_error) VALUES ('main', 1, 'timeout')")
    for seq, (state, due, attempts) in enumerate([(0, NOW, 0), (0, NOW + 5, 2), (2, None, 4)], start=1):
        db.execute(
            "INSERT INTO events (seq, id, type, timestamp, data, digest, accepted_at, key)"
            " VALUES (?, ?, 't', 'z', x'31', x'00', ?, 'k')",
            (seq, f"evt_{seq}", NOW),
        )
        db.execute(
            "INSERT INTO deliveries (event, endpoint, state, due, format, attempts, steps)"
            " VALUES (?, 1, ?, ?, 'event', ?, ?)",
            (seq, state, due, attempts, attempts),
        )
    db.execute("INSERT INTO attempts VALUES (2, 1, 1, ?, 7, 503, 'http_503', 'no')", (NOW,))
    db.commit()
    db.close()

    async with open_outbox(path) as outbox:
        version = await outbox._run(lambda db: db.execute("PRAGMA user_version").fetchone()[0])
        (main,) = await outbox.endpoints()
        await outbox.register(["main"])
        claimed = await outbox.claim("main", 9, NOW + 5)
        story = await outbox.story("evt_2")
        revived = await outbox.revive(Ended(endpoint="main", state=State.DEAD), NOW + 5)
        (again_,) = await outbox.claim("main", 9, NOW + 5)
    assert version == len(schema.VERSIONS) >= 2
    assert (main.paused, main.health) == (True, Health())
    assert [(each.event.id, each.attempts, each.steps) for each in claimed] == [
        ("evt_1", 0, 0), ("evt_2", 2, 2),
    ]  # fmt: skip
    assert {each.ordered for each in claimed} == {False}, "what was accepted before stays unordered"
    assert [each.reason for each in story.deliveries[0].attempts] == ["http_503"]
    assert (revived, again_.event.id, again_.attempts, again_.replayed) == (1, "evt_3", 4, True)


GONE = Health(standing=Standing.GONE, since_ms=NOW)


async def test_without_room_the_outcome_is_kept_and_the_news_left_out(path, monkeypatch, caplog):
    """What was met cannot be met again; news can be done without."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main", "other"])
        await outbox.accept([submission("a")])
        (a,) = await outbox.claim("main", 1, NOW)
        monkeypatch.setattr("relay.outbox.admission.RESERVED_BYTES", 1 << 60)
        monkeypatch.setattr("relay.outbox.admission.RESERVED_SHARE", 1)
        with pytest.raises(FullError):
            await outbox.accept([submission("b")])
        assert await outbox.record(a, attempt(a, "timeout"), DEAD, health=GONE, news=[submission("n")]) == []
        monkeypatch.undo()
        assert (await outbox.story("evt_a")).deliveries[0].state is State.DEAD
        assert (await outbox.pasts())["main"].health == GONE
        assert await outbox.story("evt_n") is None
        assert "outbox_full" in caplog.text


async def test_a_full_disk_refuses_events_and_keeps_outcomes(path):
    """SQLITE_FULL rolls the whole transaction back; what was met must not be lost with it."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission(f"{n}", data=b'"%b"' % (b"x" * 3000)) for n in range(50)])
        (claimed, *_) = await outbox.claim("main", 2, NOW)
        pages = await outbox._run(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        await outbox._run(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())

        with pytest.raises(FullError, match="there is no room"):
            await outbox.accept([submission("big", data=b'"%b"' % (b"x" * 200_000))])
        assert "there is no room" in outbox.trouble()
        await outbox.record(claimed, attempt(claimed), DELIVERED)
        story = await outbox.story(claimed.event.id)
        assert story.deliveries[0].state is State.DELIVERED

        await outbox._run(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
        await outbox.accept([submission("big", data=b'"%b"' % (b"x" * 200_000))])
        assert outbox.trouble() is None


async def test_a_reserve_of_the_disk_is_kept_for_outcomes(path, monkeypatch):
    """Soft before hard: once the disk is really full, what was accepted could not go out either."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
        (claimed,) = await outbox.claim("main", 1, NOW)
        monkeypatch.setattr("relay.outbox.admission.RESERVED_BYTES", 1 << 60)
        monkeypatch.setattr("relay.outbox.admission.RESERVED_SHARE", 1)

        with pytest.raises(FullError, match="there is no room"):
            await outbox.accept([submission("b")])
        assert "there is no room" in outbox.trouble()
        await outbox.record(claimed, attempt(claimed), DELIVERED)

        monkeypatch.undo()
        assert outbox.trouble() is None
        await outbox.accept([submission("b")])
        assert (await outbox.story("evt_a")).deliveries[0].state is State.DELIVERED


async def test_outcomes_that_find_no_room_are_written_once_there_is(path, monkeypatch):
    monkeypatch.setattr("relay.outbox.committer.FULL_RETRY_SECONDS", 0.02)
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
        (claimed,) = await outbox.claim("main", 1, NOW)
        failures = iter([sqlite3.OperationalError("database or disk is full")] * 3)
        real = statements.update_deliveries

        def fails_thrice(db, rows):
            for error in failures:
                error.sqlite_errorname = "SQLITE_FULL"
                raise error
            real(db, rows)

        monkeypatch.setattr(statements, "update_deliveries", fails_thrice)
        await outbox.record(claimed, attempt(claimed, "timeout"), again(NOW + 1))
        (late,) = await outbox.claim("main", 1, NOW + 1)
    assert late.attempts == 1


async def test_a_stop_does_not_wait_for_room_on_a_full_disk(path, monkeypatch):
    """What could not be recorded is simply due again after the next start: an attempt cut off by a stop."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
        (claimed,) = await outbox.claim("main", 1, NOW)

        def fails(db, rows):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error

        monkeypatch.setattr(statements, "update_deliveries", fails)
        monkeypatch.setattr("relay.outbox.committer.FULL_RETRY_SECONDS", 0.02)
        recording = asyncio.get_running_loop().create_task(
            outbox.record(claimed, attempt(claimed), DELIVERED)
        )
        await asyncio.sleep(0.05)
        assert not recording.done()
    with pytest.raises(FullError):
        await recording
    monkeypatch.undo()
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        assert len(await outbox.claim("main", 1, NOW)) == 1


async def test_an_outbox_that_was_moved_away_ends_the_relay(path):
    """What it went on to accept would be in a file that the next start does not open."""
    with pytest.raises(ExceptionGroup) as ended:
        async with open_outbox(path) as outbox:
            await outbox.register(["main"])
            path.rename(path.with_name("moved.db"))
            await outbox.accept([submission("a")])
    assert ended.value.subgroup(lambda error: "was moved away or replaced" in str(error)) is not None


async def test_a_failing_disk_ends_the_relay_and_answers_nobody_falsely(path, monkeypatch):
    """A failed commit is ambiguous: the row may be there after a restart, so only a restart may tell."""

    def fails(db, rows):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
        raise error

    with pytest.raises(ExceptionGroup) as ended:
        async with open_outbox(path) as outbox:
            await outbox.register(["main"])
            monkeypatch.setattr(statements, "insert_events", fails)
            await outbox.accept([submission("a")])
    assert ended.value.subgroup(DamagedError) is not None


async def test_what_a_killed_process_had_accepted_is_there(path):
    """No orderly close: the file is left as it is in the middle of things."""
    script = """
import asyncio, os, sys
from pathlib import Path
from relay.outbox import open_outbox
from tests.test_outbox import submission

async def main():
    async with open_outbox(Path(sys.argv[1])) as outbox:
        await outbox.register(["main"])
        for n in range(20):
            await outbox.accept([submission(f"{n}")])
        os.kill(os.getpid(), 9)

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=30)
    assert ended.returncode == -9
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        assert len(await outbox.claim("main", 99, NOW)) == 20


async def test_a_verdict_does_not_undo_what_ended(path):
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
        (claimed,) = await outbox.claim("main", 1, NOW)
        await outbox.register([])  # cancels it
        await outbox.record(claimed, attempt(claimed, "timeout"), Verdict(state=State.DEAD, steps=0))
        story = await outbox.story("evt_a")
    assert story.deliveries[0].state is State.CANCELLED


async def test_a_first_start_that_was_cut_off_is_started_again(path):
    """What it left is a journal to be rolled back, which a look that may not write cannot do."""
    script = """
import os, sqlite3, sys

db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN")
db.execute("CREATE TABLE half (a)")
for _ in range(100):
    db.execute("INSERT INTO half VALUES (randomblob(4000))")
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=30)
    assert path.with_name("relay.db-journal").stat().st_size > 0
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
