"""The outbox in one SQLite file, written by one connection in group commits.

A single committer takes all that waits (accepts, outcomes, other changes), writes it as one transaction
on the connection's thread, and then tells everyone who waited. While one commit syncs, the next batch
gathers: no timer, and no delay when idle. What is claimed is a set in memory, because one process owns
the file; after a crash everything unrecorded is simply still pending.

Not here: SQL (`statements.py`), what a transaction does (`commit.py`), the schema (`schema.py`).
"""

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import aiosqlite

from relay.model import Attempt, Delivery, Receipt, State, Submission, Verdict
from relay.outbox import (
    Backlog,
    ConflictError,
    Ended,
    FullError,
    KeptEndpoint,
    Page,
    Past,
    Query,
    Story,
    listing,
    revival,
    schema,
    statements,
)
from relay.outbox.commit import Batch, Written, write
from relay.outbox.failures import translated
from relay.outbox.holding import held, refuse_moved, short_of_room
from relay.outbox.waiting import Waiting

log = logging.getLogger("relay.outbox")

P = ParamSpec("P")
T = TypeVar("T")
Promise = asyncio.Future[Any]

FULL_RETRY_SECONDS = 1.0
GATHERING_PASSES = 3  # of the event loop
CANCEL_STEP = 1000  # deliveries cancelled in one transaction, so that accepts wait for milliseconds only


@dataclass(slots=True)
class Gathering:
    """The next batch while it gathers, and who waits for what of it."""

    batch: Batch = field(default_factory=Batch)
    accepts: list[Promise] = field(default_factory=list)
    records: list[Promise] = field(default_factory=list)
    changes: list[Promise] = field(default_factory=list)


class SqliteOutbox:
    """The verbs of `Outbox`; made by `open_sqlite`."""

    def __init__(self, db: aiosqlite.Connection, path: Path) -> None:
        self._db = db
        self._path = path
        self._inode = 0
        self._last_seq = 0
        self._numbers: dict[str, int] = {}
        self._waiting: dict[str, Waiting] = {}
        self._in_flight: set[tuple[int, int]] = set()
        self._pending: Counter[int] = Counter()
        self._dead: Counter[int] = Counter()
        self._gathering = Gathering()
        self._work = asyncio.Event()
        self._forgotten = 0  # how far the walk over old events has come
        self._closing = False
        self._trouble: str | None = None

    # The verbs

    async def register(self, endpoints: Sequence[str]) -> dict[str, int]:
        numbers = await self._change(lambda db: statements.register(db, endpoints))
        self._numbers = {endpoint: numbers[endpoint] for endpoint in endpoints}
        self._waiting = {endpoint: Waiting(number) for endpoint, number in self._numbers.items()}
        absent = {endpoint: number for endpoint, number in numbers.items() if endpoint not in self._numbers}
        cancelled = {endpoint: await self._cancel(number) for endpoint, number in absent.items()}
        return {endpoint: count for endpoint, count in cancelled.items() if count}

    async def endpoints(self) -> list[KeptEndpoint]:
        return await self._run(statements.kept_endpoints)

    async def keep_endpoint(self, endpoint: KeptEndpoint) -> None:
        number = await self._change(
            lambda db: statements.keep_endpoint(db, endpoint.id, endpoint.settings, endpoint.paused)
        )
        # Replaced, not changed: a commit under way goes on with the endpoints it began with.
        self._numbers = self._numbers | {endpoint.id: number}
        self._waiting.setdefault(endpoint.id, Waiting(number))

    async def drop_endpoint(self, endpoint: str) -> int:
        number = self._numbers[endpoint]
        self._numbers = {id_: each for id_, each in self._numbers.items() if id_ != endpoint}
        try:
            await self._change(lambda db: statements.keep_endpoint(db, endpoint, None, False))  # noqa: FBT003
        except FullError:
            self._numbers = self._numbers | {endpoint: number}
            raise
        self._waiting.pop(endpoint, None)
        return await self._cancel(number)

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        self._gathering.batch.accepts.append(submissions)
        accepted: list[Receipt] | ConflictError = await self._promised(self._gathering.accepts)
        if isinstance(accepted, ConflictError):
            raise accepted
        return accepted

    async def claim(self, endpoint: str, limit: int, now_ms: int) -> list[Delivery]:
        waiting = self._waiting.get(endpoint)
        claimed: list[Delivery] = []
        if waiting is None:  # dropped
            return claimed
        while len(claimed) < limit and waiting.due_ms is not None and waiting.due_ms <= now_ms:
            claimed += await self._claim_stored(endpoint, waiting, limit - len(claimed), now_ms)
        fresh = waiting.take_fresh(limit - len(claimed))
        self._in_flight.update(delivery.handle for delivery in fresh)
        return claimed + fresh

    async def record(self, delivery: Delivery, attempt: Attempt, verdict: Verdict) -> None:
        if delivery.handle not in self._in_flight:
            return
        self._gathering.batch.records.append((delivery, attempt, verdict))
        await self._promised(self._gathering.records)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.handle in self._in_flight:
                self._in_flight.discard(delivery.handle)
                self._rewind(delivery.endpoint, 0)

    async def due(self, endpoint: str) -> int | None:
        waiting = self._waiting.get(endpoint)
        if waiting is None:
            return None
        return 0 if waiting.any_fresh else waiting.due_ms

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
        while True:
            first_ms = now_ms + round(revived * spacing_ms)
            step = await self._change(partial(self._revive, ended, after, first_ms, spacing_ms))
            revived += len(step.found)
            for (_, number), state in step.found:
                self._pending[number] += 1
                self._dead[number] -= state is State.DEAD
            for endpoint in self._numbers:
                self._rewind(endpoint, now_ms)
            if step.after is None:
                return revived
            after = step.after

    def trouble(self) -> str | None:
        return self._trouble or short_of_room(self._path)

    async def backlog(self) -> dict[str, Backlog]:
        return {
            endpoint: Backlog(pending=self._pending[number], dead=self._dead[number])
            for endpoint, number in self._numbers.items()
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

    # How they are done

    async def start(self, synchronous: str) -> None:
        """Bring the file to the current schema and read what is kept in memory."""
        await self._run(schema.prepare, str(self._path), synchronous)
        self._inode = self._path.stat().st_ino
        self._last_seq = await self._run(statements.last_seq)
        pending, dead = await self._run(statements.counts)
        self._pending, self._dead = Counter(pending), Counter(dead)

    async def commit_batches(self) -> None:
        """Write batch after batch until `close`; what is left then is written first."""
        while not self._closing or self._gathering.batch != Batch():
            await self._work.wait()
            self._work.clear()
            # Whoever is ready at this moment joins; costs nothing when idle, and half the commits when busy.
            for _ in range(GATHERING_PASSES):
                await asyncio.sleep(0)
            gathered, self._gathering = self._gathering, Gathering()
            self._refuse_without_room(gathered)
            try:
                written = await self._run(write, gathered.batch, self._numbers, self._last_seq)
            except FullError as error:
                await self._keep_what_must_be_kept(gathered, error)
            except BaseException as error:
                # Whether the batch is on disk is unknown; only the next start can tell.
                _break(gathered.accepts + gathered.records + gathered.changes, error)
                raise
            else:
                self._settle(gathered, written)

    def _refuse_without_room(self, gathered: Gathering) -> None:
        """Refuse new events while only as much room is left as the outcomes of the accepted ones may need.

        Raises DamagedError when the file is not there any more: what is written now would be found by nobody.
        """
        refuse_moved(self._path, self._inode)
        if gathered.accepts and (trouble := short_of_room(self._path)):
            _break(gathered.accepts, FullError(trouble))
            gathered.accepts, gathered.batch.accepts = [], []

    def close(self) -> None:
        self._closing = True
        self._work.set()

    async def _promised(self, promises: list[Promise]) -> Any:
        promise: Promise = asyncio.get_running_loop().create_future()
        promises.append(promise)
        self._work.set()
        return await promise

    async def _change(self, change: Callable[[sqlite3.Connection], T]) -> T:
        self._gathering.batch.changes.append(change)
        result: T = await self._promised(self._gathering.changes)
        return result

    def _settle(self, gathered: Gathering, written: Written) -> None:
        """Take over what is on disk now, then tell who waited for it."""
        self._trouble = None
        self._last_seq = written.last_seq
        for delivery in written.fresh:
            self._pending[delivery.handle[1]] += 1
            if delivery.endpoint in self._waiting:
                self._waiting[delivery.endpoint].offer(delivery, delivery.event.accepted_at_ms)
        for delivery, _, verdict in gathered.batch.records:
            self._settle_record(delivery, verdict)
        _keep(gathered.accepts, written.accepted)
        _keep(gathered.changes, written.changed)
        _keep(gathered.records, [None] * len(gathered.records))

    def _settle_record(self, delivery: Delivery, verdict: Verdict) -> None:
        self._in_flight.discard(delivery.handle)
        if verdict.state is State.PENDING:
            assert verdict.due_ms is not None  # noqa: S101 - what a pending verdict is
            self._rewind(delivery.endpoint, verdict.due_ms)
            return
        self._pending[delivery.handle[1]] -= 1
        if verdict.state is State.DEAD:
            self._dead[delivery.handle[1]] += 1

    async def _keep_what_must_be_kept(self, gathered: Gathering, error: FullError) -> None:
        """Refuse what can be submitted again; what was met stays here until there is room for it."""
        self._trouble = str(error)
        _break(gathered.accepts + gathered.changes, error)
        if self._closing:
            # No more time to wait for room: what was met is met again after the next start.
            log.error("outcomes_unrecorded", extra={"unrecorded": len(gathered.records)})
            _break(gathered.records, error)
        elif gathered.records:
            self._gathering.batch.records = gathered.batch.records + self._gathering.batch.records
            self._gathering.records = gathered.records + self._gathering.records
            self._work.set()
            if not gathered.accepts and not gathered.changes:
                log.error("outbox_full", extra={"unrecorded": len(gathered.records)})
                await asyncio.sleep(FULL_RETRY_SECONDS)

    async def _claim_stored(self, endpoint: str, waiting: Waiting, limit: int, now_ms: int) -> list[Delivery]:
        place = waiting.start_look()
        number = waiting.number
        try:
            rows, due_ms = await self._run(statements.look, number, now_ms, place, limit)
        except BaseException:
            waiting.rewind(0)
            raise
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
        return self._numbers.get(ended.endpoint, 0) if ended.endpoint is not None else None

    def _revive(
        self, ended: Ended, after: int, first_ms: int, spacing_ms: float, db: sqlite3.Connection
    ) -> revival.Step:
        """Revive one step of them; nothing that belongs to an endpoint that is no longer there."""
        step = revival.find(db, ended, self._number(ended), after)
        live = set(self._numbers.values())
        found = [(handle, state) for handle, state in step.found if handle[1] in live]
        due = [first_ms + round(index * spacing_ms) for index in range(len(found))]
        revival.revive(db, [handle for handle, _ in found], due)
        return revival.Step(found=found, after=step.after)

    async def _cancel(self, number: int) -> int:
        cancelled = 0
        try:
            while step := await self._change(lambda db: statements.cancel(db, number, CANCEL_STEP)):
                cancelled += step
        except FullError as error:  # the next start does the rest
            log.warning("outbox_full", extra={"cancelled": cancelled, "error": str(error)})
        self._pending[number] -= cancelled
        return cancelled

    async def _run(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `function` with the raw connection on its thread: one hop, whatever it does there."""
        try:
            # aiosqlite's public calls hop once for each statement, and a hop costs more than most of them.
            done: T = await self._db._execute(function, self._db._conn, *args, **kwargs)  # type: ignore[no-untyped-call]  # noqa: SLF001
        except sqlite3.Error as error:
            raise translated(error, self._path) from error
        return done


def _keep(promises: Sequence[Promise], results: Sequence[Any]) -> None:
    for promise, result in zip(promises, results, strict=True):
        if not promise.done():  # who waited may have been cancelled; what was written stays written
            promise.set_result(result)


def _break(promises: Sequence[Promise], error: BaseException) -> None:
    for promise in promises:
        if not promise.done():
            promise.set_exception(error)


@asynccontextmanager
async def open_sqlite(path: Path, *, synchronous: str) -> AsyncIterator[SqliteOutbox]:
    """Hold the file and open it; closed again, with all that waits written, on the way out."""
    with held(path) as own:
        try:
            db = await aiosqlite.connect(own, isolation_level=None, cached_statements=256)
        except sqlite3.Error as error:
            raise translated(error, own) from error
        try:
            outbox = SqliteOutbox(db, own)
            await outbox.start(synchronous)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(outbox.commit_batches())
                try:
                    yield outbox
                finally:
                    outbox.close()
        finally:
            await db.close()
