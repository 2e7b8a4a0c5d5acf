"""The contract of every outbox: what `relay.outbox` promises, run against each store."""

import asyncio
import hashlib
from dataclasses import replace

import pytest

from relay.health import next_attempt_ms
from relay.model import Attempt, Delivery, Event, Health, Owed, Standing, State, Submission, Verdict
from relay.outbox import Backlog, ConflictError, Ended, KeptEndpoint, Past, Query

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
        endpoints=tuple(Owed(endpoint, "event") for endpoint in endpoints or ("main",)),
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


async def test_an_event_that_is_known_by_its_id_is_kept_once(outbox):
    """It came with its id, from a row that may come again: whatever stands beside it then is no conflict."""
    first = replace(submission("a", "main", "other"), known_by_id=True)
    again = replace(submission("a", key="k", content="2"), known_by_id=True)
    (receipt,) = await outbox.accept([first])
    repeats = await outbox.accept([again, again, replace(submission("b"), known_by_id=True)])
    assert not receipt.duplicate
    assert [each.duplicate for each in repeats] == [True, True, False]
    assert repeats[0].endpoints == receipt.endpoints == ("main", "other")
    twice = replace(submission("c", key="c"), known_by_id=True)
    receipts = await outbox.accept([twice, replace(twice, idempotency_key="d")])
    assert [each.duplicate for each in receipts] == [False, True]
    assert (await outbox.accept([submission("e", key="k")]))[
        0
    ].id == "evt_e"  # the repeat's key was not taken


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


# Endpoints that come and go


def kept(id_: str, settings: bytes | None = b"{}", *, paused: bool = False) -> KeptEndpoint:
    return KeptEndpoint(id=id_, settings=settings, paused=paused)


async def test_what_is_kept_of_an_endpoint_is_there_after_a_restart(open_store):
    async with open_store() as first:
        await first.register(["main"])
        await first.keep_endpoint(kept("mine", b'{"a":1}'))
        await first.keep_endpoint(kept("mine", b'{"a":2}', paused=True))
        await first.keep_endpoint(kept("main", None, paused=True))
    async with open_store() as second:
        everything = [kept("main", None, paused=True), kept("mine", b'{"a":2}', paused=True)]
        assert await second.endpoints() == everything
        await second.register(["main", "mine"])
        assert await second.endpoints() == everything, "registering changes no settings"


async def test_events_are_accepted_for_an_endpoint_from_its_keeping_on(outbox):
    await outbox.keep_endpoint(kept("mine"))
    (receipt,) = await outbox.accept([submission("a", "mine")])
    await outbox.keep_endpoint(kept("mine", b'{"changed":1}'))
    assert receipt.endpoints == ("mine",)
    assert names(await outbox.claim("mine", 9, NOW)) == ["a"]


async def test_what_a_dropped_endpoint_waited_for_is_cancelled_and_stays_away(open_store):
    async with open_store() as outbox:
        await outbox.register(["main"])
        await outbox.keep_endpoint(kept("mine", paused=True))
        await outbox.accept([submission(f"{n}", "main", "mine") for n in range(2100)])
        (done,) = await outbox.claim("mine", 1, NOW)
        await outbox.record(done, attempt(done), DELIVERED)

        assert await outbox.drop_endpoint("mine") == 2099

        assert await outbox.claim("mine", 9, NOW) == []
        assert await outbox.due("mine") is None
        assert await outbox.backlog() == {"main": Backlog(pending=2100, dead=0)}
        story = await outbox.story("evt_1")
        assert {each.endpoint: each.state for each in story.deliveries} == {
            "main": State.PENDING,
            "mine": State.CANCELLED,
        }
    async with open_store() as outbox:
        assert await outbox.endpoints() == [kept("main", None), kept("mine", None)]
        assert await outbox.register(["main"]) == {}


async def test_a_receipt_names_no_endpoint_that_was_dropped_before_the_commit(outbox):
    """Matched a moment before the drop, committed after it: nobody must wait for that delivery."""
    async with asyncio.TaskGroup() as tasks:
        drop = tasks.create_task(outbox.drop_endpoint("other"))
        await asyncio.sleep(0)
        accept = tasks.create_task(
            outbox.accept([submission("a", "main", "other"), submission("b", "other")])
        )
    assert drop.result() == 0
    assert [receipt.endpoints for receipt in accept.result()] == [("main",), ()]
    story = await outbox.story("evt_a")
    assert [each.endpoint for each in story.deliveries] == ["main"]


async def test_accepts_racing_with_drops_leave_one_delivery_for_each_name_in_a_receipt(outbox):
    receipts = []

    async def accept(name: str) -> None:
        for n in range(30):
            receipts.extend(await outbox.accept([submission(f"{name}{n}", "main", "mine")]))

    async def come_and_go() -> None:
        for _ in range(25):
            await outbox.keep_endpoint(kept("mine"))
            await outbox.drop_endpoint("mine")

    async with asyncio.TaskGroup() as tasks:
        for name in ("a", "b", "c"):
            tasks.create_task(accept(name))
        tasks.create_task(come_and_go())

    states = []
    for receipt in receipts:
        story = await outbox.story(receipt.id)
        assert tuple(each.endpoint for each in story.deliveries) == receipt.endpoints
        states += [each.state for each in story.deliveries if each.endpoint == "mine"]
    assert set(states) <= {State.CANCELLED}
    assert len(receipts) == 90
    assert await outbox.backlog() == {
        "main": Backlog(pending=90, dead=0),
        "other": Backlog(pending=0, dead=0),
    }


async def test_an_outcome_that_comes_after_the_drop_changes_nothing_twice(outbox):
    """The attempt was made, so it is listed; what was cancelled stays so, and the counts stay true."""
    await outbox.accept([submission("a", "other"), submission("b", "other")])
    a, b = await outbox.claim("other", 2, NOW)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(outbox.record(a, attempt(a), DELIVERED))
        await asyncio.sleep(0)
        tasks.create_task(outbox.release([a, b]))
        tasks.create_task(outbox.drop_endpoint("other"))
    await outbox.record(b, attempt(b), DELIVERED)
    assert (await outbox.story("evt_a")).deliveries[0].state is State.DELIVERED
    assert (await outbox.story("evt_b")).deliveries[0].state is State.CANCELLED
    await outbox.keep_endpoint(kept("other"))
    assert (await outbox.backlog())["other"] == Backlog(pending=0, dead=0)
    assert await outbox.claim("other", 9, NOW) == []


# Replay


async def finish(outbox, name: str, verdict: Verdict, endpoint: str = "main", **options: object) -> None:
    """Accept an event and bring its delivery to this end."""
    await outbox.accept([submission(name, endpoint, **options)])
    (delivery,) = await outbox.claim(endpoint, 1, NOW)
    reason = "http_503" if verdict is not DELIVERED else None
    await outbox.record(delivery, attempt(delivery, reason), verdict)


async def test_a_replayed_delivery_goes_on_counting_and_starts_its_schedule_again(outbox):
    await finish(outbox, "a", DEAD)

    assert await outbox.revive(Ended(endpoint="main", state=State.DEAD), NOW + 9) == 1

    assert await outbox.backlog() == {
        "main": Backlog(pending=1, dead=0),
        "other": Backlog(pending=0, dead=0),
    }
    assert await outbox.claim("main", 9, NOW + 8) == []
    (again,) = await outbox.claim("main", 9, NOW + 9)
    assert (again.event.id, again.attempts, again.steps) == ("evt_a", 1, 0)
    await outbox.record(again, attempt(again, None, NOW + 10), DELIVERED)
    (delivery,) = (await outbox.story("evt_a")).deliveries
    assert [(each.number, each.reason) for each in delivery.attempts] == [(1, "http_503"), (2, None)]


async def test_a_delivered_one_replayed_keeps_the_attempt_it_was_delivered_with(outbox):
    await finish(outbox, "a", DELIVERED)
    for number in (2, 3):
        assert await outbox.revive(Ended(event_id="evt_a"), NOW) == 1
        (again,) = await outbox.claim("main", 9, NOW)
        await outbox.record(again, attempt(again, None, NOW + number), DELIVERED)
    (delivery,) = (await outbox.story("evt_a")).deliveries
    assert [(each.number, each.at_ms, each.answer) for each in delivery.attempts] == [
        (1, NOW, "ok"), (2, NOW + 2, "ok"), (3, NOW + 3, "ok"),
    ]  # fmt: skip
    assert await outbox.backlog() == dict.fromkeys(("main", "other"), Backlog(pending=0, dead=0))


async def test_a_replay_is_still_there_after_a_restart(open_store):
    async with open_store() as first:
        await first.register(["main"])
        await finish(first, "a", DEAD)
        await first.revive(Ended(event_id="evt_a"), NOW)
    async with open_store() as second:
        await second.register(["main"])
        assert await second.backlog() == {"main": Backlog(pending=1, dead=0)}
        assert names(await second.claim("main", 9, NOW)) == ["a"]


async def test_an_event_replayed_leaves_alone_what_is_pending_and_who_is_gone(outbox):
    await outbox.keep_endpoint(kept("mine"))
    await outbox.accept([submission("a", "main", "other", "mine"), submission("b", "main")])
    (mine,) = await outbox.claim("mine", 1, NOW)
    await outbox.record(mine, attempt(mine, "http_500"), DEAD)
    (main,) = await outbox.claim("main", 1, NOW)
    await outbox.record(main, attempt(main), DELIVERED)
    await outbox.drop_endpoint("mine")

    assert await outbox.revive(Ended(event_id="evt_a", endpoint="other"), NOW) == 0
    assert await outbox.revive(Ended(event_id="evt_none"), NOW) == 0
    assert await outbox.revive(Ended(event_id="evt_a"), NOW) == 1

    states = {each.endpoint: each.state for each in (await outbox.story("evt_a")).deliveries}
    assert states == {"main": State.PENDING, "other": State.PENDING, "mine": State.DEAD}


async def test_only_what_is_asked_for_is_counted_and_replayed(outbox):
    for n in range(4):
        await finish(outbox, f"dead{n}", DEAD, at_ms=NOW - 100 + n)
    await finish(outbox, "done", DELIVERED, at_ms=NOW - 50)
    await finish(outbox, "theirs", DEAD, "other")
    await outbox.accept([submission("open")])

    dead = Ended(endpoint="main", state=State.DEAD)
    for ended, count in (
        (dead, 4),
        (replace(dead, since_ms=NOW - 99), 3),
        (replace(dead, until_ms=NOW - 99), 1),
        (replace(dead, since_ms=NOW - 99, until_ms=NOW - 97), 2),
        (replace(dead, type="post.failed"), 0),
        (replace(dead, type="post.published"), 4),
        (replace(dead, state=State.CANCELLED), 0),
        (replace(dead, state=State.DELIVERED), 1),
        (replace(dead, state=State.DELIVERED, until_ms=NOW - 50), 0),
    ):
        assert await outbox.count(ended) == count, ended
    assert await outbox.revive(replace(dead, since_ms=NOW - 99, until_ms=NOW - 97), NOW) == 2
    assert set(names(await outbox.claim("main", 9, NOW))) == {"dead1", "dead2", "open"}
    assert (await outbox.backlog())["other"] == Backlog(pending=0, dead=1)


async def test_many_are_replayed_in_steps_each_once_and_at_the_pace_asked_for(outbox):
    """A receiver that was down for a day is not to be knocked over by what it missed."""
    await outbox.accept([submission(f"{n:04}") for n in range(1200)])
    while claimed := await outbox.claim("main", 100, NOW):
        async with asyncio.TaskGroup() as tasks:
            for each in claimed:
                tasks.create_task(outbox.record(each, attempt(each, "http_500"), DEAD))
    ended = Ended(endpoint="main", state=State.DEAD)
    assert await outbox.count(ended) == 1200

    assert await outbox.revive(ended, NOW, spacing_ms=20.0) == 1200

    assert await outbox.count(ended) == 0
    assert (await outbox.backlog())["main"] == Backlog(pending=1200, dead=0)
    due = [await outbox.claim("main", 2000, NOW + later) for later in (0, 19, 20, 9999, 23_979, 23_980)]
    assert [len(each) for each in due] == [1, 0, 1, 498, 699, 1]
    assert [name for each in due for name in names(each)] == [f"{n:04}" for n in range(1200)]


async def test_delivered_ones_are_found_among_many_others(outbox):
    for n in range(6):
        await outbox.accept([submission(f"{n}-{m}", "other") for m in range(199)])
        await finish(outbox, f"{n}", DELIVERED)
    ended = Ended(endpoint="main", state=State.DELIVERED)
    assert await outbox.count(ended) == 6
    assert await outbox.revive(ended, NOW) == 6
    assert names(await outbox.claim("main", 9, NOW)) == list("012345")


async def test_a_replay_for_an_endpoint_dropped_meanwhile_finds_nothing_and_harms_nothing(open_store):
    async with open_store() as outbox:
        await outbox.register(["main", "other"])
        await finish(outbox, "a", DEAD, "other")
        dead = Ended(endpoint="other", state=State.DEAD)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(outbox.drop_endpoint("other"))
            await asyncio.sleep(0)
            revived = tasks.create_task(outbox.revive(dead, NOW))
        assert revived.result() == await outbox.count(dead) == 0
        await outbox.accept([submission("b")])
        assert names(await outbox.claim("main", 9, NOW)) == ["b"]


# Looking


async def test_the_past_of_an_endpoint_tells_its_last_attempts_and_since_when_something_waits(open_store):
    async with open_store() as outbox:
        await outbox.register(["main", "other"])
        untouched = Past(
            oldest_pending_ms=None, last_success_at_ms=None, last_failure_at_ms=None, last_error=None
        )
        assert await outbox.pasts() == {"main": untouched, "other": untouched}
        await outbox.accept([submission("a", at_ms=NOW - 5), submission("b", at_ms=NOW - 3)])
        a, b = await outbox.claim("main", 2, NOW)
        await outbox.record(a, attempt(a, "timeout", NOW + 1), again(NOW + 99))
        await outbox.record(b, attempt(b, None, NOW + 2), DELIVERED)
        told = Past(
            oldest_pending_ms=NOW - 5,
            last_success_at_ms=NOW + 2,
            last_failure_at_ms=NOW + 1,
            last_error="timeout",
        )
        assert await outbox.pasts() == {"main": told, "other": untouched}
    async with open_store() as outbox:
        await outbox.register(["main"])
        assert (await outbox.pasts())["main"] == told


async def listed(outbox, **filters: object) -> list[str]:
    """Return the names of all events that a query finds, over all its pages; no page may be too long."""
    found: list[str] = []
    query = Query(**({"limit": 3} | filters))
    while True:
        page = await outbox.events(query)
        assert len(page.stories) <= query.limit
        found += [story.event.id.removeprefix("evt_") for story in page.stories]
        if page.next_before is None:
            return found
        query = replace(query, before=page.next_before)


async def test_events_are_found_by_endpoint_state_type_and_time_over_all_pages(outbox):
    await finish(outbox, "dead", DEAD, at_ms=NOW - 9)
    await finish(outbox, "done", DELIVERED, at_ms=NOW - 8)
    await finish(outbox, "theirs", DEAD, "other", at_ms=NOW - 7)
    bare = submission("failed", "main", "other", at_ms=NOW - 6)
    await outbox.accept([replace(bare, event=replace(bare.event, type="post.failed"))])
    await outbox.accept([replace(submission("nobody", at_ms=NOW - 5), endpoints=())])
    await outbox.accept([submission(f"open{n}", at_ms=NOW - 4 + n) for n in range(4)])
    open_ = ["open3", "open2", "open1", "open0"]

    for filters, expected in (
        ({}, [*open_, "nobody", "failed", "theirs", "done", "dead"]),
        ({"endpoint": "main"}, [*open_, "failed", "done", "dead"]),
        ({"endpoint": "other"}, ["failed", "theirs"]),
        ({"endpoint": "stranger"}, []),
        ({"state": State.DEAD}, ["theirs", "dead"]),
        ({"state": State.DEAD, "endpoint": "main"}, ["dead"]),
        ({"state": State.DELIVERED}, ["done"]),
        ({"state": State.DELIVERED, "endpoint": "other"}, []),
        ({"state": State.PENDING}, [*open_, "failed"]),
        ({"state": State.PENDING, "endpoint": "other"}, ["failed"]),
        ({"state": State.CANCELLED}, []),
        ({"type": "post.failed"}, ["failed"]),
        ({"type": "post.failed", "state": State.DEAD}, []),
        ({"since_ms": NOW - 8, "until_ms": NOW - 5}, ["failed", "theirs", "done"]),
        ({"since_ms": NOW - 2, "state": State.PENDING}, ["open3", "open2"]),
        ({"until_ms": NOW - 8}, ["dead"]),
        ({"until_ms": NOW - 9}, []),
        ({"since_ms": NOW}, []),
    ):
        assert await listed(outbox, **filters) == expected, filters


async def test_an_event_with_many_deliveries_is_listed_once(outbox):
    await outbox.accept([submission(f"{n}", "main", "other") for n in range(5)])
    assert await listed(outbox, state=State.PENDING, limit=4) == ["4", "3", "2", "1", "0"]


async def test_a_rare_event_is_found_page_by_page_without_a_long_look(outbox):
    """A filter that matches little must not hold the outbox for as long as there is history."""
    await outbox.accept([submission("rare", "other")])
    await outbox.accept([submission(f"{n}") for n in range(1000)])
    page = await outbox.events(Query(limit=5, endpoint="other"))
    assert (page.stories, page.next_before is not None) == ((), True)
    assert await listed(outbox, endpoint="other") == ["rare"]


async def test_what_is_accepted_while_ages_are_looked_at_is_young(outbox):
    """A lane reads the clock, then waits for its turn to commit: what was accepted in between is no older."""
    await outbox.accept([submission("a", at_ms=NOW + 5)])

    patience = await outbox.expire("main", NOW - 1000, 0, NOW)

    assert patience.expired == ()
    assert names(await outbox.claim("main", 10, NOW + 5)) == ["a"]


@pytest.mark.parametrize(
    ("health", "paused", "expected"),
    [
        (Health(), False, 1),
        (Health(not_before_ms=70), False, 70),
        (Health(standing=Standing.DOWN, probe_at_ms=50), False, 50),
        (Health(standing=Standing.DOWN, probe_at_ms=50, not_before_ms=70), False, 70),
        (Health(standing=Standing.UP, probe_at_ms=50), False, 1),
        (Health(standing=Standing.GONE, since_ms=5, not_before_ms=70), False, None),
        (Health(), True, None),
    ],
)
async def test_a_story_says_when_the_next_attempt_may_come_with_all_that_the_endpoint_waits_for(
    outbox, health, paused, expected
):
    """Whoever looks at three in the morning must not wait for a time that nothing happens at."""
    await outbox.accept([submission("a", at_ms=1)])
    await outbox.keep_endpoint(KeptEndpoint(id="main", settings=None, paused=paused))
    await outbox.keep_health("main", health)
    (delivery,) = (await outbox.story("evt_a")).deliveries
    assert delivery.due_ms == expected
    assert next_attempt_ms(health, 1) == expected or paused
