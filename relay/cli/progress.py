"""Progress of what takes long: on a terminal one line that is written anew, else a line every ten seconds.

It goes to standard error, so that what is piped on stays data.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from time import monotonic
from typing import TextIO

REDRAW_SECONDS = 0.1
LINE_SECONDS = 10.0
ERASE_REST = "\x1b[K"


def is_live(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether what was written there can be written over."""
    return stream.isatty() and environ.get("TERM", "dumb") != "dumb"


class Progress(AbstractContextManager["Progress"]):
    """Says how far it has come, not more often than somebody can read it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = is_live(self._stream)
        # The first line of a log comes after its time, for most of what may take long does not.
        self._next = monotonic() + (0.0 if self._live else LINE_SECONDS)
        self._dirty = False

    def tell(self, text: str) -> None:
        now = monotonic()
        if now < self._next:
            return
        self._next = now + (REDRAW_SECONDS if self._live else LINE_SECONDS)
        self._stream.write(f"\r{text}{ERASE_REST}" if self._live else f"{text}\n")
        self._stream.flush()
        self._dirty = self._live

    def say(self, text: str) -> None:
        """Say once what stays to be read."""
        self._clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._dirty:
            self._stream.write(f"\r{ERASE_REST}")
            self._stream.flush()
            self._dirty = False
