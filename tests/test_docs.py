"""What is written about the relay is true: the README's commands run, and nothing that exists is left out."""

import ast
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

import relay
from relay.cli import COMMANDS, parser
from relay.config import Server, load, parse_duration
from tests.durability.checker import FAULTS
from tests.process import free_port, relay_process
from tests.receiver import Receiver

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(marker: str, language: str) -> list[str]:
    """Return the fenced blocks that follow a marker."""
    return re.findall(rf"<!-- {marker} -->\n```{language}\n(.*?)```", README, re.DOTALL)


def test_the_map_names_every_file():
    modules = {each.stem if each.is_file() else each.name for each in (ROOT / "relay").iterdir()}
    for name in modules - {"__init__", "__pycache__"}:
        assert re.search(rf"\b{name}(\.py|/)", relay.__doc__), f"the map does not name {name}"


def test_the_top_level_is_what_it_has_to_be():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
    ).stdout.split()
    top = {path.split("/")[0] for path in listed if not path.startswith(".")}
    assert top == {"pyproject.toml", "relay", "tests", "config.example.toml", "Dockerfile", "README.md"}


def test_no_file_of_ours_grew_beyond_reading():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "relay").rglob("*.py")}
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}


def test_no_function_of_ours_grew_beyond_reading():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in (ROOT / "relay").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, functions)
    }
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_the_readme_names_every_command_and_every_log_event():
    for command in COMMANDS:
        assert f"`relay {command.name}" in README
    events = set()
    for path in (ROOT / "relay").rglob("*.py"):
        events |= set(
            re.findall(
                r"log\.(?:debug|info|warning|error|critical|exception)\(\s*\"(\w+)\"", path.read_text()
            )
        )
    assert len(events) > 10
    for event in events:
        assert f"`{event}`" in README, f"the README does not name the log event {event}"


def test_the_example_config_loads_as_it_is():
    config = load(ROOT / "config.example.toml", {})
    assert set(config.events) == {
        "post.published",
        "post.failed",
        "post.scheduled",
        "account.disconnected",
        "account.connected",
    }
    assert all(each.sample for each in config.events.values())


def test_ci_runs_what_people_run():
    """Nothing hidden: CI calls the README's own test command."""
    assert block("the test command", "sh") == [
        "python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[dev]' "
        "&& .venv/bin/python -m tests\n"
    ]
    assert "the test command" in (ROOT / ".ci" / "run").read_text()


def test_the_quickstart_works_as_written(tmp_path):
    """Secret, config, receiver, relay, curl: to the letter, but for the ports, which others may use here."""
    if shutil.which("curl") is None:
        pytest.skip("wants curl")
    setup, post = block("quickstart", "sh")
    listen, serve = str(free_port()), str(free_port())
    script = f"{setup}\n{post}\nsleep 2\n".replace("8900", listen).replace("8484", serve)
    script = script.replace('PATH="$PWD/.venv/bin:$PATH"', f'PATH="{Path(sys.executable).parent}:$PATH"')
    environment = os.environ | {"RELAY_SERVER__LISTEN": f"127.0.0.1:{serve}", "PYTHONUNBUFFERED": "1"}
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        shell.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)
        out, _ = shell.communicate(timeout=15)
    receipt = json.loads(re.search(r'\{"id":.*?\}', out)[0])
    assert receipt["endpoints"] == ["main"]
    arrived = (
        f"post.published  {receipt['id']}  attempt 1  standard verified, socialsyncer verified  answered 200"
    )
    assert arrived in out


async def test_the_readmes_life_of_an_endpoint_works_with_curl_alone(tmp_path):
    """Register, test, submit, see it delivered, rotate, pause, resume, replay: to the letter."""
    if shutil.which("curl") is None:
        pytest.skip("wants curl")
    (script,) = block("endpoints", "sh")
    catalogue = '[events."post.published"]\nsample = { postId = "post_0" }\n'
    async with Receiver() as receiver:
        authority = tmp_path / "authority.pem"
        authority.write_bytes(receiver.authority.cert_pem.bytes())
        environment = {"SSL_CERT_FILE": str(authority), "RELAY_EGRESS__ALLOW_PRIVATE_FOR_API": "true"}
        with relay_process(tmp_path, catalogue, environment) as relay:
            script = script.replace("https://crm.example.com/hooks", receiver.url)
            script = script.replace("127.0.0.1:8484", f"127.0.0.1:{relay.port}").replace("\n\n", "; echo\n")
            told = await asyncio.to_thread(
                subprocess.run,
                ["bash", "-euo", "pipefail", "-c", script.replace("\ncurl", "; echo\ncurl")],
                capture_output=True, text=True, check=True, timeout=30,
            )  # fmt: skip
            await receiver.wait_for(2)
    answers = [json.loads(line) for line in told.stdout.splitlines() if line]
    created, tested, submitted, listed, rotated, paused, resumed, replayed = answers
    assert created["secret"].startswith("whsec_")
    assert tested["data"][0]["ok"]
    assert submitted["endpoints"] == ["crm"]
    assert listed["data"][0]["id"] == submitted["id"]
    assert rotated["secret"] != created["secret"]
    assert (paused["state"], resumed["state"]) == ("paused", "active")
    assert replayed == {"count": 0, "dry_run": True}


def test_the_dockerfile_is_clean_and_gives_nothing_away():
    linted = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "Dockerfile"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (linted.returncode, linted.stdout) == (0, "")
    text = (ROOT / "Dockerfile").read_text()
    for line in (
        "FROM python:3.13-slim",
        "USER 10001:10001",
        "VOLUME /var/lib/relay",
        "STOPSIGNAL SIGTERM",
        'ENTRYPOINT ["relay"]',
        'CMD ["serve", "--config", "/etc/relay/relay.toml"]',
    ):
        assert line in text
    assert re.search(r'HEALTHCHECK .*CMD \["relay", "healthcheck"\]', text)


def test_the_compose_file_is_one_and_fits_the_image():
    """Who copies it gets a sidecar that keeps its outbox, writes nowhere else, and has time to stop."""
    (text,) = block("compose", "yaml")
    compose = PyCompose.from_yaml(text)
    compose.validate()
    plain = yaml.safe_load(text)
    sidecar, dockerfile = plain["services"]["relay"], (ROOT / "Dockerfile").read_text()

    assert sidecar["network_mode"] == "service:app"
    assert "app" in plain["services"]
    assert (sidecar["read_only"], sidecar["cap_drop"]) == (True, ["ALL"])
    places = dict(each.split(":")[:2][::-1] for each in sidecar["volumes"])
    assert re.findall(r"^VOLUME (.+)$", dockerfile, re.MULTILINE) == [
        place for place, name in places.items() if name in plain["volumes"]
    ]
    _, _, config = json.loads(re.search(r"^CMD (.+)$", dockerfile, re.MULTILINE)[1])
    assert config in places
    assert sidecar["healthcheck"]["test"][:1] == ["CMD"]
    assert parser().parse_args(sidecar["healthcheck"]["test"][2:]).command.name == "healthcheck"
    assert set(sidecar["secrets"]) == set(plain["secrets"])
    server = Server()
    assert (
        parse_duration(sidecar["stop_grace_period"]) > server.shutdown_grace_seconds + server.linger_seconds
    )


def test_the_systemd_unit_is_one_and_calls_what_there_is(tmp_path):
    """Looked at by systemd itself: a misspelled key is a protection that is not there."""
    (text,) = block("systemd", "ini")
    calls = re.findall(r"^Exec\w+=/opt/relay/bin/relay (.+)$", text, re.MULTILINE)
    assert [parser().parse_args(call.split()).command.name for call in calls] == ["serve", "check"]
    assert "Type=notify" in text
    assert "ExecReload=/bin/kill -HUP $MAINPID" in text
    server = Server()
    stop = float(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1])
    assert stop > server.shutdown_grace_seconds + server.linger_seconds
    if shutil.which("systemd-analyze") is None:
        pytest.skip("wants systemd-analyze")
    unit = tmp_path / "relay.service"
    unit.write_text(text.replace("/opt/relay/bin", str(Path(sys.executable).parent)))
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (told.returncode, [line for line in told.stderr.splitlines() if "relay" in line]) == (0, [])


def test_the_core_dependencies_are_the_four():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[a-z-]+", each)[0] for each in project["dependencies"]}
    assert names == {"aiohttp", "aiosqlite", "orjson", "prometheus-client"}


def test_every_guarantee_names_tests_that_are_there_and_what_the_checker_looks_for():
    guarantees = README.partition("\n## Guarantees")[2].partition("\n## ")[0]
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", guarantees))
    assert named
    assert {name for name in named if f"def {name}(" not in written} == set()
    rows = [row.rpartition(" | ")[2] for row in guarantees.splitlines() if row.startswith("| ")]
    looked_for = {re.sub(r"\W", "_", name) for row in rows for name in re.findall(r'"([^"]+)"', row)}
    assert looked_for == set(FAULTS) - {"undetected"}
