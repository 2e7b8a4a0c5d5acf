"""What waits, as every outbox promises it: probes in turn, ages, times brought forward, health and news."""

import asyncio
from dataclasses import replace

import pytest

from relay.model import Delivery, Health, Standing, State, Verdict
from relay.outbox import Backlog, Ended
from tests.test_outbox import DEAD, DELIVERED, NOW, again, attempt, names, submission

DOWN = Health(
    standing=Standing.DOWN, since_ms=NOW, failures=7, failed_first="evt_a", several=True, probes=2,
    probe_at_ms=NOW + 1, not_before_ms=NOW + 2, age_from_ms=NOW - 3,
)  # fmt: skip


async def probed(outbox, count: int) -> list[str]:
    """Probe so often, in vain, and return with what."""
    seen = []
    for _ in range(count):
        probe = await outbox.probe("main")
        assert probe is not None
        seen += names([probe])
        unchanged = Verdict(state=State.PENDING, steps=probe.steps, due_ms=probe.due_ms)
        await outbox.record(probe, attempt(probe, "http_503"), unchanged)
    return seen


async def test_probes_take_what_is_pending_in_turn_due_or_not(outbox):
    await outbox.accept([submission(name) for name in "abc"])
    (a, *rest) = await outbox.claim("main", 9, NOW)
    await outbox.release(rest)
    await outbox.record(a, attempt(a, "timeout"), again(NOW + 9_000))
    assert await probed(outbox, 7) == list("bcabcab")
    await outbox.accept([submission("d", at_ms=NOW + 1)])
    assert await probed(outbox, 5) == list("cdabc")
    (delivery,) = (await outbox.story("evt_a")).deliveries
    assert delivery.due_ms == NOW + 9_000
    assert [each.number for each in delivery.attempts] == list(range(1, len(delivery.attempts) + 1))


async def test_a_probe_never_takes_what_is_in_flight_and_is_claimed_itself(outbox):
    await outbox.accept([submission(name) for name in "ab"])
    (a,) = await outbox.claim("main", 1, NOW)
    b = await outbox.probe("main")
    assert names([a, b]) == ["a", "b"]
    assert await outbox.probe("main") is None
    assert await outbox.claim("main", 9, NOW) == []
    await outbox.release([b])
    assert names([await outbox.probe("main")]) == ["b"]


async def test_there_is_no_probe_without_anything_pending(outbox):
    assert await outbox.probe("main") is None
    assert await outbox.probe("nobody") is None
    await outbox.accept([submission("a", "other")])
    assert await outbox.probe("main") is None


async def test_a_probe_never_takes_what_is_over_a_moment_later(outbox):
    """An outcome may be recorded while the probe is looked for."""
    await outbox.accept([submission(name) for name in "ab"])
    (a, b) = await outbox.claim("main", 9, NOW)
    async with asyncio.TaskGroup() as tasks:
        probing = tasks.create_task(outbox.probe("main"))
        tasks.create_task(outbox.record(a, attempt(a), DELIVERED))
        tasks.create_task(outbox.record(b, attempt(b), DELIVERED))
    assert probing.result() is None


async def test_what_waits_since_a_time_or_earlier_expires_and_nothing_else(outbox):
    await outbox.accept([submission("a", at_ms=NOW), submission("b", at_ms=NOW + 1)])
    await outbox.accept([submission("c", at_ms=NOW + 2), submission("d", "other", at_ms=NOW)])
    (b,) = [each for each in await outbox.claim("main", 9, NOW + 9) if each.event.id == "evt_b"]
    patience = await outbox.expire("main", NOW + 1, 0, NOW + 100)
    assert patience.expired == ()
    assert (patience.more, patience.oldest_ms) == (False, NOW), "all are in flight"

    await outbox.record(b, attempt(b, "timeout"), again(NOW + 50))
    patience = await outbox.expire("main", NOW + 1, 0, NOW + 100)
    assert [(each.event_id, each.type, each.attempts) for each in patience.expired] == [
        ("evt_b", "post.published", 1)
    ]
    (told,) = (await outbox.story("evt_b")).deliveries
    assert (told.state, told.due_ms, told.expired_at_ms) == (State.DEAD, None, NOW + 100)
    assert await outbox.backlog() == {
        "main": Backlog(pending=2, dead=1), "other": Backlog(pending=1, dead=0),
    }  # fmt: skip


async def test_nothing_waited_before_the_time_that_ages_count_from(outbox):
    await outbox.accept([submission("a")])
    assert (await outbox.expire("main", NOW + 5, NOW + 6, NOW + 9)).expired == ()
    patience = await outbox.expire("main", NOW + 5, NOW + 6, NOW + 9)
    assert (patience.more, patience.oldest_ms) == (False, NOW + 6)
    assert len((await outbox.expire("main", NOW + 6, NOW + 6, NOW + 9)).expired) == 1


async def test_what_is_replayed_waits_since_then(outbox):
    await outbox.accept([submission("a")])
    (a,) = await outbox.claim("main", 1, NOW)
    await outbox.record(a, attempt(a, "timeout"), DEAD)
    await outbox.revive(Ended(event_id="evt_a"), NOW + 1_000)
    patience = await outbox.expire("main", NOW + 999, 0, NOW + 2_000)
    assert (patience.expired, patience.oldest_ms) == ((), NOW + 1_000)
    assert len((await outbox.expire("main", NOW + 1_000, 0, NOW + 2_000)).expired) == 1
    await outbox.revive(Ended(event_id="evt_a"), NOW + 3_000)
    assert (await outbox.story("evt_a")).deliveries[0].expired_at_ms is None


async def test_acceptance_under_a_clock_that_was_ahead_is_no_age(outbox):
    await outbox.accept([submission("a", at_ms=NOW + 10**12)])
    assert (await outbox.expire("main", NOW - 5, NOW - 1, NOW)).expired == ()
    assert len((await outbox.expire("main", NOW - 1, NOW - 1, NOW)).expired) == 1


async def test_many_expire_in_steps_and_the_oldest_of_all_steps_is_told(outbox):
    """What an earlier step passed over must not be forgotten by the last one."""
    for start in (0, 500):
        await outbox.accept([submission(f"{start + number}") for number in range(500)])
    ended, more = 0, True
    while more:
        patience = await outbox.expire("main", NOW, 0, NOW + 10)
        assert len(patience.expired) <= 500
        ended, more = ended + len(patience.expired), patience.more
    assert ended == 1000
    await outbox.revive(Ended(endpoint="main", state=State.DEAD), NOW + 20)
    await outbox.accept([submission("late", at_ms=NOW + 5_000)])
    oldest = []
    more = True
    while more:
        patience = await outbox.expire("main", NOW + 19, 0, NOW + 6_000)
        more = patience.more
        oldest.append(patience.oldest_ms)
    assert len(oldest) == 3
    assert oldest[-1] == NOW + 20
    assert (await outbox.expire("main", NOW + 19, 0, NOW + 6_000)).oldest_ms == NOW + 20


async def test_one_look_is_enough_while_the_first_is_young(outbox):
    """What was accepted later is younger still: a backlog of millions is not walked over for nothing."""
    for start in (0, 600):
        await outbox.accept([submission(f"{start + number}") for number in range(600)])
    patience = await outbox.expire("main", NOW - 1, 0, NOW)
    assert (patience.more, patience.oldest_ms) == (False, NOW)


async def test_what_just_expired_is_not_handed_out(outbox):
    """It may still be in memory from its acceptance."""
    await outbox.accept([submission("a")])
    await outbox.expire("main", NOW, 0, NOW)
    assert await outbox.claim("main", 9, NOW + 9) == []
    assert await outbox.probe("main") is None


async def test_nothing_is_due_later_than_by_rights_once_it_was_brought_forward(outbox):
    await outbox.accept([submission(name) for name in "abc"])
    for delivery, due_ms in zip(
        await outbox.claim("main", 9, NOW), (NOW + 5, NOW + 60_000, NOW + 10**12), strict=True
    ):
        await outbox.record(delivery, attempt(delivery, "timeout"), again(due_ms))
    await outbox.advance("main", NOW + 30_000, NOW)
    assert [(await outbox.story(f"evt_{name}")).deliveries[0].due_ms for name in "abc"] == [
        NOW + 5, NOW + 30_000, NOW + 30_000,
    ]  # fmt: skip
    assert names(await outbox.claim("main", 9, NOW + 30_000)) == ["a", "b", "c"]


async def test_many_are_brought_forward(outbox):
    for start in range(0, 1200, 400):
        await outbox.accept([submission(f"{start + number}", at_ms=NOW + 10**12) for number in range(400)])
    await outbox.advance("main", NOW, NOW)
    claimed: list[Delivery] = []
    while more := await outbox.claim("main", 500, NOW):
        claimed += more
    assert len({each.event.id for each in claimed}) == 1200


async def test_only_what_a_clock_set_forward_made_due_waits_on_and_as_long_as_before(outbox):
    await outbox.accept([submission(name) for name in "abcd"])
    for delivery, due_ms in zip(
        await outbox.claim("main", 9, NOW), (NOW, NOW + 1, NOW + 60_000, NOW + 60_001), strict=True
    ):
        await outbox.record(delivery, attempt(delivery, "timeout"), again(due_ms))
    await outbox.postpone("main", NOW, NOW + 60_000)
    assert [(await outbox.story(f"evt_{name}")).deliveries[0].due_ms for name in "abcd"] == [
        NOW, NOW + 60_001, NOW + 120_000, NOW + 60_001,
    ]  # fmt: skip
    assert names(await outbox.claim("main", 9, NOW + 60_000)) == ["a"]


async def test_many_wait_on(outbox):
    for start in range(0, 1200, 400):
        await outbox.accept([submission(f"{start + number}", at_ms=NOW + 5) for number in range(400)])
    await outbox.register(["main", "other"])  # nothing is in memory any more
    await outbox.postpone("main", NOW, NOW + 60_000)
    assert await outbox.claim("main", 9, NOW + 60_004) == []
    assert len(await outbox.claim("main", 2000, NOW + 60_005)) == 1200


async def test_a_replay_at_a_pace_keeps_it_when_the_clock_was_set_back(outbox):
    await outbox.accept([submission(name) for name in "abc"])
    for delivery in await outbox.claim("main", 9, NOW):
        await outbox.record(delivery, attempt(delivery), DELIVERED)
    await outbox.revive(Ended(endpoint="main", state=State.DELIVERED), NOW + 10**12, spacing_ms=3_600_000)
    await outbox.advance("main", NOW + 1_000, NOW)
    dues = [(await outbox.story(f"evt_{name}")).deliveries[0].due_ms for name in "abc"]
    assert dues == [NOW, NOW + 3_600_000, NOW + 7_200_000]
    await outbox.advance("main", NOW + 1_000, NOW)
    assert [(await outbox.story(f"evt_{name}")).deliveries[0].due_ms for name in "abc"] == dues


async def test_health_is_kept_whole_with_an_attempt_and_apart_from_one(open_store):
    async with open_store() as outbox:
        await outbox.register(["main", "other"])
        assert (await outbox.pasts())["main"].health == Health()
        await outbox.accept([submission("a")])
        (a,) = await outbox.claim("main", 1, NOW)
        await outbox.record(a, attempt(a, "timeout"), again(NOW), health=DOWN)
        await outbox.keep_health("other", replace(DOWN, standing=Standing.GONE))
        await outbox.keep_health("nobody", DOWN)
        assert (await outbox.pasts())["main"].health == DOWN
    async with open_store() as outbox:
        kept = {each.id: each.health for each in await outbox.endpoints()}
        assert kept == {"main": DOWN, "other": replace(DOWN, standing=Standing.GONE)}


async def test_an_attempt_that_changes_nothing_of_the_health_leaves_it(outbox):
    await outbox.keep_health("main", DOWN)
    await outbox.accept([submission("a")])
    (a,) = await outbox.claim("main", 1, NOW)
    await outbox.record(a, attempt(a), DELIVERED)
    assert (await outbox.pasts())["main"].health == DOWN


async def test_a_dropped_endpoint_that_returns_begins_anew(open_store):
    async with open_store() as outbox:
        await outbox.register(["main"])
        await outbox.keep_health("main", DOWN)
        await outbox.drop_endpoint("main")
    async with open_store() as outbox:
        await outbox.register(["main"])
        (main,) = await outbox.endpoints()
        assert main.health == Health()


async def test_news_is_accepted_with_the_outcome_it_tells_of(outbox):
    await outbox.accept([submission("a")])
    (a,) = await outbox.claim("main", 1, NOW)
    receipts = await outbox.record(
        a, attempt(a, "timeout"), DEAD, health=DOWN, news=[submission("n", "other"), submission("m", "other")]
    )
    assert [(each.id, each.endpoints) for each in receipts] == [("evt_n", ("other",)), ("evt_m", ("other",))]
    assert names(await outbox.claim("other", 9, NOW)) == ["n", "m"]


@pytest.mark.parametrize("news", [(), ("n",)])
async def test_nothing_of_what_the_caller_no_longer_holds_is_kept_nor_told(outbox, news):
    await outbox.accept([submission("a")])
    (a,) = await outbox.claim("main", 1, NOW)
    await outbox.release([a])
    told = [submission(name, "other") for name in news]
    assert await outbox.record(a, attempt(a, "timeout"), DEAD, health=DOWN, news=told) == []
    assert await outbox.claim("other", 9, NOW) == []
    assert (await outbox.pasts())["main"].health == Health()


async def test_what_the_clock_said_when_anything_last_happened_is_known(open_store):
    async with open_store() as outbox:
        await outbox.register(["main"])
        assert await outbox.last_seen() is None
        await outbox.accept([submission("a", at_ms=NOW)])
        assert await outbox.last_seen() == NOW
        (a,) = await outbox.claim("main", 1, NOW)
        await outbox.record(a, attempt(a, "timeout", NOW + 7), again(NOW))
        # A clock that was ahead for a while: what it says now counts, not the latest time it ever said.
        await outbox.accept([submission("b", at_ms=NOW + 10**10)])
        await outbox.accept([submission("c", at_ms=NOW + 9)])
    async with open_store() as outbox:
        assert await outbox.last_seen() == NOW + 9
