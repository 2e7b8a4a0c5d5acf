"""Receivers that misbehave, all of them: each gets its named outcome, and none gets more than that."""

import asyncio
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from tests.figures import figure
from tests.hostile import SET, HostileReceiver, loopback_sender, message, right, to, try_all
from tests.receiver import Receiver, server_ssl

ROOT = Path(__file__).parent.parent


@pytest.fixture
async def receiver() -> AsyncIterator[HostileReceiver]:
    async with HostileReceiver() as receiver:
        yield receiver


async def test_every_misbehaviour_has_the_outcome_of_the_contract(receiver):
    """What a failure is called decides what people look for; what counts as success is never sent again."""
    async with loopback_sender() as sender:
        outcomes = await try_all(receiver.url(""), sender, timeout_seconds=2.0)
        for path, outcome in outcomes.items():
            if not right(path, outcome):  # all at once may be too much for a busy machine, never each alone
                alone = await try_all(receiver.url(""), sender, timeout_seconds=5.0, paths=[path])
                outcomes |= alone
        wrong = {path: outcome for path, outcome in outcomes.items() if not right(path, outcome)}
        figure("hostile answers right / all", f"{len(SET) - len(wrong)} / {len(SET)}")
        figure(
            "slowest hostile attempt at a 2 s time-out (ms)", max(o.milliseconds for o in outcomes.values())
        )

        assert wrong == {}
        assert max(outcome.milliseconds for outcome in outcomes.values()) < 10_000
    await receiver.quiet()


async def test_after_every_misbehaviour_the_next_attempt_is_like_any(receiver):
    """What a receiver leaves on a connection must not be taken for its next answer."""
    async with loopback_sender() as sender:
        for _ in range(2):
            await try_all(receiver.url(""), sender, timeout_seconds=0.5)
            outcome = await sender.send(to(receiver.url("/ok")), message())

            assert (outcome.status, outcome.reason, outcome.answer) == (200, None, None)


async def test_what_is_dropped_is_dropped_at_once(receiver):
    """A connection that would go on talking is aborted, whether or not its head was good."""
    talking = [path for path in SET if "endless" in path or "dripping" in path or path == "/answers-unasked"]
    async with loopback_sender() as sender:
        for path in talking:
            await sender.send(to(receiver.url(path), id=path, timeout_seconds=0.5), message())
        await receiver.quiet(within=2)

    assert len(talking) >= 12
    assert receiver.connections == len(talking)


async def test_no_state_is_kept_for_a_receiver(receiver):
    """Cookies, pinned schemes and other addresses are for browsers; here they would be a way to steer us."""
    async with loopback_sender() as sender:
        for path in ("/cookies", "/state-to-be-kept", "/redirect-308", "/cookies"):
            await sender.send(to(receiver.url(path)), message())

    assert [request.path for request in receiver.requests] == [
        "/cookies",
        "/state-to-be-kept",
        "/redirect-308",
        "/cookies",
    ]
    assert all("cookie" not in request.headers for request in receiver.requests)


async def test_the_whole_set_at_once_weighs_little(receiver, tmp_path):
    """A receiver that could fill the relay's memory would stop everybody's events."""
    Receiver.authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.weighing", receiver.url(""), tmp_path / "ca.pem", cwd=ROOT,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(110):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    idle, peak, wrong = map(int, said.split())
    figure("peak RSS over the hostile set, above idle (MiB)", (peak - idle) / 1024)

    assert process.returncode == 0
    assert wrong == 0
    assert peak - idle < 48 * 1024


async def test_a_request_is_never_silently_repeated():
    """A receiver that hangs up on a request may have taken it: that is an attempt, and so is the next."""
    asked: list[int] = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in (1, 2):
            await reader.readuntil(b"\r\n\r\n" + message().body)
            asked.append(number)
            if number == 1:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(once, "127.0.0.1", 0, ssl=server_ssl("127.0.0.1", Receiver.authority))
    async with server, loopback_sender() as sender:
        endpoint = to(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        outcomes = [await sender.send(endpoint, message()) for _ in range(4)]

    assert [outcome.reason for outcome in outcomes] == [None, "conn_closed", None, "conn_closed"]
    assert asked == [1, 2, 1, 2]


async def test_a_connection_closed_while_nobody_looked_is_no_failed_attempt(receiver):
    """Receivers close idle connections whenever they like; the next event goes over a new one."""
    async with loopback_sender() as sender:
        for _ in range(3):
            assert (await sender.send(to(receiver.url("/closes-afterwards")), message())).reason is None
            await receiver.quiet()

    assert (receiver.connections, len(receiver.requests)) == (3, 3)


async def test_two_hundred_failing_handshakes_leave_the_loop_free():
    """Certificates that all expire in one night must not delay those who are well."""
    untrusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(untrusted)
    lags: list[float] = []

    async def tick() -> None:
        while True:
            due = asyncio.get_running_loop().time() + 0.005
            await asyncio.sleep(0.005)
            lags.append(asyncio.get_running_loop().time() - due)

    async with (
        HostileReceiver(context=untrusted) as receiver,
        loopback_sender() as sender,
        asyncio.TaskGroup() as tasks,
    ):
        ticker = tasks.create_task(tick())
        url = receiver.url("/ok")
        attempts = [tasks.create_task(sender.send(to(url, id=str(each)), message())) for each in range(200)]
        await asyncio.wait(attempts, timeout=20)
        ticker.cancel()
    figure("loop lag p99 over 200 failing handshakes (ms)", sorted(lags)[int(len(lags) * 0.99)] * 1000)

    assert {attempt.result().reason for attempt in attempts} == {"tls_cert"}
    assert receiver.requests == []
