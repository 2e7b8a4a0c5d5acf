"""What follows from an outcome: delivered, again at a time, or dead.

Pure: the outcome, the delivery's place in its schedule, the time and a random number come in, the
verdict goes out (contract section 6).
"""

from collections.abc import Sequence

from relay.model import Outcome, State, Verdict

JITTER = 0.10  # each delay is spread by this share either way, so that receivers are not hit in step


def decide(outcome: Outcome, *, steps: int, schedule: Sequence[float], now_ms: int, spread: float) -> Verdict:
    """Return what becomes of a delivery that has used up `steps` retries of its schedule.

    `spread` is a random number from 0 to 1 that places the retry within its jitter.
    """
    if outcome.reason is None:
        return Verdict(state=State.DELIVERED, steps=steps)
    if steps >= len(schedule):
        return Verdict(state=State.DEAD, steps=steps)
    delay_seconds = schedule[steps] * (1 + JITTER * (2 * spread - 1))
    return Verdict(state=State.PENDING, steps=steps + 1, due_ms=now_ms + round(delay_seconds * 1000))
