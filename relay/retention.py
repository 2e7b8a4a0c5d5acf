"""Retention: forgets old events in small steps, so that acceptance is not disturbed.

An event that is still owed to anyone is never forgotten, however old it is.
"""

import asyncio
from collections.abc import Callable

from relay.clock import Clock
from relay.outbox import FullError, Outbox

STEP_EVENTS = 100  # in one transaction: a few milliseconds
PAUSE_MS = 60_000  # between looks when nothing more is old enough


async def forget(outbox: Outbox, clock: Clock, retention_seconds: Callable[[], float]) -> None:
    """Keep forgetting what was accepted longer than this ago and is over; until cancelled."""
    never = asyncio.Event()
    while True:
        before_ms = clock.now_ms() - round(retention_seconds() * 1000)
        try:
            more = await outbox.forget(before_ms, STEP_EVENTS)
        except FullError:
            more = False  # even forgetting needs a little room; what is delivered meanwhile may make it
        if not more and not await give_back(outbox):
            await clock.wait(never, clock.now_ms() + PAUSE_MS)


async def give_back(outbox: Outbox) -> bool:
    """Give freed space back to the disk, a little; True if there is more to give."""
    try:
        return await outbox.shrink()
    except FullError:
        return False
