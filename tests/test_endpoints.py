"""The register on a real outbox with real lanes: merging, conflicts, rotation, restarts and races."""

import asyncio
import base64
import hashlib
import hmac
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product

import pytest
from standardwebhooks import Webhook

from relay import egress
from relay.clock import Clock
from relay.config import DeliverySettings, SettingsError
from relay.delivery import Lanes
from relay.endpoints import Changes, ConflictError, Endpoints, Registered, UnknownEndpointError, compared
from relay.ingest import Draft, Ingest, InvalidError
from relay.model import Endpoint, Message, Outcome, Receipt, Standing, State
from relay.outbox import Backlog, Ended, FullError, Outbox
from relay.subscription import Subscriptions
from tests.clock import MovedClock
from tests.lanes import OK, endpoint, make_lanes, until

URL = "https://receiver.test/hook"
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


class NotingSender:
    """Delivers everything; keeps what went where, and holds it while `open` is not set."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str]] = []  # endpoint, its URL, event
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        await self.open.wait()
        self.sent.append((endpoint.id, endpoint.url, message.id))
        return OK


@dataclass
class House:
    """What `serve` joins: a register with its lanes, and the way in."""

    endpoints: Endpoints
    ingest: Ingest
    outbox: Outbox
    sender: NotingSender
    lanes: Lanes
    cancelled: dict[str, int]
    aside: list[str]

    async def post(self, type_: str = "post.published", **members: object) -> Receipt:
        (receipt,) = await self.ingest.submit([Draft(value={"event": type_, "data": {}, **members})])
        return receipt

    async def states(self, event_id: str) -> dict[str, State]:
        story = await self.outbox.story(event_id)
        return {each.endpoint: each.state for each in story.deliveries}


@asynccontextmanager
async def house(
    outbox: Outbox,
    clock: Clock,
    *configured: Endpoint,
    policy: egress.Policy = egress.Policy(),  # noqa: B008 - frozen
    defaults: DeliverySettings = DeliverySettings(),  # noqa: B008 - frozen
) -> AsyncIterator[House]:
    sender = NotingSender()
    lanes = make_lanes(outbox, sender, clock)
    ingest = Ingest(outbox=outbox, subscriptions=Subscriptions([]), clock=clock, wake=lanes.wake)
    endpoints = Endpoints(
        configured=configured,
        defaults=defaults,
        policy=policy,
        outbox=outbox,
        lanes=lanes,
        clock=clock,
        change=ingest.subscribe,
    )
    cancelled, aside = await endpoints.open()
    async with asyncio.TaskGroup() as tasks:
        overlaps = tasks.create_task(endpoints.end_overlaps())
        tasks.create_task(lanes.run())
        yield House(endpoints, ingest, outbox, sender, lanes, cancelled, aside)
        lanes.stop(0)
        overlaps.cancel()


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
async def here(open_store, clock) -> AsyncIterator[House]:
    """A register with one endpoint of the config."""
    async with open_store() as outbox, house(outbox, clock, endpoint("main", events=("*",))) as each:
        yield each


def settings(**changes: object) -> dict[str, object]:
    return {"url": URL, "events": ["post.*"], "id": "mine"} | changes


MESSAGE = Message(
    id="evt_1", type="a", body=b'{"n":1}', content_type="application/json", attempt=1, timestamp=1_768_471_200
)


def signing(registered: Registered, *secrets: str) -> tuple[str, str]:
    """Name by their places the secrets that sign as `standard`, and the one that signs as `socialsyncer`."""
    headers: dict[str, str] = {}
    for sign in registered.endpoint.sign:
        headers |= dict(sign(MESSAGE))
    at = datetime.fromtimestamp(MESSAGE.timestamp, UTC)
    body = MESSAGE.body.decode()
    standard = {Webhook(each).sign(MESSAGE.id, at, body): str(place) for place, each in enumerate(secrets)}
    hexed = {
        hmac.new(each.encode(), MESSAGE.body, hashlib.sha256).hexdigest(): str(place)
        for place, each in enumerate(secrets)
    }
    signed = "".join(standard[each] for each in headers["webhook-signature"].split(" "))
    return signed, hexed[headers["X-SocialSyncerAPI-Signature"]]


# Making, changing, removing


async def test_a_new_endpoint_gets_a_secret_and_the_events_accepted_from_then_on(here):
    """Matching is fixed at acceptance: what was posted before is not owed to who came later."""
    before = await here.post()
    registered, secret = await here.endpoints.put(settings(id=None))
    after = await here.post()
    other = await here.post("account.connected")

    own = registered.endpoint.id
    assert own.startswith("ep_")
    assert secret.startswith("whsec_")
    assert signing(registered, secret) == ("0", "0")
    assert (registered.endpoint.source, registered.paused) == ("api", False)
    assert before.endpoints == other.endpoints == ("main",)
    assert set(after.endpoints) == {"main", own}
    await until(lambda: (own, URL, after.id) in here.sender.sent)


async def test_the_same_url_again_updates_and_what_is_left_out_stays(here):
    first, secret = await here.endpoints.put(
        settings(description="d", timeout="3s", headers={"X-A": "1"}, retry_schedule=["1s"])
    )
    again, none = await here.endpoints.put({"url": "HTTPS://Receiver.TEST:443/hook", "events": ["account.*"]})

    assert none is None
    assert again.endpoint.id == first.endpoint.id == "mine"
    assert again.endpoint.events == ("account.*",)
    assert (again.endpoint.description, again.endpoint.timeout_seconds) == ("d", 3.0)
    assert (again.endpoint.headers, again.endpoint.retry_schedule) == (first.endpoint.headers, (1.0,))
    assert signing(again, secret) == ("0", "0")
    assert [each.endpoint.id for each in here.endpoints.all()] == ["main", "mine"]


async def test_an_update_that_says_null_for_the_id_is_an_update(here):
    await here.endpoints.put(settings())
    registered, _ = await here.endpoints.put({"url": URL, "id": None, "description": "d"})
    assert (registered.endpoint.id, registered.endpoint.description) == ("mine", "d")


async def test_null_gives_a_setting_its_default_back(open_store, clock):
    """Else a setting that was made once could never follow the config again."""
    defaults = DeliverySettings(timeout_seconds=7.0, concurrency=3)
    async with open_store() as outbox, house(outbox, clock, defaults=defaults) as here:
        made, secret = await here.endpoints.put(
            settings(timeout="1s", concurrency=9, description="d", signatures=["standard"])
        )
        assert (made.endpoint.timeout_seconds, made.endpoint.concurrency) == (1.0, 9)
        nulls = dict.fromkeys(("timeout", "concurrency", "description", "signatures", "secret"))
        reset = await here.endpoints.patch("mine", nulls)
        assert (reset.endpoint.timeout_seconds, reset.endpoint.concurrency) == (7.0, 3)
        assert (reset.endpoint.description, reset.endpoint.signatures) == ("", defaults.signatures)
        assert signing(reset, secret) == ("0", "0"), "a secret has no default"
        assert reset.settings.keys() == {"id", "url", "events", "secrets", "overlap_until_ms"}


@pytest.mark.parametrize("name", ["url", "events"])
async def test_what_an_endpoint_cannot_be_without_cannot_be_reset(here, name):
    made, _ = await here.endpoints.put(settings())
    with pytest.raises(SettingsError) as refused:
        await here.endpoints.patch("mine", {name: None})
    assert refused.value.problems == ((f"#/{name}", "is missing"),)
    assert here.endpoints.get("mine") == made


async def test_a_refused_change_changes_nothing_and_says_everything(here):
    made, _ = await here.endpoints.put(settings())
    with pytest.raises(SettingsError) as refused:
        await here.endpoints.patch(
            "mine", {"timeout": "soon", "events": [], "nope": 1, "secret": "whsec_!", "proxy": "https://p/"}
        )
    assert {pointer for pointer, _ in refused.value.problems} == {
        "#/timeout", "#/events", "#/nope", "#/secret", "#/proxy",
    }  # fmt: skip
    assert here.endpoints.get("mine") == made


@pytest.mark.parametrize("id_", [["a"], {"a": 1}, 5, "", "a b", "x" * 65])
async def test_an_id_that_is_none_is_refused(here, id_):
    with pytest.raises(SettingsError) as refused:
        await here.endpoints.put(settings(id=id_))
    assert [pointer for pointer, _ in refused.value.problems] == ["#/id"]


@pytest.mark.parametrize("url", ["https://u:p@receiver.test/hook", "http://receiver.test/", "https://", 5])
async def test_a_url_that_may_not_be_is_refused(here, url):
    await here.endpoints.put(settings())
    with pytest.raises(SettingsError) as refused:
        await here.endpoints.put({"url": url, "events": ["*"]})
    assert [pointer for pointer, _ in refused.value.problems] == ["#/url"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://a.test/x", "HTTPS://A.TEST:443/x"),
        ("https://a.test", "https://a.test/"),
        ("https://[2001:DB8::1]/", "https://[2001:db8::1]:443/"),
        ("https://a.test/?q=1", "https://a.test:443/?q=1"),
    ],
)
def test_urls_are_the_same_whatever_the_case_of_their_host_and_with_the_usual_port(one, other):
    assert compared(one) == compared(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://a.test/x", "https://a.test/X"),
        ("https://a.test/x", "https://a.test/x/"),
        ("https://a.test/", "https://a.test:8443/"),
        ("https://a.test/?q=1", "https://a.test/?q=2"),
        ("https://a.test/", "https://b.test/"),
        ("https://a.test:1/", "https://a.test:99999/"),
    ],
)
def test_urls_that_may_lead_elsewhere_are_others(one, other):
    assert compared(one) != compared(other)


async def test_an_id_and_a_url_belong_to_one_endpoint(here):
    """Two endpoints with one URL would send everything twice."""
    await here.endpoints.put(settings())
    await here.endpoints.put(settings(id="second", url="https://second.test/"))
    conflicts = [
        here.endpoints.put(settings(id="other")),
        here.endpoints.put(settings(url="https://third.test/")),
        here.endpoints.patch("second", {"url": "https://RECEIVER.test:443/hook"}),
        here.endpoints.patch("second", {"id": "third"}),
    ]
    for conflict in conflicts:
        with pytest.raises(ConflictError):
            await conflict
    moved = await here.endpoints.patch("second", {"url": "https://SECOND.test/", "id": "second"})
    assert moved.endpoint.url == "https://SECOND.test/"


async def test_what_the_config_has_is_changed_in_the_config(here):
    """Else a change would be gone with the next start, or the file would lie."""
    main = here.endpoints.get("main")
    changes = [
        here.endpoints.put(settings(id="main")),
        here.endpoints.put({"url": "https://Receiver.test:443/", "events": ["*"]}),
        here.endpoints.patch("main", {"description": "d"}),
        here.endpoints.remove("main"),
        here.endpoints.rotate("main", 60.0),
    ]
    for change in changes:
        with pytest.raises(
            ConflictError, match="endpoint main is the config's: change it there, then reload"
        ):
            await change
    assert here.endpoints.all() == [main]


@pytest.mark.parametrize("name", ["secrets", "overlap_until_ms"])
async def test_what_is_kept_with_the_settings_cannot_be_set(here, name):
    for change in (here.endpoints.put(settings(**{name: 1})), here.endpoints.patch("main", {name: 1})):
        with pytest.raises(SettingsError, match=f"#/{name} unknown key"):
            await change


async def test_who_is_not_there_cannot_be_changed(here):
    for change in (
        here.endpoints.patch("nobody", {}),
        here.endpoints.remove("nobody"),
        here.endpoints.pause("nobody", paused=True),
        here.endpoints.rotate("nobody", 1.0),
    ):
        with pytest.raises(UnknownEndpointError):
            await change


async def test_the_same_endpoint_made_many_times_at_once_is_one(here):
    """An app with several workers registers its receiver at every start of every worker."""
    async with asyncio.TaskGroup() as tasks:
        made = [tasks.create_task(here.endpoints.put({"url": URL, "events": ["*"]})) for _ in range(20)]
    results = [each.result() for each in made]
    assert len({registered.endpoint.id for registered, _ in results}) == 1
    assert sum(secret is not None for _, secret in results) == 1


async def test_a_moved_endpoint_keeps_what_waits_for_it(here):
    await here.endpoints.put(settings())
    await here.endpoints.pause("mine", paused=True)
    receipt = await here.post()
    await here.endpoints.patch("mine", {"url": "https://moved.test/"})
    await here.endpoints.pause("mine", paused=False)
    await until(lambda: ("mine", "https://moved.test/", receipt.id) in here.sender.sent)


async def test_other_subscriptions_count_from_the_next_event(here):
    await here.endpoints.put(settings())
    await here.endpoints.pause("mine", paused=True)
    owed = await here.post()
    await here.endpoints.patch("mine", {"events": ["account.*"]})
    assert (await here.post()).endpoints == ("main",)
    assert set((await here.post("account.connected")).endpoints) == {"main", "mine"}
    assert (await here.states(owed.id))["mine"] is State.PENDING, "what was accepted stays owed"


async def test_a_removed_endpoints_deliveries_are_cancelled_and_replayable_when_it_returns(here, clock):
    await here.endpoints.put(settings())
    await here.endpoints.pause("mine", paused=True)
    owed = [await here.post() for _ in range(3)]

    assert await here.endpoints.remove("mine") == 3
    assert (await here.post()).endpoints == ("main",)
    with pytest.raises(InvalidError, match="there is no endpoint 'mine'"):
        await here.post(to=["mine"])
    assert (await here.states(owed[0].id))["mine"] is State.CANCELLED
    again, secret = await here.endpoints.put(settings())
    assert secret is not None
    assert not again.paused, "who returns is a new one"
    assert not [each for each in here.sender.sent if each[0] == "mine"]

    assert await here.outbox.revive(Ended(endpoint="mine", state=State.CANCELLED), clock.now_ms()) == 3
    here.lanes.wake(["mine"])
    await until(lambda: {each[2] for each in here.sender.sent if each[0] == "mine"} == {r.id for r in owed})


async def test_an_event_costs_the_same_however_many_endpoints_do_not_want_it():
    """Contract 4: an index by pattern is asked once for each of the type's own patterns."""

    class Counting(dict):
        asked = 0

        def get(self, *arguments):
            Counting.asked += 1
            return super().get(*arguments)

    asked = []
    for strangers in (0, 5000):
        others = [endpoint(f"n{n}", events=(f"other{n}.*", f"x.y{n}")) for n in range(strangers)]
        wanted = [endpoint("a", events=("post.published.*",)), endpoint("b", events=("*",))]
        subscriptions = Subscriptions([*others, *wanted])
        subscriptions._patterns = Counting(subscriptions._patterns)
        Counting.asked = 0
        assert [each.id for each in subscriptions.wanting("post.published.now")] == ["a", "b"]
        asked.append(Counting.asked)
    assert asked == [4, 4]


@pytest.mark.parametrize(
    ("pattern", "wants", "not_wants"),
    [
        ("post.published", {"post.published"}, {"post.published.x", "post", "post.publishedx"}),
        ("post.*", {"post.a", "post.a.b"}, {"post", "posts.a", "my.post.a"}),
        ("*", {"a", "a.b.c"}, {"relay.endpoint.down", "relay.delivery.dead"}),
        ("relay.endpoint.down", {"relay.endpoint.down"}, {"relay.endpoint.gone"}),
    ],
)
def test_a_subscription_wants_what_the_contract_says(pattern, wants, not_wants):
    subscriptions = Subscriptions([endpoint("a", events=(pattern,))])
    assert {type_ for type_ in wants | not_wants if subscriptions.wanting(type_)} == wants


# Secrets and their rotation


async def test_during_the_overlap_both_secrets_sign_where_there_is_room(here, clock):
    """No receiver breaks before it was changed, whichever scheme it verifies."""
    _, old = await here.endpoints.put(settings())
    rotated, new = await here.endpoints.rotate("mine", 3600.0)
    assert signing(rotated, new, old) == ("01", "1")
    assert rotated.overlap_until_ms == clock.now_ms() + 3_600_000

    clock.advance(seconds=3599)
    await asyncio.sleep(0.02)
    assert signing(here.endpoints.get("mine"), new, old) == ("01", "1")
    clock.advance(seconds=1)
    await until(lambda: here.endpoints.get("mine").overlap_until_ms is None)
    assert signing(here.endpoints.get("mine"), new, old) == ("0", "0")


async def test_a_given_secret_rotates_too(here):
    _, old = await here.endpoints.put(settings())
    updated, none = await here.endpoints.put({"url": URL, "secret": SECRET})
    assert none is None
    assert signing(updated, SECRET, old) == ("01", "1")
    same = await here.endpoints.patch("mine", {"secret": SECRET})
    assert signing(same, SECRET, old) == ("01", "1"), "the same again is no rotation"


async def test_a_rotation_without_overlap_takes_effect_at_once(here):
    """After a leak the old secret must be worth nothing."""
    _, old = await here.endpoints.put(settings())
    rotated, new = await here.endpoints.rotate("mine", 0.0)
    assert signing(rotated, new, old) == ("0", "0")
    await here.endpoints.rotate("mine", 60.0)
    ended, newest = await here.endpoints.rotate("mine", 0.0)
    assert signing(ended, newest, new, old) == ("0", "0")
    assert ended.overlap_until_ms is None


async def test_rotations_follow_each_other_up_to_a_bound(here):
    secrets = [(await here.endpoints.put(settings()))[1]]
    for _ in range(4):
        registered, secret = await here.endpoints.rotate("mine", 60.0)
        secrets.insert(0, secret)
    assert signing(registered, *secrets) == ("01234", "4")
    with pytest.raises(ConflictError, match="5 secrets are live already"):
        await here.endpoints.rotate("mine", 60.0)
    assert here.endpoints.get("mine") == registered


async def test_a_change_of_settings_ends_no_overlap(here, clock):
    _, old = await here.endpoints.put(settings())
    rotated, new = await here.endpoints.rotate("mine", 3600.0)
    clock.advance(seconds=10)
    changed = await here.endpoints.patch("mine", {"description": "d"})
    paused = await here.endpoints.pause("mine", paused=True)
    assert signing(paused, new, old) == ("01", "1")
    assert changed.overlap_until_ms == paused.overlap_until_ms == rotated.overlap_until_ms


async def test_an_overlap_lasts_over_a_restart_and_ends_on_time(open_store, clock):
    async with open_store() as outbox, house(outbox, clock) as here:
        _, old = await here.endpoints.put(settings())
        _, new = await here.endpoints.rotate("mine", 3600.0)
    clock.advance(seconds=1800)
    async with open_store() as outbox, house(outbox, clock) as here:
        assert signing(here.endpoints.get("mine"), new, old) == ("01", "1")
        clock.advance(seconds=1800)
        await until(lambda: here.endpoints.get("mine").overlap_until_ms is None)
        assert signing(here.endpoints.get("mine"), new, old) == ("0", "0")
    async with open_store() as outbox, house(outbox, clock) as here:
        assert signing(here.endpoints.get("mine"), new, old) == ("0", "0")


async def test_an_overlap_that_ended_while_the_relay_was_down_is_over(open_store, clock):
    async with open_store() as outbox, house(outbox, clock) as here:
        _, old = await here.endpoints.put(settings())
        _, new = await here.endpoints.rotate("mine", 60.0)
    clock.advance(seconds=61)
    async with open_store() as outbox, house(outbox, clock) as here:
        await until(lambda: here.endpoints.get("mine").overlap_until_ms is None)
        assert signing(here.endpoints.get("mine"), new, old) == ("0", "0")


async def test_a_full_disk_at_the_end_of_an_overlap_does_not_end_the_relay(here, clock, monkeypatch):
    """What was accepted still goes out when the disk is full (contract 1.6)."""
    _, old = await here.endpoints.put(settings())
    _, new = await here.endpoints.rotate("mine", 60.0)
    refused = asyncio.Event()

    async def full(_endpoint):
        refused.set()
        raise FullError("there is no room")

    monkeypatch.setattr(here.outbox, "keep_endpoint", full)
    clock.advance(seconds=61)
    async with asyncio.timeout(5):
        await refused.wait()
    monkeypatch.undo()
    assert signing(here.endpoints.get("mine"), new, old) == ("01", "1")
    clock.advance(seconds=10)
    await until(lambda: here.endpoints.get("mine").overlap_until_ms is None)
    assert signing(here.endpoints.get("mine"), new, old) == ("0", "0")


async def test_an_endpoint_that_could_not_be_removed_stands_as_it_stood(here, monkeypatch):
    """One that said 410 waits for a person, and a full disk is none."""
    await here.endpoints.put(settings())
    lane = here.lanes._lanes["mine"]
    lane._stands(replace(lane.health, standing=Standing.GONE))

    async def full(_endpoint):
        raise FullError("there is no room")

    monkeypatch.setattr(here.outbox, "drop_endpoint", full)
    with pytest.raises(FullError):
        await here.endpoints.remove("mine")
    assert here.lanes._lanes["mine"] is not lane
    assert here.lanes._lanes["mine"].health.standing is Standing.GONE


# Restarts, and what the config says after them


async def test_an_endpoint_of_the_api_is_there_after_a_restart_with_all_it_was_told(open_store, clock):
    async with open_store() as outbox, house(outbox, clock) as here:
        made, secret = await here.endpoints.put(settings(timeout="3s", headers={"X-A": "1"}))
        await here.endpoints.pause("mine", paused=True)
        receipt = await here.post()
    async with open_store() as outbox, house(outbox, clock) as here:
        back = here.endpoints.get("mine")
        assert back.paused
        assert signing(back, secret) == ("0", "0")
        assert (back.endpoint.timeout_seconds, back.endpoint.headers) == (3.0, made.endpoint.headers)
        assert (back.endpoint.source, back.settings) == ("api", made.settings)
        assert here.sender.sent == [] == here.aside
        await here.endpoints.pause("mine", paused=False)
        await until(lambda: [each[2] for each in here.sender.sent] == [receipt.id])


async def test_defaults_of_the_config_reach_endpoints_of_the_api_after_a_restart(open_store, clock):
    async with open_store() as outbox, house(outbox, clock) as here:
        await here.endpoints.put(settings(concurrency=5))
    defaults = DeliverySettings(timeout_seconds=1.0, concurrency=9)
    async with open_store() as outbox, house(outbox, clock, defaults=defaults) as here:
        back = here.endpoints.get("mine").endpoint
        assert (back.timeout_seconds, back.concurrency) == (1.0, 5)


async def test_a_removed_endpoint_stays_away_after_a_restart(open_store, clock):
    async with open_store() as outbox, house(outbox, clock) as here:
        await here.endpoints.put(settings())
        await here.endpoints.remove("mine")
    async with open_store() as outbox, house(outbox, clock) as here:
        assert here.endpoints.all() == []
        assert (here.cancelled, here.aside) == ({}, [])


async def test_a_paused_endpoint_of_the_config_stays_paused_after_a_restart(open_store, clock):
    main = endpoint("main", events=("*",))
    async with open_store() as outbox, house(outbox, clock, main) as here:
        await here.endpoints.pause("main", paused=True)
    async with open_store() as outbox, house(outbox, clock, main) as here:
        assert here.endpoints.get("main") == Registered(endpoint=main, paused=True)
        receipt = await here.post()
        await here.endpoints.pause("main", paused=False)
        await until(lambda: [each[2] for each in here.sender.sent] == [receipt.id])


async def test_an_endpoint_taken_out_of_the_config_is_told_with_what_it_was_owed(open_store, clock):
    main = endpoint("main", events=("*",))
    async with open_store() as outbox, house(outbox, clock, main) as here:
        await here.endpoints.pause("main", paused=True)
        owed = [await here.post() for _ in range(2)]
    async with open_store() as outbox, house(outbox, clock) as here:
        assert (here.cancelled, here.aside) == ({"main": 2}, [])
        assert await here.states(owed[0].id) == {"main": State.CANCELLED}


async def test_an_endpoint_whose_id_the_config_takes_is_set_aside_and_comes_back_after(open_store, clock):
    """The config wins; nobody's secret is thrown away because of a name."""
    async with open_store() as outbox, house(outbox, clock) as here:
        _, secret = await here.endpoints.put(settings())
    taken = endpoint("mine", events=("*",), url="https://config.test/")
    async with open_store() as outbox, house(outbox, clock, taken) as here:
        assert here.aside == ["mine"]
        assert here.endpoints.get("mine") == Registered(endpoint=taken)
        await here.endpoints.pause("mine", paused=True)
        await here.endpoints.pause("mine", paused=False)
    async with open_store() as outbox, house(outbox, clock) as here:
        assert here.aside == []
        assert signing(here.endpoints.get("mine"), secret) == ("0", "0")
        assert here.endpoints.get("mine").endpoint.url == URL


async def test_an_endpoint_the_config_no_longer_allows_is_set_aside_and_comes_back_after(open_store, clock):
    async with open_store() as outbox, house(outbox, clock) as here:
        await here.endpoints.put(settings(url="https://receiver.test:8443/"))
        await here.endpoints.pause("mine", paused=True)
        owed = await here.post()
    strict = egress.Policy(ports=frozenset({443}))
    async with open_store() as outbox, house(outbox, clock, policy=strict) as here:
        assert (here.cancelled, here.aside) == ({"mine": 1}, ["mine"])
        assert await here.states(owed.id) == {"mine": State.CANCELLED}
        assert here.endpoints.all() == []
        assert (await here.post()).endpoints == ()
    async with open_store() as outbox, house(outbox, clock) as here:
        assert here.endpoints.get("mine").paused


# Races


class Rush:
    """Submissions, and endpoints that come and go meanwhile, interleaved by seeded chance."""

    def __init__(self, here: House, seed: int) -> None:
        self.here = here
        self.receipts: list[Receipt] = []
        self._chance = random.Random(seed)

    async def submit(self, count: int) -> None:
        for _ in range(count):
            self.receipts.append(await self.here.post())
            await self._let_others(4)

    async def come_and_go(self, id_: str) -> None:
        for _ in range(8):
            await self.come(id_)
            await self._let_others(60)
            if self._chance.random() < 0.3:
                await self.here.endpoints.pause(id_, paused=True)
            await self.here.endpoints.remove(id_)

    async def come(self, id_: str) -> None:
        await self.here.endpoints.put(settings(id=id_, url=f"https://{id_}.test/", events=["*"]))

    async def settle(self) -> None:
        """Return when all is delivered that goes to `main`, and nothing is in flight."""
        sent = self.here.sender.sent
        await until(lambda: sum(each[0] == "main" for each in sent) == len(self.receipts))
        await until(lambda: not self.here.outbox._in_flight)

    async def _let_others(self, most: int) -> None:
        for _ in range(self._chance.randrange(most)):
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(6))
async def test_endpoints_that_come_and_go_among_submissions_lose_and_double_nothing(open_store, clock, seed):
    """Every endpoint a receipt names has one delivery; what is not cancelled went out once."""
    async with open_store() as outbox, house(outbox, clock, endpoint("main", events=("*",))) as here:
        rush = Rush(here, seed)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(rush.submit(40))
            for id_ in ("a", "b", "c"):
                tasks.create_task(rush.come_and_go(id_))
        await rush.come("a")
        await rush.come("b")
        await here.endpoints.pause("b", paused=True)
        await rush.submit(3)
        await rush.settle()

        sent = Counter((endpoint, event) for endpoint, _, event in here.sender.sent)
        found: Counter[tuple[str, State]] = Counter()
        for receipt in rush.receipts:
            story = await outbox.story(receipt.id)
            assert [each.endpoint for each in story.deliveries] == list(receipt.endpoints)
            for each in story.deliveries:
                found[each.endpoint, each.state] += 1
                assert sent[each.endpoint, receipt.id] in SENT[each.state]
        assert found["main", State.DELIVERED] == len(rush.receipts) == 163
        assert found["b", State.PENDING] == 3
        assert found["c", State.CANCELLED] + found["c", State.DELIVERED] > 0, "there was no race"
        assert found.keys() <= set(product("abc", ENDS)) | {("main", State.DELIVERED), ("b", State.PENDING)}
        counts = {"main": 0, "a": 0, "b": 3}
        assert await outbox.backlog() == {id_: Backlog(pending=n, dead=0) for id_, n in counts.items()}


ENDS = (State.DELIVERED, State.CANCELLED)
SENT = {State.DELIVERED: {1}, State.PENDING: {0}, State.CANCELLED: {0, 1}}


async def test_replays_racing_with_removals_leave_nothing_pending_for_who_is_gone(open_store, clock):
    """A delivery of an endpoint that is no longer there would wait unseen for ever."""
    async with open_store() as outbox, house(outbox, clock, endpoint("main", events=("*",))) as here:
        receipts = []
        for round_ in range(10):
            await here.endpoints.put(settings())
            receipts.append(await here.post())
            await until(lambda: not outbox._in_flight)
            ended = Ended(endpoint="mine", state=ENDS[round_ % 2])
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(outbox.revive(ended, clock.now_ms()))
                tasks.create_task(here.endpoints.remove("mine"))
                tasks.create_task(outbox.revive(Ended(event_id=receipts[0].id), clock.now_ms()))
            here.lanes.wake(["main"])
        for receipt in receipts:
            assert (await here.states(receipt.id))["mine"] in ENDS
        assert outbox._pending[2] == 0


async def test_an_attempt_under_way_is_cut_off_by_the_removal_and_cancelled(here):
    here.sender.open.clear()
    await here.endpoints.put(settings())
    receipt = await here.post()
    await until(lambda: len(here.outbox._in_flight) == 2)
    assert await here.endpoints.remove("mine") == 1
    assert (await here.states(receipt.id))["mine"] is State.CANCELLED
    here.sender.open.set()
    await until(lambda: len(here.sender.sent) == 1)
    assert here.sender.sent[0][0] == "main"


async def test_one_endpoint_removed_twice_at_once_is_removed_once(here):
    await here.endpoints.put(settings())
    async with asyncio.TaskGroup() as tasks:
        removals = [tasks.create_task(caught(here.endpoints.remove("mine"))) for _ in range(3)]
    assert [each.result() for each in removals] == [0, UnknownEndpointError, UnknownEndpointError]


async def caught(change) -> object:
    """Return what a change gives, or the kind of its error."""
    try:
        return await change
    except UnknownEndpointError as error:
        return type(error)


async def test_an_endpoint_of_private_keys_is_given_a_private_key(outbox, clock):
    """Its scheme could use no other, so a shared secret would end its signing."""
    async with house(outbox, clock) as here:
        seed = "whsk_" + base64.b64encode(bytes(range(32))).decode()
        values = {"url": "https://a.example/", "events": ["*"], "secret": seed}
        registered, _ = await here.endpoints.put(values | {"signatures": ["standard-ed25519"]})
        _, secret = await here.endpoints.rotate(registered.endpoint.id, 3600.0)
    assert secret.startswith("whsk_")


async def test_a_new_config_that_cannot_be_written_down_changes_nothing(here, monkeypatch):
    """Half of a config in force would be a third one, which nobody wrote."""
    before, subscribed = here.endpoints.all(), here.ingest.subscriptions

    async def full(_endpoint):
        raise FullError("there is no room")

    with monkeypatch.context() as patch, pytest.raises(FullError):
        patch.setattr(here.outbox, "keep_endpoint", full)
        await here.endpoints.reload(
            configured=[endpoint("main", events=("a.*",)), endpoint("new", events=("*",))],
            defaults=DeliverySettings(timeout_seconds=1.0),
            policy=egress.Policy(ports=frozenset({1})),
        )

    assert here.endpoints.all() == before
    assert here.ingest.subscriptions is subscribed
    made, _ = await here.endpoints.put(settings())
    assert made.endpoint.timeout_seconds == DeliverySettings().timeout_seconds


async def test_an_endpoint_that_is_the_same_in_a_new_config_stays_the_very_same(here):
    """What was prepared for it, its connections and its pace, is kept; a secret is a difference too."""
    (main,) = here.endpoints.all()
    rules = {"defaults": DeliverySettings(), "policy": egress.Policy()}

    changes = await here.endpoints.reload(configured=[endpoint("main", events=("*",))], **rules)
    assert here.endpoints.get("main").endpoint is main.endpoint
    assert changes == Changes(added=(), changed=(), removed=(), cancelled={}, aside=())

    changes = await here.endpoints.reload(configured=[endpoint("main", events=("b.*",))], **rules)
    assert changes.changed == ("main",)
    assert (await here.post("post.published")).endpoints == ()
