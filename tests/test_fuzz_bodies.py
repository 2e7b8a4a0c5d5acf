"""Requests that chance has written, for some seconds; more of them by `python -m tests.fuzz`."""

from tests.figures import figure
from tests.fuzz import bodies

SECONDS = 10.0


def test_whatever_is_sent_is_answered_cleanly():
    """No 5xx, no format but ours, no connection that just ends, no fault in the log, no memory lost."""
    result = bodies.run(seed=1, seconds=SECONDS)

    figure(
        "requests that made anything but a clean answer / tried", f"{len(result.unclean)} / {result.tried}"
    )
    figure("memory grown under them", f"{result.grown_bytes / 2**20:.1f} MiB")
    assert result.unclean[:5] == []
    assert result.tried > 500
    assert {202, 400, 422, 415} <= set(result.statuses), "they come far enough to matter"
    assert result.grown_bytes < 64 << 20
