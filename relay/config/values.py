"""Names of events, endpoints and the relay, secrets, and samples: a raw value in, a checked one out.

Pure; `WrongValueError` says why a value will not do.
"""

import math
import re

from relay.config.check import UNRESOLVED, WrongValueError, nearest, quoted
from relay.model import Secret
from relay.subscription import EVENT_TYPE, EVENT_TYPE_LENGTH, OWN_PREFIX

_OWN_EVENTS = (
    "relay.endpoint.down",
    "relay.endpoint.recovered",
    "relay.endpoint.gone",
    "relay.delivery.dead",
)
_ENDPOINT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
_URI_CHARACTER = r"(?:[A-Za-z0-9._~:/?@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})"
_SOURCE = re.compile(rf"(?=.{{1,255}}\Z){_URI_CHARACTER}+(?:#{_URI_CHARACTER}*)?")
_SAMPLE_DEPTH = 64  # levels, `data` the first (contract 3)


def parse_endpoint_id(text: str) -> str:
    if not _ENDPOINT_ID.fullmatch(text):
        raise WrongValueError(f"{quoted(text)} is not 1 to 64 of A-Z a-z 0-9 _ -")
    return str(text)


def parse_event_type(text: str) -> str:
    """Read a type of the application's own events (contract 3)."""
    if len(text) > EVENT_TYPE_LENGTH or not EVENT_TYPE.fullmatch(text):
        raise WrongValueError(
            f"{quoted(text)} is not an event type: dot-separated parts of A-Z a-z 0-9 _ -, "
            f"{EVENT_TYPE_LENGTH} characters at most"
        )
    if text.startswith(OWN_PREFIX):
        raise WrongValueError("is one of the relay's own events, which are relay.*")
    return str(text)


def parse_subscription(text: str) -> str:
    """Read an exact event type, `prefix.*` or `*`; the relay's own events only by their full names."""
    if text == "*" or text in _OWN_EVENTS:
        return str(text)
    if text.startswith(OWN_PREFIX):
        raise WrongValueError(f"{quoted(text)} is none of the relay's own events{nearest(text, _OWN_EVENTS)}")
    prefix = text.removesuffix(".*")
    if "*" in prefix:
        raise WrongValueError(f'{quoted(text)}: a * stands alone or ends a prefix, as in "post.*"')
    parse_event_type(prefix)
    return str(text)


def parse_source(text: str) -> str:
    """Read a URI reference (RFC 3986): where CloudEvents come from."""
    if not _SOURCE.fullmatch(text):
        raise WrongValueError(
            f'{quoted(text)} is not a URI reference of 1 to 255 characters, such as "relay", "/shop" '
            'or "https://shop.example/relay"'
        )
    return str(text)


def parse_secret(text: str) -> Secret:
    """Read a signing secret; its text appears in no mistake."""
    if not text:
        raise WrongValueError("is empty")
    if text != text.strip():
        raise WrongValueError("begins or ends with white space, which was probably copied with it")
    return Secret(str(text))


def parse_token(text: str) -> Secret:
    """Read a bearer token, which has to fit into a header; its text appears in no mistake."""
    if not text:
        raise WrongValueError("is empty")
    if not _VISIBLE_ASCII.fullmatch(text):
        raise WrongValueError("holds other than visible ASCII characters")
    return Secret(str(text))


def parse_json(value: object, depth: int = _SAMPLE_DEPTH) -> object:
    """Copy a value that JSON can carry: no dates, infinities or integers beyond 64 bits."""
    match value:
        case _ if value is UNRESOLVED:
            return None
        case list() | dict() if depth == 0:
            raise WrongValueError("is nested deeper than 64 levels")
        case str():
            return str(value)
        case list():
            return [parse_json(item, depth - 1) for item in value]
        case dict():
            return {name: parse_json(item, depth - 1) for name, item in value.items()}
        case int() | float():
            return _json_number(value)
        case _:
            raise WrongValueError("holds a date or time, which JSON does not have; write it as text")


def _json_number(number: float) -> float:
    match number:
        case int() if -(2**63) <= number < 2**64:
            return number
        case float() if math.isfinite(number):
            return number
        case _:
            raise WrongValueError("holds a number that JSON cannot carry exactly")
