"""One attempt against real receivers, the friendly and the hostile."""

import asyncio
import gzip
import re
import socket
import ssl
import struct
import threading
import time
from asyncio import sslproto
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path

import pytest
import trustme
import uvloop

import relay
from relay.egress import Policy
from relay.lookup import Names
from relay.model import Endpoint, Message, Outcome, Secret
from relay.sender import Sender, open_sender
from relay.signing import socialsyncer, standard
from tests.receiver import Answer, Receiver, server_ssl

Act = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
LOOPBACK = Policy(allow_private=(ip_network("127.0.0.0/8"), ip_network("::1/128")))
OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
MESSAGE = Message(
    id="evt_1",
    type="post.published",
    body=b'{"event":"post.published"}',
    content_type="application/json",
    attempt=3,
    timestamp=1_768_471_200,
    headers=(("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),),
)


def endpoint(url: str, *, timeout_seconds: float = 5.0, **settings: object) -> Endpoint:
    defaults = {"id": "main", "events": ("*",), "sign": (), "retry_schedule": (), "concurrency": 1}
    return Endpoint(url=url, timeout_seconds=timeout_seconds, **(defaults | settings))


class Hostile:
    """A server that lets one function have each connection; counts the connections."""

    def __init__(self, act: Act, *, context: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.port = 0
        self.connections = 0
        self.quiet = asyncio.Event()  # every connection there was is over
        self._act = act
        self._context = context
        self._host = host
        self._open: set[asyncio.Task[None] | None] = set()

    @property
    def url(self) -> str:
        scheme = "http" if self._context is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}/"

    async def __aenter__(self) -> "Hostile":
        self._server = await asyncio.start_server(self._take, self._host, 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._open:
            task.cancel()
        if self._open:
            await self.quiet.wait()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._open.add(task)
        self.connections += 1
        self.quiet.clear()
        try:
            await self._act(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._open.discard(task)
            if not self._open:
                self.quiet.set()


class Flood:
    """A server on a thread that answers one request for as long as anybody listens, deaf to all good-byes."""

    def __init__(self, head: bytes, piece: bytes) -> None:
        self.sent = 0
        self.goes_on = threading.Event()  # after the head
        self.goes_on.set()
        self._answer = (head, piece)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Flood":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    async def is_over(self, *, within: float) -> bool:
        await asyncio.to_thread(self._thread.join, within)
        return not self._thread.is_alive()

    def _run(self) -> None:
        head, piece = self._answer
        connection, _ = self._listener.accept()
        connection.settimeout(5)
        with server_ssl("127.0.0.1", Receiver.authority).wrap_socket(connection, server_side=True) as tls:
            while not tls.recv(65536).endswith(MESSAGE.body):
                pass
            tls.sendall(head)
            self.goes_on.wait(5)
            until = time.monotonic() + 5
            while time.monotonic() < until:
                try:
                    tls.sendall(piece)
                except OSError:
                    return
                self.sent += len(piece)


async def read_request(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n" + MESSAGE.body)


def saying(data: bytes) -> Act:
    """Answer every request on a connection with these bytes, and keep it open."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(data)

    return act


def saying_then_closing(data: bytes) -> Act:
    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)

    return act


def saying_then_resetting(data: bytes) -> Act:
    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)
        reset_at_close(writer)
        writer.transport.abort()

    return act


def reset_at_close(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


async def staying_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)


@asynccontextmanager
async def sender_to_loopback(policy: Policy = LOOPBACK, **settings: object) -> AsyncIterator[Sender]:
    trusting = ssl.create_default_context()
    Receiver.authority.configure_trust(trusting)
    async with open_sender(policy=policy, version="1.2.3", ssl_context=trusting, **settings) as sender:
        yield sender


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    async with sender_to_loopback() as sender:
        yield sender


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def hostile() -> AsyncIterator[Callable[[Act], Awaitable[Hostile]]]:
    async with AsyncExitStack() as servers:

        async def start(act: Act, context: ssl.SSLContext | None = None) -> Hostile:
            context = context or server_ssl("127.0.0.1", Receiver.authority)
            return await servers.enter_async_context(Hostile(act, context=context))

        yield start


def names_of(answers: Mapping[str, Sequence[str]]) -> Names:
    return Names(answers.__getitem__)


# What is sent


async def test_a_request_carries_the_body_and_every_header_of_the_contract(sender, receiver):
    """Receivers verify these bytes and these names; one changed byte breaks all of them."""
    secret = [Secret("whsec_c2VjcmV0")]
    headers = (("Authorization", Secret("Bearer abc")), ("X-Team", Secret("news")))
    to = endpoint(
        receiver.url + "?a=%41&b=c/d", sign=(standard(secret), socialsyncer(secret)), headers=headers
    )

    outcome = await sender.send(to, MESSAGE)
    (request,) = receiver.requests

    assert outcome == Outcome(milliseconds=outcome.milliseconds, status=200)
    assert (request.method, request.path, request.body) == ("POST", "/hook?a=%41&b=c/d", MESSAGE.body)
    signatures = dict(standard(secret)(MESSAGE)) | dict(socialsyncer(secret)(MESSAGE))
    assert dict(request.headers) == {
        "Host": f"127.0.0.1:{receiver.port}",
        "User-Agent": "relay/1.2.3",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "Content-Length": str(len(MESSAGE.body)),
        "webhook-id": "evt_1",
        "webhook-timestamp": "1768471200",
        "webhook-attempt": "3",
        "traceparent": MESSAGE.headers[0][1],
        **signatures,
        "Authorization": "Bearer abc",
        "X-Team": "news",
    }


async def test_a_changed_endpoint_is_followed_at_once(sender, receiver):
    """A rotated secret or a corrected URL must not wait for a restart."""
    await sender.send(endpoint(receiver.url, headers=(("X-Version", Secret("old")),)), MESSAGE)
    await sender.send(endpoint(receiver.url + "2", headers=(("X-Version", Secret("new")),)), MESSAGE)

    assert [(r.path, r.headers["X-Version"]) for r in receiver.requests] == [
        ("/hook", "old"),
        ("/hook2", "new"),
    ]


async def test_a_connection_whose_answer_is_complete_serves_the_next_attempt(sender, hostile):
    """A handshake for every event would cost more than the event."""
    server = await hostile(saying(OK + b"Content-Length: 5\r\n\r\nhello"))
    to = endpoint(server.url)

    assert [(await sender.send(to, MESSAGE)).answer for _ in range(3)] == ["hello"] * 3
    assert server.connections == 1


async def test_no_cookie_is_kept(sender, receiver):
    """A receiver has no session with the relay, and must not get one."""
    receiver.answers(Answer(200, {"Set-Cookie": "a=b; Path=/"}))

    await sender.send(endpoint(receiver.url), MESSAGE)
    await sender.send(endpoint(receiver.url), MESSAGE)

    assert ["Cookie" in request.headers for request in receiver.requests] == [False, False]


async def test_the_proxy_of_the_environment_is_ignored(sender, receiver, monkeypatch):
    """A proxy resolves names anew, so one that nobody configured would go around the guard."""
    async with Receiver(tls=False) as proxy:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)

        outcome = await sender.send(endpoint(receiver.url), MESSAGE)

    assert (outcome.reason, len(receiver.requests), proxy.requests) == (None, 1, [])


# What the status says


@pytest.mark.parametrize("status", [200, 201, 204, 299])
async def test_any_2xx_is_success(sender, receiver, status):
    """A receiver that took the event must not get it again because it said 204."""
    receiver.answers(status)

    outcome = await sender.send(endpoint(receiver.url), MESSAGE)

    assert (outcome.status, outcome.reason) == (status, None)


@pytest.mark.parametrize("status", [300, 304, 400, 401, 404, 410, 429, 500, 503, 600, 999])
async def test_any_other_status_is_a_failure_under_its_number(sender, hostile, status):
    """Only 2xx means that the receiver has it."""
    server = await hostile(saying(b"HTTP/1.1 %d X\r\n" % status + EMPTY))

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert (outcome.status, outcome.reason) == (status, f"http_{status}")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_refused_and_its_target_left_alone(sender, receiver, status):
    """Where an event goes is the operator's decision, not the receiver's."""
    async with Receiver() as other:
        receiver.answers(Answer(status, {"Location": other.url}))

        outcome = await sender.send(endpoint(receiver.url), MESSAGE)

    assert (outcome.status, outcome.reason) == (status, "redirect_refused")
    assert other.requests == []


@pytest.mark.parametrize(
    "early", [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"]
)
async def test_an_interim_answer_is_not_the_answer(sender, hostile, early):
    """100 and 103 only announce the status that counts."""
    server = await hostile(saying(early + OK + EMPTY))

    assert (await sender.send(endpoint(server.url), MESSAGE)).status == 200


async def test_switching_protocols_is_a_failure_and_ends_the_connection(sender, hostile):
    """After 101 the connection no longer speaks HTTP, so nothing may be sent on it."""
    server = await hostile(saying(b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"))

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert (outcome.status, outcome.reason) == (101, "http_101")
    await within(1, server.quiet.wait())


@pytest.mark.parametrize(
    ("header", "kept"), [("120", "120"), ("Wed, 21 Oct 2026 07:28:00 GMT",) * 2, ("9" * 500, "9" * 128)]
)
async def test_retry_after_is_handed_on_as_written(sender, receiver, header, kept):
    """What it means is a rule of `retry`; an endless one must not fill the log."""
    receiver.answers(Answer(503, {"Retry-After": header}))

    assert (await sender.send(endpoint(receiver.url), MESSAGE)).retry_after == kept


# What the body may do


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 16 * 1024])
async def test_the_first_kibibyte_of_the_answer_is_kept(sender, hostile, size):
    """It tells an operator what a receiver disliked; more would only fill the outbox."""
    server = await hostile(saying(b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size))

    for _ in range(2):
        outcome = await sender.send(endpoint(server.url), MESSAGE)

        assert outcome.answer == ("x" * min(size, 1024) or None)
    assert server.connections == 1


async def test_an_answer_that_is_not_text_is_kept_readable(sender, receiver):
    """The answer is shown in JSON and on the page, which hold text only."""
    receiver.answers(Answer(500, body=b"a\xff\xfeb"))

    assert (
        await sender.send(endpoint(receiver.url), MESSAGE)
    ).answer == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("ending", [saying_then_closing, saying_then_resetting])
@pytest.mark.parametrize(
    "rest", [b"Content-Length: 100\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"]
)
async def test_a_complete_head_counts_though_the_body_breaks_off(sender, hostile, ending, rest):
    """The receiver said 2xx: sending again would make a second event of it."""
    server = await hostile(ending(OK + rest))

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert (outcome.status, outcome.reason, outcome.answer) == (200, None, "hello")


@pytest.mark.parametrize("body", [b"zz\r\nhello", b"0\r\n" + b"A: b\r\n" * 1000], ids=["chunk", "trailer"])
async def test_a_complete_head_counts_though_nonsense_follows_at_once(sender, hostile, body):
    """Also when both come in one packet, which is how answers mostly come."""
    server = await hostile(saying(OK + b"Transfer-Encoding: chunked\r\n\r\n" + body))

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert (outcome.status, outcome.reason) == (200, None)
    await within(1, server.quiet.wait())


async def test_a_dripping_body_holds_the_slot_for_a_second_at_most(sender, hostile):
    """A receiver could otherwise keep every slot of its endpoint for the whole time-out."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + b"Content-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.05)

    server = await hostile(drip)

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert (outcome.status, outcome.reason) == (200, None)
    assert set(outcome.answer) == {"a"}
    assert 900 <= outcome.milliseconds < 2000
    await within(1, server.quiet.wait())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("head", "piece", "status"),
    [
        (OK + b"Content-Length: 1000000000000\r\n\r\n", b"a" * 65536, 200),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"a" * 65536 + b"\r\n", 200),
        (OK + b"\r\n", b"a" * 65536, 200),
        (b"HTTP/1.1 500 X\r\nContent-Length: 1000000000000\r\n\r\n", b"a" * 65536, 500),
        (OK, b"X-A: b\r\n" * 100, None),
        (OK, b"a" * 65536, None),
    ],
    ids=["length", "chunked", "to the end", "of a failure", "headers", "one header"],
)
def test_an_endless_answer_is_cut_off(loop, head, piece, status):
    """After a mere close the other side could go on sending, with uvloop 733 MiB of it."""

    async def scenario() -> tuple[Outcome, bool]:
        async with sender_to_loopback() as sender:
            outcome = await sender.send(endpoint(flood.url), MESSAGE)
            return outcome, await flood.is_over(within=1)

    with Flood(head, piece) as flood, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        outcome, is_over = runner.run(scenario())

    assert outcome.status == status
    assert outcome.reason == {200: None, 500: "http_500", None: "protocol_error"}[status]
    assert status is None or outcome.answer == "a" * 1024
    assert is_over
    assert flood.sent < 16 * 1024 * 1024  # what the buffers on the way hold


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("head", "piece", "status"),
    [(b"", b"HTTP/1.1 103 X\r\n\r\n" * 50, None), (OK + EMPTY, (OK + EMPTY) * 50, 200)],
    ids=["interim", "unasked"],
)
def test_an_endless_row_of_answers_is_cut_off(loop, head, piece, status):
    """Reading them as fast as they come, and keeping them, would be all that the relay still does."""

    async def scenario() -> tuple[Outcome, bool]:
        async with sender_to_loopback() as sender:
            outcome = await sender.send(endpoint(flood.url), MESSAGE)
            return outcome, await flood.is_over(within=1)

    with Flood(head, piece) as flood, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        outcome, is_over = runner.run(scenario())

    assert (outcome.status, outcome.reason) == (status, None if status else "protocol_error")
    assert is_over
    assert flood.sent < 16 * 1024 * 1024


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("piece", [(OK + EMPTY) * 50, b"junk" * 50], ids=["answers", "junk"])
def test_an_idle_connection_that_begins_to_talk_is_cut_off(loop, piece):
    """A pooled connection has no deadline, so nothing else would ever stop it."""

    async def scenario() -> tuple[Outcome, bool]:
        async with sender_to_loopback() as sender:
            outcome = await sender.send(endpoint(flood.url), MESSAGE)
            flood.goes_on.set()
            return outcome, await flood.is_over(within=1)

    with Flood(OK + EMPTY, piece) as flood, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        flood.goes_on.clear()
        outcome, is_over = runner.run(scenario())

    assert (outcome.reason, is_over) == (None, True)
    assert flood.sent < 16 * 1024 * 1024


async def test_a_drip_of_interim_answers_ends_with_the_time_out(sender, hostile):
    """Each looks like the beginning of an answer, and none ever is one."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        while True:
            writer.write(b"HTTP/1.1 103 X\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    server = await hostile(drip)

    outcome = await sender.send(endpoint(server.url, timeout_seconds=0.3), MESSAGE)

    assert (outcome.status, outcome.reason) == (None, "timeout")
    await within(1, server.quiet.wait())


async def test_a_gzip_bomb_stays_packed(sender, receiver):
    """100 KiB can unpack to 100 MiB, and nobody reads an answer that closely."""
    bomb = gzip.compress(bytes(10 * 1024 * 1024))
    receiver.answers(Answer(200, {"Content-Encoding": "gzip"}, bomb))

    outcome = await sender.send(endpoint(receiver.url), MESSAGE)

    assert outcome.reason is None
    assert outcome.answer == bomb[:1024].decode(errors="replace")


async def test_what_follows_a_complete_answer_is_nobodys_answer(sender, hostile):
    """A receiver must not prepare the answer to a request that was not yet sent."""
    server = await hostile(saying(OK + EMPTY + b"HTTP/1.1 204 X\r\n\r\n"))

    assert [(await sender.send(endpoint(server.url), MESSAGE)).status for _ in range(2)] == [200, 200]
    assert server.connections == 2


@pytest.mark.filterwarnings("ignore:Sending a large body")
async def test_an_answer_may_come_before_the_whole_body_was_sent(sender, hostile):
    """The head decides; what is left of the body does not get mixed up with the next request."""
    big = Message(id="evt_2", type="a", body=bytes(8 << 20), content_type="a/b", attempt=1, timestamp=1)
    whole = asyncio.Event()

    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + EMPTY)
        await reader.readexactly(len(big.body))
        whole.set()
        await saying(OK + EMPTY)(reader, writer)

    server = await hostile(hasty)

    early = await sender.send(endpoint(server.url), big)
    answered_early = not whole.is_set()
    again = await sender.send(endpoint(server.url), MESSAGE)

    assert (early.status, answered_early, again.status) == (200, True, 200)


# What a failure is called


HEADLESS = {
    "closed at once": (saying_then_closing(b""), "conn_closed"),
    "closed in the status line": (saying_then_closing(b"HTTP/1.1 20"), "conn_closed"),
    "closed in a header": (saying_then_closing(OK + b"Content-Le"), "conn_closed"),
    "reset at once": (saying_then_resetting(b""), "conn_reset"),
    "reset in the status line": (saying_then_resetting(b"HTTP/1.1 20"), "conn_reset"),
    "another protocol": (saying(b"SSH-2.0-OpenSSH_9.2\r\n"), "protocol_error"),
    "a status of four digits": (saying(b"HTTP/1.1 1000 X\r\n" + EMPTY), "protocol_error"),
    "two lengths": (saying(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"), "protocol_error"),
    "a header too long": (saying(OK + b"X-Long: " + b"a" * 10_000 + b"\r\n\r\n"), "protocol_error"),
    "HTTP/2": (saying(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"), "protocol_error"),
    "never reads": (staying_silent, "timeout"),
    "silence": (saying(b""), "timeout"),
    "half a head": (saying(OK + b"Content-Le"), "timeout"),
}


@pytest.mark.parametrize("answer", HEADLESS)
async def test_an_answer_without_a_complete_head_is_a_named_failure(sender, hostile, answer):
    """Whether the event arrived is unknown, so it is sent again under the same id."""
    act, reason = HEADLESS[answer]
    server = await hostile(act)

    outcome = await sender.send(endpoint(server.url + "?key=canary", timeout_seconds=0.4), MESSAGE)

    assert (outcome.status, outcome.reason, outcome.answer) == (None, reason, None)
    assert "canary" not in str(outcome)
    assert outcome.milliseconds >= 390 if reason == "timeout" else outcome.milliseconds < 390


async def test_a_port_where_nobody_listens_is_refused(sender):
    """The receiver's program is down, its machine is not."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        outcome = await sender.send(endpoint(f"https://127.0.0.1:{unused.getsockname()[1]}/"), MESSAGE)

    assert (outcome.reason, outcome.status) == ("conn_refused", None)


async def test_a_network_without_a_route_is_unreachable(sender):
    """It is another trouble than a closed port: it lies between the two, or on this side."""
    outcome = await sender.send(
        endpoint("https://127.255.255.255/"), MESSAGE
    )  # broadcast takes no connection

    assert (outcome.reason, outcome.status) == ("unreachable", None)


@pytest.mark.parametrize("trouble", ["expired", "another host", "unknown authority"])
async def test_a_certificate_that_does_not_hold_is_refused(sender, hostile, trouble):
    """Whoever answers there may not be who the operator meant."""
    issuer = trustme.CA() if trouble == "unknown authority" else Receiver.authority
    host = "other.example" if trouble == "another host" else "127.0.0.1"
    ended = datetime(2020, 1, 1, tzinfo=UTC) if trouble == "expired" else None
    server = await hostile(staying_silent, certified(issuer, host, ended))

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert (outcome.reason, outcome.status) == ("tls_cert", None)
    assert "certificate" in outcome.detail


async def test_a_receiver_without_tls_is_a_tls_error(sender):
    """https means that nothing was sent before the other side proved who it is."""
    async with Receiver(tls=False) as plain:
        outcome = await sender.send(endpoint(plain.url.replace("http:", "https:")), MESSAGE)

    assert (outcome.reason, plain.requests) == ("tls_error", [])


async def test_a_receiver_that_speaks_only_old_tls_gets_nothing(sender, hostile):
    """TLS 1.1 is broken; what it protects is not protected."""
    old = server_ssl("127.0.0.1", Receiver.authority)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
    server = await hostile(staying_silent, old)

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert outcome.reason in {"tls_error", "conn_reset"}
    assert server.connections == 0


async def test_a_receiver_that_wants_a_client_certificate_is_a_failure(sender, hostile):
    """In TLS 1.3 it says so only after the handshake; it must not look like success or end the lane."""
    demanding = server_ssl("127.0.0.1", Receiver.authority)
    demanding.verify_mode = ssl.CERT_REQUIRED
    Receiver.authority.configure_trust(demanding)
    server = await hostile(staying_silent, demanding)

    outcome = await sender.send(endpoint(server.url), MESSAGE)

    assert outcome.reason in {"tls_error", "conn_closed", "conn_reset"}


async def test_a_handshake_that_hangs_is_a_connect_time_out(sender):
    """Nothing was sent, so this attempt is not an ambiguous one."""
    async with Hostile(staying_silent) as server:
        outcome = await sender.send(
            endpoint(server.url.replace("http:", "https:"), timeout_seconds=0.6), MESSAGE
        )

    assert outcome.reason == "connect_timeout"
    assert 500 <= outcome.milliseconds < 2000


async def test_a_look_up_that_hangs_is_a_connect_time_out_of_its_own_endpoint(receiver):
    """A dead name server must not delay receivers whose names it does not know."""

    over = threading.Event()
    hang = Names(lambda host: [host] if over.wait(15) else [])

    async with sender_to_loopback(names=hang) as sender, asyncio.TaskGroup() as tasks:
        to = endpoint("https://slow.example/", id="slow", timeout_seconds=3)
        attempt = tasks.create_task(sender.send(to, MESSAGE))
        other = await sender.send(endpoint(receiver.url), MESSAGE)
        other_was_first = not attempt.done()

    over.set()
    assert (attempt.result().reason, other.reason) == ("connect_timeout", None)
    assert not attempt.result().unspent
    assert other_was_first


@pytest.mark.parametrize("answers", [[], None])
async def test_a_name_without_an_address_is_a_dns_error(answers):
    """A name that is gone for a moment comes back; the event waits for it."""

    def ask(host: str) -> Sequence[str]:
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answers

    async with sender_to_loopback(names=Names(ask)) as sender:
        outcome = await sender.send(endpoint("https://gone.example/"), MESSAGE)

    assert (outcome.reason, outcome.status) == ("dns_error", None)


async def test_a_name_is_looked_up_by_the_system(sender):
    """What /etc/hosts says holds for the relay too, and a name under .invalid never exists."""
    async with Receiver(host="localhost") as receiver:
        found = await sender.send(endpoint(receiver.url), MESSAGE)
    missing = await sender.send(endpoint("https://no-such-name.invalid/"), MESSAGE)

    assert (found.reason, missing.reason) == (None, "dns_error")


async def test_a_fault_of_our_own_is_an_outcome_and_a_trace_in_the_log(sender, receiver, caplog):
    """One broken signer must not end the lane that brings all other events."""

    def broken(message: Message) -> tuple[tuple[str, str], ...]:
        raise ZeroDivisionError

    outcome = await sender.send(endpoint(receiver.url, sign=(broken,)), MESSAGE)

    assert (outcome.reason, outcome.detail) == ("internal_error", "ZeroDivisionError")
    assert [(record.message, record.levelname) for record in caplog.records] == [("attempt_broke", "ERROR")]
    assert receiver.requests == []


@pytest.mark.parametrize("data", [b"", OK + b"Content-Length: 100\r\n\r\n"], ids=["head", "body"])
async def test_a_cancelled_attempt_ends_its_connection(sender, hostile, data):
    """What was cut off by a stop is no outcome, and nobody may read its answer as another's."""
    asked = asyncio.Event()

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)
        asked.set()
        await reader.read(-1)

    server = await hostile(act)
    async with asyncio.TaskGroup() as tasks:
        attempt = tasks.create_task(sender.send(endpoint(server.url), MESSAGE))
        await within(2, asked.wait())
        attempt.cancel()

    assert attempt.cancelled()
    await within(1, server.quiet.wait())


# What is never dialled


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "10.0.0.1",
        "169.254.169.254",
        "[fe80::1]",
        "[::ffff:7f00:1]",
        "0.0.0.0",  # noqa: S104 - dialled in vain, never bound
        "[64:ff9b::1]",
    ],
)
async def test_a_forbidden_literal_is_not_dialled(host):
    """Literals are never looked up, so a guard in the resolver alone would not see them."""
    async with sender_to_loopback(Policy()) as sender:
        outcome = await sender.send(endpoint(f"https://{host}/"), MESSAGE)

    assert (outcome.reason, outcome.status, outcome.answer) == ("blocked_address", None, None)
    assert outcome.detail is not None


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"],
        ["127.0.0.1", "10.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["127.0.0.1", "8.8.8.8"],
        ["8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "169.254.169.254"],
        ["fe80::1%eth0"],
        ["127.1"],
        ["x"],
    ],
)
async def test_one_forbidden_address_refuses_the_whole_name(receiver, answers):
    """Whoever gave that answer wanted us to try it; the others are no excuse."""
    async with sender_to_loopback(Policy(), names=names_of({"evil.example": answers})) as sender:
        outcome = await sender.send(endpoint(f"https://evil.example:{receiver.port}/"), MESSAGE)

    assert (outcome.reason, outcome.status) == ("blocked_address", None)


async def test_everyone_who_waits_for_a_forbidden_name_is_refused_alike():
    """Attempts of one moment share a look-up, but only one of them asked for it."""
    asked = threading.Event()
    waiting = 0

    def ask(host: str) -> Sequence[str]:
        nonlocal waiting
        waiting += 1
        asked.wait(5)
        return ["10.0.0.1"]

    async with sender_to_loopback(Policy(), names=Names(ask)) as sender, asyncio.TaskGroup() as tasks:
        attempts = [
            tasks.create_task(sender.send(endpoint("https://evil.example/"), MESSAGE)) for _ in range(5)
        ]
        for _ in range(5):
            await asyncio.sleep(0)
        asked.set()

    assert [attempt.result().reason for attempt in attempts] == ["blocked_address"] * 5
    assert waiting == 1


async def test_a_name_that_turns_to_a_forbidden_address_is_refused(receiver):
    """DNS rebinding: the name was fine when it was registered, and at the last attempt."""
    answers = {"turning.example": ["127.0.0.1"]}
    receiver_of_name = server_ssl("turning.example", Receiver.authority)
    allowed = Policy(allow_private=(ip_network("127.0.0.1/32"),))
    closing = saying_then_closing(OK + b"Connection: close\r\n" + EMPTY)
    async with (
        Hostile(closing, context=receiver_of_name) as server,
        sender_to_loopback(allowed, names=names_of(answers)) as sender,
    ):
        to = endpoint(server.url.replace("127.0.0.1", "turning.example"))
        first = await sender.send(to, MESSAGE)
        answers["turning.example"] = ["127.0.0.2"]
        forget_names(sender)
        second = await sender.send(to, MESSAGE)

        assert (first.reason, second.reason) == (None, "blocked_address")
        assert server.connections == 1


async def test_a_dial_is_judged_although_the_name_was_judged_before(hostile):
    """The look-up is remembered for seconds; what holds is what is true when the connection is made."""
    server = await hostile(saying_then_closing(OK + b"Connection: close\r\n" + EMPTY))
    async with sender_to_loopback() as sender:
        first = await sender.send(endpoint(server.url), MESSAGE)
        sender.own_addresses = frozenset({("127.0.0.1", server.port)})
        second = await sender.send(endpoint(server.url), MESSAGE)

    assert (first.reason, second.reason) == (None, "blocked_address")
    assert server.connections == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:7f00:1]", "localhost"])
@pytest.mark.parametrize("listening", ["127.0.0.1", "0.0.0.0", "::"])  # noqa: S104 - what a config may say
async def test_the_relays_own_listener_is_never_an_endpoint(receiver, host, listening):
    """An event that comes in by the door it went out of goes round for ever."""
    own = frozenset({(listening, receiver.port)})
    names = names_of({"localhost": ["127.0.0.1"]})
    async with sender_to_loopback(own_addresses=own, names=names) as sender:
        outcome = await sender.send(endpoint(f"https://{host}:{receiver.port}/"), MESSAGE)

    assert (outcome.reason, receiver.requests) == ("blocked_address", [])


async def test_endpoints_of_the_api_never_use_a_connection_that_the_config_opened(receiver):
    """A pooled connection is not dialled again, so it must not be shared across rights."""
    async with sender_to_loopback() as sender:
        of_config = await sender.send(endpoint(receiver.url, id="a"), MESSAGE)
        of_api = await sender.send(endpoint(receiver.url, id="b", source="api"), MESSAGE)

    assert (of_config.reason, of_api.reason, len(receiver.requests)) == (None, "blocked_address", 1)


async def test_the_config_may_open_its_ranges_to_endpoints_of_the_api(receiver):
    """Some relays serve one team, whose endpoints are all internal."""
    policy = Policy(allow_private=LOOPBACK.allow_private, allow_private_for_api=True)
    async with sender_to_loopback(policy) as sender:
        outcome = await sender.send(endpoint(receiver.url, source="api"), MESSAGE)

    assert outcome.reason is None


@pytest.mark.parametrize(
    ("policy", "source", "reason"),
    [
        (Policy(allow_http=True), "config", None),
        (Policy(allow_http=True), "api", "blocked_address"),
        (LOOPBACK, "config", "blocked_address"),
    ],
)
async def test_http_goes_to_this_machine_and_only_when_the_config_says_so(policy, source, reason):
    """It is for trying things out; an endpoint registered by someone else is not trying things out."""
    async with Receiver(tls=False) as plain, sender_to_loopback(policy) as sender:
        outcome = await sender.send(endpoint(plain.url, source=source), MESSAGE)

    assert outcome.reason == reason
    assert len(plain.requests) == (reason is None)


@pytest.mark.parametrize("address", ["10.0.0.1", "8.8.8.8"])
async def test_http_to_localhost_stays_on_this_machine(address):
    """localhost is a name like any other, and a name can point anywhere."""
    policy = Policy(allow_http=True, allow_private=(ip_network("10.0.0.0/8"),))
    async with sender_to_loopback(policy, names=names_of({"localhost": [address]})) as sender:
        outcome = await sender.send(endpoint("http://localhost:9/", timeout_seconds=0.3), MESSAGE)

    assert outcome.reason == "blocked_address"


async def test_of_a_name_with_many_addresses_four_are_tried():
    """A name of 60 dead addresses would otherwise be 60 connects an attempt."""
    addresses = [f"127.0.1.{last}" for last in range(1, 61)]
    dialled: set[str] = set()

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.add(writer.get_extra_info("sockname")[0])

    everywhere = Hostile(note, host="0.0.0.0")  # noqa: S104 - to see which of its addresses was dialled
    async with (
        everywhere as server,
        sender_to_loopback(names=names_of({"many.example": addresses})) as sender,
    ):
        outcome = await sender.send(endpoint(f"https://many.example:{server.port}/"), MESSAGE)

    assert outcome.reason == "conn_reset"
    assert dialled == set(addresses[:4])


# How it is built


def test_only_one_place_builds_a_session():
    """Every way out must pass the guard; a second session would be a second way."""
    sources = [path.read_text() for path in Path(relay.__file__).parent.rglob("*.py")]

    assert len(re.findall(r"\bClientSession\(", "".join(sources))) == 1


async def test_a_tls_connection_keeps_a_small_read_buffer(sender, receiver):
    """asyncio would keep 256 KiB for each, which is most of what an idle relay with many endpoints weighs."""
    await sender.send(endpoint(receiver.url), MESSAGE)

    (connections,) = sender._connections.values()
    ((connection, _),) = next(iter(connections.session.connector._conns.values()))
    assert sslproto.SSLProtocol.max_size == 32 * 1024
    assert len(connection.transport._ssl_protocol._ssl_buffer) == 32 * 1024


async def within(seconds: float, what: Awaitable[object]) -> None:
    async with asyncio.timeout(seconds):
        await what


def certified(issuer: trustme.CA, host: str, ended: datetime | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issuer.issue_cert(host, not_after=ended).configure_cert(context)
    return context


def forget_names(sender: Sender) -> None:
    """Let the names that were looked up expire."""
    sender._names.forget()
