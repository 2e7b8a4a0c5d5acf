"""The outbox in PostgreSQL: what every verb means.

Not here: how what waits is written (`committer.py`, `writing.py`), what moves many deliveries (`changes.py`),
looking (`listing.py`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import orjson

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
    Story,
    UnavailableError,
)
from relay.outbox.postgres import changes, endpoints, listing
from relay.outbox.postgres.bounds import Room
from relay.outbox.postgres.claims import Claims
from relay.outbox.postgres.committer import Committer
from relay.outbox.postgres.endpoints import Taken
from relay.outbox.postgres.links import Links
from relay.outbox.postgres.membership import Membership
from relay.outbox.postgres.waiting import Waiting
from relay.outbox.postgres.watching import Watch
from relay.outbox.postgres.writing import Batch, Record, Written
from relay.outbox.revival import spaced
from relay.outbox.sharing import Sharing
from relay.outbox.waiting import START

log = logging.getLogger("relay.outbox")

EVER_MS = 1 << 62
SPARED_MS = 5_000  # less than a clock that is set right
AWAY_MS = 1_000  # before the next claim while the database is away


class PostgresOutbox:
    """The verbs of `Outbox`; made by `opening.py`, which gives it a group for its tasks."""

    def __init__(
        self,
        links: Links,
        writer: Links,
        listening: Links | None,
        tasks: asyncio.TaskGroup,
        *,
        bounds: Bounds,
        sharing: Sharing,
        committed: Committed,
    ) -> None:
        self._look = links.look
        self._member = Membership(links, sharing)
        self._room = Room(links.name, bounds)
        self._watch = Watch(links, listening, self._member, sharing)
        self._claims = Claims(links, self._member, sharing, tasks, self.release)
        self._committer = Committer(
            writer,
            self._member,
            self._watch,
            self._room,
            epoch=self._claims.epoch,
            settle=self._settle,
            committed=committed,
        )
        self._change = self._committer.change
        self.commit_batches = self._committer.commit_batches
        self.close = self._committer.close
        self.trouble = self._committer.trouble
        self.size = self._room.size
        self.is_current = self._watch.is_current
        self.heed = self._watch.heed
        self.holds = self._claims.holds
        self._waiting: dict[str, Waiting] = {}
        self._forgotten = 0  # how far the walk over old events has come

    # The verbs

    async def register(self, endpoints_: Sequence[str]) -> dict[str, int]:
        taken = await self._change(partial(endpoints.register, ids=endpoints_, relay=self._member.id))
        self._waiting = {}
        self._take(taken, {})
        cancelled = {id_: await self._cancel(number) for id_, number in taken.absent.items()}
        return {id_: count for id_, count in cancelled.items() if count}

    async def endpoints(self) -> list[KeptEndpoint]:
        kept, self._watch.revision = await self._look(partial(endpoints.kept, relay=self._member.id))
        return kept

    async def keep_endpoint(self, endpoint: KeptEndpoint) -> None:
        taken = await self._change(partial(endpoints.keep, endpoint=endpoint, relay=self._member.id))
        self._take(taken, self._committer.numbers)

    async def follow(self, endpoints_: Sequence[str]) -> None:
        self._take(await self._change(partial(endpoints.follow, ids=endpoints_, relay=self._member.id)), {})

    async def drop_endpoint(self, endpoint: str, aside: KeptEndpoint | None = None) -> int:
        before = self._committer.numbers
        number = before[endpoint]
        self._committer.numbers = {id_: each for id_, each in before.items() if id_ != endpoint}
        try:
            drop = partial(endpoints.drop, id_=endpoint, aside=aside, relay=self._member.id)
            over, revision = await self._change(drop)
        except BaseException:
            self._committer.numbers = self._committer.numbers | {endpoint: number}
            raise
        self._member.endpoints = list(self._committer.numbers.values())
        self._waiting.pop(endpoint, None)
        self._watch.revised(revision)
        return await self._cancel(number) if over else 0

    async def keep_health(self, endpoint: str, health: Health) -> None:
        if endpoint in self._waiting:
            number, text = self._waiting[endpoint].number, orjson.dumps(health).decode()
            await self._change(partial(endpoints.keep_health, number=number, health=text))
            self._watch.healths[number] = text

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        return await self._committer.accept(submissions)

    async def claim(
        self, endpoint: str, limit: int, now_ms: int, *, attempt_seconds: float = 0.0
    ) -> list[Delivery]:
        waiting = self._waiting.get(endpoint)
        if waiting is None or limit <= 0 or waiting.due_ms is None or waiting.due_ms > now_ms:
            return []
        waiting.start_look()
        of = (endpoint, waiting.number)
        try:
            claimed = await self._claims.take(of, now_ms, START, limit, attempt_seconds)
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
                of = (endpoint, waiting.number)
                claimed = await self._claims.take(of, EVER_MS, after, 1, attempt_seconds)
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
        version = self._watch.versions[delivery.handle[1]]
        record = Record(delivery, attempt, verdict, health, news, epoch, version)
        told = await self._committer.record(record)
        if told is None:
            self._room.dropped += 1
            event_id, endpoint = delivery.event.id, delivery.endpoint
            log.warning("outcome_dropped", extra={"event_id": event_id, "endpoint": endpoint})
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
            if self._member.alive > 1:  # whose outcomes may be a little younger than our question
                latest_ms += SPARED_MS
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
                due_ms=partial(spaced, now_ms, spacing_ms, revived),
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
        await self._look(self._room.measure)

    async def stop(self) -> None:
        """Be no more one of the relays; what we claimed is free."""
        await self._member.leave()

    async def keep_house(self) -> None:
        """Beat, look what the others do and how large the outbox is; until cancelled."""
        async with asyncio.TaskGroup() as chores:
            beaten = asyncio.Event()

            chores.create_task(self._member.keep_beating(beaten, self._committer))
            chores.create_task(self._watch.look_now_and_then())
            chores.create_task(self._watch.give_hints())
            chores.create_task(self._claims.keep_freeing())
            while True:
                await beaten.wait()
                beaten.clear()
                with suppress(UnavailableError):
                    await self._look(self._room.measure)

    def _settle(self, batch: Batch, written: Written) -> None:
        """Take over what is kept now."""
        for record in batch.records:
            epoch = self._claims.forget(record.delivery)
            if epoch is not None and epoch != record.epoch:  # claimed anew while this was written
                self._committer.release_later((*record.delivery.handle, epoch))
        for endpoint, due_ms in written.due.items():
            self._rewind(endpoint, due_ms)
        if written.due:
            self._watch.hint()
        for record in batch.records:
            number = record.delivery.handle[1]
            if number in written.healths:
                self._watch.concluded(record.delivery.endpoint, number, written)
        self._room.pending += written.pending

    def _take(self, taken: Taken, before: Mapping[str, int]) -> None:
        """Deliver to these too, or, with none before, to no others."""
        # Replaced, not changed: a commit under way goes on with the endpoints it began with.
        self._committer.numbers = numbers = {**before, **taken.numbers}
        self._member.endpoints = list(numbers.values())
        waiting = {id_: self._waiting.get(id_) or Waiting(number) for id_, number in numbers.items()}
        self._waiting = self._watch.waiting = waiting
        self._watch.healths.update(taken.healths)
        self._watch.revised(taken.revision)

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
        self._watch.healths.pop(number, None)
        return cancelled
