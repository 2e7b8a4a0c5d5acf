"""How an endpoint stands: up, down or gone; what an attempt met comes in, how it stands after goes out.

Pure rules of contract section 6. Down after failures in a row for at least two deliveries, so that one
poisonous event alone cannot bring an endpoint down; then one probe at a time goes out, ever more rarely,
and the first success brings it up. Gone after 410: only a person brings it back.
"""

from dataclasses import replace

from relay.model import Delivery, Endpoint, Health, Outcome, Standing
from relay.retry import LONGEST_RETRY_AFTER_MS, floor_ms

# An outbox that saw nothing for longer than this was at rest, or the clock was set.
LONGEST_REST_MS = 24 * 3600 * 1000


def after(
    health: Health, outcome: Outcome, *, endpoint: Endpoint, delivery: Delivery, probe: bool, now_ms: int
) -> Health:
    """Return how the endpoint stands after an attempt; the same object if nothing changed."""
    if health.standing is Standing.GONE:
        return health
    if outcome.reason is None:
        return _succeeded(health)
    if outcome.status == 410:
        return replace(health, standing=Standing.GONE, since_ms=now_ms)
    floor = floor_ms(outcome, now_ms)
    if floor is not None and floor > max(now_ms, health.not_before_ms):
        health = replace(health, not_before_ms=floor)
    if health.standing is Standing.DOWN:  # what was begun before says nothing new
        return _probed(health, endpoint, now_ms) if probe else health
    if delivery.replayed:  # what was given up before may fail again, and that is no news of the endpoint
        return health
    return _failed(health, endpoint, delivery.event.id, now_ms)


def _succeeded(health: Health) -> Health:
    if health.standing is Standing.UP and not health.failures:
        return health
    return Health(not_before_ms=health.not_before_ms, age_from_ms=health.age_from_ms)


def _failed(health: Health, endpoint: Endpoint, event_id: str, now_ms: int) -> Health:
    first = health.failed_first or event_id
    health = replace(
        health,
        failures=health.failures + 1,
        failed_first=first,
        several=health.several or first != event_id,
    )
    if not endpoint.down_after or health.failures < endpoint.down_after or not health.several:
        return health
    probe_at_ms = now_ms + round(endpoint.probe_interval_seconds * 1000)
    return replace(health, standing=Standing.DOWN, since_ms=now_ms, probes=0, probe_at_ms=probe_at_ms)


def _probed(health: Health, endpoint: Endpoint, now_ms: int) -> Health:
    """Wait twice as long for the next probe."""
    probes = health.probes + 1
    wait_seconds = min(endpoint.probe_interval_seconds * 2 ** min(probes, 32), endpoint.probe_max_seconds)
    return replace(
        health,
        failures=health.failures + 1,
        probes=probes,
        probe_at_ms=now_ms + round(wait_seconds * 1000),
    )


def resumed(now_ms: int) -> Health:
    """Return how an endpoint stands that a person let go again: as if it had never failed."""
    return Health(age_from_ms=now_ms)


def set_right(health: Health, endpoint: Endpoint, now_ms: int) -> Health:
    """Return how an endpoint stands once the clock was set: no wait is longer than it can be by rights.

    What waits has not grown older by it, so its age counts anew.
    """
    return replace(
        health,
        probe_at_ms=min(health.probe_at_ms, now_ms + round(endpoint.probe_max_seconds * 1000)),
        not_before_ms=min(health.not_before_ms, now_ms + LONGEST_RETRY_AFTER_MS),
        age_from_ms=now_ms,
    )


def next_attempt_ms(health: Health, due_ms: int) -> int | None:
    """Return when a delivery that is due then goes out at the earliest; None: when a person says so."""
    if health.standing is Standing.GONE:
        return None
    return max(due_ms, health.not_before_ms, health.probe_at_ms if health.standing is Standing.DOWN else 0)


def was_at_rest(last_seen_ms: int | None, now_ms: int) -> bool:
    """Tell whether the relay was off for so long, or its clock so wrong, that ages say nothing."""
    return last_seen_ms is not None and not 0 <= now_ms - last_seen_ms <= LONGEST_REST_MS
