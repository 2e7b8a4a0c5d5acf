"""`relay demo`: the whole relay at work on this machine, without a config and without a network.

A real relay in a process of its own, on a temporary outbox; a receiver here that verifies, and refuses
one event twice before it takes it; the five events of the original service; a table of what arrived.
Whatever happens, what was started is ended and what was written is removed.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from relay.cli.client import UnreachableError, call
from relay.cli.exits import CommandError, Exit
from relay.cli.output import show_json, show_table
from relay.cli.receiver import Arrival, Receiver
from relay.cli.secret import made

LIMIT_SECONDS = 8.0  # for the start, and again for the deliveries; both together take two
STOP_SECONDS = 3.0
POLL_SECONDS = 0.05

EVENTS: Mapping[str, object] = {
    "post.published": {
        "postId": "post_abc123",
        "platform": "instagram",
        "accountId": "acc_7f3k2m",
        "publishedAt": "2026-01-15T10:00:00.000Z",
        "url": "https://www.instagram.com/p/C2xYz9AbCdE/",
    },
    "post.failed": {
        "postId": "post_abc123",
        "platform": "linkedin",
        "accountId": "acc_9d1p4q",
        "failedAt": "2026-01-15T10:00:04.000Z",
        "error": {
            "code": "MEDIA_TOO_LARGE",
            "message": "The video is larger than the platform accepts.",
        },
    },
    "post.scheduled": {
        "postId": "post_abc123",
        "platforms": ["instagram", "linkedin"],
        "scheduledFor": "2026-01-16T09:30:00.000Z",
    },
    "account.disconnected": {
        "accountId": "acc_7f3k2m",
        "platform": "instagram",
        "username": "acme",
        "disconnectedAt": "2026-01-15T10:05:00.000Z",
        "error": {"code": "TOKEN_EXPIRED", "message": "The access token is no longer valid."},
    },
    "account.connected": {
        "accountId": "acc_7f3k2m",
        "platform": "instagram",
        "username": "acme",
        "connectedAt": "2026-01-15T10:10:00.000Z",
    },
}
REFUSED_TWICE = "post.failed"
SCHEMES = {"standard", "socialsyncer"}  # by which the relay signs unless told otherwise

CONFIG = """\
[server]
listen = "127.0.0.1:{port}"
shutdown_grace = "1s"

[outbox]
path = {outbox}

[egress]
allow_http = true
allow_private = ["127.0.0.0/8"]

[delivery]
retry_schedule = ["500ms", "500ms", "1s"]

[[endpoints]]
id = "demo"
url = "{receiver}"
events = ["*"]
secret = "${{env:DEMO_SECRET}}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of one event; the names are those of the JSON."""

    event: str
    id: str
    attempts: int
    signatures: dict[str, str]
    verified: bool


def demo(arguments: Namespace) -> int:
    rows = run_to_its_end(show())
    if arguments.json:
        for row in rows:
            show_json(asdict(row))
    else:
        show_table(("event", "id", "attempts", "signatures"), [in_words(row) for row in rows])
    missing = [row.event for row in rows if not row.verified]
    if missing:
        raise CommandError(
            f"{len(missing)} of {len(rows)} events did not arrive verified: {', '.join(missing)}"
        )
    return Exit.DONE


def in_words(row: Row) -> dict[str, object]:
    signatures = [f"{scheme} {worth}" for scheme, worth in row.signatures.items()]
    return {**asdict(row), "signatures": signatures or "did not arrive"}


async def show() -> list[Row]:
    """Start everything, send the events, wait for all of them to be taken, end everything."""
    secret = made()
    refusals = [503, 503]
    receiver = Receiver(
        secret=secret, answer=lambda event: refusals.pop() if refusals and event == REFUSED_TWICE else 200
    )
    async with receiver.listening(0) as hook, relay(hook, secret) as url:
        progress(f"a relay listens on {url}, a receiver on {hook}")
        events = {await submit(url, event, data): event for event, data in EVENTS.items()}
        progress(f"{len(events)} events are kept; the receiver refuses {REFUSED_TWICE} twice")
        arrivals = await arrived(receiver, events)
    return [
        summed(event, id_, [each for each in arrivals if each.id == id_]) for id_, event in events.items()
    ]


@asynccontextmanager
async def relay(hook: str, secret: str) -> AsyncIterator[str]:
    """Run a relay that delivers to `hook`; yields its URL once it is ready. Raises CommandError."""
    with tempfile.TemporaryDirectory(prefix="relay-demo-") as name:
        folder, port = Path(name), free_port()
        config = folder / "relay.toml"
        config.touch(mode=0o600)
        config.write_text(
            CONFIG.format(port=port, outbox=json.dumps(str(folder / "relay.db")), receiver=hook)
        )
        with process(config, folder / "relay.log", secret) as running:
            url = f"http://127.0.0.1:{port}"
            await ready(url, running, folder / "relay.log")
            yield url


@contextmanager
def process(config: Path, log: Path, secret: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `relay serve` until the end of the block."""
    # A variable meant for the person's own relay would override this config.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    command = [sys.executable, "-m", "relay", "serve", "--config", str(config)]
    with log.open("wb") as output:
        running = subprocess.Popen(  # noqa: S603 - our own interpreter and our own file
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=environment | {"DEMO_SECRET": secret},
        )  # fmt: skip
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


async def ready(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the relay can keep events. Raises CommandError when it ends or takes too long."""
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            while not await is_ready(url):
                if running.poll() is not None:
                    raise CommandError(f"the relay did not start: {last_line(log)}")
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise CommandError(f"the relay was not ready within {LIMIT_SECONDS:g} s", Exit.TIMED_OUT) from None


async def is_ready(url: str) -> bool:
    try:
        status, _ = await asyncio.to_thread(call, "GET", "/readyz", url=url, timeout_seconds=2.0)
    except UnreachableError:
        return False
    return status == 200


async def submit(url: str, event: str, data: object) -> str:
    """Post one event; return its id. Raises CommandError."""
    content = {"event": event, "data": data}
    status, answer = await asyncio.to_thread(call, "POST", "/v1/events", content, url=url)
    if status != 202:
        raise CommandError(f"the relay answered {event} with {status}: {answer}")
    return str(answer["id"])


async def arrived(receiver: Receiver, ids: Mapping[str, str]) -> list[Arrival]:
    """Collect requests until each of these ids was taken, or the time is over."""
    arrivals: list[Arrival] = []
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            while not ids.keys() <= {each.id for each in arrivals if each.answered == 200}:
                arrivals.append(await receiver.arrivals.get())
    except TimeoutError:
        pass  # the table shows what is missing
    return arrivals


def summed(event: str, id_: str, arrivals: Sequence[Arrival]) -> Row:
    """Sum up what arrived under one id; a signature counts only if it was right every time."""
    taken = [each for each in arrivals if each.answered == 200 and each.event == event]
    return Row(
        event=event,
        id=id_,
        attempts=len(arrivals),
        signatures={scheme: str(worth) for each in taken for scheme, worth in each.signatures.items()},
        verified=bool(taken)
        and all(each.verified and each.signatures.keys() == SCHEMES for each in arrivals),
    )


def run_to_its_end(showing: Coroutine[Any, Any, list[Row]]) -> list[Row]:
    """Run it; a signal cancels it, so that it cleans up after itself, and is KeyboardInterrupt then."""

    async def run() -> list[Row]:
        stop = cast("asyncio.Task[object]", asyncio.current_task()).cancel
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        return await showing

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
