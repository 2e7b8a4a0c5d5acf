"""Retention goes on beside acceptance and leaves it most of the time."""

import asyncio
from contextlib import suppress

from relay.retention import PAUSE_MS, REST, forget
from tests.clock import START_MS, MovedClock

STEP_SECONDS = 0.25


class SlowOutbox:
    """Forgets three steps' worth of events, each step taking a quarter of a second."""

    def __init__(self, clock: "WaitedClock") -> None:
        self._clock = clock
        self.asked: list[int] = []
        self._steps = 3

    async def forget(self, before_ms: int, limit: int) -> bool:
        self._clock.advance(seconds=STEP_SECONDS)
        self.asked.append(before_ms)
        self._steps -= 1
        return self._steps > 0

    async def shrink(self) -> bool:
        return False


class WaitedClock(MovedClock):
    """Notes how long somebody wants to wait, and lets that time pass at once."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_ms: list[int] = []

    async def wait(self, wake: asyncio.Event, until_ms: int | None) -> None:
        assert until_ms is not None
        self.waits_ms.append(until_ms - self.now_ms())
        if len(self.waits_ms) == 4:
            raise asyncio.CancelledError
        self.advance(seconds=self.waits_ms[-1] / 1000)


async def test_between_two_steps_the_outbox_is_left_alone_for_longer_than_a_step():
    clock = WaitedClock()
    outbox = SlowOutbox(clock)
    with suppress(asyncio.CancelledError):
        await forget(outbox, clock, lambda: 60.0, lambda: START_MS)

    rest_ms = STEP_SECONDS * 1000 * REST
    assert clock.waits_ms == [rest_ms, rest_ms, PAUSE_MS, PAUSE_MS]
    assert outbox.asked[0] == START_MS - 60_000
