"""What goes over the wire: an event in, the body of its requests and their own headers out.

The body depends on nothing but what was fixed at acceptance, so every attempt, retry and replay of an
event carries the same bytes (contract section 5).
"""

import hashlib
from collections.abc import Callable

from relay.model import Event

JSON_TYPE = "application/json"


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


FORMATS: dict[str, Callable[[Event], bytes]] = {"event": event_body}
