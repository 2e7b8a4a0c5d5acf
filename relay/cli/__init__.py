"""The command line: words come in, one command runs, its exit code goes out.

Data goes to standard output, everything else to standard error, an error as one sentence. What there is
to call stands in `commands`; each function there lies in the file of its group. Nothing is coloured.

    commands      every command with its options: the table that all of this is made of
    options, arguments     those that several commands have; how their values are read
    exits         the exit codes
    client        one request to the running relay
    output, progress     tables for people, JSON for scripts; how far something has come
    serving, connect, health, secret, ops, version, listen, demo, verify     the commands,
    move     the one for an outbox whose relay is stopped,
    ask, status, drain, backup, reload, completion     those for a running relay and its shell
    receiver, verification     the receiver of `listen` and `demo`, and how it verifies
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from relay.cli.commands import COMMANDS, EXAMPLES, GROUPS, Command
from relay.cli.exits import CommandError, Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that these words, or those of the process, ask for; return its exit code."""
    try:
        arguments = parser().parse_args(argv)
        code = function(arguments.command)(arguments)
        sys.stdout.flush()
    except SystemExit as said:  # by argparse, after --help or a mistake
        return int(said.code or 0)
    except CommandError as error:
        print(f"relay: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python's own flush at exit must not meet the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    return code


def function(command: Command) -> Callable[[Namespace], int]:
    """Import what the command runs."""
    module, _, name = command.runs.partition(":")
    found: Callable[[Namespace], int] = getattr(import_module(module), name)
    return found


class Parser(ArgumentParser):
    """Help opens with a sentence and ends with examples; a mistake is told in one sentence."""

    def __init__(self, *, does: str, examples: Sequence[str], **settings: Any) -> None:
        super().__init__(
            **settings,
            epilog="\n  ".join(["examples:", *examples]),
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.does = does

    def format_help(self) -> str:
        return f"{self.does}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"{self.prog}: {message}; {self.prog} --help tells more\n")


def parser() -> Parser:
    """Build the parser of all commands."""
    top = Parser(prog="relay", does="A webhook sidecar: keeps events and delivers them.", examples=EXAMPLES)
    members = {"": commands_of(top)}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in members:
            members[group] = commands_of(add_group(members[""], group))
        added = members[group].add_parser(
            name, help=command.does, does=command.does, examples=command.examples
        )
        for option in command.options:
            added.add_argument(*option.names, **option.settings)
        added.set_defaults(command=command)
    return top


def add_group(commands: Any, name: str) -> Parser:
    """Add the parser of a group, with the examples of its first member."""
    examples = next(command.examples for command in COMMANDS if command.name.startswith(f"{name} "))
    added: Parser = commands.add_parser(name, help=GROUPS[name], does=GROUPS[name], examples=examples)
    return added


def commands_of(parent: Parser) -> Any:  # argparse has no public name for what it returns
    return parent.add_subparsers(metavar="COMMAND", required=True, title="commands")
