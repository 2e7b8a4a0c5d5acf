"""Answers of receivers: whatever the bytes, an attempt ends in time with a name of the contract for it."""

import asyncio
import re
from contextlib import suppress
from random import Random

from relay.egress import Policy
from relay.model import Outcome
from tests.fuzz.damage import Budget, Tally, spliced
from tests.hostile import loopback_sender, message, to

HEAD = "HTTP/1.1 200 OK\r\n"
ANSWERS = [
    HEAD + "Content-Length: 0\r\n\r\n",
    HEAD + "Content-Length: 5\r\n\r\nhello",
    HEAD + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    HEAD + "Transfer-Encoding: chunked\r\nTrailer: A\r\n\r\n1;x=y\r\na\r\n0\r\nA: b\r\n\r\n",
    HEAD + "Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00",
    HEAD + "Connection: close\r\n\r\nuntil the end",
    "HTTP/1.0 204 No Content\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n" + HEAD + "Content-Length: 0\r\n\r\n",
    "HTTP/1.1 103 X\r\nLink: </a>\r\n\r\nHTTP/1.1 503 X\r\nRetry-After: 120\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\x81\x05hello",
    "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 429 X\r\nRetry-After: 99999999999999999999\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2 200\r\n\r\n",
    "\x00\x00\x12\x04\x00",
]
TOKENS = [
    "\r\n", "\r", "\n", "\r\n\r\n", ":", " ", "\t", "\x00", "\x7f", "\xff", ",", ";", "0", "-1",
    "ffffffffffffffff", "HTTP/1.1 ", "Content-Length: 18446744073709551616\r\n",
    "Transfer-Encoding: chunked\r\n", "X: " + "a" * 9000, "Content-Length: 1\r\n",
    "Set-Cookie: a=b; Domain=.\r\n", "Retry-After: \r\n", "Connection: keep-alive, close\r\n",
    "Content-Type: text/html; charset=\x00\r\n", "Content-Encoding: br, gzip, deflate\r\n", "1" * 20,
    "0\r\n\r\n",
]  # fmt: skip
AT_ONCE = 32
TIMEOUT_SECONDS = 0.25
REASONS = re.compile(
    r"http_\d{3}|timeout|conn_reset|conn_closed|protocol_error|redirect_refused|connect_timeout"
)


def run(*, seed: int, count: int | None = None, seconds: float | None = None) -> Tally:
    """Send from and to this process, so many times or as long as there is time."""
    return asyncio.run(exchange(Random(seed), Budget(count, seconds)))


async def exchange(chance: Random, budget: Budget) -> Tally:
    """Answer a real sender's requests with damaged answers; some connections then just stay."""
    tally = Tally()
    said: dict[int, bytes] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            given = said.get(int(head.split(b"/", 2)[1].split()[0]), b"")  # late: nobody waits any more
            writer.write(given)
            await writer.drain()
            if len(given) % 16 == 0:
                async with asyncio.timeout(2 * TIMEOUT_SECONDS):
                    await reader.read(-1)
        writer.transport.abort() if len(said) % 2 else writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    numbers = iter(budget)
    async with server, loopback_sender(Policy(allow_http=True)) as sender:

        async def attempts() -> None:
            for number in numbers:
                said[number] = spliced(chance, ANSWERS, TOKENS).encode("latin-1", "replace")
                endpoint = to(f"{base}/{number}", id=f"{number % 100}", timeout_seconds=TIMEOUT_SECONDS)
                outcome = await sender.send(endpoint, message())
                tally.note(said.pop(number), wrong(outcome))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(attempts())
    return tally


def wrong(outcome: Outcome) -> str | None:
    """Say what is wrong with an outcome."""
    success = outcome.reason is None
    verdicts = {
        "is no attempt": not outcome.unspent,
        "is a success without an answer that says so": not success or 200 <= (outcome.status or 0) <= 299,
        f"is named {outcome.reason}": success or REASONS.fullmatch(str(outcome.reason)) is not None,
        "keeps more than it may": len(outcome.answer or "") <= 1024 and len(outcome.retry_after or "") <= 128,
        "took too long": outcome.milliseconds < 10_000,
    }
    return next((problem for problem, holds in verdicts.items() if not holds), None)
