"""What an error of SQLite's means for the outbox: its exception in, one of ours out."""

import sqlite3
from pathlib import Path

from relay.outbox import DamagedError, FullError


def translated(error: sqlite3.Error, path: Path) -> Exception:
    """Return what an error of SQLite's means for the outbox; a fault of our own stays what it is."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL":
        return FullError(f"there is no room for {path}: free some, what was accepted stays safe")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return DamagedError(
            f"{path} is damaged ({error}, {name}): check the disk, restore a backup or move it away"
        )
    if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
        return DamagedError(
            f"{path} cannot be read or written ({error}, {name}): check the disk, then start again"
        )
    return error
