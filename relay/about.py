"""What runs: said once at the start, and in every scrape."""

import asyncio
import platform
import sqlite3

from relay import __version__


def build() -> dict[str, str]:
    """Return the versions of what runs, and the event loop that it runs on."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "loop": "uvloop" if type(asyncio.get_running_loop()).__module__ == "uvloop" else "asyncio",
        "sqlite": sqlite3.sqlite_version,
    }
