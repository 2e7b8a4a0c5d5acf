"""The disk under a relay: counted, failing, slow, without power, or the end of the process.

`build` compiles `shim.c`; a `Disk` is what one outbox lies on. Its words are mapped by the relay too, so what
is to happen can be changed while the relay runs.
"""

import atexit
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CALLS, KILL_AT, FAIL_AT, FAIL_ERRNO, PERSISTENT, FAILED, SLOW_SYNC_MS, SYNCS = range(8)
ENTRY = 24  # the first of five: of each file, its generation + 1 if its name outlives the power
SUFFIXES = {"main": "", "wal": "-wal", "journal": "-journal"}
SLOTS = {"main": 0, "wal": 1, "journal": 3}
SIZE = 4096
BLOCK = 4096  # what a disk writes whole


@cache
def build() -> Path | None:
    """Compile the shim; None where there is no compiler for it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    folder = Path(tempfile.mkdtemp(prefix="relay-shim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, source, "-ldl"],
        check=True,
        timeout=60,
    )
    return library


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One storage call, as the shim said it."""

    number: int
    what: str
    file: str
    errno: int
    caller: str  # which library opened it


class Disk:
    """The disk under the outbox `file`; everything about it lies in `folder`."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.file = file
        self.folder = folder
        self._kept = folder / "kept"
        self._kept.mkdir(parents=True)
        self._words_file = folder / "words"
        self._words_file.write_bytes(bytes(SIZE))
        with self._words_file.open("r+b") as words:
            self._words = mmap.mmap(words.fileno(), SIZE)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RELAY_SHIM_FILE": str(self.file),
            "RELAY_SHIM_CONTROL": str(self._words_file),
            "RELAY_SHIM_DISK": str(self._kept),
            "RELAY_SHIM_LOG": str(self.folder / "calls"),
        }

    def __getitem__(self, word: int) -> int:
        return int(struct.unpack_from("<q", self._words, word * 8)[0])

    def __setitem__(self, word: int, value: int) -> None:
        struct.pack_into("<q", self._words, word * 8, value)

    def fail(self, at: int, errno: int, *, persistent: bool) -> None:
        """Let the call of this number fail, and with `persistent` all that follow."""
        self[FAIL_ERRNO], self[PERSISTENT] = errno, int(persistent)
        self[FAIL_AT] = at

    def mend(self) -> None:
        """Behave from now on; the numbers go on."""
        for word in (KILL_AT, FAIL_AT, SLOW_SYNC_MS):
            self[word] = 0

    def calls(self) -> list[Call]:
        log = self.folder / "calls"
        if not log.exists():
            return []
        said = [line.split(" ") for line in log.read_text().splitlines()]
        return [
            Call(number=int(number), what=what, file=file, errno=int(errno), caller=caller)
            for number, what, file, errno, caller in said
        ]

    def cut_power(self, chance: random.Random | None = None) -> int:
        """Leave of the outbox what had been synced; return how many bytes of it went.

        The relay must be dead. With `chance` each block that was not synced may have reached the disk all the
        same, as blocks do in any order.
        """
        kept: dict[str, bytes] = {}
        lost = 0
        for name, suffix in SUFFIXES.items():
            path = self.file.with_name(self.file.name + suffix)
            cached = path.read_bytes() if path.exists() else b""
            entry = self[ENTRY + SLOTS[name]]
            if entry:
                synced = self._kept / f"{name}.{entry - 1}"
                content = synced.read_bytes() if synced.exists() else b""
                kept[name] = content if chance is None else _torn(content, cached, chance)
            lost += sum(a != b for a, b in zip(_blocks(cached), _blocks(kept.get(name, b"")), strict=False))
            lost += max(0, len(cached) - len(kept.get(name, b""))) // BLOCK
        self._start_over(kept)
        return lost

    def _start_over(self, kept: dict[str, bytes]) -> None:
        for path in self.file.parent.glob(f"{self.file.name}*"):
            # Nobody syncs the lock file: what it says may be on the disk before the rest.
            if not path.name.endswith(".lock"):
                path.unlink()
        for path in self._kept.iterdir():
            path.unlink()
        self._words[:] = bytes(SIZE)
        for name, content in kept.items():
            for path in (self.file.with_name(self.file.name + SUFFIXES[name]), self._kept / f"{name}.0"):
                path.write_bytes(content)
                path.chmod(0o600)
            self[ENTRY + SLOTS[name]] = 1

    def close(self) -> None:
        self._words.close()


def preload(library: Path | None) -> dict[str, str]:
    return {"LD_PRELOAD": os.fspath(library)} if library is not None else {}


def _blocks(content: bytes) -> list[bytes]:
    return [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]


def _torn(synced: bytes, cached: bytes, chance: random.Random) -> bytes:
    """Mix what was synced with what was only written: any of the blocks that differ may be there.

    The length is one of the two.
    """
    old, new = _blocks(synced), _blocks(cached)
    length = max(len(old), len(new)) if chance.random() < 0.5 else len(old)
    mixed = []
    for index in range(length):
        before = old[index] if index < len(old) else bytes(BLOCK)
        after = new[index] if index < len(new) else before
        mixed.append(after if chance.random() < 0.5 else before)
    return b"".join(mixed)
