"""An event's whole journey through a real relay: posted, signed, received over TLS, repeated, delivered."""

import asyncio
import hashlib
import hmac
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from tests.process import RelayProcess, relay_process
from tests.receiver import Answer, Receiver

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
EVENT = {
    "event": "post.published",
    "data": {"text": "Grüße 🎉 \u2028", "n": 1.0, "9": [1e21, -0.0], "1": None},
}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as each:
        yield each


def config(receiver: Receiver, **settings: str) -> str:
    endpoint = {"id": '"main"', "url": f'"{receiver.url}"', "events": '["*"]', "secret": f'"{SECRET}"'}
    endpoint |= {"retry_schedule": '["200ms", "200ms", "200ms"]'} | settings
    return "[[endpoints]]\n" + "\n".join(f"{name} = {value}" for name, value in endpoint.items())


@pytest.fixture
async def relay(tmp_path: Path, receiver: Receiver) -> AsyncIterator[RelayProcess]:
    with relay_process(tmp_path, config(receiver), trusting(receiver, tmp_path)) as process:
        yield process


def trusting(receiver: Receiver, folder: Path) -> dict[str, str]:
    """Environment in which the receiver's own authority is trusted, as a company's would be."""
    authority = folder / "authority.pem"
    authority.write_bytes(receiver.authority.cert_pem.bytes())
    return {"SSL_CERT_FILE": str(authority)}


async def call(relay: RelayProcess, *arguments: object) -> tuple[int, dict]:
    return await asyncio.to_thread(relay.call, *arguments)


async def story(relay: RelayProcess, event_id: str, state: str = "delivered") -> dict:
    """Return an event's story once its delivery has come to this state."""
    async with asyncio.timeout(10):
        while True:
            _, found = await call(relay, "GET", f"/v1/events/{event_id}")
            if found["deliveries"][0]["state"] == state:
                return found
            await asyncio.sleep(0.02)


async def test_a_refused_delivery_comes_again_with_the_same_id_and_bytes(relay, receiver):
    """A receiver that was down once can tell the second request from a second event."""
    receiver.answers(503, 503)

    status, receipt = await call(relay, "POST", "/v1/events", EVENT)
    assert status == 202
    await receiver.wait_for(3)
    told = await story(relay, receipt["id"])

    first, second, _ = receiver.requests
    assert first.headers["webhook-signature"].startswith("v1,")
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert len({request.body for request in receiver.requests}) == 1
    assert {request.headers["webhook-id"] for request in receiver.requests} == {receipt["id"]}
    assert [request.headers["webhook-attempt"] for request in receiver.requests] == ["1", "2", "3"]
    attempts = told["deliveries"][0]["attempts"]
    assert [(each["number"], each["status"], each["error"]) for each in attempts] == [
        (1, 503, "http_503"),
        (2, 503, "http_503"),
        (3, 200, None),
    ]


async def test_what_arrives_is_what_was_posted_and_verifies(relay, receiver):
    """Verified by the standard's own library and the way the original service's Python sample does."""
    _, receipt = await call(relay, "POST", "/v1/events", EVENT)
    (request,) = await receiver.wait_for(1)

    assert request.method == "POST"
    assert Webhook(SECRET).verify(request.body, dict(request.headers)) == EVENT | {
        "timestamp": receipt["timestamp"]
    }
    text = request.body.decode()
    ours = hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()
    assert hmac.compare_digest(ours, request.headers["X-SocialSyncerAPI-Signature"])
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["User-Agent"].startswith("relay/")
    assert text == (
        f'{{"event":"post.published","timestamp":"{receipt["timestamp"]}",'
        '"data":{"1":null,"9":[1e+21,0],"text":"Grüße 🎉 \u2028","n":1}}'
    )


NODE = """
const { createHmac, timingSafeEqual } = require("node:crypto");
const { headers, body, secret } = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
const again = JSON.stringify(JSON.parse(body));
const ours = createHmac("sha256", secret).update(again).digest("hex");
const theirs = headers["x-socialapi-signature"];
process.exit(timingSafeEqual(Buffer.from(ours), Buffer.from(theirs)) ? 0 : 1);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="wants Node")
async def test_a_node_receiver_that_serialises_again_before_verifying_agrees(relay, receiver):
    """The original service's Node sample hashes JSON.stringify(JSON.parse(body))."""
    await call(relay, "POST", "/v1/events", EVENT)
    (request,) = await receiver.wait_for(1)
    headers = {name.lower(): value for name, value in request.headers.items()}

    def verify(body: str) -> int:
        question = json.dumps({"headers": headers, "body": body, "secret": SECRET})
        return subprocess.run(
            ["node", "-e", NODE], input=question, text=True, check=False, timeout=20
        ).returncode

    assert verify(request.body.decode()) == 0
    assert verify(request.body.decode().replace("post", "p0st")) == 1


async def test_sigterm_exits_in_time_and_loses_nothing(tmp_path, receiver):
    """A receiver that answers late is waited for; one that hangs is cut off, and its delivery is unspent."""
    with relay_process(
        tmp_path,
        config(receiver, concurrency="2", timeout='"30s"'),
        trusting(receiver, tmp_path) | {"RELAY_SERVER__SHUTDOWN_GRACE": "1s"},
    ) as relay:
        receiver.answers(Answer(delay=60), Answer(delay=60))
        for _ in range(5):
            await call(relay, "POST", "/v1/events", EVENT)
        await receiver.wait_for(2)
        code = await asyncio.to_thread(relay.stop, 5.0)
        assert code == 0
        assert "drain_cut_off" in relay.log
        seen = len(receiver.requests)
        relay.start()
        await receiver.wait_for(seen + 5)
        _, page = await call(relay, "GET", "/v1/events")
        for event in page["data"]:
            told = await story(relay, event["id"])
            assert [attempt["number"] for attempt in told["deliveries"][0]["attempts"]] == [1]
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 5


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("socket_kind", ["tcp", "unix"])
async def test_a_stop_is_clean_on_every_loop(tmp_path, receiver, loop, socket_kind):
    """An install without the extra runs on asyncio's own loop, which closes listeners in its own way."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    path = tmp_path / "relay.sock"
    with relay_process(tmp_path, config(receiver), start=False) as relay:
        relay.environment |= trusting(receiver, tmp_path) | {"RELAY_SERVER__LOOP": loop}
        if socket_kind == "unix":
            relay.environment |= {
                "RELAY_SERVER__LISTEN": f"unix:{path}",
                "RELAY_SERVER__OPS_LISTEN": f"127.0.0.1:{relay.port}",
            }
        await asyncio.to_thread(relay.start)
        if socket_kind == "tcp":
            await call(relay, "POST", "/v1/events", EVENT)
            await receiver.wait_for(1)
        assert await asyncio.to_thread(relay.stop) == 0
        assert "Traceback" not in relay.log
        assert '"event":"stopped"' in relay.log
    assert not path.exists()


async def test_a_second_signal_ends_the_grace(tmp_path, receiver):
    with relay_process(
        tmp_path, config(receiver), trusting(receiver, tmp_path) | {"RELAY_SERVER__SHUTDOWN_GRACE": "1h"}
    ) as relay:
        receiver.answers(Answer(delay=60))
        await call(relay, "POST", "/v1/events", EVENT)
        await receiver.wait_for(1)
        relay.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while (await call(relay, "GET", "/readyz"))[0] != 503:
                await asyncio.sleep(0.01)
        status, problem = await call(relay, "POST", "/v1/events", EVENT)
        assert (status, "stopping" in problem["detail"]) == (503, True)
        assert await asyncio.to_thread(relay.stop, 5.0) == 0


async def test_linger_takes_submissions_after_sigterm(tmp_path, receiver):
    """Where app and relay are told to stop together, the app's last events still get in."""
    with relay_process(
        tmp_path, config(receiver), trusting(receiver, tmp_path) | {"RELAY_SERVER__LINGER": "1500ms"}
    ) as relay:
        relay.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while (await call(relay, "GET", "/readyz"))[0] != 503:
                await asyncio.sleep(0.01)
        status, receipt = await call(relay, "POST", "/v1/events", EVENT)
        assert status == 202
        assert await asyncio.to_thread(relay.process.wait, 10) == 0
        await receiver.wait_for(1)
        assert receiver.requests[0].headers["webhook-id"] == receipt["id"]


async def test_a_second_relay_on_the_same_outbox_is_refused_by_name(relay):
    refused = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "relay", "serve", "--config", str(relay.config)],
        env=relay.environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert refused.returncode == 75
    assert f"is held by another relay (process {relay.process.pid})" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert (await call(relay, "GET", "/readyz"))[0] == 200


async def test_an_address_that_is_taken_is_said_in_one_sentence(tmp_path, relay, receiver):
    other = tmp_path / "other"
    other.mkdir()
    with relay_process(other, config(receiver), start=False) as second:
        environment = second.environment | {"RELAY_SERVER__LISTEN": f"127.0.0.1:{relay.port}"}
        refused = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "relay", "serve", "--config", str(second.config)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert refused.returncode == 1
    assert f"cannot listen on 127.0.0.1:{relay.port}" in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_a_unix_socket_is_for_the_owner_and_the_group(tmp_path, receiver):
    path = tmp_path / "relay.sock"
    with relay_process(tmp_path, config(receiver), start=False) as relay:
        relay.environment |= trusting(receiver, tmp_path) | {"RELAY_SERVER__LISTEN": f"unix:{path}"}
        relay.process = subprocess.Popen(
            [sys.executable, "-m", "relay", "serve", "--config", str(relay.config)],
            env=relay.environment,
            stderr=subprocess.DEVNULL,
        )
        async with asyncio.timeout(10):
            while not path.exists() or path.stat().st_mode & 0o777 != 0o660:
                await asyncio.sleep(0.02)
        reader, writer = await asyncio.open_unix_connection(path)
        body = json.dumps(EVENT).encode()
        writer.write(
            b"POST /v1/events HTTP/1.1\r\nHost: relay\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 202")
        writer.close()
        await receiver.wait_for(1)
        assert await asyncio.to_thread(relay.stop) == 0
        assert not path.exists()


@pytest.mark.parametrize("taken", ["a file", "somebody's socket"])
async def test_what_lies_where_the_unix_socket_should_be_is_left_alone(tmp_path, receiver, taken):
    """A slip in the config must not cost a file, nor another relay its listener."""
    path = tmp_path / "relay.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if taken == "a file":
        path.write_text("precious")
    else:
        listener.bind(str(path))
        listener.listen()
    with relay_process(tmp_path, config(receiver), start=False) as relay:
        refused = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "relay", "serve", "--config", str(relay.config)],
            env=relay.environment | {"RELAY_SERVER__LISTEN": f"unix:{path}"},
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    listener.close()
    assert refused.returncode == 1
    assert f"cannot listen on unix:{path}" in refused.stderr
    assert path.exists()
    assert path.is_socket() or path.read_text() == "precious"


@pytest.fixture(autouse=True)
def secrets_stay_out_of_logs(tmp_path: Path) -> Iterator[None]:
    """No log of any relay of these tests shows a secret."""
    yield
    for log in tmp_path.rglob("relay.log"):
        assert SECRET not in log.read_text()
