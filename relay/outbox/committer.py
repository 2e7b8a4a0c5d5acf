"""The committer: what is to be written comes in, one transaction after the other goes out to the disk.

It takes all that waits (accepts, outcomes, other changes), writes it as one transaction on the connection's
thread, and then tells everyone who waited. While one commit syncs, the next batch gathers: no timer, and no
delay when idle. Nobody else holds the connection in a transaction, and it is never cancelled inside one.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Concatenate, ParamSpec, TypeVar

import aiosqlite

from relay.logs import Seldom
from relay.model import Receipt, Submission
from relay.outbox import Committed, ConflictError, FullError
from relay.outbox.admission import Admission
from relay.outbox.backup import copy
from relay.outbox.commit import Batch, Record, Written, write
from relay.outbox.failures import translated
from relay.outbox.holding import refuse_moved
from relay.outbox.promises import Promise, fail, keep
from relay.outbox.room import Room

log = logging.getLogger("relay.outbox")

P = ParamSpec("P")
T = TypeVar("T")

FULL_RETRY_SECONDS = 1.0
MEASURE_SECONDS = 0.2  # between two looks at how much is used; the reserve is worth many of them
GATHERING_PASSES = 3  # of the event loop


@dataclass(slots=True)
class Gathering:
    """The next batch while it gathers, and who waits for what of it."""

    batch: Batch = field(default_factory=Batch)
    accepts: list[Promise] = field(default_factory=list)
    records: list[Promise] = field(default_factory=list)
    changes: list[Promise] = field(default_factory=list)


class Committer:
    """Writes what it is given; `settle` is told of each batch on disk before anyone who waited is.

    `numbers` are the endpoints that events may be accepted for. It is replaced, never changed: a commit under
    way goes on with those it began with.
    """

    def __init__(
        self,
        db: aiosqlite.Connection,
        path: Path,
        room: Room,
        settle: Callable[[Batch, Written], None],
        committed: Committed,
    ) -> None:
        self.numbers: dict[str, int] = {}
        self.last_seq = 0
        self.inode = 0
        self._loop = asyncio.get_running_loop()
        self._db = db
        self._path = path
        self._room = room
        self._measured_at = -MEASURE_SECONDS
        self._admission = Admission()
        self._settle = settle
        self._committed = committed
        self._seldom = Seldom()
        # What the transaction under way records: in flight until it is over, yet its outcome is written.
        self.recording: frozenset[tuple[int, int]] = frozenset()
        self._gathering = Gathering()
        self._work = asyncio.Event()
        self._closing = False
        self._copies = 0  # under way
        self._trouble: str | None = None

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        """Write events, all or none. Raises ConflictError, FullError."""
        accepted: list[Receipt] | ConflictError = await self._accepted(submissions)
        if isinstance(accepted, ConflictError):
            raise accepted
        return accepted

    async def record(self, record: Record, news: Sequence[Submission]) -> list[Receipt]:
        """Write an outcome and the news of it in one transaction; without room the outcome alone."""
        self._gathering.batch.records.append(record)
        recorded = self._promise(self._gathering.records)
        told = self._accepted(news) if news else None
        if told is not None:
            told.add_done_callback(_heard)  # if the disk fails, it is said once, by `recorded`
        await recorded
        try:
            return list(await told) if told is not None else []
        except FullError as error:
            if self._seldom.passes("untold") is not None:
                log.warning("outbox_full", extra={"untold": len(news), "error": str(error)})
            return []

    async def change(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function inside the next transaction."""
        self._gathering.batch.changes.append(change)
        result: T = await self._promise(self._gathering.changes)
        return result

    async def run(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `function` with the raw connection on its thread: one hop, whatever it does there."""
        try:
            # aiosqlite's public calls hop once for each statement, and a hop costs more than most of them.
            done: T = await self._db._execute(function, self._db._conn, *args, **kwargs)  # type: ignore[no-untyped-call]  # noqa: SLF001
        except sqlite3.Error as error:
            raise translated(error, self._path) from error
        return done

    async def copy(self, to: Path) -> None:
        """Copy everything committed so far into a new file. Raises StoppingError."""
        self._copies += 1
        try:
            await asyncio.to_thread(copy, self._db._conn, to, lambda: self._closing)  # noqa: SLF001 - see `run`
        except sqlite3.Error as error:
            raise translated(error, to) from error
        finally:
            self._copies -= 1
            self._work.set()

    def trouble(self) -> str | None:
        """Say in a sentence why nothing can be kept at the moment, if that is so."""
        return self._trouble or self._room.refusal()

    def close(self) -> None:
        self._closing = True
        self._work.set()

    async def commit_batches(self) -> None:
        """Write batch after batch until `close`; what is left then is written first."""
        while not self._closing or self._copies or self._gathering.batch != Batch():
            await self._work.wait()
            self._work.clear()
            # Whoever is ready at this moment joins; costs nothing when idle, and half the commits when busy.
            for _ in range(GATHERING_PASSES):
                await asyncio.sleep(0)
            gathered, self._gathering = self._gathering, Gathering()
            self._refuse_without_room(gathered)
            begun = perf_counter()
            self.recording = frozenset(record.delivery.handle for record in gathered.batch.records)
            try:
                written = await self.run(
                    write, gathered.batch, self.numbers, self.last_seq, measure=self._is_time_to_measure()
                )
            except FullError as error:
                await self._keep_what_must_be_kept(gathered, error)
            except BaseException as error:
                # Whether the batch is on disk is unknown; only the next start can tell.
                fail(gathered.accepts + gathered.records + gathered.changes, error)
                raise
            else:
                self._committed(perf_counter() - begun, gathered.batch.size)
                self._tell(gathered, written)

    def _accepted(self, submissions: Sequence[Submission]) -> Promise:
        self._gathering.batch.accepts.append(submissions)
        return self._promise(self._gathering.accepts)

    def _promise(self, promises: list[Promise]) -> Promise:
        promise: Promise = self._loop.create_future()
        promises.append(promise)
        self._work.set()
        return promise

    def _refuse_without_room(self, gathered: Gathering) -> None:
        """Refuse new events while only as much room is left as the outcomes of the accepted ones may need.

        Raises DamagedError when the file is not there any more: what is written now would be found by nobody.
        """
        refuse_moved(self._path, self.inode)
        if gathered.batch.accepts:
            of_disk = self._room.refusal_of_disk()
            gathered.batch.accepts, gathered.accepts = self._admission.admit(
                gathered.batch.accepts,
                gathered.accepts,
                lambda more: of_disk or self._room.refusal_of(more),
            )

    def _is_time_to_measure(self) -> bool:
        now = self._loop.time()
        if now - self._measured_at < MEASURE_SECONDS and not self._room.is_near_its_bound():
            return False
        self._measured_at = now
        return True

    def _tell(self, gathered: Gathering, written: Written) -> None:
        """Take over what is on disk now, then tell who waited for it."""
        self._trouble = None
        if written.used_bytes is not None:
            self._room.used_bytes = written.used_bytes
        self.last_seq = written.last_seq
        self._settle(gathered.batch, written)
        keep(gathered.accepts, written.accepted)
        keep(gathered.changes, written.changed)
        keep(gathered.records, [None] * len(gathered.records))

    async def _keep_what_must_be_kept(self, gathered: Gathering, error: FullError) -> None:
        """Refuse what can be submitted again; what was met stays here until there is room for it."""
        self._trouble = str(error)
        fail(gathered.accepts + gathered.changes, error)
        if self._closing:
            # No more time to wait for room: what was met is met again after the next start.
            log.error("outcomes_unrecorded", extra={"unrecorded": len(gathered.records)})
            fail(gathered.records, error)
        elif gathered.records:
            self._gathering.batch.records = gathered.batch.records + self._gathering.batch.records
            self._gathering.records = gathered.records + self._gathering.records
            self._work.set()
            if not gathered.accepts and not gathered.changes:
                if self._seldom.passes("unrecorded") is not None:
                    log.error("outbox_full", extra={"unrecorded": len(gathered.records)})
                await asyncio.sleep(FULL_RETRY_SECONDS)


def _heard(promise: Promise) -> None:
    if not promise.cancelled():
        promise.exception()
