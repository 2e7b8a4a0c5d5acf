"""What strangers on the same machine can do to the API: send what is no HTTP, or is it only almost; say
nothing, slowly; open more connections than there are; spell paths so that no guard knows them.
"""

import asyncio
import contextlib
import itertools
import os
import re
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from relay.api import connections
from tests.figures import figure
from tests.process import RelayProcess, free_port, relay_process
from tests.raw import head, listen, speak
from tests.receiver import Answer as AnswerOf
from tests.receiver import Receiver
from tests.test_api import Api, open_api

TOKEN = "sk_ingress"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
EVENT = {"event": "post.published", "data": {"postId": "post_1"}}
BODY = orjson.dumps(EVENT)
POST = "POST /v1/events HTTP/1.1"
JSON = "Content-Type: application/json"
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
SIZE = b"%x" % len(BODY)
CHUNKS = SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
LOUD = '[logging]\nlevel = "debug"\nformat = "json"\n'


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[RelayProcess]:
    with relay_process(tmp_path_factory.mktemp("open"), LOUD) as process:
        yield process


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[RelayProcess]:
    with relay_process(tmp_path_factory.mktemp("guarded"), LOUD, start=False) as process:
        text = process.config.read_text().replace("[server]\n", f'[server]\ntokens = ["{TOKEN}"]\n', 1)
        process.config.write_text(text)
        process.start()
        yield process


def stored(relay: RelayProcess, headers=None) -> list[str]:
    _, page = relay.call("GET", "/v1/events?limit=200", headers=headers)
    return [event["id"] for event in page["data"]]


def lines(relay: RelayProcess) -> list[dict[str, object]]:
    """Return the log, which is one JSON object a line and nothing else."""
    return [orjson.loads(line) for line in relay.log.splitlines()]


# What is no HTTP


# Each is a submission that another reader of HTTP could take to end elsewhere, or to be another one.
BROKEN = {
    "a length and chunks": head(POST, JSON, LENGTH, CHUNKED) + CHUNKS,
    "chunks and a length": head(POST, JSON, CHUNKED, LENGTH) + CHUNKS,
    "two lengths": head(POST, JSON, LENGTH, "Content-Length: 5") + BODY,
    "one length twice": head(POST, JSON, LENGTH, LENGTH) + BODY,
    "a list of lengths": head(POST, JSON, f"{LENGTH}, {len(BODY)}") + BODY,
    "a length with a sign": head(POST, JSON, f"Content-Length: +{len(BODY)}") + BODY,
    "a negative length": head(POST, JSON, "Content-Length: -1") + BODY,
    "a length in hex": head(POST, JSON, f"Content-Length: {len(BODY):#x}") + BODY,
    "an empty length": head(POST, JSON, "Content-Length: ") + BODY,
    "a length of two words": head(POST, JSON, "Content-Length: 4 2") + BODY,
    "a length beyond 64 bits": head(POST, JSON, "Content-Length: 99999999999999999999") + BODY,
    "an unknown coding": head(POST, JSON, "Transfer-Encoding: xchunked") + CHUNKS,
    "chunked within chunked": head(POST, JSON, "Transfer-Encoding: chunked, chunked") + CHUNKS,
    "chunked twice": head(POST, JSON, CHUNKED, CHUNKED) + CHUNKS,
    "chunked but not last": head(POST, JSON, "Transfer-Encoding: chunked, identity") + CHUNKS,
    "a coding behind a control": head(POST, JSON, "Transfer-Encoding: \x0bchunked") + CHUNKS,
    "chunks in HTTP/1.0": head("POST /v1/events HTTP/1.0", JSON, CHUNKED) + CHUNKS,
    "a header in two lines": head(POST, JSON, LENGTH, "X-A: a", " b") + BODY,
    "a space before the colon": head(POST, JSON, f"Content-Length : {len(BODY)}") + BODY,
    "a tab before the colon": head(POST, JSON, "Transfer-Encoding\t: chunked") + CHUNKS,
    "a line that ends in LF": head(POST, JSON, LENGTH, "X-A: a\nX-B: b") + BODY,
    "a CR in a value": head(POST, JSON, LENGTH, "X-A: a\rX-B: b") + BODY,
    "a NUL in a value": head(POST, JSON, LENGTH, "X-A: a\0b") + BODY,
    "lines that end in LF": head(POST, JSON, LENGTH).replace(b"\r\n", b"\n") + BODY,
    "a header without a colon": head(POST, JSON, LENGTH, "X-A") + BODY,
    "a header without a name": head(POST, JSON, LENGTH, ": a") + BODY,
    "a space in a name": head(POST, JSON, LENGTH, "X A: b") + BODY,
    "a space before the first name": head(POST, " X-A: b", JSON, LENGTH) + BODY,
    "a name that is not ASCII": head(POST, JSON, LENGTH, "X-\xc4: b") + BODY,
    "an extension that ends in LF": head(POST, JSON, CHUNKED) + CHUNKS.replace(b"\r\n", b";a\n\r\n", 1),
    "a chunk size with a sign": head(POST, JSON, CHUNKED) + b"+" + CHUNKS,
    "a negative chunk size": head(POST, JSON, CHUNKED) + b"-" + CHUNKS,
    "a chunk size with 0x": head(POST, JSON, CHUNKED) + b"0x" + CHUNKS,
    "a chunk size with a line": head(POST, JSON, CHUNKED) + b"0_" + CHUNKS,
    "a chunk size with a space": head(POST, JSON, CHUNKED) + CHUNKS.replace(b"\r\n", b" \r\n", 1),
    "no chunk size": head(POST, JSON, CHUNKED) + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunks that end in LF": head(POST, JSON, CHUNKED) + CHUNKS.replace(b"\r\n", b"\n"),
    "a chunk longer than it says": head(POST, JSON, CHUNKED) + CHUNKS.replace(b"}\r\n", b"}}\r\n"),
    "a chunk size beyond 64 bits": head(POST, JSON, CHUNKED) + b"f" * 40 + b"\r\n" + BODY,
    "a length in the trailer": head(POST, JSON, CHUNKED) + CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n",
    "a flood of trailers": head(POST, JSON, CHUNKED) + CHUNKS[:-2] + b"X-A: b\r\n" * 20_000 + b"\r\n",
    "two hosts": head(POST, "Host: localhost", JSON, LENGTH) + BODY,
    "no host": head(POST, JSON, LENGTH, host=None) + BODY,
    "130 headers": head(POST, JSON, LENGTH, *(f"X-{n}: a" for n in range(130))) + BODY,
    "a header of 9 KB": head(POST, JSON, LENGTH, "X-A: " + "a" * 9000) + BODY,
    "a path of 9 KB": head(f"POST /v1/events?{'a' * 9000} HTTP/1.1", JSON, LENGTH) + BODY,
    "the beginning of TLS": bytes.fromhex("160301020001000001fc0303") + bytes(60) + b"\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown version": head("POST /v1/events HTTP/9.9", JSON, LENGTH) + BODY,
    "no version": head("POST /v1/events", JSON, LENGTH) + BODY,
    "a method in lower case": head("post /v1/events HTTP/1.1", JSON, LENGTH) + BODY,
    "an unknown method": head("SEND /v1/events HTTP/1.1", JSON, LENGTH) + BODY,
    "tabs between the words": head("POST\t/v1/events\tHTTP/1.1", JSON, LENGTH) + BODY,
    "a space in the path": head("POST /v1/events x HTTP/1.1", JSON, LENGTH) + BODY,
    "a control in the path": head("POST /v1/events\x01 HTTP/1.1", JSON, LENGTH) + BODY,
    "a path that is not ASCII": head("POST /v1/events\xff HTTP/1.1", JSON, LENGTH) + BODY,
    "a path without its slash": head("POST v1/events HTTP/1.1", JSON, LENGTH) + BODY,
    "bytes of no meaning": b"\0\xff\xfe\r\n\r\n",
}  # fmt: skip


smuggled: set[str] = set()


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_http_is_refused_once_and_ends_the_connection(relay, name):
    """Two readers who disagree where a request ends is how one is smuggled past the first of them."""
    before = stored(relay)

    answer = speak(relay.port, BROKEN[name] + head("GET /livez HTTP/1.1"))
    smuggled.update([name] if answer.statuses != [400] else [])
    figure("broken or ambiguous requests that were taken / forms", f"{len(smuggled)} / {len(BROKEN)}")

    assert answer.statuses == [400], "what follows is not read as a request"
    assert answer.closed
    assert answer.problem["type"] == "/problems/not-http"
    assert b"aiohttp" not in answer.text, "and what runs here is nobody's business"
    assert stored(relay) == before


def test_nobodys_broken_bytes_are_an_error_of_ours(relay):
    speak(relay.port, BROKEN["a NUL in a value"])
    told = lines(relay)
    assert [line for line in told if line["event"] == "request_broken"]
    assert [line for line in told if line["level"] not in {"debug", "info"} or "trace" in line] == []


ODD = {
    "a chunk extension": head(POST, JSON, CHUNKED) + SIZE + b";a=b\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a trailer": head(POST, JSON, CHUNKED) + CHUNKS[:-2] + b"X-A: b\r\n\r\n",
    "an upgrade": head(POST, JSON, LENGTH, "Connection: upgrade", "Upgrade: websocket") + BODY,
    "another method asked for": head(POST, JSON, LENGTH, "X-HTTP-Method-Override: DELETE") + BODY,
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_but_http_is_read_as_it_is_meant(relay, name):
    answer = speak(relay.port, ODD[name] + head("GET /livez HTTP/1.1", "Connection: close"))
    assert answer.statuses == [202, 200]


REFUSED = {
    "an unknown expectation": (head(POST, JSON, LENGTH, "Expect: 200-ok"), 417),
    "an unknown expectation of nothing": (head("POST /none HTTP/1.1", LENGTH, "Expect: 200-ok"), 417),
    "a coding within the chunks": (head(POST, JSON, "Transfer-Encoding: gzip, chunked"), 501),
    "a target of another host": (head("POST http://evil.test/v1/events HTTP/1.1", JSON, LENGTH), 421),
    "a target of ours for another host": (
        head("POST http://localhost/v1/events HTTP/1.1", JSON, LENGTH, host="evil.test"), 421,
    ),
    "a tunnel": (head("CONNECT evil.test:443 HTTP/1.1"), 421),
    "a tunnel to ourselves": (head("CONNECT localhost:443 HTTP/1.1"), 404),
    "the whole server": (head("OPTIONS * HTTP/1.1"), 404),
    "a preflight": (
        head("OPTIONS /v1/events HTTP/1.1", "Origin: http://x.test", "Access-Control-Request-Method: POST"),
        403,
    ),
    "options": (head("OPTIONS /v1/events HTTP/1.1"), 405),
    "trace": (head("TRACE /v1/events HTTP/1.1"), 405),
    "put": (head("PUT /v1/events HTTP/1.1", JSON, LENGTH), 405),
    "an address in another's name": (head(POST, JSON, LENGTH, host="127.0.0.1.nip.io"), 421),
    "our name in another's": (head(POST, JSON, LENGTH, host="localhost.evil.test"), 421),
    "our name as a user's": (head(POST, JSON, LENGTH, host="localhost:80@evil.test"), 421),
    "our address with a tail": (head(POST, JSON, LENGTH, host="[::1]evil.test"), 421),
    "no name at all": (head(POST, JSON, LENGTH, host=""), 421),
    "a name with a space": (head(POST, JSON, LENGTH, host="localhost evil.test"), 421),
    **{
        f"a body in {coding}": (head(POST, JSON, LENGTH, f"Content-Encoding: {coding}"), 415)
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "identity")
    },
    **{
        f"the type {kind}": (head(POST, f"Content-Type: {kind}", LENGTH), 415)
        for kind in ("text/plain", "application/json; charset=utf-16", "multipart/form-data; boundary=x",
                     "application/json, text/plain", "application/json;charset=utf-8;x=y", "", "text/json")
    },
    "a body of a terabyte": (head(POST, JSON, "Content-Length: 1000000000000"), 413),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_its_head_alone(relay, name):
    """The body does not come here, and nobody waits for it, nor is asked to send it."""
    request, status = REFUSED[name]
    before = stored(relay)
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as stream:
        stream.sendall(request)
        first = stream.recv(1 << 16)
        stream.settimeout(0.02)
        answer = listen(stream)
    answer = answer._replace(text=first + answer.text)
    assert answer.statuses == [status]
    assert answer.problem
    assert b"access-control" not in answer.text.lower()
    assert stored(relay) == before


@pytest.mark.parametrize(
    ("fields", "statuses"),
    [
        ((JSON,), [100, 202]),
        ((JSON, "Content-Encoding: gzip"), [415]),
        (("Content-Type: text/plain",), [415]),
        ((JSON, "Origin: http://evil.test"), [403]),
    ],
)
def test_a_body_is_asked_for_only_when_it_is_wanted(relay, fields, statuses):
    """`Expect: 100-continue` is how a client spares itself an upload that will be refused."""
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as stream:
        stream.sendall(head(POST, *fields, LENGTH, "Expect: 100-continue", "Connection: close"))
        first = stream.recv(1 << 16)
        stream.sendall(BODY)
        answer = listen(stream)
    assert answer._replace(text=first + answer.text).statuses == statuses


def test_an_event_may_be_exactly_as_large_as_it_may_be(relay):
    limit = 256 << 10
    for size, status in ((limit - 1, 202), (limit, 202), (limit + 1, 413)):
        body = b'{"event":"a","data":"' + b"x" * (size - 23) + b'"}'
        assert len(body) == size
        assert relay.call("POST", "/v1/events", body)[0] == status, size
        pieces = b"".join(
            b"%x\r\n%b\r\n" % (len(each), each) for each in (body[: size // 2], body[size // 2 :])
        )
        answer = speak(relay.port, head(POST, JSON, CHUNKED, "Connection: close") + pieces + b"0\r\n\r\n")
        assert answer.statuses == [status], size


def test_chunks_without_end_are_refused_as_soon_as_they_are_too_many(relay):
    sent = 0
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as stream:
        stream.sendall(head(POST, JSON, CHUNKED))
        with contextlib.suppress(OSError):
            while sent < 256 << 20 and not select.select([stream], [], [], 0)[0]:
                sent += stream.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        answer = stream.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent < 64 << 20


# Paths


SPELLINGS = (
    lambda path: path,
    lambda path: "/" + path,
    lambda path: path + "/",
    lambda path: path.replace("/v1/", "/v1//"),
    lambda path: path.replace("/v1", "/%76%31"),
    lambda path: path.replace("/v1", "/V1"),
    lambda path: path.replace("/v1/", "/v1%2f"),
    lambda path: path.replace("/v1/", "/v1%2F"),
    lambda path: "/%2f" + path[1:],
    lambda path: "/%2e" + path,
    lambda path: "/./" + path[1:],
    lambda path: "/livez/.." + path,
    lambda path: "/livez/%2e%2e" + path,
    lambda path: "/livez/..%2f" + path[1:],
    lambda path: "/livez%2f..%2f" + path[1:],
    lambda path: "/x/..;" + path,
    lambda path: "/v1/.." + path,
    lambda path: "/;" + path,
    lambda path: path.replace("/v1", "/v1;x"),
    lambda path: "\\" + path[1:],
    lambda path: path.replace("/", "\\"),
    lambda path: "/%5c" + path[1:],
    lambda path: path + "%00",
    lambda path: "/%00" + path,
    lambda path: path.replace("/v1", "/v1%20"),
    lambda path: path.replace("/v1", "/%c0%afv1"),
    lambda path: path.replace("/v1", "/%EF%BD%961"),
    lambda path: path + "#/livez",
    lambda path: path + "?/livez",
    lambda path: "?" + path,
    lambda path: "/livez?" + path,
    lambda path: "http://localhost" + path,
    lambda path: "HTTP://LOCALHOST" + path.replace("/v1", "/%76%31"),
    lambda path: "http://localhost/livez/.." + path,
    lambda path: "//localhost" + path,
    lambda path: path.replace("v", "%2576"),
)
SERVICE = (
    "GET /v1/events", "GET /v1/events/{id}", "POST /v1/events", "POST /v1/events/batch",
    "GET /v1/event-types", "GET /v1/webhooks/settings", "POST /v1/webhooks/settings",
    "POST /v1/webhooks/test", "GET /v1/backup", "POST /v1/events/{id}/replay",
    "DELETE /v1/webhooks/settings/main",
)  # fmt: skip


def test_no_spelling_of_a_path_reaches_the_service_without_a_token(guarded):
    """The check looks at the route that was found, so it reads no path otherwise than the router does."""
    status, receipt = guarded.call("POST", "/v1/events", EVENT, BEARER)
    assert status == 202
    tried, reached = 0, []
    for asked, spell in itertools.product(SERVICE, SPELLINGS):
        method, path = asked.replace("{id}", receipt["id"]).split(" ")
        target = spell(path)
        body = BODY if method == "POST" else b""
        request = head(
            f"{method} {target} HTTP/1.1", JSON, f"Content-Length: {len(body)}", "Connection: close"
        )
        answer = speak(guarded.port, request + body)
        tried += 1
        harmless = answer.text.endswith(b"\r\n\r\nok\n")  # the path's own spelling led to /livez
        if not harmless and set(answer.statuses) - {400, 401, 404, 405, 421}:
            reached.append((method, target, answer.statuses))
        if receipt["id"].encode() in answer.text or b"post_1" in answer.text:
            reached.append((method, target, answer.text))
    figure(
        "spellings of a path that reached the service without a token / tried", f"{len(reached)} / {tried}"
    )
    assert reached == []
    assert stored(guarded, BEARER) == [receipt["id"]]


@pytest.mark.parametrize(
    "id_",
    [
        "' OR 1=1 --",
        "evt_%",
        "*",
        "a" * 7000,
        "..",
        "\0",
        "\ud800",
        "\u202e",
        "%s",
        "{0}",
        "$(id)",
        "batch",
        "0",
    ],
)
def test_an_id_that_is_none_finds_nothing(relay, id_):
    """Ids go into SQL as parameters, and nothing else is made of them."""
    spelled = urllib.parse.quote(id_, safe="", errors="surrogatepass")
    for asked in ("GET /v1/events/{}", "POST /v1/events/{}/replay", "GET /v1/webhooks/settings/{}",
                  "DELETE /v1/webhooks/settings/{}", "POST /v1/webhooks/settings/{}/pause"):  # fmt: skip
        method, path = asked.format(spelled).split(" ")
        status, answer = relay.call(method, path)
        assert status in {404, 405}, (asked, answer)


WRONG_TOKENS = (
    "Authorization: Bearer sk_wrong", f"Authorization: Basic {TOKEN}", "Authorization: Bearer",
    f"Authorization: Bearer {TOKEN[:-1]}", f"Authorization: Bearer {TOKEN}x", f"Authorization: {TOKEN}",
    f"Authorization: Bearer {TOKEN},{TOKEN}", f"Authorization: Bearer {TOKEN.upper()}",
    f"X-Authorization: Bearer {TOKEN}", f"Proxy-Authorization: Bearer {TOKEN}", f"Cookie: token={TOKEN}",
    "Authorization: Bearer \xff", f"X: {TOKEN}",
)  # fmt: skip


def test_every_wrong_token_gets_the_same_answer(guarded):
    """Nothing tells how much of it was right, nor whether there is what was asked for."""
    request = f"GET /v1/events?access_token={TOKEN} HTTP/1.1"
    paths = (request, request.replace("events", "nothing"), request.replace("events", "webhooks/settings/x"))
    answers = {
        speak(guarded.port, head(each, token, "Connection: close")).text.partition(b"\r\n\r\n")[2]
        for token, each in itertools.product(WRONG_TOKENS, paths)
    }
    assert len(answers) == 1
    assert orjson.loads(answers.pop())["status"] == 401


# Slowness and numbers


@pytest.fixture
async def api(outbox):
    async for each in open_api(outbox):
        yield each


async def connect(api: Api) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*api.url.removeprefix("http://").split(":"))


async def test_a_head_that_does_not_come_is_given_up_however_it_drips(api, monkeypatch):
    """Bytes now and then must not hold a connection; what it gets says why."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    reader, writer = await connect(api)
    drip = itertools.chain(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: ", itertools.repeat(ord("a")))

    async def dripping() -> None:
        with contextlib.suppress(ConnectionError):
            for byte in drip:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.01)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(dripping())
        answer = await reader.read(1 << 16)
        task.cancel()
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"application/problem+json" in answer
    writer.close()


async def test_a_request_in_pieces_that_comes_in_time_is_answered_and_the_next_one_too(api, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    reader, writer = await connect(api)
    for _ in range(3):
        for piece in (b"GET /livez HT", b"TP/1.1\r\nHost: loc", b"alhost\r\n\r\n"):
            writer.write(piece)
            await asyncio.sleep(0.02)
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200")
    await asyncio.sleep(0.6)
    assert not reader.at_eof(), "the time for a head is over with the head"
    writer.close()


async def test_an_idle_connection_is_closed(api, monkeypatch):
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.2)
    reader, writer = await connect(api)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


async def test_a_body_nobody_wants_is_waited_for_only_a_moment(api, monkeypatch):
    monkeypatch.setattr(connections, "UNREAD_BODY_SECONDS", 0.2)
    reader, writer = await connect(api)
    writer.write(head(POST, "Content-Type: text/plain", "Content-Length: 5000"))
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 415")
    writer.close()


async def test_the_connection_that_is_idle_longest_makes_room_for_the_next(outbox):
    """Whoever opens connections and says nothing keeps nobody out."""
    async for api in open_api(outbox, most=4):
        idle = [await connect(api) for _ in range(4)]
        assert (await api.get("/livez"))[0] == 200
        async with asyncio.timeout(5):
            assert await idle[0][0].read() == b""
        assert not idle[1][0].at_eof()
        for _, writer in idle:
            writer.close()


async def test_when_all_connections_are_at_work_the_next_is_told_so(outbox):
    async for api in open_api(outbox, most=2):
        slow = [await connect(api) for _ in range(2)]
        for _, writer in slow:
            writer.write(head(POST, JSON, LENGTH) + BODY[:5])
        await asyncio.sleep(0.1)
        status, headers, problem = await api.post("/v1/events", EVENT)
        assert (status, headers["Retry-After"], headers["Connection"]) == (503, "5", "close")
        assert problem["detail"] == connections.FULL
        for reader, writer in slow:
            writer.write(BODY[5:])
            async with asyncio.timeout(5):
                assert (await reader.readline()).startswith(b"HTTP/1.1 202")
        assert (await api.post("/v1/events", EVENT))[0] == 202, "as soon as one has been answered"
        for _, writer in slow:
            writer.close()


async def test_strangers_idle_connections_cost_no_delivery_its_descriptor(tmp_path):
    """With 128 descriptors and 300 idle connections events are taken and delivered all the same."""
    async with Receiver(tls=False) as receiver:
        config = f"""allow_http = true
[[endpoints]]
id = "main"
url = "{receiver.url}"
events = ["*"]
secret = "s"
"""
        with relay_process(tmp_path, config, start=False) as relay, contextlib.ExitStack() as idle:
            command = [sys.executable, "-m", "relay", "serve", "--config", str(relay.config)]
            with (tmp_path / "relay.log").open("wb") as log:
                relay.process = subprocess.Popen(
                    ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *command],
                    stdout=log, stderr=log, env=relay.environment,
                )  # fmt: skip
            await asyncio.to_thread(relay.wait_until_ready)
            for _ in range(300):
                idle.enter_context(socket.create_connection(("127.0.0.1", relay.port), timeout=5))
            for _ in range(20):
                status, _ = await asyncio.to_thread(relay.call, "POST", "/v1/events", EVENT)
                assert status == 202
            await receiver.wait_for(20)
            opened = len(list(Path(f"/proc/{relay.process.pid}/fd").iterdir()))
            figure("descriptors open beside 300 idle connections / allowed", f"{opened} / 128")
            assert opened < 128
            assert '"level":"error"' not in relay.log


def test_a_healthy_client_hardly_notices_400_slow_heads_and_400_slow_bodies(relay):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    took = []
    with contextlib.ExitStack() as slow:
        heads, bodies = (
            [
                slow.enter_context(socket.create_connection(("127.0.0.1", relay.port), timeout=5))
                for _ in range(400)
            ]
            for _ in range(2)
        )
        for stream in bodies:
            stream.sendall(head(POST, JSON, LENGTH))
        done = threading.Event()

        def drip() -> None:
            """Send a byte on one of them every millisecond."""
            for stream in itertools.cycle(itertools.chain(*zip(heads, bodies, strict=True))):
                if done.wait(0.001):
                    return
                with contextlib.suppress(OSError):
                    stream.sendall(b"a")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            for _ in range(300):
                started = time.perf_counter()
                assert relay.call("POST", "/v1/events", EVENT)[0] == 202
                took.append((time.perf_counter() - started) * 1000)
        finally:
            done.set()
            dripping.join()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    p99 = statistics.quantiles(took, n=100)[98]
    figure("healthy p99 beside 400 slow heads and 400 slow bodies (aim < 50 ms)", f"{p99:.1f} ms")
    assert p99 < 1000


# JSON that is made to hurt


MEGABYTE = 1 << 20
SMALL, LARGE = 200 << 10, 15 * MEGABYTE


def bombs(size: int) -> dict[str, bytes]:
    return {
        "open brackets": b"[" * size,
        "nested lists": b"[" * (size // 2) + b"]" * (size // 2),
        "nested objects": b'{"a":' * (size // 5),
        "nested around a long integer": b"[" * (size // 2) + b"1" * 25 + b"]" * (size // 2),
        "one long integer": b"1" * size,
        "one long fraction": b"0." + b"1" * size,
        "a large exponent": b"1e" + b"9" * size,
        "long integers": b"[" + b",".join([b"1" * 25] * (size // 26)) + b"]",
        "one long name": b'{"' + b"k" * size + b'":1}',
        "many names": b"{" + b",".join(b'"x%d":1' % n for n in range(size // 10)) + b"}",
        "one name many times": b"{" + b",".join([b'"a":1'] * (size // 6)) + b"}",
        "numbers JavaScript writes otherwise": b"[" + b",".join([b"1e21"] * (size // 5)) + b"]",
        "empty lists": b"[" + b",".join([b"[]"] * (size // 3)) + b"]",
        "not a number": b"NaN",
        "half a surrogate pair": b'"\\ud800"',
    }


@pytest.mark.parametrize("name", bombs(0))
def test_no_json_that_is_made_to_hurt_holds_up_the_others(relay, name):
    """As data, as a whole submission, as members of one; what cannot be kept exactly is refused."""
    bomb = bombs(SMALL)[name]
    members = bomb[1:-1] if bomb[:1] == b"{" and bomb[-1:] == b"}" else b'"to":' + bomb
    for body in (b'{"event":"a","data":' + bomb + b"}", bomb, b'{"event":"a","data":1,' + members + b"}"):
        started = time.perf_counter()
        status, answer = relay.call("POST", "/v1/events", body)
        took = time.perf_counter() - started
        assert status in {202, 400, 413, 422}
        assert len(orjson.dumps(answer)) < 4 * SMALL
        assert took < 2, f"{took:.2f} s for {len(body)} bytes"


@pytest.mark.parametrize("name", ["one long fraction", "many names", "empty lists", "nested lists"])
def test_a_large_batch_that_is_made_to_hurt_is_worked_off_in_turns(relay, name):
    """A batch may be large; then others are answered meanwhile."""
    bomb = bombs(SMALL)[name]
    batch = b'{"events":[' + b",".join([b'{"event":"a","data":' + bomb + b"}"] * 12) + b"]}"
    waits = []
    with socket.create_connection(("127.0.0.1", relay.port), timeout=30) as stream:
        stream.sendall(head("POST /v1/events/batch HTTP/1.1", JSON, f"Content-Length: {len(batch)}") + batch)
        stream.settimeout(0)
        while True:
            started = time.perf_counter()
            assert relay.call("GET", "/livez")[0] == 200
            waits.append(time.perf_counter() - started)
            with contextlib.suppress(BlockingIOError):
                answer = stream.recv(100)
                break
    figure(f"longest wait of others beside a batch of {name}", f"{max(waits) * 1000:.0f} ms")
    assert answer.startswith((b"HTTP/1.1 202", b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 422"))
    assert max(waits) < 5


@pytest.mark.parametrize("body", [b"\n" * LARGE, b" \n" * (LARGE // 2), b"1\n" * (LARGE // 2)])
def test_lines_without_number_are_not_all_looked_at(relay, body):
    started = time.perf_counter()
    status, _ = relay.call("POST", "/v1/events/batch", body, {"Content-Type": "application/x-ndjson"})
    assert status in {202, 422}
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize("piece", [b'{"":0},', b'"a",', b"1.5,"])
def test_a_batch_takes_no_memory_out_of_proportion(tmp_path, piece):
    """A few bytes of text can become a hundred bytes of objects; 16 MiB of them must not end the relay."""
    with relay_process(tmp_path, "") as process:
        batch = b'{"events":[' + piece * (LARGE // len(piece)) + b"0]}"
        status, _ = process.call("POST", "/v1/events/batch", batch)
        assert status in {413, 422}
        text = Path(f"/proc/{process.process.pid}/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) >> 10
        figure(f"peak memory under a batch of {len(batch) >> 20} MiB of {piece.decode()}", f"{peak} MiB")
        assert peak < 500


# What ends up in a header or in the log

CONTROLS = ("\r\nX-Injected: 1", "\n", "\r", "\0", "\x7f")


def test_no_field_of_an_event_can_hold_what_would_end_a_header(relay):
    before = stored(relay)
    for control in CONTROLS:
        for member, status in (("event", 422), ("key", 422), ("timestamp", 422), ("to", 422)):
            value = f"a{control}b"
            content = EVENT | {member: [value] if member == "to" else value}
            assert relay.call("POST", "/v1/events", content)[0] == status, (member, control)
        cloud = {"specversion": "1.0", "id": "1", "source": "/a", "type": "a", "data": 1}
        media = {"Content-Type": "application/cloudevents+json"}
        for attribute in ("type", "subject", "time", "datacontenttype", "specversion"):
            content = cloud | {attribute: f"{cloud.get(attribute, 'a')}{control}b"}
            assert relay.call("POST", "/v1/events", content, media)[0] == 422, (attribute, control)
    assert stored(relay) == before


def test_no_setting_of_an_endpoint_can_hold_what_would_end_a_header(relay):
    for control in CONTROLS:
        good = {"id": "mine", "url": "https://hooks.example.com/", "events": ["*"]}
        wrong = [
            {"id": f"a{control}b"}, {"url": f"{good['url']}{control}"}, {"events": [f"a{control}b"]},
            {"headers": {"X-A": f"a{control}b"}}, {"headers": {f"X{control}": "a"}},
            {"signatures": [{"header": f"X{control}"}]},
            {"signatures": [{"header": "X-Mine", "prefix": f"a{control}b"}]},
        ]  # fmt: skip
        for each in wrong:
            assert relay.call("POST", "/v1/webhooks/settings", good | each)[0] == 422, each
    assert relay.call("GET", "/v1/webhooks/settings")[1]["data"] == []


async def test_foreign_text_arrives_as_one_header_or_not_at_all(tmp_path):
    """What a submission may say is escaped on its way into headers; the receiver counts them."""
    async with Receiver(tls=False) as receiver:
        config = f"""allow_http = true
[[endpoints]]
id = "main"
url = "{receiver.url}"
events = ["*"]
secret = "s"
format = "cloudevents-binary"
signatures = ["standard", "github", "shopify"]
[endpoints.headers]
X-Own = "a b"
"""
        with relay_process(tmp_path, config) as process:
            trace = f"00-{'4b' * 16}-{'f0' * 8}-01"
            keys = ("plain", "sp ace", '"quoted"', "\u00e9\u4e2d\U0001f600", "%0d%0aX-Injected: 1", "a,b;c=d")
            for key in keys:
                headers = {"traceparent": trace, "tracestate": "a=1,b=2"}
                status, _ = process.call("POST", "/v1/events", EVENT | {"key": key}, headers)
                assert status == 202, key
            broken = {"traceparent": f"{trace}x", "tracestate": "a=\xe9"}
            assert process.call("POST", "/v1/events", EVENT, broken)[0] == 202, "ignored, as W3C asks"
            requests = await receiver.wait_for(len(keys) + 1)
    assert (
        len({tuple(sorted(request.headers)) for request in requests if "ce-subject" in request.headers}) == 1
    )
    assert all("X-Injected" not in request.headers for request in requests)
    assert {request.headers.get("ce-subject") for request in requests} >= {
        "plain",
        "%250d%250aX-Injected:%201",
    }
    assert all(request.headers["ce-type"] == "post.published" for request in requests)
    assert all(request.headers["X-Own"] == "a b" for request in requests)


STEERING = "a\r\n\x1b[2J\x9b31m\x7f\u2028\u202e\0b"
FORGED = '\n{"ts":"2026-01-01T00:00:00.000Z","level":"critical","event":"forged"}\n'


@pytest.mark.parametrize("form", ["json", "text"])
async def test_no_foreign_text_forges_or_breaks_a_line_of_the_log(tmp_path, form):
    """Whoever reads the log, a person or a program, reads what the relay said."""
    async with Receiver(tls=False) as receiver:
        config = f"""allow_http = true
allow_private_for_api = true
ports = [{receiver.port}]
[logging]
level = "debug"
format = "{form}"
"""
        with relay_process(tmp_path, config) as process:
            foreign = STEERING + FORGED
            made = {"id": "mine", "url": f"{receiver.url}?a={foreign!r}", "events": ["*"]}
            status, _ = process.call(
                "POST", "/v1/webhooks/settings", made | {"url": receiver.url, "description": foreign}
            )
            assert status == 201
            process.call("POST", "/v1/webhooks/settings", made)
            receiver.answers(
                AnswerOf(500, body=foreign.encode()), AnswerOf(500, {"X-A": "\x9b"}, FORGED.encode())
            )
            for member in ("event", "key"):
                process.call("POST", "/v1/events", EVENT | {member: foreign})
            for path in (
                "/%0a%7b%22level%22:%22critical%22%7d",
                "/v1/events/%1b%5b2J%C2%9B",
                "/%ED%A0%80",
                "/%ff",
            ):
                process.call("GET", path)
                process.call("PATCH", path)
            speak(process.port, FORGED.encode() + b"\r\n\r\n")
            speak(process.port, head(POST, f"X: {FORGED}".encode().decode("latin-1")))
            process.call("POST", "/v1/events", EVENT)
            await receiver.wait_for(1)
            assert await asyncio.to_thread(process.stop) == 0
    assert not any(unprintable(line) for line in process.log.splitlines())
    if form == "json":
        assert all(line["event"] != "forged" for line in lines(process))
    else:
        assert not [line for line in process.log.splitlines() if line.startswith("{")]


def unprintable(line: str) -> bool:
    return any(
        character < " " or "\x7f" <= character <= "\x9f" or character in "\u2028\u2029" for character in line
    )


# The unix socket


@pytest.mark.parametrize("umask", ["000", "022", "077"])
def test_a_unix_socket_lets_in_its_group_and_nobody_else_whatever_the_umask(umask):
    if os.geteuid() != 0 or shutil.which("curl") is None:
        pytest.skip("wants curl, and root to become others")
    stranger, group = 61234, 61235
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        path = folder / "relay.sock"
        with relay_process(folder, "", start=False) as process:
            command = [sys.executable, "-m", "relay", "serve", "--config", str(process.config)]
            process.process = subprocess.Popen(
                ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *command],
                env=process.environment | {"RELAY_SERVER__LISTEN": f"unix:{path}"},
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + 15
            while not path.exists() or asked(path, 0, 0) != 0:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            status = path.stat()
            assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o660, 0, os.getegid())
            os.chown(path, -1, group)  # as it is where the relay runs in this group
            assert asked(path, stranger, group) == 0
            assert asked(path, stranger, stranger) == COULD_NOT_CONNECT
            assert {each.stat().st_mode & 0o077 for each in folder.glob("relay.db*")} == {0}


COULD_NOT_CONNECT = 7


def asked(path: Path, user: int, group: int) -> int:
    """Return curl's exit code, run as somebody else."""
    return subprocess.run(
        ["curl", "--silent", "--output", "/dev/null", "--unix-socket", str(path), "http://localhost/livez"],
        user=user, group=group, extra_groups=[], check=False, timeout=10,
    ).returncode  # fmt: skip


# The second address


def test_the_second_address_has_health_alone_and_speaks_the_same_format(tmp_path):
    ops = free_port()
    with relay_process(tmp_path, "", {"RELAY_SERVER__OPS_LISTEN": f"127.0.0.1:{ops}"}):
        for path, status in (("/livez", 200), ("/readyz", 200), ("/v1/events", 404), ("/openapi.json", 404)):
            answer = speak(ops, head(f"GET {path} HTTP/1.1", "Connection: close", host="10.0.0.7:9000"))
            assert answer.statuses == [status], path
            assert status == 200 or answer.problem
        assert speak(ops, BROKEN["a NUL in a value"]).problem
