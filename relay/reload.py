"""Reload: the config is read again, and what changed takes effect while everything goes on.

A config with a mistake changes nothing, and neither does one that cannot be written down (a full outbox).
What cannot change while the relay runs is named and stays as it was at the start.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from threading import Thread

from relay import logs
from relay.api.guard import LOOPBACK_HOSTS, Access
from relay.api.state import Reloaded, State
from relay.catalogue import Catalogue
from relay.config import Config, ConfigError, Server, load
from relay.outbox import StoppingError, UnavailableError
from relay.sources.database import UnfitError
from relay.sources.readers import Readers
from relay.systemd import ServiceManager

log = logging.getLogger("relay")

# What is bound, opened or running already.
FIXED = (
    "server.listen",
    "server.ops_listen",
    "server.loop",
    "server.page",
    "outbox.path",
    "outbox.url",
    "outbox.durability",
    "outbox.max_size",
    "outbox.max_pending",
    "outbox.listen_url",
    "outbox.heartbeat_seconds",
    "outbox.dead_after_seconds",
)
LONGEST_READ_SECONDS = 30.0
MOST_TOLD = 1000  # mistakes in one line of the log


class Reloader:
    """Reads the config again when asked; `config` is the one in force."""

    def __init__(
        self,
        path: Path,
        config: Config,
        state: State,
        access: Access,
        manager: ServiceManager,
        *,
        sources: Readers,
    ) -> None:
        self.config = config
        self.path = path
        self.state = state
        self.access = access
        self.manager = manager
        self.sources = sources
        self._one_at_a_time = asyncio.Lock()
        self._reading: Thread | None = None

    async def __call__(self) -> Reloaded:
        """Put the config as it is now into force; what is raised instead is told in the log.

        Raises ConfigError, UnavailableError, StoppingError.
        """
        async with self._one_at_a_time:
            metrics = self.state.metrics
            try:
                reloaded = await self._reload()
            except ConfigError as error:
                metrics.reload_successful = False
                refused(error.problems)
                raise
            except (UnavailableError, StoppingError) as error:
                metrics.reload_successful = False
                refused([str(error)])
                raise
            else:
                metrics.reloaded(self.state.clock.now_ms())
                return reloaded
            finally:
                if self.state.unready is None:
                    self.manager.ready()

    def retention_seconds(self) -> float:
        """Tell how long events are kept that are over, by the config in force."""
        return self.config.outbox.retention_seconds

    async def at_hangups(self) -> None:
        """Reload at every SIGHUP; those that come during a reload are one more. Until cancelled."""
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        while True:
            await asked.wait()
            asked.clear()
            with suppress(ConfigError, UnavailableError, StoppingError):  # told already
                await self()

    async def _reload(self) -> Reloaded:
        if self.state.unready is not None:
            raise StoppingError(self.state.unready)
        self.manager.reloading()
        told = await self._read()
        config, needs_restart = fitted(told, self.config)
        try:
            await self.sources.check(config.sources)
        except UnfitError as error:
            raise ConfigError((f"{self.path}: {error}",)) from None
        # First, for an endpoint that is new may be sent to at once.
        await self._follow(config)
        try:
            changes = await self.state.endpoints.reload(
                configured=config.endpoints, defaults=config.delivery, policy=config.egress.policy
            )
        except UnavailableError:
            await self._follow(self.config)
            raise
        self._apply(config)
        await self.sources.follow(config.sources)
        log.info(
            "reloaded",
            extra={"added": changes.added, "changed": changes.changed, "removed": changes.removed},
        )
        if needs_restart:
            log.warning("restart_needed", extra={"keys": needs_restart})
        tell_changes(changes.cancelled, changes.aside)
        return Reloaded(changes=changes, needs_restart=needs_restart)

    async def _read(self) -> Config:
        """Read the config in a thread: schemas are compiled, and files of secrets may be far away.

        A thread of our own, because for one that hangs neither a stop nor the next reload may wait.
        """
        if self._reading is not None and self._reading.is_alive():
            raise ConfigError((f"{self.path}: what it names is still being read, since the last reload",))
        config = Future[Config]()
        config.set_running_or_notify_cancel()
        self._reading = Thread(target=read, args=(self.path, config), name="reload", daemon=True)
        self._reading.start()
        try:
            async with asyncio.timeout(LONGEST_READ_SECONDS):
                return await asyncio.wrap_future(config)
        except TimeoutError:
            problem = f"{self.path}: what it names was not read within {LONGEST_READ_SECONDS:g} s"
            raise ConfigError((problem,)) from None

    async def _follow(self, config: Config) -> None:
        """Send by this policy from now on; the connections of everyone are kept if it is the same."""
        if self.state.sender.policy != config.egress.policy:
            known = {each.endpoint.id for each in self.state.endpoints.all()}
            await self.state.sender.change(config.egress.policy, known)

    def _apply(self, config: Config) -> None:
        """Put into force what is not an endpoint's."""
        self.config = config
        catalogue = Catalogue(config.events.values())
        self.state.catalogue = catalogue
        self.state.ingest.learn(catalogue)
        self.state.max_event_size = config.server.max_event_size
        self.access.change(hosts_of(config.server), config.server.tokens)
        logs.configure(config.logging.level, config.logging.format)


def read(path: Path, config: Future[Config]) -> None:
    try:
        config.set_result(load(path, os.environ))
    except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
        config.set_exception(error)


def fitted(told: Config, running: Config) -> tuple[Config, tuple[str, ...]]:
    """Return a config as far as it can be had without a restart, and the keys that it cannot."""
    later = tuple(
        key.removesuffix("_seconds") for key in FIXED if attrgetter(key)(told) != attrgetter(key)(running)
    )
    server = replace(
        told.server,
        listen=running.server.listen,
        ops_listen=running.server.ops_listen,
        loop=running.server.loop,
        page=running.server.page,
    )
    if not server.listen.is_local and not server.tokens:
        # Fine where it would like to listen, but not where it listens now.
        server = replace(server, tokens=running.server.tokens)
        later += ("server.tokens",)
    outbox = replace(running.outbox, retention_seconds=told.outbox.retention_seconds)
    return replace(told, server=server, outbox=outbox), later


def hosts_of(server: Server) -> frozenset[str] | None:
    """Return the hosts that a request may name; None at a unix socket, which no browser can reach."""
    if server.listen.path is not None:
        return None
    return LOOPBACK_HOSTS | {host.lower() for host in (*server.allowed_hosts, server.listen.host)}


def refused(problems: Sequence[str]) -> None:
    log.error("reload_refused", extra={"problems": list(problems[:MOST_TOLD])})


def tell_changes(cancelled: Mapping[str, int], aside: Sequence[str]) -> None:
    """Say what became of endpoints that are no longer as they were at the last stop."""
    for endpoint, count in cancelled.items():
        log.warning("deliveries_cancelled", extra={"endpoint": endpoint, "deliveries": count})
    for endpoint in aside:
        log.warning("endpoint_set_aside", extra={"endpoint": endpoint})
