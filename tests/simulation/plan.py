"""What happens in a simulated world: a seed in, three days of events, faults and interference out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.simulation.network import Mood, Spell, busy, dead, gone, refusing, shaky, slow, well

HOUR = 3600.0
DAY = 24 * HOUR
FAULTS_END = 3 * DAY
NEVER = 36_500 * DAY
TYPES = ("a.one", "a.two", "b.one", "b.two.deep", "c.one")
KEYS = ("k1", "k2", "k3", "k4", None, None)
SCHEDULES = (
    ["5s", "5m", "5h"],
    ["5s", "5m", "5h"],
    ["1s", "10s", "1m", "10m"],
    ["30s", "30s"],
    "standard",
    [],
)
START_MS = 1_768_471_200_000  # 2026-01-15
BOOT_1970_MS = 12_000


@dataclass(frozen=True, slots=True)
class Action:
    """Something that somebody does at a virtual time; `what` are the arguments of the driver's method."""

    at: float
    kind: str
    what: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Process:
    """One life of the relay: until when, and how it ends; the machine is idle for a while after it."""

    until: float
    crash: bool
    after_hop: bool = False
    skip_hops: int = 0
    grace_seconds: float = 8.0
    down_seconds: float = 0.0
    absent: frozenset[str] = frozenset()  # endpoints that the config does not have this time


@dataclass(frozen=True, slots=True)
class Plan:
    """The world of one seed."""

    start_ms: int
    endpoints: dict[str, dict[str, Any]]  # of the config, by id
    defaults: dict[str, Any]  # its table [delivery]
    spells: dict[str, list[Spell]]
    actions: list[Action]
    processes: list[Process]
    slow_share: float
    slow_seconds: float
    retention_seconds: float


def make_plan(seed: int) -> Plan:
    chance = Random(seed)
    endpoints = _configured(chance)
    registered = _registered(chance)
    interference = _Interference(chance, list(endpoints), registered)
    starts_wrong = chance.random() < 0.15
    actions = [*_submissions(chance), *interference.all(), *_clock(chance, starts_wrong=starts_wrong)]
    processes = _processes(chance, list(endpoints), actions)
    actions += _clock_of_the_idle(chance, processes)
    crawling = chance.random() < 0.1
    return Plan(
        start_ms=BOOT_1970_MS if starts_wrong else START_MS,
        endpoints=endpoints,
        defaults={"max_age": chance.choice(("7d", "7d", "2d", "4d")), "retry_schedule": ["5s", "5m", "5h"]},
        spells={id_: _spells(chance, id_) for id_ in [*endpoints, *registered]},
        actions=sorted(actions, key=lambda action: action.at),
        processes=processes,
        slow_share=0.2 if crawling else 0.01,
        slow_seconds=2.0 if crawling else 0.02,
        retention_seconds=12 * HOUR if chance.random() < 0.2 else NEVER,
    )


# The endpoints

MOODS: dict[str, Sequence[Mood]] = {
    "well": (well,),
    "flap": (well, shaky, refusing, well),
    "deadday": (well, dead, well),
    "busy": (busy, well, busy),
    "gone": (well, gone, well, gone),
    "slow": (slow, well),
    "key": (well, shaky, refusing, shaky),
    "keyrate": (shaky, well, dead),
    "rated": (well, shaky),
    "ops": (well, shaky, well),
    "api1": (well, shaky, dead, well),
    "api2": (shaky, well, gone, busy),
}


def _configured(chance: Random) -> dict[str, dict[str, Any]]:
    """Return the config's endpoints: each has one trait, and some settings of chance."""
    traits: dict[str, dict[str, Any]] = {
        "well": {},
        "flap": {"down_after": chance.choice((0, 3, 5, 5))},
        "deadday": {"probe_interval": "30s", "probe_max": chance.choice(("2m", "10m", "1h"))},
        "busy": {"concurrency": chance.choice((1, 2, 32))},
        "gone": {},
        "slow": {"concurrency": chance.choice((1, 2, 8)), "timeout": chance.choice(("1s", "15s"))},
        "key": {"order": "key", "concurrency": chance.choice((1, 3, 32))},
        "keyrate": {"order": "key", "rate": chance.choice(("10/s", "2/s", "30/m"))},
        "rated": {"rate": chance.choice(("1/s", "5/s", "20/m"))},
        "ops": {"order": chance.choice(("none", "key"))},
    }
    endpoints = {}
    for id_, trait in traits.items():
        schedule = chance.choice(SCHEDULES)
        settings = {
            "id": id_,
            "url": f"https://{id_}.example/hook",
            "events": _wanted(chance),
            "secret": f"secret of {id_}, long enough",
            "retry_schedule": schedule,
            "max_age": chance.choice(("7d", "2d", "12h")) if schedule != "standard" else "7d",
            **trait,
        }
        endpoints[id_] = settings
    endpoints["well"] |= {"events": ["*"], "max_age": "7d"}
    news = ["relay.endpoint.down", "relay.endpoint.recovered", "relay.endpoint.gone", "relay.delivery.dead"]
    endpoints["ops"]["events"] = [*news, "c.one"]
    return endpoints


def _registered(chance: Random) -> dict[str, dict[str, Any]]:
    """Return the endpoints that are registered through the API."""
    return {
        id_: {
            "id": id_,
            "url": f"https://{id_}.example/hook",
            "events": _wanted(chance),
            "secret": f"secret of {id_}, long enough",
            "order": order,
            "concurrency": chance.choice((1, 4, 32)),
        }
        for id_, order in (("api1", "key"), ("api2", "none"))
    }


def _wanted(chance: Random) -> list[str]:
    return chance.choice((["*"], ["a.*"], ["b.*", "c.one"], ["a.one", "b.two.*"], ["a.*", "c.*"]))


def _spells(chance: Random, id_: str) -> list[Spell]:
    """Return moods that take turns, each for minutes to hours, until the faults end."""
    moods = MOODS[id_]
    if len(moods) == 1:
        return []
    spells, at, turn = [], 0.0, chance.randrange(len(moods))
    while at < FAULTS_END:
        mood = moods[turn % len(moods)]
        longest = chance.choice((0.05, 1.0, 6.0)) * HOUR
        at += (
            0.3 * DAY + 0.7 * DAY * chance.random()
            if mood is dead and id_ == "deadday"
            else 1 + longest * chance.random()
        )
        if mood is gone:
            at = min(at, spells[-1].until + HOUR if spells else HOUR)
        spells.append(Spell(min(at, FAULTS_END), mood))
        turn += 1
    return spells


# What the application does


def _submissions(chance: Random) -> Iterator[Action]:
    """Yield bursts and single events, some with idempotency keys, some of those again later."""
    number = 0
    for _ in range(chance.randrange(25, 45)):
        at = FAULTS_END * chance.random()
        many = chance.choice((1, 1, 2, 5, 12))
        for _ in range(many):
            drafts = []
            for _ in range(chance.choice((1, 1, 1, 3))):
                number += 1
                drafts.append(_draft(chance, number))
            submit = Action(
                at + chance.choice((0.0, 0.0, 0.01, 20.0)) * chance.random(), "submit", {"drafts": drafts}
            )
            yield submit
            if chance.random() < 0.15:
                later = chance.choice((0.0, 0.001, 1.0, HOUR, DAY)) * chance.random()
                yield Action(min(submit.at + later, FAULTS_END), "submit", {"drafts": drafts})
            if chance.random() < 0.05:
                again = [draft | {"data": {"n": draft["data"]["n"], "other": True}} for draft in drafts]
                yield Action(min(submit.at + HOUR * chance.random(), FAULTS_END), "submit", {"drafts": again})


def _draft(chance: Random, number: int) -> dict[str, Any]:
    draft = {
        "event": chance.choice(TYPES),
        "key": chance.choice(KEYS),
        "idempotency_key": f"idem-{number}" if chance.random() < 0.6 else None,
        "timestamp": "2026-01-15T10:00:00.000Z" if chance.random() < 0.1 else None,
        "data": {"n": number, "text": "ü" * chance.randrange(5)},
    }
    return {name: value for name, value in draft.items() if value is not None}


# What the operator does


class _Interference:
    """Pauses, resumes, replays, changes, removals and returns."""

    def __init__(self, chance: Random, configured: list[str], registered: dict[str, dict[str, Any]]) -> None:
        self._chance = chance
        self._configured = configured
        self._registered = registered

    def all(self) -> Iterator[Action]:
        for id_, settings in self._registered.items():
            yield from self._life(id_, settings)
        touched = [id_ for id_ in [*self._configured, *self._registered] if id_ != "well"]
        for id_ in self._chance.sample(touched, 5):
            yield from self._pauses(id_)
        for id_ in ("gone", "api2"):  # somebody lets them go again now and then
            for _ in range(8):
                yield Action(self._at(), "pause", {"id": id_, "paused": False})
        for _ in range(self._chance.randrange(4)):
            yield Action(self._at(), "reload", self._reload())
        for _ in range(12):
            yield Action(self._at(), "replay", self._replay(self._chance.choice(touched)))
        for _ in range(8):
            yield Action(self._at(), "replay_one", {"nth": self._chance.random()})

    def _at(self) -> float:
        return FAULTS_END * self._chance.random()

    def _pauses(self, id_: str) -> Iterator[Action]:
        chance = self._chance
        for _ in range(chance.randrange(1, 4)):
            at = self._at()
            yield Action(at, "pause", {"id": id_, "paused": True})
            yield Action(
                at + chance.choice((1.0, 600.0, 10 * HOUR)) * chance.random(),
                "pause",
                {"id": id_, "paused": False},
            )

    def _reload(self) -> dict[str, Any]:
        """Return a config that lacks an endpoint or two, or has one that is changed."""
        chance = self._chance
        removable = [id_ for id_ in self._configured if id_ not in {"well", "ops"}]
        changes = {"id": chance.choice(removable), "concurrency": chance.choice((1, 5)), "rate": "4/s"}
        absent = chance.sample(removable, chance.randrange(3))
        return {"absent": frozenset(absent), "changes": changes if chance.random() < 0.5 else {}}

    def _replay(self, id_: str) -> dict[str, Any]:
        chance = self._chance
        state = chance.choice(("dead", "dead", "delivered", "cancelled"))
        spacing_ms = chance.choice((0.0, 0.0, 20.0, 1000.0))
        return {
            "id": id_,
            "of": state,
            "spacing_ms": spacing_ms,
            "type": chance.choice((None, None, "a.one")),
        }

    def _life(self, id_: str, settings: dict[str, Any]) -> Iterator[Action]:
        """Register an endpoint, change it now and then, perhaps take it away and bring it back."""
        chance = self._chance
        yield Action(chance.choice((0.0, HOUR)), "put", {"values": settings})
        for _ in range(chance.randrange(4)):
            yield Action(self._at(), "patch", {"id": id_, "values": self._patch()})
        if chance.random() < 0.6:
            removed_at = self._at()
            yield Action(removed_at, "remove", {"id": id_})
            if chance.random() < 0.8:
                yield Action(removed_at + 6 * HOUR * chance.random(), "put", {"values": settings})

    def _patch(self) -> dict[str, Any]:
        chance = self._chance
        return chance.choice((
            {"concurrency": chance.choice((1, 2, 16))},
            {"rate": chance.choice(("3/s", "60/m", None))},
            {"order": chance.choice(("none", "key"))},
            {"retry_schedule": chance.choice((["2s", "20s"], ["5s", "5m", "5h"]))},
            {"events": _wanted(chance)},
            {"format": chance.choice(("event", "standard", "data"))},
        ))  # fmt: skip


# What the machine does


def _processes(chance: Random, configured: list[str], actions: Sequence[Action]) -> list[Process]:
    """Return the relay's lives, most of which end when there is much to do; the last until all is drained."""
    ends = []
    for _ in range(chance.randrange(4, 11)):
        after = chance.choice((0.0, 0.05, 1.0, 10.0, DAY)) * chance.random()
        ends.append(min(chance.choice(actions).at + after, FAULTS_END))
    if chance.random() < 0.3:
        ends += [ends[0] + 0.5, ends[0] + 1.0]  # a crash loop
    processes = [_process(chance, end, configured) for end in sorted(ends)]
    return [*processes, Process(until=float("inf"), crash=False)]


def _process(chance: Random, until: float, configured: list[str]) -> Process:
    removable = [id_ for id_ in configured if id_ not in {"well", "ops"}]
    return Process(
        until=until,
        crash=chance.random() < 0.6,
        after_hop=chance.random() < 0.5,
        skip_hops=chance.choice((0, 0, 1, 3, 20)),
        grace_seconds=chance.choice((0.0, 1.0, 8.0)),
        down_seconds=chance.choice((0.1, 5.0, 300.0, 6 * HOUR)) * chance.random(),
        absent=frozenset(chance.sample(removable, 1)) if chance.random() < 0.2 else frozenset(),
    )


def _clock(chance: Random, *, starts_wrong: bool) -> Iterator[Action]:
    """Set the wall clock now and then; one that starts in 1970 is corrected some time later."""
    if starts_wrong:
        at = chance.choice((20.0, HOUR, DAY)) * chance.random()
        yield Action(at, "set_clock", {"by_ms": START_MS - BOOT_1970_MS})
    if chance.random() < 0.6:
        for _ in range(chance.randrange(1, 4)):
            seconds = chance.choice((3.0, 60.0, 600.0, 6 * HOUR, 40 * DAY, 3650 * DAY))
            way = -1 if seconds < 30 * DAY and chance.random() < 0.5 else 1
            if seconds == 40 * DAY and chance.random() < 0.5:
                way = -1
            yield Action(FAULTS_END * chance.random(), "set_clock", {"by_ms": round(way * seconds * 1000)})


def _clock_of_the_idle(chance: Random, processes: Sequence[Process]) -> Iterator[Action]:
    """Set the clock now and then while the relay is off."""
    for process in processes:
        if process.down_seconds > 1 and chance.random() < 0.2:
            seconds = chance.choice((-3600.0, 600.0, 10 * HOUR, 40 * DAY))
            yield Action(process.until + 0.5, "set_clock", {"by_ms": round(seconds * 1000)})
