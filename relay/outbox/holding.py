"""Being the only relay on an outbox, and knowing whether the one before stopped in order."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from relay.outbox import DamagedError, HeldError


@contextmanager
def held(outbox: Path) -> Iterator["Held"]:
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
            holder = next(iter(os.pread(descriptor, 64, 0).decode(errors="replace").split()), "unknown")
            raise HeldError(f"outbox {path} is held by another relay (process {holder})") from error
        broke_off = b"open" in os.pread(descriptor, 64, 0)
        with _telling(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        if broke_off:
            _refuse_without_log(path, lock, descriptor)
        if path.exists() and not path.is_file():
            # What a container's engine makes where a single file was to be mounted that is not there.
            raise DamagedError(f"{path} is a folder or a device, not a file: check outbox.path and mounts")
        if path.exists() and path.stat().st_nlink > 1:
            raise DamagedError(
                f"{path} has another name too (a hard link), by which another relay could hold it"
            )
        if not path.exists():
            # Made here so that it is ours alone from its first byte; SQLite has not seen it yet, and
            # its -wal and -shm take over the mode. An existing file is never opened but by SQLite:
            # closing it would drop SQLite's locks in this process.
            with _telling(path):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield Held(path, descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Held:
    """An outbox that is ours."""

    path: Path
    _lock: int

    def opened(self) -> None:
        """Note that SQLite has the file open: until it is closed again, there is a log ahead of the file."""
        with _telling(self.path):
            # The log's name first: after a power cut the note must not be there without it.
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            os.pwrite(self._lock, f"{os.getpid()}\nopen\n".encode(), 0)

    def closing(self) -> None:
        """Note that SQLite is about to put everything into the file and remove the log ahead of it.

        Raises nothing: SQLite must be closed. On a disk that fails more than once it will not remove the log.
        """
        for _ in range(2):
            with suppress(OSError):
                os.ftruncate(self._lock, 0)
                break


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Say what an error of the disk means, as `failures` does for SQLite's. Raises DamagedError."""
    try:
        yield
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be made ready ({error.strerror}): check the disk, then start again"
        ) from error


def _refuse_without_log(path: Path, lock: Path, descriptor: int) -> None:
    """Raise DamagedError when a relay that did not stop in order has left no log ahead of the file.

    What it had accepted last is in there, and SQLite would go on without it and say nothing.
    """
    log_ahead = path.with_name(path.name + "-wal")
    if path.exists() and not log_ahead.exists():
        os.pwrite(descriptor, b"0\nopen\n", 0)
        raise DamagedError(
            f"{log_ahead} is missing, although the relay was not stopped in order: put it back, "
            f"or remove {lock} to go on without the events in it"
        )


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
