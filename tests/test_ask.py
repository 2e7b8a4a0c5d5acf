"""The commands that ask a running relay: what they print, and how they fail."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

from tests.process import relay_process

ENDPOINT = """
[[endpoints]]
id = "main"
url = "https://127.0.0.1:9/"
events = ["post.*"]
secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
[events."post.published"]
description = "A post went out."
sample = { postId = "post_1" }
"""


def relay(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    environment |= options.pop("environment", {})
    return subprocess.run(
        [sys.executable, "-m", "relay", *arguments],
        capture_output=True, text=True, timeout=30, check=False, env=environment, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with relay_process(tmp_path_factory.mktemp("cli"), ENDPOINT) as process:
        yield process


def ask(running, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return relay(*arguments, environment={"RELAY_URL": running.url}, **options)


def test_an_event_can_be_sent_and_its_story_told(running, tmp_path):
    sent = ask(running, "send", "post.published", "--data", '{"postId": "post_1"}', "--json")
    assert sent.returncode == 0
    receipt = json.loads(sent.stdout)
    assert receipt["endpoints"] == ["main"]
    data = tmp_path / "data.json"
    data.write_text('{"postId": "post_2"}')
    from_file = ask(running, "send", "post.published", "--data", f"@{data}", "--idempotency-key", "k1")
    again = ask(
        running, "send", "post.published", "--data", "-", "--idempotency-key", "k1", input=data.read_text()
    )
    assert from_file.stdout == again.stdout

    deadline = time.monotonic() + 10
    while "conn_refused" not in (shown := ask(running, "show", receipt["id"]).stdout):
        assert time.monotonic() < deadline, shown
    assert "main: pending, next " in shown
    listed = ask(running, "events", "--endpoint", "main", "--state", "pending")
    assert receipt["id"] in listed.stdout
    assert len(json.loads(ask(running, "events", "--limit", "1", "--json").stdout)["data"]) == 1


def test_a_refusal_of_the_relay_is_one_sentence(running):
    told = ask(running, "send", "post.publisht")
    assert told.returncode == 1
    assert told.stderr == "relay: #/event is not in the catalogue; did you mean 'post.published'?\n"
    assert ask(running, "show", "evt_none").returncode == 1
    told = ask(running, "endpoints", "remove", "main")
    assert told.stderr == "relay: endpoint main is the config's: change it there, then reload\n"


def test_endpoints_are_listed_and_steered(running):
    assert "main" in ask(running, "endpoints").stdout
    assert ask(running, "endpoints", "pause", "main").stdout == "main is paused\n"
    assert "paused" in ask(running, "status").stdout
    assert ask(running, "endpoints", "resume", "main").stdout == "main is active\n"


def test_a_test_event_tells_what_went_wrong(running):
    told = ask(running, "test", "post.published")
    assert told.returncode == 1
    assert "conn_refused: nothing listens at the receiver's address" in told.stdout


def test_status_counts_what_waits(running):
    told = json.loads(ask(running, "status", "--json").stdout)
    assert told["ready"]
    assert told["endpoints"][0]["id"] == "main"


def test_a_replay_can_be_counted_first(running):
    told = ask(running, "replay", "--endpoint", "main", "--dry-run")
    assert told.stdout == "0 would be sent again\n"


def test_a_wrong_call_is_told_apart_from_a_failure():
    assert relay("send", "post.published", "--data", "{nope").returncode == 2
    assert relay("replay").returncode == 2
    assert relay("endpoints", "pause").returncode == 2


def test_a_relay_that_is_not_there_is_said_in_one_sentence():
    told = relay("status", "--url", "http://127.0.0.1:9")
    assert (told.returncode, told.stdout) == (69, "")
    assert told.stderr == "relay: no relay answers at http://127.0.0.1:9: Connection refused\n"


ASKING = (
    ["send", "a.b"],
    ["test", "a.b"],
    ["status"],
    ["status", "--watch"],
    ["events"],
    ["show", "evt_1"],
    ["replay", "evt_1"],
    ["endpoints"],
    ["drain"],
    ["backup", "/tmp/relay-backup-that-never-is"],  # noqa: S108 - it is never written
    ["reload"],
)


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
def test_commands_that_ask_import_neither_aiohttp_nor_the_config(arguments):
    """They are called in loops and by probes, and either takes longer than all the rest."""
    script = (
        "import sys; from relay.cli import main; code = main(sys.argv[1:])\n"
        "print(code, sorted({'aiohttp', 'relay.config', 'orjson'} & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, timeout=30, check=False,
        env=os.environ | {"RELAY_URL": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert told.stdout == "69 []\n"


def test_commands_that_ask_start_at_once():
    """Seconds of the processor, which others share: the best of a few."""
    # Where this run is measured, measuring would itself be measured.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "RELAY_"))}

    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    for arguments in (["--help"], ["status"], ["drain"], ["backup", "/tmp/none"], ["reload"]):  # noqa: S108
        took = []
        for _ in range(3):
            before = cpu_seconds()
            command = [sys.executable, "-m", "relay", *arguments]
            subprocess.run(
                command,
                capture_output=True,
                timeout=30,
                check=False,
                env=kept | {"RELAY_URL": "http://127.0.0.1:9"},
            )
            took.append(cpu_seconds() - before)
        print(f"relay {' '.join(arguments)}: {min(took) * 1000:.0f} ms")
        assert min(took) < 0.3  # 0.05 on a quiet machine; aiohttp alone would take as long again as all of it
