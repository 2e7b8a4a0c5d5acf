"""Rows of `relay_submissions`: what is in one goes in, a draft of an event or the reason why not comes out.

Pure: which rows are there and who holds them is found out by `database`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from relay import canonical, ingest
from relay.ingest import Draft, InvalidError

LONGEST_REASON = 2000  # characters
_ID = re.compile(r"evt_[0-9a-f]{32}")


class Waiting(NamedTuple):
    """A row that is ours until the end of the transaction, before its content is read."""

    seq: int
    id: str
    key: str | None
    size: int  # bytes of all that was submitted


class Row(NamedTuple):
    """One submission as it was committed."""

    seq: int
    id: str
    event: str
    data: str  # JSON
    timestamp: str | None
    key: str | None
    idempotency_key: str | None
    to: list[str | None] | None
    traceparent: str | None
    tracestate: str | None
    submitted_at_ms: int


def in_order(ours: Sequence[Waiting], every: Mapping[str, Sequence[int]]) -> list[Waiting]:
    """Leave out rows whose key has an older one that is not ours: somebody else has it in hand.

    `every` has, for each key of ours, the numbers of all rows that wait, rising, up to the last of ours.
    """
    mine = {each.seq for each in ours}
    held_from = {key: next((seq for seq in seqs if seq not in mine), None) for key, seqs in every.items()}
    kept = []
    for each in ours:
        first = held_from.get(each.key) if each.key is not None else None
        if first is None or each.seq < first:
            kept.append(each)
    return kept


def fitting(rows: Iterable[Waiting], most_bytes: int) -> list[Waiting]:
    """Take rows from the front until their contents are so large, one at least."""
    taken: list[Waiting] = []
    for each in rows:
        most_bytes -= each.size
        if taken and most_bytes < 0:
            break
        taken.append(each)
    return taken


def draft(row: Row) -> Draft:
    """Read a row as the API reads a body. Raises InvalidError."""
    if not _ID.fullmatch(row.id):
        raise InvalidError([("#/id", "is not an id that relay_submit made")])
    try:
        data = canonical.parse(row.data.encode())
    except canonical.NotJSON as error:
        raise InvalidError([("#/data", str(error))]) from None
    if row.idempotency_key is not None and (wrong := ingest.wrong_idempotency_key(row.idempotency_key)):
        raise InvalidError([("#/idempotency_key", wrong)])
    given = {"timestamp": row.timestamp, "key": row.key, "to": row.to}
    members = {name: value for name, value in given.items() if value is not None}
    return Draft(
        value={"event": row.event, "data": data, **members},
        idempotency_key=row.idempotency_key,
        trace=ingest.trace(row.traceparent, row.tracestate),
        id=row.id,
        at_ms=row.submitted_at_ms,
    )


def too_large(size: int, limit: int) -> str:
    """Say that a row was not even read."""
    return f"#: is {size} bytes: one event may have {limit} (server.max_event_size)"


def reason(error: InvalidError) -> str:
    """Say all that is wrong with a row, where in it, and no more than can be read."""
    text = str(error)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"


USED_BEFORE = "#/idempotency_key: was used before for other content"
