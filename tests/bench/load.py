"""The load: posts events over keep-alive connections and tells how long the answers took.

Each line on stdin is an order, `{"to": …, "events": …}` to a port of loopback or the path of a unix socket,
and is answered with a line of figures. It may also have `connections`; a `batch`, so many events in one
request; a `rate` of requests a second; the `size` of an event in bytes; and how many `types` of event come in
turns.
Without a rate every connection posts its next event when the last was answered (a closed loop). With one,
events are posted at a steady pace whatever the answers do (an open loop), and an event's time counts from the
moment it was due, also when no connection was free. An answer other than 202 ends the process with an error.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, cast

from tests.bench.processes import new_loop, obey

CONNECTIONS = 32
FILLER = "The quick brown fox jumps over the lazy dog. "
OTHERS = 123  # bytes of an event beside its content
BATCH = "/v1/events/batch"


class Load:
    """The connections to one system, the events waiting for a free one, and how long the answers took."""

    def __init__(self, to: int | str, connections: int = CONNECTIONS) -> None:
        self._to = to
        self._connections = connections
        self._idle: deque[Connection] = deque()
        self._waiting: deque[float | None] = deque()  # when each was due
        self._requests: list[bytes] = []
        self._latencies: list[float] = []
        self._posted_at: list[float] = []
        self._answers_due = 0
        self.broken = False  # a connection was closed
        self._done: asyncio.Future[None] | None = None

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        make = partial(Connection, self)
        for _ in range(self._connections):
            if isinstance(self._to, str):
                _, connection = await loop.create_unix_connection(make, self._to)
            else:
                _, connection = await loop.create_connection(make, "127.0.0.1", self._to)
            self._idle.append(connection)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def run(
        self, events: int, *, rate: float | None = None, batch: int | None = None, **kind: int
    ) -> dict[str, object]:
        """Post this many events of a kind, wait for all answers, and return the figures in seconds."""
        # Taken from the end, so the first event is made last.
        host = self._to if isinstance(self._to, int) else None
        made = (event(number, **kind) for number in reversed(range(events)))
        if batch is None:
            self._requests = [request(host, each) for each in made]
        else:
            self._requests = [request(host, {"events": each}, BATCH) for each in batched(made, batch)]
        events = len(self._requests)
        self._latencies, self._posted_at, self._answers_due = [], [], events
        self._done = asyncio.get_running_loop().create_future()
        started_at, cpu = time.monotonic(), time.process_time()
        await (self._post_steadily(events, rate) if rate else self._post_freely(events))
        ordered = sorted(self._latencies)
        return {
            "started_at": started_at,
            "cpu_seconds": time.process_time() - cpu,
            "p50": ordered[len(ordered) // 2],
            "p99": ordered[len(ordered) * 99 // 100],
            "ended_at": time.monotonic(),
            "posted_at": self._posted_at if rate else [],  # of each event, in the order of their numbers
        }

    async def _post_freely(self, events: int) -> None:
        """Let every connection carry the next event as soon as it is free."""
        for _ in range(events):
            self._post(due=None)
        await self._settled()

    async def _post_steadily(self, events: int, rate: float) -> None:
        """Post at a steady pace; a timer that comes late is caught up with at once."""
        start = time.monotonic()
        for number in range(events):
            if (early := start + number / rate - time.monotonic()) > 0:
                await asyncio.sleep(early)
            self._posted_at.append(time.monotonic())
            self._post(due=self._posted_at[-1])
        await self._settled()

    def _post(self, *, due: float | None) -> None:
        """Post the next event as soon as a connection is free; one without a time is due only then."""
        if self._idle:
            self._idle.popleft().send(self._requests.pop(), due)
        else:
            self._waiting.append(due)

    async def _settled(self) -> None:
        assert self._done is not None
        await self._done
        self._done = None

    def answered(self, connection: "Connection", status: bytes, due: float) -> None:
        self._latencies.append(time.monotonic() - due)
        self._idle.append(connection)
        if status != b"202":
            self.fail(f"an event was answered {status.decode()}")
        elif self._waiting:
            self._post(due=self._waiting.popleft())
        elif len(self._latencies) == self._answers_due and self._done:
            self._done.set_result(None)

    def fail(self, why: str) -> None:
        """End the run with an error; a connection closed between two runs is none."""
        self.broken = True
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError(why))


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _error: Exception | None) -> None:
        self._load.fail("a connection was closed")

    def send(self, request: bytes, due: float | None) -> None:
        self._due = time.monotonic() if due is None else due
        self._transport.write(request)

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._unread += data
        head, blank, body = self._unread.partition(b"\r\n\r\n")
        if not blank:
            return
        length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        if len(body) >= int(length):
            self._unread = b""
            self._load.answered(self, head[9:12], self._due)


def event(number: int, size: int = 600, types: int = 0) -> dict[str, object]:
    """Make one event, about so many bytes long as JSON."""
    content = FILLER * (1 + size // len(FILLER))
    data = {
        "postId": f"post_{number:08}",
        "platforms": ["x", "linkedin"],
        "views": number,
        "content": content[: size - OTHERS],
    }
    return {"event": f"post.{number % types}" if types else "post.published", "data": data}


def batched(events: Iterable[object], size: int) -> Iterator[list[object]]:
    remaining = iter(events)
    while batch := list(islice(remaining, size)):
        yield batch


def request(port: int | None, content: object, path: str = "/v1/events") -> bytes:
    """Write one submission."""
    body = json.dumps(content).encode()
    host = "localhost" if port is None else f"127.0.0.1:{port}"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def together(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what was posted to several systems at once: the whole took as long as the slowest."""
    worst = {name: max(each[name] for each in figures) for name in ("cpu_seconds", "p50", "p99", "ended_at")}
    return figures[0] | worst | {"started_at": min(each["started_at"] for each in figures)}


async def serve() -> None:
    """Carry out orders; the connections to a system stay open from its first order on."""
    loads: dict[tuple[int | str, int], Load] = {}

    async def carry_out(order: str) -> dict[str, object]:
        wanted = json.loads(order)
        to, connections, events = (
            wanted.pop("to"),
            wanted.pop("connections", CONNECTIONS),
            wanted.pop("events"),
        )
        targets = to if isinstance(to, list) else [to]
        async with asyncio.TaskGroup() as tasks:
            runs = [
                tasks.create_task(
                    run((each, connections // len(targets)), events=events // len(targets), **wanted)
                )
                for each in targets
            ]
        return together([each.result() for each in runs])

    async def run(to: tuple[int | str, int], **wanted: Any) -> dict[str, Any]:
        if to not in loads or loads[to].broken:
            loads[to] = Load(*to)
            await loads[to].connect()
        return await loads[to].run(**wanted)

    await obey(carry_out)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())
