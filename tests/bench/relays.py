"""Many relays on one PostgreSQL beside one on SQLite: what more of them bring, and what the database costs.

The database syncs every commit, to the same disk. With few cores more relays cannot be faster; what counts
for an estimate is the CPU that an event takes of a relay and of the database.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from tests import postgres
from tests.bench.budget import Figure, Measurement, Samples
from tests.bench.processes import cpu_seconds, family
from tests.bench.stage import Stage, System

COUNTS = (1, 2, 4)
SYNCED = {"fsync": "on", "full_page_writes": "on"}
AT_ONCE = "concurrency = 64"  # attempts, shared out among the relays


async def relays(stage: Stage) -> Samples:
    """Submit to each of so many relays at once, and wait until all has arrived."""
    with postgres.running(**SYNCED) as server:
        samples: Samples = {}
        more = stage.endpoint("", settings=AT_ONCE)
        async with stage.system("relay", paths=(), more=more) as system:
            sqlite = await take(stage, [system])
        for count in COUNTS:
            url = await postgres.new_database(server.url, f"relays_{count}")
            before = sum(map(cpu_seconds, family(server.pid)))
            async with together(stage, count, url, more) as systems:
                shared = await take(stage, systems)
            used = sum(map(cpu_seconds, family(server.pid))) - before
            events = stage.options.events + warm_up(stage)
            samples |= {
                f"events/s, {count}": shared["events/s"],
                f"events/s, {count} against SQLite": shared["events/s"] / sqlite["events/s"],
                f"CPU per event, {count}": shared["CPU"],
                f"CPU per event of the database, {count}": used / events * 1e6,
            }
            await postgres.drop_database(url)
        return samples | {"events/s, SQLite": sqlite["events/s"], "CPU per event, SQLite": sqlite["CPU"]}


@asynccontextmanager
async def together(stage: Stage, count: int, url: str, more: str) -> AsyncIterator[list[System]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(stage.system("relay", paths=(), more=more, outbox=url))
            for _ in range(count)
        ]


async def take(stage: Stage, systems: list[System]) -> Samples:
    to = [each.to for each in systems]
    everyone = replace(systems[0], to=to if len(to) > 1 else to[0])
    await stage.submit(everyone, warm_up(stage))
    await rest(systems)
    cpu, events = sum(each.running.cpu_seconds() for each in systems), stage.options.events
    submitted = await stage.submit(everyone, events)
    await rest(systems)
    return {
        "events/s": events / (submitted["last_at"] - submitted["started_at"]),
        "CPU": (sum(each.running.cpu_seconds() for each in systems) - cpu) / events * 1e6,
    }


def warm_up(stage: Stage) -> int:
    return max(32, stage.options.events // 4 // 4 * 4)


async def rest(systems: list[System]) -> None:
    for each in systems:
        await each.running.rest()


RELAYS = Measurement(
    name="relays",
    round=relays,
    figures=(
        Figure(name="events/s, SQLite"),
        Figure(name="CPU per event, SQLite", unit="µs"),
        *(
            figure
            for count in COUNTS
            for figure in (
                Figure(name=f"events/s, {count}"),
                Figure(name=f"events/s, {count} against SQLite"),
                Figure(name=f"CPU per event, {count}", unit="µs"),
                Figure(name=f"CPU per event of the database, {count}", unit="µs"),
            )
        ),
    ),
)
