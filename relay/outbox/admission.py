"""What is taken on: submissions and the bounds in, those that there is room for out; the others are refused.

The bounds that a person set are soft: where one is reached new events are refused, while what was accepted
still goes out, which is what makes room again.
"""

import logging
from collections.abc import Callable, Sequence

from relay.model import Submission
from relay.outbox import Bounds, FullError
from relay.outbox.promises import Promise, fail

log = logging.getLogger("relay.outbox")

# Kept free for the outcomes of what was accepted: an SQLite file's log ahead (1,000 pages), and what the file
# grows by when that is copied over. Of a small disk or bound it is a share.
RESERVED_BYTES = 16 << 20
RESERVED_SHARE = 2


def reserve(whole_bytes: int) -> int:
    """Return how much of a whole is kept free."""
    return min(RESERVED_BYTES, whole_bytes // RESERVED_SHARE)


def refusal_of(bounds: Bounds, *, name: str, used_bytes: int, pending: int) -> str | None:
    """Say in a sentence why an outbox would be too full with so many deliveries pending, if it would."""
    largest, most = bounds.max_bytes, bounds.max_pending
    if largest is not None and used_bytes > largest - reserve(largest):
        return (
            f"{name} is full: raise outbox.max_size, or shorten outbox.retention; what was accepted goes out"
        )
    if most is not None and pending > most:
        return (
            f"{most} deliveries are pending: raise outbox.max_pending, or see which endpoint takes none; "
            "what was accepted goes out"
        )
    return None


class Admission:
    """Lets in what there is room for; says once that events are refused, and once that they are not."""

    def __init__(self) -> None:
        self._refusing = False

    def admit(
        self,
        accepts: Sequence[Sequence[Submission]],
        promises: Sequence[Promise],
        refusal: Callable[[int], str | None],
    ) -> tuple[list[Sequence[Submission]], list[Promise]]:
        """Return those that fit, the first first; `refusal` tells why so many deliveries more do not."""
        refused: str | None = None
        fitting: list[Sequence[Submission]] = []
        kept: list[Promise] = []
        deliveries = 0
        for submissions, promise in zip(accepts, promises, strict=True):
            more = sum(len(each.endpoints) for each in submissions)
            refused = refused or refusal(deliveries + more)
            if refused is not None:
                fail([promise], FullError(refused))
            else:
                deliveries += more
                fitting.append(submissions)
                kept.append(promise)
        if accepts:
            self._note(refused)
        return fitting, kept

    def _note(self, refused: str | None) -> None:
        if self._refusing != (refused is not None):
            self._refusing = refused is not None
            if refused is not None:
                log.error("outbox_full", extra={"error": refused})
            else:
                log.info("outbox_has_room")
