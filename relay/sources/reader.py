"""One source: what was committed there is taken, kept in the outbox and deleted, until told to stop.

It sleeps until somebody says that a row was committed, and looks without being told ever more seldom, once a
second at last. A source that does not answer and an outbox that keeps nothing are waited for.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relay.clock import Clock
from relay.ingest import Ingest, InvalidError
from relay.metrics import Metrics
from relay.model import Source, Submission
from relay.outbox import ConflictError, FullError, Outbox, OutboxError
from relay.sources.database import AwayError, Database, MissingError, UnfitError, listening, opened
from relay.sources.rows import USED_BEFORE, Row, Waiting, draft, fitting, in_order, reason, too_large

log = logging.getLogger("relay.sources")

MOST_ROWS = 256  # in one transaction
MOST_BYTES = 4 << 20
LOOK_SECONDS = (0.05, 1.0)  # the shortest, after something was taken, and the longest, doubling
RETRY_SECONDS = (0.25, 15.0)  # the same while the source or the outbox is in trouble
COUNT_SECONDS = 30.0  # between two counts of what was refused
JITTER = 0.2


class Surroundings(Protocol):
    """What all readers share; the API's state is one."""

    ingest: Ingest
    outbox: Outbox
    clock: Clock
    metrics: Metrics
    max_event_size: int  # in bytes, as the config in force has it


@dataclass(slots=True, kw_only=True)
class SourceStanding:
    """How a source stands; `error` is why nothing can be taken from it, since a time, if that is so."""

    error: str | None = None
    since_ms: int | None = None
    refused: int = 0  # rows that wait there for a person


@dataclass(slots=True)
class Pass:
    """What one transaction found, and is to leave behind: rows to delete, and why others were refused."""

    found: int = 0
    more: bool = False  # look again at once
    done: list[int] = field(default_factory=list)
    accepted: int = 0  # of those done, the rest are repeats
    refusals: dict[int, str] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)  # for want of room
    ids: dict[int, str] = field(default_factory=dict)
    full: FullError | None = None


class Reader:
    """Reads one source. `settled_ms`: what was accepted before is known to be deleted there."""

    def __init__(self, source: Source, around: Surroundings, *, own: bool = False) -> None:
        self.source = source
        self.standing = SourceStanding()
        self.settled_ms = 0
        self.ended = asyncio.Event()
        self._own = own  # the database of the outbox, where what is missing is made
        self._around = around
        self._tally = around.metrics.source(source.id)
        self._woken = asyncio.Event()
        self._stopping = False
        self._failures = 0  # in a row
        self._count_at = 0.0

    def stop(self) -> None:
        """Take nothing more; what is in hand is brought to its end."""
        self._stopping = True
        self._woken.set()

    async def run(self) -> None:
        """Read until `stop`, whatever happens to the source or the outbox."""
        while not self._stopping:
            try:
                async with opened(self.source) as database, listening(self.source, self._woken.set):
                    await prepare(database, own=self._own)
                    await self._follow(database)
            except (AwayError, UnfitError, OutboxError) as error:
                self._failing(str(error))
                await self._sleep(min(RETRY_SECONDS[0] * 2**self._failures, RETRY_SECONDS[1]))
        self.ended.set()

    async def _follow(self, database: Database) -> None:
        pause = LOOK_SECONDS[0]
        while not self._stopping:
            # Cleared before the look: what is committed during it must wake us.
            self._woken.clear()
            now_ms = self._around.clock.now_ms()
            passed = await self._take(database) if await database.waits() else Pass()
            # Of a full outbox we have asked for each row; to wait for more would let nothing be forgotten.
            if not passed.more or passed.full is not None:
                self.settled_ms = now_ms
            await self._count(database, at_once=bool(passed.refusals))
            if passed.full is not None:
                raise passed.full
            self._recovered()
            pause = LOOK_SECONDS[0] if passed.done else min(pause * 2, LOOK_SECONDS[1])
            if not passed.more:
                await self._sleep(pause)

    async def _take(self, database: Database) -> Pass:
        """Take what may be taken now, keep it, and delete it or say there why not."""
        passed = Pass()
        async with database.transaction():
            ours = await database.take(MOST_ROWS)
            passed.found = len(ours)
            passed.ids = {each.seq: each.id for each in ours}
            keys = list({each.key for each in ours if each.key is not None})
            every = await database.of_keys(keys, ours[-1].seq) if keys else {}
            small = self._small(in_order(ours, every), passed)
            chosen = fitting(small, MOST_BYTES)
            rows = await database.contents([each.seq for each in chosen]) if chosen else []
            await self._keep(rows, passed)
            await self._recognise(passed)
            await database.settle(passed.done, passed.refusals)
        passed.more = bool(passed.done or passed.refusals) and (
            len(ours) == MOST_ROWS or len(chosen) < len(small)
        )
        self._tell(passed)
        return passed

    def _small(self, waiting: Sequence[Waiting], passed: Pass) -> list[Waiting]:
        """Refuse what is too large to be read at all, and return the others."""
        limit = self._around.max_event_size
        passed.refusals |= {each.seq: too_large(each.size, limit) for each in waiting if each.size > limit}
        return [each for each in waiting if each.size <= limit]

    async def _keep(self, rows: Sequence[Row], passed: Pass) -> None:
        """Let the outbox keep all that can be kept, each with what became of it."""
        submissions: list[tuple[int, Submission]] = []
        for row in rows:
            try:
                submissions.append((row.seq, self._around.ingest.read(draft(row))))
            except InvalidError as error:
                passed.refusals[row.seq] = reason(error)
        while submissions:
            try:
                receipts = await self._around.ingest.keep([each for _, each in submissions])
            except ConflictError as error:
                for index in reversed(error.indexes):
                    seq, _ = submissions.pop(index)
                    passed.refusals[seq] = USED_BEFORE
                continue
            except FullError as error:
                passed.full = error
                passed.left = [seq for seq, _ in submissions]
                return
            passed.done += [seq for seq, _ in submissions]
            passed.accepted = sum(not receipt.duplicate for receipt in receipts)
            return

    async def _recognise(self, passed: Pass) -> None:
        """Be done with what was accepted before a crash, under other rules or while there was room."""
        for seq in (*passed.refusals, *passed.left):
            if await self._around.outbox.story(passed.ids[seq]) is not None:
                passed.done.append(seq)
                passed.refusals.pop(seq, None)

    async def _count(self, database: Database, *, at_once: bool) -> None:
        """Count now and then what was refused and waits for a person."""
        now = self._around.clock.monotonic()
        if at_once or now >= self._count_at:
            self._count_at = now + COUNT_SECONDS
            self.standing.refused = self._tally.waiting = await database.refused()

    def _tell(self, passed: Pass) -> None:
        metrics, refused = self._around.metrics, len(passed.refusals)
        repeats = len(passed.done) - passed.accepted
        metrics.accepted += passed.accepted
        metrics.duplicates += repeats
        self._tally.accepted += passed.accepted
        self._tally.duplicates += repeats
        self._tally.refused += refused
        if refused:
            seq, why = min(passed.refusals.items())
            fields = {"source": self.source.id, "submissions": refused, "reason": why}
            log.warning("submissions_refused", extra={**fields, "event_id": passed.ids[seq]})

    def _failing(self, error: str) -> None:
        self._failures += 1
        if self.standing.error is None:
            self.standing.since_ms = self._around.clock.now_ms()
            self._tally.up = False
            log.warning("source_failing", extra={"source": self.source.id, "error": error})
        self.standing.error = error

    def _recovered(self) -> None:
        self._failures = 0
        self._tally.up = True
        if self.standing.since_ms is not None:
            seconds = max(0, self._around.clock.now_ms() - self.standing.since_ms) / 1000
            log.info("source_recovered", extra={"source": self.source.id, "seconds": seconds})
        self.standing.error = self.standing.since_ms = None

    async def _sleep(self, seconds: float) -> None:
        """Wait for so long, more or less, for several relays must not look in step; or until woken."""
        if self._failures and not self._stopping:
            self._woken.clear()
        spread = 1 + JITTER * (2 * random.random() - 1)  # noqa: S311 - no secret
        try:
            async with asyncio.timeout(seconds * spread):
                await self._woken.wait()
        except TimeoutError:
            pass


async def check(source: Source, *, own: bool = False) -> None:
    """Look once whether a source can be read at all. Raises AwayError, UnfitError."""
    async with opened(source) as database:
        await prepare(database, own=own)


async def prepare(database: Database, *, own: bool) -> None:
    """Make sure that what is read is there: in a database of our own it is made."""
    try:
        await database.check()
    except MissingError:
        if not own:
            raise
        await database.install()
