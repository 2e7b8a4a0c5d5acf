"""The journal: everything that happened in a simulated world, in the order in which it happened.

The network writes its ledger into it, the application and the operator what they did and were answered, the
witness what the relay asked of its outbox, the world its restarts. The judge reads it.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """What happened (a method of the judge and its arguments), at which virtual and wall-clock time."""

    kind: str
    now: float
    wall_ms: int
    what: dict[str, Any]


class Journal:
    """Entries in order; `clock` tells virtual time and what the wall clock says."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.clock: Callable[[], tuple[float, int]] = lambda: (0.0, 0)
        self.alive = True  # else the process was killed, and what it still does never happened
        self._numbers = 0

    def note(self, kind: str, **what: Any) -> None:
        if self.alive:
            self.entries.append(Entry(kind, *self.clock(), what))

    def number(self) -> int:
        """Return a number to tell the parts of one thing by."""
        self._numbers += 1
        return self._numbers

    def digest(self) -> str:
        """Return what two runs of one seed must have in common."""
        text = hashlib.sha256()
        for entry in self.entries:
            text.update(f"{entry.kind} {entry.now!r} {entry.wall_ms} {entry.what!r}\n".encode())
        return text.hexdigest()[:16]


def told(entry: Entry) -> str:
    """Write an entry for people."""
    days, seconds = divmod(entry.now, 86_400)
    hours, seconds = divmod(seconds, 3600)
    minutes, seconds = divmod(seconds, 60)
    what = " ".join(f"{name}={value}" for name, value in entry.what.items() if name not in {"rows", "bodies"})
    return f"{days:.0f}d {hours:02.0f}:{minutes:02.0f}:{seconds:09.6f}  {entry.kind:<10} {what}"
