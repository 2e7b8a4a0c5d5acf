"""One run: a relay in a process of its own, its driver, receivers and faults, and the logs of all four."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp
import orjson

from tests.durability import checker
from tests.durability.driver import Driver
from tests.durability.journal import CLOCK, Journal
from tests.durability.ledger import SECRET, Ledger
from tests.durability.plan import THREE, Endpoint
from tests.durability.shim import Disk
from tests.durability.zygote import Zygote
from tests.process import free_port
from tests.receiver import Receiver

READY_SECONDS = 20.0
END_SECONDS = 30.0
DRAIN_SECONDS = 60.0
CALL_SECONDS = 20.0


class EndedError(Exception):
    """The relay ended when it should have become ready; `code` is its exit code."""

    def __init__(self, code: int, log: str) -> None:
        super().__init__(f"exit code {code}\n{log[-2000:]}")
        self.code = code


class World:
    """Everything of a run lies in `folder`; the checker reads only the logs there."""

    def __init__(
        self,
        folder: Path,
        zygote: Zygote,
        *,
        seed: int = 1,
        endpoints: Sequence[Endpoint] = THREE,
        durability: str = "full",
        shimmed: bool = False,
        plant: str | None = None,
        grace_seconds: float = 8.0,
        rate: float = 200.0,
    ) -> None:
        self.folder = folder
        self.outbox = folder / "outbox" / "relay.db"
        self.outbox.parent.mkdir(parents=True)
        self.endpoints = endpoints
        self.port = free_port()
        self.pid = 0
        self._zygote = zygote
        self._plant = plant
        self._ended: asyncio.Future[int] | None = None
        self._stack = contextlib.AsyncExitStack()
        self._faults = self._journal("faults")
        self.ledger = Ledger(endpoints, self._journal("ledger"), seed=seed)
        self.driver = Driver(
            lambda: f"http://127.0.0.1:{self.port}",
            self._journal("driver", synced=True),
            seed=seed,
            rate=rate,
        )
        self.disk = Disk(folder / "disk", self.outbox) if shimmed else None
        self._settings = {"durability": durability, "grace_ms": round(grace_seconds * 1000)}

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.ledger)
        self._client = await self._stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_SECONDS))
        )
        (self.folder / "authority.pem").write_bytes(Receiver.authority.cert_pem.bytes())
        (self.folder / "relay.toml").write_text(self._config())
        self.fault(
            "plan",
            endpoints=[plan_of(endpoint) for endpoint in self.endpoints],
            grace_ms=self._settings["grace_ms"],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.alive:
            await self.kill()
        await self._stack.aclose()
        if self.disk is not None:
            self.disk.close()

    # The relay

    @property
    def alive(self) -> bool:
        return self._ended is not None and not self._ended.done()

    @property
    def log(self) -> str:
        path = self.folder / "relay.log"
        return path.read_text() if path.exists() else ""

    async def start(self) -> None:
        """Start the relay; return when it is ready. Raises EndedError."""
        disk = self.disk.environment if self.disk is not None else {}
        self.fault("start")
        self.pid, self._ended = await self._zygote.start(
            {
                "config": str(self.folder / "relay.toml"),
                "environment": {"SSL_CERT_FILE": str(self.folder / "authority.pem"), **disk},
                "log": str(self.folder / "relay.log"),
                "plant": self._plant,
            }
        )
        async with asyncio.timeout(READY_SECONDS):
            while not await self._ready():
                if self._ended.done():
                    self.fault("ended", code=self._ended.result())
                    raise EndedError(self._ended.result(), self.log)
                await asyncio.sleep(0.005)
        self.fault("ready")

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.ended()

    async def stop(self) -> int:
        """Stop in order; return the exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self, *, within: float = END_SECONDS) -> int:
        """Wait until the relay has ended; return its exit code."""
        assert self._ended is not None
        async with asyncio.timeout(within):
            code = await asyncio.shield(self._ended)
        self.fault("ended", code=code)
        return code

    def signal(self, number: signal.Signals) -> None:
        self.fault("signal", name=number.name)
        if self.alive:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself and we have not heard yet
                os.kill(self.pid, number)

    def cut_power(self, *args: Any) -> int:
        """Take from a dead relay's outbox what had not been synced."""
        assert self.disk is not None
        lost = self.disk.cut_power(*args)
        self.fault("power", blocks=lost)
        return lost

    def fail_disk(self, at: int, errno: int, *, persistent: bool) -> None:
        assert self.disk is not None
        self.fault("disk", failing=True)
        self.disk.fail(at, errno, persistent=persistent)

    def mend_disk(self) -> None:
        if self.disk is not None:
            self.disk.mend()
            self.fault("disk", failing=False)

    def fault(self, kind: str, **more: Any) -> None:
        self._faults.write(kind=kind, **more)

    # Its API

    async def call(self, method: str, path: str, content: object = None) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.port}{path}"
        body = orjson.dumps(content) if content is not None else None
        headers = {"Content-Type": "application/json"} if content is not None else {}
        async with self._client.request(method, url, data=body, headers=headers) as answer:
            text = await answer.read()
            return answer.status, orjson.loads(text) if text[:1] in b"{[" and text else text

    async def backlog(self) -> dict[str, tuple[int, int]]:
        """Return of every endpoint how much is pending and how much is dead."""
        _, listed = await self.call("GET", "/v1/webhooks/settings")
        return {each["id"]: (each["pending"], each["dead"]) for each in listed["data"]}

    async def stories(self) -> list[dict[str, Any]]:
        """Return every event with all that was done for it, in the order of acceptance."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            status, page = await self.call("GET", f"/v1/events?limit=200{cursor}")
            assert status == 200, page
            found += page["data"]
            if page["next_cursor"] is None:
                return found[::-1]
            cursor = f"&cursor={page['next_cursor']}"

    async def _ready(self) -> bool:
        try:
            return (await self.call("GET", "/readyz"))[0] == 200
        except (aiohttp.ClientError, OSError):
            return False

    # The run

    async def drained(self, *, within: float = DRAIN_SECONDS) -> bool:
        """Wait until nothing is pending."""
        try:
            async with asyncio.timeout(within):
                while any(pending for pending, _ in (await self.backlog()).values()):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            return False
        return True

    async def finish(self, *, replay: bool = True, within: float = DRAIN_SECONDS) -> checker.Report:
        """End the faults, let everything come to rest, and check the run."""
        self.mend_disk()
        if not self.alive:
            await self.start()
        await self.driver.settle()
        self.fault("settling")
        drained = await self.drained(within=within)
        if drained:
            self.fault("drained")
        self._keep("before", await self.stories())
        if drained and replay:
            await self._replay_the_dead(within)
        self._keep("after", await self.stories())
        await self.stop()
        return checker.check(self.folder)

    async def _replay_the_dead(self, within: float) -> None:
        """Every dead letter must be there to be listed and sent again."""
        self.ledger.healed = True
        for endpoint, (_, dead) in (await self.backlog()).items():
            began = CLOCK.now_ms()  # what is replayed may arrive before the answer does
            status, answer = await self.call(
                "POST", f"/v1/webhooks/settings/{endpoint}/replay", {"state": "dead"}
            )
            assert status in {200, 202}, answer
            self.fault("replayed", t=began, endpoint=endpoint, count=answer["count"], dead=dead)
        await self.drained(within=within)

    def _keep(self, name: str, stories: Iterable[object]) -> None:
        lines = b"".join(orjson.dumps(story) + b"\n" for story in stories)
        (self.folder / f"{name}.jsonl").write_bytes(lines)

    def _journal(self, name: str, *, synced: bool = False) -> Journal:
        journal = Journal(self.folder / f"{name}.jsonl", synced=synced)
        self._stack.callback(journal.close)
        return journal

    def _config(self) -> str:
        parts = [
            f'[server]\nlisten = "127.0.0.1:{self.port}"\n',
            f'shutdown_grace = "{self._settings["grace_ms"]}ms"\n',
            f'[outbox]\npath = "{self.outbox}"\ndurability = "{self._settings["durability"]}"\n',
            '[egress]\nallow_private = ["127.0.0.0/8"]\n',
        ]
        for endpoint in self.endpoints:
            keys: dict[str, object] = {
                "id": endpoint.id,
                "url": self.ledger.url(endpoint.id),
                "events": list(endpoint.events),
                "secret": SECRET,
                "timeout": f"{round(endpoint.timeout_seconds * 1000)}ms",
                "retry_schedule": [f"{delay}ms" for delay in endpoint.schedule_ms],
                "concurrency": endpoint.concurrency,
                "down_after": 0,  # probes have a pace of their own, and tests of their own
            }
            if endpoint.ordered:
                keys["order"] = "key"
            parts.append("[[endpoints]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items()))
        return "\n".join(parts)


def plan_of(endpoint: Endpoint) -> dict[str, Any]:
    """Return what the checker needs to know of an endpoint."""
    return {
        "id": endpoint.id,
        "events": endpoint.events,
        "ordered": endpoint.ordered,
        "schedule_ms": endpoint.schedule_ms,
        "timeout_ms": round(endpoint.timeout_seconds * 1000),
    }


@contextlib.asynccontextmanager
async def posting(world: World, **how: Any) -> AsyncIterator[None]:
    """Let the driver post all the while."""
    enough = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(world.driver.post_until(enough, **how))
        try:
            yield
        finally:
            enough.set()
