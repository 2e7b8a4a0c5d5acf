"""A consistent copy of a live outbox, made step by step while the relay goes on.

The copy is made over the outbox's own connection, from a thread beside its own: SQLite's backup holds the
connection for one small step at a time, and what is committed between two steps it copies too. A second
connection would see a snapshot as well, but keep the log ahead of the file from being used anew.
"""

import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from relay.outbox import StoppingError

STEP_PAGES = 64  # under a millisecond
REST_SECONDS = 0.002  # between two steps, so that commits get their turn


def copy(db: sqlite3.Connection, to: Path, stopped: Callable[[], bool]) -> None:
    """Copy the outbox to a new file, ours alone to read. Blocks; raises StoppingError, sqlite3.Error."""

    def rest(_status: int, _remaining: int, _total: int) -> None:
        if stopped():
            raise StoppingError("the relay is stopping: the backup was given up")
        time.sleep(REST_SECONDS)

    os.close(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        target = sqlite3.connect(to)
        try:
            target.execute("PRAGMA synchronous = OFF")  # whoever takes the copy away syncs it
            # `sleep` is for a step that comes amid a commit.
            db.backup(target, pages=STEP_PAGES, progress=rest, sleep=REST_SECONDS)
        finally:
            target.close()
    except BaseException:
        remove(to)
        raise


def beside(outbox: Path) -> Path:
    """Return a new name for a copy."""
    return outbox.with_name(f"{outbox.name}.backup-{secrets.token_hex(4)}")


def remove_stale(outbox: Path) -> None:
    """Remove copies that a relay did not live to remove."""
    for left in outbox.parent.glob(f"{outbox.name}.backup-*"):
        left.unlink(missing_ok=True)


def remove(copied: Path) -> None:
    """Remove a copy with what SQLite may have put beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        copied.with_name(copied.name + suffix).unlink(missing_ok=True)
