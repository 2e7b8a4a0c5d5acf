"""Migrations that are killed: an outbox of an older schema in, an end after every storage call, nothing lost.

The file is made older by taking the steps of a schema back, with what the relay has put into it.
"""

import asyncio
import signal
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from relay.outbox.schema import VERSIONS
from tests.durability import shim
from tests.durability.runs import AT_ONCE, STEADY_NOW, Result
from tests.durability.shim import KILL_AT
from tests.durability.world import EndedError, World
from tests.durability.zygote import Zygote

# What takes a file back to the version before, by the version it is of.
BACK: Mapping[int, tuple[str, ...]] = {
    3: ("DROP TABLE clock",),
    2: (
        "DROP INDEX deliveries_key",
        "DROP INDEX deliveries_due",
        "ALTER TABLE deliveries DROP COLUMN expired",
        "ALTER TABLE deliveries DROP COLUMN since",
        "ALTER TABLE deliveries DROP COLUMN held",
        "ALTER TABLE deliveries DROP COLUMN key",
        "ALTER TABLE endpoints DROP COLUMN health",
        "CREATE INDEX deliveries_due ON deliveries (endpoint, due, event) WHERE state = 0",
    ),
}
EVENTS = 3
MOST_CALLS = 400


def make_older(path: Path, version: int) -> None:
    """Take a file of the newest schema back to this one."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for each in range(len(VERSIONS), version, -1):
            for step in BACK[each]:
                db.execute(step)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


async def killed_migrations(
    folder: Path, zygote: Zygote, *, seed: int, version: int, numbers: Iterable[int] | None = None
) -> Result:
    """Kill the relay after its nth storage call on a file of this schema; start it again and see all arrive.

    For every n up to the last call of a start and a stop, or for these `numbers` of them.
    """
    result = Result(sampled=numbers is not None)
    left = iter(numbers if numbers is not None else range(1, MOST_CALLS))
    over = asyncio.Event()

    async def work() -> None:
        for number in left:
            async with World(
                folder / f"call-{number}", zygote, seed=seed + number, endpoints=[STEADY_NOW], shimmed=True
            ) as world:
                if not await killed_at(world, number, version):
                    over.set()
                report = await world.finish(replay=False)
                if report.broken:
                    report.examples["log"].append(f"call {number}: {world.log[-2000:]}")
                result.add(int(not over.is_set()), report)
            if over.is_set():
                return

    async with asyncio.TaskGroup() as workers:
        for _ in range(AT_ONCE):
            workers.create_task(work())
    return result


async def killed_at(world: World, number: int, version: int) -> bool:
    """Kill a migration at its nth storage call and start again; return whether there was such a call."""
    disk = world.disk
    assert disk is not None
    await world.start()
    await world.driver.post(EVENTS)
    await world.stop()
    make_older(world.outbox, version)
    disk[KILL_AT] = disk[shim.CALLS] + number
    try:
        await world.start()
        code = await world.stop()
    except EndedError as error:
        code = error.code
    world.mend_disk()
    await world.start()
    await world.driver.post(1)
    return code == -signal.SIGKILL
