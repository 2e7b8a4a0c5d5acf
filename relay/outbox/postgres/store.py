"""The outbox in PostgreSQL: what every verb means.

Not here: how what waits is written (`committer.py`, `writing.py`), what moves many deliveries (`changes.py`),
looking (`listing.py`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from asyncpg import Connection

from relay.logs import Seldom
from relay.model import Attempt, Delivery, Health, Receipt, Submission, Verdict
from relay.outbox import (
    AwayError,
    Backlog,
    Bounds,
    Committed,
    ElsewhereError,
    Ended,
    KeptEndpoint,
    Page,
    Past,
    Patience,
    Query,
    Sharing,
    Story,
    UnavailableError,
)
from relay.outbox.postgres import changes, endpoints, listing
from relay.outbox.postgres.bounds import BYTES, PENDING, Room
from relay.outbox.postgres.claims import Claims
from relay.outbox.postgres.committer import Committer
from relay.outbox.postgres.links import AgainError, Links
from relay.outbox.postgres.membership import Membership
from relay.outbox.postgres.waiting import Waiting
from relay.outbox.postgres.writing import Batch, Record, Written
from relay.outbox.waiting import START

log = logging.getLogger("relay.outbox")

T = TypeVar("T")

EVER_MS = 1 << 62
AWAY_MS = 1_000  # before the next claim while the database is away


class PostgresOutbox:
    """The verbs of `Outbox`; made by `opening.py`, which gives it a group for its tasks."""

    def __init__(
        self,
        links: Links,
        writer: Links,
        tasks: asyncio.TaskGroup,
        *,
        bounds: Bounds,
        sharing: Sharing,
        committed: Committed,
    ) -> None:
        self._links = links
        self._member = Membership(links, sharing)
        self._room = Room(links.name, bounds)
        self._claims = Claims(links, self._member, tasks, self.release)
        self.holds = self._claims.holds
        self._committer = Committer(writer, self._member, self._room, self._settle, committed)
        self._change = self._committer.change
        self.commit_batches = self._committer.commit_batches
        self.close = self._committer.close
        self.trouble = self._committer.trouble
        self.size = self._room.size
        self._waiting: dict[str, Waiting] = {}
        self._seldom = Seldom()
        self._forgotten = 0  # how far the walk over old events has come

    # The verbs

    async def register(self, endpoints_: Sequence[str]) -> dict[str, int]:
        numbers, absent = await self._change(
            partial(endpoints.register, ids=endpoints_, relay=self._member.id)
        )
        self._committer.numbers = {id_: numbers[id_] for id_ in endpoints_}
        self._member.endpoints = list(self._committer.numbers.values())
        self._waiting = {id_: Waiting(number) for id_, number in self._committer.numbers.items()}
        cancelled = {id_: await self._cancel(number) for id_, number in absent.items()}
        return {id_: count for id_, count in cancelled.items() if count}

    async def endpoints(self) -> list[KeptEndpoint]:
        return await self._look(endpoints.kept)

    async def keep_endpoint(self, endpoint: KeptEndpoint) -> None:
        number = await self._change(partial(endpoints.keep, endpoint=endpoint, relay=self._member.id))
        # Replaced, not changed: a commit under way goes on with the endpoints it began with.
        self._committer.numbers = self._committer.numbers | {endpoint.id: number}
        self._member.endpoints = list(self._committer.numbers.values())
        self._waiting.setdefault(endpoint.id, Waiting(number))

    async def drop_endpoint(self, endpoint: str, aside: KeptEndpoint | None = None) -> int:
        before = self._committer.numbers
        number = before[endpoint]
        self._committer.numbers = {id_: each for id_, each in before.items() if id_ != endpoint}
        try:
            await self._change(partial(endpoints.drop, id_=endpoint, aside=aside, relay=self._member.id))
        except BaseException:
            self._committer.numbers = self._committer.numbers | {endpoint: number}
            raise
        self._member.endpoints = list(self._committer.numbers.values())
        self._waiting.pop(endpoint, None)
        return await self._cancel(number)

    async def keep_health(self, endpoint: str, health: Health) -> None:
        if endpoint in self._waiting:
            number = self._waiting[endpoint].number
            await self._change(partial(endpoints.keep_health, number=number, health=health))

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        return await self._committer.accept(submissions)

    async def claim(
        self, endpoint: str, limit: int, now_ms: int, *, attempt_seconds: float = 0.0
    ) -> list[Delivery]:
        waiting = self._waiting.get(endpoint)
        if waiting is None or limit <= 0 or waiting.due_ms is None or waiting.due_ms > now_ms:
            return []
        waiting.start_look()
        place = (endpoint, waiting.number)
        try:
            claimed = await self._claims.take(place, now_ms, START, limit, attempt_seconds)
        except AwayError as error:
            self._committer.unwell(error)
            waiting.rewind(now_ms + AWAY_MS)
            return []
        except BaseException:
            waiting.rewind(0)
            raise
        full = len(claimed) == limit
        waiting.end_look(now_ms if full else await self._claims.next_due(waiting.number, now_ms))
        return sorted(claimed, key=lambda each: (each.due_ms, each.handle))

    async def probe(self, endpoint: str, *, attempt_seconds: float = 0.0) -> Delivery | None:
        waiting = self._waiting.get(endpoint)
        if waiting is None:
            return None
        for after in (waiting.probed, START):
            try:
                place = (endpoint, waiting.number)
                claimed = await self._claims.take(place, EVER_MS, after, 1, attempt_seconds)
            except AwayError as error:
                self._committer.unwell(error)
                return None
            if claimed:
                waiting.probed = (claimed[0].due_ms, claimed[0].handle[0])
                return claimed[0]
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
        epoch = self._claims.epoch(delivery)
        if epoch is None:
            return []
        record = Record(delivery, attempt, verdict, health, news, epoch)
        told = await self._committer.record(record)
        if told is None and self._seldom.passes("dropped") is not None:
            event_id = delivery.event.id
            log.warning("outcome_dropped", extra={"event_id": event_id, "endpoint": delivery.endpoint})
        return told or []

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        claims = [
            (*each.handle, epoch) for each in deliveries if (epoch := self._claims.forget(each)) is not None
        ]
        if claims:
            await self._committer.release(claims)
            for each in deliveries:
                self._rewind(each.endpoint, 0)

    async def due(self, endpoint: str) -> int | None:
        waiting = self._waiting.get(endpoint)
        return waiting.due_ms if waiting is not None else None

    async def expire(self, endpoint: str, before_ms: int, age_from_ms: int, now_ms: int) -> Patience:
        waiting = self._waiting.get(endpoint)
        if waiting is None:
            return Patience(expired=(), more=False, oldest_ms=None)
        step = await self._change(
            partial(
                changes.expire,
                relay=self._member.id,
                number=waiting.number,
                after=waiting.aged,
                before_ms=before_ms,
                age_from_ms=age_from_ms,
                now_ms=now_ms,
            )
        )
        oldest_ms = min(
            (each for each in (waiting.aged_ms, step.oldest_ms) if each is not None), default=None
        )
        waiting.aged, waiting.aged_ms = (step.after, oldest_ms) if step.after is not None else (0, None)
        if step.expired:
            self._room.pending -= len(step.expired)
            waiting.rewind(0)  # the next of a key may go
        return Patience(expired=tuple(step.expired), more=step.after is not None, oldest_ms=oldest_ms)

    async def advance(self, endpoint: str, latest_ms: int, now_ms: int) -> None:
        waiting = self._waiting.get(endpoint)
        if waiting is not None:
            step = partial(changes.advance, number=waiting.number, now_ms=now_ms, latest_ms=latest_ms)
            while await self._change(step):
                pass
            waiting.rewind(0)

    async def postpone(self, endpoint: str, before_ms: int, now_ms: int) -> None:
        waiting = self._waiting.get(endpoint)
        if waiting is not None:
            step = partial(changes.postpone, number=waiting.number, before_ms=before_ms, now_ms=now_ms)
            while await self._change(step):
                pass
            waiting.rewind(0)

    async def last_seen(self) -> int | None:
        return await self._look(listing.last_seen)

    async def count(self, ended: Ended) -> int:
        counted, after = 0, 0
        while True:
            found, reached = await self._look(
                partial(changes.find, ended=ended, number=self._number(ended), after=after)
            )
            counted += len(found)
            if reached is None:
                return counted
            after = reached

    async def revive(self, ended: Ended, now_ms: int, spacing_ms: float = 0.0) -> int:
        revived, after = 0, 0
        while True:
            step = partial(
                changes.revive,
                relay=self._member.id,
                ended=ended,
                number=self._number(ended),
                after=after,
                now_ms=now_ms,
                due_ms=partial(_spaced, now_ms, spacing_ms, revived),
            )
            count, reached = await self._change(step)
            revived += count
            self._room.pending += count
            for waiting in self._waiting.values():
                waiting.rewind(now_ms)
                waiting.aged = 0
            if reached is None:
                return revived
            after = reached

    async def backlog(self) -> dict[str, Backlog]:
        return await self._look(partial(listing.backlog, numbers=self._committer.numbers))

    async def pasts(self) -> dict[str, Past]:
        return await self._look(listing.pasts)

    async def events(self, query: Query) -> Page:
        return await self._look(partial(listing.page, query=query))

    async def story(self, event_id: str) -> Story | None:
        return await self._look(partial(listing.story, event_id=event_id))

    async def forget(self, before_ms: int, limit: int) -> bool:
        reached = await self._change(
            partial(
                changes.forget,
                relay=self._member.id,
                before_ms=before_ms,
                after=self._forgotten,
                limit=limit,
            )
        )
        self._forgotten = reached or 0
        return reached is not None

    async def shrink(self) -> bool:
        return False  # autovacuum's business

    @asynccontextmanager
    async def backup(self) -> AsyncIterator[Path]:
        raise ElsewhereError("the outbox is in PostgreSQL: back it up there, as with pg_dump --schema=relay")
        yield  # type: ignore[unreachable]

    # How they are done

    async def start(self) -> None:
        """Become one of the relays and read what is kept in memory."""
        await self._member.join()
        await self.measure()

    async def stop(self) -> None:
        """Be no more one of the relays; what we claimed is free."""
        await self._member.leave()

    async def keep_house(self) -> None:
        """Beat, and look now and then how large the outbox is; until cancelled."""
        async with asyncio.TaskGroup() as chores:
            beaten = asyncio.Event()
            chores.create_task(self._member.keep_beating(beaten))
            while True:
                await beaten.wait()
                beaten.clear()
                with suppress(UnavailableError, AgainError):
                    await self.measure()

    async def measure(self) -> None:
        """Look how large the outbox is."""
        async with self._links.link() as link:
            self._room.bytes = await link.fetchval(BYTES)
            self._room.pending = await link.fetchval(PENDING)

    async def _look(self, look: Callable[[Connection], Awaitable[T]]) -> T:
        """Read with a connection to ourselves; a connection that had died while idle is no answer."""
        for _ in range(2):
            try:
                async with self._links.link() as link:
                    return await look(link)
            except AgainError:
                continue
        raise AwayError(f"{self._links.name} is too busy: what was accepted is safe")

    def _settle(self, batch: Batch, written: Written) -> None:
        """Take over what is kept now."""
        for record in batch.records:
            self._claims.forget(record.delivery)
        for endpoint, due_ms in written.due.items():
            self._rewind(endpoint, due_ms)
        self._room.pending += written.pending

    def _rewind(self, endpoint: str, due_ms: int) -> None:
        if endpoint in self._waiting:
            self._waiting[endpoint].rewind(due_ms)

    def _number(self, ended: Ended) -> int | None:
        """Return the number of the endpoint that is meant, one that nobody has if it is gone by now."""
        return self._committer.numbers.get(ended.endpoint, 0) if ended.endpoint is not None else None

    async def _cancel(self, number: int) -> int:
        cancelled = 0
        step = partial(changes.cancel, relay=self._member.id, number=number)
        while count := await self._change(step):
            cancelled += count
        self._room.pending -= cancelled
        return cancelled


def _spaced(first_ms: int, spacing_ms: float, before: int, index: int) -> int:
    """Return when the next of so many is due, one `spacing_ms` after the other."""
    return first_ms + round((before + index) * spacing_ms)
