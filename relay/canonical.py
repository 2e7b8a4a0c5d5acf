"""Canonical JSON: a JSON text in, the bytes JavaScript's JSON.stringify writes for the same value out.

A receiver that parses a body and serialises it again before verifying must meet the very bytes that
were signed (contract section 5). `parse` keeps what the text says exactly, `encode` writes it. The one
exception to JavaScript is deliberate: integers beyond 2^53, which it cannot hold, stay exact.

orjson does the work. It writes most values as JavaScript does already, so `encode` only looks over its
output for the few forms that differ, and rewrites the value when it finds one.

Nothing here knows what an event is, or limits the size of a text.
"""

import json
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import islice
from math import isfinite
from typing import TypeAlias
from urllib.parse import quote

import orjson

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

MAX_LEVELS = 64
MAX_PROBLEMS = 20
SMALLEST_INTEGER = -(2**63)
LARGEST_INTEGER = 2**64 - 1
LAST_ARRAY_INDEX = 2**32 - 2

TOO_LARGE = "an integer must be from -2^63 to 2^64-1 to stay exact; send a larger one as a string"
TOO_DEEP = f"nested deeper than {MAX_LEVELS} levels"


class NotJSON(ValueError):  # noqa: N818 - reads as a condition
    """The text is not JSON; the message says what is wrong and where."""


class Unrepresentable(ValueError):  # noqa: N818 - reads as a condition
    """JSON that cannot be kept exactly.

    `problems` holds up to `MAX_PROBLEMS` pairs of a JSON pointer (RFC 6901, as a URI fragment) and a
    sentence.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{pointer}: {sentence}" for pointer, sentence in self.problems))


def parse(source: bytes) -> JSON:
    """Return the value of a JSON text, with integers of any size. Raises only `NotJSON`."""
    try:
        if _may_hold_a_long_integer(source):
            return _with_exact_integers(_text(source))
        value: JSON = orjson.loads(source)
    except json.JSONDecodeError as error:
        _text(source)  # orjson blames the first character when the trouble is UTF-8 elsewhere
        raise NotJSON(f"not JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    return value


def encode(value: JSON, pointer: str = "#") -> bytes:
    """Return the bytes of a value that stands at `pointer`. Raises `Unrepresentable`.

    Nesting is allowed to `MAX_LEVELS`, the value itself being the first level when it is a container.
    """
    try:
        text = orjson.dumps(value)
    except TypeError:
        # An integer or a nesting beyond what orjson takes has a place to be named; else it was not JSON.
        _refuse_unrepresentable(value, pointer)
        raise
    if text.count(b"{") + text.count(b"[") > MAX_LEVELS:
        _refuse_unrepresentable(value, pointer)
    if isinstance(value, float) or _may_differ(text):
        return orjson.dumps(_like_javascript(value))
    return text


def _may_hold_a_long_integer(source: bytes) -> bool:
    """Tell whether there may be an integer that orjson would round to a float without a word.

    All of those have 19 digits or more, and neither a letter, a quote nor a dot stands before them.
    """
    return bool(_LONG_RUN.search(source.translate(_EVERY_DIGIT_TO_ZERO)))


_EVERY_DIGIT_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_RUN = re.compile(rb'0000000000000000000(?<![\w".]0{19})')  # a literal first: the search skips ahead


def _text(source: bytes) -> str:
    try:
        return source.decode()
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise NotJSON(f"not UTF-8 at line {line}, byte {error.start} of the text") from None


def _with_exact_integers(text: str) -> JSON:
    """Parse with the standard library, refusing the liberties that it takes and orjson does not."""
    try:
        value: JSON = _EXACT.decode(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise NotJSON("not JSON: a string holds half of a surrogate pair") from None
    except RecursionError:
        raise NotJSON("not JSON that can be read: nested too deep") from None
    return value


def _finite(number: str) -> float:
    value = float(number)
    if not isfinite(value):
        raise NotJSON(f"not JSON: {number[:40]} is infinity when parsed as double")
    return value


def _refuse_constant(name: str) -> JSON:
    raise NotJSON(f"not JSON: {name} is no value")


_EXACT = json.JSONDecoder(
    # 21 characters are enough to be out of range; thousands would cost time and end in an error of int().
    parse_int=lambda number: int(number[:21]),
    parse_float=_finite,
    parse_constant=_refuse_constant,
)


def _may_differ(text: bytes) -> bool:
    """Tell whether a container, as orjson wrote it, might differ from JavaScript; never misses one that does.

    Each pattern begins with a literal, which lets the search skip ahead: one pattern of alternatives
    takes several times as long. They look into strings too, but a number ends at `,`, `}` or `]`, so
    timestamps and hexadecimal ids raise no false alarm.
    """
    return bool(_INTEGRAL_FLOAT.search(text) or _EXPONENT.search(text) or _INTEGER_LIKE_KEY.search(text))


_INTEGRAL_FLOAT = re.compile(rb"\.0[,}\]]")
_EXPONENT = re.compile(rb"e[-+]?[0-9]++[,}\]]")
_INTEGER_LIKE_KEY = re.compile(rb'"[0-9]{1,10}":')


def _like_javascript(value: JSON) -> object:
    """Return the value with its members in JavaScript's order and its doubles already written."""
    if isinstance(value, float):
        return orjson.Fragment(_double(value))
    if isinstance(value, list):
        return [_like_javascript(element) for element in value]
    if isinstance(value, dict):
        return {name: _like_javascript(value[name]) for name in _own_keys(value)}
    return value


def _double(value: float) -> str:
    """Write a double as Number::toString does (ECMA-262 6.1.6.1.20); Python's repr has the same digits."""
    if not isfinite(value):
        return "null"
    if value == 0:
        return "0"  # minus zero too
    if 1e-6 <= abs(value) < 1e21:
        return format(Decimal(repr(value)), "f").removesuffix(".0")
    return repr(value).replace("e-0", "e-")


def _own_keys(value: dict[str, JSON]) -> Iterable[str]:
    """Order names as OrdinaryOwnPropertyKeys does (ECMA-262 10.1.11.1): array indices first, ascending."""
    indices = sorted((name for name in value if _is_array_index(name)), key=int)
    return dict.fromkeys((*indices, *value)) if indices else value


def _is_array_index(name: str) -> bool:
    return bool(_CANONICAL_INTEGER.fullmatch(name)) and int(name) <= LAST_ARRAY_INDEX


_CANONICAL_INTEGER = re.compile(r"0|[1-9][0-9]{0,9}")


def _refuse_unrepresentable(value: JSON, pointer: str) -> None:
    problems = tuple(islice(_problems(value, ()), MAX_PROBLEMS))
    if problems:
        raise Unrepresentable((_pointer(pointer, path), sentence) for path, sentence in problems)


_Path: TypeAlias = tuple[str | int, ...]


def _problems(value: JSON, path: _Path) -> Iterator[tuple[_Path, str]]:
    """Find what cannot be kept, in the order of the text; what is too deep is not looked into."""
    if isinstance(value, int):
        if not SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
            yield path, TOO_LARGE
    elif isinstance(value, dict | list):
        if len(path) >= MAX_LEVELS:
            yield path, TOO_DEEP
            return
        members: Iterable[tuple[str | int, JSON]]
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for name, member in members:
            yield from _problems(member, (*path, name))


def _pointer(start: str, path: _Path) -> str:
    """Continue a JSON pointer in its URI fragment form (RFC 6901 sections 3 and 6)."""
    names = (str(name).replace("~", "~0").replace("/", "~1") for name in path)
    return start + "".join("/" + quote(name, safe="!$&'()*+,;=:@?") for name in names)
