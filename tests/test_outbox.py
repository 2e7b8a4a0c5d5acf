"""The contract of every outbox: what `relay.outbox` promises, run against each store."""

import asyncio
import hashlib
from dataclasses import replace

import pytest

from relay.model import Attempt, Delivery, Event, State, Submission, Verdict
from relay.outbox import Backlog, ConflictError, Query

NOW = 1_768_471_200_000


def submission(
    name: str,
    *endpoints: str,
    key: str | None = None,
    content: str = "1",
    at_ms: int = NOW,
    data: bytes = b'{"n":1}',
) -> Submission:
    event = Event(
        id=f"evt_{name}", type="post.published", timestamp="2026-01-15T10:00:00.000Z", data=data,
        accepted_at_ms=at_ms,
    )  # fmt: skip
    return Submission(
        event=event,
        endpoints=tuple((endpoint, "event") for endpoint in endpoints or ("main",)),
        digest=hashlib.sha256(name.encode()).digest(),
        idempotency_key=key,
        fingerprint=content.encode() if key else None,
    )


def attempt(delivery: Delivery, reason: str | None = None, at_ms: int = NOW) -> Attempt:
    status = 200 if reason is None else 503
    return Attempt(
        number=delivery.attempts + 1, at_ms=at_ms, milliseconds=7, status=status, reason=reason, answer="ok"
    )


def names(deliveries: list[Delivery]) -> list[str]:
    return [delivery.event.id.removeprefix("evt_") for delivery in deliveries]


DELIVERED = Verdict(state=State.DELIVERED, steps=0)
DEAD = Verdict(state=State.DEAD, steps=3)


def again(due_ms: int) -> Verdict:
    return Verdict(state=State.PENDING, steps=1, due_ms=due_ms)


async def test_what_was_accepted_is_claimed_in_order_and_whole(outbox):
    await outbox.accept([submission("a"), submission("b", data=b'{"text":"\xc3\xa9"}')])
    await outbox.accept([submission("c")])

    claimed = await outbox.claim("main", 10, NOW)

    assert names(claimed) == ["a", "b", "c"]
    assert claimed[1].event.data == b'{"text":"\xc3\xa9"}'
    assert claimed[1].digest == hashlib.sha256(b"b").digest()
    assert (claimed[0].attempts, claimed[0].steps, claimed[0].format) == (0, 0, "event")


async def test_what_was_accepted_survives_a_restart(open_store):
    async with open_store() as first:
        await first.register(["main"])
        await first.accept([submission("a"), submission("b", key="k")])
    async with open_store() as second:
        await second.register(["main"])
        assert names(await second.claim("main", 10, NOW)) == ["a", "b"]
        (receipt,) = await second.accept([submission("x", key="k")])
        assert (receipt.id, receipt.duplicate) == ("evt_b", True)


async def test_a_delivery_is_claimed_once_until_it_is_recorded_or_released(outbox):
    await outbox.accept([submission("a"), submission("b")])

    (first,) = await outbox.claim("main", 1, NOW)
    (second,) = await outbox.claim("main", 5, NOW)
    assert await outbox.claim("main", 5, NOW) == []

    await outbox.release([first])
    assert names(await outbox.claim("main", 5, NOW)) == ["a"]
    await outbox.record(second, attempt(second), DELIVERED)
    assert await outbox.claim("main", 5, NOW) == []


async def test_what_was_claimed_and_not_recorded_is_due_again_after_a_restart(open_store):
    """A crash needs no repair step: in flight is not a state on disk."""
    async with open_store() as first:
        await first.register(["main"])
        await first.accept([submission("a")])
        await first.claim("main", 1, NOW)
    async with open_store() as second:
        await second.register(["main"])
        assert names(await second.claim("main", 1, NOW)) == ["a"]


async def test_claim_never_hands_out_more_than_asked_for_nor_what_is_not_due(outbox):
    await outbox.accept([submission(f"{n}") for n in range(7)])
    (first, *_) = await outbox.claim("main", 3, NOW)
    await outbox.record(first, attempt(first, "http_503"), again(NOW + 5000))

    assert names(await outbox.claim("main", 2, NOW)) == ["3", "4"]
    assert names(await outbox.claim("main", 9, NOW + 4999)) == ["5", "6"]
    assert await outbox.due("main") == NOW + 5000
    (late,) = await outbox.claim("main", 9, NOW + 5000)
    assert (late.event.id, late.attempts, late.steps) == ("evt_0", 1, 1)


async def test_due_time_goes_before_the_order_of_acceptance(outbox):
    await outbox.accept([submission("a"), submission("b")])
    a, b = await outbox.claim("main", 2, NOW)
    await outbox.record(a, attempt(a, "timeout"), again(NOW + 9000))
    await outbox.record(b, attempt(b, "timeout"), again(NOW + 3000))
    await outbox.accept([submission("c", at_ms=NOW + 6000)])

    assert set(names(await outbox.claim("main", 9, NOW + 10_000))) == {"a", "b", "c"}


async def test_a_backlog_larger_than_memory_holds_comes_out_whole_and_in_order(open_store):
    """What is kept in memory is bounded; the rest is found on disk, nothing twice and nothing left out."""
    async with open_store() as outbox:
        await outbox.register(["main"])
        for start in range(0, 1200, 100):
            await outbox.accept([submission(f"{n:04}", at_ms=NOW + start) for n in range(start, start + 100)])
        seen: list[str] = []
        while claimed := await outbox.claim("main", 37, NOW + 9999):
            seen += names(claimed)
            if len(seen) < 300:  # new ones arrive while the old are worked off
                await outbox.accept([submission(f"{1200 + len(seen)}", at_ms=NOW + 5000)])
            for delivery in claimed:
                await outbox.record(delivery, attempt(delivery), DELIVERED)
        assert seen == sorted(seen)
        assert len(seen) == len(set(seen)) == 1200 + 9 - 1
        assert await outbox.backlog() == {"main": Backlog(pending=0, dead=0)}


async def test_released_and_retried_deliveries_are_found_behind_where_the_lane_has_come(outbox):
    await outbox.accept([submission(f"{n:03}") for n in range(400)])
    first = await outbox.claim("main", 300, NOW)
    await outbox.release(first[:5])
    await outbox.record(first[7], attempt(first[7], "timeout"), again(NOW + 1))

    rest = await outbox.claim("main", 400, NOW + 1)

    assert sorted(names(rest)) == ["000", "001", "002", "003", "004", "007"] + [
        f"{n:03}" for n in range(300, 400)
    ]


async def test_each_endpoint_has_its_own_deliveries(outbox):
    await outbox.accept([submission("a", "main", "other"), submission("b", "other")])

    (mine,) = await outbox.claim("main", 9, NOW)
    await outbox.record(mine, attempt(mine, "http_500"), DEAD)

    assert names(await outbox.claim("other", 9, NOW)) == ["a", "b"]
    assert await outbox.backlog() == {
        "main": Backlog(pending=0, dead=1),
        "other": Backlog(pending=2, dead=0),
    }


async def test_the_same_key_and_content_is_one_event(outbox):
    (first,) = await outbox.accept([submission("a", "main", "other", key="k")])
    (second,) = await outbox.accept([submission("b", "main", "other", key="k")])

    assert not first.duplicate
    assert second == replace(first, duplicate=True)
    assert len(await outbox.claim("main", 9, NOW)) == 1


async def test_fifty_twins_at_once_are_one_event(outbox):
    """A client that gave up waiting and posted again must not make a second event."""
    async with asyncio.TaskGroup() as tasks:
        posts = [tasks.create_task(outbox.accept([submission(f"{n}", key="k")])) for n in range(50)]
    receipts = [receipt for post in posts for receipt in post.result()]

    assert len({receipt.id for receipt in receipts}) == 1
    assert sum(not receipt.duplicate for receipt in receipts) == 1
    assert len(await outbox.claim("main", 99, NOW)) == 1


async def test_one_conflict_refuses_the_whole_batch_and_leaves_nothing(outbox):
    await outbox.accept([submission("a", key="k", content="1")])

    with pytest.raises(ConflictError) as refused:
        await outbox.accept(
            [submission("b"), submission("c", key="k", content="2"), submission("d", key="new", content="1")]
        )

    assert refused.value.indexes == (1,)
    assert names(await outbox.claim("main", 9, NOW)) == ["a"]
    (receipt,) = await outbox.accept([submission("e", key="new", content="other")])
    assert not receipt.duplicate, "the key of a refused batch is free"


async def test_twins_within_a_batch_are_one_event_and_conflicts_in_it_are_seen(outbox):
    twins = [submission("a", key="k"), submission("b", key="k")]
    assert [receipt.id for receipt in await outbox.accept(twins)] == ["evt_a", "evt_a"]
    with pytest.raises(ConflictError) as refused:
        await outbox.accept([submission("c", key="l", content="1"), submission("d", key="l", content="2")])
    assert refused.value.indexes == (1,)


async def test_an_event_nobody_wants_is_kept_all_the_same(outbox):
    await outbox.accept([replace(submission("a"), endpoints=())])
    story = await outbox.story("evt_a")
    assert story.deliveries == ()


async def test_a_story_tells_every_attempt(outbox):
    await outbox.accept([submission("a")])
    (first,) = await outbox.claim("main", 1, NOW)
    await outbox.record(first, attempt(first, "http_503", NOW), again(NOW + 5))
    (second,) = await outbox.claim("main", 1, NOW + 5)
    await outbox.record(second, attempt(second, None, NOW + 6), DELIVERED)

    story = await outbox.story("evt_a")

    (delivery,) = story.deliveries
    assert (delivery.endpoint, delivery.state, delivery.due_ms) == ("main", State.DELIVERED, None)
    assert [(a.number, a.at_ms, a.status, a.reason, a.answer) for a in delivery.attempts] == [
        (1, NOW, 503, "http_503", "ok"),
        (2, NOW + 6, 200, None, "ok"),
    ]
    assert await outbox.story("evt_unknown") is None


async def test_only_what_is_still_held_can_be_recorded(outbox):
    """A lane that was stopped and comes late must not undo what happened since."""
    await outbox.accept([submission("a")])
    (stale,) = await outbox.claim("main", 1, NOW)
    await outbox.release([stale])
    await outbox.record(stale, attempt(stale, "timeout"), DEAD)
    (fresh,) = await outbox.claim("main", 1, NOW)
    await outbox.record(fresh, attempt(fresh), DELIVERED)
    await outbox.record(fresh, attempt(fresh, "timeout"), DEAD)

    story = await outbox.story("evt_a")
    assert story.deliveries[0].state is State.DELIVERED


async def test_a_removed_endpoints_deliveries_are_cancelled_and_said(open_store):
    async with open_store() as outbox:
        await outbox.register(["main", "gone"])
        await outbox.accept([submission(f"{n}", "main", "gone") for n in range(3)])
    async with open_store() as outbox:
        assert await outbox.register(["main"]) == {"gone": 3}
        story = await outbox.story("evt_0")
        assert {each.endpoint: each.state for each in story.deliveries} == {
            "main": State.PENDING,
            "gone": State.CANCELLED,
        }
    async with open_store() as outbox:
        assert await outbox.register(["main", "gone"]) == {}
        assert await outbox.claim("gone", 9, NOW) == []


async def test_events_are_listed_newest_first_page_by_page(outbox):
    await outbox.accept([submission(f"{n}") for n in range(5)])

    first = await outbox.events(Query(limit=2))
    second = await outbox.events(Query(limit=2, before=first.next_before))
    third = await outbox.events(Query(limit=2, before=second.next_before))

    listed = [story.event.id for page in (first, second, third) for story in page.stories]
    assert listed == ["evt_4", "evt_3", "evt_2", "evt_1", "evt_0"]
    assert (await outbox.events(Query(limit=2, before=0))).next_before is None


async def test_retention_forgets_what_is_over_and_nothing_that_is_owed(outbox):
    await outbox.accept([submission("old", key="k"), submission("owed"), submission("dead")])
    await outbox.accept([submission("young", at_ms=NOW + 9000)])
    old, owed, dead, _ = await outbox.claim("main", 4, NOW + 9000)
    await outbox.record(old, attempt(old), DELIVERED)
    await outbox.record(dead, attempt(dead, "http_500"), DEAD)
    await outbox.record(owed, attempt(owed, "http_500"), again(NOW + 99_000))

    while await outbox.forget(NOW + 5000, 1):
        pass

    kept = [story.event.id for story in (await outbox.events(Query(limit=9))).stories]
    assert kept == ["evt_young", "evt_owed"]
    assert (await outbox.backlog())["main"] == Backlog(pending=2, dead=0)
    (receipt,) = await outbox.accept([submission("new", key="k", content="other")])
    assert not receipt.duplicate, "a key lives as long as its event"


async def test_a_caller_that_gives_up_waiting_changes_nothing_for_the_others(outbox):
    """Cancelling an await does not cancel its statement, so the event is kept: unknown means unknown."""
    async with asyncio.TaskGroup() as tasks:
        impatient = tasks.create_task(outbox.accept([submission("a")]))
        patient = tasks.create_task(outbox.accept([submission("b")]))
        await asyncio.sleep(0)
        impatient.cancel()
    assert patient.result()[0].id == "evt_b"
    assert "b" in names(await outbox.claim("main", 9, NOW))
