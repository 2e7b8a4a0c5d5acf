"""Looking what the other relays did: when something falls due, how endpoints stand, who shares their pace.

A look comes after about a second, or when another relay says that it would find something: by NOTIFY, at most
once in a while, over a connection of our own. That is a hint and no more: it is lost whenever a connection
breaks, and behind a pooler it never comes. LISTEN and NOTIFY are PostgreSQL's own; where they fail there are
only the looks.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from asyncpg import Connection

from relay.outbox import OutboxError, UnavailableError
from relay.outbox.postgres import statements
from relay.outbox.postgres.links import BROKEN, AgainError, Links
from relay.outbox.postgres.membership import Membership
from relay.outbox.postgres.waiting import Waiting
from relay.outbox.postgres.writing import Written
from relay.outbox.sharing import Neighbours, Share, Sharing
from relay.outbox.statements import read_health

CHANNEL = "relay_outbox"
REST_SECONDS = 0.1  # between two looks, and between two hints


class Watch:
    """Looks, and tells `neighbours` what it found; `waiting` is the store's own memory."""

    def __init__(self, links: Links, listening: Links | None, member: Membership, sharing: Sharing) -> None:
        self.neighbours: Neighbours | None = None
        self.waiting: Mapping[str, Waiting] = {}
        self.revision: int | None = None  # of the endpoints as they were last read
        self.healths: dict[int, str | None] = {}  # by the endpoint's number, as last read or written
        self.versions: Counter[int] = Counter()  # of those, risen with each that another relay wrote
        self._links = links
        self._listening = listening
        self._member = member
        self._look_seconds = sharing.look_seconds
        self._hinted = asyncio.Event()
        self._to_hint = asyncio.Event()
        self._ear: Connection | None = None

    def heed(self, neighbours: Neighbours) -> None:
        """Tell these from now on, and at once what there is to tell: which part of the pace is ours."""
        self.neighbours = neighbours
        self._hinted.set()

    def hint(self) -> None:
        """Let the others know that something is due now."""
        if self._member.alive > 1:
            self._to_hint.set()

    async def look_now_and_then(self) -> None:
        """Look until cancelled."""
        try:
            while True:
                with suppress(UnavailableError, AgainError):
                    await self._look()
                await self._listen()
                await asyncio.sleep(REST_SECONDS)
                try:
                    async with asyncio.timeout(self._look_seconds * random.uniform(0.7, 1.3)):  # noqa: S311
                        await self._hinted.wait()
                except TimeoutError:
                    pass
                self._hinted.clear()
        finally:
            if self._ear is not None:
                self._ear.terminate()

    async def give_hints(self) -> None:
        """Tell the others when something is due; until cancelled."""
        while True:
            await self._to_hint.wait()
            self._to_hint.clear()
            with suppress(OutboxError, AgainError):
                async with self._links.link() as link:
                    await link.execute("SELECT pg_notify($1, $2)", CHANNEL, str(self._member.id))
            await asyncio.sleep(REST_SECONDS)

    async def _look(self) -> None:
        told, waiting, before = self.neighbours, dict(self.waiting), dict(self.healths)
        if told is None:
            return
        numbers = [each.number for each in waiting.values()]
        async with self._links.link() as link:
            revision = await link.fetchval(statements.REVISION, self._member.id)
            found = await link.fetch(statements.LOOK, numbers, self._member.id)
        rows = {row["endpoint"]: row for row in found}
        woken = [id_ for id_, each in waiting.items() if _finds(each, rows.get(each.number))]
        if woken:
            told.woken(woken)
        for id_, each in waiting.items():
            if row := rows.get(each.number):
                told.shared(id_, Share(relays=max(1, row["relays"]), place=row["place"]))
                if self.healths.get(each.number) == before.get(each.number):  # else this is older
                    self.stands(id_, each.number, row["health"])
        if not all(row["ours"] for row in found):  # we joined anew while endpoints were changed
            self.revision = None
        if revision is not None and revision != self.revision:
            told.changed()

    def stands(self, endpoint: str, number: int, health: str | None) -> None:
        """Take note how an endpoint stands, and tell if another relay has found that out."""
        if self.healths.get(number) != health:
            self.healths[number] = health
            self.versions[number] += 1
            if self.neighbours is not None:
                self.neighbours.stood(endpoint, read_health(health))

    def concluded(self, endpoint: str, number: int, written: Written) -> None:
        """Take note how an endpoint stands: as we have written, or as another relay had before us."""
        stands = written.healths[number]
        if stands == written.concluded[number]:
            self.healths[number] = stands
        else:
            self.stands(endpoint, number, stands)

    def revised(self, revision: int | None) -> None:
        """Take note of a change of our own; if others changed something meanwhile, we have yet to read it."""
        if self.revision is not None and revision is not None and revision == self.revision + 1:
            self.revision = revision

    async def is_current(self) -> bool:
        """Tell whether endpoints are as we read them last."""
        async with self._links.link() as link:
            return await link.fetchval(statements.REVISION, self._member.id) in {None, self.revision}

    async def _listen(self) -> None:
        if self._listening is None or (self._ear is not None and not self._ear.is_closed()):
            return
        with suppress(OutboxError, *BROKEN):
            self._ear = await self._listening.open()
            await self._ear.add_listener(CHANNEL, self._heard)

    def _heard(self, _link: object, _pid: int, _channel: str, relay: Any) -> None:
        if relay != str(self._member.id):
            self._hinted.set()


def _finds(waiting: Waiting, row: Any | None) -> bool:
    """Take note of what falls due earlier than we knew; tell whether something does."""
    due_ms = row["due"] if row is not None else None
    if due_ms is None or (waiting.due_ms is not None and waiting.due_ms <= due_ms):
        return False
    waiting.rewind(due_ms)
    return True
