"""The relay's own log: one JSON object a line, or text for people, on standard error.

The message of a record is one of a closed list of event names; everything else is in fields. Payloads,
secrets and signatures are never logged.
"""

import json
import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import orjson

_ATTEMPT = ("event_id", "endpoint", "attempt", "status", "milliseconds", "reason", "detail")

# Every line there is, with the fields it may have; the README says what they mean.
EVENTS: Mapping[str, tuple[str, ...]] = {
    "started": (
        "config",
        "version",
        "python",
        "loop",
        "sqlite",
        "outbox",
        "addresses",
        "endpoints",
        "pending",
    ),
    "listening": ("addresses",),
    "stopping": ("grace_seconds",),
    "stopped": (),
    "failed": ("error",),
    "attempt_delivered": _ATTEMPT,
    "attempt_failed": (*_ATTEMPT, "retry_in_seconds"),
    "attempt_unspent": _ATTEMPT,
    "attempt_broke": ("event_id", "endpoint", "untold"),
    "delivery_dead": _ATTEMPT,
    "deliveries_expired": ("endpoint", "deliveries"),
    "endpoint_failing": (*_ATTEMPT, "retry_in_seconds", "failures", "dead", "unspent", "seconds"),
    "endpoint_down": ("endpoint", "reason", "failures"),
    "endpoint_recovered": ("endpoint", "reason", "failures"),
    "endpoint_gone": ("endpoint", "reason", "failures"),
    "endpoint_set_aside": ("endpoint",),
    "reloaded": ("added", "changed", "removed"),
    "reload_refused": ("problems",),
    "restart_needed": ("keys",),
    "deliveries_cancelled": ("endpoint", "deliveries"),
    "drain_cut_off": ("endpoint", "deliveries"),
    "clock_was_set": ("seconds",),
    "source_failing": ("source", "error"),
    "source_recovered": ("source", "seconds"),
    "submissions_refused": ("source", "submissions", "event_id", "reason"),
    "outbox_full": ("error", "untold", "unrecorded", "cancelled"),
    "outbox_has_room": (),
    "outbox_away": ("error",),
    "outbox_back": (),
    "outcome_dropped": ("event_id", "endpoint"),
    "relay_lapsed": ("relay",),
    "relay_buried": ("relay", "host"),
    "claims_lapsed": ("deliveries",),
    "outcomes_unrecorded": ("unrecorded",),
    "request_failed": ("method", "path", "untold"),
    "request_broken": ("reason",),
    "traces_off": ("error",),
    "library": ("logger", "message", "untold"),
}

SELDOM_SECONDS = 60.0
KINDS_AT_MOST = 1_000

# What a record carries besides what we put into `extra`.
STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


# What steers a terminal or ends a line for some readers, and what JSON leaves as it is.
STEERING = re.compile(r"[\x7f-\x9f\u2028\u2029]")


class JsonLines(logging.Formatter):
    """One object a line; JSON escapes control characters, so no text can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": _time(record),
            "level": record.levelname.lower(),
            "event": _event(record),
            **_fields(record),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return _escaped(line)


class Text(logging.Formatter):
    """One line for people; foreign text is shown the way JSON escapes it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_shown(value)}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower():7} {_event(record)} {fields}".rstrip()
        if not record.exc_info:
            return line
        # The message of an exception may be foreign text: each of its lines stays behind the margin.
        trace = self.formatException(record.exc_info).splitlines()
        return "\n".join([line, *(f"  | {_printable(each)}" for each in trace)])


class Seldom:
    """Lets one of a kind pass in a minute, and tells it how many were held back since the last."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, int]] = {}  # kind -> when one passed, how many were held back

    def passes(self, kind: str) -> int | None:
        """Return how many were held back, or None when this one is to be held back too."""
        now = time.monotonic()
        since, held_back = self._kinds.get(kind, (-math.inf, 0))
        if now - since < SELDOM_SECONDS:
            self._kinds[kind] = (since, held_back + 1)
            return None
        if len(self._kinds) >= KINDS_AT_MOST:
            self._kinds.clear()
        self._kinds[kind] = (now, 0)
        return held_back


class Repeats(logging.Filter):
    """Holds back for a minute what says the same again: traces of faults, and whatever libraries say."""

    def __init__(self) -> None:
        super().__init__()
        self._seldom = Seldom()

    def filter(self, record: logging.LogRecord) -> bool:
        if _is_ours(record) and not record.exc_info:
            return True
        fault = record.exc_info[0] if record.exc_info else None
        untold = self._seldom.passes(f"{record.name} {record.msg} {fault} {vars(record).get('endpoint')}")
        if untold:
            record.untold = untold
        return untold is not None


def configure(level: str, form: str | None) -> None:
    """Send all logging to standard error; `form` None means text on a terminal and JSON elsewhere."""
    text = form == "text" or (form is None and sys.stderr.isatty())
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(Text() if text else JsonLines())
    stream.addFilter(Repeats())
    logging.basicConfig(level=logging.WARNING, handlers=[stream], force=True)
    logging.getLogger("relay").setLevel(level.upper())
    # aiohttp logs what a stranger's bytes did to its parser as an error of ours, traceback included.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def undocumented(record: logging.LogRecord) -> list[str]:
    """Name what of a line of ours `EVENTS` does not have."""
    event = record.getMessage()
    if event not in EVENTS:
        return [event]
    return [f"{event}: {name}" for name in _fields(record) if name not in EVENTS[event]]


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name == "relay" or record.name.startswith("relay.")


def _event(record: logging.LogRecord) -> str:
    return record.getMessage() if _is_ours(record) else "library"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    said = {} if _is_ours(record) else {"logger": record.name, "message": record.getMessage()}
    return said | {
        name: value
        for name, value in vars(record).items()
        if name not in STANDARD_FIELDS and value is not None
    }


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else _escaped(text)


def _printable(text: str) -> str:
    return text if text.isprintable() else _escaped(text)


def _escaped(value: object) -> str:
    """Write JSON without any character that could end the line or steer a terminal; never fails."""
    try:
        text = orjson.dumps(value, default=str).decode()
    except orjson.JSONEncodeError:  # bytes that are no UTF-8 and integers beyond 64 bits are told too
        text = json.dumps(value, default=str)
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
