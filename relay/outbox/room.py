"""How much room the outbox has: for events, and always some more for the outcomes of those it has taken.

Three bounds, each soft: the disk, `max_size` and `max_pending`. Where one is reached new events are refused,
while what was accepted still goes out, which is what makes room again. `max_size` is hard besides, at SQLite.
"""

import os
from collections.abc import Callable
from pathlib import Path

from relay.outbox import Bounds, Size
from relay.outbox.admission import refusal_of, reserve

NEAR_BYTES = 64 << 20  # more than could be written between two measurings


class Room:
    """What is left of the bounds; `pending` tells how many deliveries are."""

    def __init__(self, path: Path, bounds: Bounds, pending: Callable[[], int]) -> None:
        self.used_bytes = 0  # of the outbox, what may be used again left out; measured now and then
        self._path = path
        self._bounds = bounds
        self._pending = pending

    def size(self) -> Size:
        """Say how large the outbox is, by its files' names: only SQLite may open them."""
        disk = os.statvfs(self._path.parent)
        return Size(
            file_bytes=_length(self._path),
            log_bytes=_length(self._path.with_name(f"{self._path.name}-wal")),
            used_bytes=self.used_bytes,
            disk_free_bytes=disk.f_bavail * disk.f_frsize,
            bounds=self._bounds,
        )

    def refusal(self) -> str | None:
        """Say in a sentence why nothing can be taken on, if that is so."""
        return self.refusal_of(1) or self.refusal_of_disk()

    def refusal_of(self, more: int) -> str | None:
        """Say why so many more deliveries are too many for the bounds that were set, if they are."""
        return refusal_of(
            self._bounds,
            name=str(self._path),
            used_bytes=self.used_bytes,
            pending=self._pending() + more,
        )

    def is_near_its_bound(self) -> bool:
        """Tell whether it could be full before it is measured again."""
        return self._bounds.max_bytes is not None and self.used_bytes > self._bounds.max_bytes - NEAR_BYTES

    def refusal_of_copy(self) -> str | None:
        """Say why the disk cannot hold the outbox a second time, if that is so."""
        return self.refusal_of_disk(self.used_bytes)

    def refusal_of_disk(self, more_bytes: int = 0) -> str | None:
        """Say why the disk has no room for so much more, if that is so: a system call."""
        disk = os.statvfs(self._path.parent)
        if disk.f_bavail * disk.f_frsize >= reserve(disk.f_blocks * disk.f_frsize) + more_bytes:
            return None
        return f"there is no room for {self._path}: free some, what was accepted stays safe"


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
