"""That an outbox is being moved, or was: a note in its SQLite file, on which nothing else in there depends.

While a move is under way the note stands beside everything else. Should it break off, a relay may go on with
the file; it notes that it did, so that the next move begins anew. Once all is moved the file has another
application id, by which every relay refuses it untouched, older ones too.
"""

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

APPLICATION_ID = 0x52454C4D  # "RELM"

TABLE = """CREATE TABLE IF NOT EXISTS move (
    token TEXT NOT NULL,
    place TEXT NOT NULL,
    changed INTEGER NOT NULL
) STRICT"""


class Note(NamedTuple):
    """Where the outbox goes, or went."""

    token: str  # of this one move; its target has it too
    place: str  # for people
    changed: bool  # a relay was started on the outbox since
    over: bool


def read(db: sqlite3.Connection) -> Note | None:
    if not _has_note(db):
        return None
    token, place, changed = db.execute("SELECT token, place, changed FROM move").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    return Note(token=token, place=place, changed=bool(changed), over=application == APPLICATION_ID)


def begin(db: sqlite3.Connection, place: str) -> str:
    """Note that a move begins, in place of one that broke off; return its token."""
    token = secrets.token_hex(16)
    with _transaction(db):
        db.execute(TABLE)
        db.execute("DELETE FROM move")
        db.execute("INSERT INTO move (token, place, changed) VALUES (?, ?, 0)", (token, place))
    return token


def change(db: sqlite3.Connection) -> None:
    """Note that a relay was started on the outbox: what was moved of it is out of date."""
    if _has_note(db):
        db.execute("UPDATE move SET changed = 1 WHERE changed = 0")


def begin_anew(db: sqlite3.Connection) -> None:
    """Note that nothing of what was moved before a change is left in the target."""
    db.execute("UPDATE move SET changed = 0")


def end(db: sqlite3.Connection) -> None:
    """Note that all is moved: no relay starts on the outbox any more."""
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def undo(db: sqlite3.Connection, application_id: int) -> None:
    """Take the note back, so that the outbox is again what it was."""
    with _transaction(db):
        db.execute("DROP TABLE move")
        db.execute(f"PRAGMA application_id = {application_id}")


def _has_note(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'move'").fetchone() is not None


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
