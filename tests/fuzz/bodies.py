"""Requests at the API that chance has written: every answer is one that a client could expect.

Three kinds, by seed: bodies (JSON that was bent, for every path that takes one), heads (fields of every
kind around a body), and bytes (a good request with some of its bytes changed). What comes back has to be one
of the answers below, in their format, in time; and the relay has to be alive afterwards, with no fault in its
log.
"""

import os
import random
import re
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import orjson

from tests.process import relay_process

# Endpoints are made as well as events; this port lets none of them be one that leads anywhere.
CONFIG = 'ports = [1]\n[logging]\nformat = "json"\n'
WARM_UP = 500
FAULT = re.compile(r'"event":"(request_failed|attempt_broke|failed)"|"trace":|Traceback')

# Everything else is a failure: no 5xx but these, which say what the relay does not do, or that it is full.
CLEAN = {200, 201, 202, 400, 401, 403, 404, 405, 408, 409, 413, 415, 417, 421, 422, 501, 503}
PATIENCE_SECONDS = 10.0
BRIEF_SECONDS = 0.3
PADDING = b"\r\n\r\n" + b" " * 16_384
FRAME = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n((?:[!-9;-~]+: [^\r\n\0]*\r\n)*)\r\n")


@dataclass(slots=True)
class Result:
    """How many were tried, each that was answered other than cleanly, and how the relay's memory grew."""

    tried: int = 0
    unclean: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    grown_bytes: int = 0


class Request(NamedTuple):
    """Bytes to send, and whether they are whole: only then an answer is owed."""

    data: bytes
    whole: bool


def run(*, seed: int, count: int | None = None, seconds: float | None = None) -> Result:
    """Start a relay and send it so many requests, or as many as there is time for."""
    with tempfile.TemporaryDirectory() as folder, relay_process(Path(folder), CONFIG) as relay:
        send(relay.port, seed=seed - 1, count=WARM_UP)
        before = resident(relay.process.pid)
        result = send(relay.port, seed=seed, count=count, seconds=seconds)
        result.grown_bytes = resident(relay.process.pid) - before
        if relay.call("GET", "/readyz")[0] != 200:
            result.unclean.append("not ready afterwards")
        result.unclean += [line for line in relay.log.splitlines() if FAULT.search(line)]
    return result


def send(port: int, *, seed: int, count: int | None = None, seconds: float | None = None) -> Result:
    """Send requests to a relay without tokens on this port."""
    chance = random.Random(seed)
    until = time.monotonic() + (seconds if seconds is not None else float("inf"))
    result = Result()
    wire = Wire(port)
    while (count is None or result.tried < count) and time.monotonic() < until:
        request = chance.choice(KINDS)(chance)
        answered = wire.ask(request)
        result.tried += 1
        if isinstance(answered, int):
            result.statuses[answered] += 1
        if wrong := unfit(answered, request):
            result.unclean.append(f"{wrong}: {request.data[:2000]!r}")
    wire.close()
    return result


def resident(pid: int) -> int:
    """Return how much memory a process has, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def unfit(answered: int | str | None, request: Request) -> str | None:
    if isinstance(answered, str):
        return answered
    if answered is None:
        return "no answer" if request.whole else None
    return None if answered in CLEAN else f"answered {answered}"


class Wire:
    """A connection that is opened anew whenever the other side has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stream: socket.socket | None = None

    def ask(self, request: Request) -> int | str | None:
        """Return the status, or what was wrong with the answer, or nothing when there was none."""
        # After a request that may be half a one nothing can be told apart any more.
        reused = self._stream is not None and request.whole
        if not reused:
            self.close()
            self._stream = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE_SECONDS)
        try:
            answered = self._ask(request)
        except OSError as error:
            silent = isinstance(error, ConnectionError) or not request.whole
            answered = None if silent else f"{type(error).__name__} {error}"
        if not request.whole or not isinstance(answered, int):
            self.close()
        if answered is None and reused:  # closed since the last request: that one tells nothing
            return self.ask(request)
        return answered

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _ask(self, request: Request) -> int | str | None:
        assert self._stream is not None
        self._stream.sendall(request.data)
        if not request.whole:
            # What was changed may announce more than there is: here is more, and then patience is short.
            self._stream.sendall(PADDING)
            self._stream.settimeout(BRIEF_SECONDS)
        text = b""
        while not (frame := FRAME.match(text)):
            piece = self._stream.recv(1 << 16)
            if not piece:
                return f"no HTTP: {text[:200]!r}" if text else None
            text += piece
        status, head = int(frame[1]), frame[2].lower()
        if status == 100:
            return self._rest_of(text[frame.end() :])
        return self._checked(status, head, text[frame.end() :])

    def _rest_of(self, text: bytes) -> int | str | None:
        assert self._stream is not None
        while not (frame := FRAME.match(text)):
            piece = self._stream.recv(1 << 16)
            if not piece:
                return None
            text += piece
        return self._checked(int(frame[1]), frame[2].lower(), text[frame.end() :])

    def _checked(self, status: int, head: bytes, body: bytes) -> int | str:
        assert self._stream is not None
        length = re.search(rb"content-length: (\d+)\r\n", head)
        if length is None:
            return f"{status} without a length"
        while len(body) < int(length[1]):
            piece = self._stream.recv(1 << 16)
            if not piece:
                return f"{status} that broke off"
            body += piece
        if b"connection: close" in head or len(body) > int(length[1]):
            self.close()
        if status >= 400 and b"application/problem+json" not in head:
            return f"{status} in another format"
        if status >= 400 and orjson.loads(body[: int(length[1])])["status"] != status:
            return f"{status} that says another status"
        return status


# Values


WORDS = (
    "post.published", "relay.endpoint.down", "https://127.0.0.1:1/x?y=1", "main", "whsec_YQ==", "24h", "50/s",
    "2026-01-15T10:00:00Z", "%00", "${env:HOME}", "'; DROP TABLE events", "\\", "cloudevents", "standard",
    "../..", "hex",
)  # fmt: skip


def text(chance: random.Random) -> str:
    pieces = [
        lambda: "".join(chance.choices("abcXYZ019._-*:/ ", k=chance.randrange(12))),
        lambda: chr(chance.choice((0, 9, 10, 13, 27, 127, 133, 0x2028, 0xFFFD, 0x1F600))),
        lambda: chance.choice(
            ("post.published", "relay.endpoint.down", "https://a.test/x?y=1", "main", "whsec_YQ==")
        ),
        lambda: chance.choice(
            ("2026-01-15T10:00:00Z", "24h", "50/s", "../..", "%00", "${env:HOME}", "'; DROP", "\\")
        ),
        lambda: "a" * chance.choice((64, 128, 256, 5000)),
    ]
    return "".join(chance.choice(pieces)() for _ in range(chance.randrange(1, 4)))


def value(chance: random.Random, depth: int = 4) -> object:
    scalars: list[Callable[[], object]] = [
        lambda: text(chance),
        lambda: chance.choice((None, True, False, 0, -1, 2**63, -(2**63), 2**64 - 1, 1e21, -0.0, 1e-7)),
        lambda: chance.random() * 10 ** chance.randrange(-300, 300),
        lambda: chance.choice(("", [], {})),
    ]
    if depth and chance.random() < 0.4:
        size = chance.choice((0, 1, 2, 5))
        if chance.random() < 0.5:
            return [value(chance, depth - 1) for _ in range(size)]
        return {text(chance): value(chance, depth - 1) for _ in range(size)}
    return chance.choice(scalars)()


EVENT = {"event": "post.published", "data": {"postId": "post_1"}}
CLOUD = {"specversion": "1.0", "id": "1", "source": "/a", "type": "post.published", "data": {"a": 1}}
ENDPOINT = {"url": "https://127.0.0.1:1/a", "events": ["post.*"]}
NAMES = {
    "event": ("event", "data", "timestamp", "key", "to", "idempotency_key", "more"),
    "cloud": (*CLOUD, "subject", "time", "datacontenttype", "data_base64", "traceparent", "x"),
    "endpoint": (
        "url", "events", "id", "secret", "description", "format", "signatures", "headers", "timeout",
        "retry_schedule", "concurrency", "rate", "order", "max_age", "tls_ca_file", "secrets", "source",
    ),
    "action": ("overlap", "state", "since", "until", "event", "rate", "dry_run", "endpoint"),
}  # fmt: skip
JSON, CLOUDEVENT = "application/json", "application/cloudevents+json"
TARGETS = (
    ("POST /v1/events", JSON, "event", EVENT), ("POST /v1/events", CLOUDEVENT, "cloud", CLOUD),
    ("POST /v1/events/batch", JSON, "event", {"events": [EVENT, EVENT]}),
    ("POST /v1/events/batch", "application/x-ndjson", "event", EVENT),
    ("POST /v1/events/batch", "application/cloudevents-batch+json", "cloud", [CLOUD]),
    ("POST /v1/webhooks/settings", JSON, "endpoint", ENDPOINT),
    ("PATCH /v1/webhooks/settings/fuzzed", JSON, "endpoint", {}),
    ("POST /v1/webhooks/settings/fuzzed/rotate-secret", JSON, "action", {"overlap": "0s"}),
    ("POST /v1/webhooks/settings/fuzzed/replay", JSON, "action", {"dry_run": True}),
    ("POST /v1/webhooks/test", JSON, "action", {"event": "none"}),
    ("POST /v1/events/evt_0/replay", JSON, "action", {}),
)  # fmt: skip


def bent(chance: random.Random, names: tuple[str, ...], good: object) -> object:
    """Return a good value with some members changed, added or taken away, or another value altogether."""
    if chance.random() < 0.1:
        return value(chance)
    if isinstance(good, list):
        return [bent(chance, names, each) for each in good] * chance.choice((0, 1, 1, 3))
    if not isinstance(good, dict):
        return good
    if "events" in good and isinstance(good["events"], list) and "url" not in good:
        return good | {"events": bent(chance, names, good["events"])}
    changed = dict(good)
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        name = chance.choice(names) if chance.random() < 0.9 else text(chance)
        if chance.random() < 0.2:
            changed.pop(name, None)
        else:
            changed[name] = value(chance)
    return changed


ODD = (
    b"NaN", b"1e999", b"\\ud800", b"\xff", b"1" * 30, b"[" * 2000, b"\0", b"01", b"'a'", b"\xed\xa0\x80",
    b"\n",
)  # fmt: skip


def written(chance: random.Random, content: object) -> bytes:
    """Write JSON, now and then with something in it that is none."""
    body = orjson.dumps(content)
    odd = (
        b"NaN",
        b"1e999",
        b"\\ud800",
        b"\xff",
        b"1" * 30,
        b"[" * 2000,
        b"\0",
        b"01",
        b"'a'",
        b"\xed\xa0\x80",
        b"\n",
    )
    while chance.random() < 0.2:
        at = chance.randrange(len(body) + 1)
        body = body[:at] + chance.choice(odd) + body[at + chance.choice((0, 0, 1, 3)) :]
    return body


def framed(line: str, fields: list[str], body: bytes, *, host: str = "localhost") -> bytes:
    lines = [f"{line} HTTP/1.1", f"Host: {host}", *fields, "", ""]
    return "\r\n".join(lines).encode("utf-8", "replace") + body


def bodies(chance: random.Random) -> Request:
    line, kind, names, good = chance.choice(TARGETS)
    body = written(chance, bent(chance, NAMES[names], good))
    return Request(framed(line, [f"Content-Type: {kind}", f"Content-Length: {len(body)}"], body), whole=True)


def visible(chance: random.Random) -> str:
    """Return text that a field may hold, so that the head stays one that can be read."""
    return re.sub(r"[^\t -~\x80-\uffff]", "", text(chance))[:3000]


FIELDS = (
    "Idempotency-Key", "traceparent", "tracestate", "ce-id", "ce-type", "ce-source", "ce-specversion",
    "ce-time", "ce-subject", "Origin", "Sec-Fetch-Site", "Authorization", "Accept", "Expect", "Cookie",
    "Content-Encoding", "Connection", "X-HTTP-Method-Override", "If-None-Match", "Range", "Forwarded", "TE",
    "Upgrade",
)  # fmt: skip
PATHS = ("/v1/events", "/v1/events/", "/livez", "/v1/webhooks/settings/", "/v1/events?", "/")


def heads(chance: random.Random) -> Request:
    body = orjson.dumps(EVENT)
    fields = [f"{chance.choice(FIELDS)}: {visible(chance)}" for _ in range(chance.randrange(4))]
    fields += [f"Content-Type: {chance.choice((JSON, JSON, CLOUDEVENT, visible(chance)))}"]
    method = chance.choice(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"))
    path = chance.choice(
        ("/v1/events", "/v1/events/", "/livez", "/v1/webhooks/settings/", "/v1/events?", "/")
    )
    tail = "".join(chance.choices("aZ0%/?&=.;,~_-+2F00", k=chance.randrange(12)))
    host = chance.choice(("localhost", "localhost", "localhost", visible(chance).strip()))
    fields.append(f"Content-Length: {len(body)}")
    if method == "HEAD":  # whose answers have a length and no body
        method = "GET"
    return Request(framed(f"{method} {path}{tail}", fields, body, host=host), whole=True)


def changed(chance: random.Random) -> Request:
    """Return a good request with some of its bytes changed, taken away or doubled."""
    data = bytearray(bodies(chance).data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(data) or 1)
        piece = bytes(chance.choices(b"\0\r\n\t :;,/%\x7f\xff0aZ", k=chance.randrange(4)))
        data[at : at + chance.choice((0, 1, 1, 5))] = piece
    return Request(bytes(data), whole=False)


KINDS = (bodies, bodies, heads, changed)
