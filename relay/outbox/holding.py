"""Being the only relay on an outbox: a path in, held until the block ends.

A lock of the kernel's on a file beside the outbox, so that a crash cannot leave it behind.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relay.outbox import DamagedError, HeldError


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the outbox, made ours alone to read if it is new. Raises HeldError, DamagedError."""
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
        if not path.exists():
            # Made here so that it is ours alone from its first byte; SQLite has not seen it yet, and
            # its -wal and -shm take over the mode. An existing file is never opened but by SQLite:
            # closing it would drop SQLite's locks in this process.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield
    finally:
        os.close(descriptor)
