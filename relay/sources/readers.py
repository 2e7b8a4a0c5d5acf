"""All sources: a reader for each, in one TaskGroup; sources come and go while the others are read."""

import asyncio
from collections.abc import Sequence

from relay.model import Secret, Source
from relay.sources.database import AwayError
from relay.sources.reader import Reader, SourceStanding, Surroundings, check

OWN, OWN_SCHEMA = "outbox", "relay"  # how the outbox's own database is called, and where its tables are
CHECK_SECONDS = 2.0  # what a start or a reload waits for a source that does not answer
STOP_SECONDS = 5.0
# How long after a look another relay may still hold what it has accepted: longer than a database lets it.
MARGIN_MS = 300_000


class Readers:
    """Reads all sources; the outbox's own database is one, where it has one."""

    def __init__(
        self, around: Surroundings, sources: Sequence[Source] = (), *, own: Secret | None = None
    ) -> None:
        self._around = around
        self._own = Source(id=OWN, url=own, schema=OWN_SCHEMA) if own is not None else None
        self._readers = {each.id: self._made(each) for each in self._with_own(sources)}
        self._tasks: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()

    def standings(self) -> dict[str, SourceStanding]:
        """Tell how each source stands, by its id."""
        return {id_: each.standing for id_, each in self._readers.items()}

    def settled_ms(self) -> int:
        """Return since when something accepted may still wait in a source, to be taken a second time."""
        settled = (each.settled_ms - MARGIN_MS for each in self._readers.values())
        return min(settled, default=self._around.clock.now_ms())

    async def check(self, sources: Sequence[Source]) -> None:
        """Look whether sources that are new can be read; who is away may come later. Raises UnfitError."""
        known = {each.source for each in self._readers.values()} if self._tasks is not None else set()
        for each in self._with_own(sources):
            if each not in known:
                await self._check(each)

    async def follow(self, sources: Sequence[Source]) -> None:
        """Read these from now on, and no others; those that stay the same notice nothing."""
        wanted = {each.id: each for each in self._with_own(sources)}
        for id_, reader in list(self._readers.items()):
            if wanted.get(id_) != reader.source:
                del self._readers[id_]
                await self._end(reader)
        self._around.metrics.keep_sources(wanted.keys())
        for each in wanted.values():
            if each.id not in self._readers:
                reader = self._readers[each.id] = self._made(each)
                self._begin(reader)

    async def run(self) -> None:
        """Read until `stop`; a fault of our own in one reader ends all, loudly."""
        async with asyncio.TaskGroup() as self._tasks:
            for reader in self._readers.values():
                self._begin(reader)
            await self._stop.wait()  # also with no source at all

    async def stop(self) -> None:
        """Take nothing more, and wait a little for what is in hand."""
        self._stop.set()
        for reader in self._readers.values():
            reader.stop()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                for reader in self._readers.values():
                    await reader.ended.wait()
        except TimeoutError:
            pass  # what is not deleted is recognised at the next start

    def _made(self, source: Source) -> Reader:
        return Reader(source, self._around, own=source is self._own)

    def _with_own(self, sources: Sequence[Source]) -> list[Source]:
        return [*sources, self._own] if self._own is not None else list(sources)

    def _begin(self, reader: Reader) -> None:
        if self._tasks is None or self._stop.is_set():
            reader.ended.set()  # it never begins, or not yet
        else:
            reader.ended.clear()
            self._tasks.create_task(reader.run(), name=f"source {reader.source.id}")

    async def _check(self, source: Source) -> None:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await check(source, own=source is self._own)
        except (AwayError, TimeoutError):
            pass  # its reader says so, and waits for it

    async def _end(self, reader: Reader) -> None:
        reader.stop()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await reader.ended.wait()
        except TimeoutError:
            pass
