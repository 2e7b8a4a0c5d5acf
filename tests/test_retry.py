"""What follows from an outcome: exact schedules, every way to write Retry-After, what uses no step."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config.settings import STANDARD_SCHEDULE
from relay.model import Delivery, Event, Outcome, State, Verdict
from relay.retry import JITTER, LONGEST_RETRY_AFTER_MS, decide, floor_ms

NOW = 1_792_567_680_000  # Wed, 21 Oct 2026 07:28:00 GMT
DEFAULT = (5.0, 300.0, 18_000.0)


def owed(steps: int = 0, *, due_ms: int = NOW - 7) -> Delivery:
    event = Event(id="evt_1", type="t", timestamp="z", data=b"1", accepted_at_ms=NOW - 7)
    return Delivery(
        handle=(1, 1), event=event, endpoint="main", format="event", attempts=steps, steps=steps,
        due_ms=due_ms, digest=b"",
    )  # fmt: skip


def met(status: int | None, retry_after: str | None = None, reason: str | None = None) -> Outcome:
    named = reason or (None if status is not None and 200 <= status < 300 else f"http_{status}")
    return Outcome(milliseconds=5, status=status, reason=named, retry_after=retry_after)


REFUSED = met(500)


def follows(outcome: Outcome, delivery: Delivery, schedule=DEFAULT, *, spread=0.5, probe=False) -> Verdict:
    return decide(outcome, delivery, schedule=schedule, now_ms=NOW, spread=spread, probe=probe)


@pytest.mark.parametrize("schedule", [DEFAULT, STANDARD_SCHEDULE, (0.0,), (0.001, 0.1)])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_a_schedule_is_followed_step_by_step_within_its_jitter_and_then_the_delivery_is_dead(
    schedule, spread
):
    delivery = owed()
    for number, seconds in enumerate(schedule):
        verdict = follows(REFUSED, delivery, schedule, spread=spread)
        assert (verdict.state, verdict.steps) == (State.PENDING, number + 1)
        assert verdict.due_ms == NOW + round(seconds * 1000 * (1 + JITTER * (2 * spread - 1)))
        delivery = replace(delivery, attempts=verdict.steps, steps=verdict.steps)
    assert follows(REFUSED, delivery, schedule, spread=spread) == Verdict(
        state=State.DEAD, steps=len(schedule)
    )


def test_the_standard_schedule_is_that_of_standard_webhooks():
    """Ten attempts over a little more than three days, as the specification recommends."""
    assert len(STANDARD_SCHEDULE) + 1 == 10
    hours = [seconds / 3600 for seconds in STANDARD_SCHEDULE]
    assert hours[2:] == [0.5, 2, 5, 10, 14, 20, 24]
    assert 3 * 24 < sum(hours) < 3.5 * 24


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 2))
def test_no_retry_leaves_its_jitter(spread, steps):
    verdict = follows(REFUSED, owed(steps), spread=spread)
    delay_ms = DEFAULT[steps] * 1000
    assert verdict.due_ms is not None
    assert delay_ms * 0.9 - 1 <= verdict.due_ms - NOW <= delay_ms * 1.1 + 1


def test_without_retries_the_first_failure_is_the_last():
    assert follows(REFUSED, owed(), ()).state is State.DEAD
    assert follows(met(429, "5"), owed(), ()).state is State.DEAD, "there is no delay to repeat"
    assert follows(met(200), owed(), ()).state is State.DELIVERED


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_a_2xx_is_delivered_whatever_it_asks_for(status):
    outcome = met(status, "120")
    assert follows(outcome, owed(3)) == Verdict(state=State.DELIVERED, steps=3)
    assert floor_ms(outcome, NOW) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        (" 120 ", 120),
        ("0", 0),
        ("007", 7),
        ("86400", 86_400),
        ("86401", 86_400),
        (str(10**9), 86_400),
        (str(10**40), 86_400),
        ("9" * 128, 86_400),
        # RFC 9110 section 5.6.7: IMF-fixdate, RFC 850, asctime.
        ("Wed, 21 Oct 2026 07:30:00 GMT", 120),
        ("Wednesday, 21-Oct-26 07:30:00 GMT", 120),
        ("Wed Oct 21 07:30:00 2026", 120),
        ("Sun, 01 Nov 2026 00:00:00 GMT", 86_400),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
        # In the past: nothing to wait for, but an answer that says until when.
        ("Wed, 21 Oct 2026 07:27:59 GMT", 0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0),
        ("Sun Nov  6 08:49:37 1994", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ],
)
@pytest.mark.parametrize("status", [301, 307, 400, 404, 429, 500, 503])
def test_retry_after_is_read_in_every_form_with_every_status_and_capped_at_a_day(text, seconds, status):
    outcome = met(status, text, "redirect_refused" if status < 400 else None)
    assert floor_ms(outcome, NOW) == NOW + seconds * 1000


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "-5", "+5", "1.5", "5s", "soon", "0x10", "1e3", "120, 120", "12 0", "\x00",
        "\N{ARABIC-INDIC DIGIT FIVE}", "\N{FULLWIDTH DIGIT ONE}",
        "Wed, 99 Oct 2026 07:30:00 GMT", "Wed, 21 Foo 2026 07:30:00 GMT", "Wed, 21 Oct 2026 25:61:00 GMT",
        "Wed, 21 Oct", "Oct", ", , ,", "(", "2026-10-21T07:30:00Z", "Wed, 21 Oct 99999999 07:30:00 GMT",
    ],
)  # fmt: skip
def test_a_retry_after_that_cannot_be_read_is_none(text):
    """It is the receiver's slip, so it neither stops the endpoint nor excuses the failure."""
    outcome = met(503, text)
    assert floor_ms(outcome, NOW) is None
    assert follows(outcome, owed()).steps == 1


@settings(deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet='0123456789:,+-. MonJaGTZ()\\"', max_size=40),
        st.lists(
            st.sampled_from(
                ["Mon,", "Nov", "6", "06", "1994", "94", "08:49:37", "GMT", "+9999", "-0000", "(", ")", ""]
            )
        ).map(" ".join),
    )
)
def test_whatever_a_receiver_writes_means_at_most_a_day_and_never_the_past(text):
    floor = floor_ms(met(503, text), NOW)
    assert floor is None or NOW <= floor <= NOW + LONGEST_RETRY_AFTER_MS


@pytest.mark.parametrize(
    "outcome", [met(429), met(429, "60"), met(429, "never"), met(503, "60"), met(503, "0")]
)
@pytest.mark.parametrize(("steps", "seconds"), [(0, 5), (1, 300), (2, 18_000), (3, 18_000)])
def test_a_receiver_that_is_only_busy_has_the_steps_delay_repeated(outcome, steps, seconds):
    """Also at the last step: it said "not now", which is no reason to give up."""
    assert follows(outcome, owed(steps)) == Verdict(
        state=State.PENDING, steps=steps, due_ms=NOW + seconds * 1000
    )


@pytest.mark.parametrize("outcome", [met(503), met(500, "60"), met(404, "60"), met(502, "60")])
def test_any_other_failure_uses_a_step_although_it_asks_for_time(outcome):
    assert follows(outcome, owed()).steps == 1
    assert follows(outcome, owed(3)).state is State.DEAD


@pytest.mark.parametrize("steps", [0, 3])
def test_410_leaves_the_delivery_as_it_was(steps):
    """The endpoint waits for a person, and so does what is owed to it, also at its last attempt."""
    delivery = owed(steps, due_ms=NOW - 60_000)
    assert follows(met(410), delivery) == Verdict(state=State.PENDING, steps=steps, due_ms=NOW - 60_000)


@pytest.mark.parametrize("outcome", [REFUSED, met(429), met(None, reason="timeout")])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_probe_uses_no_step_and_leaves_the_due_time(outcome, steps):
    delivery = owed(steps, due_ms=NOW + 9_000)
    assert follows(outcome, delivery, probe=True) == Verdict(
        state=State.PENDING, steps=steps, due_ms=NOW + 9_000
    )
    assert follows(met(200), delivery, probe=True).state is State.DELIVERED
