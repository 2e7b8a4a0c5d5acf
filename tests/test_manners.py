"""What a receiver and an operator feel over days of virtual time, under clocks that may jump."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from relay.config import STANDARD_SCHEDULE
from relay.model import Outcome, State
from relay.outbox import Ended
from tests.clock import START_MS
from tests.lanes import OK, endpoint
from tests.world import Rule, World, refusal

MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0
YEAR = 365 * DAY
FAILED = refusal()
UNSPENT = Outcome(milliseconds=0, reason="proxy_error", unspent=True)


@pytest.fixture
def world_of(tmp_path: Path) -> Callable[..., World]:
    return lambda *endpoints, **more: World(tmp_path / "relay.db", *(endpoints or (endpoint(),)), **more)


@pytest.fixture
def world(world_of) -> World:
    return world_of()


def always(outcome: Outcome, seconds: float = 0.0) -> Rule:
    return lambda message, at: (outcome, seconds)


def until(seconds: float, outcome: Outcome = FAILED) -> Rule:
    """Fail until so long after the beginning."""
    return lambda message, at: outcome if at < seconds else OK


def poison(world: World, *names: str) -> Rule:
    """Fail for these events alone."""
    return lambda message, at: FAILED if world.name(message) in names else OK


async def bring_down(world: World, *names: str) -> None:
    """Let five attempts fail of several events; the endpoint is down at the end."""
    await world.accept(*(names or "abcde"))
    await world.settle()
    assert await world.standing() == "down"


async def replay(world: World, state: State = State.DEAD, *, spacing_ms: float = 0.0) -> None:
    """Put back what is over, as a person would."""
    await world.outbox.revive(Ended(endpoint="main", state=state), world.clock.now_ms(), spacing_ms)
    world.lanes.wake(["main"])


# Schedules


async def test_three_days_of_the_standard_schedule_end_in_dead(world_of):
    world = world_of(endpoint(retry_schedule=STANDARD_SCHEDULE))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=4 * DAY)
        story = await world.story("a")
    assert [later - earlier for earlier, later in pairwise(world.times())] == list(STANDARD_SCHEDULE)
    assert story.state == "dead"
    assert [each.number for each in story.attempts] == list(range(1, 11))


async def test_a_delay_outlives_a_restart(world):
    world.rules["main"] = until(1.0)
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=2)
    for _ in range(3):
        async with world.running():
            await world.pass_(seconds=0.9)
    async with world.running():
        await world.pass_(seconds=60)
    assert world.times() == [0.0, 5.0]


async def test_what_fell_due_while_the_relay_was_off_goes_out_at_its_start(world):
    world.rules["main"] = until(1.0)
    async with world.running():
        await world.accept("a")
        await world.settle()
    world.clock.advance(3_600_000)
    async with world.running():
        await world.settle()
    assert world.times() == [0.0, 3600.0]


# Retry-After


@pytest.mark.parametrize("status", [302, 404, 429, 500, 503])
async def test_retry_after_holds_back_the_whole_endpoint_and_no_other(world_of, status):
    world = world_of(endpoint(), endpoint("other"))
    world.rules["main"] = until(1.0, refusal(status, "100"))
    async with world.running():
        await world.accept("a")
        await world.settle()
        await world.accept("b", "c")
        await world.pass_(seconds=99.9)
        assert world.times() == [0.0]
        assert len(world.times("other")) == 3
        await world.pass_(seconds=0.2)
        assert world.times() == [0.0, 100.0, 100.0, 100.0]


async def test_the_log_says_when_the_next_attempt_really_comes(world_of, caplog):
    """Not when it would come if the endpoint were well: the line is all that an operator has at night."""
    world = world_of(endpoint(), endpoint("down", down_after=2), endpoint("gone"))
    world.rules["main"] = until(1.0, refusal(503, "100"))
    world.rules["down"], world.rules["gone"] = always(refusal()), always(refusal(410))
    caplog.set_level(logging.DEBUG, "relay.delivery")  # tells every attempt
    async with world.running():
        await world.accept("a", "b")
        await world.settle()
    failed = [vars(each) for each in caplog.records if each.msg == "attempt_failed"]
    last = {each["endpoint"]: each.get("retry_in_seconds") for each in failed}
    assert last == {"main": 100.0, "down": 30.0, "gone": None}


async def test_retry_after_never_shortens_the_schedule(world):
    world.rules["main"] = until(1.0, refusal(503, "1"))
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=60)
    assert world.times() == [0.0, 5.0]


async def test_retry_after_is_kept_over_restarts_and_is_a_day_at_most(world):
    world.rules["main"] = until(1.0, refusal(500, str(10**9)))
    async with world.running():
        await world.accept("a")
        await world.settle()
    async with world.running():
        await world.accept("b")
        await world.pass_(seconds=DAY - 1)
        assert world.times() == [0.0]
        await world.pass_(seconds=2)
    assert world.times() == [0.0, DAY, DAY]


async def test_resume_lifts_retry_after(world):
    world.rules["main"] = until(1.0, refusal(500, "3600"))
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=60)
        await world.endpoints.pause("main", paused=False)
        await world.pass_(seconds=60)
    assert world.times() == [0.0, 60.0]


async def test_a_busy_receiver_costs_no_step_over_days(world_of):
    """429 for two days, then well: delivered, although the schedule has but one step."""
    world = world_of(endpoint(retry_schedule=(HOUR,), down_after=0))
    world.rules["main"] = until(2 * DAY, refusal(429))
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=3 * DAY)
        story = await world.story("a")
    assert story.state == "delivered"
    assert world.times() == [number * HOUR for number in range(49)]


# Down


async def test_a_down_endpoint_is_probed_ever_more_rarely_with_one_at_a_time(world):
    world.rules["main"] = always(FAILED, 7.0)
    async with world.running():
        await world.accept(*"abcdefgh")
        await world.pass_(seconds=DAY)
        assert await world.standing() == "down"
    # Four at once, then all that is left in flight; from the fifth failure on one probe after the other.
    probes = [each for each in world.sent if each.at > 14]
    assert {each.at_once for each in probes} == {1}
    waits = [later.at - earlier.at - 7 for earlier, later in pairwise(probes)]
    assert waits[:6] == [60, 120, 240, 480, 600, 600]
    assert set(waits[5:]) == {600}
    assert len(waits) > 130


async def test_probes_are_listed_and_numbered_and_use_no_step(world_of):
    world = world_of(endpoint(retry_schedule=(5.0,)))
    world.rules["main"] = until(DAY)
    async with world.running():
        await bring_down(world)
        await world.pass_(seconds=DAY - 1)
        assert await world.states() == {"pending": 5}
        stories = [await world.story(name) for name in "abcde"]
        due = await world.outbox._run(lambda db: db.execute("SELECT DISTINCT due FROM deliveries").fetchall())
        assert due == [(START_MS + 5_000,)], "a probe leaves the due time"
        now_ms = world.clock.now_ms()
        # After the probe that succeeds everything is due, and each has its step still.
        await world.pass_(seconds=HOUR)
        assert await world.states() == {"delivered": 5}
    for story in stories:
        assert len(story.attempts) > 25, "each had its turn"
        assert [each.number for each in story.attempts] == list(range(1, len(story.attempts) + 1))
        assert now_ms <= story.due_ms <= now_ms + 600_000, "it is not sent before the next probe"


async def test_what_fails_its_last_scheduled_attempt_is_dead_even_if_that_brings_the_endpoint_down(world_of):
    world = world_of(endpoint(retry_schedule=(), down_after=2, concurrency=1))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await world.accept("a", "b", "c")
        await world.settle()
        assert await world.standing() == "down"
        assert await world.states() == {"dead": 2, "pending": 1}


async def test_one_poisonous_event_at_the_front_does_not_keep_it_down(world):
    """Probes take what is pending in turn."""
    world.rules["main"] = until(10.0)
    async with world.running():
        await bring_down(world, *"abcdef")
        await world.pass_(seconds=20)
        world.rules["main"] = poison(world, "a")
        await world.pass_(seconds=10 * MINUTE)
        assert await world.standing() == "up"
        assert (await world.states())["delivered"] == 5
        assert (await world.story("a")).state == "pending"


async def test_probes_take_turns_among_many_over_a_restart_of_the_turn(world_of):
    world = world_of(endpoint(probe_max_seconds=30.0))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world, *(f"{number}" for number in range(100)))
        begun = len(world.sent)
        await world.pass_(seconds=100 * 30)
        assert len({each.id for each in world.sent[begun:]}) == 100


async def test_a_recovered_endpoint_gets_one_two_four_eight_at_once(world_of):
    world = world_of(endpoint(concurrency=32))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world, *(f"{number}" for number in range(300)))
        world.rules["main"] = always(OK, 1.0)
        await world.pass_(seconds=12 * MINUTE)
        assert await world.standing() == "up"
    (probe, *rest) = [each.at for each in world.sent if each.outcome is OK]
    rounds = Counter(at - probe for at in rest)
    assert list(rounds.values())[:6] == [1, 2, 4, 8, 16, 32]
    assert sum(rounds.values()) == 299


async def test_an_endpoint_that_never_was_up_looks_no_different(world_of):
    """Two endpoints with the same events, one of which once got something: the same times from then on."""
    world = world_of(endpoint("first"), endpoint("never"))
    world.rules["first"] = until(1e9)
    async with world.running():
        world.rules["first"] = always(OK)
        await world.accept("early", to=("first",))
        await world.pass_(seconds=10)
        world.rules["first"] = world.rules["never"] = until(2 * HOUR)
        await world.accept(*"abcdef")
        await world.pass_(seconds=4 * HOUR)
    assert world.times("first", since=5.0) == world.times("never", since=5.0)
    assert [each.number for each in world.sent if each.endpoint == "first" and each.at > 5] == [
        each.number for each in world.sent if each.endpoint == "never"
    ]


async def test_how_an_endpoint_stands_survives_restarts(world):
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world)
        await world.pass_(seconds=100)  # the probes at 30 and 90 s have failed, the next is at 210 s
    count = len(world.sent)
    for _ in range(3):
        async with world.running():
            assert await world.standing() == "down"
            await world.pass_(seconds=30)
    async with world.running():
        await world.pass_(seconds=30)
    assert world.times()[count:] == [210.0]


async def test_failures_before_a_restart_count(world):
    world.rules["main"] = always(FAILED)
    async with world.running():
        await world.accept(*"abcd")
        await world.settle()
    async with world.running():
        assert await world.standing() == "up"
        await world.accept("e")
        await world.settle()
        assert await world.standing() == "down"


async def test_nothing_pending_leaves_it_down_until_something_comes(world_of):
    """There is nothing to probe with, and then the first that comes is the probe."""
    world = world_of(endpoint(retry_schedule=()))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world)
        await world.pass_(seconds=DAY)
        assert len(world.sent) == 5
        world.rules["main"] = always(OK)
        await world.accept("f", "g")
        await world.settle()
        assert await world.standing() == "up"
        assert (await world.states())["delivered"] == 2


async def test_replaying_what_was_given_up_brings_nothing_down(world_of):
    world = world_of(endpoint(retry_schedule=(1.0,), down_after=0))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await world.accept(*(f"{number}" for number in range(20)))
        await world.pass_(seconds=10)
    world.change("main", down_after=5)
    async with world.running():
        await world.endpoints.pause("main", paused=False)
        await replay(world)
        await world.pass_(seconds=60)
        assert await world.standing() == "up"
        assert await world.states() == {"dead": 20}


# Gone, paused, resumed


async def test_410_sends_nothing_more_until_resume_and_then_everything(world):
    world.rules["main"] = until(1.0, refusal(410))
    async with world.running():
        await world.accept("a")
        await world.settle()
        await world.accept("b")
        await world.pass_(seconds=20 * DAY)
        assert await world.standing() == "gone"
    async with world.running():
        await world.accept("c")
        await world.pass_(seconds=10 * DAY)
        assert await world.states() == {"pending": 3}, "age does not count while gone"
        assert world.times() == [0.0]
        await world.endpoints.pause("main", paused=False)
        await world.settle()
        assert await world.states() == {"delivered": 3}


async def test_pause_and_resume_keep_everything(world):
    world.rules["main"] = until(1.0)
    async with world.running():
        await world.accept(*"ab")
        await world.settle()
        await world.endpoints.pause("main", paused=True)
        await world.accept(*"cd")
        await world.pass_(seconds=20 * DAY)
    async with world.running():
        await world.pass_(seconds=20 * DAY)
        assert await world.states() == {"pending": 4}, "age does not count while paused"
        sent = len(world.sent)
        await world.endpoints.pause("main", paused=False)
        await world.settle()
        assert await world.states() == {"delivered": 4}
    assert sent == 2


async def test_resume_lets_a_down_endpoint_go_at_once(world):
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world)
        await world.pass_(seconds=40)
        world.rules["main"] = always(OK)
        await world.endpoints.pause("main", paused=False)
        await world.settle()
        assert await world.states() == {"delivered": 5}


async def test_what_an_attempt_says_while_resume_is_written_is_what_is_kept(world):
    """Both may be in one commit, and the API and the next start believe what is on disk."""
    world.rules["main"] = always(refusal(410), 1.0)
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=0.9)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.lanes.resume("main"))
            world.clock.advance(100)  # the answer is there
        await world.settle()
        assert world.lanes._lanes["main"].health.standing == await world.standing() == "gone"


# Patience


async def test_what_waited_for_max_age_is_dead_to_the_second(world_of):
    world = world_of(endpoint(max_age_seconds=DAY))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world)
        await world.pass_(seconds=HOUR)
        await world.accept("late")
        await world.pass_(seconds=DAY - HOUR - 1)
        assert await world.states() == {"pending": 6}
        await world.pass_(seconds=1)
        assert await world.states() == {"pending": 1, "dead": 5}
        assert (await world.story("a")).expired_at_ms == START_MS + DAY * 1000
        await world.pass_(seconds=HOUR - 1)
        assert (await world.story("late")).state == "pending"
        await world.pass_(seconds=1)
        assert (await world.story("late")).state == "dead"


async def test_max_age_counts_from_the_latest_replay(world_of):
    world = world_of(endpoint(max_age_seconds=DAY, retry_schedule=()))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world)
        await world.accept(*"xyz")
        await world.pass_(seconds=HOUR)
        await replay(world)
        await world.pass_(seconds=DAY - HOUR - 1)
        assert await world.states() == {"pending": 8}
        await world.pass_(seconds=1)
        assert await world.states() == {"pending": 5, "dead": 3}
        assert (await world.story("x")).state == "dead"
        await world.pass_(seconds=HOUR - 1)
        assert (await world.states())["pending"] == 5
        await world.pass_(seconds=1)
        assert await world.states() == {"dead": 8}


async def test_max_age_counts_from_resume(world_of):
    world = world_of(endpoint(max_age_seconds=DAY))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world)
        await world.pass_(seconds=DAY - 1)
        await world.endpoints.pause("main", paused=False)
        await world.pass_(seconds=DAY - 1)
        assert (await world.states())["pending"] > 0
    async with world.running():
        await world.pass_(seconds=2)
        assert await world.states() == {"dead": 5}


# Pace


async def test_rate_and_concurrency_are_never_exceeded_while_a_backlog_flows(world_of):
    world = world_of(endpoint(rate=10.0, concurrency=3))
    world.rules["main"] = always(OK, 0.25)
    async with world.running():
        await world.accept(*(f"{number}" for number in range(200)))
        await world.pass_(seconds=60)
    times = world.times()
    assert len(times) == 200
    assert times[-1] == pytest.approx(199 / 10, abs=2)
    assert max(each.at_once for each in world.sent) == 3
    assert all(later - earlier >= 1 - 1e-6 for earlier, later in zip(times, times[20:], strict=False))


async def test_probes_and_retries_count_towards_the_rate(world_of):
    world = world_of(endpoint(rate=1 / 60, probe_interval_seconds=1.0, probe_max_seconds=1.0))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await world.accept(*"abcdefgh")
        await world.pass_(seconds=HOUR)
    assert all(later - earlier >= 60 - 0.002 for earlier, later in pairwise(world.times()))
    assert len(world.sent) in {60, 61}


async def test_an_attempt_that_could_not_be_made_burns_nothing(world):
    """The relay's own trouble, such as a proxy that is down, is nobody's failure."""
    world.rules["main"] = always(UNSPENT)
    async with world.running():
        await world.accept(*"abcdef")
        await world.pass_(seconds=HOUR)
        assert await world.standing() == "up"
        assert await world.states() == {"pending": 6}
        assert (await world.story("a")).attempts == ()
        assert len(world.sent) <= 4 * (12 * 60 + 1), "four slots, every five seconds"
        world.rules["main"] = always(OK)
        await world.pass_(seconds=6)
        assert await world.states() == {"delivered": 6}
    assert {each.number for each in world.sent} == {1}


async def test_an_unspent_probe_is_made_again_a_moment_later(world):
    world.rules["main"] = always(FAILED)
    async with world.running():
        await bring_down(world)
        world.rules["main"] = always(UNSPENT)
        await world.pass_(seconds=60)
        world.rules["main"] = always(OK)
        await world.pass_(seconds=6)
        assert await world.states() == {"delivered": 5}


# Clocks that jump

JUMPS = [-10 * YEAR, -30 * DAY, 30 * DAY, 10 * YEAR]


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("stirred", [False, True], ids=["left alone", "woken at once"])
async def test_a_clock_that_jumps_kills_nothing_and_lets_nothing_wait_for_ever(world, jump, stirred):
    """Whether the lane or the watch looks at the clock first."""
    world.rules["main"] = until(20 * MINUTE)
    async with world.running(watching=True):
        await world.accept("a", "b")  # failed twice each, due again in 5 h
        await world.pass_(seconds=400)
        world.clock.set(seconds=jump)
        if stirred:
            world.lanes.wake(["main"])
            await world.settle()
        await world.pass_(seconds=310)
        assert await world.states() == {"pending": 2}
        await world.pass_(seconds=5.6 * HOUR)
        assert await world.states() == {"delivered": 2}


@pytest.mark.parametrize("jump", [HOUR, 30 * DAY, 10 * YEAR])
@pytest.mark.parametrize("stirred", [False, True], ids=["left alone", "woken at once"])
async def test_a_clock_set_forward_does_not_use_up_the_last_step_before_its_time(world, jump, stirred):
    """The receiver is away for an hour, which a schedule of five hours is there for."""
    world.rules["main"] = until(HOUR)
    async with world.running(watching=True):
        await world.accept("a")  # at 305 s the third attempt fails, the last is due 5 h later
        await world.pass_(seconds=400)
        world.clock.set(seconds=jump)
        if stirred:
            world.lanes.wake(["main"])
            await world.settle()
        await world.pass_(seconds=6 * HOUR)
        assert await world.states() == {"delivered": 1}
    assert world.times()[-1] == pytest.approx(305 + 5 * HOUR, abs=HOUR)


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("back", [False, True], ids=["for good", "corrected"])
async def test_nothing_is_dead_or_stuck_by_a_jump_over_restarts(world, jump, back):
    """What was learnt of the jump has to be kept, or the next start would believe the ages."""
    world.rules["main"] = until(2 * HOUR)
    async with world.running(watching=True):
        await world.accept(*"abcdef")
        await world.pass_(seconds=400)
        world.clock.set(seconds=jump)
        await world.pass_(seconds=310)
        await world.accept("x")
        await world.pass_(seconds=20 * MINUTE)
    async with world.running(watching=True):
        await world.pass_(seconds=310)
        if back:
            world.clock.set(seconds=-jump)
            await world.pass_(seconds=20 * MINUTE)
    async with world.running(watching=True):
        assert await world.states() == {"pending": 7}
        await world.pass_(seconds=6 * HOUR)
        assert await world.states() == {"delivered": 7}


async def test_what_nobody_attempts_after_a_jump_is_not_dead_at_the_next_start(world_of):
    """Nothing but the jump itself changes how the endpoint stands, so the jump has to be written."""
    world = world_of(endpoint(retry_schedule=(60 * DAY,), max_age_seconds=DAY), endpoint("other"))
    world.rules["main"] = until(HOUR)
    async with world.running(watching=True):
        await world.accept("a", to=("main",))
        await world.pass_(seconds=400)
        world.clock.set(seconds=30 * DAY)
        await world.pass_(seconds=310)
        await world.accept("x", to=("other",))
        await world.settle()
    async with world.running(watching=True):
        await world.settle()
        assert await world.states() == {"pending": 1}
        await world.pass_(seconds=DAY)
        assert await world.states() == {"dead": 1}, "its age counts from then on"


@pytest.mark.parametrize("off", ["the relay was off", "the clock was set meanwhile"])
async def test_what_waited_while_the_relay_was_off_for_a_month_is_not_dead_but_sent(world, off):
    world.rules["main"] = until(HOUR)
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=400)
    if off == "the relay was off":
        world.clock.advance(round(30 * DAY * 1000))
    else:
        world.clock.set(seconds=30 * DAY)
        world.rules["main"] = always(OK)
    async with world.running():
        await world.settle()
        assert await world.states() == {"delivered": 1}


async def test_a_machine_that_starts_in_1970_neither_kills_nor_floods(world_of):
    """It has no battery for its clock; a minute later it is told the time."""
    world = world_of(endpoint(concurrency=2))
    world.rules["main"] = always(FAILED)
    async with world.running(watching=True):
        await world.accept(*(f"{number}" for number in range(50)))
        await world.pass_(seconds=60)
    world.rules["main"] = always(OK, 1.0)
    since = world.clock.monotonic() + 1
    world.clock.set(seconds=-world.clock.now_ms() / 1000)
    async with world.running(watching=True):
        await world.accept("early")
        await world.pass_(seconds=310)
        world.clock.set(seconds=START_MS / 1000 + 3600)
        await world.pass_(seconds=310)
    async with world.running(watching=True):
        await world.pass_(seconds=5.6 * HOUR)
        assert await world.states() == {"delivered": 51}
    assert max(each.at_once for each in world.sent if each.at >= since) <= 2


@pytest.mark.parametrize("jump", JUMPS)
async def test_a_jump_right_after_an_unspent_attempt_leaves_nothing_stuck(world, jump):
    world.rules["main"] = always(UNSPENT)
    async with world.running(watching=True):
        await world.accept("a")
        await world.settle()
        world.rules["main"] = always(OK)
        world.clock.set(seconds=jump)
        await world.pass_(seconds=5.6 * HOUR)
        assert await world.states() == {"delivered": 1}


@pytest.mark.parametrize("ended", ["dead", "delivered"])
async def test_what_was_replayed_and_failed_under_a_wrong_clock_is_not_stuck(world_of, ended):
    world = world_of(endpoint(retry_schedule=() if ended == "dead" else (5.0,)))
    world.rules["main"] = always(refusal() if ended == "dead" else OK)
    async with world.running():
        await world.accept("a")
        await world.settle()
    world.change("main", retry_schedule=(5.0, 300.0, 18_000.0))
    world.rules["main"] = always(FAILED)
    async with world.running(watching=True):
        await world.endpoints.pause("main", paused=True)
        await replay(world, State(ended))
        world.clock.set(seconds=10 * YEAR)
        await world.pass_(seconds=310)
        await world.endpoints.pause("main", paused=False)
        await world.pass_(seconds=1)
        world.clock.set(seconds=-10 * YEAR)
        world.rules["main"] = always(OK)
        await world.pass_(seconds=5.6 * HOUR)
        assert await world.states() == {"delivered": 1}


async def test_a_clock_set_back_sends_no_retry_of_a_replayed_delivery_early(world):
    """Brought forward as too late, it must not be brought forward once more as a replay of the future."""
    async with world.running(watching=True):
        await world.accept("a")
        await world.settle()
        world.rules["main"] = always(FAILED)
        await replay(world, State.DELIVERED)
        await world.pass_(seconds=HOUR)
        count = len(world.sent)
        world.clock.set(seconds=-30 * DAY)
        await world.pass_(seconds=3 * HOUR)
        assert len(world.sent) == count, "the third retry is five hours after the second"
        await world.pass_(seconds=3 * HOUR)
        assert len(world.sent) == count + 1


async def test_a_replay_at_a_rate_keeps_its_distances_when_the_clock_jumps(world):
    async with world.running(watching=True):
        await world.accept(*"abcdef")
        await world.settle()
        count = len(world.sent)
        await replay(world, State.DELIVERED, spacing_ms=60_000)
        await world.pass_(seconds=1)
        world.clock.set(seconds=-30 * DAY)
        await world.pass_(seconds=10 * MINUTE)
    again = world.times()[count:]
    assert len(again) == 6
    assert all(later - earlier > 55 for earlier, later in pairwise(again[1:]))


@pytest.mark.parametrize("jump", [10 * YEAR])
async def test_events_of_one_key_accepted_under_a_wrong_clock_are_not_stuck(world_of, jump):
    world = world_of(endpoint(order="key"))
    world.rules["main"] = until(400.0)
    async with world.running(watching=True):
        world.clock.set(seconds=jump)
        await world.pass_(seconds=310)
        await world.accept(*"abc", key="k")
        await world.pass_(seconds=1)
        world.clock.set(seconds=-jump)
        await world.pass_(seconds=11 * HOUR)
        assert await world.states() == {"delivered": 3}


# The relay's own events


OWN = ("relay.endpoint.down", "relay.endpoint.recovered", "relay.endpoint.gone", "relay.delivery.dead")


async def test_a_subscriber_by_name_is_told_and_nobody_else(world_of):
    world = world_of(
        endpoint("main", events=("*", *OWN), retry_schedule=(5.0,), max_age_seconds=HOUR),
        endpoint("ops", events=OWN),
        endpoint("all", events=("*", "relay.endpoint.down")),
        endpoint("most", events=("*",)),
    )
    world.rules["main"] = until(60.0)
    async with world.running():
        await world.accept(*"abcde", to=("main",))
        await world.pass_(seconds=HOUR / 2)
        world.rules["main"] = always(FAILED)
        await world.accept("f", to=("main",))
        await world.pass_(seconds=60)
        world.rules["main"] = always(refusal(410))
        await world.accept("g", to=("main",))
        await world.pass_(seconds=60)
    assert world.types("ops") == [
        "relay.endpoint.down", "relay.endpoint.recovered", "relay.delivery.dead", "relay.endpoint.gone",
    ]  # fmt: skip
    assert world.types("all") == ["relay.endpoint.down"]
    assert world.types("most") == []
    assert set(world.types("main")) == {"post.published"}
    down, recovered, dead, gone = world.data("ops")
    assert down == {"endpoint": "main", "reason": "http_500", "failures": 5}
    assert recovered["endpoint"] == gone["endpoint"] == "main"
    assert (dead["endpoint"], dead["event"], dead["attempts"], dead["reason"]) == (
        "main", "post.published", 2, "http_500",
    )  # fmt: skip


async def test_what_waited_too_long_is_told_too(world_of):
    world = world_of(endpoint("main", max_age_seconds=DAY), endpoint("ops", events=OWN))
    world.rules["main"] = always(FAILED)
    async with world.running():
        await world.accept(*"abcde", to=("main",))
        await world.pass_(seconds=DAY)
    dead = [data for data in world.data("ops") if "event" in data]
    assert [data["reason"] for data in dead] == ["max_age"] * 5


async def test_a_dead_delivery_of_the_relays_own_is_told_to_nobody(world_of):
    """Else two subscribers that fail would tell each other for ever."""
    world = world_of(
        endpoint("first", events=OWN, retry_schedule=(), down_after=0),
        endpoint("second", events=OWN, retry_schedule=(), down_after=0),
        endpoint("main", retry_schedule=()),
    )
    for each in ("first", "second", "main"):
        world.rules[each] = always(FAILED)
    async with world.running():
        await world.accept("a", to=("main",))
        await world.pass_(seconds=DAY)
    assert Counter(each.endpoint for each in world.sent) == {"main": 1, "first": 1, "second": 1}


async def test_news_is_on_disk_with_what_it_tells_of(world_of):
    """No crash can come between the two: they are one transaction."""
    world = world_of(endpoint("main"), endpoint("ops", events=OWN))
    world.rules["main"] = always(FAILED)
    world.rules["ops"] = always(UNSPENT)
    async with world.running():
        commits = []
        run = world.outbox._committer.run

        async def noted(function, *args, **kwargs):
            done = await run(function, *args, **kwargs)
            if function.__name__ == "write":
                batch = args[0]
                healths = [each.health for each in batch.records if each.health is not None]
                types = [each.event.type for group in batch.accepts for each in group]
                commits.append((healths, types))
            return done

        world.outbox._committer.run = noted
        await world.accept(*"abcde", to=("main",))
        await world.settle()
    (with_news,) = [commit for commit in commits if "relay.endpoint.down" in commit[1]]
    assert any(health.standing == "down" for health in with_news[0])


async def test_two_endpoints_in_trouble_at_once_are_no_trouble_to_a_third(world_of):
    world = world_of(endpoint("dead"), endpoint("hangs", timeout_seconds=15.0), endpoint("well"))
    world.rules["dead"] = always(FAILED)
    world.rules["hangs"] = always(Outcome(milliseconds=15_000, reason="timeout"), 15.0)
    world.rules["well"] = always(OK, 0.01)
    async with world.running():
        for _ in range(20):
            await world.accept("a", "b", "c")
            await world.pass_(seconds=1)
    times = world.times("well")
    assert len(times) == 60
    assert all(at == int(at) for at in times), "each at the moment it was accepted"


async def test_a_lane_that_waits_for_a_day_does_nothing_meanwhile(world):
    """No polling: an idle relay costs nothing."""
    world.rules["main"] = until(1.0)
    async with world.running():
        await world.accept("a")
        await world.pass_(seconds=400)
        turns = 0
        set_right = world.lanes._lanes["main"]._set_clock_right

        async def counted() -> None:
            nonlocal turns
            turns += 1
            await set_right()

        world.lanes._lanes["main"]._set_clock_right = counted
        await world.pass_(seconds=5 * HOUR)
        assert turns <= 4
