"""Lanes: what is due goes out, no more at once than there are slots, and a stop loses nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from relay.delivery import Lanes
from relay.model import Endpoint, Outcome, State
from relay.outbox import Backlog
from tests.clock import START_MS, MovedClock
from tests.lanes import OK, REFUSED, ScriptedSender, endpoint, make_lanes, until
from tests.test_outbox import submission as bare_submission


def submission(name: str, *endpoints: str, at_ms: int = START_MS):
    """A submission whose digest is true."""
    from dataclasses import replace

    from relay import formats

    bare = bare_submission(name, *endpoints, at_ms=at_ms)
    return replace(bare, digest=formats.digest(bare.event))


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def sender() -> ScriptedSender:
    return ScriptedSender()


@pytest.fixture
def run_lanes(outbox, clock, sender):
    @asynccontextmanager
    async def running(*endpoints: Endpoint, grace: float = 5.0) -> AsyncIterator[Lanes]:
        lanes = make_lanes(outbox, sender, clock)
        for each in endpoints:
            await lanes.keep(each, paused=False)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lanes.run())
            yield lanes
            lanes.stop(grace)

    return running


async def pending(outbox, id_: str = "main") -> Backlog:
    return (await outbox.backlog())[id_]


async def test_what_is_accepted_is_sent_once_and_recorded(outbox, sender, run_lanes):
    async with run_lanes(endpoint()) as lanes:
        await outbox.accept([submission("a"), submission("b")])
        lanes.wake(["main"])
        await until(lambda: outbox._pending[1] == 0)
    assert [message.id for message in sender.messages] == ["evt_a", "evt_b"]
    first = sender.messages[0]
    assert first.body == b'{"event":"post.published","timestamp":"2026-01-15T10:00:00.000Z","data":{"n":1}}'
    assert (first.attempt, first.timestamp, first.content_type) == (1, START_MS // 1000, "application/json")
    story = await outbox.story("evt_a")
    assert story.deliveries[0].state is State.DELIVERED


async def test_what_waited_from_before_the_start_is_sent_without_a_wake(outbox, sender, run_lanes):
    await outbox.accept([submission("a")])
    async with run_lanes(endpoint()):
        await until(lambda: len(sender.messages) == 1)


async def test_a_refused_delivery_goes_through_its_schedule_and_dies(outbox, sender, clock, run_lanes):
    """Three retries after 5 s, 5 min and 5 h, with the same id and body, a new number each."""
    sender.outcomes = [REFUSED] * 4
    await outbox.accept([submission("a")])
    async with run_lanes(endpoint()):
        await until(lambda: len(sender.messages) == 1)
        for number, seconds in enumerate((5, 300, 18_000), start=2):
            await until(lambda number=number: outbox._in_flight == set())
            clock.advance(seconds=seconds - 0.01)
            await asyncio.sleep(0.02)
            assert len(sender.messages) == number - 1, "not before its time"
            clock.advance(seconds=0.01)
            await until(lambda number=number: len(sender.messages) == number)
        await until(lambda: outbox._dead[1] == 1)
    assert [message.attempt for message in sender.messages] == [1, 2, 3, 4]
    assert len({(message.id, message.body) for message in sender.messages}) == 1
    assert await pending(outbox) == Backlog(pending=0, dead=1)
    (delivery,) = (await outbox.story("evt_a")).deliveries
    assert [attempt.reason for attempt in delivery.attempts] == ["http_503"] * 4


async def test_no_more_than_its_slots_are_sent_at_once(outbox, sender, run_lanes):
    sender.open.clear()
    await outbox.accept([submission(f"{n}") for n in range(20)])
    async with run_lanes(endpoint(concurrency=3)):
        await until(lambda: sender.sending == 3)
        await asyncio.sleep(0.02)
        assert sender.sending == 3
        sender.open.set()
        await until(lambda: outbox._pending[1] == 0)
    assert sender.most_at_once == 3
    assert len({message.id for message in sender.messages}) == len(sender.messages) == 20


async def test_all_lanes_together_attempt_no_more_than_there_are_descriptors_for(outbox, sender, clock):
    """Running out of descriptors would be a failed attempt of whoever comes last."""
    sender.open.clear()
    shared = asyncio.Semaphore(3)
    lanes = make_lanes(outbox, sender, clock, connections=shared)
    for id_ in ("main", "other"):
        await lanes.keep(endpoint(id_), paused=False)
    await outbox.accept([submission(f"{n}", "main", "other") for n in range(10)])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lanes.run())
        await until(lambda: sender.sending == 3)
        await asyncio.sleep(0.02)
        sender.open.set()
        await until(lambda: outbox._pending[1] == outbox._pending[2] == 0)
        lanes.stop(1.0)
    assert sender.most_at_once == 3
    assert {message.attempt for message in sender.messages} == {1}


@pytest.mark.parametrize("meanwhile", ["paused", "gone", "asked for time", "stopped"])
async def test_what_waited_for_a_connection_is_not_sent_if_it_may_not_any_more(
    outbox, sender, clock, meanwhile
):
    """With few descriptors a claimed delivery waits for seconds, and an endpoint may be paused meanwhile."""
    answers = {
        "gone": Outcome(milliseconds=3, status=410, reason="http_410"),
        "asked for time": Outcome(milliseconds=3, status=503, reason="http_503", retry_after="60"),
    }
    sender.outcomes = [answers.get(meanwhile, OK)]
    sender.open.clear()
    lanes = make_lanes(outbox, sender, clock, connections=asyncio.Semaphore(1))
    await lanes.keep(endpoint(), paused=False)
    await outbox.accept([submission("a", "main"), submission("b", "main"), submission("c", "main")])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lanes.run())
        await until(lambda: sender.sending == 1 and len(outbox._in_flight) == 3)
        if meanwhile == "paused":
            await lanes.keep(endpoint(), paused=True)
        if meanwhile == "stopped":
            lanes.stop(5.0)
        sender.open.set()
        await until(lambda: not outbox._in_flight)
        await asyncio.sleep(0.02)
        sent = [message.id for message in sender.messages]
        lanes.stop(0.0)
    assert sent == ["evt_a"]
    left = [story.deliveries[0] for story in [await outbox.story("evt_b"), await outbox.story("evt_c")]]
    assert [(each.state, each.attempts) for each in left] == [(State.PENDING, ())] * 2


async def test_one_endpoint_that_hangs_does_not_hold_another(outbox, run_lanes, sender):
    class HangsForMain(ScriptedSender):
        async def send(self, endpoint, message):
            if endpoint.id == "main":
                await asyncio.sleep(60)
            return await super().send(endpoint, message)

    hanging = HangsForMain()
    sender.send = hanging.send
    await outbox.accept([submission(f"{n}", "main", "other") for n in range(30)])
    async with run_lanes(endpoint("main"), endpoint("other"), grace=0.0):
        await until(lambda: outbox._pending[2] == 0)
        assert outbox._pending[1] == 30


async def test_a_paused_endpoint_keeps_what_waits_for_it_and_sends_it_after(outbox, sender, run_lanes):
    async with run_lanes(endpoint()) as lanes:
        await lanes.keep(endpoint(), paused=True)
        await outbox.accept([submission("a")])
        lanes.wake(["main"])
        await asyncio.sleep(0.02)
        assert sender.messages == []
        await lanes.keep(endpoint(), paused=False)
        await until(lambda: outbox._pending[1] == 0)
    assert len(sender.messages) == 1


async def test_a_lane_can_come_and_go_while_others_run(outbox, sender, run_lanes):
    async with run_lanes(endpoint("main")) as lanes:
        await outbox.accept([submission("a", "other")])
        await lanes.keep(endpoint("other"), paused=False)
        await until(lambda: len(sender.messages) == 1)
        sender.open.clear()
        await outbox.accept([submission("b", "other")])
        lanes.wake(["other"])
        await until(lambda: sender.sending == 1)
        await lanes.drop("other")
        assert sender.sending == 0
        lanes.wake(["other"])
    assert await pending(outbox, "other") == Backlog(pending=1, dead=0)


async def test_a_lane_that_goes_before_any_began_is_not_waited_for(outbox, sender, clock):
    """A SIGHUP during the start may take an endpoint away; whoever waited would wait for ever."""
    lanes = make_lanes(outbox, sender, clock)
    await lanes.keep(endpoint(), paused=False)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        await lanes.drop("main")
        tasks.create_task(lanes.run())
        await asyncio.sleep(0.02)
        lanes.stop(0.0)


async def test_a_stop_waits_for_what_is_in_flight(outbox, sender, run_lanes):
    sender.open.clear()
    await outbox.accept([submission(f"{n}") for n in range(10)])
    async with run_lanes(endpoint(concurrency=2)) as lanes:
        await until(lambda: sender.sending == 2)
        lanes.stop(5.0)
        sender.open.set()
        await lanes.stopped.wait()
    assert len(sender.messages) == 2, "no attempt starts any more"
    assert await pending(outbox) == Backlog(pending=8, dead=0)


async def test_what_a_stop_cuts_off_goes_back_unspent(outbox, sender, clock, run_lanes):
    sender.open.clear()
    await outbox.accept([submission("a")])
    async with run_lanes(endpoint(), grace=0.05):
        await until(lambda: sender.sending == 1)
    (again,) = await outbox.claim("main", 9, clock.now_ms())
    assert (again.event.id, again.attempts, again.steps) == ("evt_a", 0, 0)


async def test_a_second_stop_ends_the_grace(outbox, sender, run_lanes):
    sender.open.clear()
    await outbox.accept([submission("a")])
    async with run_lanes(endpoint(), grace=0.0) as lanes:
        await until(lambda: sender.sending == 1)
        lanes.stop(3600.0)


async def test_a_body_that_changed_on_the_disk_is_not_sent(outbox, sender, run_lanes, caplog):
    """A flipped bit passes SQLite's own check and would be signed as ours."""
    await outbox.accept([bare_submission("a", at_ms=START_MS)])  # its digest is of something else
    async with run_lanes(endpoint()):
        await until(lambda: outbox._dead[1] == 1)
    assert sender.messages == []
    (delivery,) = (await outbox.story("evt_a")).deliveries
    assert [attempt.reason for attempt in delivery.attempts] == ["body_digest"]
    assert "delivery_dead" in caplog.text


async def test_a_fault_of_our_own_ends_the_lanes_loudly(outbox, clock, run_lanes):
    class Faulty(ScriptedSender):
        async def send(self, endpoint, message):
            raise ZeroDivisionError

    await outbox.accept([submission("a")])
    lanes = make_lanes(outbox, Faulty(), clock)
    await lanes.keep(endpoint(), paused=False)
    with pytest.raises(ExceptionGroup):
        await lanes.run()
