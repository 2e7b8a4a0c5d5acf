"""A receiver's trouble as an operator lives through it, with a real relay in a process of its own."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from tests.process import RelayProcess, relay_process
from tests.receiver import Answer, Receiver

SECRET = "trouble-secret-of-32-characters!"
MAIN = "/v1/webhooks/settings/main"
CONFIG = """
[[endpoints]]
id = "main"
url = "{main}"
events = ["*"]
secret = "{secret}"
order = "key"
retry_schedule = [{schedule}]
down_after = 3
probe_interval = "150ms"
probe_max = "300ms"

[[endpoints]]
id = "ops"
url = "{ops}"
events = ["relay.endpoint.down", "relay.endpoint.recovered", "relay.endpoint.gone"]
secret = "{secret}"
"""


@pytest.fixture
async def main() -> AsyncIterator[Receiver]:
    async with Receiver() as each:
        yield each


@pytest.fixture
async def ops() -> AsyncIterator[Receiver]:
    async with Receiver() as each:
        yield each


@pytest.fixture
async def relay(tmp_path: Path, main: Receiver, ops: Receiver) -> AsyncIterator[RelayProcess]:
    authority = tmp_path / "authority.pem"
    authority.write_bytes(main.authority.cert_pem.bytes())
    config = CONFIG.format(main=main.url, ops=ops.url, secret=SECRET, schedule='"300ms",' * 50)
    with relay_process(tmp_path, config, {"SSL_CERT_FILE": str(authority)}) as process:
        yield process


async def call(relay: RelayProcess, *arguments: object) -> tuple[int, dict]:
    return await asyncio.to_thread(relay.call, *arguments)


async def post(relay: RelayProcess, *numbers: int) -> list[str]:
    ids = []
    for number in numbers:
        event = {"event": "post.published", "data": {"n": number}, "key": "k"}
        status, receipt = await call(relay, "POST", "/v1/events", event)
        assert status == 202
        ids.append(receipt["id"])
    return ids


async def shows(relay: RelayProcess, **expected: object) -> dict:
    """Return the endpoint's settings once they show this."""
    async with asyncio.timeout(15):
        while True:
            _, settings = await call(relay, "GET", MAIN)
            if {name: settings[name] for name in expected} == expected:
                return settings
            await asyncio.sleep(0.02)


async def told(ops: Receiver, count: int) -> list[tuple[str, dict]]:
    """Return what the subscriber was told, each once: a kill may have come between answer and record."""
    async with asyncio.timeout(10):
        while len(by_id := {each.headers["webhook-id"]: each for each in ops.requests}) < count:
            await asyncio.sleep(0.02)
    bodies = [orjson.loads(request.body) for request in by_id.values()]
    return [(body["event"], body["data"]) for body in bodies]


async def test_an_endpoint_goes_down_is_probed_and_recovers_and_kill_9_changes_none_of_it(relay, main, ops):
    """Twenty events of one key, the receiver broken from the first on: all arrive, in order."""
    main.answers(*[503] * 5_000)
    ids = await post(relay, *range(10))
    # One key is one at a time and one poisonous event brings nothing down: another event without a key does.
    await call(relay, "POST", "/v1/events", {"event": "post.published", "data": {"n": -1}})
    await shows(relay, state="down", last_error="http_503", pending=11)

    await asyncio.to_thread(relay.kill)
    await asyncio.to_thread(relay.start)
    settings = await shows(relay, state="down")
    assert settings["pending"] == 11
    ids += await post(relay, *range(10, 20))
    before = len(main.requests)
    await main.wait_for(before + 3, within=10)
    assert (await shows(relay, state="down"))["pending"] == 21, "probes give nothing up"

    main._script.clear()
    await shows(relay, state="active", pending=0, dead=0)
    news = await told(ops, 2)
    assert [event for event, _ in news] == ["relay.endpoint.down", "relay.endpoint.recovered"]
    assert {data["endpoint"] for _, data in news} == {"main"}
    taken = [request.headers["webhook-id"] for request in main.requests[before:]]
    assert [id_ for id_ in dict.fromkeys(reversed(taken)) if id_ in ids] == ids[::-1]


async def test_410_is_shown_as_gone_and_waits_for_resume(relay, main, ops):
    main.answers(410)
    await post(relay, 1)
    await shows(relay, state="gone", pending=1, last_error="http_410")
    await post(relay, 2)
    await asyncio.to_thread(relay.kill)
    await asyncio.to_thread(relay.start)
    await shows(relay, state="gone", pending=2)
    assert len(main.requests) == 1
    assert await told(ops, 1) == [
        ("relay.endpoint.gone", {"endpoint": "main", "reason": "http_410", "failures": 0})
    ]

    _, settings = await call(relay, "POST", f"{MAIN}/pause")
    assert settings["state"] == "paused", "a person's word goes first"
    status, settings = await call(relay, "POST", f"{MAIN}/resume")
    assert (status, settings["state"]) == (200, "active")
    await main.wait_for(3)
    await shows(relay, state="active", pending=0)


async def test_retry_after_is_kept_over_kill_9_and_lifted_by_resume(relay, main):
    main.answers(Answer(503, {"Retry-After": "3600"}))
    await post(relay, 1)
    await shows(relay, last_error="http_503")
    await asyncio.to_thread(relay.kill)
    await asyncio.to_thread(relay.start)
    await post(relay, 2)
    await asyncio.sleep(0.7)  # longer than its retry would take
    assert len(main.requests) == 1
    await call(relay, "POST", f"{MAIN}/resume")
    await main.wait_for(3)
    await shows(relay, pending=0)


OWN = {"id": "own", "url": "https://receiver.example/hook", "events": ["post.*"]}


async def test_rate_and_order_are_set_and_shown_through_the_api(relay):
    status, made = await call(
        relay, "POST", "/v1/webhooks/settings", OWN | {"rate": "50/s", "order": "key", "concurrency": 3}
    )
    assert (status, made["rate"], made["order"], made["concurrency"]) == (201, "50/s", "key", 3)
    own = "/v1/webhooks/settings/own"
    for rate in ("1000/m", "1/m", "7/m", "60/m", "999999/s", None):
        status, changed = await call(relay, "PATCH", own, {"rate": rate})
        assert (status, changed["order"]) == (200, "key")
        assert changed["rate"] == ("1/s" if rate == "60/m" else rate)
    _, changed = await call(relay, "PATCH", own, {"order": "none"})
    assert changed["order"] == "none"
    _, config = await call(relay, "GET", MAIN)
    assert (config["rate"], config["order"]) == (None, "key")


async def test_what_is_wrong_or_the_configs_alone_is_refused_through_the_api_all_at_once(relay):
    """What decides about an endpoint's fate is not for whoever may register one."""
    wrong = {
        "max_age": "1h", "down_after": 0, "probe_interval": "1s", "probe_max": "1s",
        "rate": "50/h", "order": "fifo",
    }  # fmt: skip
    settings = "/v1/webhooks/settings"
    refused = [await call(relay, "POST", settings, OWN | wrong)]
    assert (await call(relay, "POST", settings, OWN))[0] == 201
    refused.append(await call(relay, "POST", settings, OWN | wrong))
    refused.append(await call(relay, "PATCH", f"{settings}/own", wrong))
    for status, problem in refused:
        assert status == 422
        told = {each["pointer"].removeprefix("#/"): each["detail"] for each in problem["errors"]}
        assert set(told) == set(wrong)
        alone = {name for name, detail in told.items() if detail == "is set in the config alone"}
        assert alone == {"max_age", "down_after", "probe_interval", "probe_max"}
    assert (await call(relay, "GET", f"{settings}/own"))[1]["order"] == "none"
