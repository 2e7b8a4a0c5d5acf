"""The relay's own log: one JSON object a line, or text for people, on standard error.

The message of a record is one of a closed list of event names; everything else is in fields. Payloads,
secrets and signatures are never logged.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime

import orjson

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
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return _escaped(line)


class Text(logging.Formatter):
    """One line for people; foreign text is shown the way JSON escapes it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_shown(value)}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower():7} {record.getMessage()} {fields}".rstrip()
        if not record.exc_info:
            return line
        # The message of an exception may be foreign text: each of its lines stays behind the margin.
        trace = self.formatException(record.exc_info).splitlines()
        return "\n".join([line, *(f"  | {_printable(each)}" for each in trace)])


def configure(level: str, form: str | None) -> None:
    """Send all logging to standard error; `form` None means text on a terminal and JSON elsewhere."""
    text = form == "text" or (form is None and sys.stderr.isatty())
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(Text() if text else JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[stream], force=True)
    logging.getLogger("relay").setLevel(level.upper())
    # aiohttp logs what a stranger's bytes did to its parser as an error of ours, traceback included.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {
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
