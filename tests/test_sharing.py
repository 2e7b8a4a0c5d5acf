"""Several relays on one PostgreSQL, side by side in this process: what each may do, and what it hears."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace

import pytest

from relay.model import Health, Secret, Standing, State
from relay.outbox import Ended, Outbox, open_outbox
from relay.outbox.sharing import Neighbours, Share, Sharing
from tests.clock import MovedClock
from tests.lanes import endpoint, until
from tests.test_endpoints import House, house, settings
from tests.test_order import keyed
from tests.test_outbox import DEAD, DELIVERED, NOW, again, attempt, names, submission
from tests.test_postgres import run

QUICK = Sharing(beat_seconds=0.05, dead_seconds=20.0, look_seconds=0.05)
MUTE = Sharing(beat_seconds=60.0, dead_seconds=1.5, look_seconds=60.0)  # it beats once, when it joins

Open = Callable[..., AbstractAsyncContextManager[Outbox]]


@pytest.fixture
def opened(postgres_url: str) -> Open:
    return lambda sharing=QUICK: open_outbox(Secret(postgres_url), sharing=sharing)


@pytest.fixture
async def two(opened: Open) -> AsyncIterator[tuple[Outbox, Outbox]]:
    async with opened() as one, opened() as other:
        for each in (one, other):
            await each.register(["main", "other"])
        yield one, other


class Ear:
    """Hears what neighbours do."""

    def __init__(self, outbox: Outbox) -> None:
        self.woken: list[str] = []
        self.healths: list[tuple[str, Health]] = []
        self.shares: dict[str, Share] = {}
        self.changes = 0
        outbox.heed(
            Neighbours(
                woken=self.woken.extend,
                stood=lambda *each: self.healths.append(each),
                shared=self.shares.__setitem__,
                changed=self.changed,
            )
        )

    def changed(self) -> None:
        self.changes += 1


async def claimed(outbox: Outbox, count: int = 9, at_ms: int = NOW) -> list:
    """Claim as a lane does that was woken."""
    await outbox.release([])
    outbox._waiting["main"].rewind(0)
    return await outbox.claim("main", count, at_ms)


async def test_a_delivery_is_claimed_by_one_relay(two):
    one, other = two
    await one.accept([submission(f"{n}") for n in range(20)])

    async with asyncio.TaskGroup() as tasks:
        claims = [tasks.create_task(claimed(each, 7)) for each in (one, other, one, other)]
    found = [name for each in claims for name in names(each.result())]
    found += names(await claimed(one, 20)) + names(await claimed(other, 20))

    assert sorted(found, key=int) == [f"{n}" for n in range(20)]


async def test_what_a_dead_relay_claimed_is_free_and_it_can_say_nothing_more_of_it(opened):
    async with opened(MUTE) as dead, opened(replace(QUICK, dead_seconds=1.5)) as alive:
        for each in (dead, alive):
            await each.register(["main"])
        await dead.accept([submission("a"), submission("b")])
        (a, b) = await dead.claim("main", 9, NOW)
        assert dead.holds(a)

        async with asyncio.timeout(10):
            while len(mine := await claimed(alive)) < 2:
                await asyncio.sleep(0.02)

        assert not dead.holds(a), "by its own clock"
        await dead.record(a, attempt(a, "timeout"), DEAD)
        assert (await alive.story("evt_a")).deliveries[0].state is State.PENDING
        await alive.record(mine[0], attempt(mine[0]), DELIVERED)
        await dead.release([b])
        assert await claimed(dead) == []
        (told,) = (await dead.story("evt_a")).deliveries
        assert (told.state, len(told.attempts)) == (State.DELIVERED, 1)


async def test_an_outcome_counts_if_the_claim_was_lost_but_nobody_has_claimed_since(opened):
    """The attempt was made; to make it again would be a duplicate for nothing."""
    async with opened(MUTE) as slow, opened(replace(QUICK, dead_seconds=1.5)) as alive:
        for each in (slow, alive):
            await each.register(["main"])
        await slow.accept([submission("a")])
        (a,) = await slow.claim("main", 9, NOW)
        async with asyncio.timeout(10):
            while slow.holds(a) or alive._member.alive > 1:
                await asyncio.sleep(0.02)
        await slow.record(a, attempt(a), DELIVERED)
        assert (await alive.story("evt_a")).deliveries[0].state is State.DELIVERED


async def test_a_relay_taken_for_dead_that_lives_joins_anew_and_goes_on(opened):
    async with opened(MUTE) as slow, opened(replace(QUICK, dead_seconds=1.5)) as alive:
        for each in (slow, alive):
            await each.register(["main"])
        async with asyncio.timeout(10):
            while alive._member.alive > 1:
                await asyncio.sleep(0.02)
        await slow.accept([submission("a")])
        (a,) = await claimed(slow)
        assert slow.holds(a)
        await slow.record(a, attempt(a), DELIVERED)
        assert (await alive.story("evt_a")).deliveries[0].state is State.DELIVERED


@pytest.mark.parametrize("by", ["hint", "look"])
async def test_a_relay_hears_what_another_has_accepted(opened, by):
    sharing = replace(QUICK, look_seconds=60.0 if by == "hint" else 0.05)
    async with opened(sharing) as one, opened(sharing) as other:
        for each in (one, other):
            await each.register(["main"])
            each._watch._listening = each._watch._listening if by == "hint" else None
        ear = Ear(other)
        if by == "hint":
            await until(lambda: other._watch._ear is not None and one._member.alive == 2)
        assert await other.claim("main", 9, NOW) == []
        ear.woken.clear()
        await one.accept([submission("a")])
        await until(lambda: ear.woken == ["main"])
        assert names(await other.claim("main", 9, NOW)) == ["a"]


async def test_the_same_key_at_two_relays_at_the_same_moment_is_one_event(two):
    async with asyncio.TaskGroup() as tasks:
        posts = [
            tasks.create_task(two[n % 2].accept([submission(f"{n}", key=f"k{n // 4}")])) for n in range(40)
        ]
    receipts = [post.result()[0] for post in posts]
    assert sum(not receipt.duplicate for receipt in receipts) == 10
    for n in range(0, 40, 4):
        assert len({receipt.id for receipt in receipts[n : n + 4]}) == 1


async def test_batches_with_the_same_keys_in_any_order_do_not_lock_each_other_up(two):
    keys = [f"k{n}" for n in range(30)]
    async with asyncio.TaskGroup() as tasks:
        posts = [
            tasks.create_task(
                two[n % 2].accept(
                    [submission(f"{n}-{key}", key=key) for key in keys[:: 1 if n % 4 < 2 else -1]]
                )
            )
            for n in range(8)
        ]
    for key in range(30):
        ids = {post.result()[key if n % 4 < 2 else 29 - key].id for n, post in enumerate(posts)}
        assert len(ids) == 1


async def test_those_of_one_key_come_one_at_a_time_whoever_accepts_and_whoever_claims(two):
    one, other = two

    async def accept(outbox: Outbox, name: str) -> None:
        for n in range(15):
            await outbox.accept([keyed(f"{name}{n}")])

    seen: list[str] = []

    async def deliver(outbox: Outbox) -> None:
        while len(seen) < 45:
            mine = await claimed(outbox)
            assert len(mine) <= 1
            for delivery in mine:
                seen.extend(names([delivery]))
                await outbox.record(delivery, attempt(delivery), DELIVERED)
            await asyncio.sleep(0)

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for name, outbox in (("a", one), ("b", other), ("c", one)):
            tasks.create_task(accept(outbox, name))
        tasks.create_task(deliver(one))
        tasks.create_task(deliver(other))
    numbered = [(await one.story(f"evt_{name}")).event for name in seen]
    assert len({each.id for each in numbered}) == 45
    for name in "abc":
        assert [each for each in seen if each[0] == name] == [f"{name}{n}" for n in range(15)]


async def test_what_is_revived_here_does_not_overtake_what_is_in_flight_there(two):
    one, other = two
    await one.accept([keyed(name) for name in "ab"])
    (a,) = await claimed(one)
    await one.record(a, attempt(a, "http_500"), DEAD)
    (b,) = await claimed(other)
    await one.revive(Ended(event_id="evt_a"), NOW)
    assert await claimed(one) == []
    await other.record(b, attempt(b, "timeout"), again(NOW))
    assert names(await claimed(one)) == ["a"]


async def test_counts_and_last_attempts_are_those_of_all_relays(opened):
    async with opened() as one:
        await one.register(["main"])
        async with opened() as other:
            await other.register(["main"])
            await one.accept([submission(name) for name in "abc"])
            (a, b) = await claimed(other, 2)
            await other.record(a, attempt(a, "timeout", NOW + 1), DEAD)
            await other.record(b, attempt(b, None, NOW + 2), DELIVERED)
            for each in (one, other):
                assert (await each.backlog())["main"].pending == 1
                assert (await each.backlog())["main"].dead == 1
        past = (await one.pasts())["main"]
        assert (past.last_success_at_ms, past.last_failure_at_ms, past.last_error) == (
            NOW + 2, NOW + 1, "timeout",
        )  # fmt: skip
        assert (await one.backlog())["main"].dead == 1, "after the other has left"


# How an endpoint stands, and who has which part of its pace

DOWN = Health(standing=Standing.DOWN, since_ms=NOW, failures=5)


async def test_how_an_endpoint_stands_is_known_to_all_and_nobody_undoes_it_unknowingly(two):
    one, other = two
    ear = Ear(other)
    await one.accept([submission(name) for name in "abc"])
    (a, b) = await claimed(one, 2)
    (c,) = await claimed(other, 1)
    await one.record(a, attempt(a, "timeout"), again(NOW), health=DOWN)
    # Concluded from what was known before: the endpoint was up.
    other._watch.healths.pop(1, None)
    await other.record(c, attempt(c, "timeout"), again(NOW), health=Health(failures=1))
    await until(lambda: ("main", DOWN) in ear.healths)
    assert (await one.pasts())["main"].health == DOWN
    await one.record(b, attempt(b), DELIVERED, health=Health())
    await until(lambda: ear.healths[-1] == ("main", Health()))


async def test_relays_have_equal_parts_of_an_endpoints_pace(opened):
    async with AsyncExitStack() as stack:
        ears = []
        for _ in range(3):
            outbox = await stack.enter_async_context(opened())
            await outbox.register(["main"])
            ears.append(Ear(outbox))
        await until(lambda: all(ear.shares.get("main") and ear.shares["main"].relays == 3 for ear in ears))
        for whole in (1, 2, 3, 7, 32):
            parts = [ear.shares["main"].of(whole) for ear in ears]
            assert sum(parts) == whole
            assert max(parts) - min(parts) <= 1


# Endpoints of the API and of configs


async def test_endpoints_of_relays_with_other_configs_are_left_alone_while_one_has_them(opened):
    async with opened() as old:
        await old.register(["main", "mine"])
        await old.accept([submission("a", "main", "mine")])
        async with opened() as new:
            assert await new.register(["main"]) == {}, "the old one has it still"
        assert (await old.story("evt_a")).deliveries[1].state is State.PENDING
    async with opened() as new:
        assert await new.register(["main"]) == {"mine": 1}


@pytest.fixture
async def houses(opened: Open) -> AsyncIterator[tuple[House, House]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            outbox = await stack.enter_async_context(opened())
            main = endpoint("main", events=("*",))
            here = await stack.enter_async_context(house(outbox, MovedClock(), main))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            following = group.create_task(here.endpoints.follow())
            stack.callback(following.cancel)
            outbox.heed(
                Neighbours(
                    woken=here.lanes.wake,
                    stood=here.lanes.stood,
                    shared=here.lanes.share,
                    changed=here.endpoints.changed_elsewhere,
                )
            )
            made.append(here)
        yield tuple(made)


def ids(here: House) -> set[str]:
    return {each.endpoint.id for each in here.endpoints.all()}


async def test_endpoints_made_changed_paused_and_removed_at_one_relay_are_so_at_the_others(houses):
    one, other = houses
    await one.endpoints.put(settings(id="mine"))
    await until(lambda: "mine" in other.ingest.subscriptions.endpoints)
    receipt = await other.post()
    assert receipt.endpoints == ("main", "mine")

    await one.endpoints.patch("mine", {"description": "changed"})
    await until(lambda: other.endpoints.get("mine").endpoint.description == "changed")
    await other.endpoints.pause("main", paused=True)
    await until(lambda: one.endpoints.get("main").paused)
    _, secret = await other.endpoints.rotate("mine", 60.0)
    await until(lambda: one.endpoints.get("mine").settings["secrets"][0] == secret)

    await one.endpoints.remove("mine")
    receipt = await other.post()
    assert receipt.endpoints == ("main",), "not even before the other has heard of it"
    await until(lambda: "mine" not in ids(other))


async def test_a_change_here_starts_from_what_was_changed_there_a_moment_before(houses):
    one, other = houses
    await one.endpoints.put(settings(id="mine"))
    await until(lambda: "mine" in ids(other))
    for n in range(10):
        await one.endpoints.patch("mine", {"description": f"{n}"})
        await other.endpoints.patch("mine", {"concurrency": n + 1})
    found = one.endpoints.get("mine").endpoint, other.endpoints.get("mine").endpoint
    await until(lambda: one.endpoints.get("mine").endpoint.concurrency == 10)
    assert found[1].description == "9"


async def test_what_was_written_for_a_relay_that_is_no_more_has_no_part_of_the_pace_and_goes(
    opened, postgres_url
):
    """A relay may be buried while it takes up its endpoints; each would take a part of the pace for ever."""
    async with opened() as outbox:
        await outbox.register(["main"])
        ear = Ear(outbox)
        await run(postgres_url, "INSERT INTO relay.holders SELECT number, 999 FROM relay.endpoints")
        await run(postgres_url, "INSERT INTO relay.tallies (endpoint, relay, dead) VALUES (1, 999, 3)")
        async with asyncio.timeout(10):
            while await outbox._look(strays):
                assert ear.shares.get("main", Share()) == Share()
                await asyncio.sleep(0.02)
        assert (await outbox.backlog())["main"].dead == 3


async def strays(link) -> int:
    return await link.fetchval(
        "SELECT (SELECT count(*) FROM relay.holders WHERE relay = 999)"
        " + (SELECT count(*) FROM relay.tallies WHERE relay = 999)"
    )


async def test_a_relay_that_lost_its_hold_of_an_endpoint_takes_it_up_again(houses, postgres_url):
    one, _ = houses
    await run(postgres_url, "DELETE FROM relay.holders")
    async with asyncio.timeout(10):
        while await one.outbox._look(held) < 2:
            await asyncio.sleep(0.02)


async def held(link) -> int:
    return await link.fetchval("SELECT count(*) FROM relay.holders")
