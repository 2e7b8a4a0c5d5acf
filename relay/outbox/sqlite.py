"""The outbox in one SQLite file, written by one connection in group commits.

A single committer takes all that waits (accepts, outcomes, other changes), writes it as one transaction
on the connection's thread, and then tells everyone who waited. While one commit syncs, the next batch
gathers: no timer, and no delay when idle. What is claimed is a set in memory, because one process owns
the file; after a crash everything unrecorded is simply still pending.

Not here: SQL (`statements.py`), what a transaction does (`commit.py`), the schema (`schema.py`).
"""

import asyncio
import fcntl
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import aiosqlite

from relay.model import Attempt, Delivery, Receipt, State, Submission, Verdict
from relay.outbox import (
    Backlog,
    ConflictError,
    DamagedError,
    FullError,
    HeldError,
    Page,
    Query,
    Story,
    schema,
    statements,
)
from relay.outbox.commit import Batch, Written, write
from relay.outbox.waiting import Waiting

log = logging.getLogger("relay.outbox")

P = ParamSpec("P")
T = TypeVar("T")
Promise = asyncio.Future[Any]

FULL_RETRY_SECONDS = 1.0
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
        self._waiting = {
            endpoint: self._waiting.get(endpoint) or Waiting(number)
            for endpoint, number in self._numbers.items()
        }
        absent = {endpoint: number for endpoint, number in numbers.items() if endpoint not in self._numbers}
        cancelled = {endpoint: await self._cancel(number) for endpoint, number in absent.items()}
        return {endpoint: count for endpoint, count in cancelled.items() if count}

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        self._gathering.batch.accepts.append(submissions)
        accepted: list[Receipt] | ConflictError = await self._promised(self._gathering.accepts)
        if isinstance(accepted, ConflictError):
            raise accepted
        return accepted

    async def claim(self, endpoint: str, limit: int, now_ms: int) -> list[Delivery]:
        waiting = self._waiting[endpoint]
        claimed: list[Delivery] = []
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
                self._waiting[delivery.endpoint].rewind(0)

    async def due(self, endpoint: str) -> int | None:
        waiting = self._waiting[endpoint]
        return 0 if waiting.any_fresh else waiting.due_ms

    def trouble(self) -> str | None:
        return self._trouble

    async def backlog(self) -> dict[str, Backlog]:
        return {
            endpoint: Backlog(pending=self._pending[number], dead=self._dead[number])
            for endpoint, number in self._numbers.items()
        }

    async def events(self, query: Query) -> Page:
        return await self._run(statements.page, query)

    async def story(self, event_id: str) -> Story | None:
        return await self._run(statements.story, event_id)

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
        self._last_seq = await self._run(statements.last_seq)
        pending, dead = await self._run(statements.counts)
        self._pending, self._dead = Counter(pending), Counter(dead)

    async def commit_batches(self) -> None:
        """Write batch after batch until `close`; what is left then is written first."""
        while not self._closing or self._gathering.batch != Batch():
            await self._work.wait()
            self._work.clear()
            gathered, self._gathering = self._gathering, Gathering()
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
            self._waiting[delivery.endpoint].rewind(verdict.due_ms)
            return
        self._pending[delivery.handle[1]] -= 1
        if verdict.state is State.DEAD:
            self._dead[delivery.handle[1]] += 1

    async def _keep_what_must_be_kept(self, gathered: Gathering, error: FullError) -> None:
        """Refuse what can be submitted again; what was met stays here until there is room for it."""
        self._trouble = str(error)
        _break(gathered.accepts + gathered.changes, error)
        if gathered.records:
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

    async def _cancel(self, number: int) -> int:
        cancelled = 0
        while step := await self._change(lambda db: statements.cancel(db, number, CANCEL_STEP)):
            cancelled += step
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
            raise _translated(error, self._path) from error
        return done


def _keep(promises: Sequence[Promise], results: Sequence[Any]) -> None:
    for promise, result in zip(promises, results, strict=True):
        if not promise.done():  # who waited may have been cancelled; what was written stays written
            promise.set_result(result)


def _break(promises: Sequence[Promise], error: BaseException) -> None:
    for promise in promises:
        if not promise.done():
            promise.set_exception(error)


def _translated(error: sqlite3.Error, path: Path) -> Exception:
    """Return what an error of SQLite's means for the outbox; a fault of our own stays what it is."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL":
        return FullError(f"there is no room for {path}: free some, what was accepted stays safe")
    if name.startswith(
        ("SQLITE_IOERR", "SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CANTOPEN", "SQLITE_READONLY")
    ):
        return DamagedError(
            f"{path} cannot be read or written ({error}, {name}): check the disk, then start again"
        )
    return error


@asynccontextmanager
async def open_sqlite(path: Path, *, synchronous: str) -> AsyncIterator[SqliteOutbox]:
    """Hold the file and open it; closed again, with all that waits written, on the way out."""
    with _held(path):
        try:
            db = await aiosqlite.connect(path, isolation_level=None, cached_statements=256)
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        try:
            outbox = SqliteOutbox(db, path)
            await outbox.start(synchronous)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(outbox.commit_batches())
                try:
                    yield outbox
                finally:
                    outbox.close()
        finally:
            await db.close()


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Be the only relay on this outbox: a lock of the kernel's, so a crash cannot leave it behind."""
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be opened ({error.strerror}): check outbox.path and its folder"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise HeldError(f"outbox {path} is held by another relay (process {holder})") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        if not path.exists():
            # Made here so that it is ours alone from its first byte; SQLite has not seen it yet, and
            # its -wal and -shm take over the mode. An existing file is never opened but by SQLite:
            # closing it would drop SQLite's locks in this process.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield
    finally:
        os.close(descriptor)
