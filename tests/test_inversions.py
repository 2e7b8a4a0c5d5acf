"""Whatever fails and whenever the relay restarts: each key arrives in order, no rate or ceiling is exceeded.

Receivers that fail at random, have bad hours, ask for time or are too busy; many keys; virtual time; restarts
that cut off what is in flight.
"""

import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from relay.model import Message, Outcome
from tests.lanes import OK, endpoint
from tests.world import World, refusal

KEYS = 12
RESTARTS = 4
CONCURRENCY = 4
RATE = 2.0
LATE = Outcome(milliseconds=900, reason="timeout")
ENDPOINTS = (
    endpoint("first", order="key", concurrency=CONCURRENCY, retry_schedule=(5.0,) * 40),
    endpoint("second", order="key", concurrency=1, rate=RATE, retry_schedule=(60.0,) * 40),
    endpoint("third", concurrency=CONCURRENCY, rate=RATE, retry_schedule=(1.0,) * 40, down_after=0),
)


class Fickle:
    """A receiver with its own bad luck and bad hours; keeps what it took, in that order."""

    def __init__(self, seed: str) -> None:
        self._chance = random.Random(seed)
        self._bad_until = 0.0
        self.took: list[str] = []

    def __call__(self, message: Message, at: float) -> tuple[Outcome, float]:
        chance = self._chance.random()
        if chance < 0.01:
            self._bad_until = at + self._chance.uniform(10, 900)
        takes = round(self._chance.uniform(0.0, 1.5), 3)
        if at < self._bad_until or chance < 0.15:
            return self._chance.choice([refusal(500), refusal(429), refusal(503, "20"), LATE]), takes
        self.took.append(message.id)
        return OK, takes


async def live(world: World, chance: random.Random, count: int) -> None:
    """Post some events, let time pass between, and go down with whatever is in flight."""
    for _ in range(count):
        for _ in range(chance.randint(1, 3)):
            number = len(world.keys)
            key = f"key {chance.randrange(KEYS)}"
            world.keys[f"{number}"] = key
            await world.accept(f"{number}", key=key)
        await world.pass_(seconds=chance.choice([0.0, 0.3, 2.0, 40.0]))


@pytest.mark.parametrize("seed", range(3))
async def test_random_failures_and_restarts_turn_no_key_around(tmp_path: Path, seed, capsys):
    chance = random.Random(seed)
    world = World(tmp_path / "relay.db", *ENDPOINTS)
    receivers = {each.id: Fickle(f"{seed} {each.id}") for each in ENDPOINTS}
    world.rules.update(receivers)
    starts = []
    for _ in range(RESTARTS):
        starts.append(world.clock.monotonic())
        async with world.running():
            await live(world, chance, 20)
    starts.append(world.clock.monotonic())
    async with world.running():
        for _ in range(200):
            await world.pass_(seconds=3600.0)
            if not any(each.pending for each in (await world.outbox.backlog()).values()):
                break
        states = {each.id: await world.states(each.id) for each in ENDPOINTS}

    count = len(world.keys)
    assert states == {each.id: {"delivered": count} for each in ENDPOINTS}
    for id_ in ("first", "second"):
        assert inversions(world, receivers[id_]) == 0
    for each in ENDPOINTS:
        sent = [one for one in world.sent if one.endpoint == each.id]
        assert max(one.at_once for one in sent) <= each.concurrency
        assert {one.number for one in sent} >= {1, 2}
        if each.rate is not None:
            assert_rate([one.at for one in sent], each.rate, starts)
    with capsys.disabled():
        print(f"\n{count} events, {len(world.sent)} attempts, {RESTARTS} restarts, 0 inversions", end=" ")
    assert inversions(world, receivers["third"]) > 0, "else this test could not fail"


def inversions(world: World, receiver: Fickle) -> int:
    """Count pairs of first successes of one key that came the other way round than they were accepted."""
    arrived: dict[str, list[int]] = defaultdict(list)
    for id_ in dict.fromkeys(receiver.took):
        name = world.names[id_]
        arrived[world.keys[name]].append(int(name))
    return sum(earlier > later for names in arrived.values() for earlier, later in pairwise(names))


def assert_rate(times: list[float], rate: float, starts: list[float]) -> None:
    """No window holds more than its share and one second's worth; each start may add one."""
    for first, begun in enumerate(times):
        for last in range(first, len(times)):
            started = sum(begun < start <= times[last] for start in starts)
            assert last - first + 1 <= rate * (times[last] - begun) + max(1.0, rate) + started + 1e-6
