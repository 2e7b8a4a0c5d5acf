"""Traces: what a submission says of its trace goes on to every receiver, as spans where that is asked for.

`Continued` is what there always is: each attempt shows a child of the submission's `traceparent`. With the
extra `otel`, and an address to export to in the environment, `spans.py` makes real spans of submissions and
attempts; without, nothing of it is imported.
"""

import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from relay import formats
from relay.model import Delivery, Endpoint, Outcome, Submission

log = logging.getLogger("relay.traces")

Headers = tuple[tuple[str, str], ...]


class Span(Protocol):
    """One attempt, as its trace sees it."""

    @property
    def headers(self) -> Headers:
        """What the receiver is shown."""
        ...

    def ended(self, outcome: Outcome | None) -> None:
        """Note what the attempt met; None: it was cut off."""
        ...


class Traces(Protocol):
    """Who is told of submissions and attempts."""

    def submitting(self, submissions: Sequence[Submission]) -> AbstractContextManager[Sequence[Submission]]:
        """Return the submissions as they are to be kept, with the context that attempts go on from."""
        ...

    def attempt(self, endpoint: Endpoint, delivery: Delivery, number: int, at_ms: int) -> Span: ...


@dataclass(frozen=True, slots=True)
class Child:
    """No span of ours, only headers that name one."""

    headers: Headers = ()

    def ended(self, outcome: Outcome | None) -> None:
        """Nobody wants to know."""


class Continued:
    """Goes on with the submission's trace and makes no spans."""

    _untraced = Child()

    def submitting(self, submissions: Sequence[Submission]) -> AbstractContextManager[Sequence[Submission]]:
        return nullcontext(submissions)

    def attempt(self, _endpoint: Endpoint, delivery: Delivery, _number: int, _at_ms: int) -> Span:
        event = delivery.event
        if event.traceparent is None:
            return self._untraced
        return Child(headers(formats.child(event.traceparent, os.urandom(8)), event.tracestate))


def headers(parent: str, state: str | None) -> Headers:
    return (("traceparent", parent),) if state is None else (("traceparent", parent), ("tracestate", state))


@asynccontextmanager
async def open_traces(environ: Mapping[str, str], version: str) -> AsyncIterator[Traces]:
    """Export spans where the standard variables OTEL_* say so; what is left is sent on the way out."""
    why_not = _why_not(environ) if _wanted(environ) else ""
    if why_not is None:
        from relay.traces.spans import open_spans

        async with open_spans(environ, version) as spans:
            yield spans
        return
    if why_not:
        log.warning("traces_off", extra={"error": why_not})
    yield Continued()


def _wanted(environ: Mapping[str, str]) -> bool:
    where = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return (
        any(environ.get(name) for name in where)
        and environ.get("OTEL_SDK_DISABLED", "").lower() != "true"
        and environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp"
    )


def _why_not(environ: Mapping[str, str]) -> str | None:
    """Say why spans that are wanted cannot be sent, if that is so."""
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in {None, "", "http/protobuf"}:
        return f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}: only http/protobuf is spoken"
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401 - asked for by name
    except ImportError:
        return "spans need the extra: pip install 'relay[otel]'"
    return None
