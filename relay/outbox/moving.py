"""Moving an outbox from its SQLite file into PostgreSQL: a path and an address in, both sides' counts out.

The file is held all the while, as a relay holds it, and what is in it stays as it is. How a move goes on is
in `postgres/move.py`.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from relay.model import Secret
from relay.outbox import OutboxError, backup, moved, schema
from relay.outbox.failures import translated
from relay.outbox.holding import held


class Moved(NamedTuple):
    """What the file holds, and what the database does."""

    file: str
    place: str
    before: dict[str, int]
    after: dict[str, int] | None  # None: an earlier move had brought all, and relays may have worked since

    @property
    def whole(self) -> bool:
        return self.after is None or self.after == self.before


async def move(path: Path, to: Secret, tell: Callable[[str], None]) -> Moved:
    """Move all there is, or what an earlier move has left; `tell` hears how far it is. Raises OutboxError.

    If it is not whole at the end, no relay starts on the database, and the file is an outbox as before.
    """
    try:
        from relay.outbox.postgres.move import Move
    except ImportError as error:
        if error.name != "asyncpg":
            raise
        raise OutboxError("relay move needs the extra: pip install relay[postgres]") from None
    with _opened(path) as (file, db):
        return await Move(file, db, to, tell).run()


def undo(path: Path) -> str | None:
    """Let the file be an outbox again, as it was when it was moved; return where it had gone."""
    with _opened(path) as (_, db):
        note = moved.read(db)
        if note is None:
            return None
        moved.undo(db, schema.APPLICATION_ID)
        return note.place


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Path, sqlite3.Connection]]:
    """Hold the file and open it, moved or not, for this thread alone. Raises OutboxError."""
    if not path.exists():  # to hold it would be to make it
        raise OutboxError(f"{path.resolve()} is not there: check outbox.path")
    with held(path) as own:
        backup.remove_stale(own.path)
        try:
            schema.inspect(own.path, moving=True)
            db = sqlite3.connect(own.path, isolation_level=None)
            try:
                schema.prepare(db, str(own.path), moving=True)
                own.opened()
                yield own.path, db
            finally:
                own.closing()
                db.close()
        except sqlite3.Error as error:
            raise translated(error, own.path) from error
