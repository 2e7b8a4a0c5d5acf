"""Opening the SQLite outbox: its path in, the verbs out, for as long as it is ours."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiosqlite

from relay.outbox import Bounds, Committed, backup, schema
from relay.outbox.failures import translated
from relay.outbox.holding import held
from relay.outbox.sqlite import SqliteOutbox


@asynccontextmanager
async def open_sqlite(
    path: Path, *, synchronous: str, bounds: Bounds, committed: Committed
) -> AsyncIterator[SqliteOutbox]:
    """Hold the file and open it; closed again, with all that waits written, on the way out."""
    with held(path) as own:
        backup.remove_stale(own.path)
        try:
            await asyncio.to_thread(schema.inspect, own.path)
            # From another thread than its own only a backup uses it, step by step, which SQLite allows.
            db = await aiosqlite.connect(
                own.path, isolation_level=None, cached_statements=256, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise translated(error, own.path) from error
        try:
            outbox = SqliteOutbox(db, own.path, bounds, committed)
            await outbox.start(synchronous)
            own.opened()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(outbox.commit_batches())
                try:
                    yield outbox
                finally:
                    outbox.close()
        finally:
            own.closing()
            await db.close()
