"""`relay version`: what is running, for a report of something that went wrong."""

import importlib.metadata
import platform
import sqlite3
from argparse import Namespace

from relay import __version__
from relay.cli.exits import Exit
from relay.cli.output import show_json


def version(arguments: Namespace) -> int:
    versions = {
        "relay": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "aiohttp": importlib.metadata.version("aiohttp"),
    }
    if arguments.json:
        show_json(versions)
    else:
        print("relay {relay} (Python {python}, SQLite {sqlite}, aiohttp {aiohttp})".format(**versions))
    return Exit.DONE
