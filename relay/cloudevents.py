"""CloudEvents in: one in any of the three modes of HTTP comes in, the draft of an ordinary event goes out.

In structured mode an event is one JSON object, in batched mode a list of them, and in binary mode its
attributes are `ce-*` headers and its data is the body (CloudEvents 1.0.2, HTTP binding and JSON format).
`type` is the event, `time` its timestamp, `subject` its ordering key; `source` and `id` together are its
idempotency key. Other attributes are not kept (contract section 3).

What a type, a timestamp and a key may look like is asked of `ingest`, so that all mistakes are told at
once and under the names that the sender gave. Nothing here does I/O, or knows the catalogue.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import unquote_to_bytes

from relay import canonical, ingest
from relay.ingest import Draft, InvalidError, Problem, escaped

STRUCTURED = "application/cloudevents+json"
BATCHED = "application/cloudevents-batch+json"
MEDIA_TYPES = "application/cloudevents"  # what all of theirs begin with
PREFIX = "ce-"  # of the headers of binary mode

JSON_MEDIA_TYPE = re.compile(r"[^\s/;]+/([^\s/;]+\+)?json", re.IGNORECASE)
CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s;"]*)', re.IGNORECASE)
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')  # RFC 7230 section 3.2.6
REQUIRED = ("specversion", "id", "source", "type")
MEMBERS = {"type": "event", "time": "timestamp", "subject": "key"}  # attributes that an event has too


def is_binary(headers: Mapping[str, str]) -> bool:
    """Tell whether these are the headers of an event in binary mode.

    A structured event may repeat its attributes as headers; its media type decides (HTTP binding 3).
    """
    if not any(name[:3].lower() == PREFIX for name in headers):
        return False
    return not headers.get("Content-Type", "").lower().startswith(MEDIA_TYPES)


def structured(value: object, *, pointer: str = "#", trace: ingest.Trace | None = None) -> Draft:
    """Read one object that stands at `pointer`. Raises InvalidError."""
    if not isinstance(value, dict):
        raise InvalidError([(pointer, f"must be a CloudEvent: an object with {', '.join(REQUIRED)}")])
    # An attribute that is null is one that is not there (JSON format 2.2).
    attributes = {name: each for name, each in value.items() if each is not None}
    return _draft(attributes, value.get("data"), str, pointer=pointer, trace=trace)


def batched(values: Iterable[object], *, trace: ingest.Trace | None = None) -> list[Draft]:
    """Read each object of a list. Raises InvalidError with the mistakes of all."""
    drafts: list[Draft] = []
    problems: list[Problem] = []
    for index, value in enumerate(values):
        try:
            drafts.append(structured(value, pointer=f"#/{index}", trace=trace))
        except InvalidError as error:
            problems += error.problems
    if problems:
        raise InvalidError(problems)
    return drafts


def binary(headers: Mapping[str, str], body: bytes, *, trace: ingest.Trace | None = None) -> Draft:
    """Read headers and body; pointers name the headers. Raises InvalidError and `canonical.NotJSON`."""
    attributes: dict[str, object] = {
        name[3:].lower(): _decoded(value) for name, value in headers.items() if name[:3].lower() == PREFIX
    }
    # The header takes this attribute's place; only an event without data can do without it.
    attributes["datacontenttype"] = headers.get("Content-Type", "" if body else None)
    readable = body and _wrong("datacontenttype", attributes["datacontenttype"]) is None
    data = canonical.parse(body) if readable else None
    return _draft(attributes, data, _header, pointer="#", trace=trace)


def _draft(
    attributes: Mapping[str, object],
    data: canonical.JSON,
    named: Callable[[str], str],
    *,
    pointer: str,
    trace: ingest.Trace | None,
) -> Draft:
    problems = [
        (f"{pointer}/{escaped(named(name))}", wrong)
        for name in {**CHECKS, **attributes}
        if (wrong := _wrong(name, attributes.get(name)))
    ]
    try:
        canonical.encode(data, f"{pointer}/data")
    except canonical.Unrepresentable as error:
        problems += error.problems
    if problems:
        raise InvalidError(problems)
    members = {member: attributes[name] for name, member in MEMBERS.items() if name in attributes}
    # The extension "Distributed Tracing".
    own = (attributes.get(name) for name in ("traceparent", "tracestate"))
    parent, state = (value if isinstance(value, str) else None for value in own)
    return Draft(
        value={**members, "data": data},
        pointer=pointer,
        idempotency_key=_idempotency_key(attributes["source"], attributes["id"]),
        trace=trace or ingest.trace(parent, state),
    )


def _idempotency_key(source: object, id_: object) -> str:
    """Make one key of both, of any length and in any script; the space keeps it apart from clients' own."""
    pair = canonical.encode([str(source), str(id_)])
    return f"cloudevent {hashlib.sha256(pair).hexdigest()}"


def _header(attribute: str) -> str:
    return "content-type" if attribute == "datacontenttype" else PREFIX + attribute


def _decoded(header: str) -> str | bytes:
    """Return the text of a header (HTTP binding 3.1.3.2); bytes when it is no UTF-8, to be refused."""
    quoted = QUOTED.fullmatch(header)
    text = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else header
    decoded = unquote_to_bytes(text.encode(errors="surrogateescape"))
    try:
        return decoded.decode()
    except UnicodeDecodeError:
        return decoded


def _wrong(name: str, value: object) -> str | None:
    if value is None:
        return "is missing" if name in REQUIRED else None
    if isinstance(value, bytes):
        return "must be UTF-8, percent-encoded"
    return CHECKS[name](value) if name in CHECKS else None


def _wrong_version(value: object) -> str | None:
    return None if value == "1.0" else 'must be "1.0"'


def _wrong_text(value: object) -> str | None:
    return None if isinstance(value, str) and value else "must be a string that is not empty"


def _wrong_content_type(value: object) -> str | None:
    text = value if isinstance(value, str) else ""
    charset = CHARSET.search(text)
    if JSON_MEDIA_TYPE.fullmatch(text.partition(";")[0].strip()) is None:
        return "must be a JSON media type, like application/json: only JSON data is taken"
    if charset is not None and charset[1].lower() not in {"utf-8", "us-ascii"}:
        return "must be JSON in UTF-8"
    return None


def _wrong_base64(_value: object) -> str | None:
    return "only JSON data is taken: send it as data"


CHECKS: dict[str, Callable[[object], str | None]] = {
    "specversion": _wrong_version,
    "id": _wrong_text,
    "source": _wrong_text,
    **{name: ingest.CHECKS[member] for name, member in MEMBERS.items()},
    "datacontenttype": _wrong_content_type,
    "data_base64": _wrong_base64,
}
