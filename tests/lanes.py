"""Lanes for tests: an endpoint, a sender that answers as told, and what joins them to an outbox."""

import asyncio
from collections.abc import Callable

from relay.clock import Clock
from relay.delivery import Lanes
from relay.lane import Lane
from relay.model import Endpoint, Message, Outcome
from relay.outbox import Outbox
from relay.report import MakesNews
from relay.surroundings import Sends, Surroundings

OK = Outcome(milliseconds=3, status=200, answer="ok")
REFUSED = Outcome(milliseconds=3, status=503, reason="http_503", answer="busy")


def endpoint(id_: str = "main", **settings: object) -> Endpoint:
    defaults = {
        "url": "https://receiver.test/",
        "events": ("*",),
        "sign": (),
        "retry_schedule": (5.0, 300.0, 18_000.0),
        "timeout_seconds": 15.0,
        "concurrency": 4,
    }
    return Endpoint(id=id_, **(defaults | settings))  # type: ignore[arg-type]


class ScriptedSender:
    """Answers as told; keeps what it was given, and holds it while `open` is not set."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.outcomes: list[Outcome] = []
        self.sending = 0
        self.most_at_once = 0
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        self.messages.append(message)
        self.sending += 1
        self.most_at_once = max(self.most_at_once, self.sending)
        try:
            await self.open.wait()
        finally:
            self.sending -= 1
        return self.outcomes.pop(0) if self.outcomes else OK


async def until(condition: Callable[[], bool], within: float = 5.0) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.001)


def make_lanes(
    outbox: Outbox,
    sender: Sends,
    clock: Clock,
    *,
    connections: asyncio.Semaphore | None = None,
    make_news: MakesNews = lambda *_, of: [],
) -> Lanes:
    """Join lanes the way `serve` does; retries come exactly in the middle of their jitter."""
    lanes = Lanes(lambda endpoint, health: Lane(endpoint, health, around))
    around = Surroundings(
        outbox=outbox,
        sender=sender,
        clock=clock,
        connections=connections or asyncio.Semaphore(1000),
        make_news=make_news,
        wake=lanes.wake,
        spread=lambda: 0.5,
    )
    return lanes
