"""A clock that tests move: waiting lasts until somebody advances it."""

import asyncio

START_MS = 1_768_471_200_000


class MovedClock:
    """`relay.clock.Clock`, standing still."""

    def __init__(self, now_ms: int = START_MS) -> None:
        self._now_ms = now_ms
        self._monotonic = 0.0
        self._moved = asyncio.Event()

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic(self) -> float:
        return self._monotonic

    def set(self, *, seconds: float) -> None:
        """Set the wall clock forward or back, as an operator or NTP would."""
        self._now_ms += round(seconds * 1000)
        self.advance(seconds=0.0)

    def advance(self, *, seconds: float) -> None:
        self._now_ms += round(seconds * 1000)
        self._monotonic += seconds
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def wait(self, wake: asyncio.Event, until_ms: int | None) -> None:
        while not wake.is_set() and (until_ms is None or self._now_ms < until_ms):
            moved = self._moved
            async with asyncio.TaskGroup() as tasks:
                waits = [tasks.create_task(wake.wait()), tasks.create_task(moved.wait())]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for each in waits:
                    each.cancel()
