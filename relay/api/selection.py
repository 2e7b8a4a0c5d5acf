"""Which events are meant: the filters of a list and of a replay in, what the outbox understands out.

Every mistake is told at once, with its place.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from relay.api.answers import Mistake, invalid
from relay.config import WrongValueError, parse_rate
from relay.ingest import RFC3339, escaped
from relay.model import State
from relay.outbox import Ended, Query

DEFAULT_LIMIT = 50
LARGEST_LIMIT = 200
STATES = {state.value: state for state in State}
ENDED = {state: STATES[state] for state in ("delivered", "dead", "cancelled")}
QUERY = ("event", "endpoint", "state", "since", "until", "limit", "cursor")
REPLAY = ("state", "since", "until", "event", "rate", "dry_run")


class WrongError(ValueError):
    """What is wrong with one value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What is to be sent again, and how fast."""

    ended: Ended
    spacing_ms: float  # from one delivery to the next
    dry_run: bool


def read_query(given: Mapping[str, str]) -> Query:
    """Read the query of a list. Raises 422."""
    mistakes = unknown(given, QUERY, "#")
    read = _reader(given, "#", mistakes)
    query = Query(
        limit=read("limit", _limit) or DEFAULT_LIMIT,
        before=read("cursor", _cursor),
        type=read("event", _text),
        endpoint=read("endpoint", _text),
        state=read("state", _one_of(STATES)),
        since_ms=read("since", _time),
        until_ms=read("until", _time),
    )
    if mistakes:
        raise invalid(mistakes)
    return query


def read_replay(given: Mapping[str, Any], *, endpoint: str) -> Replay:
    """Read which deliveries of an endpoint are to be replayed; the dead ones unless told otherwise."""
    mistakes = unknown(given, REPLAY)
    read = _reader(given, "#/", mistakes)
    ended = Ended(
        endpoint=endpoint,
        state=read("state", _one_of(ENDED)) or State.DEAD,
        type=read("event", _text),
        since_ms=read("since", _time),
        until_ms=read("until", _time),
    )
    replay = Replay(
        ended=ended, spacing_ms=read("rate", _spacing) or 0.0, dry_run=bool(read("dry_run", _switch))
    )
    if mistakes:
        raise invalid(mistakes)
    return replay


def unknown(given: Mapping[str, Any], known: Iterable[str], prefix: str = "#/") -> list[Mistake]:
    """Return a mistake for every member that there is not."""
    text = f"is unknown; known are {', '.join(known)}"
    return [(f"{prefix}{escaped(name)}", text) for name in given if name not in known]


def _reader(given: Mapping[str, Any], prefix: str, mistakes: list[Mistake]) -> Any:
    def read(name: str, parse: Callable[[Any], Any]) -> Any:
        if given.get(name) is None:  # in JSON null stands for what was left out
            return None
        try:
            return parse(given[name])
        except WrongError as wrong:
            mistakes.append((f"{prefix}{name}", str(wrong)))
            return None

    return read


def _limit(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", value) or not 1 <= int(value) <= LARGEST_LIMIT:
        raise WrongError(f"must be 1 to {LARGEST_LIMIT}")
    return int(value)


def _cursor(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise WrongError("must be the next_cursor of the page before")
    return int(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise WrongError("must be text")
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongError("must be true or false")
    return value


def _spacing(value: object) -> float:
    try:
        return 1000 / parse_rate(value if isinstance(value, str) else "")
    except WrongValueError:
        raise WrongError('must be a rate such as "50/s" or "1000/m"') from None


def _one_of(states: Mapping[str, State]) -> Callable[[object], State]:
    def read(value: object) -> State:
        if not isinstance(value, str) or value not in states:
            raise WrongError(f"must be one of {', '.join(states)}")
        return states[value]

    return read


def _time(value: object) -> int:
    """Read a time of RFC 3339, in milliseconds since 1970."""
    try:
        if not isinstance(value, str) or not RFC3339.fullmatch(value):
            raise WrongError("must be a date and time of RFC 3339, like 2026-01-15T10:00:00Z")
        return round(datetime.fromisoformat(value.upper()).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise WrongError("must be a date and time of RFC 3339, like 2026-01-15T10:00:00Z") from None
