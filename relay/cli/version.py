"""`relay version`: what is running, for a report of something that went wrong."""

import importlib.metadata
import json
import platform
import sqlite3
from argparse import Namespace

from relay import __version__
from relay.cli.exits import Exit


def version(arguments: Namespace) -> int:
    versions = {
        "relay": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "aiohttp": importlib.metadata.version("aiohttp"),
    }
    sentence = "relay {relay} (Python {python}, SQLite {sqlite}, aiohttp {aiohttp})"
    print(json.dumps(versions) if arguments.json else sentence.format(**versions))
    return Exit.DONE
