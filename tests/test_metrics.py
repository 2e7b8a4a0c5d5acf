"""Metrics: what a real relay's scrape shows, what it costs, and that names never grow without bound."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from relay.clock import SystemClock
from relay.metrics import MOST_ENDPOINTS, MOST_REASONS, OTHER_REASON, REST, Metrics
from relay.metrics.exposition import OPENMETRICS, TEXT, EndpointNow, Now, render
from tests.process import RelayProcess, free_port, relay_process
from tests.receiver import Answer, Receiver

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
EVENT = {"event": "post.published", "data": {"postId": "post_1"}}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def relay(tmp_path: Path, receiver: Receiver) -> AsyncIterator[RelayProcess]:
    """Two endpoints: one that answers as the test says, one that nobody may dial."""
    (tmp_path / "authority.pem").write_bytes(receiver.authority.cert_pem.bytes())
    more = f'secret = "{SECRET}"\nretry_schedule = ["20ms"]'
    config = "".join(
        f'[[endpoints]]\nid = "{id_}"\nurl = "{url}"\nevents = ["{events}"]\n{more}\n'
        for id_, url, events in (
            ("main", receiver.url, "post.*"),
            ("inward", "https://10.9.8.7/", "inward.*"),
        )
    )
    with relay_process(
        tmp_path, config, {"SSL_CERT_FILE": str(tmp_path / "authority.pem")}, start=False
    ) as process:
        process.ops_port = free_port()
        process.environment |= {"RELAY_SERVER__OPS_LISTEN": f"127.0.0.1:{process.ops_port}"}
        await asyncio.to_thread(process.start)
        yield process


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


async def scrape(relay: RelayProcess) -> Samples:
    status, text = await asyncio.to_thread(relay.call, "GET", "/metrics")
    assert status == 200
    return samples(str(text))


async def until(relay: RelayProcess, name: str, value: float, within: float = 10.0, **labels: str) -> Samples:
    """Scrape until a sample has this value."""
    async with asyncio.timeout(within):
        while True:
            seen = await scrape(relay)
            if seen.get((name, tuple(sorted(labels.items())))) == value:
                return seen
            await asyncio.sleep(0.02)


async def post(relay: RelayProcess, content: object, **headers: str) -> int:
    status, _ = await asyncio.to_thread(relay.call, "POST", "/v1/events", content, headers)
    return status


async def test_a_scrape_tells_what_was_accepted_attempted_and_delivered(relay, receiver):
    """From the counts alone an operator sees what came in, what went out and what it met."""
    receiver.answers(503)
    assert await post(relay, EVENT, **{"Idempotency-Key": "once"}) == 202
    assert await post(relay, EVENT, **{"Idempotency-Key": "once"}) == 200
    assert await post(relay, {"event": "post"}) == 422
    assert await post(relay, b"{") == 400
    assert await post(relay, {"event": "inward.one", "data": {}}) == 202

    await until(relay, "relay_delivery_attempts_total", 1, endpoint="main", reason="ok")
    seen = await until(relay, "relay_dead_letters_total", 1, endpoint="inward")

    def of(name: str, **labels: str) -> float:
        return seen[name, tuple(sorted(labels.items()))]

    assert of("relay_events_accepted_total") == 2
    assert of("relay_events_duplicate_total") == 1
    assert of("relay_events_rejected_total", reason="invalid") == 1
    assert of("relay_events_rejected_total", reason="not_json") == 1
    assert of("relay_delivery_attempts_total", endpoint="main", reason="http_503") == 1
    assert of("relay_delivery_attempts_total", endpoint="inward", reason="blocked_address") == 2
    assert of("relay_delivery_duration_seconds_count", endpoint="main") == 2
    assert of("relay_event_delivery_lag_seconds_count", endpoint="main") == 1
    assert 0.02 <= of("relay_event_delivery_lag_seconds_sum", endpoint="main") < 5
    assert of("relay_outbox_deliveries", endpoint="inward", state="dead") == 1
    assert of("relay_outbox_deliveries", endpoint="main", state="pending") == 0
    assert of("relay_store_commit_duration_seconds_count") >= 4
    assert of("relay_outbox_bytes", part="file") > 0
    assert of("relay_outbox_max_bytes") == 10 << 30
    assert of("relay_outbox_disk_free_bytes") > 0
    assert of("relay_outbox_refusing") == 0
    assert of("relay_api_connections") >= 1
    assert of("relay_config_last_reload_successful") == 1
    assert abs(of("relay_config_last_reload_success_timestamp_seconds") - SystemClock().now_ms() / 1000) < 60
    assert of("process_resident_memory_bytes") > 10 << 20


async def test_what_waits_is_told_by_endpoint_with_its_age_and_why(relay, receiver):
    """The one alert everyone needs: the oldest event that somebody still waits for."""
    await asyncio.to_thread(relay.call, "POST", "/v1/webhooks/settings/main/pause")
    await post(relay, EVENT)
    await asyncio.sleep(0)
    first = await until(relay, "relay_outbox_deliveries", 1, endpoint="main", state="pending")
    second = await scrape(relay)

    age = ("relay_outbox_oldest_age_seconds", (("endpoint", "main"),))
    assert 0 <= first[age] < second[age] < 60
    assert second["relay_endpoint_state", (("endpoint", "main"), ("state", "paused"))] == 1
    assert second["relay_endpoint_state", (("endpoint", "main"), ("state", "active"))] == 0
    assert second["relay_endpoint_paused", (("endpoint", "main"),)] == 1
    assert second["relay_endpoints", (("state", "paused"),)] == 1


async def test_the_second_address_serves_the_same_in_openmetrics_too(relay):
    """Prometheus comes from outside the pod, asks for OpenMetrics first, and knows no Host of ours."""
    port, relay.port = relay.port, relay.ops_port
    answers = [
        await asyncio.to_thread(relay.call, "GET", "/metrics", None, {"Accept": accept, "Host": "pod-1:9464"})
        for accept in (
            "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5",
            "text/plain",
            "application/openmetrics-text;version=nonsense",
        )
    ]
    relay.port = port

    assert [status for status, _ in answers] == [200, 200, 200]
    families = [
        {sample.name for family in parse(str(text)) for sample in family.samples}
        for parse, (_, text) in zip((parse_openmetrics, parse_text, parse_openmetrics), answers, strict=True)
    ]
    assert "relay_events_accepted_total" in families[0]
    assert families[0] == families[1] == families[2]


async def test_a_certificate_a_throttle_and_a_full_outbox_are_each_named_as_such(tmp_path):
    """Three faults as they come at night: each has its own name in a scrape, with the endpoint it is at."""
    async with Receiver(expired=True) as expired, Receiver() as busy:
        busy.answers(*[Answer(429, {"Retry-After": "60"})] * 3)
        (tmp_path / "authority.pem").write_bytes(busy.authority.cert_pem.bytes())
        config = "".join(
            f'[[endpoints]]\nid = "{id_}"\nurl = "{url}"\nevents = ["{id_}"]\nsecret = "{SECRET}"\n'
            for id_, url in (("expired", expired.url), ("busy", busy.url))
        )
        environment = {"SSL_CERT_FILE": str(tmp_path / "authority.pem"), "RELAY_OUTBOX__MAX_PENDING": "2"}
        with relay_process(tmp_path, config, environment) as relay:
            for event in ("expired", "busy"):
                assert await post(relay, {"event": event, "data": {}}) == 202
            assert await post(relay, {"event": "busy", "data": {}}) == 503
            await until(relay, "relay_delivery_attempts_total", 1, endpoint="expired", reason="tls_cert")
            seen = await until(relay, "relay_delivery_attempts_total", 1, endpoint="busy", reason="http_429")

    assert seen["relay_outbox_refusing", ()] == 1
    assert seen["relay_outbox_max_pending", ()] == 2
    assert seen["relay_events_rejected_total", (("reason", "full"),)] == 1
    assert seen["relay_events_rejected_total", (("reason", "stopping"),)] == 0


async def test_a_scrape_says_whether_the_config_that_was_read_last_is_in_force(relay):
    """The old one stays in force after a mistake, so nothing else would tell."""
    successful, at = (
        "relay_config_last_reload_successful",
        "relay_config_last_reload_success_timestamp_seconds",
    )
    before, text = await scrape(relay), relay.config.read_text()
    relay.config.write_text(text + "nonsense = 1\n")
    assert (await asyncio.to_thread(relay.call, "POST", "/v1/reload"))[0] == 422
    refused = await scrape(relay)
    relay.config.write_text(text)
    assert (await asyncio.to_thread(relay.call, "POST", "/v1/reload"))[0] == 200
    taken = await scrape(relay)

    assert [each[successful, ()] for each in (before, refused, taken)] == [1, 0, 1]
    assert before[at, ()] == refused[at, ()] < taken[at, ()]


async def test_an_endpoint_that_was_removed_is_in_no_scrape(relay):
    """Names that come and go through the API must not add up."""
    settings = {"url": "https://receiver.test/", "events": ["none.*"], "id": "guest"}
    await asyncio.to_thread(relay.call, "POST", "/v1/webhooks/settings", settings)
    there = await scrape(relay)
    await asyncio.to_thread(relay.call, "DELETE", "/v1/webhooks/settings/guest")
    gone = await scrape(relay)

    assert any(("endpoint", "guest") in labels for _, labels in there)
    assert not any(("endpoint", "guest") in labels for _, labels in gone)


def now(endpoints: dict[str, EndpointNow]) -> Now:
    return Now(
        build={"version": "1"}, endpoints=endpoints, refusing=False, file_bytes=1, log_bytes=1, used_bytes=1,
        max_bytes=None, max_pending=None, disk_free_bytes=1,
        relays=1, dropped=0, connections=1, sending=1, most_sending=1,
    )  # fmt: skip


def test_beyond_a_thousand_endpoints_the_rest_is_counted_together():
    """A scrape stays bounded, and the sums stay true."""
    metrics = Metrics()
    tallies = [metrics.of(f"endpoint-{number:05}") for number in range(MOST_ENDPOINTS + 50)]
    for tally in tallies:
        tally.attempted("timeout", 10)
    standing = EndpointNow(state="down", pending=2, dead=1, oldest_seconds=3.0)
    text, _ = render(metrics, now({f"endpoint-{n:05}": standing for n in range(MOST_ENDPOINTS + 50)}), "")
    seen = samples(text.decode())

    endpoints = {value for _, labels in seen for label, value in labels if label == "endpoint"}
    assert len(endpoints) == MOST_ENDPOINTS + 1
    assert seen["relay_delivery_attempts_total", (("endpoint", REST), ("reason", "timeout"))] == 50
    assert seen["relay_outbox_deliveries", (("endpoint", REST), ("state", "pending"))] == 100
    assert seen["relay_outbox_oldest_age_seconds", (("endpoint", REST),)] == 3
    assert seen["relay_endpoints", (("state", "down"),)] == MOST_ENDPOINTS + 50


def test_a_receiver_cannot_make_labels_without_end():
    """It chooses the status it answers with, so it would choose our labels."""
    tally = Metrics().of("main")
    for status in range(300, 999):
        tally.attempted(f"http_{status}", 1)
    assert len(tally.attempts) <= MOST_REASONS + 1
    assert tally.attempts[OTHER_REASON] == 699 - (MOST_REASONS - 1)
    assert sum(tally.attempts.values()) == 699


def test_a_histogram_counts_a_bound_itself_as_within_it():
    """`le` is less or equal; the last bucket holds everything."""
    metrics = Metrics()
    for milliseconds in (5, 6, 40_000):
        metrics.of("main").attempted(None, milliseconds)
    seen = samples(render(metrics, now({}), "")[0].decode())

    def bucket(le: str) -> float:
        return seen["relay_delivery_duration_seconds_bucket", (("endpoint", "main"), ("le", le))]

    assert [bucket("0.005"), bucket("0.01"), bucket("30.0"), bucket("+Inf")] == [1, 2, 2, 3]
    assert seen["relay_delivery_duration_seconds_sum", (("endpoint", "main"),)] == pytest.approx(40.011)


def test_counting_costs_an_event_next_to_nothing(capsys):
    """It lies in the way of every event; the bound is generous, the figure is printed."""
    metrics, rounds = Metrics(), 50_000
    tally = metrics.of("main")
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(rounds):
            metrics.accepted += 1
            tally.attempted(None, 12)
            tally.lag.observe(0.012)
        best = min(best, (time.perf_counter() - begun) / rounds)
    with capsys.disabled():
        print(f"\ncounting an event accepted, attempted and delivered: {best * 1e6:.2f} µs")
    assert best < 20e-6


async def test_a_scrape_of_a_thousand_endpoints_does_not_hold_up_the_loop(capsys):
    """Written in a thread, and with pauses: else the loop would wait for it at every turn."""
    metrics = Metrics()
    for number in range(MOST_ENDPOINTS):
        tally = metrics.of(f"endpoint-{number}")
        tally.attempted(None, 12)
        tally.attempted("http_503", 12)
    standing = EndpointNow(state="active", pending=2, dead=1, oldest_seconds=3.0)
    endpoints = dict.fromkeys(metrics.endpoints, standing)
    late: list[float] = []
    begun = time.perf_counter()
    scraping = asyncio.get_running_loop().run_in_executor(None, render, metrics, now(endpoints), "")
    while not scraping.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(time.perf_counter() - before - 0.001)
    text, type_ = await scraping
    seconds = time.perf_counter() - begun
    late.sort()
    median = late[len(late) // 2]
    with capsys.disabled():
        print(
            f"\na scrape of {MOST_ENDPOINTS} endpoints: {len(text) / 1e6:.1f} MB in {seconds:.2f} s, "
            f"meanwhile the loop late by {median * 1e3:.2f} ms (median), {late[-1] * 1e3:.1f} ms (most)"
        )
    assert type_ == TEXT != OPENMETRICS
    assert len(late) > 20
    assert median < 0.05
