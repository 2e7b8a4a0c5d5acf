"""What counts as the same: two endpoints or two URLs in, whether they differ in anything that matters out."""

from dataclasses import replace
from urllib.parse import urlsplit

from relay.model import Endpoint, Message


def alike(one: Endpoint, other: Endpoint) -> bool:
    """Tell whether two readings of an endpoint are the same in everything, their secrets included."""
    return replace(one, sign=other.sign) == other and signed(one) == signed(other)


def signed(endpoint: Endpoint) -> list[list[tuple[str, str]]]:
    """Sign one message the way an endpoint does: secrets themselves are nobody's to look at."""
    message = Message(id="evt_0", type="a", body=b"", content_type="", attempt=1, timestamp=0)
    return [list(sign(message)) for sign in endpoint.sign]


def compared(url: str) -> str:
    """Write a URL as URLs are compared: scheme and host lower-cased, `:443` dropped (contract section 4)."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port not in {None, 443} else ""
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    except ValueError:
        return url
    return parts._replace(
        scheme=parts.scheme.lower(), netloc=f"{host}{port}", path=parts.path or "/"
    ).geturl()
