"""The clock: what time it is, and how to wait for a time.

One of the two seams of the relay (the outbox is the other): tests put their own clock here and move it.
The system's clock tells wall-clock time, which is what the outbox keeps, and sleeps on the loop's
monotonic time, so a clock that is set while we sleep cannot make a sleep endless.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

# A wall clock that was set forward while we slept is noticed after this long at the latest.
LONGEST_SLEEP_SECONDS = 60.0
JUMP_MS = 5_000  # what is less is drift that is being corrected
WATCH_MS = 10_000
WATCH_LOOP_SECONDS = 0.5


class Clock(Protocol):
    """Wall-clock time in milliseconds since 1970 (UTC), and seconds that never jump."""

    def now_ms(self) -> int: ...

    def monotonic(self) -> float: ...

    async def wait(self, wake: asyncio.Event, until_ms: int | None) -> None:
        """Return when `wake` is set or the time has come, whichever is first; early is allowed."""
        ...


class SystemClock:
    """The machine's own."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000  # noqa: TID251 - this is the clock the others ask

    def monotonic(self) -> float:
        return time.monotonic()

    async def wait(self, wake: asyncio.Event, until_ms: int | None) -> None:
        seconds = None
        if until_ms is not None:
            seconds = min(max(0.0, (until_ms - self.now_ms()) / 1000), LONGEST_SLEEP_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await wake.wait()
        except TimeoutError:
            pass


def ahead_ms(clock: Clock) -> int:
    """Return how far the wall clock is ahead of the one that never jumps; only a jump changes it by much."""
    return clock.now_ms() - round(clock.monotonic() * 1000)


async def watch(clock: Clock, jumped: Callable[[int], None]) -> None:
    """Call `jumped` with the milliseconds by which the wall clock was set, either way; until cancelled."""
    never = asyncio.Event()
    ahead = ahead_ms(clock)
    while True:
        await clock.wait(never, clock.now_ms() + WATCH_MS)
        before, ahead = ahead, ahead_ms(clock)
        if abs(ahead - before) > JUMP_MS:
            jumped(ahead - before)


async def watch_loop(late: Callable[[float], None]) -> None:
    """Tell `late` by how many seconds the event loop was late, twice a second; until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + WATCH_LOOP_SECONDS
        await asyncio.sleep(WATCH_LOOP_SECONDS)
        late(max(0.0, loop.time() - due))
