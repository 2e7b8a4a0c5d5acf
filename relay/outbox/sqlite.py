"""The outbox in one SQLite file, over one connection: what every verb means, and what is kept in memory.

What is claimed is a set in memory, because one process owns the file; after a crash everything unrecorded
is simply still pending.

Not here: how what waits is written (`committer.py`), what a transaction does (`commit.py`), SQL
(`statements.py`), the schema (`schema.py`).
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import aiosqlite

from relay.model import Attempt, Delivery, Health, Receipt, State, Submission, Verdict
from relay.outbox import (
    Backlog,
    Bounds,
    Committed,
    Ended,
    FullError,
    KeptEndpoint,
    Page,
    Past,
    Patience,
    Query,
    Story,
    backup,
    listing,
    patience,
    revival,
    schema,
    statements,
)
from relay.outbox.commit import Batch, Record, Written
from relay.outbox.committer import Committer
from relay.outbox.room import Room
from relay.outbox.sharing import Neighbours
from relay.outbox.waiting import START, Waiting

log = logging.getLogger("relay.outbox")

SHRUNK_AT_ONCE = 128  # pages given back in one transaction
KEPT_FREE = 4096  # pages that may stay free inside the file, to be used again,
KEPT_FREE_SHARE = 0.25  # or this share of it
CANCEL_STEP = 1000  # deliveries cancelled in one transaction, so that accepts wait for milliseconds only
PROBED_AT_ONCE = 64  # looked at to find one that is not in flight


class SqliteOutbox:
    """The verbs of `Outbox`; made by `opening.py`."""

    def __init__(self, db: aiosqlite.Connection, path: Path, bounds: Bounds, committed: Committed) -> None:
        self._path = path
        self._bounds = bounds
        self._pending: Counter[int] = Counter()  # by the endpoint's number
        self._dead: Counter[int] = Counter()
        self._room = Room(path, bounds, self._pending.total)
        self._committer = Committer(db, path, self._room, self._settle, committed)
        self._run = self._committer.run
        self._change = self._committer.change
        self.commit_batches = self._committer.commit_batches
        self.close = self._committer.close
        self.trouble = self._committer.trouble
        self.size = self._room.size
        self._waiting: dict[str, Waiting] = {}
        self._in_flight: set[tuple[int, int]] = set()
        self._forgotten = 0  # how far the walk over old events has come

    # The verbs

    async def register(self, endpoints: Sequence[str]) -> dict[str, int]:
        numbers = await self._change(lambda db: statements.register(db, endpoints))
        self._committer.numbers = {endpoint: numbers[endpoint] for endpoint in endpoints}
        self._waiting = {endpoint: Waiting(number) for endpoint, number in self._committer.numbers.items()}
        absent = {
            endpoint: number
            for endpoint, number in numbers.items()
            if endpoint not in self._committer.numbers
        }
        cancelled = {endpoint: await self._cancel(number) for endpoint, number in absent.items()}
        return {endpoint: count for endpoint, count in cancelled.items() if count}

    async def endpoints(self) -> list[KeptEndpoint]:
        return await self._run(statements.kept_endpoints)

    async def keep_endpoint(self, endpoint: KeptEndpoint) -> None:
        number = await self._change(
            lambda db: statements.keep_endpoint(db, endpoint.id, endpoint.settings, endpoint.paused)
        )
        # Replaced, not changed: a commit under way goes on with the endpoints it began with.
        self._committer.numbers = self._committer.numbers | {endpoint.id: number}
        self._waiting.setdefault(endpoint.id, Waiting(number))

    async def drop_endpoint(self, endpoint: str, aside: KeptEndpoint | None = None) -> int:
        settings, paused = (aside.settings, aside.paused) if aside is not None else (None, False)
        number = self._committer.numbers[endpoint]
        self._committer.numbers = {
            id_: each for id_, each in self._committer.numbers.items() if id_ != endpoint
        }
        try:
            await self._change(lambda db: statements.keep_endpoint(db, endpoint, settings, paused))
        except FullError:
            self._committer.numbers = self._committer.numbers | {endpoint: number}
            raise
        self._waiting.pop(endpoint, None)
        return await self._cancel(number)

    async def keep_health(self, endpoint: str, health: Health) -> None:
        if endpoint in self._waiting:
            number = self._waiting[endpoint].number
            await self._change(lambda db: statements.update_healths(db, {number: health}))

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        return await self._committer.accept(submissions)

    async def claim(
        self, endpoint: str, limit: int, now_ms: int, *, attempt_seconds: float = 0.0
    ) -> list[Delivery]:
        waiting = self._waiting.get(endpoint)
        claimed: list[Delivery] = []
        if waiting is None:  # dropped
            return claimed
        while len(claimed) < limit and waiting.is_due(now_ms):
            claimed += await self._claim_stored(endpoint, waiting, limit - len(claimed), now_ms)
        fresh = waiting.take_fresh(limit - len(claimed))
        self._in_flight.update(delivery.handle for delivery in fresh)
        return claimed + fresh

    async def probe(self, endpoint: str, *, attempt_seconds: float = 0.0) -> Delivery | None:
        waiting = self._waiting.get(endpoint)
        if waiting is None or waiting.closed:
            return None
        for after in (waiting.probed, START):
            rows = await self._run(statements.following, waiting.number, after, PROBED_AT_ONCE)
            # Looked through before the next hop: what is in flight now may be over by then.
            for row in rows:
                handle = (row[1], waiting.number)
                if handle not in self._in_flight and not waiting.closed:
                    self._in_flight.add(handle)
                    waiting.forget_fresh(handle)
                    waiting.probed = row[:2]
                    return statements.delivery(row, waiting.number, endpoint)
        return None

    async def record(
        self,
        delivery: Delivery,
        attempt: Attempt,
        verdict: Verdict,
        *,
        health: Health | None = None,
        news: Sequence[Submission] = (),
    ) -> list[Receipt]:
        if delivery.handle not in self._in_flight:
            return []
        return await self._committer.record(Record(delivery, attempt, verdict, health), news)

    async def expire(self, endpoint: str, before_ms: int, age_from_ms: int, now_ms: int) -> Patience:
        waiting = self._waiting.get(endpoint)
        if waiting is None:
            return Patience(expired=(), more=False, oldest_ms=None)
        step = await self._change(
            partial(
                patience.expire,
                number=waiting.number,
                after=waiting.aged,
                before_ms=before_ms,
                age_from_ms=age_from_ms,
                now_ms=now_ms,
                in_flight=self._in_flight.__contains__,
            )
        )
        oldest_ms = min(
            (each for each in (waiting.aged_ms, step.oldest_ms) if each is not None), default=None
        )
        waiting.aged, waiting.aged_ms = (step.after, oldest_ms) if step.after is not None else (0, None)
        for handle in step.ended:
            waiting.forget_fresh(handle)
        self._pending[waiting.number] -= len(step.ended)
        self._dead[waiting.number] += len(step.ended)
        if step.ended:
            waiting.rewind(0)  # the next of a key may go
        return Patience(expired=tuple(step.expired), more=step.after is not None, oldest_ms=oldest_ms)

    async def advance(self, endpoint: str, latest_ms: int, now_ms: int) -> None:
        waiting = self._waiting.get(endpoint)
        if waiting is not None:
            while await self._change(
                partial(patience.advance, number=waiting.number, now_ms=now_ms, latest_ms=latest_ms)
            ):
                pass
            waiting.rewind(0)

    async def postpone(self, endpoint: str, before_ms: int, now_ms: int) -> None:
        waiting = self._waiting.get(endpoint)
        if waiting is not None:
            while await self._change(
                partial(patience.postpone, number=waiting.number, before_ms=before_ms, now_ms=now_ms)
            ):
                pass
            waiting.rewind(0)

    async def last_seen(self) -> int | None:
        return await self._run(statements.last_seen)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.handle in self._in_flight:
                self._in_flight.discard(delivery.handle)
                self._rewind(delivery.endpoint, 0)

    def holds(self, delivery: Delivery) -> bool:
        return delivery.handle in self._in_flight

    async def due(self, endpoint: str) -> int | None:
        waiting = self._waiting.get(endpoint)
        return waiting.next_due_ms if waiting is not None else None

    def heed(self, neighbours: Neighbours) -> None:
        """There are none: one process owns the file."""

    async def follow(self, endpoints: Sequence[str]) -> None:
        raise AssertionError("nobody else keeps endpoints")

    async def is_current(self) -> bool:
        return True

    async def count(self, ended: Ended) -> int:
        counted, after = 0, 0
        while True:
            step = await self._run(revival.find, ended, self._number(ended), after)
            counted += len(step.found)
            if step.after is None:
                return counted
            after = step.after

    async def revive(self, ended: Ended, now_ms: int, spacing_ms: float = 0.0) -> int:
        revived, after = 0, 0
        with self._rearranging(ended.endpoint):
            while True:
                due_ms = partial(revival.spaced, now_ms, spacing_ms, revived)
                step = await self._change(partial(self._revive, ended, after, now_ms, due_ms))
                revived += len(step.found)
                self._settle_revived(step, now_ms)
                if step.after is None:
                    return revived
                after = step.after

    async def backlog(self) -> dict[str, Backlog]:
        return {
            endpoint: Backlog(pending=self._pending[number], dead=self._dead[number])
            for endpoint, number in self._committer.numbers.items()
        }

    async def pasts(self) -> dict[str, Past]:
        return await self._run(statements.pasts)

    async def events(self, query: Query) -> Page:
        return await self._run(listing.page, query)

    async def story(self, event_id: str) -> Story | None:
        return await self._run(listing.story, event_id)

    async def forget(self, before_ms: int, limit: int) -> bool:
        after = self._forgotten
        reached, dead = await self._change(lambda db: statements.forget(db, before_ms, after, limit))
        self._dead.subtract(dead)
        self._forgotten = reached or 0
        return reached is not None

    async def shrink(self) -> bool:
        return await self._change(
            partial(statements.shrink, pages=SHRUNK_AT_ONCE, share=KEPT_FREE_SHARE, at_least=KEPT_FREE)
        )

    @asynccontextmanager
    async def backup(self) -> AsyncIterator[Path]:
        copied = backup.beside(self._path)
        if refusal := self._room.refusal_of_copy():
            raise FullError(refusal)
        await self._committer.copy(copied)
        try:
            yield copied
        finally:
            backup.remove(copied)

    # How they are done

    async def start(self, synchronous: str) -> None:
        """Bring the file to the current schema and read what is kept in memory."""
        await self._run(schema.prepare, str(self._path), synchronous, self._bounds.max_bytes)
        self._committer.inode = self._path.stat().st_ino
        self._committer.last_seq = await self._run(statements.last_seq)
        pending, dead = await self._run(statements.counts)
        self._pending.update(pending)
        self._dead.update(dead)
        self._room.used_bytes = await self._run(statements.used_bytes)

    def _settle(self, batch: Batch, written: Written) -> None:
        """Take over what is on disk now."""
        self._pending.update(written.pending)
        for delivery in written.fresh:
            if delivery.endpoint in self._waiting:
                self._waiting[delivery.endpoint].offer(delivery, delivery.due_ms)
        for record in batch.records:
            self._settle_record(record.delivery, record.verdict)
        for endpoint, due_ms in written.passed_on:
            self._rewind(endpoint, due_ms)

    def _settle_record(self, delivery: Delivery, verdict: Verdict) -> None:
        self._in_flight.discard(delivery.handle)
        if verdict.state is State.PENDING:
            assert verdict.due_ms is not None  # noqa: S101 - what a pending verdict is
            self._rewind(delivery.endpoint, verdict.due_ms)
            return
        self._pending[delivery.handle[1]] -= 1
        if verdict.state is State.DEAD:
            self._dead[delivery.handle[1]] += 1

    def _settle_revived(self, step: revival.Step, now_ms: int) -> None:
        for (_, number), state in step.found:
            self._pending[number] += 1
            self._dead[number] -= state is State.DEAD
        for waiting in self._waiting.values():
            for handle in step.held:
                waiting.forget_fresh(handle)
            waiting.rewind(now_ms)
            waiting.aged = 0

    @contextmanager
    def _rearranging(self, endpoint: str | None) -> Iterator[None]:
        """Hand out nothing meanwhile: what is the oldest of its key now may not be in a moment."""
        names = self._waiting if endpoint is None else [endpoint]
        closed = [self._waiting[name] for name in names if name in self._waiting]
        for waiting in closed:
            waiting.closed += 1
        try:
            yield
        finally:
            for waiting in closed:
                waiting.closed -= 1

    async def _claim_stored(self, endpoint: str, waiting: Waiting, limit: int, now_ms: int) -> list[Delivery]:
        place = waiting.start_look()
        number = waiting.number
        try:
            rows, due_ms = await self._run(statements.look, number, now_ms, place, limit)
        except BaseException:
            waiting.rewind(0)
            raise
        if waiting.closed:  # since: they may not be the oldest of their keys any more
            waiting.rewind(0)
            return []
        waiting.end_look(rows[-1][:2] if rows else place, due_ms)
        claimed = [
            statements.delivery(row, number, endpoint)
            for row in rows
            if (row[1], number) not in self._in_flight
        ]
        for delivery in claimed:
            self._in_flight.add(delivery.handle)
            waiting.forget_fresh(delivery.handle)
        return claimed

    def _rewind(self, endpoint: str, due_ms: int) -> None:
        if endpoint in self._waiting:
            self._waiting[endpoint].rewind(due_ms)

    def _number(self, ended: Ended) -> int | None:
        """Return the number of the endpoint that is meant, one that nobody has if it is gone by now."""
        return self._committer.numbers.get(ended.endpoint, 0) if ended.endpoint is not None else None

    def _revive(
        self, ended: Ended, after: int, now_ms: int, due_ms: Callable[[int], int], db: sqlite3.Connection
    ) -> revival.Step:
        """Revive one step of them; nothing that belongs to an endpoint that is no longer there."""
        step = revival.find(db, ended, self._number(ended), after)
        live = set(self._committer.numbers.values())
        found = [(handle, state) for handle, state in step.found if handle[1] in live]
        handles = [handle for handle, _ in found]
        due = [due_ms(index) for index in range(len(found))]
        in_flight = self._in_flight - self._committer.recording
        held = revival.revive(db, handles, due, now_ms=now_ms, in_flight=in_flight)
        return revival.Step(found=found, after=step.after, held=held)

    async def _cancel(self, number: int) -> int:
        cancelled = 0
        try:
            while step := await self._change(lambda db: statements.cancel(db, number, CANCEL_STEP)):
                cancelled += step
        except FullError as error:  # the next start does the rest
            log.warning("outbox_full", extra={"cancelled": cancelled, "error": str(error)})
        self._pending[number] -= cancelled
        return cancelled
