"""Moves that are killed: `python -m tests.moves` ends one at every call of the database, then completes it.

Each move is a process of its own, forked, which kills itself with -9: before its nth call, or right after
the call was sent, when nobody can know whether it counts. What is in the database at the end must be, row for
row, what a move brings that nobody kills.
"""

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg

from relay.model import Attempt, Health, Owed, Secret, Standing, State, Submission, Verdict
from relay.outbox import Ended, KeptEndpoint, Outbox, moved, moving, open_outbox
from relay.outbox.postgres import arrival
from tests import postgres
from tests.test_outbox import DEAD, DELIVERED, NOW, again, attempt, submission

CALLS = ("execute", "fetch", "fetchval", "fetchrow", "copy_records_to_table")
NOTES = ("begin", "begin_anew", "end")
AT_ONCE, SENT = "before", "sent"
SECRET = b'{"url": "https://127.0.0.1:9/", "secrets": ["whsec_c2VjcmV0LXNlY3JldC1zZWM="]}'
ALL_OF = "SELECT * FROM relay.{}"
DAY_MS = 86_400_000
FEWEST_CALLS = 80  # of a move of what `fill` leaves


async def fill(outbox: Outbox, events: int = 40) -> None:
    """Leave in an outbox something of all that an outbox can hold."""
    await outbox.register(["main", "other", "gone"])
    await outbox.keep_endpoint(KeptEndpoint(id="paused", settings=SECRET, paused=True))
    await outbox.accept([submission("long-ago", "main", at_ms=NOW - 9 * DAY_MS)])
    (old,) = await outbox.claim("main", 1, NOW)
    await outbox.record(old, attempt(old), DELIVERED)
    await outbox.forget(NOW - DAY_MS, 100)  # so that numbers do not begin with 1

    await outbox.accept([submission("cancelled", "gone"), submission("waits", "paused", "other")])
    await outbox.drop_endpoint("gone")
    await outbox.accept([submission("too-old", "other", at_ms=NOW - 8 * DAY_MS)])
    await outbox.expire("other", NOW - 7 * DAY_MS, 0, NOW)
    await outbox.accept([ordered(f"{key}{n}", key) for n in range(4) for key in "xyz"])
    for n in range(0, events, 20):
        batch = range(n, min(n + 20, events))
        await outbox.accept([submission(f"n{i}", "main", "other", key=f"idem-{i}") for i in batch])
    await meet(outbox)
    await outbox.accept([submission("last", "main", at_ms=NOW + 62_000, data=b'{"text":"\xc3\xa9\\u0000"}')])


def ordered(name: str, key: str) -> Submission:
    plain = submission(name)
    return replace(
        plain, event=replace(plain.event, key=key), endpoints=(Owed("main", "event", ordered=True),)
    )


async def meet(outbox: Outbox) -> None:
    """Attempt some: delivered at once or at last, dead, waiting for another attempt, replayed."""
    claimed = await outbox.claim("main", 16, NOW)
    for index, delivery in enumerate(claimed):
        failed = replace(attempt(delivery, "http_503"), answer="a\x00b")
        outcome: tuple[Attempt, Verdict] = (
            (attempt(delivery), DELIVERED),
            (failed, DEAD),
            (failed, again(NOW + 1000 * index)),
        )[index % 3]
        await outbox.record(delivery, *outcome, health=Health(standing=Standing.DOWN, failures=index))
    for delivery in await outbox.claim("main", 3, NOW + 60_000):
        await outbox.record(delivery, attempt(delivery, at_ms=NOW + 60_000), DELIVERED)
    await outbox.revive(Ended(endpoint="main", state=State.DEAD, event_id=claimed[1].event.id), NOW + 61_000)
    await outbox.revive(Ended(endpoint="main", event_id=claimed[0].event.id), NOW + 61_000)


async def contents(url: str) -> dict[str, list[Any]]:
    """Return every row that a move brings, and which numbers come next."""
    link = await asyncpg.connect(url)
    try:
        names = (*arrival.COLUMNS, "tallies")
        rows = {name: sorted(map(repr, await link.fetch(ALL_OF.format(name)))) for name in names}
        numbers = ("event_numbers", "endpoints_number_seq")
        return rows | {name: await link.fetch(ALL_OF.format(name)) for name in numbers}
    finally:
        await link.close()


async def without(url: str) -> None:
    """Leave nothing of an outbox in the database."""
    link = await asyncpg.connect(url)
    try:
        await link.execute("DROP SCHEMA IF EXISTS relay CASCADE")
    finally:
        await link.close()


def put_back(kept: Path, file: Path) -> None:
    """Let the file be again what it was, as a relay that stopped in order had left it."""
    for each in file.parent.glob(f"{file.name}*"):
        each.unlink()
    shutil.copy(kept, file)


def moved_by_child(file: Path, url: str, kill_at: int = 0, when: str = AT_ONCE) -> int:
    """Move in a process of its own, which is killed at its nth call; return how it ended."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            kill_at_call(kill_at, when)
            arrival.BATCH_EVENTS = 17
            done = asyncio.run(moving.move(file, Secret(url), lambda _: None))
            code = 0 if done.whole else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moved_in_part(file: Path, url: str) -> None:
    """Move in a process of its own, which is killed when one batch has gone over."""
    child = os.fork()
    if child == 0:
        try:
            arrival.BATCH_EVENTS = 17
            bring, calls = arrival.bring, iter(range(2))

            async def once(*arguments: Any) -> int:
                if next(calls) == 1:
                    kill()
                return await bring(*arguments)

            arrival.bring = once
            asyncio.run(moving.move(file, Secret(url), lambda _: None))
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


class Killer:
    """Ends this process at its nth call."""

    def __init__(self, number: int, when: str) -> None:
        self._calls = iter(range(1, sys.maxsize))
        self._number = number
        self._when = when

    def called(self, call: Any) -> Any:
        """Wrap a call of the database."""

        async def counted(*arguments: Any, **settings: Any) -> Any:
            if self._is_here():
                asyncio.get_running_loop().call_soon(kill)  # once the call has been sent
            return await call(*arguments, **settings)

        return counted

    def noted(self, note: Any) -> Any:
        """Wrap a change of the file."""

        def counted(*arguments: Any) -> Any:
            here = self._is_here()
            result = note(*arguments)
            if here:
                kill()
            return result

        return counted

    def _is_here(self) -> bool:
        here = next(self._calls) == self._number
        if here and self._when == AT_ONCE:
            kill()
        return here


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(number: int, when: str) -> None:
    """Let this process end at its nth call of the database, or change of the file."""
    killer = Killer(number, when)
    for name in CALLS:
        setattr(asyncpg.Connection, name, killer.called(getattr(asyncpg.Connection, name)))
    for name in NOTES:
        setattr(moved, name, killer.noted(getattr(moved, name)))


def killed_moves(folder: Path, url: str, places: Iterator[tuple[int, str]]) -> tuple[int, list[str]]:
    """Kill a move at each place, complete it, compare; return how many were killed and what was wrong."""
    kept, file = folder / "kept.db", folder / "relay.db"

    async def begin() -> None:
        async with open_outbox(kept) as outbox:
            await fill(outbox)

    asyncio.run(begin())
    put_back(kept, file)
    asyncio.run(without(url))
    assert moved_by_child(file, url) == 0
    whole = asyncio.run(contents(url))
    killed, wrong = 0, []
    for number, when in places:
        put_back(kept, file)
        asyncio.run(without(url))
        if moved_by_child(file, url, number, when) == 0:
            break
        killed += 1
        if (code := moved_by_child(file, url)) != 0:
            wrong.append(f"killed at {number} ({when}), the next move ended with {code}")
        elif asyncio.run(contents(url)) != whole:
            wrong.append(f"killed at {number} ({when}), the next move did not bring the same")
    return killed, wrong


def every() -> Iterator[tuple[int, str]]:
    for number in range(1, sys.maxsize):
        yield number, AT_ONCE
        yield number, SENT


def some(count: int, seed: int) -> Iterator[tuple[int, str]]:
    """Places by chance, all over a move."""
    chance = random.Random(seed)
    for _ in range(count):
        yield chance.randint(1, FEWEST_CALLS), chance.choice((AT_ONCE, SENT))


def main(arguments: Sequence[str]) -> int:
    """Kill at every place, on a server of our own; or in a database, at a number of places, by a seed."""
    folder = Path(tempfile.mkdtemp(prefix="relay-moves-"))
    try:
        if arguments:
            url, count, seed = arguments
            killed, wrong = killed_moves(folder, url, some(int(count), int(seed)))
        else:
            with postgres.running() as server:
                killed, wrong = killed_moves(folder, server.url, every())
    finally:
        shutil.rmtree(folder)
    print(f"{killed} moves killed, {len(wrong)} wrong")
    for each in wrong:
        print(each)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
