"""CloudEvents over the running API, written by their own SDK: all three modes, and every mistake."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import orjson
import pytest
from cloudevents.core.bindings import http
from cloudevents.core.v1.event import CloudEvent

from relay import cloudevents
from relay.catalogue import Catalogue, EventType
from relay.ingest import InvalidError
from tests.test_api import EVENT, Api, open_api

EVENTS, BATCH = "/v1/events", "/v1/events/batch"
STRUCTURED = {"Content-Type": "application/cloudevents+json"}
BATCHED = {"Content-Type": "application/cloudevents-batch+json"}
HERE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
THERE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

CLOUDEVENT = {
    "specversion": "1.0",
    "type": "post.published",
    "source": "/posts",
    "id": "1",
    "data": {"postId": "post_abc123"},
}
HEADERS = {"ce-specversion": "1.0", "ce-type": "post.published", "ce-source": "/posts", "ce-id": "1"}

MISSING = "is missing"
TYPE = "must be 1 to 128 of A-Z a-z 0-9 _ - in dot-separated parts, like post.published"
TIME = "must be a date and time of RFC 3339, like 2026-01-15T10:00:00.000Z"
KEY = "must be 1 to 255 printable characters"
TEXT = "must be a string that is not empty"
VERSION = 'must be "1.0"'
JSON_ONLY = "must be a JSON media type, like application/json: only JSON data is taken"
UTF_8 = "must be UTF-8, percent-encoded"


@pytest.fixture
async def api(outbox) -> AsyncIterator[Api]:
    async for each in open_api(outbox):
        yield each


def of_sdk(**attributes: object) -> CloudEvent:
    return CloudEvent(
        attributes={"type": "post.published", "source": "/posts/ü", "id": "1"} | attributes,
        data={"postId": "post_abc123"},
    )


async def kept(api, receipt) -> dict[str, object]:
    """Return the event as it is kept, without what is new each time."""
    story = await api.state.outbox.story(receipt["id"])
    event = story.event
    return {
        "event": event.type,
        "timestamp": event.timestamp,
        "key": event.key,
        "data": orjson.loads(event.data),
        "traceparent": event.traceparent,
    }


@pytest.mark.parametrize("write", [http.to_structured_event, http.to_binary_event])
async def test_what_the_sdk_writes_is_kept_as_an_ordinary_event(api, write):
    """An application that speaks CloudEvents already changes nothing but the address it posts to."""
    message = write(
        of_sdk(
            time=datetime(2025, 12, 31, 23, 59, 58, 250_000, tzinfo=UTC),
            subject="Zürich 100 %",
            datacontenttype="application/json",
            dataschema="https://schemas.example/post",
            traceparent=HERE,
            comexample="dropped",
        )
    )

    status, _, receipt = await api.post(EVENTS, message.body, headers=message.headers)

    assert status == 202
    assert receipt | {"id": "-"} == {
        "id": "-",
        "event": "post.published",
        "timestamp": "2025-12-31T23:59:58.250000Z",
        "endpoints": ["main", "other"],
        "duplicate": False,
    }
    assert await kept(api, receipt) == {
        "event": "post.published",
        "timestamp": "2025-12-31T23:59:58.250000Z",
        "key": "Zürich 100 %",
        "data": {"postId": "post_abc123"},
        "traceparent": HERE,
    }
    assert sorted(api.woken) == ["main", "other"]


async def test_a_source_and_id_are_one_event_in_every_mode(api):
    """A producer that retries through another library, or in a batch, must not send the event twice."""
    event = of_sdk(time=datetime(2026, 1, 1, tzinfo=UTC))
    written, bare = http.to_structured_event(event), http.to_binary_event(event)

    status, _, first = await api.post(EVENTS, bare.body, headers=bare.headers)
    assert status == 202
    for again in (bare, written):
        status, _, receipt = await api.post(EVENTS, again.body, headers=again.headers)
        assert (status, receipt) == (200, first | {"duplicate": True})
    status, _, receipts = await api.post(BATCH, b"[" + written.body + b"]", headers=BATCHED)
    assert (status, receipts) == (202, {"events": [first | {"duplicate": True}]})
    assert await api.stored() == [first["id"]]


@pytest.mark.parametrize(
    "changed",
    [
        {"type": "post.failed"},
        {"data": 5},
        {"subject": "k"},
        {"time": "2026-01-15T10:00:00.000Z"},
        {"data": None},
    ],
)
async def test_a_source_and_id_with_other_content_are_refused(api, changed):
    """Two events under one name are a mistake of the producer, and silence would lose one of them."""
    await api.post(EVENTS, CLOUDEVENT, headers=STRUCTURED)
    detail = "this pair of source and id was used before for other content"
    for path, content, headers, pointer in (
        (EVENTS, CLOUDEVENT | changed, STRUCTURED, "#"),
        (BATCH, [CLOUDEVENT | {"id": "2"}, CLOUDEVENT | changed], BATCHED, "#/1"),
    ):
        status, _, problem = await api.post(path, content, headers=headers)
        assert (status, problem["errors"]) == (422, [{"pointer": pointer, "detail": detail}])
    assert len(await api.stored()) == 1


async def test_what_is_not_kept_is_not_content(api):
    """An extension that changes with each try (a counter, a trace) leaves it the same event."""
    status, _, first = await api.post(EVENTS, CLOUDEVENT | {"try": 1}, headers=STRUCTURED)
    assert status == 202
    status, _, again = await api.post(EVENTS, CLOUDEVENT | {"try": 2, "subject": None}, headers=STRUCTURED)
    assert (status, again["id"]) == (200, first["id"])


async def test_no_two_pairs_of_source_and_id_share_a_key(api):
    """Whatever the two are joined by, their border must stay: /a + b is not /ab."""
    pairs = [
        ("/a", "b"),
        ("/", "ab"),
        ("/a b", "c"),
        ("/a", "b c"),
        ('/a","b', "c"),
        ("/a", 'b","c'),
        ("/é" * 200, "b"),
        ("/é" * 200, "c"),
        ("/\u0065\u0301" * 200, "b"),
    ]
    batch = [CLOUDEVENT | {"source": source, "id": id_} for source, id_ in pairs]
    status, _, answer = await api.post(BATCH, batch, headers=BATCHED)
    assert status == 202
    assert [receipt["duplicate"] for receipt in answer["events"]] == [False] * len(pairs)


def test_no_client_can_send_the_key_of_a_cloudevent():
    """Else one client's Idempotency-Key could swallow another's event."""
    key = cloudevents.structured(CLOUDEVENT).idempotency_key
    assert " " in key
    assert key == cloudevents.structured(CLOUDEVENT | {"time": "2026-01-15T10:00:00Z"}).idempotency_key


async def test_the_key_of_a_cloudevent_is_refused_as_a_header(api):
    key = cloudevents.structured(CLOUDEVENT).idempotency_key
    for header in (key, f'"{key}"'):
        status, _, _ = await api.post(EVENTS, EVENT, headers={"Idempotency-Key": header})
        assert status == 422


@pytest.mark.parametrize("headers", [STRUCTURED, HEADERS])
async def test_an_idempotency_key_beside_a_cloudevent_is_refused(api, headers):
    """Two keys cannot both hold: one of the two promises would be broken without a word."""
    status, _, problem = await api.post(EVENTS, CLOUDEVENT, headers=headers | {"Idempotency-Key": "k"})
    assert status == 422
    assert "its source and id are the key" in problem["detail"]
    assert await api.stored() == []


@pytest.mark.parametrize(
    ("header", "attribute", "expected"),
    [
        (HERE, THERE, HERE),
        (None, THERE, THERE),
        (None, "no trace", None),
        (None, 7, None),
        ("no trace", THERE, THERE),
    ],
)
async def test_a_trace_comes_from_the_header_or_else_from_the_event(api, header, attribute, expected):
    """The header is the hop that reached us; the extension is where the event began."""
    sent = {"traceparent": header} if header else {}
    with_trace = CLOUDEVENT | {"traceparent": attribute}
    _, _, receipt = await api.post(EVENTS, with_trace, headers=STRUCTURED | sent)
    assert (await kept(api, receipt))["traceparent"] == expected
    _, _, answer = await api.post(BATCH, [with_trace | {"id": "2"}], headers=BATCHED | sent)
    assert (await kept(api, answer["events"][0]))["traceparent"] == expected
    extension = {"ce-traceparent": str(attribute)}
    _, _, receipt = await api.post(EVENTS, 1, headers=HEADERS | {"ce-id": "3"} | extension | sent)
    assert (await kept(api, receipt))["traceparent"] == expected


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("k1", "k1"),
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),  # the example of the binding
        ("%e2%82%ac", "€"),
        ("%6b1", "k1"),
        ("%2525", "%25"),
        ("100%", "100%"),
        ("€", "€"),
        ('"two words"', "two words"),
        ('"a \\"b\\" %63"', 'a "b" c'),
        ('un"quoted', 'un"quoted'),
    ],
)
async def test_headers_are_decoded_as_the_binding_says(api, header, key):
    """HTTP binding 3.1.3.2: quoted strings first, then one round of percent-decoding."""
    status, _, receipt = await api.post(EVENTS, {"a": 1}, headers=HEADERS | {"ce-subject": header})
    assert status == 202
    assert (await kept(api, receipt))["key"] == key


async def test_headers_are_known_in_any_case(api):
    """Names of headers have no case; some libraries write Ce-Id, some proxies CE-ID."""
    for write in (str.upper, str.title):
        headers = {write(name): value for name, value in (HEADERS | {"ce-id": write("a")}).items()}
        status, _, receipt = await api.post(EVENTS, 1, headers=headers | {write("ce-subject"): "k"})
        assert status in {200, 202}
        assert (await kept(api, receipt))["key"] == "k"


def test_a_header_of_other_bytes_than_utf_8_is_refused():
    """HTTP/1.1 lets any byte through; to guess a character set would make another event of it."""
    with pytest.raises(InvalidError) as refused:
        cloudevents.binary(HEADERS | {"ce-id": "\udcff", "Content-Type": "application/json"}, b"1")
    assert refused.value.problems == (("#/ce-id", UTF_8),)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=UTF-8",
        'Application/JSON;charset="utf-8"',
        "text/json",
        "application/vnd.example.post+json; profile=full",
    ],
)
async def test_every_media_type_of_json_is_json(api, content_type):
    """JSON format 3.1.1: what ends in /json or +json is."""
    status, _, receipt = await api.post(EVENTS, {"a": 1}, headers=HEADERS | {"Content-Type": content_type})
    assert (status, (await kept(api, receipt))["data"]) == (202, {"a": 1})
    written = CLOUDEVENT | {"id": "2", "datacontenttype": content_type}
    assert (await api.post(EVENTS, written, headers=STRUCTURED))[0] == 202


async def test_an_event_without_data_carries_null(api):
    """Data is optional in CloudEvents; receivers get a member `data` all the same."""
    without = {name: value for name, value in CLOUDEVENT.items() if name != "data"}
    _, _, receipt = await api.post(EVENTS, without, headers=STRUCTURED)
    assert (await kept(api, receipt))["data"] is None
    for id_, content_type in (("2", "application/json"), ("3", None)):
        headers = HEADERS | {"ce-id": id_, "Content-Type": content_type}
        status, _, receipt = await api.post(EVENTS, b"", headers=headers, skip_auto_headers={"Content-Type"})
        assert (status, (await kept(api, receipt))["data"]) == (202, None)


async def test_attributes_that_are_null_are_not_there(api):
    """JSON format 2.2: null is how some libraries write what is unset."""
    unset = dict.fromkeys(("subject", "time", "datacontenttype", "data_base64", "dataschema"))
    status, _, receipt = await api.post(EVENTS, CLOUDEVENT | unset, headers=STRUCTURED)
    assert status == 202
    assert (await kept(api, receipt))["key"] is None


async def test_a_structured_event_may_repeat_its_attributes_as_headers(api):
    """HTTP binding 3.2.3 lets it, and the body is what counts."""
    headers = STRUCTURED | HEADERS | {"ce-type": "not.this"}
    status, _, receipt = await api.post(EVENTS, CLOUDEVENT, headers=headers)
    assert (status, receipt["event"]) == (202, "post.published")


async def test_a_batch_of_cloudevents_is_kept_whole(api):
    """All or none, like every batch, with a pair that comes twice kept once."""
    batch = [CLOUDEVENT, CLOUDEVENT | {"id": "2"}, CLOUDEVENT]
    status, _, answer = await api.post(BATCH, batch, headers=BATCHED)
    assert status == 202
    assert [receipt["duplicate"] for receipt in answer["events"]] == [False, False, True]
    assert len(await api.stored()) == 2
    assert (await api.post(BATCH, [], headers=BATCHED))[::2] == (202, {"events": []})


# What differs from a good event, and every mistake it is told, word for word. None takes a member away.
BAD = {
    "the older version": ({"specversion": "0.3"}, [("specversion", VERSION)]),
    "a version that is a number": ({"specversion": 1.0}, [("specversion", VERSION)]),
    "no version": ({"specversion": None}, [("specversion", MISSING)]),
    "no type": ({"type": None}, [("type", MISSING)]),
    "no source": ({"source": None}, [("source", MISSING)]),
    "no id": ({"id": None}, [("id", MISSING)]),
    "an empty id": ({"id": ""}, [("id", TEXT)]),
    "an id that is a number": ({"id": 5}, [("id", TEXT)]),
    "an empty source": ({"source": ""}, [("source", TEXT)]),
    "a type with a slash": ({"type": "com.example/posts"}, [("type", TYPE)]),
    "a type that is a number": ({"type": 1}, [("type", TYPE)]),
    "our own type": (
        {"type": "relay.endpoint.down"},
        [("type", "relay.* is the relay's own: choose another name")],
    ),
    "a time without a zone": ({"time": "2026-01-15T10:00:00"}, [("time", TIME)]),
    "a day there is not": ({"time": "2026-02-30T10:00:00Z"}, [("time", TIME)]),
    "an empty subject": ({"subject": ""}, [("subject", KEY)]),
    "a long subject": ({"subject": "x" * 256}, [("subject", KEY)]),
    "bytes": (
        {"data": None, "data_base64": "AAEC"},
        [("data_base64", "only JSON data is taken: send it as data")],
    ),
    "text that is no JSON": (
        {"datacontenttype": "text/xml", "data": "<a/>"},
        [("datacontenttype", JSON_ONLY)],
    ),
    "a type of content that is a number": ({"datacontenttype": 7}, [("datacontenttype", JSON_ONLY)]),
    "another character set": (
        {"datacontenttype": "application/json; charset=latin-1"},
        [("datacontenttype", "must be JSON in UTF-8")],
    ),
    "an integer too large": (
        {"data": {"a": [2**64]}},
        [
            (
                "data/a/0",
                "an integer must be from -2^63 to 2^64-1 to stay exact; send a larger one as a string",
            )
        ],
    ),
    "everything at once": (
        {
            "specversion": "2.0",
            "id": None,
            "source": 5,
            "type": "a b",
            "time": "today",
            "subject": ["k"],
            "datacontenttype": "text/plain",
            "data_base64": "AA==",
            "data": -(2**63) - 1,
        },
        [
            ("specversion", VERSION),
            ("id", MISSING),
            ("source", TEXT),
            ("type", TYPE),
            ("time", TIME),
            ("subject", KEY),
            ("datacontenttype", JSON_ONLY),
            ("data_base64", "only JSON data is taken: send it as data"),
            ("data", "an integer must be from -2^63 to 2^64-1 to stay exact; send a larger one as a string"),
        ],
    ),
}


def exactly(content: object) -> bytes:
    """Write JSON with integers that orjson does not know."""
    return json.dumps(content).encode()


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_cloudevent_is_told_all_its_mistakes_by_its_own_names(api, name):
    """A producer knows `type` and `time`; `event` and `timestamp` are words it never sent."""
    change, mistakes = BAD[name]
    bad = CLOUDEVENT | change

    status, headers, problem = await api.post(EVENTS, exactly(bad), headers=STRUCTURED)

    assert status == 422
    assert headers["Content-Type"] == "application/problem+json"
    assert [(each["pointer"], each["detail"]) for each in problem["errors"]] == [
        (f"#/{place}", detail) for place, detail in mistakes
    ]
    good = CLOUDEVENT | {"id": "2"}
    status, _, problem = await api.post(BATCH, exactly([good, bad, good, bad]), headers=BATCHED)
    assert status == 422
    assert [(each["pointer"], each["detail"]) for each in problem["errors"]] == [
        (f"#/{index}/{place}", detail) for index in (1, 3) for place, detail in mistakes
    ]
    assert await api.stored() == []
    assert api.woken == []


# Headers (None takes one away), body, and every mistake with the header it is in.
BAD_BINARY = {
    "the older version": ({"ce-specversion": "0.3"}, b"1", [("ce-specversion", VERSION)]),
    "only a type": (
        dict.fromkeys(("ce-specversion", "ce-source", "ce-id")),
        b"1",
        [("ce-specversion", MISSING), ("ce-id", MISSING), ("ce-source", MISSING)],
    ),
    "only an extension": (
        dict.fromkeys(HEADERS) | {"ce-other": "1"},
        b"1",
        [("ce-specversion", MISSING), ("ce-id", MISSING), ("ce-source", MISSING), ("ce-type", MISSING)],
    ),
    "an empty id": ({"ce-id": ""}, b"1", [("ce-id", TEXT)]),
    "a bad type": ({"ce-type": "a%20b"}, b"1", [("ce-type", TYPE)]),
    "a bad time": ({"ce-time": "today"}, b"1", [("ce-time", TIME)]),
    "a subject with a line break": ({"ce-subject": "a%0Ab"}, b"1", [("ce-subject", KEY)]),
    "a space in too many bytes": ({"ce-subject": "%C0%A0"}, b"1", [("ce-subject", UTF_8)]),
    "half a character": ({"ce-id": "%E2%82"}, b"1", [("ce-id", UTF_8)]),
    "an extension that is no text": ({"ce-other": "%ff"}, b"1", [("ce-other", UTF_8)]),
    "text": ({"Content-Type": "text/plain"}, b"hello", [("content-type", JSON_ONLY)]),
    "latin-1": (
        {"Content-Type": "application/json; charset=latin-1"},
        b"1",
        [("content-type", "must be JSON in UTF-8")],
    ),
    "no content type": ({"Content-Type": None}, b"1", [("content-type", JSON_ONLY)]),
    "an integer too large": (
        {},
        b'{"a": 18446744073709551616}',
        [("data/a", "an integer must be from -2^63 to 2^64-1 to stay exact; send a larger one as a string")],
    ),
    "everything at once": (
        {"ce-specversion": "", "ce-type": "relay.x", "ce-time": "", "Content-Type": "image/png"},
        b"\x89PNG",
        [
            ("ce-specversion", VERSION),
            ("ce-type", "relay.* is the relay's own: choose another name"),
            ("ce-time", TIME),
            ("content-type", JSON_ONLY),
        ],
    ),
}


@pytest.mark.parametrize("name", BAD_BINARY)
async def test_a_bad_binary_cloudevent_is_told_which_headers_are_wrong(api, name):
    """Its attributes stand nowhere else, so a pointer into the body would lead nowhere."""
    change, body, mistakes = BAD_BINARY[name]
    headers = {name: value for name, value in (HEADERS | change).items() if value is not None}
    headers.setdefault("Content-Type", "application/json")
    skip = {"Content-Type"} if change.get("Content-Type", "") is None else set()
    if skip:
        headers["Content-Type"] = None  # the client's own default is none either

    status, _, problem = await api.post(EVENTS, body, headers=headers, skip_auto_headers=skip)

    assert status == 422
    assert [(each["pointer"], each["detail"]) for each in problem["errors"]] == [
        (f"#/{place}", detail) for place, detail in mistakes
    ]
    assert await api.stored() == []


@pytest.mark.parametrize(
    ("path", "content", "headers", "expected"),
    [
        (EVENTS, [CLOUDEVENT], STRUCTURED, (422, "#")),
        (EVENTS, "text", STRUCTURED, (422, "#")),
        (EVENTS, EVENT, STRUCTURED, (422, "#/specversion")),
        (EVENTS, CLOUDEVENT, {}, (422, "#/specversion")),  # an ordinary event has no such member
        (EVENTS, b"{nope", STRUCTURED, (400, None)),
        (EVENTS, b"{nope", HEADERS, (400, None)),
        (EVENTS, b"", STRUCTURED, (400, None)),
        (EVENTS, [CLOUDEVENT], BATCHED, (415, None)),
        (EVENTS, b"x", {"Content-Type": "application/cloudevents+avro"}, (415, None)),
        (EVENTS, b"x", HEADERS | {"Content-Type": "application/cloudevents+avro"}, (415, None)),
        (EVENTS, CLOUDEVENT | {"data": "x" * 1000}, STRUCTURED, (413, None)),
        (EVENTS, "x" * 1000, HEADERS, (413, None)),
        (BATCH, CLOUDEVENT, BATCHED, (422, "#")),
        (BATCH, {"events": [CLOUDEVENT]}, BATCHED, (422, "#")),
        (BATCH, [CLOUDEVENT, 7], BATCHED, (422, "#/1")),
        (BATCH, b"[nope", BATCHED, (400, None)),
        (BATCH, [CLOUDEVENT], STRUCTURED, (415, None)),
        (BATCH, [CLOUDEVENT] * 1001, BATCHED, (422, "#")),
        (BATCH, [CLOUDEVENT, CLOUDEVENT | {"data": "x" * 1000}], BATCHED, (413, "#/1")),
    ],
)
async def test_what_is_no_cloudevent_at_all_is_refused(api, path, content, headers, expected):
    """The forms have one media type and one path each, and the same bounds as every event."""
    status, answer_headers, problem = await api.post(path, content, headers=headers)
    assert answer_headers["Content-Type"] == "application/problem+json"
    pointer = problem["errors"][0]["pointer"] if "errors" in problem else None
    assert (status, pointer) == expected
    assert await api.stored() == []


async def test_the_catalogue_speaks_of_the_attribute_too(api):
    """What is found later than the form keeps the sender's names as well."""
    schema = {"type": "object", "required": ["postId"], "properties": {"event": {"type": "string"}}}
    api.state.ingest._catalogue = Catalogue([EventType(type="post.published", schema=schema)])
    wrong_type, wrong_data = {"type": "post.publishd"}, {"data": {"postId": 1, "event": 5}}
    for path, content, headers, pointers in (
        (EVENTS, CLOUDEVENT | wrong_type, STRUCTURED, ["#/type"]),
        (EVENTS, CLOUDEVENT | wrong_data, STRUCTURED, ["#/data/event"]),
        (BATCH, [CLOUDEVENT, CLOUDEVENT | wrong_type], BATCHED, ["#/1/type"]),
        (EVENTS, {"postId": 1}, HEADERS | {"ce-type": "post.publishd"}, ["#/ce-type"]),
        (EVENTS, {"postId": 1, "event": 5}, HEADERS, ["#/data/event"]),
        (EVENTS, {"event": "post.publishd", "data": 1}, {}, ["#/event"]),
    ):
        status, _, problem = await api.post(path, content, headers=headers)
        assert (status, [each["pointer"] for each in problem["errors"]]) == (422, pointers)
    assert await api.stored() == []
