"""Lanes over a real outbox in virtual time: days pass in as long as it takes to do what happens in them.

A receiver is a rule: what is answered to a message, and after how long. The clock goes on when nothing is
left to do: no task is ready, and nobody waits for the outbox's thread.
"""

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from relay import egress, formats
from relay.catalogue import Catalogue
from relay.clock import watch
from relay.config import DeliverySettings
from relay.delivery import Lanes
from relay.endpoints import Endpoints
from relay.ingest import EventIds, Ingest, iso
from relay.model import Endpoint, Event, Message, Outcome, Owed, Submission
from relay.outbox import DeliveryStory, Outbox, open_outbox
from relay.subscription import Subscriptions
from tests.clock import START_MS
from tests.lanes import OK, make_lanes

LOOK_MS = 300_000  # how often lanes and the watch look at a clock that may be set; really 60 and 10 s
QUIET_PASSES = 16  # of the event loop, with nobody waiting for the outbox's thread


def refusal(status: int = 500, retry_after: str | None = None) -> Outcome:
    return Outcome(milliseconds=3, status=status, reason=f"http_{status}", retry_after=retry_after)


class WorldClock:
    """`relay.clock.Clock` as the system's behaves, but for going on only by `World`."""

    def __init__(self, now_ms: int = START_MS) -> None:
        self._ahead_ms = now_ms
        self._elapsed_ms = 0
        self.longest_sleep_ms = 86_400_000  # longer than the system's: that is for clocks that are set
        self._sleeping: dict[asyncio.Timeout, int] = {}

    def now_ms(self) -> int:
        return self._ahead_ms + self._elapsed_ms

    def monotonic(self) -> float:
        return self._elapsed_ms / 1000

    def set(self, *, seconds: float) -> None:
        """Set the wall clock forward or back, as an operator or NTP would."""
        self._ahead_ms += round(seconds * 1000)

    @property
    def next_ms(self) -> float:
        """Milliseconds until somebody has slept enough."""
        return min(self._sleeping.values(), default=math.inf) - self._elapsed_ms

    def advance(self, milliseconds: int) -> None:
        self._elapsed_ms += milliseconds
        now = asyncio.get_running_loop().time()
        for sleep, until_ms in list(self._sleeping.items()):
            if until_ms <= self._elapsed_ms:
                del self._sleeping[sleep]
                if not sleep.expired():
                    sleep.reschedule(now)

    async def wait(self, wake: asyncio.Event, until_ms: int | None) -> None:
        wait_ms = None
        if until_ms is not None:
            wait_ms = min(max(0, until_ms - self.now_ms()), self.longest_sleep_ms)
        await self._sleep(wake, wait_ms)

    async def sleep(self, seconds: float) -> None:
        await self._sleep(asyncio.Event(), round(seconds * 1000))

    async def _sleep(self, wake: asyncio.Event, wait_ms: int | None) -> None:
        if wait_ms == 0:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(None) as sleep:
                if wait_ms is not None:
                    self._sleeping[sleep] = self._elapsed_ms + wait_ms
                try:
                    await wake.wait()
                finally:
                    self._sleeping.pop(sleep, None)
        except TimeoutError:
            pass


class Seldom:
    """The same clock for a watch that looks less often."""

    def __init__(self, clock: WorldClock) -> None:
        self.now_ms, self.monotonic = clock.now_ms, clock.monotonic
        self._wait = clock.wait

    async def wait(self, wake: asyncio.Event, _until_ms: int | None) -> None:
        await self._wait(wake, self.now_ms() + LOOK_MS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request as its receiver saw it."""

    at: float  # seconds since the world began, by a clock that never jumps
    endpoint: str
    id: str
    number: int  # webhook-attempt
    at_once: int
    outcome: Outcome
    message: Message


Rule = Callable[[Message, float], Outcome | tuple[Outcome, float]]


class World:
    """One relay's outbox, lanes and endpoints, and the receivers around them."""

    def __init__(self, path: Path, *endpoints: Endpoint, now_ms: int = START_MS) -> None:
        self.path = path
        self.configured = list(endpoints)
        self.clock = WorldClock(now_ms)
        self.sent: list[Sent] = []
        self.rules: dict[str, Rule] = defaultdict(lambda: lambda message, at: OK)
        self.at_once: Counter[str] = Counter()
        self.outbox: Outbox
        self.lanes: Lanes
        self.endpoints: Endpoints
        self.ingest: Ingest
        self._hops = 0
        self._ids = EventIds()
        self.names: dict[str, str] = {}  # of events, by their ids
        self.keys: dict[str, str] = {}  # for tests that keep them, by name

    @asynccontextmanager
    async def running(self, *, watching: bool = False) -> AsyncIterator["World"]:
        """Start the relay, and stop it, again and again; `watching` the clock, which may be set."""
        self.clock.longest_sleep_ms = LOOK_MS if watching else 86_400_000
        async with open_outbox(self.path, synchronous="off") as self.outbox:
            self._count_hops()
            await self._join()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.lanes.run())
                if watching:
                    watch_ = tasks.create_task(watch(Seldom(self.clock), lambda _: self.lanes.set_right()))
                yield self
                self.lanes.stop(0.0)
                await self.lanes.stopped.wait()
                if watching:
                    watch_.cancel()

    async def _join(self) -> None:
        """Join the parts the way `serve` does; retries come exactly in the middle of their jitter."""
        self.ingest = Ingest(
            outbox=self.outbox, subscriptions=Subscriptions([]), clock=self.clock,
            wake=self._wake, catalogue=Catalogue(()),
        )  # fmt: skip
        self.lanes = make_lanes(self.outbox, self, self.clock, make_news=self.ingest.news)
        self.endpoints = Endpoints(
            configured=self.configured, defaults=DeliverySettings(), policy=egress.Policy(),
            outbox=self.outbox, lanes=self.lanes, clock=self.clock, change=self.ingest.subscribe,
        )  # fmt: skip
        await self.endpoints.open()

    def _wake(self, ids: Iterable[str]) -> None:
        self.lanes.wake(ids)

    def _count_hops(self) -> None:
        db = self.outbox._committer._db  # type: ignore[attr-defined]
        execute = db._execute

        async def counted(*args: object, **kwargs: object) -> object:
            self._hops += 1
            try:
                return await execute(*args, **kwargs)
            finally:
                self._hops -= 1

        db._execute = counted

    # The receivers

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        self.at_once[endpoint.id] += 1
        try:
            at, at_once = self.clock.monotonic(), self.at_once[endpoint.id]
            answer = self.rules[endpoint.id](message, at)
            outcome, seconds = answer if isinstance(answer, tuple) else (answer, 0.0)
            self.sent.append(
                Sent(
                    at=at, endpoint=endpoint.id, id=self.name(message),
                    number=message.attempt, at_once=at_once, outcome=outcome, message=message,
                )
            )  # fmt: skip
            if seconds:
                await self.clock.sleep(seconds)
        finally:
            self.at_once[endpoint.id] -= 1
        return outcome

    # What tests do

    async def accept(self, *names: str, to: tuple[str, ...] = (), key: str | None = None) -> None:
        """Accept an event for each name, owed to these endpoints or to all that are configured."""
        now_ms = self.clock.now_ms()
        wanting = [each for each in self.configured if not to or each.id in to]
        owed = tuple(Owed(each.id, each.format, each.order == "key") for each in wanting)
        submissions = []
        for name in names:
            event = Event(
                id=self._ids.make(now_ms), type="post.published", timestamp=iso(now_ms), data=b'{"n":1}',
                accepted_at_ms=now_ms, key=key,
            )  # fmt: skip
            self.names[event.id] = name
            submissions.append(Submission(event=event, endpoints=owed, digest=formats.digest(event)))
        await self.outbox.accept(submissions)
        self.lanes.wake(each.id for each in wanting)

    async def settle(self) -> None:
        """Let everything be done that can be done at this moment."""
        quiet = 0
        async with asyncio.timeout(20):
            while quiet < QUIET_PASSES:
                await asyncio.sleep(0.0002 if self._hops else 0)
                quiet = 0 if self._hops else quiet + 1

    async def pass_(self, *, seconds: float) -> None:
        """Let time pass, stopping wherever something is to be done."""
        left_ms = round(seconds * 1000)
        await self.settle()
        while (step_ms := max(0, self.clock.next_ms)) < left_ms:
            self.clock.advance(int(step_ms))
            left_ms -= int(step_ms)
            await self.settle()
        self.clock.advance(left_ms)
        await self.settle()

    async def story(self, name: str, endpoint: str = "main") -> DeliveryStory:
        (id_,) = [id_ for id_, each in self.names.items() if each == name]
        story = await self.outbox.story(id_)
        assert story is not None
        (delivery,) = [each for each in story.deliveries if each.endpoint == endpoint]
        return delivery

    async def states(self, endpoint: str = "main") -> Counter[str]:
        stories = [await self.outbox.story(id_) for id_ in self.names]
        return Counter(
            each.state.value
            for story in stories
            if story is not None
            for each in story.deliveries
            if each.endpoint == endpoint
        )

    def name(self, message: Message) -> str:
        return self.names.get(message.id, message.id)

    def types(self, endpoint: str) -> list[str]:
        return [each.message.type for each in self.sent if each.endpoint == endpoint]

    def data(self, endpoint: str) -> list[dict[str, object]]:
        return [orjson.loads(each.message.body)["data"] for each in self.sent if each.endpoint == endpoint]

    def times(self, endpoint: str = "main", since: float = 0.0) -> list[float]:
        return [each.at for each in self.sent if each.endpoint == endpoint and each.at >= since]

    def change(self, id_: str, **settings: object) -> None:
        """Let the config say something else of an endpoint from the next start on."""
        self.configured = [
            replace(each, **settings) if each.id == id_ else each  # type: ignore[arg-type]
            for each in self.configured
        ]

    async def standing(self, endpoint: str = "main") -> str:
        return (await self.outbox.pasts())[endpoint].health.standing.value
