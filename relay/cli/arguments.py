"""Arguments: the text after an option in, its value out, or a mistake that argparse tells.

Whoever looks for the options themselves finds them in `relay.cli.commands`.
"""

import re
from argparse import ArgumentTypeError
from typing import NamedTuple

ANSWER = re.compile(r"(?P<status>[^@+]*)(@(?P<number>[0-9]{1,6})(?P<unit>ms|s|m))?(\+(?P<retry>[0-9]{1,9}))?")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
DURATION = re.compile(r"([0-9]{1,9})(ms|s|m|h|d)")
SHORTEST_INTERVAL_SECONDS = 0.2
GENERIC = {"prefix": None, "encoding": ("hex", "base64"), "algorithm": ("sha256", "sha512", "sha1")}
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110


class Answer(NamedTuple):
    """What a receiver answers a request, and when."""

    status: int
    delay_seconds: float = 0.0
    retry_after: int | None = None  # in seconds


def port(text: str) -> int:
    """Read a TCP port; 0 takes any free one."""
    return _between(0, 65535, text)


def duration(text: str) -> float:
    """Read a duration as the config does, `500ms`, `30s`, `1h30m`, into seconds."""
    parts = DURATION.findall(text)
    seconds = sum(int(number) * UNITS[unit] for number, unit in parts)
    if not text or "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise ArgumentTypeError(f"{text!r} is not a duration like 500ms, 30s or 1h30m")
    return seconds


def interval(text: str) -> float:
    """Read how long to wait between two looks, not shorter than is good for the relay."""
    seconds = duration(text)
    if seconds < SHORTEST_INTERVAL_SECONDS:
        raise ArgumentTypeError(f"{text!r} is too short: 200ms at least")
    return seconds


def count(text: str) -> int:
    return _between(1, 1_000_000_000, text)


def answers(text: str) -> list[Answer]:
    """Read answers to come, like `503,503@2s,429+30`; 1xx are left out, for they end no request."""
    return [_answer(part) for part in text.split(",")]


def generic(text: str) -> dict[str, str]:
    """Read a scheme like `X-Mine,prefix=sha256=,encoding=hex`, with the words a config has for it."""
    header, *words = text.split(",")
    if not HEADER_NAME.fullmatch(header):
        raise ArgumentTypeError(f"{header!r} is not a name a header can have")
    form = {"header": header}
    for word in words:
        name, _, value = word.partition("=")
        if name not in GENERIC or name in form:
            raise ArgumentTypeError(
                f"{word!r} is not one of {', '.join(GENERIC)}, each once, with = and a value"
            )
        known = GENERIC[name]
        if known is not None and value not in known:
            raise ArgumentTypeError(f"{value!r} is not one of {', '.join(known)}")
        form[name] = value
    return form


def _answer(text: str) -> Answer:
    found = ANSWER.fullmatch(text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is not an answer like 503, 503@2s (delay) or 429+30 (Retry-After)")
    number, unit, retry = found["number"], found["unit"], found["retry"]
    return Answer(
        status=_between(200, 599, found["status"]),
        delay_seconds=int(number) * UNITS[unit] if number else 0.0,
        retry_after=int(retry) if retry else None,
    )


def _between(low: int, high: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)
