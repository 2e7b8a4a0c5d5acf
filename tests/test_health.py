"""How an endpoint stands: what brings it down, up and away, when it is probed, and what leaves it alone."""

from dataclasses import replace

import pytest

from relay import health as rules
from relay.model import Delivery, Endpoint, Health, Outcome, Standing
from tests.lanes import endpoint
from tests.test_retry import met, owed

NOW = 1_768_471_200_000
MAIN = endpoint()
FAILED = met(500)
UP = Health()
DAY_MS = 86_400_000


def delivery(name: str, **changes: object) -> Delivery:
    plain = owed()
    return replace(plain, event=replace(plain.event, id=name), **changes)  # type: ignore[arg-type]


def after(health: Health, outcome: Outcome, name: str = "a", *, at=MAIN, probe=False, now_ms=NOW, **changes):
    return rules.after(
        health, outcome, endpoint=at, delivery=delivery(name, **changes), probe=probe, now_ms=now_ms
    )


def failing(names: str, *, at: Endpoint = MAIN, health: Health = UP) -> Health:
    for name in names:
        health = after(health, FAILED, name, at=at)
    return health


DOWN = failing("aaaab")


def test_five_failures_in_a_row_bring_an_endpoint_down():
    assert [failing("abcde"[:count]).standing for count in range(6)] == [Standing.UP] * 5 + [Standing.DOWN]
    down = failing("abcde")
    assert (down.failures, down.since_ms, down.probe_at_ms) == (5, NOW, NOW + 30_000)


@pytest.mark.parametrize("names", ["aaaab", "abbbb", "ababa", "aaaaaaaaab"])
def test_they_may_be_of_two_deliveries_in_any_order(names):
    assert failing(names[:-1]).standing is Standing.UP
    assert failing(names).standing is Standing.DOWN


def test_one_poisonous_event_alone_never_brings_an_endpoint_down():
    """A body that makes the receiver fail says nothing of the other events."""
    assert failing("a" * 1000).standing is Standing.UP
    assert failing("a" * 1000 + "b").standing is Standing.DOWN


@pytest.mark.parametrize("down_after", [1, 2, 7])
def test_how_many_it_takes_is_the_endpoints_setting(down_after):
    at = endpoint(down_after=down_after)
    names = "ab" * 10
    needed = max(2, down_after)  # of one delivery alone it is never
    assert failing(names[: needed - 1], at=at).standing is Standing.UP
    assert failing(names[:needed], at=at).standing is Standing.DOWN


def test_with_0_it_is_never_down():
    assert failing("ab" * 500, at=endpoint(down_after=0)).standing is Standing.UP


def test_one_success_forgets_the_failures_before_it():
    health = after(failing("abab"), met(200), "c")
    assert health == UP
    assert failing("abab", health=health).standing is Standing.UP
    assert failing("aaaa", health=after(failing("b"), met(200))).several is False


def test_nothing_new_is_the_same_object():
    """So that nothing is written for each of a million successes."""
    assert after(UP, met(200)) is UP
    asked = replace(UP, not_before_ms=NOW - 5, age_from_ms=3)
    assert after(asked, met(200)) is asked


def test_the_first_success_brings_it_up_also_one_that_was_begun_before():
    for probe in (True, False):
        assert after(DOWN, met(200), probe=probe) == UP


def test_a_success_keeps_what_a_receiver_asked_for_and_from_when_ages_count():
    health = replace(DOWN, not_before_ms=NOW + 9, age_from_ms=7)
    assert after(health, met(200), probe=True) == Health(not_before_ms=NOW + 9, age_from_ms=7)


def test_probes_go_out_after_30_s_then_1_2_4_8_and_10_minutes():
    health, now_ms, waits = DOWN, NOW, []
    for _ in range(8):
        waits.append((health.probe_at_ms - now_ms) / 1000)
        now_ms = health.probe_at_ms
        health = after(health, FAILED, probe=True, now_ms=now_ms)
    assert waits == [30, 60, 120, 240, 480, 600, 600, 600]
    assert (health.standing, health.since_ms, health.probes) == (Standing.DOWN, NOW, 8)


def test_ten_thousand_failed_probes_are_as_far_apart_as_ten():
    health = DOWN
    for _ in range(10_000):
        health = after(health, FAILED, probe=True)
    assert health.probe_at_ms == NOW + 600_000


def test_the_times_of_probes_are_the_endpoints_settings():
    at = endpoint(probe_interval_seconds=0.1, probe_max_seconds=0.25)
    health = failing("aaaab", at=at)
    waits = []
    for _ in range(4):
        waits.append(health.probe_at_ms - NOW)
        health = after(health, FAILED, at=at, probe=True)
    assert waits == [100, 200, 250, 250]


def test_failures_of_attempts_begun_before_it_went_down_change_nothing():
    """Thirty in flight when it breaks would otherwise put the first probe off by hours."""
    health = DOWN
    for name in "cdefgh":
        health = after(health, FAILED, name, now_ms=NOW + 10_000)
    assert health is DOWN


def test_failures_of_replayed_deliveries_do_not_bring_it_down_and_their_success_counts():
    """What was given up before may fail again, and that is no news of the endpoint."""
    health = UP
    for name in "abcdefgh":
        health = after(health, FAILED, name, replayed=True)
    assert health is UP
    almost = failing("abab")
    assert after(almost, FAILED, "c", replayed=True) is almost
    assert after(almost, met(200), "c", replayed=True) == UP


@pytest.mark.parametrize("health", [UP, failing("abab"), DOWN])
@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("replayed", [True, False])
def test_410_makes_it_gone_at_once(health, probe, replayed):
    gone = after(health, met(410), probe=probe, replayed=replayed, now_ms=NOW + 5)
    assert (gone.standing, gone.since_ms) == (Standing.GONE, NOW + 5)


def test_gone_waits_for_a_person_whatever_comes_in_late():
    gone = after(UP, met(410))
    for outcome in (met(200), FAILED, met(503, "60"), met(410)):
        assert after(gone, outcome) is gone
    assert rules.resumed(NOW + 9) == Health(age_from_ms=NOW + 9)


def test_retry_after_is_a_floor_that_only_rises():
    """A second answer that asks for less does not take back what the first asked for."""
    health = after(UP, met(503, "60"))
    assert health.not_before_ms == NOW + 60_000
    assert after(health, met(503, "10"), now_ms=NOW + 1).not_before_ms == NOW + 60_000
    assert after(health, met(503, "120"), now_ms=NOW + 1).not_before_ms == NOW + 120_001
    assert after(health, met(200, "999")).not_before_ms == NOW + 60_000


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("probe", [True, False])
def test_a_floor_holds_whoever_met_it(replayed, probe):
    start = DOWN if probe else UP
    assert after(start, met(429, "700"), probe=probe, replayed=replayed).not_before_ms == NOW + 700_000


@pytest.mark.parametrize("text", ["0", "Thu, 01 Jan 1970 00:00:00 GMT", "soon"])
def test_a_floor_in_the_past_is_none(text):
    assert after(UP, met(503, text)).not_before_ms == 0


def test_resumed_forgets_everything_but_from_when_ages_count():
    assert rules.resumed(NOW) == Health(age_from_ms=NOW)


@pytest.mark.parametrize("by_ms", [-3650 * DAY_MS, -30 * DAY_MS, 30 * DAY_MS, 3650 * DAY_MS])
def test_a_clock_that_was_set_leaves_no_wait_longer_than_it_can_be_by_rights(by_ms):
    health = replace(DOWN, not_before_ms=NOW + 3_600_000, probe_at_ms=NOW + 600_000)
    right = rules.set_right(health, MAIN, NOW + by_ms)
    assert right.probe_at_ms <= NOW + by_ms + 600_000
    assert right.not_before_ms <= NOW + by_ms + DAY_MS
    assert right.age_from_ms == NOW + by_ms
    assert (right.standing, right.failures) == (DOWN.standing, DOWN.failures)


@pytest.mark.parametrize(
    ("last_seen_ms", "at_rest"),
    [
        (None, False),
        (NOW, False),
        (NOW - DAY_MS, False),
        (NOW - DAY_MS - 1, True),
        (NOW + 1, True),
        (0, True),
    ],
)
def test_ages_say_nothing_after_a_day_of_rest_or_under_a_clock_that_was_wrong(last_seen_ms, at_rest):
    assert rules.was_at_rest(last_seen_ms, NOW) is at_rest
