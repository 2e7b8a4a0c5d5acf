"""Ways in and loops: the relay beside itself, submitted to and run in another way."""

import asyncio
import importlib.util
import time

from tests.bench.budget import Figure, Measurement, Samples
from tests.bench.stage import Stage, System
from tests.bench.tally import Tally

BATCH = 100
TURNS = 2  # of each in a round


async def ways_in(stage: Stage) -> Samples:
    """Submit events in batches and one by one, over TCP and a unix socket.

    Accepted events count until all are answered; deliveries go on meanwhile, as they do in life.
    """
    async with stage.system("relay") as tcp, stage.system("relay", unix=True) as unix:
        ways = {(system, batch): Tally() for system in (tcp, unix) for batch in (None, BATCH)}
        arrived = dict.fromkeys(ways, 0.0)
        for system in (tcp, unix):
            await stage.submit(system, stage.options.events // 4)
            await system.running.rest()
        for way in (*ways, *reversed(ways)):
            arrived[way] += await take_turn(stage, *way, ways[way])
    single, plain = ways[tcp, None], arrived[tcp, None]
    return {
        "accepted/s in batches against single": single.seconds / ways[tcp, BATCH].seconds,
        "accepted/s over a unix socket against TCP": single.seconds / ways[unix, None].seconds,
        "accepted/s in batches over a unix socket against single over TCP": single.seconds
        / ways[unix, BATCH].seconds,
        "events/s in batches against single": plain / arrived[tcp, BATCH],
        "events/s over a unix socket against TCP": plain / arrived[unix, None],
        "CPU per event in batches against single": ways[tcp, BATCH].cpu / single.cpu,
        "CPU per event over a unix socket against TCP": ways[unix, None].cpu / single.cpu,
        "accepted/s single": single.events / single.seconds,
        "accepted/s in batches": ways[tcp, BATCH].events / ways[tcp, BATCH].seconds,
    }


async def take_turn(stage: Stage, system: System, batch: int | None, tally: Tally) -> float:
    """Note what accepting took, and return how long it was until all had arrived."""
    events = stage.options.events // TURNS
    cpu = system.running.cpu_seconds()
    submitted = await stage.submit(system, events, batch=batch)
    await system.running.rest()
    tally.events += events
    tally.seconds += submitted["ended_at"] - submitted["started_at"]
    tally.cpu += system.running.cpu_seconds() - cpu
    seconds: float = submitted["last_at"] - submitted["started_at"]
    return seconds


async def loops(stage: Stage) -> Samples:
    """Run the relay on uvloop and on asyncio's own loop, in turns."""
    samples: Samples = {}
    async with (
        stage.system("relay", loop="uvloop") as uvloop,
        stage.system("relay", loop="asyncio") as asyncio_,
    ):
        systems = {"uvloop": uvloop, "asyncio": asyncio_}
        for name, system in systems.items():
            samples[f"start to ready, {name}"] = system.ready_seconds
            await system.running.rest()
            samples[f"RSS idle, {name}"] = system.running.resident_megabytes()
            samples[f"idle CPU, {name}"] = await idle_percent(system, stage.options.idle_seconds)
            await stage.submit(system, stage.options.events // 4)
            await system.running.rest()
        tallies = {name: Tally() for name in systems}
        arrived = dict.fromkeys(systems, 0.0)
        for name in ("uvloop", "asyncio", "asyncio", "uvloop"):
            arrived[name] += await take_turn(stage, systems[name], None, tallies[name])
        for name, system in systems.items():
            samples[f"events/s, {name}"] = tallies[name].events / arrived[name]
            samples[f"CPU per event, {name}"] = tallies[name].cpu / tallies[name].events * 1e6
            samples[f"RSS loaded, {name}"] = system.running.resident_megabytes()
    return samples | {
        "events/s, uvloop against asyncio": arrived["asyncio"] / arrived["uvloop"],
        "CPU per event, uvloop against asyncio": tallies["uvloop"].cpu / tallies["asyncio"].cpu,
    }


async def idle_percent(system: System, seconds: float) -> float:
    """Return the share of a core that a system uses with nothing to do."""
    cpu, began = system.running.cpu_seconds(), time.monotonic()
    await asyncio.sleep(seconds)
    return (system.running.cpu_seconds() - cpu) / (time.monotonic() - began) * 100


UNITS = {"start to ready": "s", "RSS idle": "MB", "idle CPU": "%", "events/s": "", "CPU per event": "µs"}
LOOPS = Measurement(
    name="loops",
    round=loops,
    figures=(
        Figure(name="events/s, uvloop against asyncio"),
        Figure(name="CPU per event, uvloop against asyncio"),
        *(
            Figure(name=f"{name}, {loop}", unit=unit)
            for name, unit in (UNITS | {"RSS loaded": "MB"}).items()
            for loop in ("uvloop", "asyncio")
        ),
    ),
)
WAYS = (
    Measurement(
        name="ways in",
        round=ways_in,
        figures=(
            Figure(name="accepted/s in batches against single", floor=5, aim=10, at_least=True),
            Figure(name="accepted/s over a unix socket against TCP"),
            Figure(name="accepted/s in batches over a unix socket against single over TCP"),
            Figure(name="events/s in batches against single"),
            Figure(name="events/s over a unix socket against TCP"),
            Figure(name="CPU per event in batches against single"),
            Figure(name="CPU per event over a unix socket against TCP"),
            Figure(name="accepted/s single"),
            Figure(name="accepted/s in batches"),
        ),
    ),
    # Without uvloop there is only one loop to run on.
    *((LOOPS,) if importlib.util.find_spec("uvloop") else ()),
)
