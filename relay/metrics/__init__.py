"""What is counted: what happens comes in, numbers for whoever asks (`exposition.py`) wait here.

Counting lies in the way of every event, so it only adds to plain numbers: no lock, and no label is looked up.
The loop alone writes them; the thread that writes a scrape copies each container in one step.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection

# With more endpoints than this the rest is counted together, so that a scrape stays bounded.
MOST_ENDPOINTS = 1_000
REST = "(rest)"  # no id holds a parenthesis
# A receiver may answer any number of statuses; of one endpoint no more reasons than this are told apart.
MOST_REASONS = 40
OTHER_REASON = "other"
DELIVERED = "ok"

REFUSALS = (
    "not_json",
    "unauthorized",
    "foreign",
    "too_slow",
    "too_large",
    "content_type",
    "invalid",
    "full",
    "stopping",
    "failed",
    "other",
)

DURATION_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LAG_SECONDS = (*DURATION_SECONDS, 300.0, 3_600.0, 21_600.0)  # the steps of a schedule
COMMIT_SECONDS = (0.001, 0.0025, *DURATION_SECONDS[:-2])
LOOP_LAG_SECONDS = (0.001, 0.0025, *DURATION_SECONDS[:-2])
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class Histogram:
    """How often a number was at most so large; the last count is of those larger than every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Tally:
    """What happened at one endpoint."""

    __slots__ = ("attempts", "dead", "duration", "expired", "lag", "unspent")

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter({DELIVERED: 0})  # by reason
        self.duration = Histogram(DURATION_SECONDS)
        self.lag = Histogram(LAG_SECONDS)
        self.dead = 0
        self.expired = 0  # of the dead ones
        self.unspent = 0

    def attempted(self, reason: str | None, milliseconds: int) -> None:
        attempts = self.attempts
        if reason is None:
            reason = DELIVERED
        elif reason not in attempts and len(attempts) >= MOST_REASONS:
            reason = OTHER_REASON
        attempts[reason] += 1
        self.duration.observe(milliseconds / 1000)


class SourceTally:
    """What came from one source, and how it stands."""

    __slots__ = ("accepted", "duplicates", "refused", "up", "waiting")

    def __init__(self) -> None:
        self.accepted = 0
        self.duplicates = 0
        self.refused = 0
        self.up = False
        self.waiting = 0  # of those refused, what is still there


class Metrics:
    """Everything that is counted, from the start of the process."""

    def __init__(self) -> None:
        self.accepted = 0  # events
        self.duplicates = 0
        self.refused: Counter[str] = Counter(dict.fromkeys(REFUSALS, 0))  # requests, by reason
        self.commit_seconds = Histogram(COMMIT_SECONDS)
        self.batch_sizes = Histogram(BATCH_SIZES)
        self.loop_lag_seconds = Histogram(LOOP_LAG_SECONDS)
        self.reload_successful = True
        self.reloaded_at_ms = 0  # when the config in use was read
        self.endpoints: dict[str, Tally] = {}
        self.rest = Tally()
        self.sources: dict[str, SourceTally] = {}

    def of(self, endpoint: str) -> Tally:
        """Return where to count what happens at an endpoint; asked once for each lane."""
        tally = self.endpoints.get(endpoint)
        if tally is None:
            if len(self.endpoints) >= MOST_ENDPOINTS:
                return self.rest
            tally = self.endpoints[endpoint] = Tally()
        return tally

    def keep_only(self, endpoints: Collection[str]) -> None:
        """Forget endpoints that are there no more, so that names which come and go do not add up."""
        for endpoint in self.endpoints.keys() - endpoints:
            del self.endpoints[endpoint]

    def source(self, source: str) -> SourceTally:
        """Return where to count what comes from a source."""
        return self.sources.setdefault(source, SourceTally())

    def keep_sources(self, sources: Collection[str]) -> None:
        """Forget sources that are there no more."""
        for source in self.sources.keys() - sources:
            del self.sources[source]

    def reloaded(self, now_ms: int) -> None:
        self.reload_successful = True
        self.reloaded_at_ms = now_ms

    def committed(self, seconds: float, size: int) -> None:
        self.commit_seconds.observe(seconds)
        self.batch_sizes.observe(size)
