"""The logs of a run: JSON lines, appended as things happen, joined by the checker afterwards."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from relay.clock import SystemClock

CLOCK = SystemClock()  # that of the relay's own tables, so that times can be compared

Line = dict[str, Any]


class Journal:
    """One log; with `synced` a line is on disk when `write` returns."""

    def __init__(self, path: Path, *, synced: bool = False) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._synced = synced

    def write(self, **line: Any) -> None:
        line.setdefault("t", CLOCK.now_ms())
        if self._file is None:
            self._file = self._path.open("ab")
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if self._synced:
            os.fdatasync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: Path) -> Iterator[Line]:
    if not path.exists():  # nothing happened that it would tell
        return
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)
