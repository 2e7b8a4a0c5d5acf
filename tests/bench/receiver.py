"""The receiver: an https server that answers 200 to every POST and knows which events it has seen.

Run with a certificate file and a secret, it prints its port. Each line on stdin is a number: once that many
distinct deliveries (a `webhook-id` at a path) have arrived since the start, it prints when the last one did.
The line `arrivals` asks when each came of those below `/timed`, by path and the event's own number, and
forgets them; `connections` asks how many are open. What goes to `/hang` is never answered, to `/slow` after
a second. Of one delivery in 64 the Standard Webhooks signature is checked. It ends when stdin does. It reads
just enough HTTP for well-behaved clients, because it must never be the bottleneck.
"""

import asyncio
import base64
import hashlib
import hmac
import socket
import ssl
import sys
import time
from typing import cast

from tests.bench.processes import new_loop, obey

CHECKED = 64  # one in so many
SLOW_SECONDS = 1.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"


class Arrivals:
    """Which events have come, when the latest new one did, and how many came again or badly signed."""

    def __init__(self, secret: str) -> None:
        self.last_at = 0.0
        self.repeats = self.forged = 0
        self.connections = 0
        self._key = base64.b64decode(secret.removeprefix("whsec_"))
        self.timed: list[tuple[int, float]] = []
        self._seen: set[bytes] = set()
        self._awaited = 0
        self._reached = asyncio.Event()

    def note(self, path: bytes, head: bytes, body: bytes) -> None:
        event_id = header(head, b"webhook-id")
        delivery = path + event_id
        if delivery in self._seen:
            self.repeats += 1
            return
        self._seen.add(delivery)
        self.last_at = time.monotonic()
        if len(self._seen) % CHECKED == 1:
            content = b"%b.%b.%b" % (event_id, header(head, b"webhook-timestamp"), body)
            mac = base64.b64encode(hmac.digest(self._key, content, hashlib.sha256))
            self.forged += header(head, b"webhook-signature") != b"v1," + mac
        if path.startswith(b"/timed"):
            self.timed.append((number(body), self.last_at))
        if len(self._seen) == self._awaited:
            self._reached.set()

    async def reach(self, events: int) -> None:
        """Wait until this many distinct events have come since the start."""
        self._awaited = events
        self._reached.clear()
        if len(self._seen) < events:
            await self._reached.wait()


class Connection(asyncio.Protocol):
    """One keep-alive connection: requests with a Content-Length in, the same answer out."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._arrivals.connections += 1

    def connection_lost(self, _error: Exception | None) -> None:
        self._arrivals.connections -= 1

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while (end := self._unread.find(b"\r\n\r\n")) >= 0:
            head = self._unread[: end + 2]
            size = end + 4 + int(header(head, b"content-length"))
            if len(self._unread) < size:
                return
            body, self._unread = self._unread[end + 4 : size], self._unread[size:]
            path = head[: head.index(b"\r\n")].split()[1]
            if path != b"/hang":
                self._arrivals.note(path, head, body)
                self._answer(path)

    def _answer(self, path: bytes) -> None:
        if path.startswith(b"/slow"):
            asyncio.get_running_loop().call_later(SLOW_SECONDS, self._transport.write, ANSWER)
        else:
            self._transport.write(ANSWER)


def number(body: bytes) -> int:
    """Find the number that the load gave an event."""
    start = body.index(b"post_") + 5
    return int(body[start : start + 8])


def header(head: bytes, name: bytes) -> bytes:
    """Find the value of a header, named in lower case; one that is missing is an error."""
    start = head.lower().index(b"\r\n" + name + b":") + len(name) + 3
    return head[start : head.index(b"\r\n", start)].strip()


async def receive(certificate: str, secret: str) -> None:
    arrivals = Arrivals(secret)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(arrivals), "127.0.0.1", 0, ssl=tls, family=socket.AF_INET
    )
    print(server.sockets[0].getsockname()[1], flush=True)

    async def awaited(order: str) -> object:
        if order.strip() == "arrivals":
            timed, arrivals.timed = arrivals.timed, []
            return timed
        if order.strip() == "connections":
            return arrivals.connections
        await arrivals.reach(int(order))
        return {"last_at": arrivals.last_at, "repeats": arrivals.repeats, "forged": arrivals.forged}

    await obey(awaited)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(receive(*sys.argv[1:]))
