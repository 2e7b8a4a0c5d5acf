"""What is measured, and what the design demands of it.

Each measurement is one function: a stage in, one sample of each of its figures out. The benchmark calls it
once a round. A new row of the budgets is a function here and its entry in `MEASUREMENTS`.
"""

from tests import postgres
from tests.bench.budget import Figure, Measurement, Samples
from tests.bench.burdens import BURDENS
from tests.bench.disk import fsync_seconds
from tests.bench.processes import started
from tests.bench.relays import RELAYS
from tests.bench.stage import Stage, System, python
from tests.bench.tally import Tally
from tests.bench.ways import WAYS, idle_percent

WARM_UP = 0.25  # of the events that are then counted
TURNS = 4  # of each system in a round: noise from outside lasts longer than a turn, so it falls on both
STEADY_RATE = 500.0  # events a second


async def throughput(stage: Stage) -> Samples:
    """Load the relay and the bare handler with all they can take, in turns.

    Counted is the time from the first submission to the last arrival, so that a backlog is no gain, and the
    CPU until the system rests again, so that work put off counts too.
    """
    async with stage.system("relay") as relay, stage.system("bare") as bare:
        for system in (relay, bare):
            await stage.submit(system, int(stage.options.events * WARM_UP))
            await system.running.rest()
        tallies = {relay: Tally(), bare: Tally()}
        for system in (relay, bare, bare, relay) * (TURNS // 2):
            await take_turn(stage, system, tallies[system])
        ours, yardstick = tallies[relay], tallies[bare]
        together = await stage.commit_size(relay)
        sqlite = await sqlite_cpu(stage, max(1, round(together / 2)))
        cpu, limit = ours.cpu / ours.events * 1e6, yardstick.cpu / yardstick.events * 1e6 + sqlite
        return {
            "events/s against bare": yardstick.seconds / ours.seconds,
            "CPU per event against bare": ours.cpu / yardstick.cpu,
            "relay events/s": ours.events / ours.seconds,
            "bare events/s": yardstick.events / yardstick.seconds,
            "relay CPU per event": cpu,
            "bare CPU per event": yardstick.cpu / yardstick.events * 1e6,
            "SQLite CPU per event": sqlite,
            "CPU per event above bare and SQLite": cpu - limit,
            "CPU per event against bare and SQLite": cpu / limit,
            "accepts and outcomes in a commit": together,
            "receiver CPU per event": ours.receiver_cpu / ours.events * 1e6,
            "load CPU per event": ours.load_cpu / ours.events * 1e6,
            "relay RSS loaded": relay.running.resident_megabytes(),
            "relay PSS loaded": relay.running.proportional_megabytes(),
            "bare RSS loaded": bare.running.resident_megabytes(),
        }


async def take_turn(stage: Stage, system: System, tally: Tally) -> None:
    """Send one turn's events through a system that rests before and after."""
    events = stage.options.events // TURNS
    cpu, receiver_cpu = system.running.cpu_seconds(), stage.receiver.cpu_seconds()
    submitted = await stage.submit(system, events)
    await system.running.rest()
    tally.events += events
    tally.seconds += submitted["last_at"] - submitted["started_at"]
    tally.cpu += system.running.cpu_seconds() - cpu
    tally.receiver_cpu += stage.receiver.cpu_seconds() - receiver_cpu
    tally.load_cpu += submitted["cpu_seconds"]


async def sqlite_cpu(stage: Stage, batch: int) -> float:
    """Measure what the rows of an event cost SQLite alone, in commits of so many events; in µs."""
    file = stage.new_folder("rows") / "rows.db"
    command = python(
        "tests.bench.rows", str(file), "--events", str(stage.options.events), "--batch", str(batch)
    )
    async with started(*command, name="rows", log=file.with_suffix(".log")) as rows:
        measured = await rows.hear(seconds=60)
    return float(measured["cpu_seconds"]) / stage.options.events * 1e6


async def latency(stage: Stage) -> Samples:
    """Submit to the relay at a steady pace that is far from its limit, and look at how long the 202 takes."""
    fsync = fsync_seconds(stage.folder / "fsync")
    async with stage.system("relay") as system:
        await stage.submit(system, int(stage.options.events * WARM_UP))
        await system.running.rest()
        submitted = await stage.submit(system, stage.options.events, rate=STEADY_RATE)
    return {
        "accept p50": submitted["p50"] * 1e3,
        "accept p99": submitted["p99"] * 1e3,
        "fsync p50": fsync * 1e3,
        "accept p99 in fsyncs": submitted["p99"] / fsync,
    }


async def idle(stage: Stage) -> Samples:
    """Start the relay with nothing to do and leave it alone."""
    async with stage.system("relay") as system:
        await system.running.rest()
        return {
            "start to ready": system.ready_seconds,
            "idle CPU": await idle_percent(system, stage.options.idle_seconds),
            "RSS idle": system.running.resident_megabytes(),
            "PSS idle": system.running.proportional_megabytes(),
        }


MEASUREMENTS = (
    Measurement(
        name="throughput",
        round=throughput,
        figures=(
            Figure(name="events/s against bare", floor=0.60, aim=0.85, at_least=True),
            Figure(name="CPU per event against bare", floor=1.7, aim=1.25),
            Figure(name="relay events/s"),
            Figure(name="bare events/s"),
            Figure(name="relay CPU per event", unit="µs"),
            Figure(name="bare CPU per event", unit="µs"),
            Figure(name="SQLite CPU per event", unit="µs"),
            Figure(name="CPU per event above bare and SQLite", unit="µs"),
            Figure(name="CPU per event against bare and SQLite"),
            Figure(name="accepts and outcomes in a commit"),
            Figure(name="receiver CPU per event", unit="µs"),
            Figure(name="load CPU per event", unit="µs"),
            Figure(name="relay RSS loaded", unit="MB", floor=100, aim=60),
            Figure(name="relay PSS loaded", unit="MB"),
            Figure(name="bare RSS loaded", unit="MB"),
        ),
    ),
    Measurement(
        name="latency",
        round=latency,
        figures=(
            Figure(name="accept p50", unit="ms"),
            Figure(name="accept p99", unit="ms", floor=15),
            Figure(name="fsync p50", unit="ms"),
            Figure(name="accept p99 in fsyncs", aim=3),
        ),
    ),
    Measurement(
        name="idle",
        round=idle,
        figures=(
            Figure(name="start to ready", unit="s", floor=1, aim=0.5),
            Figure(name="RSS idle", unit="MB", floor=60, aim=45),
            Figure(name="PSS idle", unit="MB"),
            Figure(name="idle CPU", unit="%", floor=0.5, aim=0.1),
        ),
    ),
    *BURDENS,
    *WAYS,
    # Where there is no server to be had, there is nothing to share.
    *((RELAYS,) if postgres.binaries() is not None else ()),
)
