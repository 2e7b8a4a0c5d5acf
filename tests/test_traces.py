"""Traces: every attempt goes on with the submission's, and with the extra each of them is a span."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from relay.model import Delivery, Event, Outcome, Owed, Submission
from relay.traces import Continued, open_traces
from relay.traces.spans import LATE_MS, Spans
from tests.clock import START_MS
from tests.lanes import OK, REFUSED, endpoint
from tests.process import free_port, relay_process
from tests.receiver import Receiver

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
EVENT = Event(
    id="evt_1",
    type="post.published",
    timestamp="2026-01-15T10:00:00.000Z",
    data=b'{"text":"in_the_payload"}',
    accepted_at_ms=START_MS,
    traceparent=TRACEPARENT,
    tracestate="vendor=1",
)
DELIVERY = Delivery(
    handle=(1, 1),
    event=EVENT,
    endpoint="main",
    format="event",
    attempts=0,
    steps=0,
    due_ms=START_MS,
    digest=b"",
)
RECEIVER = endpoint(url="https://receiver.test:8443/hook?key=in_the_query")


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(memory: InMemorySpanExporter) -> Spans:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return Spans(provider, "1.2.3")


def hex_of(context: object) -> tuple[str, str]:
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def sent(headers: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """What the receiver is told: the trace and the span that its own go below."""
    _, trace, span, _ = dict(headers)["traceparent"].split("-")
    return trace, span


def test_without_the_extra_an_attempt_shows_a_child_of_the_submission():
    first, second = (Continued().attempt(RECEIVER, DELIVERY, number, START_MS).headers for number in (1, 2))
    assert sent(first)[0] == sent(second)[0] == TRACE
    assert len({PARENT, sent(first)[1], sent(second)[1]}) == 3
    assert dict(first)["tracestate"] == "vendor=1"
    untraced = replace(DELIVERY, event=replace(EVENT, traceparent=None, tracestate=None))
    assert Continued().attempt(RECEIVER, untraced, 1, START_MS).headers == ()


def test_a_submission_is_a_span_below_the_applications_and_attempts_are_below_it(spans, memory):
    """One look at the trace tells where the time went between the application and the receiver."""
    with spans.submitting([Submission(event=EVENT, endpoints=(Owed("main", "event"),), digest=b"")]) as kept:
        (submission,) = kept
    span = spans.attempt(RECEIVER, replace(DELIVERY, event=submission.event), 2, START_MS + LATE_MS)
    headers = span.headers
    span.ended(REFUSED)

    submitted, attempted = memory.get_finished_spans()
    assert hex_of(submitted.parent) == (TRACE, PARENT)
    assert (submitted.name, submitted.kind.name) == ("submit post.published", "PRODUCER")
    assert submission.event.traceparent == f"00-{TRACE}-{hex_of(submitted.context)[1]}-01"
    assert submission.event.tracestate == "vendor=1"
    assert hex_of(attempted.parent) == hex_of(submitted.context)
    assert (attempted.name, attempted.kind.name) == ("deliver main", "CLIENT")
    assert sent(headers) == hex_of(attempted.context)
    assert dict(attempted.attributes) == {
        "messaging.system": "relay",
        "messaging.operation.name": "deliver",
        "messaging.operation.type": "send",
        "messaging.destination.name": "main",
        "messaging.message.id": "evt_1",
        "messaging.message.body.size": len(EVENT.data),
        "http.request.method": "POST",
        "http.request.resend_count": 1,
        "http.response.status_code": 503,
        "url.scheme": "https",
        "server.address": "receiver.test",
        "server.port": 8443,
        "error.type": "http_503",
    }
    assert (submitted.status.is_ok, attempted.status.is_ok) == (True, False)
    told = "".join(each.to_json() for each in (submitted, attempted))
    assert "in_the_payload" not in told
    assert "in_the_query" not in told


def test_a_late_attempt_begins_a_trace_of_its_own_linked_to_the_submission(spans, memory):
    """A trace that goes on for days is one that no backend shows."""
    span = spans.attempt(RECEIVER, DELIVERY, 3, START_MS + LATE_MS + 1)
    headers = span.headers
    span.ended(OK)

    (attempted,) = memory.get_finished_spans()
    (link,) = attempted.links
    assert attempted.parent is None
    assert hex_of(link.context) == (TRACE, PARENT)
    assert sent(headers) == hex_of(attempted.context)
    assert sent(headers)[0] != TRACE
    assert "tracestate" not in dict(headers)


def test_what_was_submitted_without_a_trace_begins_one(spans, memory):
    bare = replace(EVENT, traceparent=None, tracestate=None)
    with spans.submitting([Submission(event=bare, endpoints=(), digest=b"")]) as (submission,):
        pass
    (submitted,) = memory.get_finished_spans()
    assert submitted.parent is None
    version, trace, span, flags = submission.event.traceparent.split("-")
    assert (version, trace, span) == ("00", *hex_of(submitted.context))
    assert int(flags, 16) & 1  # sampled


def test_a_refused_submission_and_an_attempt_that_was_cut_off_say_so(spans, memory):
    with (
        pytest.raises(ZeroDivisionError),
        spans.submitting([Submission(event=EVENT, endpoints=(), digest=b"")]),
    ):
        raise ZeroDivisionError
    spans.attempt(RECEIVER, DELIVERY, 1, START_MS).ended(None)
    assert [span.attributes["error.type"] for span in memory.get_finished_spans()] == [
        "ZeroDivisionError",
        "cut_off",
    ]


def test_what_a_trace_has_not_sampled_is_passed_on_as_such(spans, memory):
    """The application's decision counts, or its bill doubles."""
    unsampled = replace(DELIVERY, event=replace(EVENT, traceparent=f"00-{TRACE}-{PARENT}-00"))
    span = spans.attempt(RECEIVER, unsampled, 1, START_MS)
    span.ended(Outcome(milliseconds=1, status=200))
    assert memory.get_finished_spans() == ()
    assert dict(span.headers)["traceparent"].startswith(f"00-{TRACE}-")
    assert dict(span.headers)["traceparent"].endswith("-00")


# With a collector


class Collector:
    """A receiver of OTLP over HTTP: keeps the spans it is sent, with the name of who sent them."""

    def __init__(self) -> None:
        self.spans: list[object] = []
        self.services: set[str] = set()
        self.port = 0

    async def wait_for(self, enough: Callable[[list[object]], bool], within: float = 10.0) -> list[object]:
        async with asyncio.timeout(within):
            while not enough(self.spans):
                await asyncio.sleep(0.02)
        return self.spans

    async def take(self, request: web.Request) -> web.Response:
        told = ExportTraceServiceRequest.FromString(await request.read())
        for resource in told.resource_spans:
            attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.services.add(attributes["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(content_type="application/x-protobuf")


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.port = runner.addresses[0][1]
    yield collector
    await runner.cleanup()


def config(receiver: Receiver) -> str:
    return (
        f'[[endpoints]]\nid = "main"\nurl = "{receiver.url}"\nevents = ["*"]\nsecret = "{SECRET}"\n'
        'retry_schedule = ["10ms"]\n'
    )


def environment(folder: Path, receiver: Receiver, port: int) -> dict[str, str]:
    (folder / "authority.pem").write_bytes(receiver.authority.cert_pem.bytes())
    return {
        "SSL_CERT_FILE": str(folder / "authority.pem"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


async def test_a_collector_sees_the_whole_way_of_an_event(tmp_path):
    """Application, submission, both attempts and the receiver are in one trace."""
    async with Receiver() as receiver, collecting() as collector:
        receiver.answers(503)
        with relay_process(
            tmp_path, config(receiver), environment(tmp_path, receiver, collector.port)
        ) as relay:
            event = {"event": "post.published", "data": {}}
            await asyncio.to_thread(relay.call, "POST", "/v1/events", event, {"traceparent": TRACEPARENT})
            first, second = await receiver.wait_for(2)
            assert await asyncio.to_thread(relay.stop) == 0
        spans = await collector.wait_for(lambda spans: len(spans) >= 3)

    submitted, *attempts = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert collector.services == {"relay"}
    assert (submitted.name, [span.name for span in attempts]) == (
        "submit post.published",
        ["deliver main"] * 2,
    )
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert submitted.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in attempts} == {submitted.span_id}
    for request, span in zip((first, second), attempts, strict=True):
        assert request.headers["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"


async def test_a_collector_that_is_down_costs_spans_and_nothing_else(tmp_path, capsys):
    """Nobody loses an event, a second of a delivery, or the disk to it."""
    async with Receiver() as receiver:
        with relay_process(tmp_path, config(receiver), environment(tmp_path, receiver, free_port())) as relay:
            for _ in range(20):
                await asyncio.to_thread(relay.call, "POST", "/v1/events", {"event": "post", "data": {}})
            await receiver.wait_for(20)
            begun = time.monotonic()
            assert await asyncio.to_thread(relay.stop) == 0
            seconds = time.monotonic() - begun
            log = relay.log
    with capsys.disabled():
        lines = log.count('"library"')
        print(f"\nstopped in {seconds:.1f} s with a collector that is down; {lines} lines about it")
    assert seconds < 10
    assert log.count('"library"') <= 5


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, None),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is grpc: only http/protobuf is spoken",
        ),
    ],
)
async def test_spans_are_off_unless_they_can_be_exported(variables, says, caplog):
    async with open_traces(variables, "1.2.3") as traces:
        assert isinstance(traces, Continued)
    assert [getattr(record, "error", None) for record in caplog.records] == ([says] if says else [])


OFF = """
import sys
import relay.serve
assert not [name for name in sys.modules if name.startswith(("opentelemetry", "google.protobuf", "requests"))]
"""
MISSING = """
import asyncio, os, sys
sys.modules["opentelemetry.sdk.trace"] = None
from relay.traces import open_traces
async def main():
    async with open_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, "1") as traces:
        print(type(traces).__name__)
asyncio.run(main())
"""


def test_nothing_of_it_is_imported_when_it_is_off():
    subprocess.run([sys.executable, "-c", OFF], check=True, timeout=20)


def test_without_the_extra_the_relay_runs_and_says_what_is_missing():
    """The variables are often set for everything in a pod."""
    told = subprocess.run(
        [sys.executable, "-c", MISSING], check=True, timeout=20, capture_output=True, text=True
    )
    assert told.stdout == "Continued\n"
    assert "traces_off" in told.stderr
