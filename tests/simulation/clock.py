"""The simulated machine's clock: a wall clock that somebody sets, over a time that only goes on."""

import asyncio
import math
from random import Random

from tests.simulation.loop import VirtualLoop

NOTICED_SECONDS = 60.0  # a wait for a wall-clock time may learn this late that the clock was set
WATCHED_SECONDS = 10.0  # and who watches for that, at the latest


class Wall:
    """What the wall clock says at a virtual time; outlives the process."""

    def __init__(self, start_ms: int) -> None:
        self.offset_ms = start_ms

    def at(self, now: float) -> int:
        return self.offset_ms + math.floor(now * 1000 + 1e-6)


class VirtualClock:
    """`relay.clock.Clock` of one process; as lazy as the system's in learning that it was set."""

    def __init__(self, loop: VirtualLoop, wall: Wall, chance: Random, noticed_seconds: float) -> None:
        self._loop = loop
        self._wall = wall
        self._chance = chance
        self._noticed_seconds = noticed_seconds
        self._waits: dict[int, asyncio.Timeout] = {}
        self._count = 0

    def now_ms(self) -> int:
        return self._wall.at(self._loop.now)

    def monotonic(self) -> float:
        return self._loop.now

    def was_set(self) -> None:
        """Let those who wait learn of it some time later, each at its own moment."""
        for wait in self._waits.values():
            self._loop.call_later(self._chance.random() * self._noticed_seconds, self._tell, wait)

    def _tell(self, wait: asyncio.Timeout) -> None:
        if wait in self._waits.values() and not wait.expired():
            wait.reschedule(self._loop.now)

    async def wait(self, wake: asyncio.Event, until_ms: int | None) -> None:
        if wake.is_set():
            return
        seconds = None if until_ms is None else max(0.0, (until_ms - self.now_ms()) / 1000)
        self._count += 1
        number = self._count
        try:
            async with asyncio.timeout(seconds) as self._waits[number]:
                await wake.wait()
        except TimeoutError:
            pass
        finally:
            del self._waits[number]


class WatchClock(VirtualClock):
    """The same for the one who watches for the clock being set; nothing else wakes it, which saves time."""

    async def wait(self, wake: asyncio.Event, until_ms: int | None) -> None:
        del until_ms
        await super().wait(wake, None)
