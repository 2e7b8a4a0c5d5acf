"""What the handlers share: the objects behind the API and how the relay stands."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from relay.catalogue import Catalogue
from relay.clock import Clock
from relay.endpoints import Endpoints
from relay.ingest import Ingest
from relay.outbox import Outbox
from relay.sender import Sender


@dataclass(slots=True, kw_only=True)
class State:
    """`refusing` says in a sentence why no event is taken, `unready` why the relay is not ready."""

    outbox: Outbox
    ingest: Ingest
    endpoints: Endpoints
    catalogue: Catalogue
    sender: Sender
    clock: Clock
    wake: Callable[[Iterable[str]], None]
    max_event_size: int
    refusing: str | None = None
    unready: str | None = None
