"""Receiver, load and the measured system, brought together in one folder on a real disk.

A `Stage` holds load and receiver for the whole run. Each round puts fresh systems on it, the relay with a
fresh outbox or the bare handler. What a round measures is the business of `figures.py`.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from tests.bench.processes import Running, UnmeasuredError, started
from tests.process import free_port

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSBiZW5jaG1hcmsgb25seQ=="
CONFIG = """
[server]
listen = "127.0.0.1:{port}"
{loop}

[outbox]
path = "{folder}/relay.db"

[egress]
allow_private = ["127.0.0.0/8", "::1/128"]

{more}
"""
ENDPOINT = """
[[endpoints]]
id = "{id}"
url = "{url}"
events = ["*"]
secret = "{secret}"
"""

Prepare = Callable[[Path], Awaitable[None]]  # what is done to a folder before the relay starts in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the person at the keyboard asked for."""

    rounds: int
    events: int  # in each round, after the warm-up
    loop: str  # of the measured systems; `auto` is uvloop where it is installed
    idle_seconds: float
    self_test: bool  # put the bare handler in the relay's seat too
    backlog: int = 1_000_000  # deliveries that wait, where a backlog is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A relay or a bare handler that has said it is ready."""

    running: Running
    port: int
    ready_seconds: float  # from the start of its process


class Stage:
    """Everything a round needs; made by `open_stage`."""

    def __init__(self, options: Options, folder: Path, load: Running, receiver: Running, url: str) -> None:
        self.options = options
        self.folder = folder
        self.load = load
        self.receiver = receiver
        self._url = url
        self._expected = 0
        self._started = 0

    @asynccontextmanager
    async def system(
        self, seat: str, *, paths: Sequence[str] = ("",), prepare: Prepare | None = None, more: str = ""
    ) -> AsyncIterator[System]:
        """Start what sits in this seat, wait until it is ready, and end it with the block.

        A relay has an endpoint for each path of the receiver's, and whatever `more` says in its config.
        """
        self._started += 1
        folder = self.folder / f"{self._started}-{seat}"
        folder.mkdir()
        port = free_port()
        if prepare is not None:
            await prepare(folder)
        if seat == "bare" or self.options.self_test:
            command = self._bare(port)
        else:
            command = self._relay(folder, port, "".join(self._endpoint(path) for path in paths) + more)
        trust = {"SSL_CERT_FILE": str(self.folder / "ca.pem")}
        began = time.monotonic()
        async with started(
            *command, name=seat, log=folder / "log", environment=trust, heard=False
        ) as running:
            await until_ready(running, port)
            yield System(running=running, port=port, ready_seconds=time.monotonic() - began)

    async def submit(
        self,
        system: System,
        events: int,
        *,
        rate: float | None = None,
        batch: int | None = None,
        copies: int = 1,
    ) -> dict[str, Any]:
        """Post events, wait until each is answered and has arrived, and say when and how fast.

        To the load's own figures (seconds) this adds `last_at`, when the last event came to the receiver. An
        event that came twice is an error: every answer was 200, so nothing had to be sent again. Each event
        is to come to so many of the receiver's paths (`copies`).
        """
        order = json.dumps({"port": system.port, "events": events, "rate": rate, "batch": batch})
        self._expected += events * copies
        try:
            figures: dict[str, Any] = await self.load.ask(order, seconds=60 + events / (rate or 200))
            arrivals = await self.receiver.ask(str(self._expected), seconds=60)
        except UnmeasuredError as error:
            raise system.running.failed(f"did not bring all events to the receiver: {error}") from error
        if arrivals["repeats"]:
            raise UnmeasuredError(f"{arrivals['repeats']} events came to the receiver more than once")
        return {**figures, "last_at": arrivals["last_at"]}

    def _bare(self, port: int) -> tuple[str, ...]:
        arguments = ("--port", str(port), "--url", self._url, "--secret", SECRET, "--loop", self.options.loop)
        return python("tests.bench.bare", *arguments)

    async def lags(self, submitted: dict[str, Any]) -> list[float]:
        """Return how long each delivery of a paced submission took to the timed paths, sorted."""
        posted: list[float] = submitted["posted_at"]
        arrived = await self.receiver.ask("arrivals", seconds=30)
        return sorted(at - posted[number] for number, at in arrived)

    def _endpoint(self, path: str) -> str:
        id_ = path.strip("/").replace("/", "-") or "main"
        return ENDPOINT.format(id=id_, url=self._url + path.strip("/"), secret=SECRET)

    def _relay(self, folder: Path, port: int, more: str) -> tuple[str, ...]:
        loop = "" if self.options.loop == "auto" else f'loop = "{self.options.loop}"'
        config = folder / "relay.toml"
        config.write_text(CONFIG.format(port=port, folder=folder, loop=loop, more=more))
        return python("relay", "serve", "--config", str(config))


@asynccontextmanager
async def open_stage(options: Options) -> AsyncIterator[Stage]:
    """Make the folder, the certificate, the receiver and the load; all are gone after the block."""
    with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=disk()) as name:
        folder = Path(name)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
            str(folder / "cert.pem")
        )
        command = python("tests.bench.receiver", str(folder / "cert.pem"))
        async with (
            started(*command, name="receiver", log=folder / "receiver.log") as receiver,
            started(*python("tests.bench.load"), name="load", log=folder / "load.log") as load,
        ):
            port = await receiver.hear(seconds=10)
            yield Stage(options, folder, load, receiver, f"https://localhost:{port}/")


async def until_ready(running: Running, port: int) -> None:
    """Ask `/readyz` every few milliseconds until it answers 200."""
    try:
        async with asyncio.timeout(20):
            while not await is_ready(port):
                if running.process.returncode is not None:
                    raise running.failed(f"ended with code {running.process.returncode}")
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise running.failed("was not ready in 20 s") from None


async def is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.readline()
        writer.close()
    except OSError:
        return False
    return b" 200 " in answer


def python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def disk() -> Path:
    """Choose where outboxes go: never into memory, where an fsync costs nothing."""
    temporary = Path(tempfile.gettempdir())
    return Path.cwd() if filesystem(temporary) in {"tmpfs", "ramfs"} else temporary


def filesystem(folder: Path) -> str:
    """Name the type of the file system that holds a folder, as the kernel does."""
    device = folder.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0]
    return "unknown"
