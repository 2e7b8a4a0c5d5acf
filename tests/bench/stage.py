"""Receiver, load and the measured system, brought together in one folder on a real disk.

A `Stage` holds load and receiver for the whole run. Each round puts fresh systems on it, the relay with a
fresh outbox or the bare handler. What a round measures is the business of `figures.py`.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from tests.bench.disk import disk
from tests.bench.processes import Running, UnmeasuredError, started
from tests.process import free_port

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSBiZW5jaG1hcmsgb25seQ=="
CONFIG = """
[server]
listen = "{listen}"
{loop}

[egress]
allow_private = ["127.0.0.0/8", "::1/128"]

{more}
"""
ENDPOINT = """
[[endpoints]]
id = "{id}"
url = "{url}"
events = ["{events}"]
secret = "{secret}"
{settings}
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
    tools: Path = Path(".bench")  # what the compared systems are installed in
    quick: bool = False  # whether it runs, not how fast


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A relay or a bare handler that has said it is ready."""

    running: Running
    to: (
        int | str | list[int | str]
    )  # a port of loopback, or the path of a unix socket; several of them at once
    ready_seconds: float  # from the start of its process


class Stage:
    """Everything a round needs; made by `open_stage`."""

    def __init__(self, options: Options, folder: Path, load: Running, receiver: Running, url: str) -> None:
        self.options = options
        self.folder = folder
        self.load = load
        self.receiver = receiver
        self.url = url
        self._expected = 0
        self._started = 0

    @asynccontextmanager
    async def system(
        self,
        seat: str,
        *,
        paths: Sequence[str] = ("",),
        prepare: Prepare | None = None,
        more: str = "",
        unix: bool = False,
        loop: str | None = None,
        outbox: str | None = None,
    ) -> AsyncIterator[System]:
        """Start what sits in this seat, wait until it is ready, and end it with the block.

        A relay has an endpoint for each path of the receiver's, and whatever `more` says in its config. It
        listens on a port, or on a `unix` socket in its folder. Its `outbox` is a file there, or at this URL.
        """
        folder = self.new_folder(seat)
        if prepare is not None:
            await prepare(folder)
        loop = loop or self.options.loop
        to: int | str = free_port()
        if seat == "bare" or self.options.self_test:
            command = self._bare(to, loop)
        else:
            to = str(folder / "socket") if unix else to
            more = "".join(map(self.endpoint, paths)) + more
            listen = f"unix:{to}" if unix else f"127.0.0.1:{to}"
            kept = f'path = "{folder}/relay.db"' if outbox is None else f'url = "{outbox}"'
            command = self._relay(folder, listen, loop, f"[outbox]\n{kept}\n{more}")
        trust = {"SSL_CERT_FILE": str(self.folder / "ca.pem")}
        began = time.monotonic()
        async with started(
            *command, name=seat, log=folder / "log", environment=trust, heard=False
        ) as running:
            await until_ready(running, to)
            yield System(running=running, to=to, ready_seconds=time.monotonic() - began)

    def new_folder(self, seat: str) -> Path:
        self._started += 1
        folder = self.folder / f"{self._started}-{seat}"
        folder.mkdir()
        return folder

    async def submit(
        self,
        system: System,
        events: int,
        *,
        copies: int = 1,
        **order: Any,
    ) -> dict[str, Any]:
        """Post events to a system as the load's order says; see `hand_over`."""
        wanted = {name: value for name, value in order.items() if value is not None}
        return await self.hand_over(
            self.load, system.running, {"to": system.to, "events": events, **wanted}, copies=copies
        )

    async def hand_over(
        self, sender: Running, system: Running, order: dict[str, Any], *, copies: int = 1
    ) -> dict[str, Any]:
        """Have a sender hand events over, wait until each has arrived, and say when and how fast.

        To the sender's own figures (seconds) this adds `last_at`, when the last event came to the receiver.
        An event that came twice is an error: every answer was 200, so nothing had to be sent again. Each
        event is to come to so many of the receiver's paths (`copies`).
        """
        events = order["events"]
        self._expected += events * copies
        try:
            figures: dict[str, Any] = await sender.ask(
                json.dumps(order), seconds=60 + events / (order.get("rate") or 200)
            )
            arrivals = await self.receiver.ask(str(self._expected), seconds=60 + events * copies / 200)
        except UnmeasuredError as error:
            raise system.failed(f"did not bring all events to the receiver: {error}") from error
        if arrivals["repeats"] or arrivals["forged"]:
            raise UnmeasuredError(
                f"{arrivals['repeats']} events came more than once, {arrivals['forged']} were badly signed"
            )
        return {**figures, "last_at": arrivals["last_at"]}

    def _bare(self, port: int, loop: str) -> tuple[str, ...]:
        arguments = ("--port", str(port), "--url", self.url, "--secret", SECRET, "--loop", loop)
        return python("tests.bench.bare", *arguments)

    async def commit_size(self, system: System) -> float:
        """Return how many accepts and outcomes a relay took into a commit on average, by its metrics."""
        name = "relay_store_commit_batch_size"
        text = (await get(system.to, "/metrics")).decode()
        found = {
            label: float(value)
            for label, _, value in (line.rpartition(" ") for line in text.splitlines())
            if label in {f"{name}_sum", f"{name}_count"}
        }
        return (
            found[f"{name}_sum"] / found[f"{name}_count"] if found else 1.0
        )  # a bare handler has no metrics

    async def lags(self, submitted: dict[str, Any]) -> list[float]:
        """Return how long each delivery of a paced submission took to the timed paths, sorted."""
        posted: list[float] = submitted["posted_at"]
        arrived = await self.receiver.ask("arrivals", seconds=30)
        return sorted(at - posted[number] for number, at in arrived)

    def endpoint(self, path: str, events: str = "*", settings: str = "") -> str:
        """Write the config of an endpoint at one of the receiver's paths."""
        id_ = path.strip("/").replace("/", "-") or "main"
        url = self.url + path.strip("/")
        return ENDPOINT.format(id=id_, url=url, events=events, secret=SECRET, settings=settings)

    def _relay(self, folder: Path, listen: str, loop: str, more: str) -> tuple[str, ...]:
        chosen = "" if loop == "auto" else f'loop = "{loop}"'
        config = folder / "relay.toml"
        config.write_text(CONFIG.format(listen=listen, folder=folder, loop=chosen, more=more))
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
        command = python("tests.bench.receiver", str(folder / "cert.pem"), SECRET)
        async with (
            started(*command, name="receiver", log=folder / "receiver.log") as receiver,
            started(*python("tests.bench.load"), name="load", log=folder / "load.log") as load,
        ):
            port = await receiver.hear(seconds=10)
            yield Stage(options, folder, load, receiver, f"https://localhost:{port}/")


async def until_ready(running: Running, to: int | str) -> None:
    """Ask `/readyz` every few milliseconds until it answers 200."""
    try:
        async with asyncio.timeout(20):
            while not await is_ready(to):
                if running.process.returncode is not None:
                    raise running.failed(f"ended with code {running.process.returncode}")
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise running.failed("was not ready in 20 s") from None


async def is_ready(to: int | str) -> bool:
    try:
        return b" 200 " in (await get(to, "/readyz")).partition(b"\r\n")[0]
    except OSError:
        return False


async def get(to: int | str, path: str) -> bytes:
    """Return a whole answer, head and all."""
    if isinstance(to, str):
        reader, writer = await asyncio.open_unix_connection(to)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", to)
    host = "localhost" if isinstance(to, str) else f"127.0.0.1:{to}"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer


def python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)
