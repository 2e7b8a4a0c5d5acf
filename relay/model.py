"""What the relay talks about: events, endpoints, deliveries and attempts.

An *event* is what the application posted. Accepting it makes one *delivery* for every endpoint that
wants it: the promise to bring that event there. Each HTTP request made to keep the promise is an
*attempt*; what it met is its *outcome*, and what follows from that is the *verdict*.

Nothing here does I/O or reads a clock, so every other module may import it. Points in time are whole
milliseconds since 1970 (UTC) in names ending `_ms`; lengths of time are in names that say their unit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def immutable(cls: type[T]) -> type[T]:
    """Make a dataclass that nothing changes: the type checker sees to it.

    A frozen one does so at run time, and takes three times as long to make; of these each event has a dozen.
    """
    return dataclass(slots=True, kw_only=True, unsafe_hash=True)(cls)


class Secret:
    """Text that must not be shown: every printed form of it is masked, and it is neither copied nor pickled.

    It is no string, and JSON refuses it: whoever wants to show one finds out at the first attempt.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __format__(self, _how: str) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, _memo: object) -> "Secret":
        return self

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError("a secret is not pickled")

    def reveal(self) -> str:
        """The text itself, for the few places that compute with it."""
        return self._text


class State(StrEnum):
    """Where a delivery stands (contract 1.2); in flight is not a state, so a crash needs no repair."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"
    CANCELLED = "cancelled"


@immutable
class Event:
    """Something that happened in the application; everything here is fixed at acceptance."""

    id: str  # sent as `webhook-id` on every attempt, so receivers can drop repeats
    type: str
    timestamp: str  # RFC 3339, as the application gave it
    data: bytes  # canonical JSON
    accepted_at_ms: int
    key: str | None = None  # what `order = "key"` orders by
    traceparent: str | None = None  # W3C Trace Context, of the submission
    tracestate: str | None = None


class Owed(NamedTuple):
    """To which endpoint an event is owed, and how; fixed at acceptance."""

    endpoint: str
    format: str
    ordered: bool = False  # after what was accepted earlier with the same key


@immutable
class Submission:
    """An event on its way into the outbox, with the endpoints that are to get it."""

    event: Event
    endpoints: tuple[Owed, ...]  # in the order of their ids
    digest: bytes  # SHA-256 of what is stored, checked again before each send
    idempotency_key: str | None = None
    fingerprint: bytes | None = None  # SHA-256 of the content as sent; tells a repeat from a conflict
    known_by_id: bool = False  # the event came with its id: where that is kept already, this is a repeat


@immutable
class Receipt:
    """What the application is told of an event that is kept."""

    id: str
    type: str
    timestamp: str
    endpoints: tuple[str, ...]
    duplicate: bool


@immutable
class Message:
    """One request's content before it is signed: what schemes sign and the sender posts."""

    id: str
    type: str
    body: bytes
    content_type: str
    attempt: int  # 1, 2, …
    timestamp: int  # seconds since 1970, made anew for every attempt
    headers: tuple[tuple[str, str], ...] = ()  # the format's own and the trace's


Headers = Iterable[tuple[str, str]]
Signer = Callable[[Message], Headers]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What a client shows, and trusts in place of the system's authorities; `digest` is of the contents."""

    ca: Path | None
    cert: Path | None
    key: Path | None  # None: in the file of the certificate
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """The way out of a network, asked by CONNECT."""

    host: str  # IPv6 without brackets
    port: int
    authorization: Secret | None = None  # the header's value

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One receiver, with every default filled in and every name resolved."""

    id: str
    url: str
    events: tuple[str, ...]  # exact types, `prefix.*` or `*`
    sign: tuple[Signer, ...] = field(repr=False)
    signatures: tuple[object, ...] = ()  # the names of the schemes, for people
    retry_schedule: tuple[float, ...]  # seconds before the 1st, 2nd, … retry
    timeout_seconds: float  # of one attempt, from the look-up to the last byte read
    concurrency: int  # attempts under way at once, at the most
    rate: float | None = None  # attempts a second, at the most
    order: str = "none"  # or "key"
    max_age_seconds: float = 7 * 86_400.0  # how long a delivery may wait before it is dead
    down_after: int = 5  # failures in a row; 0: never down
    probe_interval_seconds: float = 30.0  # before the first probe, doubling
    probe_max_seconds: float = 600.0
    format: str = "event"
    headers: tuple[tuple[str, Secret], ...] = ()
    description: str = ""
    source: str = "config"  # or "api"
    tls: TlsFiles | None = None
    proxy: Proxy | None = None


@immutable
class Source:
    """A PostgreSQL of an application's own, where it submits events by `relay_submit`."""

    id: str
    url: Secret  # it may hold a password
    schema: str = "public"  # where the function and its table are


@immutable
class Delivery:
    """One event owed to one endpoint, as claimed for an attempt."""

    handle: tuple[int, int]  # the store's own name for it
    event: Event
    endpoint: str
    format: str
    attempts: int  # made so far
    steps: int  # of the retry schedule used up so far
    due_ms: int
    digest: bytes | None  # of the event as accepted; None: it has not left the memory since
    ordered: bool = False  # among those of its event's key
    replayed: bool = False  # pending because somebody asked for it
    epoch: int = 0  # of the claim, where several relays may claim


@immutable
class Outcome:
    """What one attempt met; a network failure is a value here, never an exception."""

    milliseconds: int
    status: int | None = None  # of a complete response head
    reason: str | None = None  # a name of contract 6; None is success
    answer: str | None = None  # the first 1 KiB of the answer's body
    retry_after: str | None = None  # the header, as the receiver wrote it
    detail: str | None = None  # one sentence for the operator; may name addresses, so never for API users
    unspent: bool = False  # nothing was asked of the receiver, so it was no attempt


@immutable
class Verdict:
    """What becomes of the delivery: `PENDING` means again at `due_ms`."""

    state: State
    steps: int
    due_ms: int | None = None


@immutable
class Attempt:
    """One HTTP request made for a delivery, as it is kept and listed."""

    number: int
    at_ms: int
    milliseconds: int
    status: int | None
    reason: str | None
    answer: str | None


class Standing(StrEnum):
    """What the relay thinks of an endpoint (contract section 6); whether it is paused is a person's word."""

    UP = "up"
    DOWN = "down"  # failing: probed now and then
    GONE = "gone"  # said 410: waits for a person


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How an endpoint stands, as it is kept; `health.py` says how it changes."""

    standing: Standing = Standing.UP
    since_ms: int | None = None  # when it went down or gone
    failures: int = 0  # in a row
    failed_first: str | None = None  # the event that the first of them was for
    several: bool = False  # whether they were for more than one event
    probes: int = 0  # that failed since it is down
    probe_at_ms: int = 0  # when the next may go out
    not_before_ms: int = 0  # what the receiver asked for by Retry-After
    age_from_ms: int = 0  # waiting before this does not count towards `max_age`
