"""The compared systems: with which settings each is started, and what its processes use.

A `Line` is an application and what carries its events on: a relay, or a broker and its workers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.compared.setup import modules, python
from tests.bench.processes import Running, started
from tests.bench.stage import SECRET, Stage
from tests.bench.stage import python as our_python
from tests.process import free_port

ROOT = Path(__file__).parents[3]
PACKAGE = "tests.bench.compared"
DURABLE_REDIS = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
THREADS = 8  # of Celery's and huey's workers; fewer and more were no faster on two cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An application, which takes orders, and all that carries its events to the receiver."""

    app: Running
    carriers: tuple[Running, ...]

    def cpu_seconds(self) -> float:
        return sum(each.cpu_seconds() for each in (self.app, *self.carriers))

    def megabytes(self) -> float:
        """Memory of all but the application."""
        return sum(each.proportional_megabytes() for each in self.carriers)

    async def rest(self, *, seconds: float = 0.5) -> None:
        """Wait until next to no CPU is used; no longer, because some poll their queue for ever."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            await asyncio.sleep(0.05)
            if self.cpu_seconds() - before < 0.001:
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One system in one setting; `tool` is what it needs to be set up."""

    name: str
    tool: str
    settings: str
    keeps: str  # what of the events it was given outlives a kill, and a power cut
    open: Callable[[Stage], AbstractAsyncContextManager[Line]]
    share: float = 1.0  # of the events that are counted: slow ones get fewer


def surroundings(stage: Stage) -> dict[str, str]:
    return {
        "WEBHOOK_URL": stage.url,
        "WEBHOOK_SECRET": SECRET,
        "WEBHOOK_CA": str(stage.folder / "ca.pem"),
        "PYTHONPATH": str(ROOT),
    }


@asynccontextmanager
async def relay(stage: Stage) -> AsyncIterator[Line]:
    endpoint = stage.endpoint("", settings='signatures = ["standard"]')
    async with stage.system("relay", paths=(), more=endpoint) as system:
        url = f"http://127.0.0.1:{system.to}/v1/events"
        command = our_python(f"{PACKAGE}.relay_app", "--url", url, "--loop", stage.options.loop)
        log = stage.new_folder("relay-app") / "log"
        async with started(*command, name="relay's app", log=log) as app:
            yield Line(app=app, carriers=(system.running,))


@asynccontextmanager
async def celery(stage: Stage, *, durable: bool) -> AsyncIterator[Line]:
    worker = (
        *(python(stage.options.tools), "-m", "celery", "--app", f"{PACKAGE}.celery_redis", "worker"),
        # Faster here than processes (prefork, 2 to 16) and than gevent.
        *("--pool", "threads", "--concurrency", str(THREADS), "--loglevel", "WARNING"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    )
    app = (python(stage.options.tools), "-m", f"{PACKAGE}.celery_redis")
    async with over_redis(stage, "celery", app, worker, durable=durable) as line:
        yield line


@asynccontextmanager
async def bullmq(stage: Stage, *, durable: bool) -> AsyncIterator[Line]:
    script = str(Path(__file__).with_name("bullmq_redis.mjs"))
    command = ("node", script, str(modules(stage.options.tools).resolve()))
    async with over_redis(stage, "bullmq", (*command, "app"), (*command, "worker"), durable=durable) as line:
        yield line


@asynccontextmanager
async def huey(stage: Stage) -> AsyncIterator[Line]:
    folder = stage.new_folder("huey")
    environment = surroundings(stage) | {"QUEUE": str(folder / "queue.db")}
    program = python(stage.options.tools)
    consumer = (
        *(program, "-m", "huey.bin.huey_consumer", f"{PACKAGE}.huey_sqlite.huey"),
        *("--workers", str(THREADS), "--worker-type", "thread", "--no-periodic", "--delay", "0.01"),
    )
    async with (
        started(
            program,
            "-m",
            f"{PACKAGE}.huey_sqlite",
            name="huey's app",
            log=folder / "app.log",
            environment=environment,
        ) as app,
        started(
            *consumer, name="huey", log=folder / "consumer.log", environment=environment, heard=False
        ) as running,
    ):
        yield Line(app=app, carriers=(running,))


@asynccontextmanager
async def over_redis(
    stage: Stage, name: str, app: tuple[str, ...], worker: tuple[str, ...], *, durable: bool
) -> AsyncIterator[Line]:
    """Start a Redis of its own, in its default settings or synced at every write, and who works with it."""
    folder = stage.new_folder(name)
    port = free_port()
    server = ("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder))
    environment = surroundings(stage) | {
        "BROKER": f"redis://127.0.0.1:{port}/0",
        "DURABLE": str(int(durable)),
    }
    async with AsyncExitStack() as running:
        redis = await running.enter_async_context(
            started(
                *server,
                *(DURABLE_REDIS if durable else ()),
                name="redis",
                log=folder / "redis.log",
                heard=False,
            )
        )
        await until_it_answers(redis, port)
        begin = partial(started, environment=environment)
        working = begin(*worker, name=f"{name}'s worker", log=folder / "worker.log", heard=False)
        yield Line(
            carriers=(redis, await running.enter_async_context(working)),
            app=await running.enter_async_context(begin(*app, name=f"{name}'s app", log=folder / "app.log")),
        )


async def until_it_answers(redis: Running, port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and redis.process.returncode is None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PING\r\n")
            answer = await reader.readline()
            writer.close()
            if answer == b"+PONG\r\n":
                return
        await asyncio.sleep(0.02)
    raise redis.failed("did not answer within 10 s")


RIVALS = (
    Rival(
        name="BullMQ",
        tool="bullmq",
        settings="Redis as it comes, 32 jobs added and 32 worked at a time, keep-alive agent",
        keeps="a kill of Redis loses what came since its last snapshot",
        open=partial(bullmq, durable=False),
    ),
    Rival(
        name="BullMQ, synced",
        tool="bullmq",
        settings="the same with appendonly, appendfsync always",
        keeps="all",
        open=partial(bullmq, durable=True),
    ),
    Rival(
        name="Celery",
        tool="celery",
        settings=f"Redis as it comes, {THREADS} threads (prefork was slower), a requests session in each",
        keeps="a kill of Redis loses what came since its last snapshot, a kill of a worker its tasks",
        open=partial(celery, durable=False),
        share=0.25,
    ),
    Rival(
        name="Celery, synced",
        tool="celery",
        settings="the same with acks_late, appendonly, appendfsync always",
        keeps="all",
        open=partial(celery, durable=True),
        share=0.25,
    ),
    Rival(
        name="huey",
        tool="huey",
        settings=f"SQLite with fsync, {THREADS} threads, a requests session in each",
        keeps="a kill of the consumer loses the tasks it holds",
        open=huey,
        share=0.25,
    ),
)
