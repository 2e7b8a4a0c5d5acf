"""Being one of the relays on an outbox: a row that beats for as long as we live; and burying the dead.

All times are the database's, so no two relays can disagree about them. How long our own row holds we know by
our own clock, counted from before the beat was sent: before then nobody may take what we hold.
"""

import asyncio
import logging
import os
import random
import socket
import time
from datetime import timedelta
from typing import Protocol

from asyncpg import Connection

from relay.outbox import OutboxError, UnavailableError
from relay.outbox.postgres import schema
from relay.outbox.postgres.links import AgainError, Links, transaction
from relay.outbox.sharing import Sharing

log = logging.getLogger("relay.outbox")

JOIN = (
    "INSERT INTO relay.relays (id, name, beat_at)"
    " VALUES (nextval('relay.relay_numbers'), $1, clock_timestamp()) RETURNING id, revision"
)
HOLD = "INSERT INTO relay.holders (relay, endpoint) SELECT $1, unnest($2::int[]) ON CONFLICT DO NOTHING"
BEAT = "UPDATE relay.relays SET beat_at = clock_timestamp() WHERE id = $1 RETURNING revision"
OTHERS = (
    "SELECT id, name, extract(epoch FROM clock_timestamp() - beat_at)::float8 AS age FROM relay.relays"
    " WHERE id <> $1"
)
BURY = "DELETE FROM relay.relays WHERE id = $1 AND beat_at <= clock_timestamp() - $2::interval RETURNING id"
LAPSED = (
    "DELETE FROM relay.claims c WHERE until < clock_timestamp()"
    " OR NOT EXISTS (SELECT 1 FROM relay.relays r WHERE r.id = c.relay) RETURNING event"
)
# What a change of endpoints, or of counts, wrote for a relay that was buried meanwhile.
STRAYS = """
    SELECT DISTINCT left_over.relay FROM (
        SELECT relay FROM relay.holders UNION SELECT relay FROM relay.tallies WHERE relay <> 0
    ) left_over
    WHERE NOT EXISTS (SELECT 1 FROM relay.relays r WHERE r.id = left_over.relay)"""
# What it counted is added up under 0, so that there are not ever more rows to add up.
FOLD = """
    WITH gone AS (DELETE FROM relay.tallies WHERE relay = $1 RETURNING *)
    INSERT INTO relay.tallies AS t (endpoint, relay, pending, dead, last_success_at, last_failure_at,
        last_error)
    SELECT endpoint, 0, pending, dead, last_success_at, last_failure_at, last_error FROM gone
    ORDER BY endpoint
    ON CONFLICT (endpoint, relay) DO UPDATE SET
        pending = t.pending + excluded.pending,
        dead = t.dead + excluded.dead,
        last_success_at = greatest(excluded.last_success_at, t.last_success_at),
        last_error = CASE WHEN excluded.last_failure_at >= coalesce(t.last_failure_at, 0)
            THEN excluded.last_error ELSE t.last_error END,
        last_failure_at = greatest(excluded.last_failure_at, t.last_failure_at)"""


class Told(Protocol):
    """Who wants to know how the database is."""

    def well(self) -> None: ...

    def unwell(self, error: OutboxError) -> None: ...


class Membership:
    """Our own row among the relays."""

    def __init__(self, links: Links, sharing: Sharing) -> None:
        self.id = 0
        self.revision = 0  # of the endpoints, as of the latest beat
        self.endpoints: list[int] = []  # that we deliver to
        self.alive = 1  # relays, we among them
        self._links = links
        self._beat_seconds = sharing.beat_seconds
        self._dead_seconds = sharing.dead_seconds
        self._joining = asyncio.Lock()
        self._holds_until = 0.0
        self._spares_until = 0.0  # others, that may have been kept from beating as we were
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def holds(self) -> bool:
        """Tell whether nobody can take us for dead yet."""
        return time.monotonic() < self._holds_until

    async def join(self) -> None:
        """Become one of the relays, under a number that none had before."""
        begun = time.monotonic()
        async with self._links.link() as link:
            async with transaction(link):
                number, self.revision = await link.fetchrow(JOIN, self._name)
                await schema.refuse_part(link, self._links.name)  # a move locks out who joins, then looks
                await link.execute(HOLD, number, self.endpoints)
            self.id = number
            self._holds_until = begun + self._dead_seconds
            await self._rescue(link)

    async def join_again(self) -> None:
        """Join after others took us for dead, once, whoever finds it out."""
        lapsed = self.id
        async with self._joining:
            if self.id == lapsed:
                log.warning("relay_lapsed", extra={"relay": lapsed})
                await self.join()

    async def leave(self) -> None:
        """Hand back what is claimed and be no more."""
        async with self._links.link() as link, transaction(link):
            if await link.fetchval("DELETE FROM relay.relays WHERE id = $1 RETURNING id", self.id):
                await _inherit(link, self.id)

    async def beat(self) -> float:
        """Say that we live, and free what the dead hold; return in how many seconds to do so again."""
        begun = time.monotonic()
        if begun > self._holds_until - self._dead_seconds / 2:
            # So late that the others may be, too: while the database was away nobody could beat.
            self._spares_until = begun + self._dead_seconds
        rest = self._beat_seconds
        async with self._links.link() as link:
            revision = await link.fetchval(BEAT, self.id)
            if revision is not None:
                self.revision = revision
                self._holds_until = begun + self._dead_seconds
                rest = await self._rescue(link)
        if revision is None:
            await self.join_again()
        return rest * random.uniform(0.8, 1.0)  # noqa: S311 - so that not all come at once

    async def keep_beating(self, beaten: asyncio.Event, told: Told) -> None:
        """Beat until cancelled; `told` hears each time that it could be done, or why not."""
        while True:
            rest = self._beat_seconds / 5
            try:
                rest = await self.beat()
            except AgainError:
                pass
            except UnavailableError as error:
                told.unwell(error)
            else:
                told.well()
                beaten.set()
            await asyncio.sleep(rest)

    async def _rescue(self, link: Connection) -> float:
        """Bury who is dead, and free claims that lapsed; return in how many seconds the next may be dead."""
        others = await link.fetch(OTHERS, self.id)
        rest = self._beat_seconds
        self.alive = 1
        for relay, name, age in others:
            left = self._dead_seconds - age
            spared = self._spares_until - time.monotonic()
            if left > 0 or spared > 0:
                rest = min(rest, max(left, spared, 0.01))
                self.alive += left > 0
            elif await self._bury(link, relay):
                log.warning("relay_buried", extra={"relay": relay, "host": name})
        if lapsed := await link.fetch(LAPSED):
            log.warning("claims_lapsed", extra={"deliveries": len(lapsed)})
        for (relay,) in await link.fetch(STRAYS):
            async with transaction(link):
                await _inherit(link, relay)
        return rest

    async def _bury(self, link: Connection, relay: int) -> bool:
        async with transaction(link):
            dead = timedelta(seconds=self._dead_seconds)
            if await link.fetchval(BURY, relay, dead) is None:
                return False  # it beat again, or somebody else was first
            await _inherit(link, relay)
        return True


async def _inherit(link: Connection, relay: int) -> None:
    """Take over from a relay that is no more: what it claimed is free."""
    await link.execute("DELETE FROM relay.claims WHERE relay = $1", relay)
    await link.execute("DELETE FROM relay.holders WHERE relay = $1", relay)
    await link.execute(FOLD, relay)
