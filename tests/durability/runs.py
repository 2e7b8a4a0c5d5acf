"""The runs: what is done to a relay, how often; each returns what the checker found.

All are functions of their seed; the tests do a few of each, the command as many as it is told.
"""

import asyncio
import errno
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
from aiohttp import web

from tests.durability import shim
from tests.durability.checker import Report, merged
from tests.durability.plan import STEADY, THREE, Endpoint
from tests.durability.shim import KILL_AT, SLOW_SYNC_MS
from tests.durability.world import EndedError, World, posting
from tests.durability.zygote import Zygote

EXIT_DAMAGED = 74
CYCLES_A_WORLD = 50  # then a new outbox: what is joined at the end stays small
# The scenario of the loops over every storage call: small, with a retry in it.
SMALL = Endpoint(id="small", events=("*",), refuses=0.3, schedule_ms=(20, 30, 40, 50, 60, 70))
SMALL_EVENTS = 4
PATIENCE_SECONDS = 0.7  # for a small run to drain; what takes longer waits for room on the disk
AT_ONCE = 4  # small runs side by side: they mostly wait


@dataclass(slots=True)
class Result:
    """What a kind of run came to: how many trials, what the checker says, and what else was counted."""

    trials: int = 0
    report: Report = field(default_factory=Report)
    counts: Counter[str] = field(default_factory=Counter)
    sampled: bool = True  # else these trials are all there are

    def add(self, trials: int, report: Report) -> None:
        self.trials += trials
        self.report = merged([self.report, report])


async def kills(
    folder: Path, zygote: Zygote, *, cycles: int, seed: int, seconds: float = 86_400.0, longest: float = 0.6
) -> Result:
    """Kill -9 at random moments under load, at most so many times or for so long."""
    chance = random.Random(f"{seed}/kills")
    deadline = time.monotonic() + seconds
    result = Result()
    while result.trials < cycles and time.monotonic() < deadline:
        done = 0
        most = min(CYCLES_A_WORLD, cycles - result.trials)
        async with World(folder / f"kills-{result.trials}", zygote, seed=seed + result.trials) as world:
            async with posting(world):
                while done < most and time.monotonic() < deadline:
                    await world.start()
                    await asyncio.sleep(chance.uniform(0.02, longest))
                    await world.kill()
                    done += 1
            result.add(done, await world.finish())
    return result


async def power_cuts(
    folder: Path,
    zygote: Zygote,
    *,
    cycles: int,
    seed: int,
    durability: str = "full",
    plant: str | None = None,
) -> Result:
    """Cut the power at random moments under load; every other time unsynced blocks may survive too."""
    chance = random.Random(f"{seed}/power")
    result = Result()
    while result.trials < cycles:
        done, most = 0, min(CYCLES_A_WORLD, cycles - result.trials)
        async with World(
            folder / f"power-{durability}-{result.trials}",
            zygote,
            seed=seed + result.trials,
            durability=durability,
            shimmed=True,
            plant=plant,
        ) as world:
            async with posting(world):
                while done < most:
                    assert world.disk is not None
                    world.disk[SLOW_SYNC_MS] = chance.choice((0, 5, 20))  # else hardly anything is unsynced
                    await world.start()
                    await asyncio.sleep(chance.uniform(0.05, 0.5))
                    await world.kill()
                    result.counts["blocks"] += world.cut_power(chance if done % 2 else None)
                    done += 1
            result.add(done, await world.finish())
    return result


async def kill_points(
    folder: Path, zygote: Zygote, *, seed: int, power: Sequence[bool], again: bool = False
) -> Result:
    """Kill the relay after the nth storage call of a small scenario, for every n.

    `power` says in turn whether the power is cut as well; `again` that it is not the outbox's first start.
    """

    async def one(world: World, number: int) -> bool:
        disk = world.disk
        assert disk is not None
        disk[KILL_AT] = disk[shim.CALLS] + number
        code = await small(world)
        world.mend_disk()
        if power[number % len(power)] and code == -signal.SIGKILL:
            world.cut_power()
        return code == -signal.SIGKILL

    result = Result()
    await for_every_call(folder, zygote, one, result, seed=seed, again=again)
    return result


Fault = tuple[int, bool]
FAULTS: tuple[Fault, ...] = tuple(
    (number, persistent) for number in (errno.EIO, errno.ENOSPC) for persistent in (False, True)
)


async def disk_errors(
    folder: Path, zygote: Zygote, *, seed: int, faults: Sequence[Fault], again: bool = False, every: int = 1
) -> Result:
    """Let the nth storage call fail, for each n or some; `faults` in turn (all of them: give one)."""
    result = Result()

    async def one(world: World, number: int) -> bool:
        assert world.disk is not None
        wrong, persistent = faults[number // every % len(faults)]
        before = world.disk[shim.CALLS]
        world.fail_disk(before + number, wrong, persistent=persistent)
        code = await small(world)
        calls = world.disk.calls()[before:]
        call = next((call for call in calls if call.errno), None)
        if call is not None:
            name = f"{errno.errorcode[wrong]} {'persistent' if persistent else 'once'}"
            closing = [
                each
                for each in calls[: call.number - before]
                if (each.what, each.file) == ("truncate", "lock")
            ]
            result.counts[f"{name}, exit {code}"] += 1
            # When SQLite closes the file all is synced: it leaves undone what fails, for the next start.
            if code not in allowed(call, wrong, persistent=persistent, closing=len(closing) > 1):
                result.report.examples["exit codes"].append(
                    f"{name}, {call}: exit {code}\n{world.log[-900:]}"
                )
        return call is not None

    await for_every_call(folder, zygote, one, result, seed=seed, again=again, every=every)
    return result


def allowed(call: shim.Call, wrong: int, *, persistent: bool, closing: bool) -> set[int]:
    """Return the exit codes of a relay whose disk failed so."""
    if closing:
        return {EXIT_DAMAGED, 0}
    if call.what == "sync" and call.file != "folder":
        return {EXIT_DAMAGED}  # what the disk has now, only the next start can tell
    return {EXIT_DAMAGED} if wrong == errno.EIO and persistent else {EXIT_DAMAGED, 0}


async def for_every_call(
    folder: Path,
    zygote: Zygote,
    one: Callable[[World, int], Awaitable[bool]],
    result: Result,
    *,
    seed: int,
    again: bool,
    every: int = 1,
    most: int = 1000,
) -> None:
    """Run the small scenario with something done at call n, for n = 1, 2, … until there is no such call.

    Or for each of so many of them: `every`.
    """
    result.sampled = False
    numbers = iter(range(1, most, every))
    over = asyncio.Event()

    async def work() -> None:
        for number in numbers:
            async with World(
                folder / f"call-{number}",
                zygote,
                seed=seed + number,
                endpoints=[SMALL],
                shimmed=True,
                grace_seconds=1.0,
            ) as world:
                if again:
                    await world.start()
                    await world.driver.post(1)
                    await world.stop()
                done = await one(world, number)
                assert world.disk is not None
                world.mend_disk()
                await world.start()
                await world.driver.post(1)
                report = await world.finish(replay=False)
                if report.broken:
                    report.examples["log"].append(f"call {number}: {world.log[-2000:]}")
                result.add(int(done), report)
            if not done:
                over.set()
            if over.is_set():
                return
        raise AssertionError(f"more than {most} storage calls")

    async with asyncio.TaskGroup() as workers:
        for _ in range(AT_ONCE):
            workers.create_task(work())


async def small(world: World) -> int:
    """Start, post a few events, deliver them, stop; return the exit code, however early it came."""
    try:
        await world.start()
        await world.driver.post(SMALL_EVENTS - 1, at_once=2)
        if not await world.drained(within=PATIENCE_SECONDS):
            # A full disk is no reason to end: once there is room again everything goes on by itself.
            assert world.disk is not None
            world.mend_disk()
            assert await world.drained(within=10), f"stuck:\n{world.log[-2000:]}"
        await world.driver.post(1)
        await asyncio.sleep(0.02)
        world.signal(signal.SIGTERM)
    except EndedError as error:
        return error.code
    except (aiohttp.ClientError, OSError):
        pass  # it is ending by itself
    return await world.ended()


async def between_answer_and_record(folder: Path, zygote: Zygote, *, count: int, seed: int) -> Result:
    """Kill the relay after the receiver's 2xx and before the relay could write it down, so many times.

    It is held still while the answer goes out, so it is never a matter of luck.
    """
    result = Result()
    async with World(folder / "between", zygote, seed=seed, endpoints=[STEADY_NOW]) as world:
        killed = asyncio.Event()
        armed = False

        async def hold(_: web.Request, __: int) -> None:
            if armed:
                world.signal(signal.SIGSTOP)

        async def kill(_: web.Request, __: int) -> None:
            nonlocal armed
            if armed:
                armed = False
                await world.kill()
                killed.set()

        world.ledger.before, world.ledger.after = hold, kill
        for _ in range(count):
            await world.start()
            await world.drained()
            killed.clear()
            armed = True
            await world.driver.post(1)
            async with asyncio.timeout(10):
                await killed.wait()
        result.add(count, await world.finish())
    return result


STEADY_NOW = Endpoint(id="steady", events=STEADY.events)


async def nemesis(folder: Path, zygote: Zygote, *, faults: int, seed: int) -> Result:
    """Do one thing after another to a relay under load: a seeded choice of all there is."""
    chance = random.Random(f"{seed}/nemesis")
    result = Result()
    async with World(folder / "nemesis", zygote, seed=seed, shimmed=True, grace_seconds=0.5) as world:
        await world.start()
        async with posting(world):
            for _ in range(faults):
                await asyncio.sleep(chance.uniform(0.05, 0.6))
                act = chance.choice(ACTS)
                result.counts[act.__name__] += 1
                await act(world, chance)
                if not world.alive:
                    assert world.disk is not None
                    world.mend_disk()
                    await world.start()
        result.add(faults, await world.finish())
    return result


async def killed(world: World, _: random.Random) -> None:
    await world.kill()


async def cut(world: World, chance: random.Random) -> None:
    await world.kill()
    world.cut_power(chance)


async def stopped(world: World, _: random.Random) -> None:
    await world.stop()


async def stopped_twice(world: World, chance: random.Random) -> None:
    world.signal(signal.SIGTERM)
    await asyncio.sleep(chance.uniform(0, 0.1))
    await world.stop()


async def frozen(world: World, chance: random.Random) -> None:
    world.signal(signal.SIGSTOP)
    await asyncio.sleep(chance.uniform(0.2, 1.5))
    world.signal(signal.SIGCONT)


async def slow(world: World, chance: random.Random) -> None:
    assert world.disk is not None
    world.disk[SLOW_SYNC_MS] = 200
    await asyncio.sleep(chance.uniform(0.2, 1.0))
    world.disk[SLOW_SYNC_MS] = 0


async def failing(world: World, chance: random.Random) -> None:
    await failed(world, errno.EIO, chance)


async def full(world: World, chance: random.Random) -> None:
    await failed(world, errno.ENOSPC, chance)


async def failed(world: World, wrong: int, chance: random.Random) -> None:
    """Let calls fail for a moment; the relay may live through it or end."""
    assert world.disk is not None
    world.fail_disk(world.disk[shim.CALLS] + 1, wrong, persistent=True)
    await asyncio.sleep(chance.uniform(0.02, 0.4))
    world.mend_disk()
    await asyncio.sleep(0.3)
    if not world.alive:
        code = await world.ended()
        assert code == EXIT_DAMAGED, f"exit {code}: {world.log[-2000:]}"


Act = Callable[[World, random.Random], Awaitable[None]]
ACTS: tuple[Act, ...] = (killed, cut, stopped, stopped_twice, frozen, slow, failing, full)


async def planted(folder: Path, zygote: Zygote, name: str | None, how: str, *, events: int = 160) -> Report:
    """Run with a fault planted into the relay: calm, killed or without power."""
    endpoints = THREE if events < 1000 else [STEADY]
    async with World(
        folder / f"{name}",
        zygote,
        seed=7,
        endpoints=[replace(endpoint, hangs=0.0) for endpoint in endpoints],
        shimmed=how == "power",
        plant=name,
        rate=400,
    ) as world:
        await world.start()
        if how == "calm":
            await world.driver.post(events)
        else:
            async with posting(world):
                await asyncio.sleep(0.8)
                await world.kill()
            if how == "power":
                world.cut_power()
        return await world.finish(within=4.0 if name == "retries_in_a_year" else 40.0)
