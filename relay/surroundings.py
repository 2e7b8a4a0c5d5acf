"""What all lanes share."""

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from relay.clock import Clock
from relay.metrics import Metrics
from relay.model import Endpoint, Message, Outcome
from relay.outbox import Outbox
from relay.recent import Recent
from relay.report import MakesNews
from relay.traces import Continued, Traces


class Sends(Protocol):
    """What a lane needs of the sender."""

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all lanes share.

    `connections` are as many attempts at once as there are file descriptors for, so that running out of them
    is nobody's failed attempt. `spread` places a retry within its jitter.
    """

    outbox: Outbox
    sender: Sends
    clock: Clock
    connections: asyncio.Semaphore
    make_news: MakesNews
    wake: Callable[[Iterable[str]], None]
    spread: Callable[[], float] = random.random
    metrics: Metrics = field(default_factory=Metrics)
    traces: Traces = field(default_factory=Continued)
    recent: Recent = field(default_factory=Recent)
