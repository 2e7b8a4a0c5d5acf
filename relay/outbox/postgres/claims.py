"""What we have claimed: asked of the database, and remembered for as long as it is ours.

A claim is fenced by its epoch, which none had before: what is written later under it counts only if nobody
else has claimed the delivery since. Whether an attempt may begin is known without asking, by our own clock: a
process that was stopped for a while wakes up to find that it may not.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from typing import Any

from relay.model import Delivery
from relay.outbox import AwayError, UnavailableError
from relay.outbox.postgres import statements
from relay.outbox.postgres.links import AgainError, Links
from relay.outbox.postgres.membership import Membership
from relay.outbox.sharing import Sharing
from relay.outbox.waiting import Place

BEGIN_SECONDS = 60.0  # after its claim at the latest an attempt begins,
LEASE_SECONDS = 300.0  # and so long after its end the claim lapses: time to record it, also on a bad day
LOST_SECONDS = 60.0  # that a claim may still be made after we have hung up
BUSY_MS = 20  # before the next look, when all that is due is just being claimed by others
AWAY_MS = 1_000  # and when the database is away


@dataclass(frozen=True, slots=True)
class Hold:
    """A claim of ours."""

    of: int  # the epoch that the delivery was handed out with,
    epoch: int  # and that of the claim it is held by now
    relay: int  # who we were then
    until: float  # when an attempt may begin, by the monotonic clock


class Claims:
    """Claims for lanes; what a lane did not live to get is given to `release`."""

    def __init__(
        self,
        links: Links,
        member: Membership,
        sharing: Sharing,
        tasks: asyncio.TaskGroup,
        release: Callable[[Sequence[Delivery]], Awaitable[None]],
    ) -> None:
        self._links = links
        self._member = member
        self._look_seconds = sharing.look_seconds
        self._tasks = tasks
        self._release = release
        self._held: dict[tuple[int, int], Hold] = {}
        self._calls = count(1)
        self._lost: dict[int, tuple[int, float]] = {}  # calls without an answer, and until when to look

    def holds(self, delivery: Delivery) -> bool:
        """Tell whether an attempt may begin: whether nobody else can have claimed it."""
        hold = self._hold(delivery)
        return (
            hold is not None
            and hold.relay == self._member.id
            and self._member.holds()
            and time.monotonic() < hold.until
        )

    def epoch(self, delivery: Delivery) -> int | None:
        """Return the epoch of the claim that a delivery is held by; None: it is not."""
        hold = self._hold(delivery)
        return hold.epoch if hold is not None else None

    def forget(self, delivery: Delivery) -> int | None:
        """Hold a delivery no more; return the epoch of its claim, if it was held."""
        hold = self._hold(delivery)
        return self._held.pop(delivery.handle).epoch if hold is not None else None

    async def take(
        self, of: tuple[str, int], now_ms: int, after: Place, limit: int, attempt_seconds: float
    ) -> list[Delivery]:
        """Claim for an endpoint, by id and number; what whoever asked does not live to get is handed back.

        Raises AwayError.
        """
        task = self._tasks.create_task(self._take(of, now_ms, after, limit, attempt_seconds))
        try:
            claimed = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._hand_back)
            raise
        if isinstance(claimed, AwayError):
            raise claimed
        return claimed

    async def next_due(self, number: int, now_ms: int) -> int | None:
        """Return when the next of an endpoint falls due that nobody has claimed."""
        try:
            async with self._links.link() as link:
                ((_, due_ms),) = await link.fetch(statements.NEXT_DUE, [number])
        except (AwayError, AgainError):
            return now_ms + AWAY_MS
        if due_ms is None or due_ms > now_ms:
            return due_ms  # type: ignore[no-any-return]
        return now_ms + BUSY_MS

    async def keep_freeing(self) -> None:
        """Free what was claimed in answers that never came; until cancelled."""
        while True:
            await asyncio.sleep(self._look_seconds)
            with suppress(UnavailableError, AgainError):
                await self.free_what_was_lost()

    async def free_what_was_lost(self) -> int:
        """Free what was claimed in answers that never came, as far as it was; return how much.

        Looked for again and again: a server that hangs may do it after we have hung up.
        """
        if not self._lost:
            return 0
        now, freed = time.monotonic(), 0
        async with self._links.link() as link:
            for relay in {each for each, _ in self._lost.values()}:
                calls = [call for call, (each, _) in self._lost.items() if each == relay]
                freed += len(await link.fetch(statements.LOST, relay, calls))
        self._lost = {call: lost for call, lost in self._lost.items() if lost[1] > now}
        return freed

    def _hold(self, delivery: Delivery) -> Hold | None:
        hold = self._held.get(delivery.handle)
        return hold if hold is not None and hold.of == delivery.epoch else None

    async def _take(
        self, of: tuple[str, int], now_ms: int, after: Place, limit: int, attempt_seconds: float
    ) -> list[Delivery] | AwayError:
        (endpoint, number), relay, begun = of, self._member.id, time.monotonic()
        call, lease = next(self._calls), timedelta(seconds=attempt_seconds + LEASE_SECONDS)
        try:
            async with self._links.link() as link:
                rows = await link.fetch(statements.CLAIM, number, now_ms, *after, limit, relay, lease, call)
        except AgainError:
            return []
        except AwayError as error:
            self._lost[call] = (relay, begun + LOST_SECONDS)
            return error  # raised where somebody waits for it
        claimed: list[Delivery] = []
        for row in rows:
            delivery = statements.delivery(row, number, endpoint)
            hold = Hold(delivery.epoch, delivery.epoch, relay, begun + BEGIN_SECONDS)
            before = self._held.get(delivery.handle)
            if before is None:
                self._held[delivery.handle] = hold
                claimed.append(delivery)
            else:  # our own claim of it was lost while its attempt is under way: it goes on under this one
                self._held[delivery.handle] = replace(hold, of=before.of)
        return claimed

    def _hand_back(self, task: "asyncio.Task[list[Delivery] | AwayError]") -> None:
        if not task.cancelled() and task.exception() is None and isinstance(claimed := task.result(), list):
            self._tasks.create_task(self._released(claimed))

    def _released(self, claimed: list[Delivery]) -> Coroutine[Any, Any, None]:
        async def release() -> None:
            await self._release(claimed)

        return release()
