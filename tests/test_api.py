"""The API over a real socket: what is taken, what is refused and how, and what a refusal leaves behind."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import orjson
import pytest
from multidict import CIMultiDict

from relay.api import bodies, make_app
from relay.api.guard import LOOPBACK_HOSTS, Access
from relay.api.state import State
from relay.catalogue import Catalogue
from relay.config import Address
from relay.ingest import Ingest
from relay.listening import site
from relay.model import Secret
from relay.outbox import Backlog
from relay.subscription import Subscriptions
from tests.clock import MovedClock
from tests.lanes import endpoint

EVENT = {"event": "post.published", "data": {"postId": "post_abc123"}}


@dataclass
class Api:
    """A running API and a client for it."""

    url: str
    state: State
    client: aiohttp.ClientSession
    woken: list[str] = field(default_factory=list)

    async def post(self, path: str, content: object = None, **options: object):
        """Return status, headers and parsed body."""
        if content is not None:
            options["data"] = content if isinstance(content, bytes) else orjson.dumps(content)
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        headers = {name: value for name, value in headers.items() if value is not None}
        async with self.client.post(self.url + path, headers=headers, **options) as answer:
            return answer.status, answer.headers, orjson.loads(await answer.read())

    async def get(self, path: str, **options: object):
        async with self.client.get(self.url + path, **options) as answer:
            body = await answer.read()
            return answer.status, orjson.loads(body) if body[:1] in b"{[" else body.decode()

    async def stored(self) -> list[str]:
        """Return the ids of all events in the outbox."""
        _, page = await self.get("/v1/events")
        return [event["id"] for event in page["data"]]


async def open_api(outbox, tokens=(), most=100) -> AsyncIterator[Api]:
    woken: list[str] = []
    endpoints = [
        endpoint("main", events=("post.*", "account.connected")),
        endpoint("other", events=("*",)),
    ]
    ingest = Ingest(
        outbox=outbox, subscriptions=Subscriptions(endpoints), clock=MovedClock(), wake=woken.extend
    )
    state = State(
        outbox=outbox,
        ingest=ingest,
        endpoints=None,
        catalogue=Catalogue([]),
        sender=None,
        clock=MovedClock(),
        wake=woken.extend,
        max_event_size=1000,
    )
    app = make_app(state, Access(LOOPBACK_HOSTS, tokens))
    address = Address(host="127.0.0.1", port=0)
    async with site(app, address, most) as (_, port), aiohttp.ClientSession() as client:
        yield Api(url=f"http://127.0.0.1:{port}", state=state, client=client, woken=woken)


@pytest.fixture
async def api(outbox) -> AsyncIterator[Api]:
    async for each in open_api(outbox):
        yield each


@pytest.fixture
async def guarded(outbox) -> AsyncIterator[Api]:
    async for each in open_api(outbox, tokens=(Secret("sk_one"), Secret("sk_two"))):
        yield each


async def test_an_event_is_answered_with_its_receipt_and_wakes_who_wants_it(api):
    status, headers, receipt = await api.post("/v1/events", EVENT)

    assert status == 202
    assert headers["Content-Type"] == "application/json"
    assert receipt == {
        "id": receipt["id"],
        "event": "post.published",
        "timestamp": "2026-01-15T10:00:00.000Z",
        "endpoints": ["main", "other"],
        "duplicate": False,
    }
    assert receipt["id"].startswith("evt_")
    assert "." not in receipt["id"]
    assert sorted(api.woken) == ["main", "other"]


async def test_everything_of_a_submission_is_kept(api):
    event = EVENT | {"timestamp": "2025-12-31T23:59:60+05:30", "key": "k1", "to": ["other"]}
    _, _, receipt = await api.post("/v1/events", event)
    assert receipt["endpoints"] == ["other"]

    status, story = await api.get(f"/v1/events/{receipt['id']}")

    assert status == 200
    assert story == {
        "id": receipt["id"],
        "event": "post.published",
        "timestamp": "2025-12-31T23:59:60+05:30",
        "data": {"postId": "post_abc123"},
        "accepted_at": "2026-01-15T10:00:00.000Z",
        "deliveries": [
            {
                "endpoint": "other",
                "state": "pending",
                "attempts": [],
                "next_attempt_at": "2026-01-15T10:00:00.000Z",
            }
        ],
    }


async def test_an_event_nobody_wants_is_kept_all_the_same(api):
    api.state.ingest.subscriptions = Subscriptions([])
    status, _, receipt = await api.post("/v1/events", EVENT)
    assert (status, receipt["endpoints"]) == (202, [])
    assert await api.stored() == [receipt["id"]]


async def test_ids_sort_by_acceptance(api):
    ids = [(await api.post("/v1/events", EVENT))[2]["id"] for _ in range(50)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 50


DATA = "#/data"
# What is posted, the status, and every mistake it is told, word for word.
BAD = {
    "not JSON": (b'{"event": nope}', 400, None),
    "no body": (b"", 400, None),
    "NaN": (b'{"event": "a", "data": NaN}', 400, None),
    "a number beyond doubles": (b'{"event": "a", "data": 1e400}', 400, None),
    "a lone surrogate": (b'{"event": "a", "data": "\\ud800"}', 400, None),
    "not UTF-8": (b'{"event": "a", "data": "\xff"}', 400, None),
    "a list": ([], 422, [("#", "must be an object with the members event and data")]),
    "nothing in it": ({}, 422, [("#/event", "is missing"), ("#/data", "is missing")]),
    "an unknown member": (
        EVENT | {"dta": 1},
        422,
        [("#/dta", "is not a member of an event; did you mean 'data'?")],
    ),
    "a type with a space": (
        EVENT | {"event": "post published"},
        422,
        [("#/event", "must be 1 to 128 of A-Z a-z 0-9 _ - in dot-separated parts, like post.published")],
    ),
    "a type that ends in a line break": (
        EVENT | {"event": "post.published\n"},
        422,
        [("#/event", "must be 1 to 128 of A-Z a-z 0-9 _ - in dot-separated parts, like post.published")],
    ),
    "our own type": (
        EVENT | {"event": "relay.endpoint.down"},
        422,
        [("#/event", "relay.* is the relay's own: choose another name")],
    ),
    "a wrong timestamp": (
        EVENT | {"timestamp": "2026-02-30T10:00:00Z"},
        422,
        [("#/timestamp", "must be a date and time of RFC 3339, like 2026-01-15T10:00:00.000Z")],
    ),
    "an unknown endpoint": (
        EVENT | {"to": ["main", "mian"]},
        422,
        [("#/to/1", "there is no endpoint 'mian'; did you mean 'main'?")],
    ),
    "an empty key": (EVENT | {"key": ""}, 422, [("#/key", "must be 1 to 255 printable characters")]),
    "everything at once": (
        {"event": "", "data": 2, "to": "main", "key": 5, "timestamp": None, "more": 1},
        422,
        [
            ("#/more", "is not a member of an event"),
            ("#/event", "must be 1 to 128 of A-Z a-z 0-9 _ - in dot-separated parts, like post.published"),
            ("#/timestamp", "must be a date and time of RFC 3339, like 2026-01-15T10:00:00.000Z"),
            ("#/key", "must be 1 to 255 printable characters"),
            ("#/to", "must be a list of endpoint ids; without it every subscribed endpoint gets the event"),
        ],
    ),
    "too large": (EVENT | {"data": "x" * 1000}, 413, None),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_submission_gets_its_exact_error_and_leaves_nothing(api, name):
    content, expected, mistakes = BAD[name]

    status, headers, problem = await api.post("/v1/events", content)

    assert (status, problem["status"]) == (expected, expected)
    assert headers["Content-Type"] == "application/problem+json"
    assert problem["title"]
    assert problem["type"].startswith("/problems/")
    assert problem["detail"]
    if mistakes is not None:
        assert [(each["pointer"], each["detail"]) for each in problem["errors"]] == mistakes
    assert await api.stored() == []
    assert api.woken == []


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("18446744073709551615", True),
        ("-9223372036854775808", True),
        ("18446744073709551616", False),
        ("-9223372036854775809", False),
        ("[" * 64 + "]" * 64, True),
        ("[" * 65 + "]" * 65, False),
    ],
)
async def test_values_survive_exactly_or_are_refused(api, text, ok):
    status, _, answer = await api.post("/v1/events", f'{{"event":"a","data":{text}}}'.encode())
    if ok:
        assert status == 202
        async with api.client.get(f"{api.url}/v1/events/{answer['id']}") as story:
            assert f'"data":{text},'.encode() in await story.read()
    else:
        assert status == 422
        assert answer["errors"][0]["pointer"].startswith("#/data")
        assert await api.stored() == []


async def test_the_same_idempotency_key_gives_the_first_answer_again(api):
    headers = {"Idempotency-Key": "key-1"}
    status, _, first = await api.post("/v1/events", EVENT, headers=headers)
    assert status == 202
    for spelling in ("key-1", '"key-1"'):
        status, _, again = await api.post("/v1/events", EVENT, headers={"Idempotency-Key": spelling})
        assert status == 200
        assert again == first | {"duplicate": True}
    status, _, problem = await api.post("/v1/events", EVENT | {"key": "other"}, headers=headers)
    assert status == 422
    assert "used before for other content" in problem["detail"]
    assert await api.stored() == [first["id"]]


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", '"', "ü"])
async def test_a_bad_idempotency_key_is_refused(api, key):
    status, _, problem = await api.post("/v1/events", EVENT, headers={"Idempotency-Key": key})
    assert status == 422
    assert "Idempotency-Key" in problem["detail"]
    assert await api.stored() == []


async def test_a_batch_is_kept_whole(api):
    batch = {"events": [EVENT, EVENT | {"idempotency_key": "k"}, EVENT | {"idempotency_key": "k"}]}
    status, _, answer = await api.post("/v1/events/batch", batch)
    assert status == 202
    assert [receipt["duplicate"] for receipt in answer["events"]] == [False, False, True]
    assert len(await api.stored()) == 2


async def test_an_idempotency_key_that_would_be_ignored_is_refused(api):
    """Whoever sends it relies on it."""
    for path, content in (("/v1/events/batch", {"events": [EVENT]}), ("/v1/events", EVENT)):
        headers = CIMultiDict(
            [("Idempotency-Key", "k"), ("Idempotency-Key", "l"), ("Content-Type", "application/json")]
        )
        async with api.client.post(api.url + path, data=orjson.dumps(content), headers=headers) as answer:
            assert answer.status == 422
            assert b"Idempotency-Key" in await answer.read()
    assert await api.stored() == []


async def test_a_client_that_hangs_up_in_the_middle_is_no_fault_of_ours(api, caplog):
    with socket.create_connection(api.url.removeprefix("http://").split(":")) as raw:
        raw.sendall(
            b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.05)
    assert await api.stored() == []
    assert "request_failed" not in caplog.text


async def test_a_batch_can_be_lines(api):
    lines = b"\n".join(orjson.dumps(EVENT | {"key": f"{n}"}) for n in range(3)) + b"\r\n\n"
    status, _, answer = await api.post(
        "/v1/events/batch", lines, headers={"Content-Type": "application/x-ndjson"}
    )
    assert status == 202
    assert len(answer["events"]) == 3


async def test_one_bad_event_refuses_the_batch_and_every_bad_one_is_named(api):
    batch = {"events": [EVENT, {"event": "x"}, EVENT, EVENT | {"idempotency_key": ""}]}
    status, _, problem = await api.post("/v1/events/batch", batch)
    assert status == 422
    assert [each["pointer"] for each in problem["errors"]] == ["#/events/3/idempotency_key"]
    batch["events"].pop()
    status, _, problem = await api.post("/v1/events/batch", {"events": [*batch["events"], 7]})
    assert [each["pointer"] for each in problem["errors"]] == ["#/events/1/data", "#/events/3"]
    status, _, problem = await api.post(
        "/v1/events/batch",
        b'{"event":"a","data":1}\n{nope\n',
        headers={"Content-Type": "application/x-ndjson"},
    )
    assert status == 400
    assert problem["errors"][0]["pointer"] == "#/1"
    assert await api.stored() == []


async def test_a_conflict_in_a_batch_names_its_place(api):
    await api.post("/v1/events/batch", {"events": [EVENT | {"idempotency_key": "k"}]})
    batch = {"events": [EVENT, EVENT | {"idempotency_key": "k", "key": "other"}]}
    status, _, problem = await api.post("/v1/events/batch", batch)
    assert status == 422
    assert [each["pointer"] for each in problem["errors"]] == ["#/events/1"]
    assert len(await api.stored()) == 1


async def test_a_batch_is_bounded_in_number_and_each_of_its_events_in_size(api):
    status, _, problem = await api.post("/v1/events/batch", {"events": [EVENT] * 1001})
    assert (status, "1000 that are taken at once" in problem["detail"]) == (422, True)
    status, _, problem = await api.post("/v1/events/batch", {"events": [EVENT, EVENT | {"data": "x" * 999}]})
    assert (status, problem["errors"][0]["pointer"]) == (413, "#/events/1")
    deep = b'{"events": [{"event": "a", "data": ' + b"[" * 64 + b'"' + b"x" * 999 + b'"' + b"]" * 64 + b"}]}"
    status, _, problem = await api.post("/v1/events/batch", deep)
    assert (status, problem["errors"][0]["pointer"]) == (413, "#/events/0")
    assert await api.stored() == []


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:8484"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({"Content-Type": None}, 415),
    ],
)
async def test_what_a_browser_could_be_tricked_into_is_refused(api, headers, expected):
    data = orjson.dumps(EVENT)
    skip = {"Content-Type"} if headers.get("Content-Type", "") is None else set()
    status, answer_headers, problem = await api.post(
        "/v1/events", data, headers=headers, skip_auto_headers=skip
    )
    assert (status, problem["status"]) == (expected, expected)
    assert answer_headers["Content-Type"] == "application/problem+json"
    assert await api.stored() == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8484"])
async def test_every_name_of_this_machine_is_a_host_of_ours(api, host):
    status, _, _ = await api.post("/v1/events", EVENT, headers={"Host": host})
    assert status == 202


async def test_our_own_pages_may_talk_to_us(api):
    headers = {"Origin": api.url, "Sec-Fetch-Site": "same-origin"}
    assert (await api.post("/v1/events", EVENT, headers=headers))[0] == 202


@pytest.mark.parametrize(
    "authorization", [None, "Bearer sk_wrong", "Bearer", "Basic sk_one", "sk_one", "Bearer ü"]
)
async def test_without_a_right_token_nothing_is_told_or_kept(guarded, authorization):
    headers = {"Authorization": authorization} if authorization else {}
    status, answer_headers, _ = await guarded.post("/v1/events", EVENT, headers=headers)
    assert (status, answer_headers["WWW-Authenticate"]) == (401, "Bearer")
    status, _ = await guarded.get("/v1/events", headers=headers)
    assert status == 401
    assert await guarded.state.outbox.backlog() == dict.fromkeys(
        ("main", "other"), Backlog(pending=0, dead=0)
    )


@pytest.mark.parametrize("token", ["sk_one", "sk_two"])
async def test_every_configured_token_is_valid(guarded, token):
    status, _, _ = await guarded.post("/v1/events", EVENT, headers={"Authorization": f"Bearer {token}"})
    assert status == 202
    assert (await guarded.get("/readyz"))[0] == 200, "health needs no token"


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("GET", "/nowhere", 404), ("DELETE", "/v1/events", 405), ("GET", "/v1/events/evt_none", 404)],
)
async def test_the_frameworks_own_errors_speak_the_same_format(api, method, path, expected):
    async with api.client.request(method, api.url + path) as answer:
        problem = await answer.json(content_type="application/problem+json")
        assert (answer.status, problem["status"]) == (expected, expected)
        if expected == 405:
            assert answer.headers["Allow"] == "GET,POST"


async def test_a_body_that_does_not_come_is_given_up(api, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
    reader, writer = await asyncio.open_connection(*api.url.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: 50\r\n\r\n{")
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    await writer.wait_closed()
    assert await api.stored() == []


async def test_a_body_announced_too_large_is_refused_before_it_is_sent(api):
    with socket.create_connection(api.url.removeprefix("http://").split(":")) as raw:
        raw.sendall(
            b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000000\r\n\r\n"
        )
        answer = await asyncio.to_thread(raw.recv, 100)
    assert answer.startswith(b"HTTP/1.1 413")


async def test_a_stopping_relay_says_when_to_come_again(api):
    api.state.refusing = "the relay is stopping: submit again in a moment"
    status, headers, problem = await api.post("/v1/events", EVENT)
    assert (status, headers["Retry-After"]) == (503, "5")
    assert problem["detail"] == "the relay is stopping: submit again in a moment"
    assert await api.stored() == []


async def test_readiness_tells_why_not_and_liveness_does_not_care(api):
    assert await api.get("/readyz") == (200, "ok\n")
    api.state.unready = "the relay is stopping"
    status, problem = await api.get("/readyz")
    assert (status, problem["detail"]) == (503, "the relay is stopping")
    assert await api.get("/livez") == (200, "ok\n")


async def test_events_are_listed_page_by_page(api):
    ids = [(await api.post("/v1/events", EVENT))[2]["id"] for _ in range(5)]
    _, first = await api.get("/v1/events?limit=2")
    _, second = await api.get(f"/v1/events?limit=200&cursor={first['next_cursor']}")
    assert [each["id"] for each in first["data"] + second["data"]] == ids[::-1]
    assert second["next_cursor"] is None


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "cursor=-1", "cursor=a", "nope=1"])
async def test_a_wrong_query_is_refused(api, query):
    status, problem = await api.get(f"/v1/events?{query}")
    assert (status, len(problem["errors"])) == (422, 1)
