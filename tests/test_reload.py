"""Reload: a new config takes effect while everything goes on, and a wrong one changes nothing.

An operator reloads at the worst of times; whoever is not meant by the change must not notice it.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from aiohttp import web
from standardwebhooks import Webhook

from relay.config import load
from relay.model import Secret
from relay.reload import fitted
from tests.process import RelayProcess, relay_process
from tests.receiver import Answer, Receiver

OLD = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
NEW = "whsec_ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA="
NOTHING = {
    "added": [], "changed": [], "removed": [], "cancelled": 0, "set_aside": [], "needs_restart": [],
}  # fmt: skip


class CountingReceiver(Receiver):
    """Knows from which connections it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.connections: set[tuple[str, int]] = set()

    async def _take(self, request: web.Request) -> web.Response:
        self.connections.add(request.transport.get_extra_info("peername"))
        return await super()._take(request)


@pytest.fixture
async def receiver() -> AsyncIterator[CountingReceiver]:
    async with CountingReceiver() as each:
        yield each


@pytest.fixture
async def other() -> AsyncIterator[CountingReceiver]:
    async with CountingReceiver() as each:
        yield each


@pytest.fixture
def trusted(receiver: Receiver, tmp_path: Path) -> dict[str, str]:
    authority = tmp_path / "authority.pem"
    authority.write_bytes(receiver.authority.cert_pem.bytes())
    return {"SSL_CERT_FILE": str(authority)}


def endpoint(id_: str, url: str, **settings: str) -> str:
    values = {"id": f'"{id_}"', "url": f'"{url}"', "events": '["*"]', "secret": f'"{OLD}"'} | settings
    return "[[endpoints]]\n" + "\n".join(f"{name} = {value}" for name, value in values.items()) + "\n"


async def call(relay: RelayProcess, *arguments: object) -> tuple[int, dict]:
    return await asyncio.to_thread(relay.call, *arguments)


async def reload(relay: RelayProcess, config: str | None = None, server: str = "") -> dict:
    """Write a config, reload it, return what that changed."""
    if config is not None:
        relay.configure(config, server)
    status, answer = await call(relay, "POST", "/v1/reload")
    assert status == 200, answer
    return answer


async def post(relay: RelayProcess, **members: object) -> dict:
    status, receipt = await call(relay, "POST", "/v1/events", {"event": "a.b", "data": {}} | members)
    assert status == 202, receipt
    return receipt


async def until(true: Callable[[], bool], within: float = 10.0) -> None:
    async with asyncio.timeout(within):
        while not true():
            await asyncio.sleep(0.02)


def lines(relay: RelayProcess, event: str) -> list[dict]:
    return [each for each in map(json.loads, relay.log.splitlines()) if each["event"] == event]


async def test_reloads_under_load_lose_nothing_and_leave_other_endpoints_connections_alone(
    tmp_path, receiver, other, trusted
):
    """Every event is delivered once to whoever stays, over the one connection it had before."""
    steady = endpoint("steady", receiver.url, concurrency="1")
    with relay_process(tmp_path, steady, trusted) as relay:
        receipts: list[dict] = []
        over = asyncio.Event()

        async def submit() -> None:
            while not over.is_set():
                receipts.append(await post(relay))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(submit())
            await receiver.wait_for(5)
            for round_ in range(6):
                secret = {"secret": f'"{(OLD, NEW)[round_ % 2]}"'}
                added = await reload(relay, steady + endpoint("other", other.url, **secret))
                assert added == NOTHING | {"added": ["other"]}
                await other.wait_for(3 * (round_ + 1))
                moved = steady + endpoint("other", f"{other.url}/{round_}", **secret, rate='"500/s"')
                assert await reload(relay, moved) == NOTHING | {"changed": ["other"]}
                await other.wait_for(len(other.requests) + 2)
                removed = await reload(relay, steady)
                assert removed == NOTHING | {"removed": ["other"], "cancelled": removed["cancelled"]}
            over.set()
        await receiver.wait_for(len(receipts), within=20)
        assert relay.stop() == 0

    arrived = [each.headers["webhook-id"] for each in receiver.requests]
    assert sorted(arrived) == sorted(each["id"] for each in receipts)
    assert {each.headers["webhook-attempt"] for each in receiver.requests} == {"1"}
    assert len(receiver.connections) == 1


async def test_a_config_with_mistakes_is_told_whole_and_changes_nothing(tmp_path, receiver, trusted):
    """By HTTP and by signal; no secret shows, not even one that stands where it should not."""
    good = endpoint("main", receiver.url)
    bad = endpoint("main", receiver.url, secret=f'"{NEW}"', concurrency='"many"')
    bad += endpoint("next", "ftp://x", secret='"${file:/run/none}"') + f'[logging]\ntoken = "{NEW}"\n'
    with relay_process(tmp_path, good, trusted) as relay:
        relay.configure(bad)
        status, problem = await call(relay, "POST", "/v1/reload")
        os.kill(relay.process.pid, signal.SIGHUP)
        await until(lambda: len(lines(relay, "reload_refused")) == 2)

        await post(relay)
        (request,) = await receiver.wait_for(1)
        _, settings = await call(relay, "GET", "/v1/webhooks/settings")

        assert status == 422
        told = [each["detail"] for each in problem["errors"]]
        keys = ("endpoints[0].concurrency", "endpoints[1].url", "endpoints[1].secret", "logging.token")
        for each, key in zip(told, keys, strict=True):
            assert each.startswith(f"{relay.config}:")
            assert f": {key}: " in each
        assert [each["problems"] for each in lines(relay, "reload_refused")] == [told] * 2
        assert NEW.removeprefix("whsec_") not in relay.log + json.dumps(problem)
        assert [each["id"] for each in settings["data"]] == ["main"]
        Webhook(OLD).verify(request.body, dict(request.headers))

        assert await reload(relay, good) == NOTHING, "and the next good one is taken"


async def test_a_secret_is_read_again_from_its_file(tmp_path, receiver, trusted):
    """That is how secrets are rotated in a pod: the file changes, the config does not; retries sign anew."""
    secret = tmp_path / "secret.txt"
    secret.write_text(OLD)
    receiver.answers(503)
    config = endpoint(
        "main",
        receiver.url,
        secret=f'"${{file:{secret}}}"',
        retry_schedule='["300ms"]',
        signatures='["standard"]',
    )
    with relay_process(tmp_path, config, trusted) as relay:
        await post(relay)
        await receiver.wait_for(1)
        secret.write_text(NEW + "\n")
        assert await reload(relay) == NOTHING | {"changed": ["main"]}
        first, second = await receiver.wait_for(2)
        Webhook(OLD).verify(first.body, dict(first.headers))
        Webhook(NEW).verify(second.body, dict(second.headers))
        assert await reload(relay) == NOTHING, "nothing has changed since"


async def test_two_signals_at_once_end_with_the_newest_config(tmp_path, receiver, trusted):
    """A deployment tool that is called twice must not leave the first of two files in force."""
    main = endpoint("main", receiver.url)
    with relay_process(tmp_path, main, trusted) as relay:
        relay.configure(main + endpoint("first", "https://127.0.0.1:9/"))
        os.kill(relay.process.pid, signal.SIGHUP)
        relay.configure(main + endpoint("second", "https://127.0.0.1:9/"))
        os.kill(relay.process.pid, signal.SIGHUP)
        await until(lambda: any("second" in each["added"] for each in lines(relay, "reloaded")))
        _, settings = await call(relay, "GET", "/v1/webhooks/settings")
        assert [each["id"] for each in settings["data"]] == ["main", "second"]


async def test_what_waits_for_a_removed_endpoint_is_cancelled_with_one_warning(tmp_path, receiver, trusted):
    """Nothing leaves pending unseen; and it is there again for a replay when the endpoint returns."""
    main, gone = endpoint("main", receiver.url), endpoint("gone", "https://127.0.0.1:9/")
    with relay_process(tmp_path, main + gone, trusted) as relay:
        receipts = [await post(relay) for _ in range(3)]
        await receiver.wait_for(3)
        assert await reload(relay, main) == NOTHING | {"removed": ["gone"], "cancelled": 3}
        (warning,) = lines(relay, "deliveries_cancelled")
        _, story = await call(relay, "GET", f"/v1/events/{receipts[0]['id']}")
        assert (warning["endpoint"], warning["deliveries"]) == ("gone", 3)
        assert {each["endpoint"]: each["state"] for each in story["deliveries"]} == {
            "main": "delivered", "gone": "cancelled",
        }  # fmt: skip
        assert (await post(relay))["endpoints"] == ["main"]

        await reload(relay, main + endpoint("gone", f"{receiver.url}/new"))
        path = "/v1/webhooks/settings/gone/replay"
        assert (await call(relay, "POST", path, {"state": "cancelled"}))[1]["count"] == 3
        await receiver.wait_for(4 + 3)


async def test_the_apis_endpoints_stay_and_step_aside_where_the_config_has_their_id_or_url(
    tmp_path, receiver, trusted
):
    """The config is the last word; what the API was told comes back when the config lets go of it."""
    opened = trusted | {"RELAY_EGRESS__ALLOW_PRIVATE_FOR_API": "true"}
    with relay_process(tmp_path, "", opened) as relay:
        for id_ in ("mine", "same-url", "free"):
            settings = {"id": id_, "url": f"{receiver.url}/{id_}", "events": ["a.*"], "secret": OLD}
            assert (await call(relay, "POST", "/v1/webhooks/settings", settings))[0] == 201
            await call(relay, "POST", f"/v1/webhooks/settings/{id_}/pause")
        await post(relay)
        taken = endpoint("mine", f"{receiver.url}/theirs")
        taken += endpoint("theirs", f"{receiver.url.replace('https', 'HTTPS')}/same-url")

        assert await reload(relay, taken) == NOTHING | {
            "added": ["theirs"], "changed": ["mine"], "removed": ["same-url"],
            "cancelled": 1, "set_aside": ["mine", "same-url"],
        }  # fmt: skip
        _, settings = await call(relay, "GET", "/v1/webhooks/settings")
        shown = {each["id"]: (each["source"], each["state"], each["pending"]) for each in settings["data"]}
        assert shown == {
            "mine": ("config", "paused", 1), "theirs": ("config", "active", 0), "free": ("api", "paused", 1),
        }  # fmt: skip

        assert (await reload(relay, ""))["set_aside"] == []
        relay.stop()
        relay.start()
        _, settings = await call(relay, "GET", "/v1/webhooks/settings")
        shown = {each["id"]: (each["source"], each["state"]) for each in settings["data"]}
        assert shown == dict.fromkeys(("free", "mine", "same-url"), ("api", "paused"))


async def test_what_is_not_an_endpoints_takes_effect_too(tmp_path, receiver, trusted):
    """Tokens, catalogue, sizes, hosts and the log's level are changed while the relay runs."""
    main = endpoint("main", receiver.url)
    with relay_process(tmp_path, main, trusted) as relay:
        catalogue = '[logging]\nlevel = "debug"\n[events."c.d"]\n'
        server = 'tokens = ["sk_new"]\nmax_event_size = "300B"\nallowed_hosts = ["relay.local"]'
        assert await reload(relay, main + catalogue, server) == NOTHING

        token = {"Authorization": "Bearer sk_new", "Host": "relay.local"}
        assert (await call(relay, "GET", "/v1/events"))[0] == 401
        assert (await call(relay, "GET", "/v1/event-types", None, token))[1]["data"][0]["event"] == "c.d"
        event = {"event": "a.b", "data": {}}
        assert (await call(relay, "POST", "/v1/events", event, token))[0] == 422
        event = {"event": "c.d", "data": {"text": "x" * 300}}
        assert (await call(relay, "POST", "/v1/events", event, token))[0] == 413
        event = {"event": "c.d", "data": {}}
        assert (await call(relay, "POST", "/v1/events", event, token))[0] == 202
        await until(lambda: bool(lines(relay, "attempt_delivered")))


async def test_a_place_that_is_opened_by_a_reload_is_delivered_to_and_a_closed_one_is_not(
    tmp_path, receiver, trusted
):
    """The guard's rules are the config's, also for endpoints that did not change otherwise."""
    config = endpoint("main", receiver.url, retry_schedule='["1h"]')
    with relay_process(tmp_path, config, trusted) as relay:
        await post(relay)
        await receiver.wait_for(1)
        opened = relay.config.read_text()
        for attempts, text in (
            (1, opened.replace('"127.0.0.0/8"', '"10.0.0.0/8"')),
            (2, opened),
        ):
            relay.config.write_text(text)
            assert await reload(relay) == NOTHING
            receipt = await post(relay)
            if attempts == 2:
                await receiver.wait_for(2)
                continue
            await until(lambda: bool(lines(relay, "attempt_failed")))
            (failed,) = lines(relay, "attempt_failed")
            assert (failed["event_id"], failed["reason"]) == (receipt["id"], "blocked_address")
            assert len(receiver.requests) == 1


async def test_what_needs_a_restart_is_named_and_kept(tmp_path, receiver, trusted):
    """Nobody finds out the next morning that half of a change had waited for the next start."""
    with relay_process(tmp_path, endpoint("main", receiver.url), trusted) as relay:
        text = relay.config.read_text()
        text = text.replace(str(relay.port), "1").replace('relay.db"', 'next.db"\ndurability = "normal"')
        text = text.replace(
            "[outbox]",
            'ops_listen = "127.0.0.1:2"\nloop = "asyncio"\npage = false\n[outbox]\nmax_pending = 7',
        )
        relay.config.write_text(text)
        keys = [
            "server.listen", "server.ops_listen", "server.loop", "server.page",
            "outbox.path", "outbox.durability", "outbox.max_pending",
        ]  # fmt: skip
        assert await reload(relay) == NOTHING | {"needs_restart": keys}
        assert [each["keys"] for each in lines(relay, "restart_needed")] == [keys]
        await post(relay)
        await receiver.wait_for(1)
        assert not (tmp_path / "next.db").exists()


def test_tokens_stay_as_long_as_others_can_reach_where_it_listens_now(tmp_path):
    """A config that moves to loopback and drops its tokens is right, but not before the restart."""
    path = tmp_path / "relay.toml"
    path.write_text('[server]\nlisten = "0.0.0.0:8484"\ntokens = ["sk_1"]\n')
    running = load(path, {})
    path.write_text("")
    told = load(path, {})

    config, needs_restart = fitted(told, running)

    assert (str(config.server.listen), config.server.tokens) == ("0.0.0.0:8484", (Secret("sk_1"),))
    assert needs_restart == ("server.listen", "server.tokens")
    assert fitted(told, told) == (told, ())


async def test_a_relay_that_is_stopping_reloads_nothing_and_stops_as_it_would_have(
    tmp_path, receiver, trusted
):
    """A rolling deployment sends both; what is in flight gets its grace all the same."""
    receiver.answers(Answer(200, delay=1.0))
    with relay_process(tmp_path, endpoint("main", receiver.url), trusted) as relay:
        await post(relay)
        await receiver.wait_for(1)
        os.kill(relay.process.pid, signal.SIGTERM)
        await until(lambda: bool(lines(relay, "stopping")))
        relay.configure(endpoint("other", receiver.url))
        os.kill(relay.process.pid, signal.SIGHUP)
        assert (await call(relay, "POST", "/v1/reload"))[0] == 503
        await until(lambda: len(lines(relay, "reload_refused")) == 2)
        assert await asyncio.to_thread(relay.process.wait, 10) == 0
        assert not lines(relay, "drain_cut_off")
        assert {tuple(each["problems"]) for each in lines(relay, "reload_refused")} == {
            ("the relay is stopping",)
        }


async def test_a_signal_while_it_starts_does_not_end_it_and_a_reload_that_hangs_does_not_keep_it(tmp_path):
    """A terminal that closes while secrets are fetched, and a place of secrets that has gone away since."""
    secret = tmp_path / "secret"
    os.mkfifo(secret)
    config = endpoint("main", "https://127.0.0.1:9/", secret=f'"${{file:{secret}}}"')
    with relay_process(tmp_path, config, start=False) as relay:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(relay.start))
            with await read_by(secret) as fed:
                for _ in range(3):
                    os.kill(relay.process.pid, signal.SIGHUP)
                fed.write(OLD.encode())
        os.kill(relay.process.pid, signal.SIGHUP)
        with await read_by(secret):
            assert relay.stop() == 0


async def read_by(pipe: Path) -> BinaryIO:
    """Open a pipe for writing as soon as the relay reads from it."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(OSError):
                return os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb")
            await asyncio.sleep(0.02)
