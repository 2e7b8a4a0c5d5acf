"""Order by key, as every outbox promises it: the oldest pending one of a key goes, the others wait."""

import asyncio
import random
from collections import defaultdict
from dataclasses import replace

import pytest

from relay.model import Delivery, Owed, State, Submission, Verdict
from relay.outbox import Ended
from tests.test_outbox import DEAD, DELIVERED, NOW, again, attempt, names
from tests.test_outbox import submission as bare

PROBED_ON = Verdict(state=State.PENDING, steps=0, due_ms=NOW)


def keyed(name: str, key: str | None = "k", endpoint: str = "main", at_ms: int = NOW) -> Submission:
    plain = bare(name, at_ms=at_ms)
    owed = (Owed(endpoint, "event", ordered=True),)
    return replace(plain, event=replace(plain.event, key=key), endpoints=owed)


async def claim(outbox, endpoint: str = "main", at_ms: int = NOW) -> list[Delivery]:
    return await outbox.claim(endpoint, 100, at_ms)


async def ends(outbox, delivery: Delivery, verdict: Verdict = DELIVERED) -> None:
    reason = None if verdict.state is State.DELIVERED else "http_503"
    await outbox.record(delivery, attempt(delivery, reason), verdict)


async def drained(outbox, at_ms: int = NOW) -> list[str]:
    """Deliver all that may be, and return their names in that order."""
    seen = []
    while claimed := await claim(outbox, at_ms=at_ms):
        seen += names(claimed)
        for delivery in claimed:
            await ends(outbox, delivery)
    return seen


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "one by one"])
@pytest.mark.parametrize("verdict", [DELIVERED, DEAD], ids=["delivered", "dead"])
async def test_those_of_one_key_come_out_one_at_a_time_in_the_order_of_acceptance(outbox, together, verdict):
    batch = [keyed(name) for name in "abcd"]
    for group in [batch] if together else [[each] for each in batch]:
        await outbox.accept(group)
    for name in "abcd":
        (only,) = await claim(outbox)
        assert names([only]) == [name]
        assert await claim(outbox) == [], "while it is in flight"
        await ends(outbox, only, verdict)
    assert await claim(outbox) == []


async def test_accepts_at_the_same_moment_are_in_order_too(outbox):
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(outbox.accept([keyed(f"{number}")]))
    assert await drained(outbox) == [f"{number}" for number in range(20)]


async def test_other_keys_other_endpoints_and_events_without_a_key_are_not_held(outbox):
    await outbox.accept(
        [
            keyed("a"),
            keyed("b"),
            keyed("c", "k2"),
            keyed("d", None),
            keyed("e", None),
            keyed("f", "k", "other"),
        ]
    )
    await outbox.accept([bare("g")])
    assert sorted(names(await claim(outbox))) == ["a", "c", "d", "e", "g"]
    assert names(await claim(outbox, "other")) == ["f"]


async def test_a_failing_one_holds_back_its_own_key_until_it_is_over(outbox):
    await outbox.accept([keyed(name) for name in "ab"])
    (a,) = await claim(outbox)
    await ends(outbox, a, again(NOW + 5_000))
    assert await claim(outbox, at_ms=NOW + 4_999) == []
    assert await outbox.due("main") == NOW + 5_000
    (a,) = await claim(outbox, at_ms=NOW + 5_000)
    assert names([a]) == ["a"]
    await ends(outbox, a, DEAD)
    assert names(await claim(outbox)) == ["b"]


async def test_a_released_one_is_still_the_first(outbox):
    await outbox.accept([keyed(name) for name in "ab"])
    claimed = await claim(outbox)
    await outbox.release(claimed)
    assert names(await claim(outbox)) == ["a"]


@pytest.mark.parametrize("how_far", ["claimed", "retried", "recorded"])
async def test_the_order_survives_a_restart(open_store, how_far):
    async with open_store() as first:
        await first.register(["main"])
        await first.accept([keyed(name) for name in "abc"])
        (a,) = await claim(first)
        if how_far != "claimed":
            await ends(first, a, again(NOW + 5) if how_far == "retried" else DELIVERED)
    async with open_store() as second:
        await second.register(["main"])
        await second.accept([keyed("d")])
        seen = await drained(second, NOW + 5)
    assert seen == list("bcd" if how_far == "recorded" else "abcd")


async def test_a_replayed_one_goes_before_newer_pending_ones_of_its_key(outbox):
    await outbox.accept([keyed(name) for name in "abcd"])
    for _ in "ab":
        await ends(outbox, (await claim(outbox))[0], DEAD)
    assert await outbox.revive(Ended(endpoint="main", state=State.DEAD), NOW + 1) == 2
    assert await drained(outbox, NOW + 1) == ["a", "b", "c", "d"]


async def test_a_replayed_one_does_not_overtake_what_is_in_flight_and_is_next(outbox):
    """Two of one key at once could arrive in either order."""
    await outbox.accept([keyed(name) for name in "abc"])
    await ends(outbox, (await claim(outbox))[0], DEAD)
    (b,) = await claim(outbox)
    await outbox.revive(Ended(event_id="evt_a"), NOW)
    assert await claim(outbox) == []
    await ends(outbox, b, again(NOW + 1))
    assert await drained(outbox, NOW + 1) == ["a", "b", "c"], "b failed, so it waits for a now"


async def test_what_fails_at_the_moment_of_a_replay_waits_for_what_is_replayed(outbox):
    """Its outcome and the replay may be written together."""
    await outbox.accept([keyed(name) for name in "abc"])
    await ends(outbox, (await claim(outbox))[0], DEAD)
    (b,) = await claim(outbox)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ends(outbox, b, again(NOW + 1)))
        tasks.create_task(outbox.revive(Ended(event_id="evt_a"), NOW))
    assert await drained(outbox, NOW + 1) == ["a", "b", "c"]


async def test_what_was_in_flight_at_a_replay_keeps_its_turn_though_it_was_released(outbox):
    await outbox.accept([keyed(name) for name in "abc"])
    await ends(outbox, (await claim(outbox))[0], DEAD)
    (b,) = await claim(outbox)
    await outbox.revive(Ended(event_id="evt_a"), NOW)
    await outbox.release([b])
    assert await drained(outbox) == ["b", "a", "c"]


@pytest.mark.parametrize("count", [3, 1200])
async def test_many_of_one_key_replayed_in_steps_keep_their_order(outbox, count):
    for start in range(0, count, 400):
        await outbox.accept([keyed(f"{number}") for number in range(start, min(start + 400, count))])
    await outbox.expire("main", NOW, 0, NOW)
    while (await outbox.expire("main", NOW, 0, NOW)).more:
        pass
    await outbox.accept([keyed("new")])
    assert await outbox.revive(Ended(endpoint="main", state=State.DEAD), NOW + 1) == count
    seen = []
    while claimed := await claim(outbox, at_ms=NOW + 1):
        seen += names(claimed)
        await ends(outbox, claimed[0])
        if len(seen) > 20 and count > 20:
            break
    assert seen[:20] == [*(f"{number}" for number in range(count)), "new"][:20]


async def test_what_expires_lets_the_next_of_its_key_go(outbox):
    await outbox.accept([keyed("a"), keyed("b", at_ms=NOW + 10)])
    (a,) = await claim(outbox)
    await ends(outbox, a, again(NOW + 10_000))
    patience = await outbox.expire("main", NOW, 0, NOW + 20)
    assert [each.event_id for each in patience.expired] == ["evt_a"]
    assert names(await claim(outbox, at_ms=NOW + 20)) == ["b"]


async def test_a_held_one_that_expires_leaves_the_first_in_flight_alone(outbox):
    await outbox.accept([keyed(name) for name in "abc"])
    (a,) = await claim(outbox)
    patience = await outbox.expire("main", NOW, 0, NOW)
    assert [each.event_id for each in patience.expired] == ["evt_b", "evt_c"]
    assert await claim(outbox) == []
    await ends(outbox, a, again(NOW + 1))
    assert names(await claim(outbox, at_ms=NOW + 1)) == ["a"]


async def test_the_order_survives_that_an_endpoint_was_dropped_and_returned(open_store):
    async with open_store() as outbox:
        await outbox.register(["main"])
        await outbox.accept([keyed(name) for name in "abc"])
        await outbox.drop_endpoint("main")
    async with open_store() as outbox:
        await outbox.register(["main"])
        assert await claim(outbox) == []
        await outbox.accept([keyed("d")])
        assert await outbox.revive(Ended(endpoint="main", state=State.CANCELLED), NOW) == 3
        assert await drained(outbox) == list("abcd")


async def test_a_probe_takes_no_held_one(outbox):
    await outbox.accept([keyed("a"), keyed("b"), keyed("c", "k2")])
    seen = []
    for _ in range(4):
        probe = await outbox.probe("main")
        seen += names([probe])
        await ends(outbox, probe, PROBED_ON)
    assert seen == ["a", "c", "a", "c"]


async def test_a_held_one_shows_no_time_of_its_next_attempt(outbox):
    await outbox.accept([keyed(name) for name in "ab"])
    assert [(await outbox.story(id_)).deliveries[0].due_ms for id_ in ("evt_a", "evt_b")] == [NOW, None]


class Chance:
    """Does whatever may be done to an outbox, at random, and keeps what was delivered in which order."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = NOW
        self.accepted: dict[str, list[str]] = defaultdict(list)  # by key
        self.delivered: dict[str, list[str]] = defaultdict(list)
        self.held: list[Delivery] = []

    async def live(self, outbox, steps: int) -> None:
        """Between two starts of a relay; what is held at the end is forgotten, as in a crash."""
        self.held = []
        deeds = [self.accept, self.accept, self.claim, self.claim, self.end, self.end, self.release]
        for _ in range(steps):
            self.now += self.chance.randrange(20)
            await self.chance.choice([*deeds, self.replay])(outbox)

    async def accept(self, outbox) -> None:
        batch = []
        for _ in range(self.chance.randint(1, 4)):
            name, key = f"{sum(map(len, self.accepted.values()))}", self.chance.choice("xyz")
            self.accepted[key].append(name)
            batch.append(keyed(name, key, at_ms=self.now))
        await outbox.accept(batch)

    async def claim(self, outbox) -> None:
        self.held += await outbox.claim("main", self.chance.randint(1, 5), self.now)
        keys = [each.event.key for each in self.held]
        assert len(keys) == len(set(keys)), "two of one key at once"

    async def end(self, outbox) -> None:
        if self.held:
            delivery = self.held.pop(self.chance.randrange(len(self.held)))
            verdict = self.chance.choice([DELIVERED, DELIVERED, again(self.now + 30)])
            await ends(outbox, delivery, verdict)
            if verdict is DELIVERED:
                self.delivered[delivery.event.key or ""] += names([delivery])

    async def release(self, outbox) -> None:
        if self.held:
            await outbox.release([self.held.pop()])

    async def replay(self, outbox) -> None:
        await outbox.revive(Ended(endpoint="main", state=State.DELIVERED), self.now)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_first_deliveries_of_a_key_are_in_order_and_nothing_is_lost(open_store, seed):
    """Accepts, retries, releases, replays and restarts in any order."""
    chance = Chance(seed)
    for _ in range(3):
        async with open_store() as outbox:
            await outbox.register(["main"])
            await chance.live(outbox, 40)
    async with open_store() as outbox:
        await outbox.register(["main"])
        chance.now += 100
        chance.held = []
        while claimed := await claim(outbox, at_ms=chance.now):
            for delivery in claimed:
                await ends(outbox, delivery)
                chance.delivered[delivery.event.key or ""] += names([delivery])
        assert (await outbox.backlog())["main"].pending == 0
    for key, accepted in chance.accepted.items():
        assert list(dict.fromkeys(chance.delivered[key])) == accepted
