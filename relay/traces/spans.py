"""Spans of OpenTelemetry: a submission and each attempt come in, spans go out over OTLP/HTTP.

A submission is a producer span below the application's; its context is kept with the event. An attempt is a
client span below that one while the trace is young. Later it begins a trace of its own, linked to the
submission: a backend has long closed a trace that goes on for days. Attributes are those of the semantic
conventions for HTTP clients and messaging; no URL, for its path and query may be secret.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import AttributeValue

from relay.model import Delivery, Endpoint, Event, Outcome, Submission
from relay.traces import Headers, headers

LATE_MS = 5 * 60_000  # an attempt later than this after the acceptance is linked to it, not below it
FLUSH_SECONDS = 2.0  # at the stop; what a collector does not take by then is lost


@asynccontextmanager
async def open_spans(environ: Mapping[str, str], version: str) -> AsyncIterator["Spans"]:
    """Export over OTLP/HTTP, in a thread of the SDK's, to where OTEL_EXPORTER_OTLP_* says."""
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    name: dict[str, AttributeValue] = {} if named else {"service.name": "relay"}
    provider = TracerProvider(
        resource=Resource.create(name | {"service.version": version}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield Spans(provider, version)
    finally:
        # Not awaited to the end: a collector that is down must not keep the relay from stopping.
        flush = threading.Thread(target=provider.shutdown, name="flush spans", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_SECONDS)


class Spans:
    """`Traces` that are seen."""

    def __init__(self, provider: trace.TracerProvider, version: str) -> None:
        self._tracer = provider.get_tracer("relay", version)

    @contextmanager
    def submitting(self, submissions: Sequence[Submission]) -> Iterator[Sequence[Submission]]:
        spans = [self._submission(each.event) for each in submissions]
        try:
            yield [_below(each, span) for each, span in zip(submissions, spans, strict=True)]
        except BaseException as error:
            for span in spans:
                _fail(span, type(error).__name__)
            raise
        finally:
            for span in spans:
                span.end()

    def attempt(self, endpoint: Endpoint, delivery: Delivery, number: int, at_ms: int) -> "AttemptSpan":
        event = delivery.event
        origin = _context(event)
        late = at_ms - event.accepted_at_ms > LATE_MS
        span = self._tracer.start_span(
            f"deliver {endpoint.id}",
            context=_parent(None if late else origin),
            kind=SpanKind.CLIENT,
            links=[Link(origin)] if late and origin is not None else [],
            attributes=_of_attempt(endpoint, event, number),
        )
        return AttemptSpan(span)

    def _submission(self, event: Event) -> trace.Span:
        return self._tracer.start_span(
            f"submit {event.type}",
            context=_parent(_context(event)),
            kind=SpanKind.PRODUCER,
            attributes=_of_message(event, "submit", event.type),
        )


class AttemptSpan:
    """`Span` of one attempt."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def headers(self) -> Headers:
        return headers(*_written(self._span))

    def ended(self, outcome: Outcome | None) -> None:
        span = self._span
        if outcome is None:
            _fail(span, "cut_off")
        else:
            if outcome.status is not None:
                span.set_attribute("http.response.status_code", outcome.status)
            if outcome.reason is not None:
                _fail(span, outcome.reason)
        span.end()


def _fail(span: trace.Span, reason: str) -> None:
    span.set_attribute("error.type", reason)
    span.set_status(Status(StatusCode.ERROR, reason))


def _of_message(event: Event, operation: str, destination: str) -> dict[str, AttributeValue]:
    return {
        "messaging.system": "relay",
        "messaging.operation.name": operation,
        "messaging.operation.type": "send",
        "messaging.destination.name": destination,
        "messaging.message.id": event.id,
        "messaging.message.body.size": len(event.data),
    }


def _of_attempt(endpoint: Endpoint, event: Event, number: int) -> dict[str, AttributeValue]:
    url = urlsplit(endpoint.url)
    attributes = _of_message(event, "deliver", endpoint.id) | {
        "http.request.method": "POST",
        "url.scheme": url.scheme,
        "server.address": url.hostname or "",
        "server.port": url.port or (443 if url.scheme == "https" else 80),
    }
    return attributes if number == 1 else attributes | {"http.request.resend_count": number - 1}


def _below(submission: Submission, span: trace.Span) -> Submission:
    """Let attempts go on from this span."""
    parent, state = _written(span)
    return replace(submission, event=replace(submission.event, traceparent=parent, tracestate=state))


def _written(span: trace.Span) -> tuple[str, str | None]:
    context = span.get_span_context()
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 0b11:02x}"
    return parent, context.trace_state.to_header() or None


def _context(event: Event) -> SpanContext | None:
    if event.traceparent is None:
        return None
    _, trace_id, span_id, flags = event.traceparent.split("-")
    return SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16) & 0b11),
        trace_state=TraceState.from_header([event.tracestate] if event.tracestate else []),
    )


def _parent(context: SpanContext | None) -> Context:
    """Return what a span begins below: this, or nothing; never what happens to be current."""
    empty = Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(context), empty) if context else empty
