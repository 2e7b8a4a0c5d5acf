"""`relay demo`: the first thing anybody runs, so it must be right, quick, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from relay.cli import demo
from relay.cli.receiver import Arrival
from relay.cli.verification import Worth

EXAMPLE = Path(__file__).parent.parent / "config.example.toml"
RIGHT = {"standard": Worth.VERIFIED, "socialsyncer": Worth.VERIFIED}


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", "demo", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"TMPDIR": str(folder)} | environment,
    )  # fmt: skip


def processes_of(folder: Path) -> list[str]:
    """List the commands under way that name the folder."""
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(folder) in command:
            commands.append(command)
    return commands


def until(condition, within: float = 15.0):
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_five_events_arrive_verified_and_one_of_them_at_its_third_attempt(tmp_path):
    """It is the proof that everything works together."""
    began = time.monotonic()
    told = run(tmp_path)

    assert (told.returncode, told.stderr) == (0, "")
    assert time.monotonic() - began < 20
    heading, *rows = (line.split(maxsplit=3) for line in told.stdout.splitlines())
    assert heading == ["event", "id", "attempts", "signatures"]
    assert {(event, attempts) for event, _, attempts, _ in rows} == {
        ("post.published", "1"),
        ("post.failed", "3"),
        ("post.scheduled", "1"),
        ("account.disconnected", "1"),
        ("account.connected", "1"),
    }
    assert len({id_ for _, id_, _, _ in rows}) == 5
    assert {signatures for *_, signatures in rows} == {"standard verified, socialsyncer verified"}
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_json_has_one_row_a_line_and_the_persons_own_settings_change_nothing(tmp_path):
    """Somebody who has a relay already can still see the demo, and it does not meet that relay."""
    told = run(
        tmp_path,
        "--json",
        RELAY_URL="http://127.0.0.1:9",
        RELAY_TOKEN="sk_other",
        RELAY_SERVER__LISTEN="127.0.0.1:1",
        RELAY_CONFIG="/nowhere.toml",
    )

    rows = [json.loads(line) for line in told.stdout.splitlines()]
    assert told.returncode == 0, told.stderr
    assert [row["event"] for row in rows] == list(demo.EVENTS)
    assert all(row["verified"] and row["id"].startswith("evt_") for row in rows)
    assert all(row["signatures"] == RIGHT for row in rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_ends_and_removes_all_it_started(tmp_path, number):
    """Ctrl-C at the first try of a program must not leave a relay running."""
    showing = subprocess.Popen(
        [sys.executable, "-m", "relay", "demo"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: list(tmp_path.glob("relay-demo-*/relay.db")))
        assert processes_of(tmp_path)

        showing.send_signal(number)
        out, err = showing.communicate(timeout=15)
    finally:
        showing.kill()

    assert (showing.returncode, out, err) == (130, "", "")
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def altered(change: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the demo of a relay that cannot do all of it."""
    script = f"import sys; from relay.cli import demo, main; {change}; sys.exit(main(['demo']))"
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"TMPDIR": str(folder)},
    )  # fmt: skip


def test_an_event_that_is_not_taken_fails_the_demo_by_name(tmp_path):
    """A proof that cannot say no proves nothing: here the first retry comes too late."""
    change = "demo.LIMIT_SECONDS = 6; demo.CONFIG = demo.CONFIG.replace('[\"500ms\"', '[\"1h\"')"
    told = altered(change, tmp_path)

    assert told.returncode == 1
    assert told.stderr == "relay: 1 of 5 events did not arrive verified: post.failed\n"
    assert "did not arrive" in told.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_relay_that_does_not_start_is_told_with_its_own_last_words(tmp_path):
    """Without the reason nobody could help themselves."""
    told = altered("demo.CONFIG = demo.CONFIG.replace('events =', 'evnts =')", tmp_path)

    assert told.returncode == 1
    assert told.stderr.startswith("relay: the relay did not start: ")
    assert 'did you mean "events"?' in told.stderr
    assert len(told.stderr.splitlines()) == 1


def arrival(answered: int, **other: object) -> Arrival:
    known = {"at": "", "event": "post.failed", "id": "evt_1", "attempt": 1, "signatures": RIGHT}
    return Arrival(**known | other, answered=answered)


@pytest.mark.parametrize(
    "arrivals",
    [
        [],
        [arrival(503)],
        [arrival(200, signatures={})],
        [arrival(200, event="post.published")],
        [arrival(503, signatures=RIGHT | {"standard": Worth.WRONG}), arrival(200)],
    ],
    ids=["nothing came", "never taken", "unsigned", "another event", "one attempt wrong"],
)
def test_what_is_not_right_every_time_does_not_count_as_verified(arrivals):
    """One good attempt must not hide a bad one."""
    assert not demo.summed("post.failed", "evt_1", arrivals).verified
    assert demo.summed("post.failed", "evt_1", [arrival(503), arrival(200)]).verified


def test_the_events_are_the_samples_of_the_example_config():
    """Whoever goes on from the demo to the config meets the same events."""
    catalogue = tomllib.loads(EXAMPLE.read_text())["events"]
    assert {type_: table["sample"] for type_, table in catalogue.items()} == demo.EVENTS
