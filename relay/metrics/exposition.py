"""What a scrape shows: what was counted and how things stand go in, the text of Prometheus comes out.

Called in a thread of its own: with a thousand endpoints it is a large text. Names and units follow the
conventions of Prometheus; what each means stands in the README, and a test compares the two.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice

from prometheus_client.core import Metric, Sample
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.process_collector import ProcessCollector

from relay.metrics import MOST_ENDPOINTS, REST, Histogram, Metrics, Tally

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
STATES = ("active", "paused", "down", "gone")

# Between so many samples the loop may run: left alone it would wait 5 ms each time it wants to.
SAMPLES_AT_ONCE = 25
PAUSE_SECONDS = 0.00005

Rows = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointNow:
    """How one endpoint stands."""

    state: str  # one of STATES
    pending: int
    dead: int
    oldest_seconds: float  # the age of the oldest that is pending; 0 when nothing is


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """How things stand at the moment of a scrape; bounds that are not set are None."""

    build: Mapping[str, str]
    endpoints: Mapping[str, EndpointNow]  # in the order in which they are to be shown
    refusing: bool  # no event can be kept
    file_bytes: int
    log_bytes: int
    used_bytes: int
    max_bytes: int | None
    max_pending: int | None
    disk_free_bytes: int | None
    relays: int
    dropped: int
    connections: int
    sending: int
    most_sending: int


class Scrape:
    """What prometheus-client calls a collector: the families of one scrape."""

    def __init__(self, metrics: Metrics, now: Now) -> None:
        self._metrics = metrics
        self._now = now

    def collect(self) -> Iterator[Metric]:
        yield from _events(self._metrics)
        yield from _deliveries(self._metrics)
        yield from _endpoints(_bounded(self._now.endpoints), self._now.endpoints)
        yield from _sources(self._metrics)
        yield from _store(self._metrics, self._now)
        yield from _process(self._metrics, self._now)


class _Samples(list[Sample]):
    """Samples that are made while they are written, and let others run meanwhile.

    A list of all would be hundreds of thousands of objects, which Python looks through in one go.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        super().__init__()
        self._samples = samples

    def __iter__(self) -> Iterator[Sample]:
        for index, sample in enumerate(self._samples, start=1):
            if index % SAMPLES_AT_ONCE == 0:
                time.sleep(PAUSE_SECONDS)
            yield sample


def render(metrics: Metrics, now: Now, accept: str) -> tuple[bytes, str]:
    """Return the text of a scrape and its type, OpenMetrics where the header Accept names it."""
    scrape = Scrape(metrics, now)
    if "application/openmetrics-text" in accept.lower():
        text: bytes = openmetrics.generate_latest(scrape, version="1.0.0")  # type: ignore[no-untyped-call]
        return text, OPENMETRICS
    return generate_latest(scrape), TEXT


def _events(metrics: Metrics) -> Iterator[Metric]:
    yield _counter("relay_events_accepted", "Events kept, repeats left out.", metrics.accepted)
    yield _counter(
        "relay_events_duplicate", "Events submitted again with their idempotency key.", metrics.duplicates
    )
    yield _family(
        "counter",
        "relay_events_rejected",
        "Submissions refused, by reason; a batch is one.",
        ("reason",),
        (((reason,), count) for reason, count in dict(metrics.refused).items()),
    )


def _deliveries(metrics: Metrics) -> Iterator[Metric]:
    tallies: list[tuple[str, Tally]] = [*list(metrics.endpoints.items()), (REST, metrics.rest)]
    if len(metrics.endpoints) < MOST_ENDPOINTS:
        del tallies[-1]
    yield _family(
        "counter",
        "relay_delivery_attempts",
        "Attempts made, by what they met: ok, or the reason of the failure.",
        ("endpoint", "reason"),
        (
            ((endpoint, reason), count)
            for endpoint, tally in tallies
            for reason, count in dict(tally.attempts).items()
        ),
    )
    for name, text, number in _TALLIES:
        rows = [((endpoint,), number(tally)) for endpoint, tally in tallies]
        yield _family("counter", name, text, ("endpoint",), rows)
    # Most of a large text; of an endpoint that nothing was sent to it would say nothing.
    tried = [(endpoint, tally) for endpoint, tally in tallies if any(tally.duration.counts)]
    yield _histogram(
        "relay_delivery_duration_seconds",
        "How long an attempt took.",
        (({"endpoint": endpoint}, tally.duration) for endpoint, tally in tried),
    )
    yield _histogram(
        "relay_event_delivery_lag_seconds",
        "From an event's acceptance to its delivery, replays left out.",
        (({"endpoint": endpoint}, tally.lag) for endpoint, tally in tried),
    )


_TALLIES: tuple[tuple[str, str, Callable[[Tally], int]], ...] = (
    ("relay_dead_letters", "Deliveries given up, which are kept for replay.", lambda tally: tally.dead),
    ("relay_deliveries_expired", "Of those given up, what waited for max_age.", lambda tally: tally.expired),
    (
        "relay_delivery_attempts_unspent",
        "Attempts that could not be made, for which the receiver cannot be blamed.",
        lambda tally: tally.unspent,
    ),
)


def _bounded(endpoints: Mapping[str, EndpointNow]) -> dict[str, EndpointNow]:
    """Take the first by name, and add up the rest, whose state is shown by the number in each state alone."""
    shown = dict(islice(endpoints.items(), MOST_ENDPOINTS))
    rest = list(islice(endpoints.values(), MOST_ENDPOINTS, None))
    if rest:
        shown[REST] = EndpointNow(
            state="",
            pending=sum(each.pending for each in rest),
            dead=sum(each.dead for each in rest),
            oldest_seconds=max(each.oldest_seconds for each in rest),
        )
    return shown


def _endpoints(shown: Mapping[str, EndpointNow], every: Mapping[str, EndpointNow]) -> Iterator[Metric]:
    counts = dict.fromkeys(STATES, 0)
    for each in every.values():
        counts[each.state] += 1
    rows: Rows = (((state,), count) for state, count in counts.items())
    yield _family("gauge", "relay_endpoints", "Endpoints in each state.", ("state",), rows)
    rows = (
        ((endpoint, state), each.state == state)
        for endpoint, each in shown.items()
        if each.state
        for state in STATES
    )
    text = "1 for the state the endpoint is in, 0 for the others."
    yield _family("gauge", "relay_endpoint_state", text, ("endpoint", "state"), rows)
    rows = (((endpoint,), each.state == "paused") for endpoint, each in shown.items() if each.state)
    text = "1 while somebody holds the endpoint back."
    yield _family("gauge", "relay_endpoint_paused", text, ("endpoint",), rows)
    rows = (
        ((endpoint, state), count)
        for endpoint, each in shown.items()
        for state, count in (("pending", each.pending), ("dead", each.dead))
    )
    text = "Deliveries that wait, and that were given up and are kept."
    yield _family("gauge", "relay_outbox_deliveries", text, ("endpoint", "state"), rows)
    rows = (((endpoint,), each.oldest_seconds) for endpoint, each in shown.items())
    text = "Age of the oldest event that the endpoint still waits for; 0 when there is none."
    yield _family("gauge", "relay_outbox_oldest_age_seconds", text, ("endpoint",), rows)


def _sources(metrics: Metrics) -> Iterator[Metric]:
    sources = dict(metrics.sources)
    yield _family(
        "counter",
        "relay_source_submissions",
        "Submissions taken from a source, by what became of them.",
        ("source", "result"),
        (
            ((source, result), getattr(tally, result))
            for source, tally in sources.items()
            for result in ("accepted", "duplicates", "refused")
        ),
    )
    text = "1 while the source can be read and the outbox takes what is there."
    rows: Rows = (((source,), tally.up) for source, tally in sources.items())
    yield _family("gauge", "relay_source_up", text, ("source",), rows)
    text = "Submissions that were refused and are still in the source, 10,000 at the most."
    rows = (((source,), tally.waiting) for source, tally in sources.items())
    yield _family("gauge", "relay_source_refused", text, ("source",), rows)


def _store(metrics: Metrics, now: Now) -> Iterator[Metric]:
    text = "One transaction of the outbox, synced to disk."
    yield _histogram("relay_store_commit_duration_seconds", text, [({}, metrics.commit_seconds)])
    text = "Changes written in one transaction."
    yield _histogram("relay_store_commit_batch_size", text, [({}, metrics.batch_sizes)])
    rows: Rows = ((("file",), now.file_bytes), (("log",), now.log_bytes))
    text = "Size of the outbox's file, and of the log ahead of it."
    yield _family("gauge", "relay_outbox_bytes", text, ("part",), rows)
    yield _gauge("relay_outbox_used_bytes", "What of the outbox cannot be used again.", now.used_bytes)
    yield _gauge("relay_outbox_max_bytes", "outbox.max_size.", now.max_bytes)
    yield _gauge("relay_outbox_max_pending", "outbox.max_pending, absent without one.", now.max_pending)
    yield _gauge("relay_outbox_disk_free_bytes", "What is left of the outbox's disk.", now.disk_free_bytes)
    yield _gauge("relay_outbox_relays", "Relays that share the outbox, as far as is known.", now.relays)
    text = "Outcomes not kept, as another relay had the delivery by then."
    yield _family("counter", "relay_outbox_outcomes_dropped", text, (), [((), now.dropped)])
    yield _gauge("relay_outbox_refusing", "1 while no event can be kept: full, or failing.", now.refusing)


def _process(metrics: Metrics, now: Now) -> Iterator[Metric]:
    text = "How late the event loop was, measured twice a second."
    yield _histogram("relay_loop_lag_seconds", text, [({}, metrics.loop_lag_seconds)])
    yield _gauge("relay_api_connections", "Connections open at the API.", now.connections)
    yield _gauge("relay_delivery_attempts_in_flight", "Attempts under way.", now.sending)
    yield _gauge("relay_delivery_attempts_limit", "Most attempts at once, for all.", now.most_sending)
    yield _gauge(
        "relay_config_last_reload_successful",
        "1 when the config was taken that was read last.",
        metrics.reload_successful,
    )
    yield _gauge(
        "relay_config_last_reload_success_timestamp_seconds",
        "When the config in use was read.",
        metrics.reloaded_at_ms / 1000,
    )
    yield _family(
        "info", "relay_build", "What is running.", tuple(now.build), [(tuple(now.build.values()), 1)]
    )
    yield from _PROCESS.collect()


_PROCESS = ProcessCollector(registry=None)


def _family(kind: str, name: str, text: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    sample = name + {"counter": "_total", "info": "_info"}.get(kind, "")
    family = Metric(name, text, kind)
    family.samples = _Samples(
        Sample(sample, dict(zip(labels, values, strict=True)), float(number)) for values, number in rows
    )
    return family


def _counter(name: str, text: str, number: float) -> Metric:
    return _family("counter", name, text, (), [((), number)])


def _gauge(name: str, text: str, number: float | None) -> Metric:
    return _family("gauge", name, text, (), [((), number)] if number is not None else [])


def _histogram(name: str, text: str, rows: Iterable[tuple[dict[str, str], Histogram]]) -> Metric:
    family = Metric(name, text, "histogram")
    family.samples = _Samples(
        sample for labels, histogram in rows for sample in _buckets(name, labels, histogram)
    )
    return family


def _buckets(name: str, labels: dict[str, str], histogram: Histogram) -> Iterator[Sample]:
    counts = list(accumulate(list(histogram.counts)))
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), counts, strict=True):
        yield Sample(f"{name}_bucket", labels | {"le": bound}, count)
    yield Sample(f"{name}_count", labels, counts[-1])
    yield Sample(f"{name}_sum", labels, histogram.sum)
