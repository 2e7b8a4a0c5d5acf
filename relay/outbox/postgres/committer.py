"""The committer: what is to be written comes in, one transaction after the other goes out to the database.

It takes all that waits, writes it as one transaction, and then tells everyone who waited. While one is under
way the next batch gathers. Changes that move many deliveries come after the batch they came with, each in
transactions of its own, so that an outcome that came before a change is written before it.

While the database is away events and changes are refused; outcomes wait here until it is back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

from asyncpg import Connection

from relay.logs import Seldom
from relay.model import Delivery, Receipt, Submission
from relay.outbox import AwayError, Committed, ConflictError, FullError, OutboxError
from relay.outbox.admission import Admission
from relay.outbox.postgres.bounds import Room
from relay.outbox.postgres.links import AgainError, Links
from relay.outbox.postgres.membership import Membership
from relay.outbox.postgres.watching import Watch
from relay.outbox.postgres.writing import Batch, Claim, LapsedError, Ours, Record, Written, write
from relay.outbox.promises import Promise, fail, keep

log = logging.getLogger("relay.outbox")

T = TypeVar("T")
Change = Callable[[Connection], Awaitable[Any]]

RETRY_SECONDS = 0.5  # between two looks whether the database is back
TRIES = 10  # against others that are in the way
GATHERING_PASSES = 3  # of the event loop


@dataclass(slots=True)
class Gathering:
    """The next batch while it gathers, and who waits for what of it."""

    batch: Batch = field(default_factory=Batch)
    accepts: list[Promise] = field(default_factory=list)
    records: list[Promise] = field(default_factory=list)
    releases: list[Promise] = field(default_factory=list)
    changes: list[tuple[Change, Promise]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return self.batch == Batch() and not self.changes


class Committer:
    """Writes what it is given; `settle` is told of each batch that is kept before anyone who waited is.

    `numbers` are the endpoints that events may be accepted for. It is replaced, never changed: a commit under
    way goes on with those it began with.
    """

    def __init__(
        self,
        links: Links,
        member: Membership,
        watch: Watch,
        room: Room,
        *,
        epoch: Callable[[Delivery], int | None],
        settle: Callable[[Batch, Written], None],
        committed: Committed,
    ) -> None:
        self.numbers: dict[str, int] = {}
        self._links = links
        self._member = member
        self._watch = watch
        self._revision = -1  # of the endpoints, as of the last batch
        self._room = room
        self._epoch = epoch
        self._settle = settle
        self._committed = committed
        self._seldom = Seldom()
        self._gathering = Gathering()
        self._work = asyncio.Event()
        self._closing = False
        self._trouble: str | None = None
        self._admission = Admission()

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        """Write events, all or none. Raises ConflictError, FullError, AwayError."""
        self._gathering.batch.accepts.append(submissions)
        accepted: list[Receipt] | ConflictError = await self._promise(self._gathering.accepts)
        if isinstance(accepted, ConflictError):
            raise accepted
        return accepted

    async def record(self, record: Record) -> list[Receipt] | None:
        """Write an outcome and the news of it in one transaction; None: it does not count any more."""
        self._gathering.batch.records.append(record)
        told: list[Receipt] | None = await self._promise(self._gathering.records)
        return told

    async def release(self, claims: Sequence[Claim]) -> None:
        """Hand claims back; while the database is away this returns and they are handed back later."""
        self._gathering.batch.releases += claims
        await self._promise(self._gathering.releases)

    def release_later(self, claim: Claim) -> None:
        """Hand a claim back that nobody waits for."""
        self._gathering.batch.releases.append(claim)
        self._work.set()

    async def change(self, change: Callable[[Connection], Awaitable[T]]) -> T:
        """Run a function, which opens its own transactions, after what waits now is written."""
        promise: Promise = asyncio.get_running_loop().create_future()
        self._gathering.changes.append((change, promise))
        self._work.set()
        result: T = await promise
        return result

    def trouble(self) -> str | None:
        """Say in a sentence why nothing can be kept at the moment, if that is so."""
        return self._trouble or self._room.refusal()

    def close(self) -> None:
        self._closing = True
        self._work.set()

    async def commit_batches(self) -> None:
        """Write batch after batch until `close`; what is left then is written first."""
        while not self._closing or not self._gathering.is_empty:
            await self._work.wait()
            self._work.clear()
            # Whoever is ready at this moment joins; costs nothing when idle, and half the commits when busy.
            for _ in range(GATHERING_PASSES):
                await asyncio.sleep(0)
            gathered, self._gathering = self._gathering, Gathering()
            gathered.batch.accepts, gathered.accepts = self._admission.admit(
                gathered.batch.accepts, gathered.accepts, self._room.refusal
            )
            try:
                await self._commit(gathered)
            except (AwayError, FullError) as error:
                await self._keep_what_must_be_kept(gathered, error)
            except BaseException as error:
                fail([*gathered.accepts, *gathered.records, *gathered.releases], error)
                fail([promise for _, promise in gathered.changes], error)
                raise

    async def _commit(self, gathered: Gathering) -> None:
        batch = gathered.batch
        if batch != Batch():
            begun = perf_counter()
            # As they are held now: what waited for the database may be held by another claim of ours by now.
            batch.records = [
                each._replace(epoch=self._epoch(each.delivery) or each.epoch) for each in batch.records
            ]
            written = await self._written(batch)
            self._committed(perf_counter() - begun, batch.size)
            self.well()
            if self._revision != written.revision:
                self._revision = written.revision
                live = written.numbers
                self.numbers = {id_: each for id_, each in self.numbers.items() if id_ in live}
            self._settle(batch, written)
            keep(gathered.accepts, written.accepted)
            keep(gathered.records, written.told)
            keep(gathered.releases, [None] * len(gathered.releases))
            gathered.batch, gathered.accepts, gathered.records = Batch(), [], []
        while gathered.changes:
            change, promise = gathered.changes[0]
            result = await self._changed(change)
            self.well()
            keep([promise], [result])
            del gathered.changes[0]

    async def _written(self, batch: Batch) -> Written:
        for _ in range(TRIES):
            try:
                async with self._links.link() as link:
                    return await write(link, batch, self._ours())
            except AgainError:
                continue
            except LapsedError:
                await self._member.join_again()
        raise AwayError(f"{self._links.name} is too busy: what was accepted is safe")

    def _ours(self) -> Ours:
        return Ours(
            relay=self._member.id,
            numbers=self.numbers,
            revision=self._revision,
            healths=self._watch.healths,
            versions=self._watch.versions,
        )

    async def _changed(self, change: Change) -> Any:
        for _ in range(TRIES):
            try:
                async with self._links.link() as link:
                    return await change(link)
            except AgainError:
                continue
        raise AwayError(f"{self._links.name} is too busy: what was accepted is safe")

    def well(self) -> None:
        """Note that the database answers."""
        if self._trouble is not None:
            self._trouble = None
            log.info("outbox_back")

    def unwell(self, error: OutboxError) -> None:
        """Note that it does not; said once a minute."""
        self._trouble = str(error)
        if self._seldom.passes("away") is not None:
            log.error("outbox_away", extra={"error": str(error)})

    def _promise(self, promises: list[Promise]) -> Promise:
        promise: Promise = asyncio.get_running_loop().create_future()
        promises.append(promise)
        self._work.set()
        return promise

    async def _keep_what_must_be_kept(self, gathered: Gathering, error: OutboxError) -> None:
        """Refuse what can be asked for again; what was met stays here until it can be written."""
        self.unwell(error)
        fail([*gathered.accepts, *(promise for _, promise in gathered.changes)], error)
        keep(gathered.releases, [None] * len(gathered.releases))
        batch, latest = gathered.batch, self._gathering
        if not batch.records and not batch.releases:
            return
        if self._closing:
            # No more time to wait: what was met is met again by whoever claims it next.
            if batch.records:
                log.error("outcomes_unrecorded", extra={"unrecorded": len(gathered.records)})
            fail(gathered.records, error)
            return
        latest.batch.records = batch.records + latest.batch.records
        latest.batch.releases = batch.releases + latest.batch.releases
        latest.records = gathered.records + latest.records
        self._work.set()
        if not gathered.accepts and not gathered.changes:
            await asyncio.sleep(RETRY_SECONDS)
