"""How fast one endpoint is sent to: how many attempts at once, and how many a second.

Pure: times come in as seconds of a clock that never jumps. `Limit` adapts to the receiver (additive
increase, multiplicative decrease) below the ceiling a person set; `Bucket` holds a rate.
"""

import math

from relay.model import Outcome

BACK_PRESSURE = frozenset({"timeout", "connect_timeout", "http_429", "http_503"})
DECREASE = 0.7
WEIGHT = 0.4  # of the newest round in the average latency
SLACK = 1.1  # latency counts as worse only beyond this share of its average,
SLACK_SECONDS = 0.005  # and this


class Limit:
    """How many attempts may be under way at once.

    A *round* lasts as long as an average answer takes. At the end of a round in which the limit was reached,
    nothing was refused and answers came no later than on average, one more is allowed; a receiver that is too
    busy gets fewer at once, at most once a round. After a recovery the limit starts at one and doubles.
    """

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._limit = float(ceiling)
        self._doubling = False
        self._average: float | None = None  # seconds an answer takes
        self._round_ends = -math.inf
        self._spared_until = -math.inf
        self._reached = self._failed = False
        self._sum, self._answers = 0.0, 0  # of this round

    @property
    def slots(self) -> int:
        return min(int(self._limit), self._ceiling)

    def cap(self, ceiling: int) -> None:
        """Go on under another ceiling; at the old one the limit follows it up."""
        at_ceiling = self._limit >= self._ceiling
        self._limit = float(ceiling) if at_ceiling else min(self._limit, float(ceiling))
        self._ceiling = ceiling

    def start_over(self) -> None:
        """Begin with one at a time, and double with each round without a failure."""
        self._limit = 1.0
        self._doubling = True
        self._begin_round(-math.inf)

    def begun(self, under_way: int) -> None:
        """Note that an attempt was begun, which makes so many."""
        if under_way >= self.slots:
            self._reached = True

    def ended(self, outcome: Outcome, seconds: float, now: float) -> None:
        """Learn from an attempt."""
        if outcome.reason is None:
            self._sum += seconds
            self._answers += 1
        else:
            self._failed = True
            if outcome.reason in BACK_PRESSURE:
                self._decrease(now)
        if now >= self._round_ends:
            self._end_round(now)

    def _decrease(self, now: float) -> None:
        if now < self._spared_until:
            return
        self._doubling = False
        self._limit = max(1.0, self._limit * DECREASE)
        self._spared_until = now + (self._average or 0.0)

    def _end_round(self, now: float) -> None:
        if self._answers:
            latest = self._sum / self._answers
            average = self._average if self._average is not None else latest
            slower = latest > average * SLACK + SLACK_SECONDS
            if self._reached and not self._failed and (self._doubling or not slower):
                self._grow()
            self._average = average + WEIGHT * (latest - average)
        self._begin_round(now + (self._average or 0.0))

    def _grow(self) -> None:
        grown = self._limit * 2 if self._doubling else self._limit + 1
        self._limit = min(grown, float(self._ceiling))
        if self._limit == self._ceiling:
            self._doubling = False

    def _begin_round(self, ends: float) -> None:
        self._round_ends = ends
        self._reached = self._failed = False
        self._sum, self._answers = 0.0, 0


class Bucket:
    """At most `rate` a second on average; what was not used is saved up for one second and no longer.

    Kept as the one time at which everything taken so far would have been paid back (the virtual scheduling
    form of GCRA, ITU-T I.371 annex A). It starts empty but for one, so that restarts do not add up.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._interval = 1.0 / rate
        self._saved = max(0.0, 1.0 - self._interval)
        self._paid_back = now + self._saved

    def available(self, now: float) -> int:
        """Return how many may go now."""
        behind = now + self._saved - max(self._paid_back, now)
        return max(0, math.floor(behind / self._interval + 1e-6) + 1) if behind > -1e-9 else 0

    def take(self, count: int, now: float) -> None:
        self._paid_back = max(self._paid_back, now) + count * self._interval

    def wait_seconds(self, now: float) -> float:
        """Return how long it is until one may go."""
        return max(0.0, self._paid_back - self._saved - now)
