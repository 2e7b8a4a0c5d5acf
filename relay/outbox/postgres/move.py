"""One move into the database, or the rest of one: which step comes when, and who is refused.

Both sides note the move, batches go over, both sides are compared, the file is marked as moved, relays are
let in. So there are never two outboxes that a relay would start on, and wherever a move ends, the next one
goes on.
"""

import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

from asyncpg import Connection

from relay.model import Secret
from relay.outbox import MovedError, OutboxError, moved
from relay.outbox.moving import Moved
from relay.outbox.postgres import arrival, schema
from relay.outbox.postgres.arrival import Stand
from relay.outbox.postgres.links import AgainError, Links

STEP_SECONDS = 300.0  # for a batch or a migration
LONG_SECONDS = 6 * 3600.0  # for what looks at everything there is


class Move:
    """A move of the outbox in `db`, which is held."""

    def __init__(self, file: Path, db: sqlite3.Connection, to: Secret, tell: Callable[[str], None]) -> None:
        self._file = file
        self._db = db
        self._links = Links(to, 1)
        self._tell = tell
        self._note = moved.read(db)

    async def run(self) -> Moved:
        try:
            return await self._run()
        except AgainError as error:
            raise OutboxError(
                f"somebody else writes to {self._links.name} ({error}): see who, then start the move again"
            ) from error
        finally:
            self._links.close()

    async def _run(self) -> Moved:
        name = self._links.name
        self._tell(f"counting what is in {self._file}")
        before = arrival.counts_of(self._db)
        async with self._links.link(STEP_SECONDS) as link:
            self._refuse(await arrival.stand(link, self._note and self._note.token))
            await schema.prepare(link, name)
            token = await self._begin(link)
        if token is None:
            return Moved(str(self._file), name, before, None)
        await self._bring(token, before["events"])
        self._tell("comparing both sides")
        async with self._links.link(LONG_SECONDS) as link:
            await arrival.settle(link, self._db)
            done = Moved(str(self._file), name, before, await arrival.counts(link))
            if done.whole:
                moved.end(self._db)  # before relays are let in there, none starts here any more
                await arrival.finish(link, token)
        return done

    async def _begin(self, link: Connection) -> str | None:
        """Note the move on both sides; return its token, None if all is there already."""
        async with link.transaction():
            await arrival.lock(link)
            stand = await arrival.stand(link, self._note and self._note.token)
            self._refuse(stand)
            token = self._note.token if self._note is not None else ""
            source = f"{socket.gethostname()}:{self._file}"
            if stand is Stand.NOTHING:
                token = moved.begin(self._db, self._links.name)
                await arrival.begin(link, token, source)
            elif self._note is not None and self._note.changed:
                await arrival.begin(link, token, source)
        if self._note is not None and self._note.changed:
            moved.begin_anew(self._db)
        return token if stand is not Stand.ALL else None

    async def _bring(self, token: str, events: int) -> None:
        async with self._links.link(LONG_SECONDS) as link:
            here = await arrival.reached(link, token, self._db)
        while True:
            async with self._links.link(STEP_SECONDS) as link:
                count = await arrival.bring(link, token, self._db)
            if not count:
                return
            here += count
            self._tell(f"{here} of {events} events")

    def _refuse(self, stand: Stand) -> None:
        """Raise unless the database is empty, or what it holds is of this move."""
        name, over = self._links.name, self._note is not None and self._note.over
        if stand is Stand.OTHER or (stand is Stand.ALL and not over):
            raise OutboxError(f"{name} holds an outbox already: name an empty database")
        if stand is Stand.OTHER_PART:
            raise MovedError(
                f"{name} holds a part of another outbox: finish that move, or drop the schema relay there"
            )
        if stand is Stand.NOTHING and self._note is not None and over:
            raise MovedError(
                f"{self._file} was moved to {self._note.place}: relay move --undo takes that back first"
            )
