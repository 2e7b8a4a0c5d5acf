"""`relay serve` and `relay check`: the config is read, and served or judged."""

import os
import signal
import sys
from argparse import Namespace

from relay.cli.exits import Exit
from relay.cli.output import show_json, show_table
from relay.config import ConfigError, find, load

COLUMNS = ("endpoint", "ok", "milliseconds", "address", "tls", "certificate_until", "error")


def serve(arguments: Namespace) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
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
        config = load(path, os.environ)
    except ConfigError as error:
        if arguments.json:
            show_json({"ok": False, "problems": error.problems})
            return Exit.CONFIG
        return refused(error)
    met: list[dict[str, object]] | None = None
    if arguments.connect:
        from relay.cli.connect import reached

        met = reached(config)
    ok = all(each["ok"] for each in met or ())
    count, sources = len(config.endpoints), len(config.sources)
    if arguments.json:
        told = {"ok": ok, "config": str(path), "endpoints": count, "sources": sources, "problems": []}
        show_json(told if met is None else {**told, "connections": met})
    else:
        besides = f", {sources} source{'' if sources == 1 else 's'}" if sources else ""
        print(f"{path}: ok, {count} endpoint{'' if count == 1 else 's'}{besides}")
        if met:
            show_table(COLUMNS, [{"endpoint": f"source {each.get('source')}", **each} for each in met])
    return Exit.DONE if ok else Exit.FAILED


def refused(error: ConfigError) -> int:
    """Tell every mistake, one a line."""
    for problem in error.problems:
        print(problem, file=sys.stderr)
    return Exit.CONFIG
