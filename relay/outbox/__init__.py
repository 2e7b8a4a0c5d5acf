"""The outbox: the durable memory of the relay, and the promise every store of it keeps.

An application's event comes in by `accept`, which answers once the event and its deliveries are on
disk. A lane takes what is due by `claim`, or one after the other by `probe`, and gives it back by `record`,
with the attempt it made and the verdict that followed, or by `release`, unspent. `expire` ends what has
waited too long, `revive` puts back what was over. Everything else is looking (`due`, `backlog`, `pasts`,
`events`, `story`, `count`, `last_seen`, `size`) and keeping the house (`register`, `endpoints`,
`keep_endpoint`, `keep_health`, `drop_endpoint`, `advance`, `postpone`, `forget`, `shrink`, `backup`).

What every store promises:

- What `accept` has returned is kept: a crash or a power cut one instruction later loses nothing. A batch
  is accepted whole or not at all. When it raises anything but a conflict or `FullError`, it is unknown
  whether the events are kept.
- The same idempotency key gives the first receipt again, marked as a duplicate, and makes nothing new,
  also when both are submitted at the same moment; a different fingerprint under it is a conflict. So does
  the id of an event that is `known_by_id`, whatever else is submitted with it.
- A delivery is claimed by one lane at a time and is never claimed again before it was recorded or
  released. After a crash all that was claimed and not recorded is simply due again.
- `claim` answers in order of due time, then of acceptance, and never more than asked for. Its cost does
  not grow with what is pending.
- Of the deliveries of one key that are owed in order at one endpoint, only the oldest pending one is ever
  handed out. The next is when that one is over, also across restarts; a revived one goes before newer ones.
- A receipt names the endpoints that are owed the event: an endpoint dropped before the commit is not among
  them, one dropped after it has a cancelled delivery.
- `record` and `release` act only on what the caller still holds. `record` returns when the outcome is
  on disk; until then the delivery stays claimed. What it has to tell others is accepted in the same breath.
- Stores have no clock: every time comes in as an argument, in milliseconds since 1970.
- No exception of a store's own library leaves it; what does is named below.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from relay.model import Attempt, Delivery, Event, Health, Receipt, Secret, State, Submission, Verdict
from relay.outbox.sharing import Neighbours, Sharing

Committed = Callable[[float, int], None]  # told how long a commit took, in seconds, and of how many changes


class OutboxError(Exception):
    """Something is wrong with the outbox itself; the text is one sentence for the operator."""


class HeldError(OutboxError):
    """Another relay holds the outbox."""


class NewerSchemaError(OutboxError):
    """The outbox was written by a newer relay; it was not touched."""


class MovedError(OutboxError):
    """The outbox was moved elsewhere, or only a part of it is here; it was not touched."""


class DamagedError(OutboxError):
    """The file is not an outbox or is damaged, or its disk fails; what the last commit did is unknown."""


class UnavailableError(OutboxError):
    """Nothing can be kept at the moment; it may be asked again."""


class FullError(UnavailableError):
    """There is no room; nothing of this call was kept."""


class AwayError(UnavailableError):
    """The database is not reached or does not answer; whether anything of this call was kept is unknown."""


class ElsewhereError(OutboxError):
    """What was asked is the business of others; the text says whose."""


class StoppingError(OutboxError):
    """What was asked takes longer than the relay has."""


class ConflictError(Exception):
    """An idempotency key was used before for other content; `indexes` are the places in the batch."""

    def __init__(self, indexes: tuple[int, ...]) -> None:
        super().__init__(indexes)
        self.indexes = indexes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How large an outbox may become; None: as large as its disk."""

    max_bytes: int | None = None
    max_pending: int | None = None  # deliveries


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large an outbox is."""

    file_bytes: int
    log_bytes: int  # ahead of the file
    used_bytes: int  # what may be used again left out; measured now and then
    disk_free_bytes: int | None  # None: a database does not tell
    bounds: Bounds
    relays: int = 1  # that share it
    dropped: int = 0  # outcomes of ours, as another relay had the delivery by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How much waits for one endpoint, and how much was given up."""

    pending: int
    dead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptEndpoint:
    """An endpoint the outbox knows: what the API was told of it, as JSON; the config's have no settings."""

    id: str
    settings: bytes | None
    paused: bool
    health: Health = field(default_factory=Health)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """How an endpoint has fared."""

    oldest_pending_ms: int | None  # when the oldest event it still waits for was accepted
    last_success_at_ms: int | None
    last_failure_at_ms: int | None
    last_error: str | None
    health: Health = field(default_factory=Health)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """A delivery that waited too long and is dead now."""

    event_id: str
    type: str
    attempts: int  # made in vain


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """What one step of `expire` ended, and what is left."""

    expired: tuple[Expired, ...]
    more: bool  # old enough may be left: look again
    oldest_ms: int | None  # else since when the oldest of them waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Deliveries that are over, to be replayed: those of one event, or of one endpoint and state."""

    endpoint: str | None = None
    event_id: str | None = None
    state: State | None = None  # None: delivered, dead or cancelled
    type: str | None = None
    since_ms: int | None = None  # times of acceptance
    until_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryStory:
    """One delivery with all its attempts, oldest first.

    `due_ms` is when the next attempt comes at the earliest, with all that the endpoint waits for; None when
    there is none, or what it waits for has no time: an older one of its key, a resume.
    """

    endpoint: str
    state: State
    due_ms: int | None
    attempts: tuple[Attempt, ...]
    expired_at_ms: int | None = None  # when it had waited too long


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One event with everything that was done for it."""

    event: Event
    deliveries: tuple[DeliveryStory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which events to list, newest first; `before` is the cursor of the page before."""

    limit: int
    before: int | None = None
    type: str | None = None
    endpoint: str | None = None
    state: State | None = None
    since_ms: int | None = None
    until_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some of the events asked for, perhaps fewer than the limit, and where to go on."""

    stories: tuple[Story, ...]
    next_before: int | None


class Outbox(Protocol):
    """The verbs; what they promise is said at the top of this module."""

    async def register(self, endpoints: Sequence[str]) -> dict[str, int]:
        """Make these the endpoints there are; cancel what waits for others, and return how much of each."""
        ...

    async def endpoints(self) -> list[KeptEndpoint]:
        """Return every endpoint there ever was."""
        ...

    async def keep_endpoint(self, endpoint: KeptEndpoint) -> None:
        """Keep an endpoint or what changed of it; events may be accepted for it from now on."""
        ...

    async def keep_health(self, endpoint: str, health: Health) -> None:
        """Keep how an endpoint stands, apart from any attempt."""
        ...

    async def drop_endpoint(self, endpoint: str, aside: KeptEndpoint | None = None) -> int:
        """Cancel what waits for an endpoint and forget its settings; return how much was cancelled.

        What is put `aside` is kept of it, for its return.
        Nothing is accepted for it any more, also not what was submitted a moment before.
        """
        ...

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        """Keep all of these events, or none. Raises ConflictError, UnavailableError, DamagedError."""
        ...

    async def claim(
        self, endpoint: str, limit: int, now_ms: int, *, attempt_seconds: float = 0.0
    ) -> list[Delivery]:
        """Take up to `limit` deliveries that are due; an attempt takes so long at the most."""
        ...

    async def probe(self, endpoint: str, *, attempt_seconds: float = 0.0) -> Delivery | None:
        """Take the next pending delivery after the one probed before, due or not, each in its turn."""
        ...

    async def record(
        self,
        delivery: Delivery,
        attempt: Attempt,
        verdict: Verdict,
        *,
        health: Health | None = None,
        news: Sequence[Submission] = (),
    ) -> list[Receipt]:
        """Keep what an attempt met, what follows from it, and how the endpoint stands if that changed.

        `news` are events of the relay's own about it; their receipts are returned, none if there is no room.
        """
        ...

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Give back what was claimed and not attempted to an end; it is due as before."""
        ...

    def holds(self, delivery: Delivery) -> bool:
        """Tell whether an attempt may begin with what was claimed: that nobody else can have it by now."""
        ...

    async def due(self, endpoint: str) -> int | None:
        """Return when the next unclaimed delivery falls due; a time in the past means: claim."""
        ...

    async def expire(self, endpoint: str, before_ms: int, age_from_ms: int, now_ms: int) -> Patience:
        """Let deliveries be dead that wait since a time or earlier; before `age_from_ms` nothing waited.

        Looks at a bounded number. What is in flight is left alone.
        """
        ...

    async def advance(self, endpoint: str, latest_ms: int, now_ms: int) -> None:
        """Let nothing be due after `latest_ms`: the clock was set, and what is pending does not know."""
        ...

    async def postpone(self, endpoint: str, before_ms: int, now_ms: int) -> None:
        """Let what is due only because the clock was set forward, from one time to another, wait on."""
        ...

    async def last_seen(self) -> int | None:
        """Return what the clock said when anything was last accepted or attempted."""
        ...

    async def count(self, ended: Ended) -> int:
        """Count what `revive` would put back."""
        ...

    async def revive(self, ended: Ended, now_ms: int, spacing_ms: float = 0.0) -> int:
        """Put deliveries back to pending, due one `spacing_ms` after the other; return how many.

        Attempt numbers go on, the schedule starts again.
        """
        ...

    def heed(self, neighbours: Neighbours) -> None:
        """Tell these from now on what other relays did, where several share the outbox."""
        ...

    async def follow(self, endpoints: Sequence[str]) -> None:
        """Deliver to these, which are kept already, and to no others; nothing is cancelled."""
        ...

    async def is_current(self) -> bool:
        """Tell whether no other relay has changed endpoints since this one read them."""
        ...

    def trouble(self) -> str | None:
        """Say in a sentence why nothing can be kept at the moment, if that is so."""
        ...

    def size(self) -> Size: ...

    async def backlog(self) -> dict[str, Backlog]: ...

    async def pasts(self) -> dict[str, Past]: ...

    async def events(self, query: Query) -> Page: ...

    async def story(self, event_id: str) -> Story | None: ...

    async def forget(self, before_ms: int, limit: int) -> bool:
        """Drop old events that owe nothing, looking at `limit` of them; True if more may be left."""
        ...

    async def shrink(self) -> bool:
        """Give a little of what is free inside back to the disk; True if more should be given."""
        ...

    def backup(self) -> AbstractAsyncContextManager[Path]:
        """Make a consistent copy beside the outbox, while everything goes on; it is gone at the end.

        It holds every event whose `accept` returned before. Raises FullError, StoppingError.
        """
        ...


@asynccontextmanager
async def open_outbox(
    place: Path | Secret,
    *,
    synchronous: str = "full",
    bounds: Bounds = Bounds(),
    sharing: Sharing | None = None,
    committed: Committed = lambda _seconds, _changes: None,
) -> AsyncIterator[Outbox]:
    """Open the outbox in a file or at a database's address, made new if there is none. Raises OutboxError.

    `committed` hears of every commit.
    """
    if isinstance(place, Secret):
        try:
            from relay.outbox.postgres.opening import open_postgres
        except ImportError as error:
            if error.name != "asyncpg":
                raise
            raise OutboxError("outbox.url needs the extra: pip install relay[postgres]") from None
        shared = open_postgres(place, bounds=bounds, sharing=sharing or Sharing(), committed=committed)
        async with shared as outbox:
            yield outbox
        return
    from relay.outbox.opening import open_sqlite

    opened = open_sqlite(place, synchronous=synchronous, bounds=bounds, committed=committed)
    async with opened as outbox:
        yield outbox
