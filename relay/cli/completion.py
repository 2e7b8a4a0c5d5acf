"""`relay completion`: the script that teaches a shell our words.

They are made by shtab from the same table as the parser, before a release; a test says when they are old.
"""

from argparse import Namespace
from pathlib import Path

from relay.cli.exits import Exit

SCRIPTS = Path(__file__).with_name("completions")


def completion(arguments: Namespace) -> int:
    print((SCRIPTS / f"relay.{arguments.shell}").read_text(encoding="utf-8"), end="")
    return Exit.DONE
