"""The commands of an operator: status --watch, drain, backup, reload, check --connect, completion.

Some run on a pseudo-terminal, as people run them; some on a pipe, as scripts and units do.
"""

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from relay.cli.completion import SCRIPTS
from relay.cli.drain import how_far, roughly
from relay.cli.status import Rates, counts
from tests.completion import SHELLS, script
from tests.process import RelayProcess, free_port, relay_process
from tests.proxy import ConnectProxy
from tests.receiver import Answer, Receiver, server_ssl

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def endpoint(id_: str, url: str, **settings: str) -> str:
    values = {"id": f'"{id_}"', "url": f'"{url}"', "events": '["*"]', "secret": f'"{SECRET}"'} | settings
    return "[[endpoints]]\n" + "\n".join(f"{name} = {value}" for name, value in values.items()) + "\n"


NOBODY = endpoint("main", "https://127.0.0.1:9/", retry_schedule='["1h"]')


def environment(**own: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    return kept | {"TERM": "xterm", "COLUMNS": "200", "LINES": "24"} | own


def relay(*arguments: str, cwd: Path | None = None, **own: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", *arguments],
        capture_output=True, text=True, timeout=30, check=False, cwd=cwd, env=environment(**own),
    )  # fmt: skip


class Terminal:
    """A command on a pseudo-terminal; `text` is all that it has shown."""

    def __init__(self, *arguments: str, **own: str) -> None:
        self._ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "relay", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**own), start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def until(self, pattern: str, within: float = 15.0) -> str:
        """Return all that was shown, as soon as the pattern is there."""
        deadline = time.monotonic() + within
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._ours, 65536).decode()
                except OSError:  # the command has ended
                    assert re.search(pattern, self.text), self.text
        return self.text

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._ours)


@contextlib.contextmanager
def terminal(*arguments: str, **own: str) -> Iterator[Terminal]:
    each = Terminal(*arguments, **own)
    try:
        yield each
    finally:
        each.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay with one event that waits for a receiver that is not there."""
    ops = free_port()
    with relay_process(tmp_path_factory.mktemp("operating"), NOBODY, start=False) as process:
        process.configure(NOBODY, f'ops_listen = "127.0.0.1:{ops}"')
        process.ops_url = f"http://127.0.0.1:{ops}"  # type: ignore[attr-defined]
        process.start()
        status, answer = process.call("POST", "/v1/events", {"event": "a.b", "data": {}})
        assert status == 202, answer
        yield process


# drain


async def test_drain_ends_when_everything_has_arrived_and_shows_how_far_it_is(tmp_path):
    """Before a migration: what comes after it may rely on an empty outbox."""
    async with Receiver(tls=False) as receiver:
        receiver.answers(*[Answer(200, delay=0.4)] * 8)
        config = endpoint("main", receiver.url, concurrency="1")
        with relay_process(tmp_path, config, {"RELAY_EGRESS__ALLOW_HTTP": "true"}) as process:
            batch = {"events": [{"event": "a.b", "data": {}}] * 8}
            await asyncio.to_thread(process.call, "POST", "/v1/events/batch", batch)
            with terminal("drain", RELAY_URL=process.url) as shown:
                text = await asyncio.to_thread(shown.until, "nothing is pending")
                assert await asyncio.to_thread(shown.process.wait, 10) == 0
            assert re.search(r"\r\d+ pending, [\d.]+/s, about \ds left\x1b\[K", text)
            assert len(receiver.requests) == 8
            await watched_rates(process)
            done = await asyncio.to_thread(relay, "drain", "--json", RELAY_URL=process.url)
            assert json.loads(done.stdout) == {
                "drained": True, "pending": 0, "endpoints": {}, "seconds": pytest.approx(0, abs=5),
            }  # fmt: skip


async def watched_rates(process: RelayProcess) -> None:
    """Post until `status --watch` says how much that is, and how much has arrived."""
    words = ("status", "--watch", "--json", "--interval", "200ms")
    watching = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relay", *words,
        stdout=asyncio.subprocess.PIPE, env=environment(RELAY_URL=process.url),
    )  # fmt: skip
    try:
        async with asyncio.timeout(20):
            rates: tuple[float | None, ...] = (None,)
            while not all(rates):
                await asyncio.to_thread(process.call, "POST", "/v1/events", {"event": "a.b", "data": {}})
                told = json.loads(await watching.stdout.readline())
                (main,) = told["endpoints"]
                rates = (
                    told["accepted_per_second"], told["delivered_per_second"], main["delivered_per_second"],
                )  # fmt: skip
            watching.send_signal(signal.SIGINT)
            assert await watching.wait() == 130
    finally:
        if watching.returncode is None:
            watching.kill()
            await watching.wait()


def test_drain_gives_up_in_time_with_75_and_says_what_is_left(running):
    """A script must tell "not yet" from "cannot"; and what is paused will not go by waiting."""
    running.call("POST", "/v1/webhooks/settings/main/pause")
    try:
        done = relay("drain", "--timeout", "300ms", "--json", RELAY_URL=running.url)
    finally:
        running.call("POST", "/v1/webhooks/settings/main/resume")
    told = json.loads(done.stdout)
    assert (done.returncode, told["drained"], told["endpoints"]) == (75, False, {"main": 1})
    assert done.stderr.splitlines() == [
        "main is paused, its 1 pending wait for: relay endpoints resume main",
        "relay: 1 still pending: main 1",
    ]


def test_drain_is_interrupted_like_everything_else(running):
    with terminal("drain", RELAY_URL=running.url) as shown:
        shown.until("1 pending")
        assert shown.interrupt() == 130


@pytest.mark.parametrize(
    ("left", "gone", "seconds", "text"),
    [
        (1200, 0, 5.0, "1,200 pending"),
        (1200, 600, 5.0, "1,200 pending, 120.0/s, about 10s left"),
        (7, -3, 5.0, "7 pending"),
    ],
)
def test_how_far_is_only_foretold_when_it_gets_less(left, gone, seconds, text):
    assert how_far(left, gone, seconds) == text


def test_lengths_of_time_are_said_as_people_say_them():
    assert [roughly(each) for each in (0.4, 59.4, 75, 3700, 90061)] == ["0s", "59s", "1m15s", "1h01m", "25h"]


# status --watch


def test_watch_is_redrawn_in_place_on_a_terminal_and_ends_with_130(running):
    """The view to leave open while something is going on."""
    with terminal("status", "--watch", "--interval", "200ms", RELAY_URL=running.url) as shown:
        text = shown.until(r"\x1b\[3A")
        assert shown.interrupt() == 130
        shown.until(r"\x1b\[\?25h$")
    assert re.search(r"ready, 1 waiting, 0 dead, \S+ accepted, \S+ delivered", text)
    assert re.search(r"main +active +1 +0 +\d+s +\S+ +- +conn_refused", text)


def test_watch_prints_at_intervals_where_nothing_can_be_redrawn(running):
    """Over a pipe, and on a terminal that is none."""
    with terminal("status", "--watch", "--interval", "200ms", RELAY_URL=running.url, TERM="dumb") as shown:
        text = shown.until(r"(ready, 1 waiting[^\x1b]*){3}")
        assert shown.interrupt() == 130
    assert "\x1b" not in text


def test_watch_prints_objects_for_a_script_and_outlives_the_relay(tmp_path):
    """Restarts are what it is watched through."""
    with relay_process(tmp_path, NOBODY) as process:
        command = [sys.executable, "-m", "relay", "status", "--watch", "--json", "--interval", "200ms"]
        watching = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment(RELAY_URL=process.url)
        )
        watchdog = threading.Timer(20, watching.kill)
        watchdog.start()
        try:
            first = json.loads(watching.stdout.readline())
            process.stop()
            looks = [json.loads(watching.stdout.readline())]
            while "no relay answers" not in looks[-1]["state"]:
                looks.append(json.loads(watching.stdout.readline()))
            process.start()
            while not looks[-1]["ready"]:
                looks.append(json.loads(watching.stdout.readline()))
            watching.send_signal(signal.SIGINT)
            assert watching.wait(10) == 130
        finally:
            watchdog.cancel()
            watching.kill()
            watching.wait(10)
            watching.stdout.close()
    assert (first["ready"], first["accepted_per_second"]) == (True, None)
    assert {"main"} == {each["id"] for each in first["endpoints"]}


SCRAPE = """\
# TYPE relay_events_accepted_total counter
relay_events_accepted_total {accepted}
relay_delivery_attempts_total{{endpoint="main",reason="ok"}} {main}
relay_delivery_attempts_total{{endpoint="main",reason="http_503"}} 900.0
relay_delivery_attempts_total{{reason="ok",endpoint="other"}} 1e+02
"""


def test_rates_are_what_was_counted_between_two_looks():
    """Counters start again with the relay, so less than before tells nothing."""
    before = counts(SCRAPE.format(accepted=10.0, main=5.0), at=100.0)
    after = counts(SCRAPE.format(accepted=50.0, main=25.0), at=102.0)
    rates = Rates(before, after)
    assert (rates.accepted, rates.delivered, rates.of("main"), rates.of("other")) == (20.0, 10.0, 10.0, 0.0)
    again = Rates(after, before)
    assert (again.accepted, again.delivered) == (None, None)
    assert Rates(None, after).accepted is None
    assert counts("nothing of ours", at=1.0) is None


# backup


def test_a_backup_is_whole_and_for_its_owner_alone(running, tmp_path):
    """It holds the secrets of the API's endpoints, and every event that was acknowledged."""
    file = tmp_path / "copy.db"
    file.write_text("the backup of yesterday")
    done = relay("backup", str(file), RELAY_URL=running.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(file))}: [\d.]+ KiB\n", done.stdout)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with contextlib.closing(sqlite3.connect(file)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copy.execute("SELECT count(*) FROM events").fetchone() == (1,)
    told = json.loads(relay("backup", str(file), "--json", RELAY_URL=running.url).stdout)
    assert (told["file"], told["bytes"]) == (str(file), file.stat().st_size)
    assert [each.name for each in tmp_path.iterdir()] == ["copy.db"]


@pytest.mark.parametrize(
    ("status", "length", "body", "says"),
    [
        (200, 4096, b"SQLite format 3\0half", "broke off after 20 B of 4.0 KiB"),
        (200, 5, b"hello", "what came is no copy of an outbox"),
        (503, 26, b'{"detail": "no room, yet"}', "no room, yet"),
    ],
    ids=["half", "something else", "refused"],
)
def test_a_backup_that_is_not_whole_leaves_the_last_one_alone(tmp_path, status, length, body, says):
    """The last good backup is worth more than half of a new one."""
    file = tmp_path / "copy.db"
    file.write_text("the backup of yesterday")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, length, body))

        serving = threading.Thread(target=serve)
        serving.start()
        done = relay("backup", str(file), RELAY_URL=f"http://127.0.0.1:{server.getsockname()[1]}")
        serving.join()
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [
        ("copy.db", "the backup of yesterday")
    ]


def test_a_backup_is_not_written_where_it_would_do_harm(running, tmp_path):
    """Over the outbox itself, least of all."""
    own = running.folder / "relay.db"
    assert relay("backup", str(own), RELAY_URL=running.url).returncode == 2
    assert relay("backup", str(tmp_path), RELAY_URL=running.url).returncode == 2
    missing = relay("backup", str(tmp_path / "none" / "x.db"), RELAY_URL=running.url)
    assert (missing.returncode, len(missing.stderr.splitlines())) == (1, 1)
    assert relay("backup", str(tmp_path / "x.db"), RELAY_URL="http://127.0.0.1:9").returncode == 69
    assert list(tmp_path.iterdir()) == []


# reload, healthcheck


def test_reload_tells_what_changed_and_what_is_wrong(tmp_path):
    """A deployment looks at the exit code, a person at the lines."""
    with relay_process(tmp_path, NOBODY) as process:
        process.configure(endpoint("next", "https://127.0.0.1:9/"), 'ops_listen = "127.0.0.1:1"')
        done = relay("reload", RELAY_URL=process.url)
        assert (done.returncode, done.stdout) == (0, "added: next\nremoved: main\n")
        assert done.stderr == "waits for a restart: server.ops_listen\n"
        process.config.write_text("[serve]\nx = 1\n[outbx]\n")
        for wanted in (["check", "--config", str(process.config)], ["reload"]):
            done = relay(*wanted, RELAY_URL=process.url)
            assert (done.returncode, done.stdout) == (78, "")
            assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == [
                f"{process.config}:1", f"{process.config}:3",
            ]  # fmt: skip
        told = json.loads(relay("reload", "--json", RELAY_URL=process.url).stdout)
        assert (told["ok"], len(told["problems"])) == (False, 2)


def test_healthcheck_works_at_the_address_for_probes_too(running):
    """What a container's probe and a kubelet ask is the same."""
    assert relay("healthcheck", "--url", running.ops_url).returncode == 0
    assert relay("healthcheck", "--config", str(running.config)).returncode == 0


# check --connect


async def test_check_connect_says_what_each_endpoint_met_and_sends_nothing(tmp_path):
    """Before the first event: a certificate, a name or a firewall that will not do is found by asking."""
    untrusted = Receiver()
    untrusted._ssl = server_ssl("127.0.0.1", trustme.CA())
    async with Receiver() as receiver, untrusted, ConnectProxy() as proxy:
        config = tmp_path / "relay.toml"
        good = endpoint("good", receiver.url)
        config.write_text(
            '[egress]\nallow_private = ["127.0.0.0/8"]\n' + good + endpoint("stranger", untrusted.url)
            + endpoint("nobody", "https://127.0.0.1:9/") + endpoint("inside", "https://10.0.0.1/")
            + endpoint("unknown", "https://relay.invalid/") + endpoint("itself", "https://127.0.0.1:8484/")
            + endpoint("behind", receiver.url, proxy=f'"http://127.0.0.1:{proxy.port}"')
            + endpoint("no-proxy", receiver.url, proxy='"http://127.0.0.1:9"')
        )  # fmt: skip
        authority = tmp_path / "authority.pem"
        authority.write_bytes(receiver.authority.cert_pem.bytes())
        trusted = {"SSL_CERT_FILE": str(authority)}

        done = await asyncio.to_thread(relay, "check", "--connect", "--json", cwd=tmp_path, **trusted)
        told = json.loads(done.stdout)
        met = {each["endpoint"]: (each["error"] or "ok").partition(":")[0] for each in told["connections"]}
        assert (done.returncode, told["ok"]) == (1, False)
        assert met == {
            "good": "ok", "stranger": "tls_cert", "nobody": "conn_refused", "inside": "blocked_address",
            "unknown": "dns_error", "itself": "blocked_address", "behind": "ok", "no-proxy": "unreachable",
        }  # fmt: skip

        config.write_text('[egress]\nallow_private = ["127.0.0.0/8"]\n' + good)
        done = await asyncio.to_thread(relay, "check", "--connect", cwd=tmp_path, **trusted)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"good +yes +\d+ +127\.0\.0\.1 +TLSv1\.3 +\d{4}-\S+Z +-\n", done.stdout)
        assert receiver.requests == untrusted.requests == []
        assert proxy.asked == [f"CONNECT 127.0.0.1:{receiver.port}"]


# completion


@pytest.mark.parametrize("shell", SHELLS)
def test_the_completion_that_is_shipped_knows_every_command_and_option(shell):
    """Shipped as text, so that nobody needs a library; `python -m tests.completion` writes them anew."""
    shipped = (SCRIPTS / f"relay.{shell}").read_text(encoding="utf-8")
    assert shipped == script(shell)
    assert relay("completion", shell).stdout == shipped


@pytest.mark.parametrize(
    ("line", "completed"),
    [("relay dr", "drain"), ("relay status --wa", "--watch"), ("relay endpoints rot", "rotate-secret")],
)
def test_bash_completes_our_words(line, completed):
    """Asked the way readline does."""
    asking = f"""
source {SCRIPTS / "relay.bash"}
COMP_LINE={line!r} COMP_POINT={len(line)} COMP_WORDS=({line}) COMP_CWORD={len(line.split()) - 1}
_shtab_relay relay {line.split()[-1]!r} {line.split()[-2]!r}
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", asking], capture_output=True, text=True, check=False, timeout=20)
    assert (done.stdout.split(), done.stderr) == ([completed], "")


# The service manager


async def test_the_service_manager_is_told_how_the_relay_stands(tmp_path):
    """systemd starts what depends on us when we are ready, waits while we reload, and restarts what hangs."""
    heard: list[dict[str, str]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify.sock"))
        manager.settimeout(15)

        def hear(name: str) -> dict[str, str]:
            while True:
                heard.append(dict(line.split("=") for line in manager.recv(4096).decode().splitlines()))
                if name in heard[-1]:
                    return heard[-1]

        own = {"NOTIFY_SOCKET": str(tmp_path / "notify.sock"), "WATCHDOG_USEC": "400000"}
        with relay_process(tmp_path, "", own) as process:
            assert await asyncio.to_thread(hear, "READY") == {"READY": "1"}
            await asyncio.to_thread(hear, "WATCHDOG")
            await asyncio.to_thread(hear, "WATCHDOG")
            before = time.monotonic()
            os.kill(process.process.pid, signal.SIGHUP)
            reloading = await asyncio.to_thread(hear, "RELOADING")
            await asyncio.to_thread(hear, "READY")
            assert before < int(reloading["MONOTONIC_USEC"]) / 1e6 < time.monotonic()
            process.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(hear, "STOPPING")
            assert await asyncio.to_thread(process.process.wait, 10) == 0
    assert [each for each in heard if "READY" in each] == [{"READY": "1"}] * 2
