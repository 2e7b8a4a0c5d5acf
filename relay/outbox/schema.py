"""What the SQLite file looks like, version by version; an opened connection in, a current schema out.

A version is never edited once released: the next one is appended. `user_version` says how many have
been applied, `application_id` that the file is an outbox at all.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from relay.outbox import DamagedError, MovedError, NewerSchemaError, moved, statements

APPLICATION_ID = 0x52454C59  # "RELY"

# Deliveries have no row id: an event and an endpoint name one, and the rows of an event lie together.
# The attempt that ended a delivery well is kept in its row (at, milliseconds, status, answer), because
# most deliveries never have another; `attempts` holds all others. An endpoint's `settings` are those of
# the API, as JSON and with its secrets; the config's endpoints have none.
VERSION_1 = (
    """CREATE TABLE endpoints (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        settings BLOB,
        paused INTEGER NOT NULL DEFAULT 0,
        last_success_at INTEGER,
        last_failure_at INTEGER,
        last_error TEXT
    ) STRICT""",
    """CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        type TEXT NOT NULL,
        timestamp TEXT NOT NULL,
        data BLOB NOT NULL,
        digest BLOB NOT NULL,
        accepted_at INTEGER NOT NULL,
        key TEXT,
        traceparent TEXT,
        tracestate TEXT,
        idempotency_key TEXT,
        fingerprint BLOB
    ) STRICT""",
    "CREATE UNIQUE INDEX events_idempotency ON events (idempotency_key) WHERE idempotency_key IS NOT NULL",
    """CREATE TABLE deliveries (
        event INTEGER NOT NULL REFERENCES events (seq) ON DELETE CASCADE,
        endpoint INTEGER NOT NULL REFERENCES endpoints (number),
        state INTEGER NOT NULL DEFAULT 0,
        due INTEGER,
        format TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        steps INTEGER NOT NULL DEFAULT 0,
        at INTEGER,
        milliseconds INTEGER,
        status INTEGER,
        answer TEXT,
        PRIMARY KEY (event, endpoint)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX deliveries_due ON deliveries (endpoint, due, event) WHERE state = 0",
    "CREATE INDEX deliveries_waiting ON deliveries (endpoint, event) WHERE state = 0",
    "CREATE INDEX deliveries_dead ON deliveries (endpoint, event) WHERE state = 2",
    "CREATE INDEX deliveries_cancelled ON deliveries (endpoint, event) WHERE state = 3",
    """CREATE TABLE attempts (
        event INTEGER NOT NULL,
        endpoint INTEGER NOT NULL,
        number INTEGER NOT NULL,
        at INTEGER NOT NULL,
        milliseconds INTEGER NOT NULL,
        status INTEGER,
        reason TEXT,
        answer TEXT,
        PRIMARY KEY (event, endpoint, number),
        FOREIGN KEY (event, endpoint) REFERENCES deliveries (event, endpoint) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID""",
)

# How an endpoint stands is one JSON value, read and written whole. A delivery has a `key` where its endpoint
# keeps order; it is `held` while an older one of its key is pending, and no index of what is due has it then.
# `since` is when it was last replayed, `expired` when it had waited too long.
VERSION_2 = (
    "ALTER TABLE endpoints ADD COLUMN health TEXT",
    "ALTER TABLE deliveries ADD COLUMN key TEXT",
    "ALTER TABLE deliveries ADD COLUMN held INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE deliveries ADD COLUMN since INTEGER",
    "ALTER TABLE deliveries ADD COLUMN expired INTEGER",
    "DROP INDEX deliveries_due",
    "CREATE INDEX deliveries_due ON deliveries (endpoint, due, event) WHERE state = 0 AND held = 0",
    "CREATE INDEX deliveries_key ON deliveries (endpoint, key, event) WHERE state = 0 AND key IS NOT NULL",
)

# What the clock said at the latest commit, in one row: the latest time of any event or attempt does not tell,
# once a clock was ahead for a while.
VERSION_3 = (
    "CREATE TABLE clock (seen INTEGER) STRICT",
    """INSERT INTO clock SELECT max(at) FROM (
        SELECT max(last_success_at) AS at FROM endpoints UNION ALL SELECT max(last_failure_at) FROM endpoints
        UNION ALL SELECT accepted_at FROM events WHERE seq = (SELECT max(seq) FROM events)
    )""",
)

VERSIONS = (VERSION_1, VERSION_2, VERSION_3)


def inspect(path: Path, *, moving: bool = False) -> None:
    """Raise unless the file is an outbox that can be read, without changing a byte of it.

    One that was moved is one only for whoever is `moving`. A connection that may write puts the log ahead
    into the file when it is closed, also into a damaged one.
    """
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        try:
            version = _version(db, str(path), moving=moving)
        except DamagedError as error:
            if getattr(error.__cause__, "sqlite_errorname", "") == "SQLITE_READONLY_ROLLBACK":
                return  # the very first start was cut off; nothing is in it, and who may write rolls it back
            raise
        if version == len(VERSIONS):
            statements.last_seq(db)
            statements.counts(db)


def prepare(
    db: sqlite3.Connection,
    path: str,
    synchronous: str = "full",
    max_bytes: int | None = None,
    *,
    moving: bool = False,
) -> None:
    """Bring the file to the current schema, or raise and leave it as it was."""
    version = _version(db, path, moving=moving)
    # Only before the first table; the freed pages are handed back in small steps.
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":  # SQLite says no more of a disk that fails here than this
        raise DamagedError(
            f"{path} cannot be written ahead (journal mode {mode}): check the disk, then start again"
        )
    # NORMAL does not sync ordinary commits, so 202 would not mean kept.
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    db.execute(f"PRAGMA cache_size = {-8 << 10}")  # 8 MiB: the hot indexes of millions of rows
    for number, steps in enumerate(VERSIONS[version:], start=version + 1):
        _apply(db, number, steps)
    if version < len(VERSIONS):
        # From here on the file itself says what it is, so a lost log ahead cannot pass for a new outbox.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if not moving:
        moved.change(db)
    if max_bytes is not None:
        (page_size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute(f"PRAGMA max_page_count = {max_bytes // page_size}").fetchall()


def _version(db: sqlite3.Connection, path: str, *, moving: bool) -> int:
    try:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        raise DamagedError(
            f"{path} cannot be read as an outbox ({error}): restore a backup or move it away"
        ) from error
    if application == moved.APPLICATION_ID and not moving:
        note = moved.read(db)
        raise MovedError(
            f"{path} was moved to {note.place if note else 'a database'}: "
            "set outbox.url in place of outbox.path, or take the move back with relay move --undo"
        )
    if application not in {APPLICATION_ID, moved.APPLICATION_ID} and (tables or application):
        raise DamagedError(f"{path} is an SQLite database, but not an outbox: choose another outbox.path")
    if version > len(VERSIONS):
        raise NewerSchemaError(
            f"{path} has schema {version}, this relay knows {len(VERSIONS)}: "
            "start the newer relay, or restore the backup made before the upgrade"
        )
    return int(version)


def _apply(db: sqlite3.Connection, number: int, steps: tuple[str, ...]) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in steps:
            db.execute(step)
        if number == 1:
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {number}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
