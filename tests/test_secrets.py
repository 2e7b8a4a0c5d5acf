"""A busy life at the most talkative log level, and whether any secret can be found in what was told."""

import asyncio
import base64
import hashlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.figures import figure
from tests.process import RelayProcess, free_port, relay_process
from tests.raw import head, speak
from tests.receiver import Answer, Receiver
from tests.test_journey import trusting

SETTINGS = "/v1/webhooks/settings"


def canary(name: str) -> str:
    """Return a text that occurs nowhere by chance, and is the same in every run."""
    return f"{name}CANARY{hashlib.sha256(name.encode()).hexdigest()[:12]}"


CANARIES = {
    name: canary(name)
    for name in (
        "token", "oldtoken", "wrongtoken", "environment", "file", "header", "query", "apiheader", "apiquery",
        "apisecret", "patched", "invalid", "answer", "body",
    )
}  # fmt: skip
SIGNING = "whsec_" + base64.b64encode(canary("signing").encode()).decode()
ENVIRONMENT = {"RELAY_TEST_SECRET": CANARIES["environment"]}


def config(receiver: Receiver, folder: Path) -> str:
    (folder / "secret").write_text(CANARIES["file"] + "\n")
    return f"""allow_private_for_api = true
[logging]
level = "debug"
format = "json"
[delivery]
retry_schedule = ["10ms"]
down_after = 0
[events."post.published"]
sample = {{ postId = "post_1" }}
[[endpoints]]
id = "main"
url = "{receiver.url}?key={CANARIES["query"]}"
events = ["*"]
secrets = ["{SIGNING}", "${{env:RELAY_TEST_SECRET}}", "${{file:{folder}/secret}}"]
headers = {{ X-Key = "{CANARIES["header"]}" }}
signatures = ["standard", "socialsyncer", "stripe", "github", "slack"]
[[endpoints]]
id = "closed"
url = "https://127.0.0.1:{free_port()}/a?key={CANARIES["query"]}"
events = ["*"]
secret = "{SIGNING}"
down_after = 2
[[endpoints]]
id = "unknown"
url = "https://nowhere.invalid/a?key={CANARIES["query"]}"
events = ["*"]
secret = "{SIGNING}"
"""


class Life:
    """Asks a relay many things, and keeps what was told, by where it was told."""

    def __init__(self, relay: RelayProcess) -> None:
        self.relay = relay
        self.bearer = {"Authorization": f"Bearer {CANARIES['token']}"}
        self.told: dict[str, str] = {}
        self.shown: list[str] = []  # secrets that the API made, told once where they were made

    def ask(self, method: str, path: str, content: object = None, headers: Mapping[str, str] | None = None):
        headers = self.bearer if headers is None else headers
        status, answer = self.relay.call(method, path, content, headers)
        if isinstance(answer, dict) and "secret" in answer:
            self.shown.append(answer.pop("secret"))
        self.told[f"answer {len(self.told)}: {method} {path}"] = repr(answer)
        return status, answer

    def command(self, *words: str, **environment: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "relay", *words, "--url", self.relay.url],
            env=os.environ | {"RELAY_TOKEN": CANARIES["token"]} | environment,
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        self.told[f"command {len(self.told)}: relay {' '.join(words)}"] = done.stdout + done.stderr

    def look(self) -> None:
        """Look at everything there is to look at."""
        for path in (
            SETTINGS, f"{SETTINGS}/main", f"{SETTINGS}/mine", "/v1/events?limit=200", "/v1/event-types",
            "/livez", "/readyz", "/metrics", "/openapi.json", "/", "/nowhere",
            f"/v1/nowhere?token={CANARIES['token']}",
        ):  # fmt: skip
            self.ask("GET", path)
            self.ask("GET", path, headers={})
            self.ask("GET", path, headers={"Authorization": f"Bearer {CANARIES['wrongtoken']}"})
        for name in ("cmdline", "status", "comm", "limits"):
            self.told[f"/proc/PID/{name} {len(self.told)}"] = Path(
                f"/proc/{self.relay.process.pid}/{name}"
            ).read_text()

    def until(self, event_id: str, endpoint: str, *states: str) -> None:
        deadline = time.monotonic() + 10
        while True:
            _, story = self.ask("GET", f"/v1/events/{event_id}")
            if {each["endpoint"]: each["state"] for each in story["deliveries"]}.get(endpoint) in states:
                return
            assert time.monotonic() < deadline, story
            time.sleep(0.02)


@pytest.fixture
async def receiver() -> Iterator[Receiver]:
    async with Receiver() as each:
        yield each


async def test_no_secret_is_told_anywhere_in_a_busy_life(tmp_path, receiver):
    """Config, API, environment, files, tokens, headers and query strings: whoever reads along learns none."""
    environment = trusting(receiver, tmp_path) | ENVIRONMENT
    with relay_process(tmp_path, config(receiver, tmp_path), environment, start=False) as relay:
        tokens = f'tokens = ["{CANARIES["token"]}", "{CANARIES["oldtoken"]}"]'
        relay.config.write_text(relay.config.read_text().replace("[server]", f"[server]\n{tokens}", 1))
        life = Life(relay)
        await asyncio.to_thread(relay.start)
        await asyncio.to_thread(live, life, receiver)
        await asyncio.to_thread(relay.stop)
        break_an_event(tmp_path)
        await asyncio.to_thread(relay.start)
        await asyncio.to_thread(fail, life)
        relay.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(relay.process.wait, 15) == 0
    life.told["log"] = relay.log
    life.told["check"] = checked(tmp_path, environment)

    (limits,) = [text for where, text in life.told.items() if where.startswith("/proc/PID/limits")]
    assert re.search(r"Max core file size +0 ", limits), "a crash leaves no image of what was in memory"
    assert "attempt_delivered" in relay.log, "the log was not at its most talkative"
    assert "request_failed" in relay.log, "no traceback was provoked"
    assert len(life.shown) == 3, "secrets were made, and told there alone"
    secrets = (
        dict(CANARIES) | {f"made {n}": secret for n, secret in enumerate(life.shown)} | {"signing": SIGNING}
    )
    payloads = ("answer", "body")  # told where events are listed, but never in the log
    found = [
        (name, where)
        for name, secret in secrets.items()
        for where, text in life.told.items()
        if any(form in text for form in spelled(secret)) and (name not in payloads or where == "log")
    ]
    figure("canaries found / secrets on surfaces", f"{len(found)} / {len(secrets)} on {len(life.told)}")
    assert found == []
    assert CANARIES["body"] in str(life.told), "which is how we know that finding works"
    for path in tmp_path.glob("relay.db*"):
        assert path.stat().st_mode & 0o077 == 0, f"{path.name} holds secrets in clear"


def live(life: Life, receiver: Receiver) -> None:
    mine = {"id": "mine", "url": f"{receiver.url}/m?key={CANARIES['apiquery']}", "events": ["*"]}
    mine |= {"headers": {"X-Key": CANARIES["apiheader"]}}
    assert life.ask("POST", SETTINGS, mine)[0] == 201
    assert life.ask("POST", SETTINGS, {"url": mine["url"], "secret": CANARIES["apisecret"]})[0] == 200
    assert life.ask("PATCH", f"{SETTINGS}/mine", {"secret": CANARIES["patched"]})[0] == 200
    assert life.ask("POST", f"{SETTINGS}/mine/rotate-secret", {"overlap": "1h"})[0] == 200
    assert life.ask("POST", f"{SETTINGS}/mine/rotate-secret", {"overlap": "0s"})[0] == 200
    invalid = CANARIES["invalid"]
    for wrong in (
        {"secret": f" {invalid}"}, {"secret": [invalid]}, {"secret": f"whsec_{invalid}!"},
        {"secret": {invalid: 1}},
        {"headers": {"X-A": f"{invalid}\n"}}, {"headers": [invalid]}, {"headers": {"X-A": {"a": invalid}}},
        {"url": f"https://u:{invalid}@a.test/"}, {"url": f"https://a b/?{invalid}"}, {"secrets": [invalid]},
        {"url": f"http://a.test/?key={invalid}"}, {"url": f"https://a.test:99999/?key={invalid}"},
    ):  # fmt: skip
        assert life.ask("PATCH", f"{SETTINGS}/mine", wrong)[0] == 422, wrong
        assert life.ask("POST", SETTINGS, {"url": "https://new.test/", "events": ["*"]} | wrong)[0] == 422
    life.ask("PATCH", f"{SETTINGS}/mine", f'{{"secret": "{invalid}"'.encode())
    event = {"event": "post.published", "data": {"text": CANARIES["body"]}}
    elsewhere = {"Location": f"{receiver.url}?key={CANARIES['query']}"}
    answer = CANARIES["answer"].encode()
    receiver.answers(
        503, Answer(302, elsewhere), Answer(500, body=answer), Answer(429, {"Retry-After": "0"}),
        Answer(400, body=answer),
    )  # fmt: skip
    receipts = [life.ask("POST", "/v1/events", event)[1] for _ in range(4)]
    for endpoint in ("main", "mine"):
        life.until(receipts[-1]["id"], endpoint, "delivered", "dead")
    life.until(receipts[0]["id"], "closed", "dead", "pending")
    for broken in (b'{"event": ' + CANARIES["body"].encode(), b"\xff", b"[" * 5000):
        life.ask("POST", "/v1/events", broken)
    life.ask("POST", "/v1/webhooks/test", {"event": "post.published"})
    life.ask("POST", f"{SETTINGS}/main/pause")
    life.ask("POST", f"{SETTINGS}/main/replay", {"state": "dead"})
    life.look()
    for words in (
        ("status",), ("events",), ("show", receipts[0]["id"]), ("endpoints",), ("test", "post.published"),
        ("send", "post.published", "--data", "{}"), ("healthcheck",), ("status", "--json"),
    ):  # fmt: skip
        life.command(*words)
    life.command("status", RELAY_TOKEN=CANARIES["wrongtoken"])
    for request in (
        head("GET /v1/events HTTP/1.1", f"Authorization: Bearer {CANARIES['token']}\0"),
        head(f"GET /v1/events?{CANARIES['token']} HTTP/9", f"Authorization: Bearer {CANARIES['token']}"),
        head(f"GET /v1/events?a={CANARIES['token']} HTTP/1.1", "Expect: x", "Connection: close"),
    ):
        life.told[f"raw {len(life.told)}"] = repr(speak(life.relay.port, request).text)


def break_an_event(folder: Path) -> None:
    """Let a time lie in the outbox that no calendar knows, so that listing it raises."""
    with sqlite3.connect(folder / "relay.db") as database:
        database.execute("UPDATE events SET accepted_at = 100000000000000000 WHERE seq = 1")
    database.close()


def fail(life: Life) -> None:
    for query in ("limit=200", f"limit=200&until={urllib.parse.quote('9999-01-01T00:00:00Z')}", "cursor=2"):
        assert life.ask("GET", f"/v1/events?{query}")[0] == 500


def checked(folder: Path, environment: Mapping[str, str]) -> str:
    """Return what `relay check` says of the config, and of one with a mistake in every secret."""
    told = ""
    text = (folder / "relay.toml").read_text()
    for each in (text, text.replace('"whsec_', '"whsec_!'), text.replace(' = "', ' == "')):
        (folder / "other.toml").write_text(each)
        done = subprocess.run(
            [sys.executable, "-m", "relay", "check", "--config", str(folder / "other.toml")],
            env=os.environ | environment, capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        told += done.stdout + done.stderr
    return told


def spelled(secret: str) -> Iterator[str]:
    """Return the forms in which a text may have been told."""
    yield secret
    yield secret.removeprefix("whsec_")
    yield urllib.parse.quote(secret, safe="")
    yield base64.b64encode(secret.encode()).decode()
    yield secret.encode().hex()
    yield repr(secret)[1:-1]
