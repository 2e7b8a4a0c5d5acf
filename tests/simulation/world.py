"""A simulated world: the relay's lives one after the other, over one outbox, one network and one clock.

The relay's parts are joined by `relay.serve.join`, as in the real process; what `relay.serve.work` does
around them is done here, without a listener and without signals. A kill abandons the loop at a hop: what
the next life finds are the bytes that the files held at that moment.
"""

import asyncio
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from relay import serve
from relay.clock import watch
from relay.config import Config, load
from relay.delivery import Lanes
from relay.metrics import Metrics
from relay.outbox import Outbox, open_outbox
from relay.traces import Continued
from tests.simulation.clock import NOTICED_SECONDS, WATCHED_SECONDS, VirtualClock, Wall, WatchClock
from tests.simulation.driver import Driver, registered
from tests.simulation.journal import Journal
from tests.simulation.loop import Crash, CrashedError, Disk, VirtualLoop, hops_inside
from tests.simulation.network import Network
from tests.simulation.plan import FAULTS_END, HOUR, Plan, Process, make_plan
from tests.simulation.witness import SNAPSHOT, Witness

DRAIN_SECONDS = HOUR  # beyond the longest step: for what waits behind a rate, and the last attempts
LOOK_SECONDS = 60.0
NOTHING: Mapping[str, Any] = {}


class World:
    """One seed's; `run` lets it happen, the journal tells what did."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.plan: Plan = make_plan(seed)
        self.journal = Journal()
        self.now = 0.0
        self.drained_after: float | None = None
        chance = Random(seed ^ 0x5EED)
        self.network = Network(self.journal, Random(chance.random()), self.plan.spells)
        self._chance = chance
        self._wall = Wall(self.plan.start_ms)
        self._driver = Driver(self.plan.actions, self.journal, Random(chance.random()))
        self._driver.change_clock = self._set_clock
        self._driver.config = self._config
        self._folder = folder
        self._lives = 0
        self._loop: VirtualLoop | None = None
        self._clocks: list[VirtualClock] = []
        self.journal.clock = self._clock

    def run(self) -> None:
        for process in self.plan.processes:
            if process.until > self.now:
                self._live(process)
                self._rest(process.down_seconds)
        with closing(sqlite3.connect(self._home / "relay.db")) as db:
            self.journal.note("kept_on_disk", rows=db.execute(SNAPSHOT).fetchall(), endpoints={})

    def _clock(self) -> tuple[float, int]:
        now = self._loop.now if self._loop is not None else self.now
        return now, self._wall.at(now)

    def _set_clock(self, by_ms: int) -> None:
        by_ms = max(by_ms, -self._clock()[1])  # not before 1970
        self._wall.offset_ms += by_ms
        self.journal.note("clock_set", by_ms=by_ms, running=bool(self._clocks))
        for clock in self._clocks:
            clock.was_set()

    def _rest(self, seconds: float) -> None:
        """Let time go by without the relay."""
        until = self.now + seconds
        for action in self._driver.take_due("set_clock", until):
            self.now = max(self.now, action.at)
            self._set_clock(action.what["by_ms"])
        self.now = until

    def _live(self, process: Process) -> None:
        disk = Disk(self.plan.slow_share, self.plan.slow_seconds)
        loop = self._loop = VirtualLoop(Random(self._chance.random()), disk, now=self.now)
        if process.crash:
            loop.crash = Crash(process.until, process.after_hop, process.skip_hops)
        try:
            loop.run_until_complete(self._life(loop, process))
            self.journal.note("stopped")
            loop.close()
        except CrashedError:
            self.journal.note("crashed")
            self._abandon(loop)
        finally:
            self.now, self._loop, self._clocks = loop.now, None, []

    def _abandon(self, loop: VirtualLoop) -> None:
        """Keep what the files hold at this moment, and nothing else of the process."""
        now, self.journal.alive = loop.now, False
        before = self._home
        self._lives += 1
        shutil.copytree(before, self._home, ignore=shutil.ignore_patterns("*-shm"))
        loop.bury()
        shutil.rmtree(before)
        loop.now, self.journal.alive = now, True
        self._driver.cut_off()

    @property
    def _home(self) -> Path:
        return self._folder / f"life{self._lives}"

    async def _life(self, loop: VirtualLoop, process: Process) -> None:
        self._home.mkdir(exist_ok=True)
        config = self._config(process.absent)
        clock = VirtualClock(loop, self._wall, Random(self._chance.random()), NOTICED_SECONDS)
        watched = WatchClock(loop, self._wall, Random(self._chance.random()), WATCHED_SECONDS)
        self._clocks = [clock, watched]
        async with open_outbox(self._home / "relay.db", synchronous="off") as outbox:
            await self._note_what_is_kept(outbox)
            state, lanes = await serve.join(
                config, Witness(outbox, self.journal), self.network, clock,
                metrics=Metrics(), traces=Continued(),
            )  # fmt: skip
            self.journal.note("started", registered=registered(state.endpoints))
            async with asyncio.TaskGroup() as tasks:
                chores = [
                    tasks.create_task(self._forget(outbox, clock)),
                    tasks.create_task(state.endpoints.end_overlaps()),
                    tasks.create_task(watch(watched, partial(self._clock_was_set, lanes))),
                    tasks.create_task(lanes.run()),
                ]
                if process.until == float("inf"):
                    await self._driver.drive(state, FAULTS_END)
                    await self._drain(state)
                else:
                    await self._driver.drive(state, process.until)
                lanes.stop(process.grace_seconds)
                await lanes.stopped.wait()
                for chore in chores[:-1]:
                    chore.cancel()

    def _clock_was_set(self, lanes: Lanes, by_ms: int) -> None:
        self.journal.note("noticed", by_ms=by_ms)
        lanes.set_right()

    async def _forget(self, outbox: Outbox, clock: VirtualClock) -> None:
        """Forget every hour rather than every minute, which saves time."""
        while True:
            await asyncio.sleep(HOUR)
            before_ms = clock.now_ms() - round(self.plan.retention_seconds * 1000)
            while await outbox.forget(before_ms, 100):
                pass

    async def _drain(self, state: Any) -> None:
        """Let everything go, and wait until nothing is pending."""
        self.journal.note("faults_end")
        for each in state.endpoints.all():
            await self._driver.let_go(state, each.endpoint.id)
        longest = max(max(each.endpoint.retry_schedule, default=0.0) for each in state.endpoints.all())
        begun = self._clock()[0]
        while self._clock()[0] < begun + longest * 1.1 + DRAIN_SECONDS:
            backlog = await state.outbox.backlog()
            if not any(each.pending for each in backlog.values()):
                self.drained_after = self._clock()[0] - begun
                break
            await asyncio.sleep(LOOK_SECONDS)

    async def _note_what_is_kept(self, outbox: Any) -> None:
        rows = await outbox._run(lambda db: db.execute(SNAPSHOT).fetchall())
        kept = {
            each.id: (each.paused, each.health, each.settings is not None)
            for each in await outbox.endpoints()
        }
        self.journal.note("kept_on_disk", rows=rows, endpoints=kept)

    def _config(self, absent: frozenset[str], changes: Mapping[str, Any] = NOTHING) -> Config:
        """Load the config from a file, as a person writes it; `changes` are those of a single endpoint."""
        tables = [f"[delivery]\n{_toml(self.plan.defaults)}"]
        for id_, each in self.plan.endpoints.items():
            if id_ not in absent:
                settings = each | (changes if changes.get("id") == id_ else {})
                tables.append(f"[[endpoints]]\n{_toml(settings)}")
        path = self._folder / "relay.toml"
        path.write_text("\n".join(tables))
        return load(path, {})


def _toml(table: dict[str, Any]) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in table.items())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let all chance come from the seed, and the relay keep quiet."""
    urandom, level = os.urandom, logging.getLogger("relay").level
    random.seed(seed)
    os.urandom = Random(seed).randbytes
    logging.getLogger("relay").setLevel(logging.CRITICAL + 1)
    try:
        with hops_inside():
            yield
    finally:
        os.urandom = urandom
        logging.getLogger("relay").setLevel(level)
