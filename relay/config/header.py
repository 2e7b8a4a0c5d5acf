"""Headers that the operator adds to deliveries: names and values in, checked pairs out.

The values are secrets: they often carry a receiver's token.
"""

import re
from typing import Any

from relay.config.check import Report, Scalar, WrongValueError, has_type
from relay.config.lines import Place
from relay.model import Secret

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# What the relay or HTTP itself sets (contract 5); a second one would leave it to the receiver which counts.
_OWN = frozenset(
    {
        "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "date",
        "expect", "host", "keep-alive", "proxy-connection", "te", "traceparent", "trailer",
        "transfer-encoding", "upgrade", "user-agent",
        "x-socialsyncerapi-signature", "x-socialapi-signature",
        "stripe-signature",
        "x-hub-signature-256", "x-github-event", "x-github-delivery",
        "x-shopify-hmac-sha256", "x-shopify-topic", "x-shopify-webhook-id",
        "x-slack-signature", "x-slack-request-timestamp",
    }
)  # fmt: skip
_OWN_PREFIXES = ("webhook-", "svix-", "ce-")


class HeaderTable:
    """Reads a table of header names and their values."""

    toml: type = dict

    def read(self, raw: Any, at: Place, report: Report) -> tuple[tuple[str, Secret], ...] | None:
        """Return the pairs in the order of the table."""
        if not has_type(raw, dict, "a table of headers", at, report):
            return None
        pairs: dict[str, tuple[str, Secret]] = {}
        for name, value in raw.items():
            place = (*at, name)
            secret = _VALUE.read(value, place, report)
            if problem := name_problem(name):
                report.wrong(place, problem)
            elif name.lower() in pairs:
                report.wrong(place, "is given twice; upper and lower case are the same to HTTP")
            if secret is not None:
                pairs.setdefault(name.lower(), (name, secret))
        return tuple(pairs.values())


def name_problem(name: str) -> str | None:
    """Say why a header of this name cannot be added."""
    if not _NAME.fullmatch(name):
        return "is not a name a header can have"
    if name.lower() in _OWN or name.lower().startswith(_OWN_PREFIXES):
        return "is a header the relay sets itself"
    return None


def parse_header_value(text: str) -> Secret:
    """Read a header's value; its text appears in no mistake."""
    if _CONTROL.search(text):
        raise WrongValueError("holds a control character")
    return Secret(str(text))


_VALUE = Scalar(str, "text", parse_header_value)
