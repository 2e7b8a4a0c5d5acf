"""Durations, sizes, rates, numbers and words: text of the config in, what it means out.

Pure; `WrongValueError` says why a text will not do. The API reads its durations and rates with these too.
"""

import math
import re
from collections.abc import Callable

from relay.config.check import WrongValueError, quoted

_DURATION = re.compile(
    r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?"
)
_SECONDS = (86_400, 3_600, 60, 1, 0.001)
_RATE = re.compile(r"([1-9][0-9]{0,5})/([sm])")
_SIZE = re.compile(r"([0-9]{1,12})([A-Za-z]+)")
_BYTES = {
    "B": 1,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}


def parse_duration(text: str) -> float:
    """Return the seconds in a text like "500ms", "30s", "1h30m" or "7d"."""
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise WrongValueError(f'{quoted(text)} is not a duration such as "500ms", "30s", "1h30m" or "7d"')
    return math.fsum(int(part) * unit for part, unit in zip(match.groups("0"), _SECONDS, strict=True))


def parse_size(text: str) -> int:
    """Return the bytes in a text like "256KiB", "1GiB" or "5MB"."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _BYTES:
        raise WrongValueError(f'{quoted(text)} is not a size such as "256KiB"; units are {", ".join(_BYTES)}')
    return int(match[1]) * _BYTES[match[2]]


def parse_rate(text: str) -> float:
    """Return how many a second a text like "50/s" or "1000/m" allows."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise WrongValueError(f'{quoted(text)} is not a rate such as "50/s" or "1000/m"')
    return int(match[1]) / (1 if match[2] == "s" else 60)


def duration_between(shortest: str, longest: str) -> Callable[[str], float]:
    """Make the reading of durations in this range."""
    low, high = parse_duration(shortest), parse_duration(longest)

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if not low <= seconds <= high:
            raise WrongValueError(f"{quoted(text)} is not from {shortest} to {longest}")
        return seconds

    return parse


def size_between(smallest: str, largest: str) -> Callable[[str], int]:
    """Make the reading of sizes in this range."""
    low, high = parse_size(smallest), parse_size(largest)

    def parse(text: str) -> int:
        size = parse_size(text)
        if not low <= size <= high:
            raise WrongValueError(f"{quoted(text)} is not from {smallest} to {largest}")
        return size

    return parse


def number_between(low: int, high: int) -> Callable[[int], int]:
    """Make the check of whole numbers in this range."""

    def parse(number: int) -> int:
        if not low <= number <= high:
            raise WrongValueError(f"{number} is not from {low} to {high}")
        return number

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """Make the check of a text that is one of these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise WrongValueError(f"{quoted(text)} is not one of {', '.join(words)}")
        return str(text)

    return parse
