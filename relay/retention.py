"""Retention: forgets old events in small steps, so that acceptance is not disturbed.

An event that is still owed to anyone is never forgotten, however old it is.
"""

import asyncio
import math
from collections.abc import Callable

from relay.clock import Clock
from relay.outbox import Outbox, UnavailableError

STEP_EVENTS = 50  # in one transaction: about a millisecond
REST = 4  # times as long as a step took, so that acceptance finds the outbox free
PAUSE_MS = 60_000  # between looks when nothing more is old enough


async def forget(
    outbox: Outbox, clock: Clock, retention_seconds: Callable[[], float], settled_ms: Callable[[], int]
) -> None:
    """Keep forgetting what was accepted longer than this ago and is over; until cancelled.

    What was accepted after `settled_ms()` stays: it may be submitted again, and has to be recognised then.
    """
    never = asyncio.Event()
    while True:
        begun, now_ms = clock.monotonic(), clock.now_ms()
        before_ms = min(now_ms - round(retention_seconds() * 1000), settled_ms())
        try:
            more = await outbox.forget(before_ms, STEP_EVENTS)
        except UnavailableError:
            more = False  # even forgetting needs a little room; what is delivered meanwhile may make it
        more = more or await give_back(outbox)
        rest_ms = math.ceil((clock.monotonic() - begun) * REST * 1000) if more else PAUSE_MS
        await clock.wait(never, clock.now_ms() + rest_ms)


async def give_back(outbox: Outbox) -> bool:
    """Give freed space back to the disk, a little; True if there is more to give."""
    try:
        return await outbox.shrink()
    except UnavailableError:
        return False
