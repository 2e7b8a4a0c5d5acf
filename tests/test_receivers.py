"""What the README tells receivers is true: its verifiers and receivers run as written, with a real relay."""

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from multidict import CIMultiDict

from relay.clock import SystemClock
from tests.process import RelayProcess, free_port, relay_process

README = (Path(__file__).parent.parent / "README.md").read_text()
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZQ=="
OTHER_SECRET = "whsec_ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA="
BODY = (
    '{"event": "a.b", "data": {"n": 1.0, "text": "Grüße \\ud83c\\udf89"}}'.encode()
)  # not as anybody re-writes it
EVENT = {"event": "post.published", "data": {"text": "Grüße 🎉"}}

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="wants Node")
in_both_languages = pytest.mark.parametrize("language", ["python", pytest.param("node", marks=needs_node)])


def block(marker: str) -> str:
    """Return the fenced block that follows a marker."""
    (found,) = re.findall(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    return str(found)


def seconds_from_now(seconds: int = 0) -> str:
    return str(SystemClock().now_ms() // 1000 + seconds)


def wait_until(met: Callable[[], object], *, within: float = 10.0) -> None:
    """Return as soon as the condition holds. Raises AssertionError."""
    deadline = time.monotonic() + within
    while not met():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


# Verifying


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request, and whether it is what somebody with the secret sent."""

    about: str
    genuine: bool
    headers: Mapping[str, str]
    body: bytes = BODY
    secret: str = SECRET


def key_of(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()


def standard_headers(sent_at: str | None = None, *, secret: str = SECRET) -> dict[str, str]:
    """Sign BODY as Standard Webhooks 1.0.0 has it, whatever the timestamp's text is (None: now)."""
    sent_at = seconds_from_now() if sent_at is None else sent_at
    mac = hmac.digest(key_of(secret), f"evt_1.{sent_at}.".encode() + BODY, "sha256")
    signature = "v1," + base64.b64encode(mac).decode()
    return {"webhook-id": "evt_1", "webhook-timestamp": sent_at, "webhook-signature": signature}


def standard_cases() -> Iterator[Case]:
    now = seconds_from_now()
    headers = standard_headers(now)
    signature = headers["webhook-signature"]
    yield Case(about="as sent", genuine=True, headers=headers)
    yield Case(
        about="a text as secret", genuine=True, headers=standard_headers(secret="Grüße"), secret="Grüße"
    )
    yield Case(
        about="a secret that lost its padding", genuine=True, headers=headers, secret=SECRET.rstrip("=")
    )
    yield Case(about="four minutes old", genuine=True, headers=standard_headers(seconds_from_now(-240)))
    yield Case(about="six minutes old", genuine=False, headers=standard_headers(seconds_from_now(-360)))
    yield Case(about="six minutes early", genuine=False, headers=standard_headers(seconds_from_now(360)))
    yield Case(about="another body", genuine=False, headers=headers, body=BODY + b" ")
    yield Case(about="another secret", genuine=False, headers=headers, secret=OTHER_SECRET)
    yield Case(about="another id", genuine=False, headers=headers | {"webhook-id": "evt_2"})
    yield Case(
        about="another time", genuine=False, headers=headers | {"webhook-timestamp": seconds_from_now(-60)}
    )
    yield Case(about="no headers", genuine=False, headers={})
    for name in headers:
        yield Case(about=f"no {name}", genuine=False, headers={n: v for n, v in headers.items() if n != name})
    # Signed as they are, so only the look at the time refuses them.
    for sent_at in ("", "abc", "-1", "1e9", "nan", f"{now}.0", f" {now}", "²", "9" * 5000):
        yield Case(about=f"sent at {sent_at[:20]!r}", genuine=False, headers=standard_headers(sent_at))
    for odd in ("v1a,AAAA", "v1", "v1, ", "é", "\udcff"):
        both = headers | {"webhook-signature": f"{odd} {signature}"}
        yield Case(about=f"{odd!r} and ours", genuine=True, headers=both)
    for odd in (
        *odd_forms(signature),
        "v1",
        "v1,",
        signature.replace("v1,", "v2,"),
        signature.replace("v1,", ""),
    ):
        yield Case(about=f"signed {odd!r}", genuine=False, headers=headers | {"webhook-signature": odd})
    yield Case(about="an odd id", genuine=False, headers=headers | {"webhook-id": "\udcff"})


def hex_headers(signature: str) -> dict[str, str]:
    return {"X-SocialSyncerAPI-Signature": signature, "X-SocialAPI-Signature": signature}


def hex_cases() -> Iterator[Case]:
    signature = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()
    binary = hmac.new(SECRET.encode(), b"\xff\x00", hashlib.sha256).hexdigest()
    yield Case(about="as sent", genuine=True, headers=hex_headers(signature))
    yield Case(about="bytes that are no text", genuine=True, headers=hex_headers(binary), body=b"\xff\x00")
    yield Case(about="another body", genuine=False, headers=hex_headers(signature), body=BODY + b" ")
    yield Case(about="another secret", genuine=False, headers=hex_headers(signature), secret=OTHER_SECRET)
    yield Case(about="no headers", genuine=False, headers={})
    for odd in (*odd_forms(signature), f"sha256={signature}"):
        yield Case(about=f"signed {odd!r}", genuine=False, headers=hex_headers(odd))


def odd_forms(signature: str) -> tuple[str, ...]:
    """Return what must be refused, not raise: some as long as ours in characters, some in bytes."""
    same_characters, same_bytes = "é" * len(signature), "é" * (len(signature) // 2)
    return (
        "",
        " ",
        "x",
        signature[:-1],
        signature + "0",
        signature.swapcase(),
        same_characters,
        same_bytes,
        "\udcff",
    )


def verdicts_in_python(function: str, cases: list[Case]) -> list[object]:
    names: dict[str, Callable[[str, Mapping[str, str], bytes], object]] = {}
    exec(block("verify in python"), names)  # noqa: S102 - the README's own lines
    return [names[function](case.secret, CIMultiDict(case.headers), case.body) for case in cases]


def verdicts_in_node(function: str, cases: list[Case]) -> list[object]:
    told = [
        [each.secret, {name.lower(): text for name, text in each.headers.items()}, each.body.hex()]
        for each in cases
    ]
    script = f"""
{block("verify in node")}
const cases = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
const verdict = ([secret, headers, body]) => {function}(secret, headers, Buffer.from(body, "hex"));
console.log(JSON.stringify(cases.map(verdict)));
"""
    ended = subprocess.run(
        ["node", "-e", script], input=json.dumps(told), capture_output=True, text=True, check=True, timeout=20
    )
    return list(json.loads(ended.stdout))


@pytest.mark.parametrize(
    ("verdicts", "function", "cases_of"),
    [
        pytest.param(verdicts_in_python, "verify_standard", standard_cases, id="python-standard"),
        pytest.param(verdicts_in_python, "verify_hex", hex_cases, id="python-hex"),
        pytest.param(
            verdicts_in_node, "verifyStandard", standard_cases, id="node-standard", marks=needs_node
        ),
        pytest.param(verdicts_in_node, "verifyHex", hex_cases, id="node-hex", marks=needs_node),
    ],
)
def test_the_readmes_verifiers_take_the_genuine_and_refuse_the_rest_without_raising(
    verdicts, function, cases_of
):
    """An exception is a 500, which tells a forger more than it should and fills somebody's alerts."""
    cases = list(cases_of())
    told = dict(zip([case.about for case in cases], verdicts(function, cases), strict=True))
    assert len(told) == len(cases)
    assert told == {case.about: case.genuine for case in cases}


def test_the_originals_python_sample_answers_401_to_all_that_is_not_genuine():
    """It is what users of the original service have: corrected it hashes bytes and survives any header."""
    names: dict[str, Callable[[str, Mapping[str, str], bytes], int]] = {}
    exec(block("the original in python"), names)  # noqa: S102 - the README's own lines
    for case in hex_cases():
        status = names["webhook"](case.secret, CIMultiDict(case.headers), case.body)
        assert (case.about, status) == (case.about, 200 if case.genuine else 401)


# Receiving


SUFFIX = {"python": "py", "node": "js"}
COMMAND = {"python": sys.executable, "node": "node"}
WORK = {
    "python": "print(event_id, body.decode(), flush=True)  # your work",
    "node": "console.log(id, body); // your work",
}
# Work that blocks its thread until there is a file `go`: an answer that waited for it would not come.
GATE = {
    "python": "def gate():\n    while not os.path.exists('go'):\n        threading.Event().wait(0.02)\n",
    "node": 'const gate = () => { while (!require("node:fs").existsSync("go"))'
    " Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20); };\n",
}


class ReceiverProcess:
    """A program of the README in a process and a folder of its own."""

    def __init__(self, folder: Path, language: str, program: str, *, secret: str = SECRET) -> None:
        self.folder = folder
        self.port = free_port()
        self.command = [COMMAND[language], f"receiver.{SUFFIX[language]}"]
        self.environment = os.environ | {"RELAY_SECRET": secret}
        folder.mkdir()
        (folder / f"verify.{SUFFIX[language]}").write_text(block(f"verify in {language}"))
        (folder / self.command[1]).write_text(program.replace("8900", str(self.port)))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdout=out, stderr=err, env=self.environment
            )
        wait_until(self.listens)

    def listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "err").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    @property
    def worked(self) -> list[str]:
        """The lines that its work has printed."""
        return (self.folder / "out").read_text().splitlines()

    def ask(self, headers: Mapping[str, str], body: bytes) -> int:
        """Return the status that one request is answered with."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/", body, dict(headers))
            return connection.getresponse().status
        finally:
            connection.close()


@contextlib.contextmanager
def receiver_process(
    folder: Path, language: str, program: str, *, secret: str = SECRET
) -> Iterator[ReceiverProcess]:
    receiver = ReceiverProcess(folder / "receiver", language, program, secret=secret)
    try:
        receiver.start()
        yield receiver
    finally:
        receiver.kill()


@contextlib.contextmanager
def relay_to(receiver: ReceiverProcess, folder: Path) -> Iterator[RelayProcess]:
    """Start a relay with this receiver as its one endpoint."""
    config = f"""
allow_http = true
[[endpoints]]
id = "main"
url = "http://127.0.0.1:{receiver.port}/"
events = ["*"]
secret = "{SECRET}"
timeout = "5s"
retry_schedule = ["100ms"]
"""
    with relay_process(folder, config) as relay:
        yield relay


def submit(relay: RelayProcess) -> str:
    status, receipt = relay.call("POST", "/v1/events", EVENT)
    assert status == 202, receipt
    return str(receipt["id"])


def wait_for_attempts(relay: RelayProcess, event_id: str, count: int) -> tuple[str, list[int]]:
    """Return the delivery's state and what its attempts were answered, once there are so many."""
    delivery: dict[str, object] = {}

    def over() -> bool:
        _, event = relay.call("GET", f"/v1/events/{event_id}")
        (found,) = event["deliveries"]
        delivery.update(found)
        return found["state"] != "pending" and len(found["attempts"]) >= count

    wait_until(over)
    return delivery["state"], [attempt["status"] for attempt in delivery["attempts"]]


@in_both_languages
def test_an_event_that_comes_twice_is_worked_on_once(tmp_path, language):
    """At least once on the wire is once in the application, because ids already seen are dropped."""
    with (
        receiver_process(tmp_path, language, block(f"receiver in {language}")) as receiver,
        relay_to(receiver, tmp_path) as relay,
    ):
        first = submit(relay)
        assert wait_for_attempts(relay, first, 1) == ("delivered", [200])
        assert relay.call("POST", f"/v1/events/{first}/replay", {"endpoint": "main"})[0] < 300
        assert wait_for_attempts(relay, first, 2) == ("delivered", [200, 200])
        second = submit(relay)
        wait_until(lambda: any(line.startswith(second) for line in receiver.worked))
    assert [line.split(" ")[0] for line in receiver.worked] == [first, second]
    assert all(json.loads(line.split(" ", 1)[1])["data"] == EVENT["data"] for line in receiver.worked)


@in_both_languages
def test_a_refusal_is_a_401_and_the_relay_tries_again(tmp_path, language):
    """A refusal sent as 200 would count as delivered, and the event be lost to a typing error in a secret."""
    program = block(f"receiver in {language}")
    with (
        receiver_process(tmp_path, language, program, secret=OTHER_SECRET) as receiver,
        relay_to(receiver, tmp_path) as relay,
    ):
        assert wait_for_attempts(relay, submit(relay), 2) == ("dead", [401, 401])
        assert receiver.ask({}, b"") == 401
        assert receiver.worked == []


@in_both_languages
def test_the_answer_comes_before_the_work_and_the_work_survives_a_crash(tmp_path, language):
    """Slow work is no time-out, and what was answered with 200 is not lost when the receiver dies over it."""
    program = block(f"receiver in {language}")
    assert WORK[language] in program
    gated = GATE[language] + program.replace(WORK[language], f"gate(); {WORK[language]}")
    with (
        receiver_process(tmp_path, language, gated) as receiver,
        relay_to(receiver, tmp_path) as relay,
    ):
        event_id = submit(relay)
        assert wait_for_attempts(relay, event_id, 1) == ("delivered", [200])
        assert receiver.worked == []
        receiver.kill()
        (receiver.folder / "go").touch()
        receiver.start()
        wait_until(lambda: receiver.worked)
        assert [line.split(" ")[0] for line in receiver.worked] == [event_id]


@in_both_languages
def test_a_sender_that_hangs_up_half_way_does_not_end_the_receiver(tmp_path, language):
    """Anybody can reach a receiver; a broken connection must not cost the next sender its answer."""
    with receiver_process(tmp_path, language, block(f"receiver in {language}")) as receiver:
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=5) as sender:
            sender.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        assert receiver.ask(standard_headers(), BODY) == 200
        wait_until(lambda: receiver.worked)


@needs_node
def test_the_originals_node_sample_takes_what_the_relay_sends_and_refuses_the_rest(tmp_path):
    """It is what users of the original service have: corrected it hashes bytes and survives any header."""
    server = 'require("node:http").createServer((req, res) => webhook(process.env.RELAY_SECRET, req, res))'
    program = f'{block("the original in node")}\n{server}.listen(8900, "127.0.0.1");\n'
    with receiver_process(tmp_path, "node", program) as receiver, relay_to(receiver, tmp_path) as relay:
        assert wait_for_attempts(relay, submit(relay), 1) == ("delivered", [200])
        for case in hex_cases():
            if case.secret == SECRET and "\udcff" not in "".join(case.headers.values()):
                status = receiver.ask(case.headers, case.body)
                assert (case.about, status) == (case.about, 200 if case.genuine else 401)


def test_the_readmes_test_call_is_taken_and_with_another_secret_refused(tmp_path):
    """Whoever builds a receiver can try it before there is a relay, with what every shell has."""
    if shutil.which("curl") is None or shutil.which("openssl") is None:
        pytest.skip("wants curl and openssl")
    with receiver_process(tmp_path, "python", block("receiver in python")) as receiver:
        script = block("test call").replace("8900", str(receiver.port))
        for secret, status in ((SECRET, "200\n"), (OTHER_SECRET, "401\n")):
            told = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                env=os.environ | {"RELAY_SECRET": secret},
                capture_output=True, text=True, check=True, timeout=20,
            )  # fmt: skip
            assert told.stdout == status
        wait_until(lambda: receiver.worked)
        assert len(receiver.worked) == 1
