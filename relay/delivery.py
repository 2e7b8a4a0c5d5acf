"""Delivery: what is due goes out, what came of it is recorded.

One lane an endpoint, all in one TaskGroup. A lane claims no more than it has slots for, makes an attempt
for each, and sleeps until it is woken or the next delivery falls due; it never polls. What follows from
an outcome is decided in `retry.py`, how to send is `sender.py`'s business, and what is kept the outbox's.
"""

import asyncio
import logging
import os
import random
from collections.abc import Callable, Iterable
from typing import Protocol

from relay import formats
from relay.clock import Clock
from relay.model import Attempt, Delivery, Endpoint, Message, Outcome, State, Verdict
from relay.outbox import Outbox
from relay.retry import decide

log = logging.getLogger("relay.delivery")

# A slot is free again once the receiver has answered; while its outcome waits for the next commit it
# counts here, so that a slow disk slows the lane down instead of filling the memory.
CLAIMED_PER_SLOT = 4


class Sends(Protocol):
    """What a lane needs of the sender."""

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome: ...


class Lane:
    """Brings one endpoint's deliveries to it.

    `connections` is what all lanes share: as many attempts at once as there are file descriptors for, so that
    running out of them is nobody's failed attempt.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        outbox: Outbox,
        sender: Sends,
        clock: Clock,
        connections: asyncio.Semaphore,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self.endpoint = endpoint
        self._connections = connections
        self._outbox = outbox
        self._sender = sender
        self._clock = clock
        self._spread = spread
        self._wake = asyncio.Event()
        self._claimed: dict[tuple[int, int], Delivery] = {}
        self._sending = 0
        self._drain: asyncio.Timeout | None = None
        self._stop_at: float | None = None
        self._paused = False
        self.ended = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    def change(self, endpoint: Endpoint, *, paused: bool) -> None:
        """Go on with other settings from the next attempt; a paused endpoint keeps what waits for it."""
        self.endpoint = endpoint
        self._paused = paused
        self._wake.set()

    def stop(self, grace_seconds: float) -> None:
        """Start no attempt any more; cut off after the grace what is in flight. A second call shortens it."""
        self._stop_at = asyncio.get_running_loop().time() + grace_seconds
        if self._drain is not None and not self._drain.expired():
            self._drain.reschedule(self._stop_at)
        self._wake.set()

    async def run(self) -> None:
        """Deliver until `stop`, then give the attempts in flight their grace."""
        try:
            async with asyncio.timeout(None) as self._drain, asyncio.TaskGroup() as attempts:
                while not self._stopping():
                    # Cleared before the look: what is accepted during it must wake us.
                    self._wake.clear()
                    for delivery in await self._claim():
                        attempts.create_task(self._attempt(delivery))
                    await self._pause()
        except TimeoutError:
            log.warning(
                "drain_cut_off", extra={"endpoint": self.endpoint.id, "deliveries": len(self._claimed)}
            )
        self._drain = None
        # What was cut off has no outcome, so it was no attempt: hand it back unspent.
        await self._outbox.release(list(self._claimed.values()))
        self.ended.set()

    def _stopping(self) -> bool:
        return self._stop_at is not None

    @property
    def _free(self) -> int:
        if self._paused:
            return 0
        slots = self.endpoint.concurrency
        return min(slots - self._sending, slots * CLAIMED_PER_SLOT - len(self._claimed))

    async def _claim(self) -> list[Delivery]:
        free = self._free
        if free <= 0 or self._stopping():
            return []
        deliveries = await self._outbox.claim(self.endpoint.id, free, self._clock.now_ms())
        self._claimed |= {delivery.handle: delivery for delivery in deliveries}
        if self._stopping():  # told so during the look: `run` hands these back
            return []
        self._sending += len(deliveries)
        return deliveries

    async def _pause(self) -> None:
        """Sleep until woken or, with a slot free, until the next delivery falls due."""
        due_ms = await self._outbox.due(self.endpoint.id) if self._free > 0 else None
        await self._clock.wait(self._wake, due_ms)

    async def _attempt(self, delivery: Delivery) -> None:
        number = delivery.attempts + 1
        try:
            async with self._connections:
                at_ms = self._clock.now_ms()
                outcome = await self._outcome(delivery, number, at_ms)
        finally:
            self._sending -= 1
            self._wake.set()
        verdict = self._decide(delivery, outcome)
        self._tell(delivery, number, outcome, verdict)
        attempt = Attempt(
            number=number,
            at_ms=at_ms,
            milliseconds=outcome.milliseconds,
            status=outcome.status,
            reason=outcome.reason,
            answer=outcome.answer,
        )
        await self._outbox.record(delivery, attempt, verdict)
        del self._claimed[delivery.handle]
        self._wake.set()  # there may be a new due time to sleep for

    async def _outcome(self, delivery: Delivery, number: int, at_ms: int) -> Outcome:
        event = delivery.event
        if formats.digest(event) != delivery.digest or formats.name(delivery.format) not in formats.FORMATS:
            # A bit that flipped on the disk passes SQLite's own checks; it must not be signed as ours.
            return Outcome(milliseconds=0, reason="body_digest")
        trace: tuple[tuple[str, str], ...] = ()
        if event.traceparent is not None:
            trace = (("traceparent", formats.child(event.traceparent, os.urandom(8))),)
            if event.tracestate is not None:
                trace += (("tracestate", event.tracestate),)
        message = formats.message(event, delivery.format, attempt=number, at_ms=at_ms, trace=trace)
        return await self._sender.send(self.endpoint, message)

    def _decide(self, delivery: Delivery, outcome: Outcome) -> Verdict:
        if outcome.reason == "body_digest":
            return Verdict(state=State.DEAD, steps=delivery.steps)
        return decide(
            outcome,
            steps=delivery.steps,
            schedule=self.endpoint.retry_schedule,
            now_ms=self._clock.now_ms(),
            spread=self._spread(),
        )

    def _tell(self, delivery: Delivery, number: int, outcome: Outcome, verdict: Verdict) -> None:
        if outcome.reason is None:
            if log.isEnabledFor(logging.DEBUG):
                log.debug("attempt_delivered", extra=self._fields(delivery, number, outcome))
            return
        fields = self._fields(delivery, number, outcome)
        fields |= {"reason": outcome.reason, "detail": outcome.detail}
        if verdict.state is State.PENDING:
            log.warning("attempt_failed", extra=fields | {"next_attempt_at_ms": verdict.due_ms})
        else:
            log.error("delivery_dead", extra=fields)

    def _fields(self, delivery: Delivery, number: int, outcome: Outcome) -> dict[str, object]:
        return {
            "event_id": delivery.event.id,
            "endpoint": self.endpoint.id,
            "attempt": number,
            "status": outcome.status,
            "milliseconds": outcome.milliseconds,
        }


class Lanes:
    """All lanes, by endpoint; `make` makes one."""

    def __init__(self, make: Callable[[Endpoint], Lane]) -> None:
        self._make = make
        self._lanes: dict[str, Lane] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()
        self.stopped = asyncio.Event()

    def wake(self, endpoints: Iterable[str]) -> None:
        """Tell lanes that something new waits for them."""
        for endpoint in endpoints:
            if endpoint in self._lanes:  # else it was removed a moment ago
                self._lanes[endpoint].wake()

    async def keep(self, endpoint: Endpoint, *, paused: bool) -> None:
        """Deliver to an endpoint, or from the next attempt on as it is now."""
        lane = self._lanes.get(endpoint.id)
        if lane is None:
            lane = self._lanes[endpoint.id] = self._make(endpoint)
            if self._stop.is_set():
                lane.ended.set()  # it never begins
            elif self._tasks is not None:
                self._tasks.create_task(lane.run(), name=f"lane {endpoint.id}")
        lane.change(endpoint, paused=paused)

    async def drop(self, endpoint: str) -> None:
        """Deliver no more to an endpoint; what is in flight is cut off and handed back."""
        lane = self._lanes.pop(endpoint)
        lane.stop(0)
        await lane.ended.wait()

    def stop(self, grace_seconds: float) -> None:
        self._stop.set()
        for lane in self._lanes.values():
            lane.stop(grace_seconds)

    async def run(self) -> None:
        """Deliver until `stop`; a fault of our own in one lane ends all, loudly."""
        async with asyncio.TaskGroup() as self._tasks:
            for lane in self._lanes.values():
                self._tasks.create_task(lane.run(), name=f"lane {lane.endpoint.id}")
            await self._stop.wait()  # also with no endpoint at all
        self.stopped.set()
