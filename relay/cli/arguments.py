"""Arguments: the text after an option in, its value out, or a mistake that argparse tells.

Whoever looks for the options themselves finds them in `relay.cli.commands`.
"""

from argparse import ArgumentTypeError


def port(text: str) -> int:
    """Read a TCP port; 0 takes any free one."""
    return _between(0, 65535, text)


def count(text: str) -> int:
    return _between(1, 1_000_000_000, text)


def statuses(text: str) -> list[int]:
    """Read the statuses of answers to come; 1xx are left out, for they end no request."""
    return [_between(200, 599, part) for part in text.split(",")]


def _between(low: int, high: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)
