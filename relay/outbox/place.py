"""Where an outbox is, for people: a path or an address in, text without secrets out."""

from pathlib import Path
from urllib.parse import urlsplit

from relay.model import Secret


def shown(place: Path | Secret) -> str:
    """Write a path whole; of an address neither its password nor what follows the database's name."""
    if isinstance(place, Path):
        return str(place.resolve())
    parts = urlsplit(place.reveal())
    user, at, hosts = parts.netloc.rpartition("@")
    return f"postgresql://{user.partition(':')[0]}{at}{hosts}{parts.path}"
