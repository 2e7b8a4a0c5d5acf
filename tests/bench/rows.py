"""SQLite's own work, the other part of the limit: the rows of an outbox in group commits, and nothing around.

It is what a careful person would write with `sqlite3` if nothing had to be delivered: each commit takes some
new events with a delivery each and the outcomes of those before, and the next due are looked up. It shares no
code with the relay, so that a change there cannot move the yardstick. It prints the seconds and the CPU
seconds that all events took.
"""

import argparse
import json
import sqlite3
import time
import uuid
from pathlib import Path

from tests.bench.load import event

TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA cache_size = -8192;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, type TEXT NOT NULL,
    timestamp TEXT NOT NULL, data BLOB NOT NULL, digest BLOB NOT NULL, accepted_at INTEGER NOT NULL
) STRICT;
CREATE TABLE deliveries (
    event INTEGER NOT NULL, endpoint INTEGER NOT NULL, state INTEGER NOT NULL DEFAULT 0, due INTEGER,
    attempts INTEGER NOT NULL DEFAULT 0, at INTEGER, milliseconds INTEGER, status INTEGER, answer TEXT,
    PRIMARY KEY (event, endpoint)
) STRICT, WITHOUT ROWID;
CREATE INDEX due ON deliveries (endpoint, due, event) WHERE state = 0;
"""
CLAIM = """
SELECT events.seq, id, type, timestamp, data, digest FROM deliveries JOIN events ON events.seq = event
WHERE endpoint = 1 AND state = 0 AND due <= ? ORDER BY due, event LIMIT ?
"""
OUTCOME = """
UPDATE deliveries
SET state = 1, due = NULL, attempts = 1, at = ?, milliseconds = 3, status = 200, answer = 'ok'
WHERE event = ? AND endpoint = 1
"""


def work(db: sqlite3.Connection, events: int, batch: int) -> None:
    """Bring so many events through the tables, `batch` new ones in each commit."""
    data = json.dumps(event(0)["data"], separators=(",", ":")).encode()
    claimed: list[tuple[int, int]] = []
    first = 1
    while first <= events or claimed:
        numbers = range(first, min(first + batch, events + 1))
        rows = [
            (
                each,
                f"evt_{uuid.uuid4().hex}",
                "post.published",
                "2026-01-15T10:00:00.000Z",
                data,
                bytes(32),
                first,
            )
            for each in numbers
        ]
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        db.executemany(
            "INSERT INTO deliveries (event, endpoint, due) VALUES (?, 1, ?)", [(n, n) for n in numbers]
        )
        db.executemany(OUTCOME, claimed)
        db.execute("COMMIT")
        claimed = [(each[0], each[0]) for each in db.execute(CLAIM, (events, batch))]
        first += batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args()
    db = sqlite3.connect(options.file, isolation_level=None)
    db.executescript(TABLES)
    work(db, max(1, options.events // 4), options.batch)
    db.executescript("DELETE FROM events; DELETE FROM deliveries; DELETE FROM sqlite_sequence")
    began, cpu = time.monotonic(), time.process_time()
    work(db, options.events, options.batch)
    print(json.dumps({"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
