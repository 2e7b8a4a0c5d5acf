"""Stops, freezes and a slow or watched disk: what is promised holds meanwhile and afterwards."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.durability import shim
from tests.durability.plan import STEADY, Endpoint
from tests.durability.shim import SLOW_SYNC_MS
from tests.durability.world import World, posting
from tests.durability.zygote import Zygote
from tests.figures import figure
from tests.test_durability import needs_compiler

# Half of it is answered soon, half not before anyone stops waiting.
HALF = Endpoint(
    id="half", events=("*",), dawdles=0.5, hangs=0.5, timeout_seconds=20.0, schedule_ms=(50, 50, 50)
)
IN_FLIGHT = 24


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    async with Zygote(shim.build()) as started:
        yield started


async def in_flight(world: World) -> None:
    await world.start()
    await world.driver.post(IN_FLIGHT)
    await world.ledger.wait_for(IN_FLIGHT)


async def test_a_stop_lets_attempts_end_and_gives_back_the_rest(tmp_path, zygote):
    """What hangs longer than the grace is pending again, unspent; what was answered stays delivered."""
    async with World(tmp_path / "w", zygote, endpoints=[HALF], grace_seconds=1.0) as world:
        await in_flight(world)
        began = time.monotonic()
        world.signal(signal.SIGTERM)
        async with asyncio.timeout(1):
            while (await world.call("GET", "/readyz"))[0] != 503:
                await asyncio.sleep(0.005)
        code = await world.ended()
        took = time.monotonic() - began
        world.ledger.healed = True
        await world.start()
        async with asyncio.timeout(10):
            await world.drained()
        stories = await world.stories()
        report = await world.finish()
    assert code == 0
    assert took < 6
    assert not report.broken, str(report)
    assert report.figures["duplicates"] > 0, "what hung was cut off and came again"
    attempts = [len(delivery["attempts"]) for story in stories for delivery in story["deliveries"]]
    assert attempts == [1] * IN_FLIGHT, "what was cut off cost no attempt"
    figure(f"SIGTERM with {IN_FLIGHT} attempts in flight and a grace of 1 s: seconds to the end", took)


async def test_a_second_signal_ends_the_grace(tmp_path, zygote):
    async with World(tmp_path / "w", zygote, endpoints=[HALF], grace_seconds=60.0) as world:
        await in_flight(world)
        world.signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert world.alive
        began = time.monotonic()
        world.signal(signal.SIGTERM)
        assert await world.ended() == 0
        assert time.monotonic() - began < 6
        world.ledger.healed = True
        report = await world.finish()
    assert not report.broken, str(report)


async def test_an_application_that_posts_through_stops_loses_nothing(tmp_path, zygote):
    """Posts are refused or cut off while the relay stops; none is acknowledged and forgotten."""
    async with World(tmp_path / "w", zygote, seed=23) as world:
        async with posting(world):
            for _ in range(6):
                await world.start()
                await asyncio.sleep(0.25)
                assert await world.stop() == 0
        report = await world.finish()
    assert not report.broken, str(report)
    assert report.figures["crashes"] == 0
    figure("stops under load: lost / acknowledged", f"0 / {report.figures['acknowledged']} in 6")


async def test_a_frozen_relay_goes_on_where_it_was(tmp_path, zygote):
    """SIGSTOP for longer than an attempt may take, as a suspended machine does."""
    async with World(tmp_path / "w", zygote, seed=29) as world:
        await world.start()
        async with posting(world):
            await asyncio.sleep(0.3)
            world.signal(signal.SIGSTOP)
            await asyncio.sleep(2.5)  # the time that passes is the fault
            world.signal(signal.SIGCONT)
            await asyncio.sleep(0.3)
        report = await world.finish()
    assert not report.broken, str(report)


@needs_compiler
async def test_a_disk_that_takes_two_seconds_to_sync_holds_up_nobody_else(tmp_path, zygote):
    async with World(tmp_path / "w", zygote, endpoints=[STEADY], shimmed=True) as world:
        await world.start()
        await world.driver.post(5)
        world.disk[SLOW_SYNC_MS] = 2000
        slowest, began = 0.0, time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            posts = tasks.create_task(world.driver.post(2))
            while not posts.done():
                asked = time.monotonic()
                assert (await world.call("GET", "/livez"))[0] == 200
                slowest = max(slowest, time.monotonic() - asked)
                await asyncio.sleep(0.01)
        took = time.monotonic() - began
        world.disk[SLOW_SYNC_MS] = 0
        report = await world.finish()
    assert took >= 2, "no 202 before the sync"
    assert slowest < 1
    assert not report.broken, str(report)
    figure("/livez at its slowest while a sync takes 2 s: ms", slowest * 1000)


READER = """
import sqlite3, sys
for _ in range(20):
    db = sqlite3.connect(sys.argv[1], timeout=10)
    db.execute("SELECT count(*) FROM events").fetchone()
    db.close()
"""


@contextmanager
def reading(outbox: Path) -> Iterator[None]:
    """Another program opens the live outbox, reads and closes it, again and again."""
    reader = subprocess.Popen([sys.executable, "-c", READER, str(outbox)])
    try:
        yield
        assert reader.wait(30) == 0
    finally:
        reader.kill()
        reader.wait()


@needs_compiler
async def test_another_program_on_the_live_outbox_takes_nothing_away(tmp_path, zygote):
    """Had the relay ever opened its file by itself, the reader's close would remove the live log."""
    async with World(tmp_path / "w", zygote, seed=31, shimmed=True) as world:
        await world.start()
        log_ahead = world.outbox.with_name("relay.db-wal")
        inodes = set()
        async with posting(world):
            for _ in range(3):
                for path in ("/", "/livez", "/readyz", "/metrics", "/v1/backup", "/v1/webhooks/settings"):
                    await world.call("GET", path)
                with reading(world.outbox):
                    deadline = time.monotonic() + 0.3
                    while time.monotonic() < deadline:
                        inodes.add(log_ahead.stat().st_ino)
                        await asyncio.sleep(0.002)
            await world.kill()
        calls = [call for call in world.disk.calls() if call.what == "open" and call.file == "main"]
        report = await world.finish()
    assert len(inodes) == 1, "the log ahead of the file was never replaced"
    assert not report.broken, str(report)
    own = [call.caller for call in calls if "sqlite" not in call.caller]
    if len(own) == len(calls):
        pytest.skip("this Python has SQLite built in, so who opens a file cannot be told apart")
    first = next(index for index, call in enumerate(calls) if "sqlite" in call.caller)
    assert all("sqlite" in call.caller for call in calls[first:]), "opened only by SQLite from then on"
    figure("60 reads by another program: lost / acknowledged", f"0 / {report.figures['acknowledged']}")
