"""Faults that are planted into a relay, in its own process, so that the checker can be seen to find them.

None of them stands in `relay/`: each replaces one function there before the command line runs.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from relay import formats
from relay.model import Outcome, State
from relay.outbox import order, schema, statements
from relay.outbox.sqlite import SqliteOutbox
from relay.sender import Sender

Plant = Callable[[], None]
PLANTS: dict[str, Plant] = {}


def planted(function: Plant) -> Plant:
    PLANTS[function.__name__] = function
    return function


def plant(name: str) -> None:
    PLANTS[name]()


def every(count: int) -> Callable[[], bool]:
    """Return what is true once in so many calls."""
    calls = 0

    def now() -> bool:
        nonlocal calls
        calls += 1
        return calls % count == 0

    return now


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by `wrapper`, which gets the original first."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replaced)


@planted
def skips_the_sync() -> None:
    """202 before the disk has it: only a power cut shows this."""
    around(schema, "prepare", lambda prepare, db, path, _, *rest: prepare(db, path, "normal", *rest))


@planted
def answers_before_the_commit() -> None:
    async def accept(accepts: Any, outbox: Any, submissions: Any) -> Any:
        late = asyncio.get_running_loop().create_task(asyncio.sleep(0.3))
        late.add_done_callback(
            lambda _: background.append(asyncio.get_running_loop().create_task(accepts(outbox, submissions)))
        )
        background.append(late)
        return [receipt_of(each) for each in submissions]

    around(SqliteOutbox, "accept", accept)


@planted
def marks_delivered_before_sending() -> None:
    async def send(sends: Any, sender: Any, endpoint: Any, message: Any) -> Outcome:
        background.append(asyncio.get_running_loop().create_task(sends(sender, endpoint, message)))
        return Outcome(milliseconds=1, status=200)

    around(Sender, "send", send)


@planted
def drops_one_in_a_thousand() -> None:
    drops = every(1000)

    async def accept(accepts: Any, outbox: Any, submissions: Any) -> Any:
        if drops():
            return [receipt_of(each) for each in submissions]
        return await accepts(outbox, submissions)

    around(SqliteOutbox, "accept", accept)


@planted
def new_id_on_retry() -> None:
    def message(makes: Any, *args: Any, **kwargs: Any) -> Any:
        made = makes(*args, **kwargs)
        return made if made.attempt == 1 else replace(made, id=f"{made.id}x{made.attempt}")

    around(formats, "message", message)


@planted
def one_id_for_two() -> None:
    """Ids are mixed up: every fiftieth event goes out under the id of the one before."""
    mixes, last = every(50), [""]

    def message(makes: Any, *args: Any, **kwargs: Any) -> Any:
        made = makes(*args, **kwargs)
        if mixes():
            made = replace(made, id=last[0] or made.id)
        last[0] = made.id
        return made

    around(formats, "message", message)


@planted
def serialises_again() -> None:
    def message(makes: Any, *args: Any, **kwargs: Any) -> Any:
        made = makes(*args, **kwargs)
        if made.attempt == 1:
            return made
        return replace(made, body=json.dumps(json.loads(made.body), separators=(",", ":")).encode())

    around(formats, "message", message)


@planted
def signs_with_an_old_time() -> None:
    def message(makes: Any, *args: Any, **kwargs: Any) -> Any:
        made = makes(*args, **kwargs)
        return made if made.attempt == 1 else replace(made, timestamp=made.timestamp - 600)

    around(formats, "message", message)


@planted
def delivers_twice() -> None:
    twice = every(50)

    async def send(sends: Any, sender: Any, endpoint: Any, message: Any) -> Outcome:
        outcome: Outcome = await sends(sender, endpoint, message)
        if outcome.reason is None and twice():
            await sends(sender, endpoint, message)
        return outcome

    around(Sender, "send", send)


@planted
def delivers_what_nobody_posted() -> None:
    invents = every(50)

    async def send(sends: Any, sender: Any, endpoint: Any, message: Any) -> Outcome:
        if invents():
            body = message.body.replace(b'"n":', b'"n":-9')
            await sends(sender, endpoint, replace(message, id="evt_invented", body=body))
        outcome: Outcome = await sends(sender, endpoint, message)
        return outcome

    around(Sender, "send", send)


@planted
def retries_early() -> None:
    def record(records: Any, outbox: Any, delivery: Any, attempt: Any, verdict: Any, **more: Any) -> Any:
        if verdict.state is State.PENDING:
            began = attempt.at_ms + attempt.milliseconds
            verdict = replace(verdict, due_ms=began + (verdict.due_ms - began) // 2)
        return records(outbox, delivery, attempt, verdict, **more)

    around(SqliteOutbox, "record", record)


@planted
def never_gives_up() -> None:
    def record(records: Any, outbox: Any, delivery: Any, attempt: Any, verdict: Any, **more: Any) -> Any:
        if verdict.state is State.DEAD and attempt.number < 12:
            verdict = replace(verdict, state=State.PENDING, due_ms=attempt.at_ms + attempt.milliseconds + 400)
        return records(outbox, delivery, attempt, verdict, **more)

    around(SqliteOutbox, "record", record)


@planted
def retries_in_a_year() -> None:
    late = every(20)

    def record(records: Any, outbox: Any, delivery: Any, attempt: Any, verdict: Any, **more: Any) -> Any:
        if verdict.state is State.PENDING and late():
            verdict = replace(verdict, due_ms=verdict.due_ms + 365 * 86_400_000)
        return records(outbox, delivery, attempt, verdict, **more)

    around(SqliteOutbox, "record", record)


@planted
def loses_an_attempt_row() -> None:
    around(statements, "insert_attempts", lambda inserts, db, rows: inserts(db, list(rows)[1:]))


@planted
def dies_without_a_reason() -> None:
    def insert(inserts: Any, db: Any, rows: Any) -> None:
        inserts(db, [(*row[:6], None, row[7]) for row in rows])

    around(statements, "insert_attempts", insert)


@planted
def forgets_an_endpoint() -> None:
    """One in twenty events reaches only the first of the endpoints that want it."""
    forgets = every(20)

    async def accept(accepts: Any, outbox: Any, submissions: Any) -> Any:
        if forgets():
            submissions = [replace(each, endpoints=each.endpoints[:1]) for each in submissions]
        return await accepts(outbox, submissions)

    around(SqliteOutbox, "accept", accept)


@planted
def breaks_the_order() -> None:
    around(order.Heads, "holds_back", lambda *_: False)


@planted
def forgets_what_a_key_was_for() -> None:
    async def accept(accepts: Any, outbox: Any, submissions: Any) -> Any:
        return await accepts(outbox, [replace(each, fingerprint=bytes(32)) for each in submissions])

    around(SqliteOutbox, "accept", accept)


background: list[Any] = []  # tasks that nobody else holds


def receipt_of(submission: Any) -> Any:
    from relay.outbox.accepting import _receipt

    return _receipt(submission, duplicate=False)
