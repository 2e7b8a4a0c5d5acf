"""Delivery: a lane for each endpoint, all in one TaskGroup; endpoints come and go while the others run."""

import asyncio
from collections.abc import Callable, Iterable

from relay.lane import Lane
from relay.model import Endpoint, Health
from relay.outbox.sharing import Share

UNKNOWN = Health()


class Lanes:
    """All lanes, by endpoint; `make` makes one."""

    def __init__(self, make: Callable[[Endpoint, Health], Lane]) -> None:
        self._make = make
        self._lanes: dict[str, Lane] = {}
        self._shares: dict[str, Share] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()
        self.stopped = asyncio.Event()

    def sending(self) -> int:
        """Return how many attempts are under way."""
        return sum(lane.sending for lane in self._lanes.values())

    def wake(self, endpoints: Iterable[str]) -> None:
        """Tell lanes that something new waits for them."""
        for endpoint in endpoints:
            if endpoint in self._lanes:  # else it was removed a moment ago
                self._lanes[endpoint].wake()

    async def keep(self, endpoint: Endpoint, *, paused: bool, health: Health = UNKNOWN) -> None:
        """Deliver to an endpoint, from the next attempt on as it is now; a new one begins with `health`."""
        lane = self._lanes.get(endpoint.id)
        if lane is None:
            lane = self._lanes[endpoint.id] = self._make(endpoint, health)
            lane.share(self._shares.get(endpoint.id, Share()))
            if self._stop.is_set():
                lane.ended.set()  # it never begins
            elif self._tasks is not None:
                self._tasks.create_task(lane.run(), name=f"lane {endpoint.id}")
        lane.change(endpoint, paused=paused)

    async def resume(self, endpoint: str) -> None:
        """Think of an endpoint as if it had never failed."""
        await self._lanes[endpoint].resume()

    async def drop(self, endpoint: str) -> Health:
        """Deliver no more to an endpoint, hand back what is in flight, and return how it stood."""
        lane = self._lanes.pop(endpoint)
        if self._tasks is not None:  # else nothing was begun, and it is not there any more when all begin
            lane.stop(0)
            await lane.ended.wait()
        return lane.health

    def stood(self, endpoint: str, health: Health) -> None:
        """Tell a lane how its endpoint stands, as another relay found it."""
        if endpoint in self._lanes:
            self._lanes[endpoint].stood(health)

    def share(self, endpoint: str, share: Share) -> None:
        """Tell a lane which part of its endpoint's pace is ours."""
        self._shares[endpoint] = share
        if endpoint in self._lanes:
            self._lanes[endpoint].share(share)

    def set_right(self) -> None:
        """Tell all lanes that the clock was set."""
        for lane in self._lanes.values():
            lane.set_right()

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
