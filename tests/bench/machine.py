"""What the figures were measured on, and what of: the machine, the versions, the commit."""

import importlib.metadata
import importlib.util
import os
import platform
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

from relay import __version__
from tests.bench.disk import disk, filesystem, fsync_seconds
from tests.bench.stage import Options

PACKAGES = ("aiohttp", "aiosqlite", "multidict", "orjson", "prometheus-client", "uvloop", "yarl")


def machine(options: Options, folder: Path) -> dict[str, Any]:
    """Describe what is measured and on what; the folder is on the disk that is used."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "cpu": processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "disk": filesystem(disk()),
        "fsync_ms": round(fsync_seconds(folder / "fsync") * 1e3, 3),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "relay": __version__,
        "commit": commit(),
        "loop": options.loop if options.loop != "auto" else auto(),
        "rounds": options.rounds,
        "events": options.events,
        "backlog": options.backlog,
        "self_test": options.self_test,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def auto() -> str:
    return "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"


def commit() -> str | None:
    """Return git's name for what is measured, with `-dirty` where it was changed since."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
