"""A test event: a sample goes to the endpoints that want it, now, once, and is kept nowhere.

It is signed like a real one and goes through the same sender and guard, but no outbox, no health and no
pause knows of it (contract section 4, `POST /v1/webhooks/test`).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from relay import canonical, formats
from relay.clock import Clock
from relay.ingest import EventIds, iso
from relay.model import Endpoint, Event, Outcome
from relay.sender import Sender


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What one endpoint made of the sample."""

    endpoint: str
    outcome: Outcome


async def rehearse(
    type_: str, sample: object, endpoints: Sequence[Endpoint], *, sender: Sender, clock: Clock
) -> list[Rehearsed]:
    """Send the sample of a type to all of these endpoints at once."""
    now_ms = clock.now_ms()
    event = Event(
        id=EventIds().make(now_ms),
        type=type_,
        timestamp=iso(now_ms),
        data=canonical.encode(canonical.parse(orjson.dumps(sample))),
        accepted_at_ms=now_ms,
    )
    async with asyncio.TaskGroup() as tasks:
        sent = [
            tasks.create_task(sender.send(each, formats.message(event, each.format, attempt=1, at_ms=now_ms)))
            for each in endpoints
        ]
    return [
        Rehearsed(endpoint=endpoint.id, outcome=each.result())
        for endpoint, each in zip(endpoints, sent, strict=True)
    ]
