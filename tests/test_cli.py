"""The command line as people and scripts meet it: real processes, their exit codes, and what they print."""

import base64
import contextlib
import http.client
import json
import os
import re
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from relay.cli import COMMANDS, EXAMPLES, function, parser
from relay.cli.commands import GROUPS
from relay.cli.receiver import event_type
from relay.cli.verification import Worth, verify
from tests.process import RelayProcess, relay_process

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
ENDPOINT = f"""
[[endpoints]]
id = "main"
url = "https://127.0.0.1:9/"
events = ["post.*"]
secret = "{SECRET}"
"""


def surroundings(**environment: str) -> dict[str, str]:
    """Return an environment that holds none of the person's own settings."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RELAY_") and name != "PYTHONUNBUFFERED"
    }
    return own | environment


def relay(
    *arguments: str, cwd: Path | None = None, python: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "relay", *arguments],
        capture_output=True, text=True, timeout=30, check=False, cwd=cwd, env=surroundings(**environment),
    )  # fmt: skip


# The table and the help


@pytest.mark.parametrize("name", ["", *GROUPS, *(command.name for command in COMMANDS)])
def test_help_opens_with_a_sentence_and_ends_with_two_examples(name):
    """Help is read in a hurry: what is it, and how do I call it."""
    told = relay(*name.split(), "--help")

    first, *_ = told.stdout.splitlines()
    _, _, examples = told.stdout.partition("\nexamples:\n")
    assert (told.returncode, told.stderr) == (0, "")
    assert re.fullmatch(r"[A-Z].*[^.]\.", first)
    assert [line[:8] for line in examples.splitlines()] == ["  relay "] * 2


def called(example: str) -> str:
    """Parse what an example calls, without what its shell does; return the command's name."""
    first, *words = shlex.split(re.split(r" [>|] ", example)[0])
    assert first == "relay"
    return str(parser().parse_args(words).command.name)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_example_calls_its_command(command):
    """An example that is refused teaches nothing."""
    assert [called(example) for example in command.examples] == [command.name] * 2
    assert [called(example) for example in EXAMPLES] == ["demo", "serve"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_is_written_where_the_table_says(command):
    """The table names functions as text, which no type checker looks at."""
    assert callable(function(command))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_option_takes_a_secret_as_its_value(command):
    """A command line is seen by everybody on the machine and kept by the shell."""
    flags = {name for option in command.options for name in option.names}
    assert not flags & {"--secret", "--token", "--password", "--key-secret"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "COMMAND"),
        (["nonsense"], "'nonsense'"),
        (["secret"], "COMMAND"),
        (["serve", "--confg", "x"], "--confg x"),
        (["listen", "--port", "65536"], "'65536' is not a whole number from 0 to 65535"),
        (["listen", "--answer", "503,99"], "'99' is not a whole number from 200 to 599"),
        (["listen", "--answer", "503@2"], "'503@2' is not an answer like 503, 503@2s"),
        (["listen", "--answer", "503+1s"], "'503+1s' is not an answer"),
        (["listen", "--answer", "503+30@2s"], "'503+30@2s' is not an answer"),
        (["listen", "--answer", "@2s"], "'' is not a whole number from 200 to 599"),
        (["listen", "--header-scheme", "X Mine"], "'X Mine' is not a name a header can have"),
        (["listen", "--header-scheme", "X-Mine,encoding=hax"], "'hax' is not one of hex, base64"),
        (["listen", "--header-scheme", "X-Mine,secret=x"], "'secret=x' is not one of prefix, encoding"),
        (["listen", "--header-scheme", "X-Mine,prefix=a,prefix=b"], "each once"),
        (["listen", "--key", "key.pem"], "a --key is of no use without its --cert"),
        (["listen", "--count", "0"], "'0' is not a whole number"),
        (["drain", "--timeout", "30"], "'30' is not a duration like 500ms, 30s or 1h30m"),
        (["drain", "--timeout", "0s"], "'0s' is not a duration"),
        (["status", "--watch", "--interval", "10ms"], "'10ms' is too short: 200ms at least"),
        (["completion", "tcsh"], "'tcsh'"),
        (["healthcheck", "--url", "ftp://127.0.0.1"], "http://HOST:PORT"),
        (["healthcheck", "--url", "http://127.0.0.1:x"], "http://HOST:PORT"),
    ],
)
def test_a_wrong_call_is_told_in_one_sentence(words, says):
    """Scripts tell a typing mistake from a failure by code 2; people read one line, not a page."""
    told = relay(*words)
    assert (told.returncode, told.stdout) == (2, "")
    assert says in told.stderr
    assert len(told.stderr.splitlines()) == 1


# What it costs


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["version"],
        ["secret", "new"],
        ["healthcheck"],
        ["listen", "--help"],
        ["completion", "bash"],
    ],
)
def test_what_needs_no_server_does_not_import_aiohttp(words):
    """Probes and loops call these, and aiohttp alone takes longer than all the rest."""
    told = relay(*words, python=("-X", "importtime"), RELAY_URL="http://127.0.0.1:9")
    imported = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines() if "|" in line}
    assert "relay.cli.commands" in imported
    assert not imported & {"aiohttp", "asyncio", "aiosqlite", "relay.serve", "relay.config"}


def test_a_command_that_asks_a_relay_starts_in_under_100_ms(tmp_path):
    """A probe that runs every ten seconds must cost next to nothing, also when it reads the config."""
    (tmp_path / "relay.toml").write_text('[server]\nlisten = "127.0.0.1:9"\n')
    # Where this run is measured, measuring would itself be measured.
    environment = {name: value for name, value in surroundings().items() if not name.startswith("COVERAGE_")}

    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    took = []
    for _ in range(8):
        before = cpu_seconds()
        command = [sys.executable, "-m", "relay", "healthcheck"]
        ended = subprocess.run(
            command, stderr=subprocess.DEVNULL, cwd=tmp_path, env=environment, timeout=30, check=False
        )
        took.append(cpu_seconds() - before)
        assert ended.returncode == 69
    assert min(took) < 0.1


# serve, check, secret, version


@pytest.mark.parametrize("number", [(0, "0 endpoints"), (1, "1 endpoint"), (2, "2 endpoints")])
def test_check_says_ok_and_how_many_endpoints(tmp_path, number):
    count, words = number
    config = tmp_path / "relay.toml"
    config.write_text("".join(ENDPOINT.replace("main", f"e{n}") for n in range(count)))
    told = relay("check", "--config", str(config))
    assert (told.returncode, told.stdout, told.stderr) == (0, f"{config}: ok, {words}\n", "")


def test_every_mistake_of_the_config_is_one_line_for_check_and_for_serve(tmp_path):
    """All at once: nobody wants to find the second mistake at the second start."""
    config = tmp_path / "relay.toml"
    config.write_text('[server]\nlisten = 5\n[outbok]\npath = "x"\n')
    mistakes = [
        f'{config}:2: server.listen: expected an address such as "127.0.0.1:8484", not a bare number',
        f'{config}:3: outbok: unknown key; did you mean "outbox"?',
    ]
    for command in ("check", "serve"):
        told = relay(command, RELAY_CONFIG=str(config))
        assert (told.returncode, told.stdout, told.stderr.splitlines()) == (78, "", mistakes)
    told = relay("check", "--config", str(config), "--json")
    assert told.returncode == 78
    assert json.loads(told.stdout) == {"ok": False, "problems": mistakes}
    assert relay("serve", "--config", str(tmp_path / "none.toml")).returncode == 78


def test_a_new_secret_is_new_and_fits_standard_webhooks():
    first, second = relay("secret", "new").stdout, json.loads(relay("secret", "new", "--json").stdout)
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]+=*\n", first)
    assert first.strip() != second["secret"]
    for secret in (first.strip(), second["secret"]):
        assert 24 <= len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) <= 64


def test_a_new_key_pair_signs_and_verifies():
    """The private half alone goes to standard output, so that it alone goes into the file."""
    from nacl.signing import SigningKey

    told = relay("secret", "new", "--ed25519")
    assert re.fullmatch(r"whsk_[A-Za-z0-9+/]+=*\n", told.stdout)
    public = re.fullmatch(r"its public key, for the receiver: (whpk_\S+)\n", told.stderr)[1]
    both = json.loads(relay("secret", "new", "--ed25519", "--json").stdout)
    assert both["public"] != public
    for private, wanted in ((told.stdout.strip(), public), (both["secret"], both["public"])):
        key = base64.b64decode(private.removeprefix("whsk_"), validate=True)
        assert key[32:] == bytes(SigningKey(key[:32]).verify_key)
        assert key[32:] == base64.b64decode(wanted.removeprefix("whpk_"), validate=True)


def test_without_the_extra_a_key_pair_is_refused_in_one_sentence(tmp_path):
    """Most installations have no PyNaCl, and need none for all other schemes."""
    (tmp_path / "nacl.py").write_text("raise ImportError\n")
    told = relay("secret", "new", "--ed25519", PYTHONPATH=str(tmp_path))
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == "relay: keys of ed25519 need an extra: pip install 'relay[ed25519]'\n"
    told = relay("listen", RELAY_SECRET="whpk_AAAA", PYTHONPATH=str(tmp_path))
    assert (told.returncode, told.stderr.count("\n")) == (1, 1)
    assert "pip install 'relay[ed25519]'" in told.stderr
    assert relay("secret", "new", PYTHONPATH=str(tmp_path)).returncode == 0


def test_version_names_all_that_a_report_needs():
    told = relay("version")
    assert re.fullmatch(r"relay \d\S* \(Python 3\.\S+, SQLite 3\.\S+, aiohttp \d\S+\)\n", told.stdout)
    versions = json.loads(relay("version", "--json").stdout)
    assert all(versions[name] in told.stdout for name in ("relay", "python", "sqlite", "aiohttp"))


def test_output_that_nobody_reads_any_more_is_no_crash():
    """`relay … | head` ends the reader first."""
    reading, writing = os.pipe()
    os.close(reading)
    told = subprocess.run(
        [sys.executable, "-m", "relay", "version"],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=30, check=False, env=surroundings(),
    )  # fmt: skip
    os.close(writing)
    assert (told.returncode, told.stderr) == (1, "")


# healthcheck, and the client behind it


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    with relay_process(tmp_path_factory.mktemp("cli"), ENDPOINT) as process:
        yield process


def test_a_ready_relay_is_found_by_url_by_variable_and_by_config(running):
    """A container's probe is `relay healthcheck` without a word more."""
    config = str(running.config)
    for told in (
        relay("healthcheck", "--url", running.url),
        relay("healthcheck", RELAY_URL=running.url),
        relay("healthcheck", "--config", config),
        relay("healthcheck", RELAY_CONFIG=config),
        relay("healthcheck", cwd=running.folder),
        relay("healthcheck", RELAY_SERVER__LISTEN=f"127.0.0.1:{running.port}"),
    ):
        assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "text",
    [
        'listen = "127.0.0.1:PORT"\n[[endpoints]]\nbroken = 1',
        'listen = "0.0.0.0:PORT"',
        'listen = "${env:ADDRESS}"',
    ],
    ids=["broken elsewhere", "every address", "put together"],
)
def test_healthcheck_finds_the_address_in_any_config_that_serves(running, tmp_path, text):
    """A config that was broken after the start does not stop a relay, so it must not get it killed."""
    (tmp_path / "relay.toml").write_text(f"[server]\n{text.replace('PORT', str(running.port))}\n")
    told = relay("healthcheck", cwd=tmp_path, ADDRESS=f"127.0.0.1:{running.port}")
    assert (told.returncode, told.stderr) == (0, "")


def test_a_relay_on_a_unix_socket_is_asked_there(tmp_path):
    """Sidecars often share a folder and no port."""
    address = f"unix:{tmp_path}/relay.sock"
    process = RelayProcess(tmp_path, "", {"RELAY_SERVER__LISTEN": address})
    with (tmp_path / "log").open("wb") as log:
        serving = subprocess.Popen(
            [sys.executable, "-m", "relay", "serve", "--config", str(process.config)],
            stderr=log, env=process.environment,
        )  # fmt: skip
    try:
        assert relay("healthcheck", "--url", f"unix:{tmp_path}/other.sock").returncode == 69
        deadline = time.monotonic() + 15
        while (code := relay("healthcheck", "--url", address).returncode) == 69:
            assert time.monotonic() < deadline
        assert code == 0
    finally:
        serving.terminate()
        assert serving.wait(15) == 0


def test_a_stopping_relay_is_not_ready_and_an_ended_one_not_reachable(tmp_path):
    """Code 1 means wait, 69 means nobody is there."""
    with relay_process(tmp_path, ENDPOINT, {"RELAY_SERVER__LINGER": "30s"}) as process:
        process.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 15
        while (told := relay("healthcheck", "--url", process.url)).returncode == 0:
            assert time.monotonic() < deadline
        assert (told.returncode, told.stdout) == (1, "")
        assert told.stderr == "relay: the relay is not ready: the relay is stopping\n"
    told = relay("healthcheck", "--url", process.url)
    assert told.returncode == 69
    assert told.stderr == f"relay: no relay answers at {process.url}: Connection refused\n"


def test_healthcheck_does_not_wait_for_one_that_is_silent():
    """A probe that hangs is counted as nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        told = relay("healthcheck", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert told.returncode == 69
    assert told.stderr.endswith(": nothing came within 2 s\n")
    assert time.monotonic() - began < 10


def test_a_second_relay_on_the_same_outbox_ends_with_75(running):
    """The codes of the relay itself come through the command line."""
    environment = {"RELAY_SERVER__LISTEN": "127.0.0.1:0"}
    assert relay("serve", "--config", str(running.config), **environment).returncode == 75


# listen


@contextlib.contextmanager
def listener(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run `relay listen`; gives the process and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "listen", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings(**environment),
    )  # fmt: skip
    try:
        line = ""
        while not (found := re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)/\n", line)):
            line = process.stderr.readline()
            assert line, "it ended before it listened"
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


def post(port: int, body: bytes, headers: dict[str, str] | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/any/path", body, headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def test_listen_verifies_what_the_relay_sends_and_answers_by_the_script(tmp_path):
    """The receiver to develop against, with a real relay in front of it."""
    secret = tmp_path / "secret.txt"
    secret.write_text(f"{SECRET}\n")
    with listener("--secret-file", str(secret), "--answer", "503", "--count", "2", "--json") as (
        process,
        port,
    ):
        endpoint = ENDPOINT.replace("https://127.0.0.1:9/", f"http://127.0.0.1:{port}/")
        config = f'allow_http = true\n[delivery]\nretry_schedule = ["100ms"]\n{endpoint}'
        with relay_process(tmp_path, config) as sender:
            _, receipt = sender.call("POST", "/v1/events", {"event": "post.published", "data": {}})
            out, _ = process.communicate(timeout=15)

    first, second = (json.loads(line) for line in out.splitlines())
    assert process.returncode == 0
    assert (first["answered"], second["answered"]) == (503, 200)
    assert (first["attempt"], second["attempt"]) == (1, 2)
    for each in (first, second):
        assert (each["event"], each["id"]) == ("post.published", receipt["id"])
        assert each["signatures"] == {"standard": "verified", "socialsyncer": "verified"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each["at"])


def test_the_last_counted_request_is_answered_before_listen_ends():
    """Else the sender would meet a reset and come again."""
    with listener("--answer", "418,204", "--count", "3", RELAY_SECRET=SECRET) as (process, port):
        assert [post(port, b"{}") for _ in range(3)] == [418, 204, 200]
        assert process.wait(10) == 0


def test_a_line_tells_who_came_and_that_its_signature_was_wrong():
    with listener("--count", "1", RELAY_SECRET=SECRET) as (process, port):
        headers = {"webhook-id": "evt_1", "webhook-attempt": "3", "webhook-signature": "v1,AAAA"}
        post(port, b'{"event":"post.failed"}', headers)
        out, _ = process.communicate(timeout=10)
    assert out[24:] == "  post.failed  evt_1  attempt 3  standard wrong  answered 200\n"


def test_a_foreign_text_can_neither_end_the_line_nor_steer_the_terminal():
    with listener("--count", "1", RELAY_SECRET=SECRET) as (process, port):
        post(port, rb'{"event":"a\n\u001b[31m"}', {"webhook-attempt": "9" * 5000})
        out, _ = process.communicate(timeout=10)
    assert out.isprintable() is False
    assert out.endswith("\n")
    assert out[:-1].isprintable()


def test_without_a_secret_listen_says_that_it_verifies_nothing():
    with listener("--count", "1") as (process, port):
        post(port, b"no JSON")
        out, _ = process.communicate(timeout=10)
    assert out.endswith("  -  -  attempt -  not verified  answered 200\n")
    told = relay("listen", "--secret-file", "/nowhere")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == "relay: the secret file /nowhere cannot be read: No such file or directory\n"
    assert "not base64" in relay("listen", RELAY_SECRET="whsec_%").stderr


def test_a_port_that_is_taken_is_told_in_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = relay("listen", "--port", str(port), RELAY_SECRET=SECRET)
    assert told.returncode == 1
    assert told.stderr == f"relay: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_line_is_there_at_once_and_ctrl_c_is_no_crash():
    """Whoever pipes the lines into a log or a filter wants to see them as they come."""
    with listener(RELAY_SECRET=SECRET) as (process, port):
        post(port, b"{}")
        shown, _, _ = select.select([process.stdout], [], [], 10)
        assert shown

        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=10)
    assert (process.returncode, told) == (130, "")


def test_listen_ends_when_nobody_reads_its_lines():
    with listener(RELAY_SECRET=SECRET) as (process, port):
        process.stdout.close()
        assert post(port, b"{}") == 200
        assert process.wait(10) == 1
        assert "Traceback" not in process.stderr.read()


# Verification


def signed(body: bytes, secret: str = SECRET, at: int = 1_700_000_000) -> dict[str, str]:
    """Sign as the schemes' own library and the original service's sample do, without the relay's signer."""
    from datetime import UTC, datetime
    from hashlib import sha256
    from hmac import digest

    signature = Webhook(secret).sign("evt_1", datetime.fromtimestamp(at, UTC), body.decode())
    mac = digest(secret.encode(), body, sha256).hex()
    return {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(at),
        "webhook-signature": signature,
        "x-socialsyncerapi-signature": mac,
        "x-socialapi-signature": mac,
    }


def judge(headers: dict[str, str], body: bytes = b"{}", now: int = 1_700_000_000) -> tuple[str, str]:
    worth = verify(headers, body, SECRET, now)
    return worth["standard"], worth["socialsyncer"]


def test_the_published_vector_of_standard_webhooks_verifies():
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    worth = verify(headers, b'{"test": 2432232314}', "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", 1614265330)
    assert worth == {"standard": Worth.VERIFIED}


@pytest.mark.parametrize(
    ("change", "worth"),
    [
        ({}, ("verified", "verified")),
        ({"webhook-id": "evt_2"}, ("wrong", "verified")),
        ({"webhook-timestamp": "1700000001"}, ("wrong", "verified")),
        ({"webhook-timestamp": "soon"}, ("wrong", "verified")),
        ({"webhook-signature": ""}, ("wrong", "verified")),
        ({"webhook-signature": "v1,\udcff"}, ("wrong", "verified")),
        ({"x-socialapi-signature": "00"}, ("verified", "wrong")),
        ({"x-socialsyncerapi-signature": "00"}, ("verified", "wrong")),
    ],
)
def test_whatever_was_changed_on_the_way_is_wrong(change, worth):
    assert judge(signed(b"{}") | change) == worth


def test_a_changed_body_another_secret_and_no_signature_are_told_apart():
    assert judge(signed(b"{}"), b"{} ") == ("wrong", "wrong")
    assert judge(signed(b"{}", "whsec_" + base64.b64encode(b"x" * 24).decode())) == ("wrong", "wrong")
    assert verify({}, b"{}", SECRET, 1_700_000_000) == {}


def test_during_a_rotation_one_right_signature_of_several_is_enough():
    headers = signed(b"{}")
    headers["webhook-signature"] = f"v1,AAAA {headers['webhook-signature']}"
    assert judge(headers)[0] == "verified"


@pytest.mark.parametrize(
    ("later", "worth"), [(300, "verified"), (-300, "verified"), (301, "stale"), (-301, "stale")]
)
def test_a_signature_of_another_time_is_stale(later, worth):
    """A recorded request that somebody sends again must not pass."""
    assert judge(signed(b"{}"), now=1_700_000_000 + later)[0] == worth


@pytest.mark.parametrize(
    ("headers", "body", "found"),
    [
        ({}, b'{"event":"a.b","data":{"type":"x"}}', "a.b"),
        ({}, b'{"type":"a.b"}', "a.b"),
        ({"ce-type": "a.b"}, b"[1]", "a.b"),
        ({}, b'{"event":5}', None),
        ({}, b"\xff", None),
        ({}, b"[" * 100_000, None),
    ],
)
def test_the_type_is_found_in_every_format(headers, body, found):
    assert event_type(headers, body) == found
