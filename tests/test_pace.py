"""How fast one endpoint is sent to: no rate is ever exceeded, and the limit finds what a receiver can take.

Receivers are simulated in virtual time, by how they answer under load; what is asserted are bands, as the
controller oscillates around what it looks for.
"""

import heapq
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.model import Outcome
from relay.pace import Bucket, Limit

OK = Outcome(milliseconds=1, status=200)
BUSY = Outcome(milliseconds=1, status=429, reason="http_429")
OVERLOADED = Outcome(milliseconds=1, status=503, reason="http_503")
LATE = Outcome(milliseconds=1, reason="timeout")
BROKEN = Outcome(milliseconds=1, status=500, reason="http_500")

# The rate


def most_in_a_window(taken: list[tuple[float, int]], rate: float) -> float:
    """Return the largest excess over `rate * t` among all windows of t seconds, of times with counts."""
    return max(
        sum(count for _, count in taken[first : last + 1]) - rate * (taken[last][0] - taken[first][0])
        for first in range(len(taken))
        for last in range(first, len(taken))
    )


RATES = st.one_of(
    st.integers(1, 999_999).map(float),
    st.integers(1, 6000).map(lambda each: each / 60),
    st.sampled_from([1 / 60, 0.5, 1.0, 1.5, 3.0, 7.0, 49.0, 50.0, 1000 / 60]),
)


@settings(deadline=None)
@given(
    RATES,
    st.floats(0, 1e7),
    st.lists(
        st.tuples(st.one_of(st.just(0.0), st.floats(0, 3), st.floats(0, 1e5)), st.integers(1, 60)),
        max_size=40,
    ),
)
@example(50.0, 0.0, [(0.0, 60)] + [(0.5, 60)] * 9)
@example(50.0, 1e7, [(3600.0, 60)] * 3)
def test_no_window_of_time_holds_more_than_the_rate_and_one_seconds_worth(rate, start, calls):
    """Whenever it is asked and however much is wanted at a time."""
    now, bucket, taken = start, Bucket(rate, start), [(start, 0)]
    for seconds, wanted in calls:
        now += seconds
        count = min(wanted, bucket.available(now))
        bucket.take(count, now)
        taken.append((now, count))
    assert most_in_a_window(taken, rate) <= max(1.0, rate) + 1e-3


@settings(deadline=None)
@given(RATES, st.integers(1, 300))
def test_after_the_wait_that_it_says_one_may_go_and_not_much_before(rate, count):
    """Else the lane would spin, or be slower than the rate."""
    now, bucket = 1000.0, Bucket(rate, 1000.0)
    for _ in range(count):
        assert bucket.available(now + bucket.wait_seconds(now)) >= 1
        if bucket.wait_seconds(now) > 1e-6:
            assert bucket.available(now + bucket.wait_seconds(now) * 0.99 - 1e-6) == 0
        now += bucket.wait_seconds(now)
        bucket.take(1, now)
    assert now - 1000.0 == pytest.approx((count - 1) / rate, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rate", [0.5, 1.0, 50.0, 1000.0])
@pytest.mark.parametrize("idle_seconds", [1.0, 60.0, 30 * 86_400.0])
def test_idling_saves_up_one_seconds_worth_and_no_more(rate, idle_seconds):
    bucket = Bucket(rate, 0.0)
    bucket.take(1, 0.0)
    assert bucket.available(idle_seconds + 1 / rate) == max(1, rate)


def test_it_begins_with_one_so_that_restarts_do_not_add_up():
    assert Bucket(50.0, 0.0).available(0.0) == 1
    assert Bucket(50.0, 0.0).available(0.5) == 26


# The limit


@dataclass
class Simulation:
    """A receiver in virtual time: `answers` says of its load what is answered and after how many seconds."""

    limit: Limit
    answers: Callable[[int, float], tuple[Outcome, float]]
    interval: float = 0.0  # between two attempts that are wanted; 0: there is always one more
    now: float = 0.0
    slots: list[tuple[float, int]] = field(default_factory=list)  # when, how many
    under_way: int = 0
    most: int = 0
    met: list[str | None] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        ends: list[tuple[float, int, Outcome, float]] = []
        count, end, wanted_at = 0, self.now + seconds, self.now
        while self.now < end:
            while self.under_way < self.limit.slots and wanted_at <= self.now:
                self.under_way += 1
                self.most = max(self.most, self.under_way)
                self.limit.begun(self.under_way)
                outcome, takes = self.answers(self.under_way, self.now)
                count += 1
                heapq.heappush(ends, (self.now + takes, count, outcome, self.now))
                wanted_at = max(wanted_at + self.interval, 0.0 if self.interval else self.now)
            next_end = ends[0][0] if ends else float("inf")
            if wanted_at > self.now and wanted_at < next_end:
                self.now = wanted_at
                continue
            self.now, _, outcome, begun = heapq.heappop(ends)
            self.under_way -= 1
            self.met.append(outcome.reason)
            self.limit.ended(outcome, self.now - begun, self.now)
            self.slots.append((self.now, self.limit.slots))
        self.under_way = 0

    def mean_slots(self, after: float) -> float:
        """Return the mean of the limit over time, from then on."""
        rows = self.slots[bisect_left(self.slots, (after, 0)) :]
        area = sum((b[0] - a[0]) * a[1] for a, b in pairwise(rows))
        return area / (rows[-1][0] - rows[0][0])

    def refused(self, after: float) -> float:
        """Return the share of attempts that the receiver could not take."""
        tail = self.met[bisect_left(self.slots, (after, 0)) :]
        return sum(reason is not None for reason in tail) / len(tail)


def steady(load: int, now: float) -> tuple[Outcome, float]:
    return OK, 0.1


def linear(load: int, now: float) -> tuple[Outcome, float]:
    return OK, 0.1 + 0.005 * load


def knee(load: int, now: float) -> tuple[Outcome, float]:
    """Up to ten at once it is quick; beyond, so slow that attempts time out."""
    return (OK, 0.1) if load <= 10 else (LATE, 2.0)


def ten_at_once(load: int, now: float) -> tuple[Outcome, float]:
    return (OK, 0.1) if load <= 10 else (OVERLOADED, 0.01)


class SixtyASecond:
    """Takes sixty a second, evenly, and answers the rest with 429."""

    def __init__(self) -> None:
        self.bucket = Bucket(60.0, 0.0)

    def __call__(self, load: int, now: float) -> tuple[Outcome, float]:
        if self.bucket.available(now) < 1:
            return BUSY, 0.1
        self.bucket.take(1, now)
        return OK, 0.1


def test_a_receiver_that_keeps_up_gets_the_whole_ceiling():
    simulation = Simulation(Limit(32), steady)
    simulation.run(60)
    assert simulation.mean_slots(0) == simulation.most == 32


def test_a_steady_load_below_the_limit_does_not_wear_it_down():
    """With constant latency every round is as slow as the average, which is no reason to go slower."""
    simulation = Simulation(Limit(32), steady, interval=0.05)  # two at once
    simulation.run(3600)
    assert simulation.most <= 3
    assert simulation.mean_slots(0) == 32


def test_a_load_below_the_limit_does_not_raise_it():
    """What was never tried is not known to be good."""
    simulation = Simulation(Limit(32), steady, interval=0.05)
    simulation.limit.start_over()
    simulation.run(600)
    assert simulation.mean_slots(60) <= 8, "while it caught up after the recovery there were more"


@pytest.mark.parametrize(
    ("make", "band", "refused"),
    [
        (lambda: linear, (30.0, 32.0), 0.0),
        (lambda: knee, (7.0, 12.0), 0.25),
        (lambda: ten_at_once, (7.0, 11.0), 0.15),
        (SixtyASecond, (4.5, 7.5), 0.25),  # sixty a second of 0.1 s each are six at once
    ],
    ids=["linear", "knee", "concurrency ceiling", "rate ceiling"],
)
@pytest.mark.parametrize("start", ["at the ceiling", "after a recovery"])
def test_the_limit_finds_what_a_receiver_can_take(make, band, refused, start, capsys):
    answers = make()
    simulation = Simulation(Limit(32), answers)
    if start == "after a recovery":
        simulation.limit.start_over()
    simulation.run(120)
    mean, share = simulation.mean_slots(60), simulation.refused(60)
    with capsys.disabled():
        print(f"\nlimit {mean:.1f}, {share:.1%} refused", end=" ")
    assert band[0] <= mean <= band[1]
    assert share <= refused
    assert simulation.most <= 32


def test_it_follows_a_receiver_that_gets_slower_and_better_again():
    simulation = Simulation(Limit(32), steady)
    simulation.run(10)
    simulation.answers = ten_at_once
    simulation.run(30)
    assert 7 <= simulation.mean_slots(20) <= 11
    simulation.answers = steady
    simulation.run(30)
    assert simulation.mean_slots(60) == 32


def test_at_least_one_at_a_time_goes_to_a_receiver_that_refuses_everything():
    simulation = Simulation(Limit(32), lambda load, now: (OVERLOADED, 0.01))
    simulation.run(10)
    assert simulation.slots[-1][1] == 1


def rounds(limit: Limit, count: int, outcome: Outcome = OK, at: float = 0.0) -> list[int]:
    """Fill the limit again and again, each answered after 0.1 s; return how many there were at once."""
    filled = []
    for number in range(count):
        slots = limit.slots
        filled.append(slots)
        for under_way in range(1, slots + 1):
            limit.begun(under_way)
        for _ in range(slots):
            limit.ended(outcome, 0.1, at + (number + 1) * 0.1)
    return filled


def test_after_a_recovery_one_two_four_eight_go_out_at_once():
    limit = Limit(32)
    limit.start_over()
    assert rounds(limit, 8) == [1, 2, 4, 8, 16, 32, 32, 32]


def test_a_ceiling_that_is_no_power_of_two_is_reached_and_kept():
    limit = Limit(11)
    limit.start_over()
    assert rounds(limit, 6) == [1, 2, 4, 8, 11, 11]


def test_a_round_with_a_failure_does_not_double():
    limit = Limit(32)
    limit.start_over()
    assert rounds(limit, 3) == [1, 2, 4]
    assert rounds(limit, 3, BROKEN, at=10.0) == [8, 8, 8]
    assert rounds(limit, 2, OK, at=20.0)[0] == 8


@pytest.mark.parametrize(
    "outcome", [BUSY, OVERLOADED, LATE, Outcome(milliseconds=1, reason="connect_timeout")]
)
def test_back_pressure_takes_three_tenths_at_most_once_a_round(outcome):
    limit = Limit(32)
    rounds(limit, 3)
    for _ in range(32):
        limit.ended(outcome, 0.1, 0.45)
    assert limit.slots == 22
    limit.ended(outcome, 0.1, 0.56)
    assert limit.slots == 15


@pytest.mark.parametrize("reason", ["http_500", "http_404", "conn_refused", "tls_cert", "dns_error"])
def test_other_failures_say_nothing_of_how_fast_to_go(reason):
    """A 500 for one event must not slow down the rest."""
    limit = Limit(32)
    rounds(limit, 3)
    for _ in range(50):
        limit.ended(Outcome(milliseconds=1, reason=reason), 0.1, 5.0)
    assert limit.slots == 32


def test_a_new_ceiling_holds_at_once_and_the_limit_follows_it_up_only_from_the_old_one():
    limit = Limit(32)
    limit.cap(8)
    assert limit.slots == 8
    limit.cap(16)
    assert limit.slots == 16, "it was at the ceiling"
    limit.ended(BUSY, 0.1, 1.0)
    limit.cap(32)
    assert limit.slots == 11, "the receiver said what it can take"
