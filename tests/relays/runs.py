"""What is done to several relays on one PostgreSQL; each run returns what the checker found."""

import asyncio
import time
from pathlib import Path

from tests import postgres
from tests.durability.checker import Report
from tests.durability.plan import THREE, Endpoint
from tests.durability.world import posting
from tests.durability.zygote import Zygote
from tests.relays.world import DEAD_MS, Relays

PATIENCE_SECONDS = 300.0  # for a backlog to be worked off on a busy machine
CALM = (Endpoint(id="steady", events=("*",)), Endpoint(id="ordered", events=("load.*",), ordered=True))


async def calm(
    folder: Path, zygote: Zygote, server: postgres.Postgres, *, relays: int, events: int, seed: int
) -> Report:
    """Nothing happens to anybody: everything is delivered exactly once."""
    beats = (1000, 20_000)  # a busy machine kills nobody
    async with Relays(folder, zygote, server, count=relays, seed=seed, beats=beats, endpoints=CALM) as world:
        began = time.monotonic()
        await world.driver.post(events, at_once=32)
        posted = time.monotonic()
        await world.drained(within=PATIENCE_SECONDS)
        world.counts["events/s in"] = round(events / (posted - began))
        world.counts["deliveries/s"] = round(2 * events / (time.monotonic() - began))
        return await world.finish(within=PATIENCE_SECONDS)


async def troubled(
    folder: Path,
    zygote: Zygote,
    server: postgres.Postgres,
    *,
    relays: int,
    seed: int,
    events: int = 1_000_000,
    seconds: float = 86_400.0,
    rate: float = 200.0,
    posters: int = 16,
) -> Report:
    """Relays are killed and frozen past their lease, and PostgreSQL crashes, at random, under load."""
    async with Relays(folder, zygote, server, count=relays, seed=seed, endpoints=THREE, rate=rate) as world:
        began = time.monotonic()
        deadline = began + seconds
        async with posting(world, most=events, posters=posters):
            while time.monotonic() < deadline and len(world.driver.acknowledged) < events * 0.98:
                await asyncio.sleep(world.chance.uniform(0.1, 0.8))
                await trouble(world)
        world.counts["seconds"] = round(time.monotonic() - began)
        return await world.finish(within=PATIENCE_SECONDS)


async def trouble(world: Relays) -> None:
    """Do something to one or two of them, or to the database."""
    ready = [each for each in world.relays if each.ready.is_set()]
    kind = world.chance.choice(("kill", "kill", "freeze", "freeze", "restart", "both"))
    one, other = world.chance.sample(ready, 2) if len(ready) > 1 else (ready * 2 or [None] * 2)[:2]
    if one is None or other is None:
        return
    sleep = DEAD_MS / 1000 + world.chance.uniform(0.2, 1.0)
    async with asyncio.TaskGroup() as tasks:
        if kind in ("kill", "both"):
            tasks.create_task(world.kill(one))
        if kind in ("freeze", "both") and other is not one:
            tasks.create_task(world.stop_and_continue(other, sleep))
        if kind == "restart":
            tasks.create_task(world.restart_server())
