"""`relay move`: the outbox leaves its SQLite file for PostgreSQL, or the file is an outbox again."""

import asyncio
import os
import sys
from argparse import Namespace
from pathlib import Path
from time import monotonic
from urllib.parse import parse_qsl, urlsplit

from relay.cli.exits import CommandError, Exit
from relay.cli.output import show_json, show_table
from relay.cli.progress import Progress
from relay.cli.serving import refused
from relay.config import Config, ConfigError, WrongValueError, find, load, read_database
from relay.model import Secret
from relay.outbox import HeldError, OutboxError, moving
from relay.outbox.moving import Moved
from relay.serve import EXIT_CODES

COLUMNS = ("kept", "sqlite", "postgresql")


def move(arguments: Namespace) -> int:
    if (arguments.to is None) is not arguments.undo:
        raise CommandError("say either --to URL or --undo", Exit.USAGE)
    try:
        config = load(find(arguments.config, os.environ), os.environ)
    except ConfigError as error:
        return refused(error)
    path = file(config)
    try:
        if arguments.undo:
            return taken_back(path, arguments)
        return moved(path, address(arguments.to), arguments)
    except OutboxError as error:
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), Exit.FAILED)
        remedy = ": stop it first" if isinstance(error, HeldError) else ""
        raise CommandError(f"{error}{remedy}", Exit(code)) from None


def file(config: Config) -> Path:
    """Return the path of the outbox that is moved."""
    if config.outbox.url is not None:
        raise CommandError(
            "the config has outbox.url: call this with one that still has outbox.path", Exit.CONFIG
        )
    return config.outbox.path


def address(written: str) -> Secret:
    """Read where to move to; a password in clear is refused, for everybody on the machine has seen it."""
    try:
        to = read_database(written, os.environ)
        parts = urlsplit(written)
        words = [parts.password, *(value for name, value in parse_qsl(parts.query) if name == "password")]
    except (WrongValueError, ValueError) as error:
        raise CommandError(f"--to {error}", Exit.USAGE) from None
    if any(word and "${" not in word for word in words):
        raise CommandError(
            "--to has a password in clear: write ${env:NAME} or ${file:PATH} in its place, "
            "or have it in $PGPASSWORD or ~/.pgpass",
            Exit.USAGE,
        )
    return to


def moved(path: Path, to: Secret, arguments: Namespace) -> int:
    started = monotonic()
    with Progress() as progress:
        done = asyncio.run(moving.move(path, to, progress.tell))
        if arguments.json:
            show_json(told(done, monotonic() - started))
        elif done.after is not None:
            show_table(COLUMNS, compared(done))
        progress.say(sentence(done))
    return Exit.DONE if done.whole else Exit.FAILED


def told(done: Moved, seconds: float) -> dict[str, object]:
    return {
        "from": done.file,
        "to": done.place,
        "whole": done.whole,
        "sqlite": done.before,
        "postgresql": done.after,
        "seconds": round(seconds, 1),
    }


def compared(done: Moved) -> list[dict[str, object]]:
    """Return a row for each count, both sides in it."""
    after = done.after or {}
    return [
        {"kept": name, "sqlite": count, "postgresql": after.get(name)} for name, count in done.before.items()
    ]


def sentence(done: Moved) -> str:
    """Say what comes next."""
    if done.after is None:
        return f"{done.file} was moved to {done.place} before: nothing is left to move"
    if not done.whole:
        return (
            f"relay: {done.place} does not hold what {done.file} does: nothing is marked as moved; "
            "drop the schema relay there, then move again"
        )
    return f"{done.file} is moved: set outbox.url in place of outbox.path, then start the relay"


def taken_back(path: Path, arguments: Namespace) -> int:
    place = moving.undo(path)
    if place is None:
        raise CommandError(f"{path.resolve()} was not moved")
    if arguments.json:
        show_json({"file": str(path.resolve()), "from": place})
    print(
        f"{path.resolve()} is an outbox again: drop the schema relay of {place}, "
        "for what was delivered from there goes out again from here",
        file=sys.stderr,
    )
    return Exit.DONE
