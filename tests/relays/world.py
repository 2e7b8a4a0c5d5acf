"""A world of several relays on one PostgreSQL, each in a process of its own, watched over by a supervisor."""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Self

import asyncpg

from tests import postgres
from tests.durability import checker
from tests.durability.journal import CLOCK
from tests.durability.world import World
from tests.durability.zygote import Zygote
from tests.process import free_port

BEAT_MS, DEAD_MS = 300, 1_500
AFTERMATH_MS = 3_000  # what a fault did to outcomes on their way shows up to so long after it
RESTART_SECONDS = 0.1
CALM_SECONDS = 60.0


class Judge(checker.Run):
    """Judges as for one relay; what explains a duplicate is any fault that happened at that time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        faults = [line for line in self.faults if line["kind"] == "trouble"]
        self.crashes = [(line["began"], line["t"] + AFTERMATH_MS) for line in faults]
        self.frozen = self.crashes

    def _explained(
        self, endpoint: str, id_: str, request: checker.Request, following: checker.Request
    ) -> bool:
        """Besides: what a relay met that was taken for dead is not kept, whatever the next one meets."""
        return super()._explained(endpoint, id_, request, following) or self._crashed(
            request.at, self._until(request)
        )

    def _accounts(self, endpoint: str, id_: str, requests: list[checker.Request]) -> None:
        """Of an attempt that two relays made, the account is of one of the two."""

        def is_told(request: checker.Request) -> bool:
            account = self._account(id_, endpoint, request.line["attempt"])
            return account is not None and account["status"] == request.line["status"]

        super()._accounts(endpoint, id_, sorted(requests, key=is_told))


class Relay:
    """One of them."""

    def __init__(self, name: str, config: Path) -> None:
        self.name = name
        self.port = free_port()
        self.config = config
        self.pid = 0
        self.ready = asyncio.Event()
        self.ended: asyncio.Future[int] | None = None
        self.killed = self.wanted = False

    @property
    def alive(self) -> bool:
        return self.ended is not None and not self.ended.done()


class Relays(World):
    """So many relays; whichever ends is started again, until `stop`."""

    def __init__(
        self,
        folder: Path,
        zygote: Zygote,
        server: postgres.Postgres,
        *,
        count: int = 4,
        seed: int = 1,
        beats: tuple[int, int] = (BEAT_MS, DEAD_MS),
        **how: object,
    ) -> None:
        super().__init__(folder, zygote, seed=seed, **how)  # type: ignore[arg-type]
        self.server = server
        self.counts: Counter[str] = Counter()
        self.relays = [Relay(f"relay{number}", folder / f"relay{number}.toml") for number in range(count)]
        self.chance = random.Random(f"{seed}/relays")
        self._relays_zygote = zygote
        self._beats = beats
        self._keepers: contextlib.AsyncExitStack = contextlib.AsyncExitStack()
        self.driver._url = self._any_url

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.database = await postgres.new_database(self.server.url, f"relays_{os.urandom(6).hex()}")
        for relay in self.relays:
            relay.wanted = True
            relay.config.write_text(self._config_of(relay))
        group = await self._keepers.enter_async_context(asyncio.TaskGroup())
        for relay in self.relays:
            group.create_task(self._keep(relay))
        await self.all_ready()
        return self

    async def __aexit__(self, *error: object) -> None:
        for relay in self.relays:
            relay.wanted = False
            self._end(relay)
        await self._keepers.aclose()
        await super().__aexit__(*error)

    def _end(self, relay: Relay) -> None:
        for number in (signal.SIGKILL, signal.SIGCONT):
            if relay.alive:
                os.kill(relay.pid, number)

    async def all_ready(self) -> None:
        async with asyncio.timeout(CALM_SECONDS):
            for relay in self.relays:
                await relay.ready.wait()

    # What happens to them

    async def kill(self, relay: Relay | None = None) -> None:
        """Kill -9, and wait until it is back."""
        assert relay is not None
        with self.trouble("kills"):
            relay.killed, ended = True, relay.ended
            os.kill(relay.pid, signal.SIGKILL)
            assert ended is not None
            await ended
        await relay.ready.wait()

    async def stop_and_continue(self, relay: Relay, seconds: float) -> None:
        """Let a relay sleep, for longer than others believe that it lives."""
        with self.trouble("freezes"):
            pid = relay.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def restart_server(self, how: str = "immediate") -> None:
        with self.trouble("restarts"):
            await asyncio.to_thread(self.server.restart, how)

    async def freeze_server(self, seconds: float) -> None:
        """Let the database be there and say nothing."""
        with self.trouble("server freezes"):
            self.server.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.server.signal(signal.SIGCONT)

    @contextlib.contextmanager
    def trouble(self, kind: str):
        began = CLOCK.now_ms()
        self.counts[kind] += 1
        try:
            yield
        finally:
            self.fault("trouble", began=began, of=kind)

    # The run

    async def finish(self, *, replay: bool = True, within: float = CALM_SECONDS) -> checker.Report:
        """End the faults, let everything come to rest, and check the run."""
        await self.all_ready()
        self.port = self.relays[0].port
        await self.driver.settle()
        self.fault("settling")
        if drained := await self.drained(within=within):
            self.fault("drained")
        self._keep_stories("before", await self.stories())
        if drained and replay:
            await self._replay_the_dead(within)
        self._keep_stories("after", await self.stories())
        for relay in self.relays:
            relay.wanted = False
            os.kill(relay.pid, signal.SIGTERM)
        for relay in self.relays:
            assert relay.ended is not None
            async with asyncio.timeout(CALM_SECONDS):
                if (code := await relay.ended) != 0:
                    self.counts[f"exit code {code}"] += 1
        report = Judge(self.folder).check()
        report.figures.update(self.counts)
        report.figures["left over"] = await self._left_over()
        return report

    async def _left_over(self) -> int:
        """Count claims and relays that are left although all have stopped in order."""
        connection = await asyncpg.connect(self.database)
        try:
            for row in await connection.fetch(
                "SELECT * FROM relay.claims c LEFT JOIN relay.relays r ON r.id = c.relay"
            ):
                self.fault("left over", row=str(dict(row)))
            return int(
                await connection.fetchval(
                    "SELECT (SELECT count(*) FROM relay.claims) + (SELECT count(*) FROM relay.relays)"
                    " + (SELECT count(*) FROM relay.holders)"
                )
            )
        finally:
            await connection.close()

    def _any_url(self) -> str:
        return f"http://127.0.0.1:{self.chance.choice(self.relays).port}"

    async def _keep(self, relay: Relay) -> None:
        """Start a relay whenever it is not there."""
        while relay.wanted:
            relay.pid, relay.ended = await self._relays_zygote.start(
                {
                    "config": str(relay.config),
                    "environment": {"SSL_CERT_FILE": str(self.folder / "authority.pem")},
                    "log": str(self.folder / f"{relay.name}.log"),
                    "plant": None,
                }
            )
            while relay.alive and relay.wanted and not await self._is_ready(relay):
                await asyncio.sleep(0.02)
            if not relay.wanted:
                self._end(relay)
            if relay.alive:
                relay.ready.set()
            was_ready = relay.ready.is_set()
            code = await asyncio.shield(relay.ended)
            relay.ready.clear()
            if was_ready and not relay.killed and relay.wanted:
                self.counts["ended by themselves"] += 1
                self.fault("ended by itself", relay=relay.name, code=code)
            relay.killed = False
            await asyncio.sleep(RESTART_SECONDS)

    async def _is_ready(self, relay: Relay) -> bool:
        self.port = relay.port
        return await self._ready()

    def _config_of(self, relay: Relay) -> str:
        self.port = relay.port
        return self._config().replace(
            f'path = "{self.outbox}"\ndurability = "{self._settings["durability"]}"\n',
            f'url = "{self.database}"\nheartbeat = "{self._beats[0]}ms"\ndead_after = "{self._beats[1]}ms"\n',
        )

    def _keep_stories(self, name: str, stories: list[dict]) -> None:
        self._keep_lines(name, stories)

    def _keep_lines(self, name: str, stories: list[dict]) -> None:
        World._keep(self, name, stories)  # type: ignore[arg-type]
