"""The disk that is measured on: where outboxes go, what file system it has, how long a sync takes."""

import os
import tempfile
import time
from pathlib import Path

FSYNCS = 200


def disk() -> Path:
    """Choose where outboxes go: never into memory, where an fsync costs nothing."""
    temporary = Path(tempfile.gettempdir())
    return Path.cwd() if filesystem(temporary) in {"tmpfs", "ramfs"} else temporary


def filesystem(folder: Path) -> str:
    """Name the type of the file system that holds a folder, as the kernel does."""
    device = folder.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0]
    return "unknown"


def fsync_seconds(file: Path) -> float:
    """Take the median time that this disk needs to append 4 KiB and sync it, about what a commit does."""
    times = []
    with file.open("wb", buffering=0) as log:
        for _ in range(FSYNCS):
            began = time.monotonic()
            log.write(bytes(4096))
            os.fsync(log.fileno())
            times.append(time.monotonic() - began)
    return sorted(times)[FSYNCS // 2]


def sync(file: Path) -> None:
    """Have a file on disk now, or the kernel writes it while the next is measured."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
