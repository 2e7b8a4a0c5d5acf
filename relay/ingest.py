"""Ingest: a submission comes in, an event with one delivery for each subscribed endpoint is kept.

What an event may look like is decided here (contract section 3), for every way in. Reading gives either
a `Submission` or all its mistakes at once; keeping it is the outbox's promise, and once it is kept the
lanes are woken.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from relay import canonical, formats
from relay.catalogue import Catalogue
from relay.clock import Clock
from relay.model import Endpoint, Event, Owed, Receipt, Submission, immutable
from relay.outbox import Outbox
from relay.recent import Recent
from relay.subscription import EVENT_TYPE, EVENT_TYPE_LENGTH, OWN_PREFIX, Subscriptions
from relay.traces import Continued, Traces

LONGEST_KEY = 255
LONGEST_SLIP = 128  # what is longer is no slip of the pen, and would take long to compare
RANDOM_BYTES = 10  # of an id
DRAWN_AT_ONCE = 256
MOST_ALIKE = 20  # mistakes of one kind that one event is told of
TURN_SECONDS = 0.02  # for one submission at a time, when others wait
VISIBLE = re.compile(r"[\x21-\x7e]{1,255}")
QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')  # RFC 8941 section 3.3.3
RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d):(\d\d)(?:\.\d{1,40})?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")  # as much as everyone has to pass on (section 3.3.1.5)
MEMBERS = dict.fromkeys(("event", "data", "timestamp", "key", "to"))

Problem = tuple[str, str]  # where (a JSON pointer), what is wrong


class InvalidError(Exception):
    """A submission with mistakes; all of them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{pointer}: {detail}" for pointer, detail in self.problems))


class Trace(NamedTuple):
    """What a submission says of the trace it belongs to: its `traceparent` and `tracestate`."""

    parent: str
    state: str | None = None


@immutable
class Draft:
    """One submitted event as parsed, before it is checked.

    A way in that gave the event its id keeps it, and `at_ms` is when it happened where `value` does not say.
    """

    value: object
    pointer: str = "#"
    idempotency_key: str | None = None
    trace: Trace | None = None
    id: str | None = None
    at_ms: int | None = None


class Turn:
    """Lets others have the loop now and then during the work on a large batch."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._until = self._clock() + TURN_SECONDS

    async def over(self) -> None:
        """Return at once, or after the others' turn when ours is over."""
        if self._clock() >= self._until:
            await asyncio.sleep(0)
            self._until = self._clock() + TURN_SECONDS


class Ingest:
    """Turns drafts into events that are kept."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        subscriptions: Subscriptions,
        clock: Clock,
        wake: Callable[[Iterable[str]], None],
        catalogue: Catalogue | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.subscriptions = subscriptions
        self.recent = Recent()  # what was accepted lately; lanes add what became of it
        self._catalogue = catalogue or Catalogue([])
        self._outbox = outbox
        self._clock = clock
        self._wake = wake
        self._traces = traces or Continued()
        self._ids = EventIds()

    def subscribe(self, subscriptions: Subscriptions) -> None:
        """Match what is submitted from now on against these."""
        self.subscriptions = subscriptions
        self.recent.keep_only(subscriptions.endpoints)

    def learn(self, catalogue: Catalogue) -> None:
        """Hold what is submitted from now on against these types."""
        self._catalogue = catalogue

    async def submit(self, drafts: Sequence[Draft]) -> list[Receipt]:
        """Keep all drafts or none. Raises InvalidError, and what `Outbox.accept` raises."""
        submissions: list[Submission] = []
        problems: list[Problem] = []
        turn = Turn() if len(drafts) > 1 else None
        for draft in drafts:
            if turn is not None:
                await turn.over()
            try:
                submissions.append(self.read(draft))
            except InvalidError as error:
                problems += error.problems
        if problems:
            raise InvalidError(problems)
        return await self.keep(submissions)

    async def keep(self, submissions: Sequence[Submission]) -> list[Receipt]:
        """Keep what was read, all or none, and wake whoever it is for. Raises what `Outbox.accept` raises."""
        with self._traces.submitting(submissions) as traced:
            receipts = await self._outbox.accept(traced)
        new = sum(not receipt.duplicate for receipt in receipts)
        self.recent.accepted(new, self._clock.now_ms())
        self._wake({endpoint for receipt in receipts for endpoint in receipt.endpoints})
        return receipts

    def news(self, type_: str, data: Mapping[str, canonical.JSON], *, of: str) -> list[Submission]:
        """Return an event of the relay's own about endpoint `of`, or nothing when nobody else wants it."""
        endpoints = tuple(_owed(each) for each in self.subscriptions.wanting(type_) if each.id != of)
        if not endpoints:
            return []
        now_ms = self._clock.now_ms()
        event = Event(
            id=self._ids.make(now_ms),
            type=type_,
            timestamp=iso(now_ms),
            data=canonical.encode(dict(data)),
            accepted_at_ms=now_ms,
        )
        return [Submission(event=event, endpoints=endpoints, digest=formats.digest(event))]

    def read(self, draft: Draft) -> Submission:
        """Check a draft and make it an event, owed to whoever is subscribed now. Raises InvalidError."""
        value, pointer = draft.value, draft.pointer
        if not isinstance(value, dict):
            raise InvalidError([(pointer, "must be an object with the members event and data")])
        problems: list[Problem] = []
        if not value.keys() <= MEMBERS.keys():
            strange = islice((name for name in value if name not in MEMBERS), MOST_ALIKE)
            problems += [(f"{pointer}/{escaped(name)}", _unknown(name)) for name in strange]
        for name, check in CHECKS.items():
            if name in value and (wrong := check(value[name])):
                problems.append((f"{pointer}/{name}", wrong))
        problems += [(f"{pointer}/{name}", "is missing") for name in ("event", "data") if name not in value]
        data = b""
        try:
            data = canonical.encode(value.get("data"), f"{pointer}/data")
        except canonical.Unrepresentable as error:
            problems += error.problems
        if not problems:
            problems += self._unfit(str(value["event"]), value["data"], pointer)
            problems += self._strangers(value.get("to", ()), pointer)
        if problems:
            raise InvalidError(problems)
        return self._submission(draft, value, data)

    def _unfit(self, type_: str, data: object, pointer: str) -> list[Problem]:
        if wrong := self._catalogue.wrong_type(type_):
            return [(f"{pointer}/event", wrong)]
        return [(f"{pointer}/data{at}", detail) for at, detail in self._catalogue.wrong_data(type_, data)]

    def _strangers(self, to: Sequence[str], pointer: str) -> list[Problem]:
        known = self.subscriptions.endpoints
        strange = islice(((index, id_) for index, id_ in enumerate(to) if id_ not in known), MOST_ALIKE)
        return [
            (f"{pointer}/to/{index}", f"there is no endpoint {id_!r}{_nearest(id_, known)}")
            for index, id_ in strange
        ]

    def _submission(self, draft: Draft, value: dict[str, object], data: bytes) -> Submission:
        type_, to = str(value["event"]), value.get("to")
        timestamp, key = value.get("timestamp"), value.get("key")
        now_ms = self._clock.now_ms()
        event = Event(
            id=draft.id or self._ids.make(now_ms),
            type=type_,
            timestamp=str(timestamp) if timestamp is not None else iso(draft.at_ms or now_ms),
            data=data,
            accepted_at_ms=now_ms,
            key=str(key) if key is not None else None,
            traceparent=draft.trace.parent if draft.trace is not None else None,
            tracestate=draft.trace.state if draft.trace is not None else None,
        )
        endpoints = tuple(
            _owed(endpoint)
            for endpoint in self.subscriptions.wanting(type_)
            if not isinstance(to, list) or endpoint.id in to
        )
        fingerprint = None
        if draft.idempotency_key is not None:
            # A defaulted timestamp is not content: sent again later, it would be another one.
            fingerprint = hashlib.sha256(repr((type_, data, key, to, timestamp)).encode()).digest()
        return Submission(
            event=event,
            endpoints=endpoints,
            digest=formats.digest(event),
            idempotency_key=draft.idempotency_key,
            fingerprint=fingerprint,
            known_by_id=draft.id is not None,
        )


def _owed(endpoint: Endpoint) -> Owed:
    return Owed(endpoint.id, endpoint.format, endpoint.order == "key")


class EventIds:
    """Ids that sort by time: `evt_` and a UUIDv7 in hex (RFC 9562 section 5.7), always rising."""

    def __init__(self) -> None:
        self._last = 0
        self._drawn: list[bytes] = []

    def make(self, now_ms: int) -> str:
        if not self._drawn:  # the system is asked once for many
            drawn = os.urandom(RANDOM_BYTES * DRAWN_AT_ONCE)
            self._drawn = [drawn[at : at + RANDOM_BYTES] for at in range(0, len(drawn), RANDOM_BYTES)]
        random = int.from_bytes(self._drawn.pop(), "big")
        head = now_ms << 80 | 0x7 << 76 | (random >> 68) << 64
        value = head | 0x2 << 62 | random & (1 << 62) - 1
        # Within a millisecond, and after the clock was set back, the next id follows the last.
        self._last = value if value > self._last else self._last + 1
        return f"evt_{self._last:032x}"


def iso(at_ms: int) -> str:
    """Write a time as RFC 3339 in UTC, `2026-01-15T10:00:00.000Z`."""
    seconds, milliseconds = divmod(at_ms, 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


@lru_cache(maxsize=64)
def _second(at_seconds: int) -> str:
    return datetime.fromtimestamp(at_seconds, UTC).isoformat()[:-6]


def idempotency_key(header: str) -> str:
    """Return the key of a header, bare or a quoted string. Raises InvalidError."""
    quoted = QUOTED.fullmatch(header)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else header
    wrong = "is a quoted string without its end" if key.startswith('"') and not quoted else None
    if wrong := wrong or wrong_idempotency_key(key):
        raise InvalidError([("#", f"the header Idempotency-Key {wrong}")])
    return key


def trace(parent: str | None, state: str | None) -> Trace | None:
    """Return a valid trace context; a broken one is ignored, as W3C Trace Context section 3.2.2.3 asks."""
    if parent is None or not TRACEPARENT.fullmatch(parent):
        return None
    return Trace(parent, state if state is not None and TRACESTATE.fullmatch(state) else None)


def escaped(name: str) -> str:
    """Write a member's name for a JSON pointer (RFC 6901 section 3)."""
    return name.replace("~", "~0").replace("/", "~1")


def wrong_idempotency_key(value: object) -> str | None:
    if not isinstance(value, str) or not VISIBLE.fullmatch(value):
        return "must be 1 to 255 visible ASCII characters"
    return None


def _wrong_type(value: object) -> str | None:
    if not isinstance(value, str) or len(value) > EVENT_TYPE_LENGTH or not EVENT_TYPE.fullmatch(value):
        return "must be 1 to 128 of A-Z a-z 0-9 _ - in dot-separated parts, like post.published"
    if value.startswith(OWN_PREFIX):
        return "relay.* is the relay's own: choose another name"
    return None


def _wrong_timestamp(value: object) -> str | None:
    wrong = "must be a date and time of RFC 3339, like 2026-01-15T10:00:00.000Z"
    match = RFC3339.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return wrong
    date, minute, second = match.groups()
    try:
        # A leap second is a time too, but not one that Python knows.
        datetime.fromisoformat(f"{date}T{minute}:{'59' if second == '60' else second}")
    except ValueError:
        return wrong
    return None


def _wrong_key(value: object) -> str | None:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_KEY or not value.isprintable():
        return "must be 1 to 255 printable characters"
    return None


def _wrong_to(value: object) -> str | None:
    if not isinstance(value, list) or not value or not all(isinstance(id_, str) for id_ in value):
        return "must be a list of endpoint ids; without it every subscribed endpoint gets the event"
    return None


CHECKS: dict[str, Callable[[object], str | None]] = {
    "event": _wrong_type,
    "timestamp": _wrong_timestamp,
    "key": _wrong_key,
    "to": _wrong_to,
}


def _unknown(name: str) -> str:
    return "is not a member of an event" + _nearest(name, MEMBERS)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1) if len(name) <= LONGEST_SLIP else []
    return f"; did you mean {near[0]!r}?" if near else ""
