"""Costs that could grow: with endpoints, fan-out, bodies, the backlog, what happens at once, connections.

A curve is a measurement at several places. Its figures are plain, not ratios: what counts is whether they
stay the same along the curve.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from tests.bench.budget import Figure, Measurement, Samples
from tests.bench.burdens import STUCK, burdened_with
from tests.bench.stage import Stage, System

EVENTS_PER_SECOND = Figure(name="events/s")
CPU = Figure(name="CPU per event", unit="µs")
RSS = Figure(name="RSS", unit="MB")
BYTES = 20_000_000  # of one point's bodies together, at most
SLOW = 500  # events for each that is under way at once, at most: few at once are slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    name: str
    of: str  # what grows, for the plot's axis
    places: tuple[int, ...]
    quick: tuple[int, ...]
    round: Callable[[int, Stage], Awaitable[Samples]]
    figures: tuple[Figure, ...] = (EVENTS_PER_SECOND, CPU, RSS)


def points(*, quick: bool) -> list[Measurement]:
    """Return one measurement for each place of each curve."""
    return [
        Measurement(name=curve.name, round=partial(curve.round, place), figures=curve.figures, at=place)
        for curve in CURVES
        for place in (curve.quick if quick else curve.places)
    ]


async def endpoints(count: int, stage: Stage) -> Samples:
    """Give each of so many endpoints its own type of event; each event goes to one."""
    more = "".join(stage.endpoint(f"many/{each}", events=f"post.{each}") for each in range(count))
    async with stage.system("relay", paths=(), more=more) as system:
        found = await load(stage, system, types=count)
        return found | {"start to ready": system.ready_seconds}


async def fan_out(count: int, stage: Stage) -> Samples:
    async with stage.system("relay", paths=[f"fan/{each}" for each in range(count)]) as system:
        found = await load(stage, system, events=stage.options.events // count, copies=count)
        return {
            "deliveries/s": found["events/s"] * count,
            "CPU per delivery": found["CPU per event"] / count,
            "RSS": found["RSS"],
        }


async def body(size: int, stage: Stage) -> Samples:
    async with stage.system("relay") as system:
        return await load(stage, system, events=min(stage.options.events, BYTES // size), size=size)


async def pending(count: int, stage: Stage) -> Samples:
    """Measure beside deliveries that wait for an endpoint that is paused."""
    burden = await burdened_with(stage, count) if count else None
    async with stage.system("relay", more=STUCK, prepare=burden) as system:
        return await load(stage, system)


async def concurrency(most: int, stage: Stage) -> Samples:
    """Let the endpoint have so many attempts at once."""
    more = stage.endpoint("", settings=f"concurrency = {most}")
    async with stage.system("relay", paths=(), more=more) as system:
        return await load(stage, system, events=min(stage.options.events, SLOW * most))


async def submitters(connections: int, stage: Stage) -> Samples:
    """Submit over so many connections at once."""
    async with stage.system("relay") as system:
        events = min(stage.options.events, SLOW * connections)
        return await load(stage, system, events=events, connections=connections)


async def connections_in(count: int, stage: Stage) -> Samples:
    """Weigh a relay to which so many have posted an event and stay connected."""
    async with stage.system("relay") as system:
        await stage.submit(system, max(count, 32), connections=count)
        await system.running.rest()
        return {"RSS": system.running.resident_megabytes()}


async def connections_out(count: int, stage: Stage) -> Samples:
    """Weigh a relay with so many connections to a receiver that takes a second for each answer."""
    more = stage.endpoint("slow", settings=f"concurrency = {count}")
    async with stage.system("relay", paths=(), more=more) as system:
        before: int = await stage.receiver.ask("connections", seconds=10)
        await stage.submit(system, count * 2)
        opened: int = await stage.receiver.ask("connections", seconds=10)
        return {"RSS": system.running.resident_megabytes(), "connections open": opened - before}


async def load(
    stage: Stage, system: System, *, events: int | None = None, copies: int = 1, **order: int
) -> Samples:
    """Warm up, then bring events through with all that it can take."""
    events = events or stage.options.events
    await stage.submit(system, max(1, events // 4), copies=copies, **order)
    await system.running.rest()
    cpu = system.running.cpu_seconds()
    submitted = await stage.submit(system, events, copies=copies, **order)
    await system.running.rest()
    return {
        "events/s": events / (submitted["last_at"] - submitted["started_at"]),
        "CPU per event": (system.running.cpu_seconds() - cpu) / events * 1e6,
        "RSS": system.running.resident_megabytes(),
    }


CURVES = (
    Curve(
        name="endpoints",
        of="endpoints",
        places=(1, 10, 100, 1_000),
        quick=(1, 20),
        round=endpoints,
        figures=(EVENTS_PER_SECOND, CPU, RSS, Figure(name="start to ready", unit="s")),
    ),
    Curve(
        name="fan-out",
        of="endpoints that get each event",
        places=(1, 3, 10),
        quick=(3,),
        round=fan_out,
        figures=(Figure(name="deliveries/s"), Figure(name="CPU per delivery", unit="µs"), RSS),
    ),
    Curve(
        name="body",
        of="bytes of an event",
        places=(200, 2_000, 20_000, 200_000),
        quick=(2_000,),
        round=body,
    ),
    Curve(
        name="pending",
        of="deliveries that wait",
        places=(0, 10_000, 100_000, 1_000_000),
        quick=(1_000,),
        round=pending,
    ),
    Curve(
        name="concurrency",
        of="attempts at once",
        places=(1, 4, 16, 64, 256),
        quick=(16,),
        round=concurrency,
    ),
    Curve(
        name="submitters",
        of="connections that submit",
        places=(1, 4, 16, 64, 256),
        quick=(16,),
        round=submitters,
    ),
    Curve(
        name="connections in",
        of="connections to the relay",
        places=(1, 100, 1_000),
        quick=(50,),
        round=connections_in,
        figures=(RSS,),
    ),
    Curve(
        name="connections out",
        of="connections to a receiver",
        places=(1, 100, 1_000),
        quick=(50,),
        round=connections_out,
        figures=(RSS, Figure(name="connections open")),
    ),
)
