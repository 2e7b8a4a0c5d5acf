"""Formats: what an event looks like on the wire, the same on every attempt."""

import json
from dataclasses import replace
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import formats
from relay.model import Delivery, Endpoint, Event
from tests.clock import START_MS, MovedClock
from tests.lanes import ScriptedSender, make_lanes

EVENT = Event(
    id="evt_1",
    type="post.published",
    timestamp="2026-01-15T10:00:00.000Z",
    data='{"postId":"post_1","text":"Grüße"}'.encode(),
    accepted_at_ms=1,
)
KEYED = replace(EVENT, key='größe "50 %" \\ 🎉')
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def written(event: Event, format_: str, **attempt: int):
    return formats.message(event, format_, **({"attempt": 1, "at_ms": 1_700_000_000_999} | attempt))


@pytest.mark.parametrize(
    ("format_", "content_type", "body"),
    [
        (
            "event", "application/json",
            '{"event":"post.published","timestamp":"2026-01-15T10:00:00.000Z",'
            '"data":{"postId":"post_1","text":"Grüße"}}',
        ),
        (
            "standard", "application/json",
            '{"type":"post.published","timestamp":"2026-01-15T10:00:00.000Z",'
            '"data":{"postId":"post_1","text":"Grüße"}}',
        ),
        ("data", "application/json", '{"postId":"post_1","text":"Grüße"}'),
        ("cloudevents-binary", "application/json", '{"postId":"post_1","text":"Grüße"}'),
        (
            "cloudevents", "application/cloudevents+json",
            '{"specversion":"1.0","id":"evt_1","source":"relay","type":"post.published",'
            '"time":"2026-01-15T10:00:00.000Z","datacontenttype":"application/json",'
            '"data":{"postId":"post_1","text":"Grüße"}}',
        ),
    ],
)  # fmt: skip
def test_each_format_is_exactly_these_bytes(format_, content_type, body):
    """Receivers hash them, so every one counts."""
    message = written(EVENT, format_)

    assert (message.body.decode(), message.content_type) == (body, content_type)
    assert (message.id, message.type, message.attempt) == ("evt_1", "post.published", 1)
    assert message.timestamp == 1_700_000_000


def test_there_is_no_format_without_its_bytes_written_down():
    """A new one has to join the test above."""
    tested = {"event", "standard", "data", "cloudevents", "cloudevents-binary"}
    assert set(formats.FORMATS) == tested


def test_binary_cloudevents_carry_their_attributes_as_headers():
    """The HTTP binding says which characters a header cannot carry, and that they are percent-encoded."""
    assert written(EVENT, "cloudevents-binary").headers == (
        ("ce-specversion", "1.0"),
        ("ce-id", "evt_1"),
        ("ce-source", "relay"),
        ("ce-type", "post.published"),
        ("ce-time", "2026-01-15T10:00:00.000Z"),
    )
    assert dict(written(KEYED, "cloudevents-binary").headers)["ce-subject"] == (
        "gr%C3%B6%C3%9Fe%20%2250%20%25%22%20\\%20%F0%9F%8E%89"
    )


def test_only_binary_cloudevents_have_headers_of_their_own():
    for format_ in set(formats.FORMATS) - {"cloudevents-binary"}:
        assert written(KEYED, format_).headers == ()


def test_the_key_is_the_subject_of_a_cloudevent():
    """A key is any printable text, and has to be JSON all the same."""
    content = json.loads(written(KEYED, "cloudevents").body)

    assert content["subject"] == KEYED.key
    assert json.loads(written(EVENT, "cloudevents").body) == {
        name: value for name, value in content.items() if name != "subject"
    }


@given(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]))
def test_any_key_comes_back_out_of_both_modes_of_cloudevents(character):
    """Whatever characters a key is made of, and in bytes that a header can carry."""
    event = replace(EVENT, key=f"a{character}b")

    header = dict(written(event, "cloudevents-binary").headers)["ce-subject"]

    assert all(0x21 <= ord(each) <= 0x7E and each != '"' for each in header)
    assert unquote(header, errors="strict") == event.key
    assert json.loads(written(event, "cloudevents").body)["subject"] == event.key


@pytest.mark.parametrize("format_", formats.FORMATS)
def test_the_attempt_changes_nothing_but_its_number_and_time(format_):
    """Byte-identical on every attempt (contract 1.3)."""
    first = written(KEYED, format_)
    second = written(KEYED, format_, attempt=2, at_ms=1_700_000_300_000)

    assert second == replace(first, attempt=2, timestamp=1_700_000_300)


def test_a_source_is_kept_with_the_delivery():
    """A relay that gets another source sends what it accepted before with the one it had then."""
    before = formats.fixed("cloudevents", "https://shop.example/;source=1")
    binary = formats.fixed("cloudevents-binary", "/shop")

    assert json.loads(written(EVENT, before).body)["source"] == "https://shop.example/;source=1"
    assert dict(written(EVENT, binary).headers)["ce-source"] == "/shop"
    assert json.loads(written(EVENT, formats.fixed("cloudevents", "relay")).body)["source"] == "relay"
    assert (formats.name(before), formats.name(binary)) == ("cloudevents", "cloudevents-binary")


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_fixed_format_still_has_its_name(name):
    """People are shown the name they gave."""
    assert formats.name(formats.fixed(name, "relay")) == name
    assert formats.name(formats.fixed(name, "/shop")) == name


def test_a_change_to_what_is_stored_changes_the_digest():
    """What the disk changed must not be signed."""
    others = (
        replace(EVENT, data=b"{}"),
        replace(EVENT, type="post.failed"),
        replace(EVENT, timestamp="2026"),
    )

    assert len({formats.digest(event) for event in (EVENT, *others)}) == 4


async def test_a_format_that_changed_on_the_disk_is_not_sent(outbox):
    """One bit of one row must neither be guessed at nor end the lanes of all the others."""
    delivery = Delivery(
        handle=(1, 1), event=EVENT, endpoint="main", format="evgnt", attempts=0, steps=0,
        due_ms=START_MS, digest=formats.digest(EVENT),
    )  # fmt: skip
    main = Endpoint(
        id="main", url="https://receiver.test/", events=("*",), sign=(), retry_schedule=(),
        timeout_seconds=15.0, concurrency=1,
    )  # fmt: skip
    sender = ScriptedSender()
    lanes = make_lanes(outbox, sender, MovedClock())
    await lanes.keep(main, paused=False)
    lane = lanes._lanes["main"]

    refused = await lane._outcome(delivery, 1, START_MS)
    sent = await lane._outcome(replace(delivery, format="event"), 1, START_MS)

    assert (refused.reason, sent.reason, len(sender.messages)) == ("body_digest", None, 1)


def test_a_child_is_of_the_same_trace_and_has_its_own_span():
    """The receiver's spans hang below the delivery and not beside it."""
    assert formats.child(PARENT, bytes(range(8))) == (
        "00-0af7651916cd43dd8448eb211c80319c-0001020304050607-01"
    )


@pytest.mark.parametrize(("flags", "passed_on"), [("00", "00"), ("01", "01"), ("02", "02"), ("ff", "03")])
def test_only_defined_trace_flags_are_passed_on(flags, passed_on):
    """Flags that have no meaning yet have to be zero, and a later version becomes the one that is known."""
    assert formats.child(f"cc{PARENT[2:-2]}{flags}", bytes(8)).startswith("00-")
    assert formats.child(f"cc{PARENT[2:-2]}{flags}", bytes(8)).endswith(f"-{passed_on}")


def test_the_headers_of_an_attempt_follow_those_of_the_format():
    trace = (("traceparent", PARENT),)

    message = formats.message(EVENT, "cloudevents-binary", attempt=1, at_ms=0, trace=trace)

    assert message.headers == written(EVENT, "cloudevents-binary").headers + trace
