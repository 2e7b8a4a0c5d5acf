"""The one place where the relay's objects are built and joined.

Read downwards it is the order of the start, upwards the order of the stop: outbox, sender, lanes, and
the listener last, so that nothing is taken before it can be kept and delivered.
"""

import asyncio
import gc
import logging
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from relay import __version__, logs
from relay.about import build
from relay.api.guard import Access
from relay.api.state import State
from relay.catalogue import Catalogue
from relay.clock import Clock, SystemClock, watch, watch_loop
from relay.config import Config, Server
from relay.delivery import Lanes
from relay.endpoints import Endpoints
from relay.ingest import Ingest
from relay.lane import Lane
from relay.listening import ListenError, listening
from relay.metrics import Metrics
from relay.outbox import (
    AwayError,
    Backlog,
    Bounds,
    DamagedError,
    FullError,
    HeldError,
    MovedError,
    NewerSchemaError,
    Outbox,
    OutboxError,
    UnavailableError,
    open_outbox,
)
from relay.outbox.place import shown as shown_place
from relay.outbox.sharing import Neighbours, Sharing
from relay.reload import Reloader, hosts_of, tell_changes
from relay.retention import forget
from relay.sender import Sender, open_sender
from relay.sources.database import UnfitError
from relay.sources.readers import Readers
from relay.stopping import Stop
from relay.subscription import Subscriptions
from relay.surroundings import Surroundings
from relay.systemd import ServiceManager
from relay.traces import Traces, open_traces

log = logging.getLogger("relay")

EXIT_FAILED = 1
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (UnfitError, 78),
    (HeldError, 75),
    (NewerSchemaError, 78),
    (MovedError, 78),
    (DamagedError, 74),
    (FullError, 74),  # only at the start; once it serves the relay waits for room
    (AwayError, 69),  # and for its database
)
OWN_DESCRIPTORS = 64  # outbox, log, listeners, look-ups, and the connections of `ops_listen`
YOUNG_OBJECTS = 10_000  # between two looks for cycles among what is new
MOST_ATTEMPTS = 20_000  # more would not fit the ports of one address


def run(config: Config, path: Path) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code of contract section 9."""
    logs.configure(config.logging.level, config.logging.format)
    os.umask(0o077)  # whatever the relay writes is the relay's alone
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
    )  # it holds secrets
    code = 0
    try:
        with asyncio.Runner(loop_factory=loop_factory(config.server.loop)) as runner:
            runner.run(serve(config, path))
    except* (OutboxError, ListenError, UnfitError) as group:
        code = complain(group)
    return code


async def serve(config: Config, path: Path) -> None:
    clock, metrics = SystemClock(), Metrics()
    metrics.reloaded(clock.now_ms())
    stop = Stop()
    async with (
        open_outbox(
            config.outbox.place,
            synchronous=config.outbox.durability,
            bounds=Bounds(max_bytes=config.outbox.max_size, max_pending=config.outbox.max_pending),
            sharing=Sharing(
                beat_seconds=config.outbox.heartbeat_seconds,
                dead_seconds=config.outbox.dead_after_seconds,
                listen_url=config.outbox.listen_url,
            ),
            committed=metrics.committed,
        ) as outbox,
        open_sender(policy=config.egress.policy, version=__version__) as sender,
        open_traces(os.environ, __version__) as traces,
    ):
        state, lanes = await join(config, outbox, sender, clock, metrics=metrics, traces=traces)
        access = Access(hosts_of(config.server), config.server.tokens)
        manager = ServiceManager(os.environ, clock)
        sources = Readers(state, config.sources, own=config.outbox.url)
        state.sources = sources.standings
        state.reload = reloader = Reloader(path, config, state, access, manager, sources=sources)
        await work(reloader, lanes, stop)
    log.info("stopped")


async def join(
    config: Config, outbox: Outbox, sender: Sender, clock: Clock, *, metrics: Metrics, traces: Traces
) -> tuple[State, Lanes]:
    """Build what stands between the outbox, the sender and the API, and join it."""
    lanes = Lanes(lambda endpoint, health: Lane(endpoint, health, around))
    catalogue = Catalogue(config.events.values())
    ingest = Ingest(
        outbox=outbox,
        subscriptions=Subscriptions([]),
        clock=clock,
        wake=lanes.wake,
        catalogue=catalogue,
        traces=traces,
    )
    around = Surroundings(
        outbox=outbox,
        sender=sender,
        clock=clock,
        connections=asyncio.Semaphore(most_sending := attempts_at_once()),
        make_news=ingest.news,
        wake=lanes.wake,
        metrics=metrics,
        traces=traces,
        recent=ingest.recent,
    )
    endpoints = Endpoints(
        configured=config.endpoints,
        defaults=config.delivery,
        policy=config.egress.policy,
        outbox=outbox,
        lanes=lanes,
        clock=clock,
        change=ingest.subscribe,
    )
    tell_changes(*await endpoints.open())
    heed_neighbours(outbox, lanes, endpoints)
    state = State(
        outbox=outbox,
        ingest=ingest,
        endpoints=endpoints,
        catalogue=catalogue,
        sender=sender,
        clock=clock,
        wake=lanes.wake,
        max_event_size=config.server.max_event_size,
        metrics=metrics,
        sending=lanes.sending,
        most_sending=most_sending,
    )
    return state, lanes


def heed_neighbours(outbox: Outbox, lanes: Lanes, endpoints: Endpoints) -> None:
    """Let what other relays do be known where it matters."""
    outbox.heed(
        Neighbours(
            woken=lanes.wake, stood=lanes.stood, shared=lanes.share, changed=endpoints.changed_elsewhere
        )
    )


async def work(reloader: Reloader, lanes: Lanes, stop: Stop) -> None:
    """Take, keep and deliver until told to stop."""
    state, manager, sources = reloader.state, reloader.manager, reloader.sources
    await sources.check(reloader.config.sources)
    async with asyncio.TaskGroup() as tasks:
        chores = [
            tasks.create_task(
                forget(state.outbox, state.clock, reloader.retention_seconds, sources.settled_ms)
            ),
            tasks.create_task(reloader.at_hangups()),
            tasks.create_task(manager.watched()),
            tasks.create_task(state.endpoints.end_overlaps()),
            tasks.create_task(state.endpoints.follow()),
            tasks.create_task(watch(state.clock, partial(clock_was_set, lanes))),
            tasks.create_task(watch_loop(state.metrics.loop_lag_seconds.observe)),
        ]
        async with listening(reloader.config.server, state, reloader.access, attempts_at_once()) as addresses:
            # No delivery may ever come back to us, so none goes out before our addresses are known.
            state.sender.own_addresses = addresses
            tasks.create_task(lanes.run())
            chores.append(tasks.create_task(sources.run()))
            tell_start(reloader, await backlogs_of(state.outbox))
            look_for_cycles_less()
            manager.ready()
            await stop.asked.wait()
            manager.stopping()
            await wind_down(reloader.config.server, state, lanes, stop, sources)
        for chore in chores:
            chore.cancel()


def look_for_cycles_less() -> None:
    """Leave alone what the start has built, and look less often through what comes after.

    Nearly all that an event makes is freed by counting references; the looks cost a tenth of its CPU.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def backlogs_of(outbox: Outbox) -> Mapping[str, Backlog] | None:
    """Return what waits; None if the outbox has gone away just now, which is no reason to end."""
    try:
        return await outbox.backlog()
    except UnavailableError:
        return None


def tell_start(reloader: Reloader, backlogs: Mapping[str, Backlog] | None) -> None:
    """Say in one line what was started, on what, and what waits."""
    pending = sum(each.pending for each in backlogs.values()) if backlogs is not None else None
    fields: dict[str, object] = {"config": str(reloader.path.resolve()), **build()}
    fields |= {"outbox": shown_place(reloader.config.outbox.place)}
    fields["addresses"] = reloader.state.addresses
    fields |= {"endpoints": len(reloader.state.endpoints.all()), "pending": pending}
    log.info("started", extra=fields)


def clock_was_set(lanes: Lanes, by_ms: int) -> None:
    log.warning("clock_was_set", extra={"seconds": by_ms / 1000})
    lanes.set_right()


async def wind_down(server: Server, state: State, lanes: Lanes, stop: Stop, sources: Readers) -> None:
    """Stop as contract section 8 says: unready at once, submissions for `linger`, attempts for the grace."""
    log.info("stopping", extra={"grace_seconds": server.shutdown_grace_seconds})
    state.unready = "the relay is stopping"
    await stop.asked_again_within(server.linger_seconds)
    state.refusing = "the relay is stopping: submit again in a moment"
    lanes.stop(server.shutdown_grace_seconds)
    stop.on_second(lambda: lanes.stop(0))
    await sources.stop()
    await lanes.stopped.wait()


def attempts_at_once() -> int:
    """Return how many attempts there are file descriptors for, with as many left for whoever submits.

    The soft limit is raised to the hard one first: it is low for programs that use select(), which we do not.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_ATTEMPTS
    return max(1, min(MOST_ATTEMPTS, (soft - OWN_DESCRIPTORS) // 2))


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the event loop; `auto` is uvloop where it is installed."""
    if name != "asyncio":
        try:
            import uvloop
        except ImportError:
            if name == "uvloop":
                raise ListenError('loop = "uvloop" needs the extra: pip install relay[uvloop]') from None
        else:
            return uvloop.new_event_loop
    return asyncio.new_event_loop


def complain(group: BaseExceptionGroup[BaseException]) -> int:
    """Say each failure in one sentence on stderr; return the exit code."""
    code = EXIT_FAILED
    for error in leaves(group):
        log.critical("failed", extra={"error": str(error)})
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), code)
    return code


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
