"""An event loop in virtual time, with the hops to the SQLite thread inside it.

Time moves only when nothing is ready and no hop is outstanding, and then straight to the next timer. A
*hop* is what aiosqlite would do on its thread: here the loop does it itself, one after the other, at a
moment that chance chooses, so that every interleaving of a real thread can come about and comes about again
from the same seed. SQLite is the real one, with its real file.
"""

import asyncio
import collections
import functools
import selectors
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiosqlite.core

MOST_PASSES_AT_ONE_MOMENT = 200_000  # more is a busy loop, and a fault
LONGEST_PASSES = 5  # of the loop, that a hop waits to be done, or its result to be heard of


class CrashedError(BaseException):
    """The process was killed at this moment."""


class StuckError(AssertionError):
    """Nothing is ready and nothing ever will be, or the loop runs without time going on."""


@dataclass(slots=True)
class Disk:
    """How fast the disk is: the share of hops that take long, and how long at the most."""

    slow_share: float = 0.01
    slow_seconds: float = 0.02


@dataclass(slots=True)
class Hop:
    future: asyncio.Future[Any] | None
    function: Callable[[], Any]
    passes: int = 0
    held: bool = False


@dataclass(slots=True)
class Crash:
    """Kill the process at the first hop after a time: before it is done, or before it is heard of."""

    at: float
    after_hop: bool = False
    skip: int = 0  # so many hops first
    due: bool = field(default=False)


class SimulatedTask(asyncio.Task):  # type: ignore[type-arg]
    """A task whose place in a set does not depend on where the memory for it was found."""

    _count = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        SimulatedTask._count += 1
        self._number = SimulatedTask._count
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number

    __eq__ = object.__eq__


class VirtualSelector(selectors.SelectSelector):
    """Nothing ever comes in from outside; instead of waiting it lets the loop go on."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.turn(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time is what the timers say."""

    def __init__(self, chance: Random, disk: Disk, *, now: float) -> None:
        selector = VirtualSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-9
        self.now = now
        self.disk = disk
        self.crash: Crash | None = None
        self.hops_done = 0
        self._chance = chance
        self._hops: collections.deque[Hop] = collections.deque()
        self._landing: collections.deque[list[Any]] = collections.deque()
        self._passes = 0
        self._dead = False
        self.set_task_factory(lambda loop, coro, **kwargs: SimulatedTask(coro, loop=loop, **kwargs))

    def time(self) -> float:
        return self.now

    def add_hop(self, future: asyncio.Future[Any] | None, function: Callable[[], Any]) -> None:
        """Do this as the SQLite thread would: in its turn, a little later."""
        hop = Hop(future, function)
        if not self._dead:
            hop.passes = self._delay(0.3)
            if self._chance.random() < self.disk.slow_share:
                hop.held = True
                self.call_later(self._chance.random() * self.disk.slow_seconds, self._let_go, hop)
        self._hops.append(hop)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Work for another thread is a hop like any other."""
        del executor
        future = self.create_future()
        self.add_hop(future, functools.partial(func, *args))
        return future

    @staticmethod
    def _let_go(hop: Hop) -> None:
        hop.held = False

    def turn(self, timeout: float | None) -> None:
        """Between two passes: do a hop if it is its turn, else let time go on if nothing is ready."""
        idle = timeout is None or timeout > 0
        if self._landing:
            self._land()
        elif self._hops and not self._hops[0].held:
            self._hops[0].passes -= 1
            if idle or self._hops[0].passes < 0:
                self._do(self._hops.popleft())
                self._land()
        elif idle:
            self._let_time_go_on()
        else:
            self._passes += 1
            if self._passes > MOST_PASSES_AT_ONE_MOMENT:
                raise StuckError(f"the loop runs busily at {self.now}")

    def _let_time_go_on(self) -> None:
        if not self._scheduled:
            raise StuckError("nothing is ready, and nothing ever will be")
        self._passes = 0
        self.now = max(self.now, self._scheduled[0].when())
        if self.crash is not None and self.now >= self.crash.at:
            self.crash.due = True

    def _do(self, hop: Hop) -> None:
        crash = self.crash
        dies = crash is not None and crash.due and crash.skip <= 0
        if crash is not None and crash.due:
            crash.skip -= 1
            if dies and not crash.after_hop:
                raise CrashedError
        self.hops_done += 1
        try:
            result = hop.function()
        except Exception as error:  # noqa: BLE001 - it is the caller's, as it is on the thread
            heard = (aiosqlite.core.set_exception, hop.future, error)
        else:
            heard = (aiosqlite.core.set_result, hop.future, result)
        if dies:
            raise CrashedError
        if hop.future is not None:
            self._landing.append([self._delay(0.2), heard])

    def _delay(self, share: float) -> int:
        """Return how many passes of the loop something takes, mostly none."""
        return self._chance.randrange(LONGEST_PASSES) if self._chance.random() < share else 0

    def _land(self) -> None:
        """Let results be heard of, in the order in which they came about."""
        while self._landing and self._landing[0][0] <= 0:
            self.call_soon(*self._landing.popleft()[1])
        if self._landing:
            self._landing[0][0] -= 1

    def bury(self) -> None:
        """End every task of a process that was killed; what they do in the end happens to nobody's files."""
        self._dead, self.crash = True, None
        self.set_exception_handler(lambda _loop, _context: None)
        for _ in range(100):
            tasks = [task for task in asyncio.all_tasks(self) if not task.done()]
            if not tasks:
                break
            for task in sorted(tasks, key=hash):
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks, timeout=60))
        self.close()


class _Thread:
    """Stands in for aiosqlite's thread: the loop does its work."""

    def __init__(self, target: object = None, args: object = ()) -> None:
        del target, args

    def start(self) -> None:
        pass


class _Hops:
    """Stands in for the queue to that thread."""

    def put_nowait(self, hop: tuple[asyncio.Future[Any] | None, Callable[[], Any]]) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.add_hop(*hop)


@contextmanager
def hops_inside() -> Iterator[None]:
    """Let aiosqlite do its work on the virtual loop."""
    core = aiosqlite.core
    before = core.Thread, core.SimpleQueue
    core.Thread, core.SimpleQueue = _Thread, _Hops  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        core.Thread, core.SimpleQueue = before  # type: ignore[misc]
