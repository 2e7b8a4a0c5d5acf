"""The completion scripts that are shipped: `python -m tests.completion` writes them anew."""

import argparse
from collections.abc import Iterator

import shtab

from relay.cli import parser
from relay.cli.completion import SCRIPTS

SHELLS = ("bash", "zsh", "fish")
FILES = ("PATH", "FILE")  # what is a file is said by its metavar


def script(shell: str) -> str:
    top = parser()
    for action in actions(top):
        if action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return f"{shtab.complete(top, shell=shell).rstrip()}\n"


def actions(of: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in of._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions(each)


if __name__ == "__main__":
    SCRIPTS.mkdir(exist_ok=True)
    for name in SHELLS:
        (SCRIPTS / f"relay.{name}").write_text(script(name), encoding="utf-8")
