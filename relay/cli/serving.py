"""`relay serve` and `relay check`: the config is read, and served or judged."""

import os
import sys
from argparse import Namespace

from relay.cli.exits import Exit
from relay.cli.output import show_json
from relay.config import ConfigError, find, load


def serve(arguments: Namespace) -> int:
    try:
        path = find(arguments.config, os.environ)
        config = load(path, os.environ)
    except ConfigError as error:
        return refused(error)
    # Only now: a wrong config is told before everything that serves is loaded.
    from relay.serve import run

    return run(config, path)


def check(arguments: Namespace) -> int:
    try:
        path = find(arguments.config, os.environ)
        count = len(load(path, os.environ).endpoints)
    except ConfigError as error:
        if arguments.json:
            show_json({"ok": False, "problems": error.problems})
            return Exit.CONFIG
        return refused(error)
    if arguments.json:
        show_json({"ok": True, "config": str(path), "endpoints": count, "problems": []})
    else:
        print(f"{path}: ok, {count} endpoint{'' if count == 1 else 's'}")
    return Exit.DONE


def refused(error: ConfigError) -> int:
    """Tell every mistake, one a line."""
    for problem in error.problems:
        print(problem, file=sys.stderr)
    return Exit.CONFIG
