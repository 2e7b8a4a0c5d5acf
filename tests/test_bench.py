"""The benchmark's own honesty: what it counts, what it calls missed, and that it cleans up after itself."""

import asyncio
import base64
import hashlib
import hmac
import importlib.util
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from tests.bench.compared.rivals import RIVALS, Rival, relay
from tests.bench.comparison import comparison
from tests.bench.curves import CURVES
from tests.bench.figures import MEASUREMENTS, Figure
from tests.bench.load import CONNECTIONS, Load
from tests.bench.processes import family, started
from tests.bench.receiver import ANSWER
from tests.bench.report import verdict
from tests.bench.rounds import run
from tests.bench.stage import SECRET, Options, open_stage, python
from tests.process import unmeasured

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    importlib.util.find_spec("relay.__main__") is None, reason="there is no relay to start yet"
)
@pytest.mark.long
def test_a_quick_benchmark_measures_every_figure():
    """A benchmark that nobody runs for weeks must still run when a budget is in doubt."""
    report = json.loads(bench("--quick", "--json").stdout)
    medians = {each["figure"]: each["median"] for each in report["figures"]}
    assert list(medians) == [figure.name for each in MEASUREMENTS for figure in each.figures]
    # Few events say little: a difference may come out below nothing, and who is idle may use nothing.
    assert not [each for each in medians if medians[each] <= 0 and not re.search("idle CPU|above bare", each)]
    assert len(report["rounds"]) == len(MEASUREMENTS)
    assert report["machine"]["cores"] == os.cpu_count()


@pytest.mark.long
def test_quick_curves_have_every_point_and_can_be_drawn_and_tabulated(tmp_path: Path):
    """Curves are drawn once in a release, which is too late to find out that they cannot be."""
    picture, stored = tmp_path / "curves.svg", tmp_path / "curves.json"
    measured = bench("--curves", "--quick", "--json", "--plot", str(picture))
    stored.write_text(measured.stdout)
    table = bench("--read", str(stored), "--table").stdout

    report = json.loads(measured.stdout)
    expected = [
        (curve.name, place, figure.name)
        for curve in CURVES
        for place in curve.quick
        for figure in curve.figures
    ]
    assert [(each["measurement"], each["at"], each["figure"]) for each in report["figures"]] == expected
    assert all(each["median"] > 0 for each in report["figures"])
    open_ = next(each for each in report["figures"] if each["figure"] == "connections open")
    assert open_["median"] == open_["at"]
    assert [curve.of for curve in CURVES if f"<!-- {curve.of} -->" not in picture.read_text()] == []
    assert [curve.name for curve in CURVES if f"| {curve.name} |" not in table] == []


async def test_the_relay_beside_itself_is_counted_with_its_application(tmp_path: Path):
    """What the application spends on handing over is part of the price, of the relay as of all others."""
    itself = Rival(name="itself", tool="none", settings="", keeps="all", open=relay)
    options = Options(rounds=1, events=100, loop="auto", idle_seconds=0, self_test=False, quick=True)
    async with open_stage(options) as stage, asyncio.timeout(40):
        found = await run(stage, [comparison((itself,))])
        async with relay(stage) as line:
            carriers = sum(each.cpu_seconds() for each in line.carriers)
            of_application = line.cpu_seconds() - carriers
    medians = {each["figure"]: each["median"] for each in found["figures"]}

    assert all(median > 0 for median in medians.values())
    assert of_application > 0
    (one,) = found["rounds"]
    assert (one["measurement"], one["round"], len(one["load_average"])) == ("comparison", 1, 2)


def test_what_is_not_set_up_is_skipped_with_its_reason_and_the_command(tmp_path: Path):
    """A comparison that leaves somebody out in silence would claim too much."""
    finished = bench("--compare", "all", "--tools", str(tmp_path), code=1)

    for name, lacking in (("celery", "requests"), ("huey", "requests"), ("bullmq", "ioredis")):
        (line,) = (line for line in finished.stderr.splitlines() if line.startswith(f"{name} is skipped"))
        assert lacking in line
        assert f"`python -m tests.bench --setup {name}`" in line


@pytest.mark.compared
def test_all_that_teams_use_is_measured():
    """After `python -m tests.bench --setup all`."""
    report = json.loads(bench("--compare", "all", "--quick", "--json").stdout)

    assert report["skipped"] == {}
    assert [each["name"] for each in report["systems"]] == [each.name for each in RIVALS]
    assert all(each["median"] > 0 for each in report["figures"])


async def test_what_a_child_used_counts_as_its_parents(tmp_path: Path):
    """Celery works in child processes; some systems have ended one by the time they are asked."""
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    stay = f"{burn}print(2, flush=True)\ninput()"
    script = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])\n"
        "print(1, flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {stay!r}])\n"
    )
    command = (sys.executable, "-c", script)
    async with started(*command, name="parent", log=tmp_path / "log") as parent, asyncio.timeout(30):
        await parent.hear(seconds=20)
        of_an_ended_child = parent.cpu_seconds()
        await parent.hear(seconds=20)
        of_two = parent.cpu_seconds()
        processes = family(parent.process.pid)

    assert of_an_ended_child > 0.25
    assert of_two - of_an_ended_child > 0.25
    assert len(processes) == 2
    wait_until(lambda: not any(map(alive, processes)))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_nothing_behind(signal_number: signal.Signals, tmp_path: Path):
    """A relay left over from a benchmark would slow every later one on the machine."""
    command = python("tests.bench", "--self-test", "--only", "throughput")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as running:
        try:
            wait_until(lambda: len(children(running.pid)) == 4)
            processes = children(running.pid)
            running.send_signal(signal_number)
            code = running.wait(timeout=20)
        finally:
            running.kill()

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


def bench(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = python("tests.bench", *arguments)
    finished = subprocess.run(
        command, cwd=ROOT, env=unmeasured(), capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == code, finished.stderr
    return finished


def alive(process: int) -> bool:
    """An orphan that was killed is a zombie until somebody waits for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


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
