"""What the handlers share: the objects behind the API and how the relay stands."""

from dataclasses import dataclass

from relay.ingest import Ingest
from relay.outbox import Outbox


@dataclass(slots=True, kw_only=True)
class State:
    """`refusing` says in a sentence why no event is taken, `unready` why the relay is not ready."""

    outbox: Outbox
    ingest: Ingest
    max_event_size: int
    refusing: str | None = None
    unready: str | None = None
