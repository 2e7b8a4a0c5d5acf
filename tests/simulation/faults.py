"""Faults to be planted in the relay, each of which must be found: a judge that never condemns is none."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

from relay import endpoints, formats, health, lane
from relay.delivery import Lanes
from relay.lane import Lane
from relay.model import Health, State
from relay.outbox import commit, order, statements
from relay.outbox.sqlite import SqliteOutbox
from relay.pace import Bucket, Limit

Fault = Callable[[], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {}


@contextmanager
def put_in(place: Any, name: str, other: Any) -> Iterator[None]:
    before = place.__dict__[name] if isinstance(place, type) else getattr(place, name)
    setattr(place, name, other)
    try:
        yield
    finally:
        setattr(place, name, before)


def fault(plant: Callable[[], tuple[Any, str, Any]]) -> None:
    """Register a fault under its name: where it goes, and what goes there instead."""
    FAULTS[plant.__name__.replace("_", "-")] = lambda: put_in(*plant())


@fault
def claims_twice() -> tuple[Any, str, Any]:
    claim, turns = SqliteOutbox.claim, count(1)

    async def other(self: Any, endpoint: str, limit: int, now_ms: int) -> Any:
        claimed = await claim(self, endpoint, limit, now_ms)
        if claimed and next(turns) % 40 == 0:
            self._in_flight.discard(claimed[0].handle)
            self._rewind(endpoint, 0)
        return claimed

    return SqliteOutbox, "claim", other


@fault
def ignores_due_times() -> tuple[Any, str, Any]:
    look = statements.look
    return statements, "look", lambda db, number, now_ms, *rest: look(db, number, now_ms + 60_000, *rest)


@fault
def loses_an_outcome() -> tuple[Any, str, Any]:
    record, turns = SqliteOutbox.record, count(1)

    async def other(self: Any, delivery: Any, *args: Any, **kwargs: Any) -> Any:
        if next(turns) % 100 == 0:
            self._in_flight.discard(delivery.handle)
            return []
        return await record(self, delivery, *args, **kwargs)

    return SqliteOutbox, "record", other


@fault
def loses_an_event() -> tuple[Any, str, Any]:
    insert, turns = commit._insert, count(1)

    def other(db: Any, new: Any, numbers: Any, written: Any) -> None:
        insert(db, [each for each in new if next(turns) % 100], numbers, written)

    return commit, "_insert", other


@fault
def acknowledges_before_the_commit() -> tuple[Any, str, Any]:
    accept = SqliteOutbox.accept

    async def other(self: Any, submissions: Any) -> Any:
        if any(each.idempotency_key for each in submissions):
            return await accept(self, submissions)
        task = asyncio.get_running_loop().create_task(accept(self, submissions))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return [commit._receipt(each, duplicate=False) for each in submissions]

    return SqliteOutbox, "accept", other


@fault
def breaks_the_order() -> tuple[Any, str, Any]:
    return order.Heads, "holds_back", lambda _self, _number, _key: False


@fault
def lets_a_replay_overtake() -> tuple[Any, str, Any]:
    def other(db: Any, _before: Any, number: int, key: str, now_ms: int) -> None:
        order._let_go(db, order.oldest(db, number, key), number, now_ms)

    return order, "go_before", other


@fault
def ignores_the_rate() -> tuple[Any, str, Any]:
    return Bucket, "available", lambda _self, _now: 1000


@fault
def saves_up_the_rate() -> tuple[Any, str, Any]:
    def other(self: Any, rate: float, now: float) -> None:
        self.rate, self._interval, self._saved, self._paid_back = rate, 1 / rate, 60.0, now

    return Bucket, "__init__", other


@fault
def one_slot_too_many() -> tuple[Any, str, Any]:
    return Limit, "slots", property(lambda self: int(self._limit) + 1)


@fault
def forgets_health_on_restart() -> tuple[Any, str, Any]:
    return statements, "read_health", lambda _text: Health()


@fault
def ignores_retry_after() -> tuple[Any, str, Any]:
    return health, "floor_ms", lambda _outcome, _now_ms: None


@fault
def clock_kills() -> tuple[Any, str, Any]:
    return Lane, "set_right", lambda _self: None


@fault
def rest_kills() -> tuple[Any, str, Any]:
    return endpoints, "was_at_rest", lambda _seen, _now: False


@fault
def probes_use_up_steps() -> tuple[Any, str, Any]:
    decide = lane.decide
    return lane, "decide", lambda *args, **kwargs: decide(*args, **(kwargs | {"probe": False}))


@fault
def dies_a_step_early() -> tuple[Any, str, Any]:
    decide = lane.decide

    def other(outcome: Any, delivery: Any, *, schedule: Any, **kwargs: Any) -> Any:
        return decide(outcome, delivery, schedule=schedule[:-1], **kwargs)

    return lane, "decide", other


@fault
def probes_too_often() -> tuple[Any, str, Any]:
    probed = health._probed

    def other(stands: Any, endpoint: Any, now_ms: int) -> Any:
        return replace(probed(stands, endpoint, now_ms), probe_at_ms=now_ms + 10_000)

    return health, "_probed", other


@fault
def sends_while_paused() -> tuple[Any, str, Any]:
    change = Lane.change
    return Lane, "change", lambda self, endpoint, *, paused: change(self, endpoint, paused=paused and False)


@fault
def never_gone() -> tuple[Any, str, Any]:
    after = lane.rules.after

    def other(stands: Any, outcome: Any, **kwargs: Any) -> Any:
        return after(stands, replace(outcome, status=500) if outcome.status == 410 else outcome, **kwargs)

    return lane.rules, "after", other


@fault
def another_body_on_retry() -> tuple[Any, str, Any]:
    message = formats.message

    def other(event: Any, format_: str, *, attempt: int, **kwargs: Any) -> Any:
        made = message(event, format_, attempt=attempt, **kwargs)
        return made if attempt < 4 else replace(made, body=made.body + b" ")

    return formats, "message", other


@fault
def another_id_on_retry() -> tuple[Any, str, Any]:
    message = formats.message

    def other(event: Any, format_: str, *, attempt: int, **kwargs: Any) -> Any:
        made = message(event, format_, attempt=attempt, **kwargs)
        return made if attempt < 4 else replace(made, id=made.id + "x")

    return formats, "message", other


@fault
def does_not_wake() -> tuple[Any, str, Any]:
    wake, turns = Lanes.wake, count(1)

    def other(self: Any, endpoints: Any) -> None:
        if next(turns) % 10:
            wake(self, endpoints)

    return Lanes, "wake", other


@fault
def forgets_an_idempotency_key() -> tuple[Any, str, Any]:
    known, turns = statements.known_key, count(1)
    return statements, "known_key", lambda db, key: known(db, key) if next(turns) % 10 else None


@fault
def gives_up_on_what_is_delivered() -> tuple[Any, str, Any]:
    decide, turns = lane.decide, count(1)

    def other(*args: Any, **kwargs: Any) -> Any:
        verdict = decide(*args, **kwargs)
        dies = verdict.state is State.DELIVERED and next(turns) % 300 == 0
        return replace(verdict, state=State.DEAD) if dies else verdict

    return lane, "decide", other
