"""The webhook service of a running relay: real processes, real TLS receivers, kill -9 in the middle."""

import asyncio
import hashlib
import hmac
import http.client
import json
import random
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from pathlib import Path

import orjson
import pytest
from standardwebhooks import Webhook

from relay.catalogue import MOST_PROBLEMS, Catalogue, EventType, SchemaError, validator
from tests.process import RelayProcess, free_port, relay_process
from tests.receiver import Answer, Receiver, Request
from tests.test_journey import trusting

SETTINGS = "/v1/webhooks/settings"
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
TOKEN = "sk_test_1"

# The text continues the table [egress] that every relay of these tests has.
CONFIG = f"""allow_private_for_api = true
[logging]
level = "debug"
[delivery]
retry_schedule = []
[[endpoints]]
id = "main"
url = "https://config.receiver.test/hook?key=abc"
events = ["account.*"]
secret = "{SECRET}"
"""
CATALOGUE = """
[events."post.published"]
description = "A post went out."
sample = { postId = "post_abc123", likes = 1.0 }
schema = { type = "object", required = ["postId"], properties = { postId = { type = "string" } } }
[events."post.failed"]
[events."account.connected"]
sample = { accountId = "acc_1" }
"""
INTERNAL = (
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.0.1",  # noqa: S104 - never bound
    "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "[::]", "[::1]", "[fd00:ec2::254]",
    "[fe80::1]", "[fc00::1]", "[::ffff:7f00:1]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]",
)  # fmt: skip


class Client:
    """Talks to a relay, and keeps everything it was told."""

    def __init__(self, relay: RelayProcess, headers: Mapping[str, str] | None = None) -> None:
        self.relay = relay
        self.headers = headers
        self.told: list[tuple[str, str]] = []  # what was asked, the whole answer

    async def __call__(self, method: str, path: str, content: object = None) -> tuple[int, dict]:
        status, answer = await asyncio.to_thread(self.relay.call, method, path, content, self.headers)
        self.told.append((f"{method} {path}", orjson.dumps(answer).decode()))
        return status, answer

    async def ok(self, method: str, path: str, content: object = None) -> dict:
        status, answer = await self(method, path, content)
        assert 200 <= status < 300, (method, path, status, answer)
        return answer

    async def refused(self, method: str, path: str, content: object = None) -> tuple[int, list[str], str]:
        """Return the status of a refusal, where its mistakes are, and its sentence."""
        status, answer = await self(method, path, content)
        assert answer["status"] == status >= 400, answer
        return status, [each["pointer"] for each in answer.get("errors", [])], answer["detail"]

    async def post(self, type_: str = "post.published", **data: object) -> dict:
        return await self.ok("POST", "/v1/events", {"event": type_, "data": {"postId": "p"} | data})

    async def until(self, path: str, condition: Callable[[dict], bool], within: float = 10.0) -> dict:
        """Ask again until the answer is as it should be."""
        answer: dict = {}
        try:
            async with asyncio.timeout(within):
                while not condition(answer := await self.ok("GET", path)):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{path} stayed {answer}") from None
        return answer

    async def until_state(self, event_id: str, endpoint: str, state: str) -> dict:
        """Return the delivery once it has come to this state."""

        def of(story: dict) -> dict:
            (delivery,) = [each for each in story["deliveries"] if each["endpoint"] == endpoint]
            return delivery

        return of(await self.until(f"/v1/events/{event_id}", lambda story: of(story)["state"] == state))

    async def restart(self, *, kill: bool = True) -> None:
        await asyncio.to_thread(self.relay.kill if kill else self.relay.stop)
        await asyncio.to_thread(self.relay.start)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as each:
        yield each


@pytest.fixture
async def api(tmp_path: Path, receiver: Receiver) -> AsyncIterator[Client]:
    """A relay without a catalogue."""
    with relay_process(tmp_path, CONFIG, trusting(receiver, tmp_path)) as relay:
        yield Client(relay)


@pytest.fixture
async def catalogued(tmp_path: Path, receiver: Receiver) -> AsyncIterator[Client]:
    with relay_process(tmp_path, CONFIG + CATALOGUE, trusting(receiver, tmp_path)) as relay:
        yield Client(relay)


def mine(receiver: Receiver, **changes: object) -> dict[str, object]:
    return {"id": "mine", "url": receiver.url, "events": ["post.*"]} | changes


def hexed(secret: str, request: Request) -> bool:
    """Verify the way the original service's samples do."""
    ours = hmac.new(secret.encode(), request.body, hashlib.sha256).hexdigest()
    return request.headers["X-SocialSyncerAPI-Signature"] == ours


def ids(page: dict) -> list[str]:
    return [each["id"] for each in page["data"]]


# The life of an endpoint


async def test_the_whole_life_of_an_endpoint_with_kills_in_the_middle(api, receiver):
    status, made = await api("POST", SETTINGS, mine(receiver))
    secret = made["secret"]
    assert status == 201
    assert secret.startswith("whsec_")

    receipt = await api.post()
    assert receipt["endpoints"] == ["mine"]
    (first,) = await receiver.wait_for(1)
    assert Webhook(secret).verify(first.body, dict(first.headers))["data"] == {"postId": "p"}
    assert hexed(secret, first)
    await api.until_state(receipt["id"], "mine", "delivered")

    await api.restart()
    paused = await api.ok("POST", f"{SETTINGS}/mine/pause")
    assert paused["state"] == "paused"
    waiting = await api.post()
    await api.restart()
    shown = await api.ok("GET", f"{SETTINGS}/mine")
    assert (shown["state"], shown["pending"], len(receiver.requests)) == ("paused", 1, 1)
    assert shown["oldest_pending_seconds"] > 0
    assert (await api.ok("POST", f"{SETTINGS}/mine/resume"))["state"] == "active"
    second = (await receiver.wait_for(2))[1]
    assert second.headers["webhook-id"] == waiting["id"]
    assert Webhook(secret).verify(second.body, dict(second.headers))

    rotated = await api.ok("POST", f"{SETTINGS}/mine/rotate-secret", {"overlap": "1h"})
    await api.restart()
    await api.post()
    third = (await receiver.wait_for(3))[2]
    for each in (secret, rotated["secret"]):
        assert Webhook(each).verify(third.body, dict(third.headers))
    assert hexed(secret, third), "a scheme with room for one signs with the old one"
    assert not hexed(rotated["secret"], third)

    await api.ok("PATCH", f"{SETTINGS}/mine", {"url": receiver.url + "/moved", "headers": {"X-Mine": "v"}})
    await api.restart()
    await api.post()
    fourth = (await receiver.wait_for(4))[3]
    assert (fourth.path, fourth.headers["X-Mine"]) == ("/hook/moved", "v")

    await api.ok("POST", f"{SETTINGS}/mine/pause")
    owed = await api.post()
    assert await api.ok("DELETE", f"{SETTINGS}/mine") == {"cancelled": 1}
    await api.restart()
    assert (await api.refused("GET", f"{SETTINGS}/mine"))[0] == 404
    assert (await api.post())["endpoints"] == []
    assert (await api.until_state(owed["id"], "mine", "cancelled"))["next_attempt_at"] is None

    status, back = await api("POST", SETTINGS, mine(receiver))
    assert (status, back["secret"] in {secret, rotated["secret"]}) == (201, False)
    replayed = await api.ok("POST", f"{SETTINGS}/mine/replay", {"state": "cancelled"})
    assert replayed == {"count": 1, "dry_run": False}
    fifth = (await receiver.wait_for(5))[4]
    assert fifth.headers["webhook-id"] == owed["id"]
    assert Webhook(back["secret"]).verify(fifth.body, dict(fifth.headers))


async def test_an_endpoint_is_shown_with_how_it_stands_and_what_it_was_told(api, receiver):
    receiver.answers(200, 500)
    made = await api.ok(
        "POST",
        SETTINGS,
        mine(
            receiver, url=f"{receiver.url}?token=t&flag", description="d", headers={"X-A": "1"}, timeout="90s"
        ),
    )
    for _ in range(2):
        await api.post()
    shown = await api.until(f"{SETTINGS}/mine", lambda each: each["dead"] == 1)
    for name in ("last_success_at", "last_failure_at"):
        datetime.fromisoformat(shown.pop(name))
    assert shown == {
        "id": "mine",
        "url": f"{receiver.url}?token=***&***",
        "events": ["post.*"],
        "source": "api",
        "state": "active",
        "pending": 0,
        "dead": 1,
        "oldest_pending_seconds": None,
        "last_error": "http_500",
        "description": "d",
        "format": "event",
        "signatures": ["standard", "socialsyncer"],
        "headers": {"X-A": "***"},
        "timeout": "1m30s",
        "retry_schedule": [],
        "concurrency": 32,
        "rate": None,
        "order": "none",
    }
    assert made.keys() - shown.keys() == {"secret", "last_success_at", "last_failure_at"}
    assert {each.path for each in receiver.requests} == {"/hook?token=t&flag"}, "masked for people only"


async def test_endpoints_of_the_config_and_of_the_api_stand_side_by_side(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    listed = await api.ok("GET", SETTINGS)
    assert listed["next_cursor"] is None
    assert [(each["id"], each["source"]) for each in listed["data"]] == [("main", "config"), ("mine", "api")]
    assert listed["data"][0]["url"] == "https://config.receiver.test/hook?key=***"


async def test_the_same_url_again_updates_and_shows_no_secret(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    upper = receiver.url.replace("https", "HTTPS")
    status, again = await api("POST", SETTINGS, {"url": upper, "events": ["account.connected"]})
    assert (status, again["id"], again["events"]) == (200, "mine", ["account.connected"])
    assert "secret" not in again
    assert len((await api.ok("GET", SETTINGS))["data"]) == 2


async def test_what_the_config_has_is_read_only_and_the_answer_says_why(api, receiver):
    changes = [
        ("POST", SETTINGS, mine(receiver, id="main")),
        ("POST", SETTINGS, mine(receiver, url="https://config.receiver.test:443/hook?key=abc", id=None)),
        ("PATCH", f"{SETTINGS}/main", {"description": "d"}),
        ("DELETE", f"{SETTINGS}/main", None),
        ("POST", f"{SETTINGS}/main/rotate-secret", None),
    ]
    before = await api.ok("GET", SETTINGS)
    for change in changes:
        refused = await api.refused(*change)
        assert refused == (409, [], "endpoint main is the config's: change it there, then reload")
    assert await api.ok("GET", SETTINGS) == before


async def test_the_configs_endpoints_are_paused_and_replayed_all_the_same(api):
    assert (await api.ok("POST", f"{SETTINGS}/main/pause"))["state"] == "paused"
    await api.post("account.connected")
    await api.restart()
    main = await api.ok("GET", f"{SETTINGS}/main")
    assert (main["state"], main["pending"]) == ("paused", 1)
    assert await api.ok("POST", f"{SETTINGS}/main/replay") == {"count": 0, "dry_run": False}


async def test_wrong_settings_are_refused_with_every_mistake_and_leave_nothing(api, receiver):
    wrong = mine(receiver, events=["a.*.b"], timeout=5, secret="", nope=1, client_key_file="/etc/key")
    status, pointers, _ = await api.refused("POST", SETTINGS, wrong)
    assert status == 422
    assert sorted(pointers) == ["#/client_key_file", "#/events/0", "#/nope", "#/secret", "#/timeout"]
    for body, expected in ((b"{", 400), (b"[]", 422), (b"", 400), (orjson.dumps({"url": receiver.url}), 422)):
        assert (await api.refused("POST", SETTINGS, body))[0] == expected
    assert ids(await api.ok("GET", SETTINGS)) == ["main"]


async def test_who_is_not_there_is_not_found(api):
    for method, path in (
        ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/resume"),
        ("POST", "/rotate-secret"), ("POST", "/replay"),
    ):  # fmt: skip
        refused = await api.refused(method, f"{SETTINGS}/nobody{path}", {})
        assert refused == (404, [], "there is no endpoint of this id"), (method, path)


async def test_an_overlap_that_is_no_time_is_refused(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    for overlap in ("24", 24, "-1h", "31d", "", {}):
        asked = {"overlap": overlap}
        refused = await api.refused("POST", f"{SETTINGS}/mine/rotate-secret", asked)
        assert refused[:2] == (422, ["#/overlap"]), overlap


async def test_a_rotation_says_until_when_both_sign(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    for overlap, hours in (({}, 24), ({"overlap": "90m"}, 24), ({"overlap": "36h"}, 36)):
        rotated = await api.ok("POST", f"{SETTINGS}/mine/rotate-secret", overlap)
        until = datetime.fromisoformat(rotated["overlap_until"])
        left = until - datetime.fromisoformat((await api.post("a.b"))["timestamp"])
        assert abs(left.total_seconds() - hours * 3600) < 60, "the latest end counts"
    ended = await api.ok("POST", f"{SETTINGS}/mine/rotate-secret", {"overlap": "0s"})
    assert ended["overlap_until"] is None


async def test_the_old_secret_stops_signing_when_the_overlap_ends(api, receiver):
    made = await api.ok("POST", SETTINGS, mine(receiver))
    rotated = await api.ok("POST", f"{SETTINGS}/mine/rotate-secret", {"overlap": "300ms"})
    async with asyncio.timeout(10):
        while True:
            sent = len(receiver.requests)
            await api.post()
            request = (await receiver.wait_for(sent + 1))[-1]
            if hexed(rotated["secret"], request):
                break
            assert hexed(made["secret"], request)
    assert Webhook(rotated["secret"]).verify(request.body, dict(request.headers))
    assert len(request.headers["webhook-signature"].split(" ")) == 1


# Test events


async def test_a_test_event_goes_out_now_once_signed_and_is_kept_nowhere(catalogued, receiver):
    api = catalogued
    made = await api.ok("POST", SETTINGS, mine(receiver))
    await api.ok("POST", f"{SETTINGS}/mine/pause")
    before = await api.ok("GET", f"{SETTINGS}/mine")
    receiver.answers(Answer(201, body=b"thanks"), Answer(410, body=b"\xff gone"))

    good = await api.ok("POST", "/v1/webhooks/test", {"event": "post.published"})
    bad = await api.ok("POST", "/v1/webhooks/test", {"event": "post.published", "endpoint": "mine"})

    milliseconds = good["data"][0].pop("milliseconds")
    assert 0 <= milliseconds < 10_000
    assert good == {
        "data": [{"endpoint": "mine", "ok": True, "status": 201, "error": None, "answer": "thanks"}]
    }
    assert (bad["data"][0]["ok"], bad["data"][0]["status"]) == (False, 410)
    assert bad["data"][0]["error"] == "http_410: the receiver answered 410"
    first, second = receiver.requests
    body = Webhook(made["secret"]).verify(first.body, dict(first.headers))
    assert body.keys() == {"event", "timestamp", "data"}
    assert first.body.endswith(b'"data":{"postId":"post_abc123","likes":1}}'), "as JavaScript writes it"
    assert hexed(made["secret"], first)
    assert first.headers["webhook-id"].startswith("evt_")
    assert first.headers["webhook-id"] != second.headers["webhook-id"]
    assert (await api.ok("GET", "/v1/events"))["data"] == []
    assert await api.ok("GET", f"{SETTINGS}/mine") == before, "paused as before, and nothing is noted"


async def test_a_test_event_reports_each_endpoint_and_says_why_one_failed(catalogued, receiver):
    api = catalogued
    await api.ok("POST", SETTINGS, mine(receiver))
    closed = f"https://127.0.0.1:{free_port()}/"
    await api.ok("POST", SETTINGS, mine(receiver, id="closed", url=closed))
    async with Receiver(host="localhost") as other_name:
        misnamed = f"https://127.0.0.1:{other_name.port}/"
        await api.ok("POST", SETTINGS, mine(receiver, id="misnamed", url=misnamed))
        own = f"https://localhost:{api.relay.port}/"
        await api.ok("POST", SETTINGS, mine(receiver, id="internal", url=own))
        answer = await api.ok("POST", "/v1/webhooks/test", {"event": "post.published"})
    assert [(each["endpoint"], each["ok"], each["error"]) for each in answer["data"]] == [
        ("closed", False, "conn_refused: nothing listens at the receiver's address"),
        ("internal", False, "blocked_address: the receiver's address is not one the relay may send to"),
        ("mine", True, None),
        ("misnamed", False, "tls_cert: the receiver's certificate does not verify"),
    ]


async def test_a_test_that_cannot_be_made_is_refused_with_the_reason(catalogued):
    for content, pointer, detail in (
        ({"event": "post.publishd"}, "#/event", "did you mean 'post.published'?"),
        ({"event": "zzz"}, "#/event", "is not in the catalogue"),
        ({}, "#/event", "must be a type of the catalogue"),
        ({"event": ["a"]}, "#/event", "must be a type of the catalogue"),
        ({"event": "post.published"}, "#/event", "nobody is subscribed to it"),
        ({"event": "post.failed"}, "#/event", "has no sample in the catalogue"),
        (
            {"event": "post.published", "endpoint": "main"},
            "#/endpoint",
            "is not subscribed to post.published",
        ),
        ({"event": "post.published", "endpoint": "nobody"}, "#/endpoint", "is not the id of an endpoint"),
        ({"event": "post.published", "endpoint": ["main"]}, "#/endpoint", "is not the id of an endpoint"),
        ({"event": "post.published", "to": ["main"]}, "#/to", "is unknown; known are event, endpoint"),
    ):
        status, pointers, sentence = await catalogued.refused("POST", "/v1/webhooks/test", content)
        assert (status, pointers) == (422, [pointer]), content
        assert detail in sentence


# The guard


async def test_an_endpoint_of_the_api_reaches_nothing_private_unless_the_config_says_so(tmp_path, receiver):
    """Whoever may call the API must not learn what listens behind it (contract 8, allow_private_for_api)."""
    with relay_process(tmp_path, "[delivery]\nretry_schedule = []", trusting(receiver, tmp_path)) as relay:
        api = Client(relay)
        for address in INTERNAL:
            internal = mine(receiver, url=f"https://{address}:{receiver.port}/")
            refused = await api.refused("POST", SETTINGS, internal)
            assert refused == (422, ["#/url"], "#/url holds an address that deliveries may not go to"), (
                address
            )
        await api.ok("POST", SETTINGS, mine(receiver, url=f"https://localhost:{receiver.port}/hook"))
        receipt = await api.post()
        delivery = await api.until_state(receipt["id"], "mine", "dead")
        assert [(each["error"], each["answer"]) for each in delivery["attempts"]] == [
            ("blocked_address", None)
        ]
        assert (await api.ok("GET", f"{SETTINGS}/mine"))["last_error"] == "blocked_address"
        # Which address and why is for the operator; whoever may call the API learns of the refusal only.
        assert "127.0.0.1 is loopback" in relay.log
        assert not any("loopback" in told for _, told in api.told)
    assert receiver.requests == []


# Replay


async def dead(api: Client, receiver: Receiver, count: int, type_: str = "post.published") -> list[str]:
    """Post events that the receiver refuses; return their ids once they are given up."""
    receiver.answers(*[500] * count)
    posted = [(await api.post(type_))["id"] for _ in range(count)]
    for event_id in posted:
        await api.until_state(event_id, "mine", "dead")
    return posted


async def test_what_was_given_up_is_counted_and_then_sent_again_at_the_pace_asked_for(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    early = await dead(api, receiver, 2)
    since = (await api.ok("GET", f"/v1/events/{early[1]}"))["accepted_at"]
    failed = await dead(api, receiver, 1, "post.failed")
    sent = len(receiver.requests)
    replay = f"{SETTINGS}/mine/replay"

    for asked, count in (
        ({}, 3),
        ({"state": "dead", "since": since, "until": None, "event": None}, 2),
        ({"until": since}, 1),
        ({"event": "post.failed"}, 1),
        ({"event": "nope"}, 0),
        ({"state": "delivered"}, 0),
        ({"state": "cancelled"}, 0),
    ):
        answer = await api.ok("POST", replay, asked | {"dry_run": True, "rate": "1/m"})
        assert answer == {"count": count, "dry_run": True}
    assert (await api.ok("GET", f"{SETTINGS}/mine"))["dead"] == 3, "a dry run changes nothing"

    assert (await api.ok("POST", replay, {"rate": "10/s"}))["count"] == 3
    requests = (await receiver.wait_for(sent + 3))[sent:]

    assert [each.headers["webhook-id"] for each in requests] == [*early, *failed]
    assert {each.headers["webhook-attempt"] for each in requests} == {"2"}
    assert requests[2].at - requests[0].at > 0.15, "two gaps of 100 ms"
    assert requests[0].body == receiver.requests[0].body
    for event_id in early:
        delivery = await api.until_state(event_id, "mine", "delivered")
        assert [(each["number"], each["error"]) for each in delivery["attempts"]] == [
            (1, "http_500"),
            (2, None),
        ]
    assert (await api.ok("GET", f"{SETTINGS}/mine"))["dead"] == 0


async def test_a_slow_replay_goes_on_after_a_kill(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    posted = await dead(api, receiver, 4)
    sent = len(receiver.requests)
    await api.ok("POST", f"{SETTINGS}/mine/replay", {"rate": "4/s"})
    await receiver.wait_for(sent + 1)
    await api.until_state(posted[0], "mine", "delivered")
    await api.restart()
    await receiver.wait_for(sent + 4)
    for event_id in posted:
        await api.until_state(event_id, "mine", "delivered")
    assert len(receiver.requests) == sent + 4


async def test_a_replay_that_cannot_be_read_is_refused_with_every_mistake(api):
    wrong = {
        "state": "pending",
        "since": "yesterday",
        "until": 5,
        "event": 1,
        "rate": "5",
        "dry_run": "yes",
        "x": 1,
    }
    status, pointers, _ = await api.refused("POST", f"{SETTINGS}/main/replay", wrong)
    assert status == 422
    assert sorted(pointers) == sorted(f"#/{name}" for name in wrong)


async def test_one_event_is_sent_again_to_all_or_to_one(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    await api.ok("POST", SETTINGS, mine(receiver, id="second", url=f"{receiver.url}2"))
    receipt = await api.post()
    replay = f"/v1/events/{receipt['id']}/replay"
    for endpoint in ("mine", "second"):
        await api.until_state(receipt["id"], endpoint, "delivered")

    assert await api.ok("POST", replay, {"endpoint": "second"}) == {"count": 1}
    await api.until_state(receipt["id"], "second", "delivered")
    assert [each.path for each in (await receiver.wait_for(3))[2:]] == ["/hook2"]
    assert await api.ok("POST", replay) == {"count": 2}
    requests = await receiver.wait_for(5)

    assert {each.headers["webhook-id"] for each in requests} == {receipt["id"]}
    attempts = [(each.path, each.headers["webhook-attempt"]) for each in requests]
    assert sorted(attempts) == [
        ("/hook", "1"),
        ("/hook", "2"),
        ("/hook2", "1"),
        ("/hook2", "2"),
        ("/hook2", "3"),
    ]
    assert (await api.refused("POST", replay, {"endpoint": "nobody"}))[:2] == (422, ["#/endpoint"])
    assert (await api.refused("POST", replay, {"endpoint": ["mine"]}))[:2] == (422, ["#/endpoint"])
    assert (await api.refused("POST", replay, {"endpoints": "mine"}))[0] == 422
    assert (await api.refused("POST", "/v1/events/evt_none/replay"))[0] == 404


# Looking


async def test_events_are_found_by_what_they_are_and_how_they_stand_page_by_page(api, receiver):
    await api.ok("POST", SETTINGS, mine(receiver))
    given_up = await dead(api, receiver, 3)
    arrived = (await api.post())["id"]
    await api.until_state(arrived, "mine", "delivered")
    nobodys = (await api.post("other.thing"))["id"]
    await api.ok("POST", f"{SETTINGS}/mine/pause")
    waiting = [(await api.post("post.failed"))["id"] for _ in range(3)]
    moment = (await api.ok("GET", f"/v1/events/{arrived}"))["accepted_at"]

    async def found(query: str) -> list[str]:
        listed: list[str] = []
        cursor = ""
        while cursor is not None:
            page = await api.ok("GET", f"/v1/events?limit=2&{query}{cursor}")
            assert len(page["data"]) <= 2
            listed += ids(page)
            cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] is not None else None
        return listed[::-1]

    for query, expected in (
        ("", [*given_up, arrived, nobodys, *waiting]),
        ("event=post.published", [*given_up, arrived]),
        ("endpoint=mine", [*given_up, arrived, *waiting]),
        ("endpoint=main", []),
        ("state=dead", given_up),
        ("state=delivered", [arrived]),
        ("state=pending", waiting),
        ("state=cancelled", []),
        ("state=dead&endpoint=mine&event=post.failed", []),
        (f"since={moment}", [arrived, nobodys, *waiting]),
        (f"until={moment}", given_up),
        (f"since={moment}&state=pending", waiting),
    ):
        assert await found(query) == expected, query


async def test_a_filter_that_cannot_be_read_is_refused(api):
    for query in ("state=gone", "since=today", "until=2026-13-01T00:00:00Z", "event="):
        name = query.partition("=")[0]
        assert (await api.refused("GET", f"/v1/events?{query}"))[:2] == (422, [f"#{name}"])
    _, pointers, _ = await api.refused("GET", "/v1/events?state=x&limit=0&cursor=-1&stat=dead")
    assert sorted(pointers) == ["#cursor", "#limit", "#stat", "#state"], "all at once"


# The catalogue


async def test_the_catalogue_is_listed_and_holds_submissions_to_it(catalogued):
    api = catalogued
    types = await api.ok("GET", "/v1/event-types")
    assert types["next_cursor"] is None
    assert [each["event"] for each in types["data"]] == ["post.published", "post.failed", "account.connected"]
    assert types["data"][0]["description"] == "A post went out."
    assert types["data"][0]["sample"] == {"postId": "post_abc123", "likes": 1.0}
    assert types["data"][0]["schema"]["required"] == ["postId"]
    assert types["data"][2] == {
        "event": "account.connected", "description": "", "sample": {"accountId": "acc_1"}, "schema": None,
    }  # fmt: skip

    events = "/v1/events"
    status, pointers, detail = await api.refused("POST", events, {"event": "post.publishd", "data": {}})
    assert (status, pointers) == (422, ["#/event"])
    assert "did you mean 'post.published'?" in detail
    wrong = {"event": "post.published", "data": {"postId": 5}}
    status, pointers, detail = await api.refused("POST", events, wrong)
    assert (status, pointers, detail) == (
        422, ["#/data/postId"], '#/data/postId the value is not of type "string"',
    )  # fmt: skip
    assert (await api.refused("POST", events, {"event": "post.published", "data": {}}))[1] == ["#/data"]
    batch = {"events": [{"event": "post.failed", "data": 1}, wrong, {"event": "nope", "data": 1}]}
    _, pointers, _ = await api.refused("POST", "/v1/events/batch", batch)
    assert pointers == ["#/events/1/data/postId", "#/events/2/event"]
    assert (await api.ok("GET", events))["data"] == []
    await api.post("post.published")
    await api.post("post.failed", anything=["goes"])


async def test_without_a_catalogue_any_type_goes(api):
    assert (await api.ok("GET", "/v1/event-types")) == {"data": [], "next_cursor": None}
    await api.post("whatever.it-is")


def test_a_schema_names_the_place_and_repeats_no_data():
    """An answer that repeats a large value for each of its mistakes grows with the square of what came in."""
    properties = {"a/b~c": {"type": "string"}, "list": {"items": {"type": "string"}}}
    catalogue = Catalogue([EventType(type="t", schema={"properties": properties})])
    problems = catalogue.wrong_data("t", {"a/b~c": ["long" * 1000], "list": [1] * 10_000})
    assert problems[0] == ("/a~1b~0c", 'the value is not of type "string"')
    assert problems[1] == ("/list/0", 'the value is not of type "string"')
    assert len(problems) == MOST_PROBLEMS
    assert catalogue.wrong_data("other", 5) == []


@pytest.mark.parametrize("schema", [{"type": "nope"}, {"pattern": "("}, {"$ref": "#/nope"}])
def test_what_is_no_schema_is_said(schema):
    with pytest.raises(SchemaError, match="is not a JSON Schema"):
        validator(schema)


@pytest.mark.parametrize("uri", ["https://127.0.0.1:9/x.json", "file:///etc/hostname"])
def test_a_schema_fetches_nothing(uri):
    with pytest.raises(SchemaError, match=r"the relay fetches nothing; put .* under \$defs"):
        validator({"$ref": uri})


# Who may


async def test_with_tokens_every_path_of_the_service_needs_one(tmp_path, receiver):
    with relay_process(tmp_path, CONFIG, trusting(receiver, tmp_path), start=False) as relay:
        text = relay.config.read_text().replace("[server]", f'[server]\ntokens = ["{TOKEN}"]', 1)
        relay.config.write_text(text)
        await asyncio.to_thread(relay.start)
        one = f"{SETTINGS}/main"
        for method, path in (
            ("GET", SETTINGS), ("POST", SETTINGS), ("GET", one), ("PATCH", one), ("DELETE", one),
            ("POST", f"{one}/pause"), ("POST", f"{one}/resume"), ("POST", f"{one}/rotate-secret"),
            ("POST", f"{one}/replay"), ("POST", "/v1/webhooks/test"), ("GET", "/v1/events"),
            ("GET", "/v1/events/evt_1"), ("POST", "/v1/events/evt_1/replay"), ("GET", "/v1/event-types"),
        ):  # fmt: skip
            for wrong in ({}, {"Authorization": "Bearer sk_other"}):
                assert (await Client(relay, wrong).refused(method, path, {}))[0] == 401, (method, path)
        holder = Client(relay, {"Authorization": f"Bearer {TOKEN}"})
        assert (await holder.ok("GET", one))["state"] == "active"
        assert (await holder("POST", SETTINGS, mine(receiver)))[0] == 201
        assert (await holder.ok("GET", "/v1/events"))["data"] == []


async def test_a_secret_is_told_once_and_appears_nowhere_else(catalogued, receiver, tmp_path):
    """Whoever reads answers, errors or the log at its most talkative must not be able to sign."""
    api, canary = catalogued, "canary_N3v3r-Sh0wn"
    own = f"whsec_{'Y2FuYXJ5' * 5}"
    token = f"query{canary}"
    url = f"{receiver.url}?token={token}"
    status, made = await api("POST", SETTINGS, mine(receiver, url=url, headers={"X-Key": f"h{canary}"}))
    assert status == 201
    generated = made["secret"]
    rotated = (await api.ok("POST", f"{SETTINGS}/mine/rotate-secret"))["secret"]
    creating = len(api.told)

    await api.ok("POST", SETTINGS, {"url": url, "secret": own})
    await api.ok("PATCH", f"{SETTINGS}/mine", {"secret": canary})
    await api.ok("GET", SETTINGS)
    for wrong in (
        {"secret": f" {canary}"}, {"secret": [canary]}, {"secret": f"whsec_{canary}!"},
        {"secret": {canary: 1}},
        {"headers": {"X-Key": f"h{canary}\n"}}, {"headers": {"X-Key": [f"h{canary}"]}},
        {"headers": f"h{canary}"}, {"secrets": [canary]}, {"url": f"https://a b/?token={token}"},
        {"url": f"http://a/?token={token}"}, {"url": f"https://u:{canary}@a/"},
    ):  # fmt: skip
        assert (await api.refused("PATCH", f"{SETTINGS}/mine", wrong))[0] == 422, wrong
        await api.refused("POST", SETTINGS, {"url": "https://new.test/", "events": ["*"]} | wrong)
    await api.refused("POST", SETTINGS, f'{{"secret": "{canary}"'.encode())
    await api.refused("POST", SETTINGS, mine(receiver, url=f"{url}0", secret=canary))
    receiver.answers(503, Answer(302, headers={"Location": url}), 404)
    for _ in range(4):
        receipt = await api.post()
    await api.ok("POST", "/v1/webhooks/test", {"event": "post.published"})
    await receiver.wait_for(5)
    await api.until_state(receipt["id"], "mine", "delivered")
    closed = f"https://127.0.0.1:{free_port()}/?token={token}"
    await api.ok("PATCH", f"{SETTINGS}/mine", {"url": closed})
    receipt = await api.post()
    await api.until_state(receipt["id"], "mine", "dead")
    await api("GET", "/v1/events")
    await api("GET", "/metrics")
    await api.restart(kill=False)
    await api.ok("GET", f"{SETTINGS}/mine")
    assert await asyncio.to_thread(api.relay.stop) == 0

    told = [(asked, answer) for asked, answer in api.told[creating:]]
    shown = [(asked, answer) for asked, answer in api.told[:creating]]
    log = api.relay.log
    assert "attempt_delivered" in log, "the log was not at its most talkative"
    for secret in (canary, own, generated, rotated):
        assert secret not in log
        assert not [asked for asked, answer in told if secret in answer]
    assert [asked for asked, answer in shown if canary in answer] == []
    assert (
        sum(generated in answer for _, answer in shown) == sum(rotated in answer for _, answer in shown) == 1
    )
    for path in tmp_path.glob("relay.db*"):
        assert path.stat().st_mode & 0o077 == 0, f"{path.name} holds secrets in clear"


# Stops, kills and races


async def test_a_stopping_relay_takes_no_changes_and_stops_in_time(tmp_path, receiver):
    """An endpoint made while the lanes wind down would have a lane that nobody stops."""
    environment = trusting(receiver, tmp_path) | {"RELAY_SERVER__SHUTDOWN_GRACE": "1h"}
    with relay_process(tmp_path, CONFIG, environment) as relay:
        api = Client(relay)
        await api.ok("POST", SETTINGS, mine(receiver))
        receiver.answers(Answer(delay=60))
        await api.post()
        await receiver.wait_for(1)
        relay.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while (await api("GET", "/readyz"))[0] != 503:
                await asyncio.sleep(0.01)
        for method, path, content in (
            ("POST", SETTINGS, mine(receiver, id="late", url="https://late.test/")),
            ("PATCH", f"{SETTINGS}/mine", {"description": "d"}),
            ("DELETE", f"{SETTINGS}/mine", None),
            ("POST", f"{SETTINGS}/mine/pause", None),
            ("POST", f"{SETTINGS}/mine/rotate-secret", None),
        ):
            assert (await api.refused(method, path, content))[0] == 503
        assert (await api.ok("GET", f"{SETTINGS}/mine"))["pending"] == 1
        assert await asyncio.to_thread(relay.stop, 5.0) == 0


class Rush:
    """Submissions, and endpoints that come and go meanwhile, until the relay is killed."""

    def __init__(self, api: Client, receiver: Receiver, seed: int) -> None:
        self.api = api
        self.receiver = receiver
        self.receipts: list[dict] = []
        self._chance = random.Random(seed)
        self._killed = False

    async def until_killed(self, count: int) -> None:
        """Kill the relay when so many events were accepted."""
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(self._submit())
            for id_ in ("a", "b"):
                tasks.create_task(self._come_and_go(id_))
            while len(self.receipts) < count:
                await asyncio.sleep(0.002)
            await asyncio.to_thread(self.api.relay.kill)
            self._killed = True

    async def _submit(self) -> None:
        while not self._killed:
            answer = await self._attempt("POST", "/v1/events", {"event": "post.published", "data": {}})
            if answer is not None:
                self.receipts.append(answer)

    async def _come_and_go(self, id_: str) -> None:
        own = mine(self.receiver, id=id_, url=f"{self.receiver.url}/{id_}", events=["*"])
        while not self._killed:
            await self._attempt("POST", SETTINGS, own)
            if self._chance.random() < 0.7:
                await self._attempt("DELETE", f"{SETTINGS}/{id_}")

    async def _attempt(self, method: str, path: str, content: object = None) -> dict | None:
        """Return the answer, or None when the kill came in between."""
        try:
            status, answer = await self.api(method, path, content)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            return None
        assert status in {200, 201, 202, 404}, answer  # 404: killed before the endpoint was kept
        return answer


@pytest.mark.parametrize("seed", [1, 2])
async def test_endpoints_that_come_and_go_under_a_kill_lose_and_double_nothing(api, receiver, seed):
    """Every endpoint that a 202 names has one delivery after the restart, and it comes to an end."""
    await api.ok("POST", SETTINGS, mine(receiver, id="stays"))
    rush = Rush(api, receiver, seed)
    await rush.until_killed(60 + 13 * seed)
    await asyncio.to_thread(api.relay.start)

    await api.until(SETTINGS, lambda page: not any(each["pending"] for each in page["data"]), within=20)
    named: set[str] = set()
    for receipt in rush.receipts:
        story = await api.ok("GET", f"/v1/events/{receipt['id']}")
        assert [each["endpoint"] for each in story["deliveries"]] == receipt["endpoints"]
        assert {each["state"] for each in story["deliveries"]} <= {"delivered", "cancelled"}
        named |= set(receipt["endpoints"])
    assert named == {"stays", "a", "b"}, "the race was none"
    arrived = {each.headers["webhook-id"] for each in receiver.requests if each.path == "/hook"}
    assert {receipt["id"] for receipt in rush.receipts} <= arrived
