"""Figures under a burden: a backlog, an endpoint that hangs, old events that go.

Each is a ratio between two systems of the same round, or between two stretches of one.
"""

import shutil
import time
from pathlib import Path

from relay.model import Event, Owed, Submission
from relay.outbox import KeptEndpoint, open_outbox
from tests.bench.budget import Figure, Measurement, Samples
from tests.bench.disk import sync
from tests.bench.stage import Prepare, Stage

STUCK = """
[[endpoints]]
id = "stuck"
url = "https://localhost:9/"
events = ["nothing.of.this"]
secret = "s"
"""
STEP = 1000
PACE = 100.0  # events a second, to ten endpoints
STEADY_RATE = 500.0
PATHS = tuple(f"/timed/{number}" for number in range(9))


async def backlog(stage: Stage) -> Samples:
    """Compare a relay whose outbox holds a backlog for an endpoint that is paused with an empty one."""
    events = stage.options.events
    burden = await burdened_with(stage, stage.options.backlog)
    async with (
        stage.system("relay", more=STUCK, prepare=burden) as burdened,
        stage.system("relay") as free,
    ):
        for system in (burdened, free):  # connections are made, the hot part of the file is read
            await stage.submit(system, events // 4)
            await system.running.rest()
        seconds = {burdened: 0.0, free: 0.0}
        for system in (burdened, free, free, burdened) * 2:
            submitted = await stage.submit(system, events // 4)
            await system.running.rest()
            seconds[system] += submitted["last_at"] - submitted["started_at"]
        steady = await stage.submit(burdened, events // 4, rate=STEADY_RATE)
        return {
            "events/s with a backlog against empty": seconds[free] / seconds[burdened],
            "accept p99 with a backlog": steady["p99"] * 1e3,
            "start to ready with a backlog": burdened.ready_seconds,
            "RSS with a backlog": burdened.running.resident_megabytes(),
        }


async def isolation(stage: Stage) -> Samples:
    """Compare the deliveries of nine endpoints beside one that hangs with those beside one that answers."""
    events = max(20, stage.options.events // 8)
    async with (
        stage.system("relay", paths=(*PATHS, "/hang")) as beside_hanging,
        stage.system("relay", paths=(*PATHS, "/timed/9")) as beside_healthy,
    ):
        for system in (beside_hanging, beside_healthy):  # connections are made, slots fill
            copies = len(PATHS) + (system is beside_healthy)
            await stage.lags(await stage.submit(system, events // 4, rate=PACE, copies=copies))
        lags: dict[object, list[float]] = {beside_hanging: [], beside_healthy: []}
        for system in (beside_hanging, beside_healthy, beside_healthy, beside_hanging) * 2:
            copies = len(PATHS) + (system is beside_healthy)
            lags[system] += await stage.lags(
                await stage.submit(system, events // 4, rate=PACE, copies=copies)
            )
    # Of all turns together, so that one hiccup of the machine is not the p99 of a turn.
    hanging, healthy = (sorted(each)[len(each) * 99 // 100] for each in lags.values())
    return {"p99 beside one that hangs": hanging / healthy, "delivery p99 of ten endpoints": healthy * 1e3}


async def retention(stage: Stage) -> Samples:
    """Compare how long a 202 takes while old events go with how long it takes when all are gone."""

    async def leave_old_ones(folder: Path) -> None:
        await fill(folder / "relay.db", stage.options.backlog // 10, paused=False, old=True)

    events = stage.options.events // 4
    async with stage.system("relay", prepare=leave_old_ones) as system:
        await stage.submit(system, events // 4)  # connections are made
        while_they_go = await stage.submit(system, events, rate=STEADY_RATE)
        await system.running.rest(seconds=120)
        gone = await stage.submit(system, events, rate=STEADY_RATE)
        return {"accept p99 while old events go": while_they_go["p99"] / gone["p99"]}


async def burdened_with(stage: Stage, count: int) -> Prepare:
    """Return what leaves an outbox with so many deliveries in a folder; it is filled once and then copied."""
    filled = stage.folder / f"backlog-{count}.db"
    if not filled.exists():
        await fill(filled, count, paused=True)

    async def take_over(folder: Path) -> None:
        shutil.copyfile(filled, folder / "relay.db")
        sync(folder / "relay.db")

    return take_over


async def fill(path: Path, count: int, *, paused: bool, old: bool = False) -> None:
    """Leave an outbox with events: owed to an endpoint that is paused, or to nobody and a month old."""
    owed = () if old else (Owed("stuck", "event"),)
    at_ms = round((time.time() - old * 30 * 86_400) * 1000)  # noqa: TID251 - what a real relay would have seen
    async with open_outbox(path, synchronous="off") as outbox:
        await outbox.register(["stuck"])
        await outbox.keep_endpoint(KeptEndpoint(id="stuck", settings=None, paused=paused))
        for start in range(0, count, STEP):
            numbers = range(start, min(start + STEP, count))
            await outbox.accept([old_submission(number, at_ms, owed) for number in numbers])
    sync(path)


def old_submission(number: int, at_ms: int, owed: tuple[Owed, ...]) -> Submission:
    event = Event(
        id=f"evt_{number:032x}",
        type="post.published",
        timestamp="2026-01-15T10:00:00.000Z",
        data=b'{"postId":"post_abc123","platform":"instagram"}',
        accepted_at_ms=at_ms,
    )
    return Submission(event=event, endpoints=owed, digest=bytes(32))


BURDENS = (
    Measurement(
        name="backlog",
        round=backlog,
        figures=(
            Figure(name="events/s with a backlog against empty", floor=0.90, aim=1.0, at_least=True),
            Figure(name="accept p99 with a backlog", unit="ms", floor=15),
            Figure(name="start to ready with a backlog", unit="s", floor=2, aim=1),
            Figure(name="RSS with a backlog", unit="MB", floor=100, aim=60),
        ),
    ),
    Measurement(
        name="isolation",
        round=isolation,
        figures=(
            Figure(name="p99 beside one that hangs", floor=1.10, aim=1.0),
            Figure(name="delivery p99 of ten endpoints", unit="ms"),
        ),
    ),
    Measurement(
        name="retention",
        round=retention,
        figures=(Figure(name="accept p99 while old events go", floor=2),),
    ),
)
