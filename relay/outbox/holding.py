"""What a relay has of its disk: being the only one on an outbox, and the room that is left for it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relay.outbox import DamagedError, HeldError

# Kept free for the outcomes of what was accepted: the log ahead of the file (1,000 pages), and the file's
# own growth when that is copied over. Of a small disk it is a share.
RESERVED_BYTES = 16 << 20
RESERVED_SHARE = 2


@contextmanager
def held(outbox: Path) -> Iterator[Path]:
    """Hold the outbox, made ours alone to read if it is new. Raises HeldError, DamagedError."""
    path = outbox.resolve()  # one outbox has one lock, by whatever name it is called
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be opened ({error.strerror}): check outbox.path and its folder"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise HeldError(f"outbox {path} is held by another relay (process {holder})") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        if path.exists() and path.stat().st_nlink > 1:
            raise DamagedError(
                f"{path} has another name too (a hard link), by which another relay could hold it"
            )
        if not path.exists():
            # Made here so that it is ours alone from its first byte; SQLite has not seen it yet, and
            # its -wal and -shm take over the mode. An existing file is never opened but by SQLite:
            # closing it would drop SQLite's locks in this process.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield path
    finally:
        os.close(descriptor)


def short_of_room(path: Path) -> str | None:
    """Say so when only the reserve is left on the disk: room to record outcomes, not to take events."""
    disk = os.statvfs(path.parent)
    reserve = min(RESERVED_BYTES, disk.f_blocks * disk.f_frsize // RESERVED_SHARE)
    if disk.f_bavail * disk.f_frsize >= reserve:
        return None
    return f"there is no room for {path}: free some, what was accepted stays safe"


def refuse_moved(path: Path, inode: int) -> None:
    """Raise DamagedError when the outbox was moved away or replaced: the next start would not find it."""
    try:
        moved = path.stat().st_ino != inode
    except FileNotFoundError:
        moved = True
    if moved:
        raise DamagedError(
            f"{path} was moved away or replaced while the relay ran: put it back, then start again"
        )
