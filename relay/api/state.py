"""What the handlers share: the objects behind the API and how the relay stands."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from relay.catalogue import Catalogue
from relay.clock import Clock
from relay.endpoints import Endpoints
from relay.ingest import Ingest
from relay.metrics import Metrics
from relay.outbox import Outbox
from relay.registered import Changes
from relay.sender import Sender
from relay.sources.reader import SourceStanding


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """What a reload changed, and the keys whose new values wait for a restart."""

    changes: Changes
    needs_restart: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class State:
    """`refusing` says in a sentence why no event is taken, `unready` why the relay is not ready.

    `reload` reads the config again (`relay.reload`); it is put here when all else is joined.
    `sending` tells how many attempts are under way, of `most_sending`, and `sources` how each source stands;
    `servers` listen at `addresses`.
    """

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
    reload: Callable[[], Awaitable[Reloaded]] = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    sending: Callable[[], int] = lambda: 0
    most_sending: int = 0
    sources: Callable[[], Mapping[str, SourceStanding]] = dict
    servers: list[web.AppRunner] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)


STATE = web.AppKey("STATE", State)  # by which whoever serves an app finds it
