"""The benchmark's own honesty: what it counts, what it calls missed, and that it cleans up after itself."""

import asyncio
import base64
import hashlib
import hmac
import importlib.util
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from tests.bench.figures import MEASUREMENTS, Figure
from tests.bench.load import CONNECTIONS, Load
from tests.bench.processes import started
from tests.bench.receiver import ANSWER
from tests.bench.report import verdict
from tests.bench.stage import SECRET, python

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    importlib.util.find_spec("relay.__main__") is None, reason="there is no relay to start yet"
)
def test_a_quick_benchmark_measures_every_figure():
    """A benchmark that nobody runs for weeks must still run when a budget is in doubt."""
    command = python("tests.bench", "--quick", "--json")
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)

    assert finished.returncode == 0, finished.stderr.decode()
    report = json.loads(finished.stdout)
    medians = {each["figure"]: each["median"] for each in report["figures"]}
    assert list(medians) == [figure.name for each in MEASUREMENTS for figure in each.figures]
    assert all(median > 0 for name, median in medians.items() if name != "idle CPU")
    assert report["machine"]["cores"] == os.cpu_count()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_nothing_behind(signal_number: signal.Signals, tmp_path: Path):
    """A relay left over from a benchmark would slow every later one on the machine."""
    command = python("tests.bench", "--self-test", "--only", "throughput")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as bench:
        try:
            wait_until(lambda: len(children(bench.pid)) == 4)
            processes = children(bench.pid)
            bench.send_signal(signal_number)
            code = bench.wait(timeout=20)
        finally:
            bench.kill()

    assert code == 130
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("signed_with", "forged"), [(SECRET, 0), ("whsec_b3RoZXI=", 1)], ids=["well", "badly"]
)
async def test_an_event_that_arrives_twice_or_badly_signed_is_no_gain(
    signed_with: str, forged: int, tmp_path: Path
):
    """A relay that repeats deliveries or saves the signing must not look faster for it."""
    authority = trustme.CA()
    certificate = tmp_path / "cert.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    key = base64.b64decode(signed_with.removeprefix("whsec_"))
    command = python("tests.bench.receiver", str(certificate), SECRET)
    async with started(*command, name="receiver", log=tmp_path / "log") as receiver, asyncio.timeout(20):
        port = await receiver.hear(seconds=10)
        reader, writer = await asyncio.open_connection("localhost", port, ssl=trust)
        for event_id in (b"evt_1", b"evt_1", b"evt_2"):
            mac = base64.b64encode(hmac.digest(key, event_id + b".1767225600.body", hashlib.sha256))
            writer.write(
                b"POST / HTTP/1.1\r\nWebhook-Id: %b\r\nWebhook-Timestamp: 1767225600\r\n"
                b"Webhook-Signature: v1,%b\r\nContent-Length: 4\r\n\r\nbody" % (event_id, mac)
            )
            assert await reader.readexactly(len(ANSWER)) == ANSWER
        arrivals = await receiver.ask("2", seconds=10)
        writer.close()

    assert arrivals["repeats"] == 1
    assert arrivals["forged"] == forged


async def test_waiting_for_a_free_connection_counts_as_latency():
    """Otherwise a relay that stalls would be asked less often, and the stall would hide in few samples."""
    answer_seconds = 0.05
    loop = asyncio.get_running_loop()

    class Slow(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, _data):
            answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}"
            loop.call_later(answer_seconds, self.transport.write, answer)

    async with await loop.create_server(Slow, "127.0.0.1", 0) as server:
        load = Load(server.sockets[0].getsockname()[1])
        await load.connect()
        figures = await load.run(CONNECTIONS * 3, rate=100_000.0)
        load.close()

    assert figures["p99"] > 2 * answer_seconds


@pytest.mark.parametrize(
    ("at_least", "median", "said"),
    [
        (True, 0.59, "floor MISSED"),
        (True, 0.60, "aim missed"),
        (True, 0.85, "aim met"),
        (False, 0.86, "floor MISSED"),
        (False, 0.85, "aim missed"),
        (False, 0.60, "aim met"),
    ],
)
def test_a_verdict_says_which_bound_was_kept(*, at_least: bool, median: float, said: str):
    """A missed floor that reads like a met one would be worse than no benchmark."""
    low, high = 0.60, 0.85
    floor, aim = (low, high) if at_least else (high, low)

    assert verdict(Figure(name="figure", floor=floor, aim=aim, at_least=at_least), median) == said


def children(process: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in 20 s"
        time.sleep(0.01)
