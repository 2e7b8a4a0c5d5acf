"""The outbox's bounds, the space it frees, and its backup: it never grows past what it may."""

import asyncio
import sqlite3
import stat
from pathlib import Path

import pytest

from relay.model import State
from relay.outbox import Bounds, FullError, Outbox, StoppingError, backup, open_outbox
from relay.outbox import sqlite as verbs
from tests.test_outbox import DELIVERED, NOW, attempt, submission

LARGE = b'"%b"' % (b"x" * 20_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


async def deliver(outbox: Outbox, count: int) -> None:
    for delivery in await outbox.claim("main", count, NOW):
        await outbox.record(delivery, attempt(delivery), DELIVERED)


async def fill(outbox: Outbox, content: bytes = LARGE, most: int = 5000) -> int:
    """Accept until there is no room; return how many there was room for."""
    for number in range(most):
        try:
            await outbox.accept([submission(f"fill{number}", data=content)])
        except FullError:
            return number
    raise AssertionError("it is never full")


async def test_no_more_deliveries_are_pending_than_may_be(path):
    """Deliveries count, not events; what is delivered makes room at once, without a restart."""
    async with open_outbox(path, bounds=Bounds(max_pending=5)) as outbox:
        await outbox.register(["main", "other"])
        await outbox.accept([submission("a", "main", "other"), submission("b", "main", "other")])
        with pytest.raises(FullError, match=r"5 deliveries are pending: raise outbox\.max_pending"):
            await outbox.accept([submission("c", "main", "other")])
        assert outbox.trouble() is None, "there is room for one"
        await outbox.accept([submission("d")])
        assert "max_pending" in (outbox.trouble() or "")
        await deliver(outbox, 1)
        assert outbox.trouble() is None
        await outbox.accept([submission("e")])
        assert await outbox.story("evt_c") is None


async def test_of_a_batch_that_gathers_only_what_fits_is_taken(path):
    async with open_outbox(path, bounds=Bounds(max_pending=10)) as outbox:
        await outbox.register(["main"])
        accepting = [
            asyncio.get_running_loop().create_task(outbox.accept([submission(f"{n}")])) for n in range(30)
        ]
        done, _ = await asyncio.wait(accepting)
        taken = [each for each in done if each.exception() is None]
        assert 1 <= len(taken) <= 10
        assert (await outbox.backlog())["main"].pending == len(taken)


async def test_a_full_outbox_refuses_events_records_outcomes_and_recovers_by_itself(path):
    """Soft before hard: the reserve is for the outcomes of what was taken."""
    largest = 4 << 20
    async with open_outbox(path, bounds=Bounds(max_bytes=largest)) as outbox:
        await outbox.register(["main"])
        taken = await fill(outbox)
        assert taken > 50
        assert "raise outbox.max_size" in (outbox.trouble() or "")
        await deliver(outbox, taken)
        assert (await outbox.backlog())["main"].pending == 0
        assert path.stat().st_size <= largest

        while await outbox.forget(NOW + 1, 100):
            pass
        assert outbox.trouble() is None
        assert await fill(outbox) >= taken * 0.8, "freed space is used again"
    assert path.stat().st_size <= largest


async def test_at_the_hard_bound_outcomes_wait_and_nothing_is_lost(path, monkeypatch):
    """Whatever the reserve was used up by, the disk stays capped."""
    monkeypatch.setattr("relay.outbox.admission.RESERVED_SHARE", 1 << 60)  # no reserve
    monkeypatch.setattr("relay.outbox.committer.FULL_RETRY_SECONDS", 0.02)
    largest = 1 << 20
    async with open_outbox(path, bounds=Bounds(max_bytes=largest)) as outbox:
        await outbox.register(["main"])
        taken = await fill(outbox)
        (claimed,) = await outbox.claim("main", 1, NOW)
        await outbox.record(claimed, attempt(claimed), DELIVERED)
        assert (await outbox.backlog())["main"].pending == taken - 1
        assert path.stat().st_size <= largest


async def test_what_a_backlog_freed_is_given_back_to_the_disk(path, monkeypatch):
    """A bad day must not cost its disk space for ever; and the log ahead of the file stays bounded."""
    monkeypatch.setattr(verbs, "KEPT_FREE", 64)
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        for start in range(0, 600, 100):
            await outbox.accept([submission(f"{n}", data=LARGE) for n in range(start, start + 100)])
        await deliver(outbox, 600)
        await outbox._run(lambda db: db.execute("PRAGMA wal_checkpoint").fetchall())
        large = path.stat().st_size
        while await outbox.forget(NOW + 1, 100):
            pass
        steps = 0
        while await outbox.shrink():
            steps += 1
        await outbox._run(lambda db: db.execute("PRAGMA wal_checkpoint").fetchall())
        assert path.stat().st_size < large / 10
        assert steps > 10, "small steps, for others commit with them"
        assert path.with_name("relay.db-wal").stat().st_size < 16 << 20


async def test_a_backup_under_load_holds_what_was_acknowledged_before(path, tmp_path):
    """A copy that is torn, or lacks what was promised, is worse than none."""
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        for start in range(0, 300, 100):
            await outbox.accept([submission(f"{n}", data=LARGE) for n in range(start, start + 100)])
        stop, later = asyncio.Event(), 0

        async def go_on() -> None:
            nonlocal later
            while not stop.is_set():
                await outbox.accept([submission(f"later{later}", data=LARGE)])
                later += 1
                await deliver(outbox, 1)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(go_on())
            while later < 5:
                await asyncio.sleep(0.001)
            before = later
            async with outbox.backup() as copied:
                assert later > before, "everything goes on meanwhile"
                assert stat.S_IMODE(copied.stat().st_mode) == 0o600
                restored = copied.rename(tmp_path / "restored.db")
            stop.set()
        assert [each.name for each in tmp_path.glob("relay.db.backup-*")] == []
    with sqlite3.connect(restored) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    async with open_outbox(restored) as outbox:
        await outbox.register(["main"])
        kept = [f"evt_{n}" for n in range(300)] + [f"evt_later{n}" for n in range(before)]
        assert [id_ for id_ in kept if await outbox.story(id_) is None] == []
        story = await outbox.story("evt_0")
        assert story.deliveries[0].state in {State.PENDING, State.DELIVERED}


async def test_a_stop_gives_a_backup_up_and_leaves_nothing_of_it(path, tmp_path, monkeypatch):
    monkeypatch.setattr(backup, "REST_SECONDS", 0.05)
    monkeypatch.setattr(backup, "STEP_PAGES", 1)
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission(f"{n}", data=LARGE) for n in range(50)])
        copying = asyncio.get_running_loop().create_task(enter(outbox))
        while not list(tmp_path.glob("relay.db.backup-*")):
            await asyncio.sleep(0.001)
    with pytest.raises(StoppingError):
        await copying
    assert list(tmp_path.glob("relay.db.backup-*")) == []


async def enter(outbox: Outbox) -> None:
    async with outbox.backup():
        raise AssertionError("it was to be given up")


async def test_a_backup_that_the_disk_has_no_room_for_is_refused(path, monkeypatch):
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        outbox._room.used_bytes = 1 << 60
        with pytest.raises(FullError, match="there is no room"):
            await enter(outbox)
        assert outbox.trouble() is None


async def test_what_a_killed_relay_left_of_a_backup_is_removed(path):
    async with open_outbox(path):
        pass
    left = path.with_name("relay.db.backup-0011aabb")
    left.write_bytes(b"half")
    async with open_outbox(path):
        assert not left.exists()
