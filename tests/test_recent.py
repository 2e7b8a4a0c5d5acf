"""What is remembered of the last hour, and how `GET /v1/status` tells it."""

import time
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from relay.api.status import EndpointStatus, sentence
from relay.model import Attempt, Event
from relay.recent import ATTEMPTS, FAILURES, FAILURES_EACH, MINUTE_MS, MINUTES, Fared, Recent
from tests.clock import START_MS
from tests.process import relay_process
from tests.test_page import Receiver, config, endpoint, receiving, status, submit, until

EVENT = Event(id="evt_1", type="post.published", timestamp="", data=b"{}", accepted_at_ms=START_MS)
TOOK = Attempt(number=1, at_ms=START_MS, milliseconds=10, status=200, reason=None, answer="ok")
FAILED = replace(TOOK, status=503, reason="http_503", answer="busy")


def test_an_hour_is_counted_by_the_minute_and_older_ones_are_gone():
    recent = Recent()
    recent.accepted(3, START_MS)
    recent.attempted("main", EVENT, TOOK, START_MS, dead=False)
    recent.attempted("main", EVENT, FAILED, START_MS + MINUTE_MS, dead=False)

    minutes = recent.minutes(START_MS + MINUTE_MS)
    assert len(minutes) == MINUTES
    assert [(each.accepted, each.delivered, each.failed) for each in minutes[-2:]] == [(3, 1, 0), (0, 0, 1)]
    assert sum(each.accepted for each in recent.minutes(START_MS + (MINUTES - 1) * MINUTE_MS)) == 3
    assert sum(each.accepted for each in recent.minutes(START_MS + MINUTES * MINUTE_MS)) == 0

    recent.accepted(1, START_MS + MINUTES * MINUTE_MS)
    assert [each.accepted for each in recent.minutes(START_MS + MINUTES * MINUTE_MS) if each.accepted] == [1]


def test_a_clock_that_was_set_back_does_not_mix_two_times():
    recent = Recent()
    recent.accepted(5, START_MS)
    recent.accepted(1, START_MS - MINUTES * MINUTE_MS)
    assert sum(each.accepted for each in recent.minutes(START_MS - MINUTES * MINUTE_MS)) == 1


@pytest.mark.parametrize(("took", "p95"), [([7], 7), (range(1, 21), 19), (range(1, 101), 95)])
def test_of_the_last_attempts_95_in_100_took_no_longer_than_p95(took, p95):
    """By nearest rank, so that it is a time that was really measured."""
    recent = Recent()
    for milliseconds in reversed(took):
        recent.attempted("main", EVENT, replace(TOOK, milliseconds=milliseconds), START_MS, dead=False)
    assert recent.fared("main") == Fared(attempts=len(took), delivered=len(took), p95_milliseconds=p95)


def test_failed_attempts_count_by_their_time_too():
    """A time-out of 15 s is what the receiver cost us, whether it delivered or not."""
    recent = Recent()
    recent.attempted("main", EVENT, replace(FAILED, milliseconds=0), START_MS, dead=False)
    assert recent.fared("main") == Fared(attempts=1, delivered=0, p95_milliseconds=0)
    recent.attempted("main", EVENT, replace(FAILED, milliseconds=15_000), START_MS, dead=False)
    assert recent.fared("main") == Fared(attempts=2, delivered=0, p95_milliseconds=15_000)
    assert recent.fared("other") == Fared()


def test_one_noisy_endpoint_hides_no_failure_of_another_and_nothing_grows():
    recent = Recent()
    recent.attempted("quiet", EVENT, FAILED, START_MS, dead=True)
    for number in range(10 * ATTEMPTS):
        failed = replace(FAILED, number=number, at_ms=START_MS + 1 + number)
        recent.attempted("noisy", EVENT, failed, START_MS, dead=False)

    failures = recent.failures()
    assert [each.endpoint for each in failures] == ["noisy"] * FAILURES_EACH + ["quiet"]
    assert failures[0].attempt.number == 10 * ATTEMPTS - 1, "the newest first"
    assert recent.fared("noisy").attempts == ATTEMPTS

    for number in range(FAILURES):
        recent.attempted(f"other-{number}", EVENT, FAILED, START_MS, dead=False)
    assert len(recent.failures()) == FAILURES

    recent.keep_only({"quiet"})
    assert [each.endpoint for each in recent.failures()] == ["quiet"]
    assert recent.fared("noisy") == Fared()


def test_what_is_remembered_costs_next_to_nothing():
    """It is paid for every event; the figure is printed, and the bound a hundred times what it should be."""
    recent, calls = Recent(), 100_000
    begun = time.perf_counter()
    for _ in range(calls):
        recent.accepted(1, START_MS)
        recent.attempted("main", EVENT, TOOK, START_MS, dead=False)
    each_us = (time.perf_counter() - begun) / calls * 1e6
    print(f"recent: {each_us:.2f} µs for an event accepted and delivered")
    assert each_us < 100


NONE = EndpointStatus(
    id="main", url="", description="", events=("*",), source="config", state="active", since=None, attempts=0,
    success_rate=None, p95_milliseconds=None, pending=0, dead=0, oldest_pending_seconds=None,
    next_attempt_at=None, last_success_at=None, last_failure_at=None, last_error=None, explanation=None,
)  # fmt: skip
DOWN = replace(NONE, id="crm", state="down", since="2026-01-15T09:02:31.000Z", pending=12, dead=2)


@pytest.mark.parametrize(
    ("trouble", "endpoints", "said"),
    [
        (None, [], "Ready. No endpoint yet: events are kept and go nowhere."),
        (None, [NONE], "Ready. 1 endpoint, 0 waiting, 0 dead."),
        (
            None,
            [NONE, DOWN],
            "Ready. 2 endpoints, 12 waiting, 2 dead; crm is down since 09:02 UTC.",
        ),
        (
            None,
            [replace(DOWN, since="2026-01-14T23:59:00.000Z"), replace(NONE, state="paused")],
            "Ready. 2 endpoints, 12 waiting, 2 dead; crm is down since 2026-01-14 23:59 UTC, main is paused.",
        ),
        (
            "the relay is stopping",
            [NONE],
            "Not ready: the relay is stopping. 1 endpoint, 0 waiting, 0 dead.",
        ),
        (
            None,
            [replace(NONE, id=f"e{number}", state="gone") for number in range(5)],
            "Ready. 5 endpoints, 0 waiting, 0 dead; e0 is gone, e1 is gone, e2 is gone, "
            "2 more are down, gone or paused.",
        ),
    ],
)
def test_one_sentence_says_how_all_stands(trouble, endpoints, said):
    assert sentence(trouble, endpoints, START_MS) == said


@pytest.fixture
def receiver():
    with receiving() as each:
        yield each


def test_the_status_tells_what_happened_and_what_comes_next(tmp_path, receiver: Receiver):
    """For the page, for `relay status` and for whoever writes a dashboard."""
    receiver.answers |= {"/crm": (503, "busy"), "/legacy": (500, "no")}
    with relay_process(tmp_path, config(receiver)) as relay:
        assert endpoint(relay, "crm")["success_rate"] is None, "nothing is known yet"
        published = submit(relay)
        for _ in range(2):
            submit(relay, "post.failed")
        until(lambda: endpoint(relay, "legacy")["state"] == "down" and endpoint(relay, "crm")["dead"] == 3)
        told = status(relay)
        crm, legacy, main = told["endpoints"]

        assert (told["pending"], told["dead"], told["ready"]) == (2, 3, True)
        assert (main["attempts"], main["success_rate"], main["last_error"]) == (3, 1.0, None)
        assert (crm["success_rate"], crm["last_error"]) == (0.0, "http_503")
        assert crm["explanation"] == "the receiver answered 503"
        assert crm["next_attempt_at"] is None, "nothing waits"
        assert crm["url"].endswith("?key=***")
        since, following = (datetime.fromisoformat(legacy[name]) for name in ("since", "next_attempt_at"))
        assert following - since == timedelta(minutes=10), "the probe comes then, whatever is due before"
        assert sum(each["accepted"] for each in told["minutes"]) == 3
        assert sum(each["delivered"] for each in told["minutes"]) == 3
        assert sum(each["failed"] for each in told["minutes"]) == 8
        last = next(each for each in told["failures"] if each["event_id"] == published)
        assert (last["endpoint"], last["number"], last["dead"], last["answer"]) == ("crm", 2, True, "busy")

        submit(relay, "post.failed", **{"Idempotency-Key": "again"})
        content = {"event": "post.failed", "data": {"postId": "post_1"}}
        assert relay.call("POST", "/v1/events", content, {"Idempotency-Key": "again"})[0] == 200
        assert sum(each["accepted"] for each in status(relay)["minutes"]) == 4, "a duplicate is no event"

        relay.call("POST", "/v1/webhooks/settings/legacy/pause")
        assert endpoint(relay, "legacy")["next_attempt_at"] is None, "a person has to let it go first"
