"""What the page's tables hold: how the relay stands comes in, cells of text go out, for whichever form.

A cell is lines of text; the first is what matters, the others explain it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from relay.api.status import EndpointStatus, Status
from relay.ingest import iso
from relay.model import State
from relay.outbox import Story

Cell = tuple[str, ...]

NONE: Cell = ("\N{EN DASH}",)

HEADINGS = {
    "endpoints": ("Endpoint", "State", "Success", "p95", "Waiting", "Dead", "Next try", "Last error"),
    "failures": ("When", "Endpoint", "Event", "Attempt", "Error", "Answer"),
    "dead": ("Accepted", "Endpoint", "Event", "Attempts", "Error", "Answer"),
}
NOTHING = {
    "endpoints": "No endpoint yet: add one to the config or through the API.",
    "failures": "No attempt has failed lately.",
    "dead": "Nothing was given up.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table, by the name that style and script know it by."""

    id: str
    rows: Sequence[Sequence[Cell]]


def every(status: Status, dead: Sequence[Story]) -> list[Table]:
    """Return all tables in their order."""
    return [
        Table(id="endpoints", rows=[_endpoint(each) for each in status.endpoints]),
        Table(
            id="failures",
            rows=[
                (
                    (when(each.at),),
                    (each.endpoint,),
                    (each.event, each.event_id),
                    (f"{each.number}, the last" if each.dead else str(each.number),),
                    (each.error, each.explanation),
                    (each.answer or "",),
                )
                for each in status.failures
            ],
        ),
        Table(id="dead", rows=[row for story in dead for row in _dead(story)]),
    ]


def hour(status: Status) -> str:
    """Sum up the last hour."""
    accepted = sum(each.accepted for each in status.minutes)
    delivered = sum(each.delivered for each in status.minutes)
    failed = sum(each.failed for each in status.minutes)
    return f"{accepted} accepted, {delivered} delivered, {failed} failed attempts."


def _endpoint(each: EndpointStatus) -> Sequence[Cell]:
    rate = each.success_rate
    oldest = each.oldest_pending_seconds
    return (
        (each.id, each.url, *([each.description] if each.description else [])),
        (each.state, *([f"since {when(each.since)}"] if each.since else [])),
        (f"{percent(rate)} %", f"of {each.attempts}") if rate is not None else NONE,
        (f"{each.p95_milliseconds} ms",) if each.p95_milliseconds is not None else NONE,
        (str(each.pending), *([f"oldest {duration(oldest)}"] if oldest is not None else [])),
        (str(each.dead),),
        (when(each.next_attempt_at),) if each.next_attempt_at else NONE,
        (each.last_error, f"{each.explanation}, {when(each.last_failure_at or '')}")
        if each.last_error
        else NONE,
    )


def when(at: str) -> str:
    """Write a time for people, who need no milliseconds: `2026-01-15 10:00:00 UTC`."""
    return f"{at[:10]} {at[11:19]} UTC"


def duration(seconds: float) -> str:
    """Write a length of time by its largest unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def percent(rate: float) -> str:
    """Write a rate so that only what is whole looks whole: 0.9999 is 99.9."""
    tenths = int(rate * 1000)
    return str(tenths // 10) if tenths % 10 == 0 else f"{tenths / 10:.1f}"


def _dead(story: Story) -> list[Sequence[Cell]]:
    event = story.event
    rows: list[Sequence[Cell]] = []
    for delivery in story.deliveries:
        if delivery.state is State.DEAD:
            last = delivery.attempts[-1] if delivery.attempts else None
            reason = "max_age" if delivery.expired_at_ms is not None else last.reason if last else None
            rows.append(
                (
                    (when(iso(event.accepted_at_ms)),),
                    (delivery.endpoint,),
                    (event.type, event.id),
                    (str(last.number if last else 0),),
                    (reason or "",),
                    ((last.answer or "") if last else "",),
                )
            )
    return rows
