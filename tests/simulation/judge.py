"""The judge: a journal in, every broken promise out.

It walks the journal once, in order, with a model of its own of what must be true at each moment: which
deliveries are owed and since when, how each endpoint stands, what it may be sent. The rules are those of
the contract, written down a second time and without looking at the relay's. What was asked of the outbox
and not answered when the relay was killed may have happened or not; from then on the next start says which
it was.

Times that must have gone by are counted in virtual time, with the jumps forward of the wall clock added:
nothing can be known of those but that they look like time.
"""

# ruff: noqa: A002, C901, FBT001, PLR0917 - handlers take what entries hold, by its names; rules are told in one piece

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from relay.model import Endpoint, Health
from tests.simulation.journal import Entry, Journal, told

JITTER = 0.10
EPSILON = 0.0021  # times are kept in whole milliseconds
DRIFT_SECONDS = 5.0  # what a wall clock may be off without having been set
LONGEST_REST_SECONDS = 24 * 3600.0  # so long the relay may have been off without its clock having been set
NOTICED_SECONDS = 30.0  # a running relay has taken note of a jump after this
SOON_SECONDS = (
    150.0  # what may go goes within this: a lane may learn late that the clock was set, a disk may crawl
)
STATES = ("pending", "delivered", "dead", "cancelled")


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken, and where the journal says so."""

    figure: str
    text: str
    index: int


@dataclass(slots=True)
class Owed:
    """One event owed to one endpoint, as far as the judge can know."""

    id: str
    endpoint: str
    key: str | None  # only where it is owed in order
    possible: set[str]  # where it may stand
    accepted: float
    seq: int = 0
    attempts: int = 0  # recorded
    steps: int | None = 0  # None: the schedule was being changed
    replays: int = 0
    taken: int = 0  # 2xx answers, as the receiver knows
    unsure: int = 0  # of these, such as the relay did not get to record
    first_taken: int | None = None  # where in the journal
    not_before: float = 0.0
    surely_not_before: float = 0.0  # as it was recorded
    due_ms: int = 0
    at_the_latest: float = 0.0  # may go from then on, if its endpoint may be sent to
    aged_from: float = 0.0
    body: str | None = None
    was_over: bool = False  # given up or cancelled at some time

    @property
    def is_pending(self) -> bool:
        return self.possible == {"pending"}


@dataclass(frozen=True, slots=True)
class Stands:
    """How an endpoint stands: a state that the relay may find again after a restart."""

    standing: str = "up"
    failures: int = 0
    ids: frozenset[str] = frozenset()  # of the first, and whether there is another
    probes: int = 0
    probe_from: float = 0.0
    floor: float = 0.0
    open_at: float = 0.0  # the later of both, in virtual time


@dataclass(slots=True)
class Flight:
    """An attempt under way."""

    owed: Owed
    number: int
    probe: bool
    begun: float


@dataclass(slots=True)
class Receiver:
    """What the judge knows of one endpoint."""

    settings: Endpoint | None = None
    paused: bool = False
    stands: Stands = field(default_factory=Stands)
    loose: int = 0  # changes of it under way: what holds is the old or the new
    history: list[tuple[int, Stands]] = field(
        default_factory=lambda: [(0, Stands())]
    )  # how it may stand on disk
    flights: dict[int, Flight] = field(default_factory=dict)
    tokens: float = 1.0
    tokens_at: float = 0.0
    stirred: float = 0.0  # when anything last happened to it


class Judge:
    """One journal's; `violations` and `figures` say what was found."""

    def __init__(self, journal: Journal, bodies: Mapping[str, bytes]) -> None:
        self.violations: list[Violation] = []
        self.figures: Counter[str] = Counter()
        self._entries = journal.entries
        self._bodies = bodies
        self._index = 0
        self._entry = Entry("", 0.0, 0, {})
        self._forward = 0.0  # of the wall clock, all jumps together
        self._overlooked = 0.0  # the part of them that no running relay could notice
        self._unseen = 0.0  # the part of those that it could not even suspect at its start
        self._owed: dict[tuple[str, str], Owed] = {}
        self._by_key: dict[tuple[str, str], list[Owed]] = defaultdict(list)
        self._receivers: dict[str, Receiver] = defaultdict(Receiver)
        self._attempts: dict[int, tuple[str, int]] = {}  # endpoint, and where it began
        self._offers: dict[int, list[Any]] = {}
        self._records: dict[int, tuple[Owed, str, bool, int]] = {}
        self._removing: set[str] = set()
        self._reviving: dict[int, str | None] = {}
        self._expiring: set[str] = set()
        self._resuming: dict[int, str] = {}  # by what the operator does
        self._seqs: dict[str, int] = {}
        self._ids_by_number: dict[int, set[str]] = defaultdict(set)
        self._receipts: dict[str, str] = {}  # idempotency key -> id
        self._submitting: dict[int, float] = {}
        self._acknowledged: list[tuple[float, str]] = []
        self._bodies_by_id: dict[str, str] = {}
        self._forgets = False
        self._running = False
        self._booted = 0.0
        self._jumps: list[tuple[float, float]] = []
        self._kept_endpoints: Mapping[str, Any] = {}

    def judge(self, *, forgets: bool, drained_after: float | None, whole: bool = True) -> list[Violation]:
        """Walk the journal, which may break off if it is not whole; return what is wrong."""
        self._forgets = forgets
        self._read_ahead()
        for index, entry in enumerate(self._entries):
            self._index, self._entry = index, entry
            getattr(self, f"_on_{self._entry.kind}")(**self._entry.what)
            if len(self.violations) >= 20:
                return self.violations
        if not whole:
            return self.violations
        if drained_after is None:
            self._wrong("time_to_drain", "something is pending long after the faults stopped")
        self.figures["most_seconds_to_drain"] = round(drained_after or 0)
        self._sum_up()
        return self.violations

    def context(self, violation: Violation, many: int = 12) -> list[str]:
        """Return what the journal says last before a violation, of the event and the endpoints it names."""
        words = set(violation.text.replace(",", " ").split())
        lines = []
        for index, entry in enumerate(self._entries[: violation.index + 1]):
            if entry.kind in {"crashed", "stopped", "started", "clock_set", "noticed"}:
                lines.append(told(entry._replace(what=entry.what if "by_ms" in entry.what else {})))
            elif words & self._names(entry) or index == violation.index:
                lines.append(told(entry))
        return lines[-many:]

    def _names(self, entry: Entry) -> set[str]:
        """Return the endpoint that an entry is about."""
        attempt = self._attempts.get(entry.what.get("attempt", -1))
        about = entry.what.get("endpoint") or entry.what.get("id") or (attempt and attempt[0])
        return {about} if isinstance(about, str) else set()

    # What it goes by

    @property
    def _ages(self) -> float:
        """Time as a wall clock shows it that is never set back."""
        return self._entry.now + self._forward

    @property
    def _noticed(self) -> float:
        """Time as a relay has to count it that notices jumps while it runs."""
        return self._entry.now + self._overlooked

    @property
    def _lived(self) -> float:
        """Time that went by, as far as anybody can know."""
        return self._entry.now + self._unseen

    def _wrong(self, figure: str, text: str) -> None:
        self.violations.append(Violation(figure, text, self._index))

    def _hold(self, holds: bool, figure: str, text: str) -> None:
        if not holds:
            self._wrong(figure, text)

    def _read_ahead(self) -> None:
        """Learn the order of acceptance: every event's place in the outbox."""
        for entry in self._entries:
            if entry.kind in {"accepted", "recorded"}:
                self._seqs |= {id_: seq for seq, id_, _ in entry.what["kept"]}
            elif entry.kind == "kept_on_disk":
                self._seqs |= {row[1]: row[0] for row in entry.what["rows"]}

    # The relay's lives

    def _on_kept_on_disk(self, rows: Sequence[Any], endpoints: Mapping[str, Any]) -> None:
        """Hold what is on disk against what must be there."""
        found = {(row[1], row[2]): row for row in rows}
        for place, owed in list(self._owed.items()):
            if place not in found:
                self._missing(place, owed)
        for place, row in found.items():
            self._present(place, row)
        self._kept_endpoints, self._booted = endpoints, self._entry.now
        self._offers.clear()
        self._records.clear()
        self._removing.clear()
        self._reviving.clear()
        self._expiring.clear()
        self._resuming.clear()

    def _missing(self, place: tuple[str, str], owed: Owed) -> None:
        if "absent" in owed.possible or (self._forgets and "pending" not in owed.possible):
            del self._owed[place]
            if owed.key is not None:
                self._by_key[owed.endpoint, owed.key].remove(owed)
        else:
            self._wrong("lost", f"{place[0]} is not kept any more for {place[1]}, it was {owed.possible}")

    def _present(self, place: tuple[str, str], row: Any) -> None:
        seq, id_, endpoint, code, attempts, steps, _key, _since = row
        owed, state = self._owed.get(place), STATES[code]
        if owed is None:
            self._wrong("unexpected", f"{id_} is kept for {endpoint} and was never accepted for it")
            return
        possible = set(owed.possible)
        if endpoint in self._removing:
            possible.add("cancelled")
        if endpoint in self._expiring and "pending" in possible:
            possible.add("dead")
        if self._is_reviving(endpoint) and owed.possible != {"pending"}:
            possible.add("pending")
        self._hold(state in possible, "lost", f"{id_} is {state} for {endpoint} on disk, not {possible}")
        unsure = len(owed.possible) > 1 or endpoint in self._removing
        if not unsure and state != "pending":
            self._hold(
                attempts == owed.attempts,
                "lost",
                f"{id_} has {attempts} attempts on disk, not {owed.attempts}",
            )
        if attempts == owed.attempts:  # what was being recorded is lost
            owed.not_before = owed.surely_not_before
        owed.seq, owed.attempts = seq, attempts
        if state == "pending" and owed.possible != {"pending"} and self._is_reviving(endpoint):
            self._revive(owed)
        owed.possible = {state}
        owed.was_over = owed.was_over or state in {"dead", "cancelled"}
        if owed.steps != steps:
            owed.steps = steps

    def _on_started(self, registered: Mapping[str, tuple[Endpoint, bool]]) -> None:
        """Hold the endpoints against what is known of them; those that are absent have nothing pending."""
        self._running = True
        for id_, receiver in self._receivers.items():
            if id_ not in registered:
                self._leave(id_, receiver)
        for id_, (endpoint, paused) in registered.items():
            receiver = self._receivers[id_]
            if receiver.settings is not None and not receiver.loose:
                self._hold(
                    paused == receiver.paused, "forgotten", f"{id_} is paused: {paused} after a restart"
                )
                if endpoint.source == "api":
                    self._hold(
                        _shown(endpoint) == _shown(receiver.settings),
                        "forgotten",
                        f"{id_} has other settings",
                    )
            self._wake_up(id_, receiver)
            receiver.settings, receiver.paused, receiver.loose = endpoint, paused, 0
            self._bound(id_, endpoint)
            receiver.tokens, receiver.tokens_at = 1.0, self._booted
            receiver.stirred = self._entry.now

    def _bound(self, id_: str, endpoint: Endpoint) -> None:
        """At a start, and once the clock was set, nothing waits longer than the longest step there is now."""
        latest = self._noticed + max(endpoint.retry_schedule, default=0.0)
        for owed in self._owed.values():
            if owed.endpoint == id_:
                owed.not_before = min(owed.not_before, latest)
                owed.surely_not_before = min(owed.surely_not_before, latest)
                # What is due later by a clock that was set back is waited for, as long as anything may be.
                wait = min((owed.due_ms - self._entry.wall_ms) / 1000, self._longest(owed, math.inf))
                owed.at_the_latest = max(owed.at_the_latest, self._noticed + wait)

    def _wake_up(self, id_: str, receiver: Receiver) -> None:
        """Find how the endpoint stands on disk among the ways in which it may."""
        possible = [stands for _, stands in receiver.history]
        kept = self._kept_endpoints.get(id_)
        if kept is None:
            return
        health = kept[1]
        for stands in reversed(possible):
            if (stands.standing, stands.failures) == (health.standing.value, health.failures):
                receiver.stands = stands
                break
        else:
            if not receiver.loose:
                self._wrong("forgotten", f"{id_} stands {health} after a restart, not {possible}")
            receiver.stands = Stands(standing=health.standing.value, failures=health.failures)
        receiver.history = [(0, receiver.stands)]

    def _leave(self, id_: str, receiver: Receiver) -> None:
        """An endpoint is no longer there."""
        for owed in self._owed.values():
            if owed.endpoint == id_ and "pending" in owed.possible:
                owed.possible, owed.was_over = owed.possible - {"pending", "absent"} | {"cancelled"}, True
        receiver.settings, receiver.stands, receiver.history = None, Stands(), [(0, Stands())]

    def _on_stopped(self) -> None:
        self._running = False
        self._overlook()
        for receiver in self._receivers.values():
            receiver.flights.clear()

    def _on_crashed(self) -> None:
        self._running = False
        self._overlook()
        for receiver in self._receivers.values():
            receiver.flights.clear()
        for owed, _, taken, _ in self._records.values():
            owed.unsure += taken

    def _on_clock_set(self, by_ms: int, running: bool) -> None:
        forward = max(0, by_ms) / 1000
        self._forward += forward
        for id_, receiver in self._receivers.items():
            if receiver.settings is not None and abs(by_ms) > DRIFT_SECONDS * 1000:
                self._bound(id_, receiver.settings)
        if not running or forward <= DRIFT_SECONDS:
            self._overlooked += forward
        else:
            self._jumps.append((self._entry.now, forward))
            for owed in self._owed.values():
                if (
                    owed.due_ms > self._entry.wall_ms
                ):  # stays due at that time by the clock, which is sooner now
                    owed.not_before -= forward
                    owed.surely_not_before -= forward
        if forward <= DRIFT_SECONDS or (not running and forward <= LONGEST_REST_SECONDS):
            self._unseen += forward
        for receiver in self._receivers.values():
            receiver.stirred = self._entry.now
        if by_ms < 0:  # what waits may now wait as long again as it can wait by rights
            for receiver in self._receivers.values():
                receiver.stands = self._later(receiver.stands, -by_ms / 1000)
                receiver.history = [
                    (call, self._later(stands, -by_ms / 1000)) for call, stands in receiver.history
                ]
            for owed in self._owed.values():
                later = max(self._entry.now, owed.at_the_latest) + self._longest(owed, -by_ms / 1000)
                owed.at_the_latest = later

    def _later(self, stands: Stands, back: float) -> Stands:
        """Return how an endpoint stands once the clock was set back: what it waits for comes later."""
        open_at = max(self._entry.now, stands.open_at) + min(back, LONGEST_REST_SECONDS)
        return replace(stands, open_at=open_at)

    def _overlook(self) -> None:
        """A relay that ended before it noticed that its clock was set forward leaves no trace of it."""
        for at, forward in self._jumps:
            if self._entry.now - at < NOTICED_SECONDS:
                self._overlooked += forward
                self._unseen += forward if forward <= LONGEST_REST_SECONDS else 0.0
        self._jumps.clear()

    def _longest(self, owed: Owed, back: float) -> float:
        """Return how much longer something may have to wait once the clock was set back."""
        settings = self._receivers[owed.endpoint].settings
        schedule = settings.retry_schedule if settings is not None else ()
        return min(back, 2 * max((*schedule, 300.0)))

    def _on_noticed(self, by_ms: int) -> None:
        pass

    def _on_faults_end(self) -> None:
        pass

    # Acceptance

    def _on_accept(self, call: int, offered: Sequence[Any]) -> None:
        self._offers[call] = [place for each in offered for place in self._offer(each)]

    def _offer(self, offered: Any) -> list[tuple[str, str]]:
        """Owe an event to its endpoints, perhaps: until it is accepted nobody knows."""
        id_, key, endpoints = offered
        places = []
        for endpoint, ordered in endpoints:
            owed = Owed(
                id=id_, endpoint=endpoint, key=key if ordered else None, possible={"absent", "pending"},
                accepted=self._entry.now, aged_from=self._lived, seq=self._seqs.get(id_, 0),
            )  # fmt: skip
            self._owed[id_, endpoint] = owed
            if owed.key is not None:
                self._by_key[endpoint, owed.key].append(owed)
            places.append((id_, endpoint))
        return places

    def _on_unaccepted(self, call: int) -> None:
        for place in self._offers.pop(call, []):
            self._withdraw(place)

    def _withdraw(self, place: tuple[str, str]) -> None:
        owed = self._owed.pop(place)
        if owed.key is not None:
            self._by_key[owed.endpoint, owed.key].remove(owed)

    def _on_accepted(self, call: int, kept: Sequence[Any]) -> None:
        self._keep(self._offers.pop(call), kept)

    def _keep(self, places: Sequence[tuple[str, str]], kept: Sequence[Any]) -> None:
        accepted = {(id_, endpoint) for _, id_, endpoints in kept for endpoint in endpoints}
        for place in places:
            if place in accepted:
                self._owed[place].possible.discard("absent")
            elif "absent" in self._owed[place].possible:
                self._withdraw(place)

    # Attempts

    def _on_began(
        self,
        attempt: int,
        endpoint: str,
        id: str,
        number: int,
        body: str,
        timestamp: int,
    ) -> None:
        self.figures["attempts"] += 1
        self._attempts[attempt] = endpoint, self._index
        owed, receiver = self._owed.get((id, endpoint)), self._receivers[endpoint]
        if owed is None:
            self._wrong("unexpected", f"{id} came to {endpoint}, which it is not owed to")
            return
        probe = receiver.stands.standing == "down"
        self._check_place(owed, number, body, timestamp)
        self._check_time(owed, receiver, probe)
        self._check_pace(owed, receiver, probe)
        if owed.key is not None:
            self._check_order(owed, receiver)
        receiver.stirred = self._entry.now
        receiver.flights[attempt] = Flight(owed, number, probe, self._ages)

    def _check_place(self, owed: Owed, number: int, body: str, timestamp: int) -> None:
        name = f"{owed.id} to {owed.endpoint}"
        self._hold(
            "pending" in owed.possible, "unexplained_duplicates", f"{name} is sent, and is {owed.possible}"
        )
        self._hold(
            number == owed.attempts + 1,
            "attempt_numbers",
            f"{name} is attempt {number} after {owed.attempts}",
        )
        self._hold(owed.body in {None, body}, "body_mismatch", f"{name} has another body than before")
        self._hold(
            abs(timestamp - self._entry.wall_ms / 1000) < 2, "timestamp", f"{name} is signed for {timestamp}"
        )
        owed.body = body

    def _check_time(self, owed: Owed, receiver: Receiver, probe: bool) -> None:
        name = f"{owed.id} to {owed.endpoint}"
        if receiver.loose:
            return
        if receiver.settings is None:
            self._wrong("unexpected", f"{name} is sent, which is not there any more")
            return
        self._hold(not receiver.paused, "paused", f"{name} is sent while paused")
        stands = receiver.stands
        self._hold(stands.standing != "gone", "gone", f"{name} is sent after 410")
        self._hold(
            self._ages >= stands.floor - EPSILON, "early_floor",
            f"{name} is sent {stands.floor - self._ages:.3f} s before Retry-After allows",
        )  # fmt: skip
        if not probe:
            self._hold(
                self._noticed >= owed.not_before - EPSILON, "early_retries",
                f"{name} is sent {owed.not_before - self._noticed:.3f} s before its time",
            )  # fmt: skip
        else:
            self._hold(
                self._ages >= stands.probe_from - EPSILON, "early_probes",
                f"{name} is a probe, {stands.probe_from - self._ages:.3f} s too early",
            )  # fmt: skip
        self._check_waited(owed, receiver, probe)

    def _check_waited(self, owed: Owed, receiver: Receiver, probe: bool) -> None:
        """What is due, at an endpoint that may be sent to and at which nothing happens, does not wait."""
        may_go = max(receiver.stands.open_at, 0.0 if probe else owed.at_the_latest)
        waited = self._entry.now - max(may_go, receiver.stirred, owed.accepted)
        self._hold(
            waited < SOON_SECONDS, "late",
            f"{owed.id} to {owed.endpoint} waited for {waited:.1f} s and nothing held it up",
        )  # fmt: skip

    def _check_pace(self, owed: Owed, receiver: Receiver, probe: bool) -> None:
        settings, name = receiver.settings, f"{owed.id} to {owed.endpoint}"
        if settings is None:
            return
        same = [flight for flight in receiver.flights.values() if flight.owed is owed]
        self._hold(not same, "at_once_twice", f"{name} is under way already")
        if receiver.loose:
            return
        self._hold(
            len(receiver.flights) < settings.concurrency, "concurrency",
            f"{name} is number {len(receiver.flights) + 1} at once of {settings.concurrency}",
        )  # fmt: skip
        if probe:
            probes = [flight for flight in receiver.flights.values() if flight.probe]
            self._hold(not probes, "probes_at_once", f"{name} is a second probe")
        if settings.rate is not None:
            self._refill(receiver, settings.rate)
            self._hold(receiver.tokens >= 1 - 1e-3, "rate", f"{name} is sent faster than {settings.rate}/s")
            receiver.tokens -= 1

    def _refill(self, receiver: Receiver, rate: float) -> None:
        saved = receiver.tokens + (self._entry.now - receiver.tokens_at) * rate
        receiver.tokens, receiver.tokens_at = min(saved, max(1.0, rate)), self._entry.now

    def _check_order(self, owed: Owed, receiver: Receiver) -> None:
        assert owed.key is not None
        name = f"{owed.id} to {owed.endpoint}"
        for other in self._by_key[owed.endpoint, owed.key]:
            if other.seq < owed.seq and other.is_pending:
                if not self._is_reviving(owed.endpoint):
                    self._wrong("inversions", f"{name} is sent before {other.id} of the same key {owed.key}")
                break
        flights = [flight for flight in receiver.flights.values() if flight.owed.key == owed.key]
        self._hold(not flights, "key_at_once", f"{name} is sent while another of its key is under way")

    def _on_cut(self, attempt: int, taken: bool) -> None:
        endpoint, _ = self._attempts[attempt]
        self._receivers[endpoint].stirred = self._entry.now
        flight = self._receivers[endpoint].flights.pop(attempt, None)
        if flight is not None and taken:
            self._take(flight.owed, sure=False)

    def _take(self, owed: Owed, *, sure: bool) -> None:
        """Note that the receiver took an event in."""
        owed.taken += 1
        owed.unsure += not sure
        if owed.first_taken is None:
            owed.first_taken = self._index

    def _on_answered(
        self,
        attempt: int,
        status: int | None,
        reason: str | None,
        taken: bool,
        floor_seconds: float | None,
        retry_after: str | None,
        unspent: bool,
    ) -> None:
        del retry_after
        endpoint, _ = self._attempts[attempt]
        receiver = self._receivers[endpoint]
        receiver.stirred = self._entry.now
        flight = receiver.flights.pop(attempt, None)
        if flight is None or unspent:
            return
        if taken:
            self._take(flight.owed, sure=reason is None)
        before = receiver.stands
        self._follow(flight, receiver, status, reason, floor_seconds)
        self._stand(flight, receiver, status, reason, floor_seconds)
        self.figures["went_down"] += before.standing != "down" and receiver.stands.standing == "down"

    def _follow(
        self, flight: Flight, receiver: Receiver, status: int | None, reason: str | None, floor: float | None
    ) -> None:
        """Work out what follows for the delivery; `record` has to say the same."""
        owed, settings = flight.owed, receiver.settings
        self._expected = None
        if settings is None or receiver.loose or owed.steps is None:
            owed.not_before = 0.0
            owed.steps = None if receiver.loose else owed.steps
            return
        schedule, steps = settings.retry_schedule, owed.steps
        if reason is None:
            self._expected = ("delivered", steps, None)
        elif flight.probe or status == 410:
            self._expected = ("pending", steps, None)
        elif schedule and (status == 429 or (status == 503 and floor is not None)):
            self._expected = ("pending", steps, schedule[min(steps, len(schedule) - 1)])
        elif steps < len(schedule):
            self._expected = ("pending", steps + 1, schedule[steps])
        else:
            self._expected = ("dead", steps, None)

    def _stand(
        self, flight: Flight, receiver: Receiver, status: int | None, reason: str | None, floor: float | None
    ) -> None:
        """Work out how the endpoint stands now."""
        stands, settings = receiver.stands, receiver.settings
        if settings is None or stands.standing == "gone":
            return
        if reason is None:
            receiver.stands = Stands(floor=stands.floor, open_at=stands.open_at)
            return
        if status == 410:
            receiver.stands = replace(stands, standing="gone")
            return
        if floor is not None:
            stands = replace(
                stands,
                floor=max(stands.floor, self._ages + floor),
                open_at=max(stands.open_at, self._entry.now + floor),
            )
        receiver.stands = stands
        interval = settings.probe_interval_seconds
        if stands.standing == "down":
            if flight.probe:
                probes = stands.probes + 1
                wait = min(interval * 2 ** min(probes, 32), settings.probe_max_seconds)
                receiver.stands = replace(
                    stands, failures=stands.failures + 1, probes=probes, probe_from=self._ages + wait,
                    open_at=max(stands.open_at, self._entry.now + wait),
                )  # fmt: skip
        elif not flight.owed.replays:
            failures, ids = stands.failures + 1, stands.ids | {flight.owed.id}
            receiver.stands = replace(stands, failures=failures, ids=ids)
            if settings.down_after and failures >= settings.down_after and len(ids) > 1:
                receiver.stands = replace(
                    receiver.stands, standing="down", probes=0, probe_from=self._ages + interval,
                    open_at=max(stands.open_at, self._entry.now + interval),
                )  # fmt: skip

    # Records

    def _on_record(
        self,
        call: int,
        endpoint: str,
        id: str,
        number: int,
        reason: str | None,
        state: str,
        steps: int,
        due_ms: int | None,
        health: Any,
        news: Sequence[Any],
    ) -> None:
        del number, health
        self._receivers[endpoint].stirred = self._entry.now
        owed, receiver = self._owed[id, endpoint], self._receivers[endpoint]
        name, expected = f"{id} to {endpoint}", self._expected
        if expected is not None:
            self._hold(
                state == expected[0], "wrong_verdict", f"{name} is {state} after {reason}, not {expected}"
            )
            self._hold(steps == expected[1], "wrong_verdict", f"{name} used {steps} steps, not {expected[1]}")
            if expected[2] is not None and due_ms is not None:
                delay = (due_ms - self._entry.wall_ms) / 1000
                low, high = expected[2] * (1 - JITTER) - EPSILON, expected[2] * (1 + JITTER) + EPSILON
                self._hold(
                    low <= delay <= high, "schedule", f"{name} comes again after {delay} s, not {expected[2]}"
                )
                owed.not_before = self._noticed + expected[2] * (1 - JITTER)
            owed.steps = expected[1]
        if due_ms is not None:
            owed.due_ms = due_ms
            owed.at_the_latest = self._entry.now + max(0.0, (due_ms - self._entry.wall_ms) / 1000)
        owed.possible = owed.possible - {"absent"} | {state}
        self._records[call] = owed, state, reason is None, owed.replays
        receiver.history.append((call, receiver.stands))
        self._offers[call] = [place for each in news for place in self._offer(each)]

    def _on_recorded(self, call: int, kept: Sequence[Any]) -> None:
        owed, state, _, replays = self._records.pop(call)
        owed.attempts += 1
        owed.surely_not_before = owed.not_before
        since = owed.replays > replays or self._is_reviving(owed.endpoint)
        if "pending" in owed.possible and state != "pending" and not since:
            owed.possible = {state}
        owed.was_over = owed.was_over or state == "dead"
        self._receivers[owed.endpoint].stirred = self._entry.now
        self._durable(self._receivers[owed.endpoint], call)
        self._keep(self._offers.pop(call), kept)

    def _durable(self, receiver: Receiver, call: int) -> None:
        """From now on the endpoint cannot be found standing as it did before this call."""
        numbers = [number for number, _ in receiver.history]
        if call in numbers:
            receiver.history = receiver.history[numbers.index(call) :]

    def _on_health(self, call: int, endpoint: str, health: Any) -> None:
        """A person's resume takes effect when it is written; else only what is so is written."""
        receiver = self._receivers[endpoint]
        if endpoint in self._resuming.values() and health == Health(age_from_ms=self._entry.wall_ms):
            receiver.stands = Stands()
            for owed in self._owed.values():
                if owed.endpoint == endpoint:
                    owed.aged_from = self._lived
        elif self._running:
            self._hold(
                health.standing.value == receiver.stands.standing, "forgotten",
                f"{endpoint} stands {health.standing} of a sudden",
            )  # fmt: skip
        if self._running:
            receiver.history.append((call, receiver.stands))

    def _on_kept(self, call: int, endpoint: str) -> None:
        self._durable(self._receivers[endpoint], call)

    # What waits, and what is sent again

    def _on_expire(self, call: int, endpoint: str) -> None:
        del call
        self._expiring.add(endpoint)

    def _on_expired(self, call: int, endpoint: str, ids: Sequence[str]) -> None:
        del call
        self._expiring.discard(endpoint)
        receiver = self._receivers[endpoint]
        receiver.stirred = self._entry.now if ids else receiver.stirred
        for id_ in ids:
            owed = self._owed[id_, endpoint]
            settings = receiver.settings
            self._hold("pending" in owed.possible, "wrong_verdict", f"{id_} expired and was {owed.possible}")
            if settings is not None and not receiver.loose:
                age = self._lived - owed.aged_from
                self._hold(
                    age >= settings.max_age_seconds - DRIFT_SECONDS, "killed_early",
                    f"{id_} is dead for {endpoint} after {age:.0f} s of {settings.max_age_seconds:.0f}",
                )  # fmt: skip
            owed.possible, owed.was_over = {"dead"}, True
            self.figures["expired"] += 1

    def _on_revive(self, call: int, endpoint: str | None, ended: Any) -> None:
        del ended
        self._reviving[call] = endpoint

    def _on_revived(self, call: int, revived: Sequence[Any], spacing_seconds: float) -> None:
        del self._reviving[call]
        for id_, endpoint in revived:
            owed = self._owed.get((id_, endpoint))
            if owed is not None:
                self._revive(owed, len(revived) * spacing_seconds)
                self._receivers[endpoint].stirred = self._entry.now

    def _is_reviving(self, endpoint: str) -> bool:
        return any(each in {None, endpoint} for each in self._reviving.values())

    def _revive(self, owed: Owed, spread_seconds: float = 3600.0) -> None:
        owed.at_the_latest = self._entry.now + spread_seconds
        owed.possible, owed.steps = {"pending"}, 0
        owed.not_before = owed.surely_not_before = 0.0
        owed.replays += 1
        owed.aged_from = self._lived
        self.figures["replayed"] += 1

    # What the driver does

    def _on_doing(self, op: int, did: str, **about: Any) -> None:
        self._submitting[op] = self._entry.now
        id_ = about.get("id") or about.get("values", {}).get("id")
        if did in {"pause", "put", "patch", "remove"}:
            self._receivers[id_].loose += 1
        if did == "remove":
            self._removing.add(id_)
        if did == "pause" and not about["paused"]:
            self._resuming[op] = id_
        if did == "reload":
            self._removing |= about["absent"]
            for receiver in self._receivers.values():
                receiver.loose += 1

    def _on_done(self, op: int, did: str, answer: Any, **about: Any) -> None:
        begun = self._submitting.pop(op)
        self._resuming.pop(op, None)
        if did == "submit":
            self._submitted(begun, answer)
        if did == "reload":
            self._reloaded(answer, about["absent"])
        id_ = about.get("id") or about.get("values", {}).get("id")
        if did not in {"pause", "put", "patch", "remove"}:
            return
        receiver = self._receivers[id_]
        receiver.stirred = self._entry.now
        receiver.loose = max(0, receiver.loose - 1)
        if isinstance(answer, str) and answer.endswith("Error"):
            self._removing.discard(id_)
        elif did == "pause":
            receiver.paused = about["paused"]
        elif did == "remove":
            self._removing.discard(id_)
            self._leave(id_, receiver)
        else:
            self._change(receiver, answer)

    def _change(self, receiver: Receiver, endpoint: Endpoint) -> None:
        before = receiver.settings
        if before is None:
            receiver.paused = False
        if before is None or before.rate != endpoint.rate:
            receiver.tokens, receiver.tokens_at = max(1.0, endpoint.rate or 1.0), self._entry.now
        receiver.settings = endpoint

    def _reloaded(self, registered: Mapping[str, tuple[Endpoint, bool]], absent: frozenset[str]) -> None:
        """Another config is in force."""
        self._removing -= absent
        for id_, receiver in self._receivers.items():
            receiver.loose = max(0, receiver.loose - 1)
            receiver.stirred = self._entry.now
            if id_ not in registered:
                self._leave(id_, receiver)
        for id_, (endpoint, paused) in registered.items():
            self._change(self._receivers[id_], endpoint)
            self._receivers[id_].paused = paused

    def _submitted(self, begun: float, answer: Any) -> None:
        if isinstance(answer, str):
            return
        for number, key, other, id_, endpoints, duplicate in answer:
            self._ids_by_number[number].add(id_)
            if key is not None:
                first = self._receipts.setdefault(key, id_)
                if not self._forgets:
                    self._hold(first == id_, "id_changes", f"{key} was {first} and is {id_} now")
            self.figures["acknowledged"] += not duplicate
            for endpoint in endpoints:
                self._hold(
                    (id_, endpoint) in self._owed or self._forgets,
                    "lost",
                    f"{id_} was acknowledged for {endpoint}",
                )
            del other
        del begun

    # The end

    def _sum_up(self) -> None:
        for owed in self._owed.values():
            name = f"{owed.id} to {owed.endpoint}"
            self._hold(owed.possible <= set(STATES[1:]), "lost", f"{name} ended as {owed.possible}")
            if "delivered" in owed.possible:
                self._hold(owed.taken > 0, "lost", f"{name} is delivered and never came")
            self._hold(
                owed.taken <= 1 + owed.unsure + owed.replays, "unexplained_duplicates",
                f"{name} was taken in {owed.taken} times, {owed.unsure} unsure, {owed.replays} replays",
            )  # fmt: skip
            self.figures[f"ended_{'/'.join(sorted(owed.possible))}"] += 1
            self.figures["taken_again"] += max(0, owed.taken - 1)
        self._check_bodies()
        self._check_first_successes()

    def _check_bodies(self) -> None:
        """One body for each id, in each format; and it is the one that was submitted."""
        numbers: dict[str, int] = {id_: number for number, ids in self._ids_by_number.items() for id_ in ids}
        for owed in self._owed.values():
            if owed.body is None or owed.id not in numbers:
                continue
            body = self._bodies[owed.body]
            self._hold(
                f'"n":{numbers[owed.id]},'.encode() in body, "body_mismatch", f"{owed.id} came as {body!r}"
            )

    def _check_first_successes(self) -> None:
        """By the receiver alone: what was never given up came first in the order of acceptance."""
        for owed_of_key in self._by_key.values():
            came = [
                each for each in sorted(owed_of_key, key=lambda each: each.seq)
                if each.first_taken is not None and not each.was_over and not each.replays
            ]  # fmt: skip
            for first, second in pairwise(came):
                self._hold(
                    first.first_taken < second.first_taken, "inversions",
                    f"{second.id} came to {second.endpoint} before {first.id} of the same key",
                )  # fmt: skip


def _shown(endpoint: Endpoint) -> tuple[object, ...]:
    """Return the settings that can be compared."""
    return (
        endpoint.url, endpoint.events, endpoint.retry_schedule, endpoint.concurrency, endpoint.rate,
        endpoint.order, endpoint.format,
    )  # fmt: skip
