"""What goes over the wire: an event and a format in, the message to sign and send out.

A message's body depends on nothing but what was fixed at acceptance, so every attempt, retry and replay of
an event carries the same bytes (contract section 5). That goes for the CloudEvents source as well: a format
that shows it is `fixed` together with it, and kept with the delivery so.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

import orjson

from relay.model import Delivery, Event, Message

JSON_TYPE = "application/json"
CLOUDEVENTS_TYPE = "application/cloudevents+json"
DEFAULT_SOURCE = "relay"

_SOURCE = ";source="
_SHOW_A_SOURCE = ("cloudevents", "cloudevents-binary")
# CloudEvents HTTP binding 1.0.2, section 3.1.3.2: all else is percent-encoded.
_HEADER_SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
_TRACE_FLAGS = 0b11  # sampled, random: those that are defined; all others are to be zero


@dataclass(frozen=True, slots=True)
class Content:
    """What a format makes of an event."""

    body: bytes
    type: str = JSON_TYPE
    headers: tuple[tuple[str, str], ...] = ()


def event_body(event: Event) -> bytes:
    """Return `{"event":…,"timestamp":…,"data":…}`; type and timestamp need no escaping by their grammar."""
    return b'{"event":"%b","timestamp":"%b","data":%b}' % (
        event.type.encode(),
        event.timestamp.encode(),
        event.data,
    )


def digest(event: Event) -> bytes:
    """Return the SHA-256 of everything of an event that a receiver is shown and the disk could change."""
    return hashlib.sha256(event_body(event)).digest()


def is_intact(delivery: Delivery) -> bool:
    """Tell whether a delivery that was read from a disk says what was accepted."""
    if delivery.digest is not None and delivery.digest != digest(delivery.event):
        return False
    return name(delivery.format) in FORMATS


def _event(event: Event, _source: str) -> Content:
    return Content(event_body(event))


def _standard(event: Event, _source: str) -> Content:
    """Write the body that Standard Webhooks 1.0.0 recommends ("Payload structure")."""
    body = b'{"type":"%b","timestamp":"%b","data":%b}'
    return Content(body % (event.type.encode(), event.timestamp.encode(), event.data))


def _cloudevents(event: Event, source: str) -> Content:
    """Write the structured mode: one JSON object that holds attributes and data."""
    attributes = _attributes(event, source) | {"datacontenttype": JSON_TYPE}
    return Content(b'%b,"data":%b}' % (orjson.dumps(attributes)[:-1], event.data), CLOUDEVENTS_TYPE)


def _cloudevents_binary(event: Event, source: str) -> Content:
    """Write the binary mode: the attributes are headers, the data is the body."""
    attributes = _attributes(event, source).items()
    headers = ((f"ce-{name}", quote(value, safe=_HEADER_SAFE)) for name, value in attributes)
    return Content(event.data, headers=tuple(headers))


def _data(event: Event, _source: str) -> Content:
    return Content(event.data)


def _attributes(event: Event, source: str) -> dict[str, str]:
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": source,
        "type": event.type,
        "time": event.timestamp,
    }
    return attributes if event.key is None else attributes | {"subject": event.key}


FORMATS: dict[str, Callable[[Event, str], Content]] = {
    "event": _event,
    "standard": _standard,
    "cloudevents": _cloudevents,
    "cloudevents-binary": _cloudevents_binary,
    "data": _data,
}


def fixed(name: str, source: str) -> str:
    """Return what a delivery keeps of its format: the name, and the source where it shows one."""
    return f"{name}{_SOURCE}{source}" if name in _SHOW_A_SOURCE and source != DEFAULT_SOURCE else name


def name(format_: str) -> str:
    """Return the name of a fixed format."""
    return format_.partition(_SOURCE)[0]


def message(
    event: Event, format_: str, *, attempt: int, at_ms: int, trace: tuple[tuple[str, str], ...] = ()
) -> Message:
    """Write an event in a fixed format, for one attempt; `trace` are headers of this attempt alone."""
    known, _, source = format_.partition(_SOURCE)
    content = FORMATS[known](event, source or DEFAULT_SOURCE)
    return Message(
        id=event.id,
        type=event.type,
        body=content.body,
        content_type=content.type,
        attempt=attempt,
        timestamp=at_ms // 1000,
        headers=content.headers + trace,
    )


def child(traceparent: str, span: bytes) -> str:
    """Return the `traceparent` of a span, 8 bytes, below this one (W3C Trace Context level 2, 3.2)."""
    _, trace, _, flags = traceparent.split("-")
    return f"00-{trace}-{span.hex()}-{int(flags, 16) & _TRACE_FLAGS:02x}"
