"""Who wants an event: a type in, the endpoints subscribed to it out.

An index by exact type and by prefix, so the cost of an event does not grow with the endpoints that do
not want it (contract section 4).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from relay.model import Endpoint

EVENT_TYPE = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")  # at most so long:
EVENT_TYPE_LENGTH = 128
OWN_PREFIX = "relay."  # the relay's own events; patterns do not match them
REMEMBERED_TYPES = 1024


class Subscriptions:
    """The endpoints by what they subscribed to."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints = {endpoint.id: endpoint for endpoint in endpoints}
        self._patterns: dict[str, set[str]] = defaultdict(set)
        for endpoint in self.endpoints.values():
            for pattern in endpoint.events:
                self._patterns[pattern].add(endpoint.id)
        self._wanting: dict[str, tuple[Endpoint, ...]] = {}

    def wanting(self, type_: str) -> tuple[Endpoint, ...]:
        """Return the endpoints that are to get events of this type, by id."""
        wanting = self._wanting.get(type_)
        if wanting is None:
            ids = set().union(*(self._patterns.get(pattern, ()) for pattern in _patterns(type_)))
            wanting = tuple(self.endpoints[id_] for id_ in sorted(ids))
            if len(self._wanting) >= REMEMBERED_TYPES:
                self._wanting.clear()
            self._wanting[type_] = wanting
        return wanting


def _patterns(type_: str) -> Iterator[str]:
    """Yield every pattern that matches `type_`: itself, `prefix.*` of any depth above it, `*`."""
    yield type_
    if type_.startswith(OWN_PREFIX):
        return
    at = type_.rfind(".")
    while at > 0:
        yield type_[:at] + ".*"
        at = type_.rfind(".", 0, at)
    yield "*"
