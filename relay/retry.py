"""What follows from an outcome: delivered, again at a time, or dead.

Pure: the outcome, the delivery's place in its schedule, the time and a random number come in, the
verdict goes out (contract section 6).
"""

import re
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime

from relay.model import Delivery, Outcome, State, Verdict

JITTER = 0.10  # each delay is spread by this share either way, so that receivers are not hit in step
LONGEST_RETRY_AFTER_MS = 24 * 3600 * 1000

_SECONDS = re.compile(r"[0-9]{1,128}")


def decide(
    outcome: Outcome,
    delivery: Delivery,
    *,
    schedule: Sequence[float],
    now_ms: int,
    spread: float,
    probe: bool = False,
) -> Verdict:
    """Return what becomes of a delivery.

    `spread` is a random number from 0 to 1 that places the retry within its jitter. What uses up no step of
    the schedule: a probe, a 410 (the endpoint waits for a person), and a receiver that is only too busy.
    """
    steps = delivery.steps
    if outcome.reason is None:
        return Verdict(state=State.DELIVERED, steps=steps)
    if probe or outcome.status == 410:
        return Verdict(state=State.PENDING, steps=steps, due_ms=delivery.due_ms)
    if is_busy(outcome, now_ms) and schedule:
        delay_seconds, used = schedule[min(steps, len(schedule) - 1)], 0
    elif steps < len(schedule):
        delay_seconds, used = schedule[steps], 1
    else:
        return Verdict(state=State.DEAD, steps=steps)
    delay_ms = round(delay_seconds * (1 + JITTER * (2 * spread - 1)) * 1000)
    return Verdict(state=State.PENDING, steps=steps + used, due_ms=now_ms + delay_ms)


def is_busy(outcome: Outcome, now_ms: int) -> bool:
    """Tell whether the receiver refused for now only: 429, or 503 that says until when."""
    return outcome.status == 429 or (outcome.status == 503 and floor_ms(outcome, now_ms) is not None)


def floor_ms(outcome: Outcome, now_ms: int) -> int | None:
    """Return the time that Retry-After (RFC 9110 section 10.2.3) asks to wait for, at most 24 h from now.

    None without a header that can be read, and for 2xx.
    """
    if outcome.reason is None or outcome.retry_after is None:
        return None
    text = outcome.retry_after.strip()
    wait_ms = int(text) * 1000 if _SECONDS.fullmatch(text) else _until(text, now_ms)
    return None if wait_ms is None else now_ms + min(max(wait_ms, 0), LONGEST_RETRY_AFTER_MS)


def _until(date: str, now_ms: int) -> int | None:
    """Return how long it is until an HTTP date (RFC 9110 section 5.6.7), in any of its three forms."""
    try:
        at = parsedate_to_datetime(date)
        # The zone is always GMT; one of the three forms leaves it out.
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return round(at.timestamp() * 1000) - now_ms
    except (ValueError, TypeError, OverflowError):
        return None
