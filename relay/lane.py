"""A lane brings one endpoint's deliveries to it: what is due goes out, what came of it is recorded.

It claims no more than it has slots for, makes an attempt for each, and sleeps until it is woken or the next
delivery falls due; it never polls. What follows from an outcome is decided in `retry.py` and `health.py`,
how fast to go in `pace.py`, and `report.py` says it. How to send is `sender.py`'s business, what is kept the
outbox's.
"""

import asyncio
import logging
import math
from collections.abc import Sequence

from relay import formats
from relay import health as rules
from relay.clock import JUMP_MS, ahead_ms
from relay.model import Attempt, Delivery, Endpoint, Health, Outcome, Standing, State, Verdict
from relay.outbox import Expired, UnavailableError
from relay.outbox.sharing import Share
from relay.pace import Bucket, Limit
from relay.report import Reporter
from relay.retry import JITTER, decide
from relay.surroundings import Surroundings

log = logging.getLogger("relay.delivery")

# A slot is free again once the receiver has answered; while its outcome waits for the next commit it
# counts here, so that a slow disk slows the lane down instead of filling the memory.
CLAIMED_PER_SLOT = 4
UNSPENT_REST_MS = 5_000  # after an attempt that could not be made
EXPIRY_REST_MS = 1_000  # at least, between two looks at what waits too long
OWN_REASONS = frozenset({"body_digest", "internal_error"})  # not the receiver's doing


class Lane:
    """Brings one endpoint's deliveries to it."""

    def __init__(self, endpoint: Endpoint, health: Health, around: Surroundings) -> None:
        self.endpoint = endpoint
        self.health = health
        self.ended = asyncio.Event()
        self._around = around
        self._reporter = Reporter(endpoint.id, around.make_news, around.clock, around.metrics.of(endpoint.id))
        self._outbox = around.outbox
        self._clock = around.clock
        self._wake = asyncio.Event()
        self._limit = Limit(endpoint.concurrency)
        self._bucket: Bucket | None = None
        self._claimed: dict[tuple[int, int], Delivery] = {}
        self.sending = 0
        self._probing = False
        self._rest_until_ms = 0
        self._expiry_ms = 0  # when to look at what waits too long; in the past: now
        self._ahead_ms = ahead_ms(around.clock)
        self._skipped_ms = 0  # by a clock set forward, and not yet made up for
        self._clock_was_set = True  # as far as this lane knows, while the relay was off
        self._to_keep = False  # whether how the endpoint stands has yet to be written
        self._drain: asyncio.Timeout | None = None
        self._stop_at: float | None = None
        self._paused = False
        self._share = Share()
        self._keep_pace()

    # What others tell it

    def wake(self) -> None:
        self._wake.set()

    def change(self, endpoint: Endpoint, *, paused: bool) -> None:
        """Go on with other settings from the next attempt; a paused endpoint keeps what waits for it."""
        self.endpoint = endpoint
        self._paused = paused
        self._keep_pace()
        self._expiry_ms = 0
        self._wake.set()

    def share(self, share: Share) -> None:
        """Go on with this part of the endpoint's pace; other relays have the rest."""
        if share != self._share:
            self._share = share
            self._keep_pace()
            self._wake.set()

    def stood(self, health: Health) -> None:
        """Take over how the endpoint stands, as another relay found it."""
        if health != self.health:
            if self.health.standing is Standing.DOWN and health.standing is Standing.UP:
                self._limit.start_over()
            self._stands(health)

    async def resume(self) -> None:
        """Think of the endpoint as if it had never failed; what waits begins to age now."""
        if self.health.standing is not Standing.UP:
            self._limit.start_over()
        self._stands(rules.resumed(self._clock.now_ms()))
        await self._keep_health()

    def set_right(self) -> None:
        """Take note that the clock was set."""
        self._stands(rules.set_right(self.health, self.endpoint, self._clock.now_ms()))
        self._rest_until_ms = 0
        self._clock_was_set = self._to_keep = True

    def stop(self, grace_seconds: float) -> None:
        """Start no attempt any more; cut off after the grace what is in flight. A second call shortens it."""
        self._stop_at = asyncio.get_running_loop().time() + grace_seconds
        if self._drain is not None and not self._drain.expired():
            self._drain.reschedule(self._stop_at)
        self._wake.set()

    # What it does

    async def run(self) -> None:
        """Deliver until `stop`, then give the attempts in flight their grace."""
        try:
            async with asyncio.timeout(None) as self._drain, asyncio.TaskGroup() as attempts:
                while not self._stopping():
                    # Cleared before the look: what is accepted during it must wake us.
                    self._wake.clear()
                    await self._set_clock_right()
                    await self._expire()
                    probe = self.health.standing is Standing.DOWN
                    for delivery in await self._take():
                        attempts.create_task(self._attempt(delivery, probe=probe))
                    await self._pause()
        except TimeoutError:
            log.warning(
                "drain_cut_off", extra={"endpoint": self.endpoint.id, "deliveries": len(self._claimed)}
            )
        self._drain = None
        self._reporter.ended()
        # What was cut off has no outcome, so it was no attempt: hand it back unspent.
        await self._outbox.release(list(self._claimed.values()))
        self.ended.set()

    def _stopping(self) -> bool:
        return self._stop_at is not None

    def _keep_pace(self) -> None:
        self._limit.cap(self._share.of(self.endpoint.concurrency))
        rate = self.endpoint.rate / self._share.relays if self.endpoint.rate is not None else None
        if rate is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.rate != rate:
            self._bucket = Bucket(rate, self._clock.monotonic())

    def _stands(self, health: Health) -> None:
        self.health = health
        self._expiry_ms = 0
        self._wake.set()

    @property
    def _free(self) -> int:
        free = min(
            self._limit.slots - self.sending,
            self.endpoint.concurrency * CLAIMED_PER_SLOT - len(self._claimed),
        )
        if self._bucket is not None:
            free = min(free, self._bucket.available(self._clock.monotonic()))
        return free

    def _opens_ms(self) -> int | None:
        """Return when the next attempt may begin, apart from what is due; None: not before we are woken."""
        if self._paused or self.health.standing is Standing.GONE:
            return None
        opens_ms = max(self.health.not_before_ms, self._rest_until_ms)
        if self.health.standing is Standing.DOWN:
            if self._probing or self._share.place > 0:  # one relay probes for all
                return None
            opens_ms = max(opens_ms, self.health.probe_at_ms)
        elif self._limit.slots <= self.sending:
            return None
        if self._bucket is not None:
            wait_ms = math.ceil(self._bucket.wait_seconds(self._clock.monotonic()) * 1000)
            opens_ms = max(opens_ms, self._clock.now_ms() + wait_ms)
        return opens_ms

    async def _take(self) -> list[Delivery]:
        """Claim what may go out now, and count it as under way."""
        now_ms = self._clock.now_ms()
        opens_ms, free = self._opens_ms(), self._free
        if self._stopping() or opens_ms is None or opens_ms > now_ms or free <= 0:
            return []
        standing, seconds = self.health.standing, self.endpoint.timeout_seconds
        if standing is Standing.DOWN:
            probe = await self._outbox.probe(self.endpoint.id, attempt_seconds=seconds)
            deliveries = [probe] if probe is not None else []
        else:
            deliveries = await self._outbox.claim(self.endpoint.id, free, now_ms, attempt_seconds=seconds)
        self._claimed |= {delivery.handle: delivery for delivery in deliveries}
        if self._stopping():  # told so during the look: `run` hands these back
            return []
        opens_ms = self._opens_ms()  # what was met or said during the look may have closed it
        if self.health.standing is not standing or opens_ms is None or opens_ms > self._clock.now_ms():
            await self._hand_back(deliveries)
            return []
        self._probing = standing is Standing.DOWN and bool(deliveries)
        self.sending += len(deliveries)
        self._limit.begun(self.sending)
        if self._bucket is not None:
            self._bucket.take(len(deliveries), self._clock.monotonic())
        return deliveries

    async def _hand_back(self, deliveries: Sequence[Delivery]) -> None:
        await self._outbox.release(deliveries)
        for delivery in deliveries:
            self._forget(delivery)
        self._wake.set()

    def _forget(self, delivery: Delivery) -> None:
        # What was handed back, or recorded late, on a slow or full disk, may be claimed again by now.
        if self._claimed.get(delivery.handle) is delivery:
            del self._claimed[delivery.handle]

    async def _pause(self) -> None:
        """Sleep until woken or until something can be done."""
        opens_ms, now_ms = self._opens_ms(), self._clock.now_ms()
        until_ms = [self._expiry_ms] if self._ages() else []
        if opens_ms is not None and self.health.standing is Standing.DOWN:
            if opens_ms > now_ms:  # else there is nothing to probe with: what comes wakes us
                until_ms.append(opens_ms)
        elif opens_ms is not None:
            due_ms = await self._outbox.due(self.endpoint.id)
            # With no place free although we are open, a slow disk holds us up: what it writes wakes us.
            if due_ms is not None and (self._free > 0 or opens_ms > now_ms):
                until_ms.append(max(opens_ms, due_ms))
        await self._clock.wait(self._wake, min(until_ms, default=None))

    async def _attempt(self, delivery: Delivery, *, probe: bool) -> None:
        number = delivery.attempts + 1
        outcome = None
        try:
            async with self._around.connections:
                at_ms, begun = self._clock.now_ms(), self._clock.monotonic()
                if self._may_begin(at_ms, probe=probe) and self._outbox.holds(delivery):
                    outcome = await self._outcome(delivery, number, at_ms)
        finally:
            self.sending -= 1
            self._probing = self._probing and not probe
            self._wake.set()
        if outcome is None:
            await self._hand_back([delivery])
            return
        if outcome.unspent:
            self._rest_until_ms = self._clock.now_ms() + UNSPENT_REST_MS
            self._reporter.unspent(delivery, number, outcome)
            await self._hand_back([delivery])
            return
        ended = self._clock.monotonic()
        self._limit.ended(outcome, ended - begun, ended)
        attempt = Attempt(
            number=number,
            at_ms=at_ms,
            milliseconds=outcome.milliseconds,
            status=outcome.status,
            reason=outcome.reason,
            answer=outcome.answer,
        )
        await self._settle(delivery, attempt, outcome, probe=probe)
        self._forget(delivery)
        self._wake.set()  # there may be a new due time to sleep for

    def _may_begin(self, now_ms: int, *, probe: bool) -> bool:
        """Tell whether what was claimed may still go out: it may have waited long for a connection."""
        standing = Standing.DOWN if probe else Standing.UP
        return (
            not self._stopping()
            and not self._paused
            and self.health.standing is standing
            and self.health.not_before_ms <= now_ms
        )

    async def _outcome(self, delivery: Delivery, number: int, at_ms: int) -> Outcome:
        if not formats.is_intact(delivery):
            # A bit that flipped on the disk passes SQLite's own checks; it must not be signed as ours.
            return Outcome(milliseconds=0, reason="body_digest")
        span = self._around.traces.attempt(self.endpoint, delivery, number, at_ms)
        outcome = None
        try:
            message = formats.message(
                delivery.event, delivery.format, attempt=number, at_ms=at_ms, trace=span.headers
            )
            outcome = await self._around.sender.send(self.endpoint, message)
        finally:
            span.ended(outcome)
        return outcome

    async def _settle(self, delivery: Delivery, attempt: Attempt, outcome: Outcome, *, probe: bool) -> None:
        """Draw the conclusions from an attempt, at once; then keep them, and tell whoever wants to know."""
        now_ms, before = self._clock.now_ms(), self.health
        verdict = self._decide(delivery, outcome, probe=probe)
        if outcome.reason not in OWN_REASONS:
            self.health = rules.after(
                before, outcome, endpoint=self.endpoint, delivery=delivery, probe=probe, now_ms=now_ms
            )
        health = self.health
        if before.standing is Standing.DOWN and health.standing is Standing.UP:
            self._limit.start_over()
        next_ms = rules.next_attempt_ms(health, verdict.due_ms) if verdict.due_ms is not None else None
        self._reporter.attempted(delivery, attempt.number, outcome, verdict, next_ms)
        dead = verdict.state is State.DEAD
        self._around.recent.attempted(self.endpoint.id, delivery.event, attempt, now_ms, dead=dead)
        news = self._reporter.turned(before, health, outcome)
        if dead:
            event = delivery.event
            news += self._reporter.dead(event.id, event.type, attempt.number, outcome.reason)
        receipts = await self._outbox.record(
            delivery, attempt, verdict, health=health if health is not before else None, news=news
        )
        self._around.wake(endpoint for receipt in receipts for endpoint in receipt.endpoints)

    def _decide(self, delivery: Delivery, outcome: Outcome, *, probe: bool) -> Verdict:
        if outcome.reason == "body_digest":
            return Verdict(state=State.DEAD, steps=delivery.steps)
        return decide(
            outcome,
            delivery,
            schedule=self.endpoint.retry_schedule,
            now_ms=self._clock.now_ms(),
            spread=self._around.spread(),
            probe=probe,
        )

    # What it does about what waits

    def _ages(self) -> bool:
        return not self._paused and self.health.standing is not Standing.GONE

    async def _expire(self) -> None:
        """Let be dead what has waited longer than `max_age`."""
        now_ms = self._clock.now_ms()
        if not self._ages() or now_ms < self._expiry_ms:
            return
        age_ms = round(self.endpoint.max_age_seconds * 1000)
        try:
            patience = await self._outbox.expire(
                self.endpoint.id, now_ms - age_ms, self.health.age_from_ms, now_ms
            )
        except UnavailableError:
            self._expiry_ms = now_ms + UNSPENT_REST_MS
            return
        oldest_ms = patience.oldest_ms if patience.oldest_ms is not None else now_ms
        self._expiry_ms = now_ms if patience.more else max(oldest_ms + age_ms, now_ms + EXPIRY_REST_MS)
        if patience.expired:
            await self._mourn(patience.expired)

    async def _mourn(self, expired: Sequence[Expired]) -> None:
        news = self._reporter.expired(expired)
        if not news:
            return
        try:
            receipts = await self._outbox.accept(news)
        except UnavailableError as error:
            log.warning("outbox_full", extra={"untold": len(news), "error": str(error)})
        else:
            self._around.wake(endpoint for receipt in receipts for endpoint in receipt.endpoints)

    async def _set_clock_right(self) -> None:
        """Wait for nothing longer than the longest step, if the clock was set.

        A lane looks for itself: whoever watches the clock may come after ages have been believed.
        """
        before_ms, self._ahead_ms = self._ahead_ms, ahead_ms(self._clock)
        if abs(self._ahead_ms - before_ms) > JUMP_MS:
            self._skipped_ms = max(0, self._skipped_ms + self._ahead_ms - before_ms)
            self.set_right()
        if not self._clock_was_set:
            return
        now_ms = self._clock.now_ms()
        longest_seconds = max(self.endpoint.retry_schedule, default=0.0) * (1 + JITTER)
        try:
            if self._skipped_ms:
                await self._outbox.postpone(self.endpoint.id, now_ms - self._skipped_ms, now_ms)
                self._skipped_ms = 0
            await self._outbox.advance(self.endpoint.id, now_ms + round(longest_seconds * 1000), now_ms)
            if self._to_keep:
                await self._keep_health()
        except UnavailableError:
            return  # the next turn tries again
        self._clock_was_set = False

    async def _keep_health(self) -> None:
        """Write how the endpoint stands; again if an attempt changed it, as one commit may hold both."""
        written = None
        while written is not self.health:
            written = self.health
            await self._outbox.keep_health(self.endpoint.id, written)
        self._to_keep = False
