"""Limits of the machine: few descriptors, a process that stands still, a million deliveries that wait."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relay.model import Event, Owed, Submission
from relay.outbox import KeptEndpoint, open_outbox
from tests.figures import figure
from tests.process import RelayProcess, relay_process
from tests.receiver import Answer, Receiver

ENDPOINTS = 200
DESCRIPTORS = 64
MANY = 100_000  # deliveries that wait; the benchmark has a million
STALL_SECONDS = 5


def endpoint(id_: str, url: str, **settings: object) -> str:
    lines = [f"{name} = {value}" for name, value in settings.items()]
    return "\n".join(
        ["[[endpoints]]", f'id = "{id_}"', f'url = "{url}"', 'events = ["*"]', 'secret = "s"', *lines, ""]
    )


def with_few_descriptors(relay: RelayProcess) -> None:
    """Start it the way a container does that was given next to nothing."""
    with (relay.folder / "relay.log").open("ab") as log:
        relay.process = subprocess.Popen(
            ["sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh",
             sys.executable, "-m", "relay", "serve", "--config", str(relay.config)],
            stdout=log, stderr=log, env=relay.environment,
        )  # fmt: skip
    relay.wait_until_ready()


async def test_with_64_descriptors_two_hundred_endpoints_are_served_and_no_attempt_is_burnt(tmp_path):
    """Running out of descriptors is nobody's failed attempt: everything takes its turn."""
    async with Receiver(tls=False) as receiver:
        config = "".join(endpoint(f"e{n}", f"{receiver.url}/{n}") for n in range(ENDPOINTS))
        with relay_process(tmp_path, config, start=False) as relay:
            text = relay.config.read_text().replace("[egress]", "[egress]\nallow_http = true")
            relay.config.write_text(text)
            await asyncio.to_thread(with_few_descriptors, relay)
            for number in range(3):
                status, _ = await asyncio.to_thread(
                    relay.call, "POST", "/v1/events", {"event": "a", "data": {"n": number}}
                )
                assert status == 202
            await receiver.wait_for(3 * ENDPOINTS, within=60)
            opened = len(list(Path(f"/proc/{relay.process.pid}/fd").iterdir()))
            assert await asyncio.to_thread(relay.stop) == 0
        log = relay.log
    assert {request.headers["webhook-attempt"] for request in receiver.requests} == {"1"}
    assert len(receiver.requests) == 3 * ENDPOINTS
    assert opened <= DESCRIPTORS
    assert "attempt_failed" not in log


async def test_a_relay_that_stood_still_for_five_seconds_goes_on_as_if_nothing_had_been(tmp_path):
    """A machine that swaps, a container that is throttled: what was under way is neither lost nor doubled."""
    async with Receiver() as receiver:
        receiver.answers(*[Answer(delay=0.5)] * 10)
        trust = tmp_path / "ca.pem"
        Receiver.authority.cert_pem.write_to_path(str(trust))
        with relay_process(tmp_path, endpoint("main", receiver.url), {"SSL_CERT_FILE": str(trust)}) as relay:
            for number in range(20):
                status, _ = await asyncio.to_thread(
                    relay.call, "POST", "/v1/events", {"event": "a", "data": {"n": number}}
                )
                assert status == 202
            assert relay.process is not None
            relay.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STALL_SECONDS)
            relay.process.send_signal(signal.SIGCONT)
            await receiver.wait_for(20, within=20)
            assert (await asyncio.to_thread(relay.call, "GET", "/readyz"))[0] == 200
            assert await asyncio.to_thread(relay.stop) == 0
    ids = [request.headers["webhook-id"] for request in receiver.requests]
    assert len(ids) == len(set(ids)) == 20


async def wait_in_vain(path: Path, count: int) -> None:
    """Leave an outbox with so many deliveries for an endpoint that is paused."""
    async with open_outbox(path, synchronous="off") as outbox:
        await outbox.register(["stuck"])
        await outbox.keep_endpoint(KeptEndpoint(id="stuck", settings=None, paused=True))
        now_ms = round(time.time() * 1000)  # noqa: TID251 - as old as a real relay would see them
        for start in range(0, count, 1000):
            await outbox.accept(
                [
                    Submission(
                        event=Event(
                            id=f"evt_{number:032x}", type="post.published", timestamp="2026-01-15T10:00:00Z",
                            data=b'{"n":1}', accepted_at_ms=now_ms,
                        ),
                        endpoints=(Owed("stuck", "event"),),
                        digest=b"",
                    )
                    for number in range(start, start + 1000)
                ]
            )  # fmt: skip


@pytest.mark.parametrize("count", [MANY])
async def test_many_pending_deliveries_cost_neither_time_nor_memory(tmp_path, count):
    """Memory does not grow with the backlog, and a start does not read it."""
    await wait_in_vain(tmp_path / "relay.db", count)
    config = endpoint("stuck", "https://127.0.0.1:9/") + endpoint("main", "https://127.0.0.1:9/")
    with relay_process(tmp_path, config, start=False) as relay:
        began = time.monotonic()
        await asyncio.to_thread(relay.start)
        ready = time.monotonic() - began
        _, listed = await asyncio.to_thread(relay.call, "GET", "/v1/webhooks/settings/stuck")
        lines = Path(f"/proc/{relay.process.pid}/status").read_text().splitlines()
        resident = int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1000
    assert (listed["state"], listed["pending"]) == ("paused", count)
    figure(f"start to ready with {count:,} pending", f"{ready:.2f} s")
    figure(f"RSS with {count:,} pending", f"{resident:.0f} MB")
    assert resident < 120
