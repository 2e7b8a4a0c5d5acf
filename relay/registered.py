"""An endpoint as it is registered: its settings, whether it is paused, and when two of them are the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from relay.alike import alike
from relay.config import SettingsError
from relay.model import Endpoint
from relay.outbox import KeptEndpoint

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """An endpoint and what the relay was told of it."""

    endpoint: Endpoint
    paused: bool = False
    settings: Settings | None = None  # as kept, with its secrets; None for the config's
    overlap_until_ms: int | None = None  # when the older secret stops signing


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a new config changed, by the endpoints' ids."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    cancelled: Mapping[str, int]  # how many deliveries of those removed or set aside
    aside: tuple[
        str, ...
    ]  # of the API, newly set aside because the config has their id or URL or forbids them


def kept_of(registered: Registered, aside: Mapping[str, bytes]) -> KeptEndpoint:
    """Return what is kept of an endpoint; what the config has put aside comes back when it lets go of it."""
    id_, settings = registered.endpoint.id, registered.settings
    kept = orjson.dumps(settings) if settings is not None else aside.get(id_)
    return KeptEndpoint(id=id_, settings=kept, paused=registered.paused)


def unless_same(registered: Registered, before: Registered | None) -> Registered:
    """Return an endpoint as it was read before, if nothing about it has changed."""
    return before if before is not None and same(registered, before) else registered


def same(one: Registered, other: Registered) -> bool:
    """Tell whether two readings of an endpoint are the same in everything, its secrets included."""
    return replace(one, endpoint=other.endpoint) == other and alike(one.endpoint, other.endpoint)


def refuse_internal(values: Settings) -> None:
    """Refuse what is kept with the settings and is nobody's to set. Raises SettingsError."""
    problems = [(f"#/{name}", "unknown key") for name in ("secrets", "overlap_until_ms") if name in values]
    if problems:
        raise SettingsError(tuple(problems))
