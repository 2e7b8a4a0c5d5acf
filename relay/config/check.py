"""The checker: tables as `tomllib` gives them in, values of our own types out, every mistake noted.

A *reader* turns one raw value into a value of the config or says why it cannot. Readers never raise: they
note the mistake in the report and return None, so that one run finds all of them. The keys of a table
are the fields of a dataclass that are annotated with a reader: `Annotated[float, READER, "name"]`.

Nothing here knows which keys exist, or reads files or the environment.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Generic, Protocol, TypeVar, get_type_hints

from relay.config.lines import Place

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN_LENGTH = 120


class WrongValueError(ValueError):
    """What is wrong with one value, in words that follow the name of its key."""


class Substituted(str):
    """Text that came from a variable or a file; mistakes show what was `written`, for it may be a secret."""

    written: str


# Stands for a value whose reference leads nowhere: that was told, and nothing follows from it.
UNRESOLVED: Final = object()


class Report:
    """The mistakes found so far, in the order of finding."""

    def __init__(self) -> None:
        self.found: list[tuple[Place, str]] = []

    def wrong(self, at: Place, text: str) -> None:
        self.found.append((at, text))

    def clean(self, *places: Place) -> bool:
        """Whether nothing is wrong at or below these places, so that a further check makes sense."""
        return not any(at[: len(place)] == place for at, _ in self.found for place in places)


class Reader(Protocol[T_co]):
    """Turns a raw value into one of ours; None when it cannot, which is then in the report."""

    @property
    def toml(self) -> type:
        """The type that `tomllib` gives for such a value."""

    def read(self, raw: Any, at: Place, report: Report) -> T_co | None: ...


@dataclass(frozen=True, slots=True)
class Scalar(Generic[T]):
    """A single value: `parse` gets what TOML holds and raises `WrongValueError` when that will not do."""

    toml: type
    noun: str  # completes "expected …"
    parse: Callable[[Any], T]

    def read(self, raw: Any, at: Place, report: Report) -> T | None:
        if not has_type(raw, self.toml, self.noun, at, report):
            return None
        try:
            return self.parse(raw)
        except WrongValueError as mistake:
            report.wrong(at, str(mistake))
            return None


@dataclass(frozen=True, slots=True)
class ListOf(Generic[T]):
    """A list of values that one reader reads."""

    item: Reader[T]
    noun: str
    at_least: int = 0
    distinct: bool = False
    toml: type = list

    def read(self, raw: Any, at: Place, report: Report) -> tuple[T, ...] | None:
        if not has_type(raw, list, self.noun, at, report):
            return None
        if len(raw) < self.at_least:
            report.wrong(at, f"is empty; expected {self.noun}")
            return None
        items = [self.item.read(item, (*at, index), report) for index, item in enumerate(raw)]
        for index, item in enumerate(items):
            if self.distinct and item is not None and item in items[:index]:
                report.wrong((*at, index), "is listed twice")
        return tuple(item for item in items if item is not None)


@dataclass(frozen=True, slots=True)
class Key:
    """How one key of a table is read, and into which field."""

    field: str
    reader: Reader[Any]
    required: bool


@cache
def keys(table: type) -> Mapping[str, Key]:
    """List the keys of a table by their name in the file."""
    annotations = get_type_hints(table, include_extras=True)
    found: dict[str, Key] = {}
    for field in dataclasses.fields(table):
        # A field that is not annotated with a reader is no key.
        reader, *names = getattr(annotations[field.name], "__metadata__", (None,))
        if reader is not None:
            name = names[0] if names else field.name
            found[name] = Key(field.name, reader, required=field.default is dataclasses.MISSING)
    return found


def read_table(raw: Any, at: Place, report: Report, *kinds: type) -> tuple[dict[str, Any], ...]:
    """Read a table that holds the keys of these kinds; return what is there and right, by field, for each."""
    if not has_type(raw, dict, "a table", at, report):
        return tuple({} for _ in kinds)
    refuse_unknown(raw, [name for kind in kinds for name in keys(kind)], at, report)
    return tuple(_fields(kind, raw, at, report) for kind in kinds)


def _fields(kind: type, raw: Mapping[str, object], at: Place, report: Report) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, known in keys(kind).items():
        place = (*at, name)
        if name in raw:
            value = known.reader.read(raw[name], place, report)
            if value is not None:
                values[known.field] = value
        elif known.required:
            report.wrong(place, "is missing")
    return values


def refuse_unknown(raw: Mapping[str, object], known: Iterable[str], at: Place, report: Report) -> None:
    """Note every key that is not among the known ones."""
    names = list(known)
    for name in raw:
        if name not in names:
            report.wrong((*at, name), f"unknown key{nearest(name, names)}")


def has_type(raw: Any, toml: type, noun: str, at: Place, report: Report) -> bool:
    """Tell whether the value is of the TOML type, and note it when it is not."""
    # To Python true is a number too; to TOML and to people it is none.
    fits = isinstance(raw, toml) and (toml in (bool, object) or not isinstance(raw, bool))
    if not fits and raw is not UNRESOLVED:
        report.wrong(at, f"expected {noun}, not {_sort_of(raw)}")
    return fits


def nearest(name: str, known: Iterable[str]) -> str:
    """End a sentence about an unknown name with the one that was probably meant, or with all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known are {', '.join(names)}" if names else ""


def quoted(value: str) -> str:
    """Show a value inside a mistake on one line, as far as it may be shown."""
    text = value.written if isinstance(value, Substituted) else value
    if len(text) > _SHOWN_LENGTH:
        text = text[:_SHOWN_LENGTH] + "…"
    return json.dumps(text, ensure_ascii=False)


def dotted(place: Place) -> str:
    """Name a place as it is named in TOML: endpoints[2].url, events."post.published".sample."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += "." * bool(text) + (step if _BARE_KEY.fullmatch(step) else quoted(step))
    return text


def _sort_of(raw: Any) -> str:
    match raw:
        case bool():
            return "a boolean"
        case str():
            return "text"
        case int() | float():
            return "a bare number"
        case list():
            return "a list"
        case dict():
            return "a table"
        case _:
            return "a date or time"
