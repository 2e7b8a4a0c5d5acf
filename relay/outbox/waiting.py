"""What waits for one endpoint, so that the disk is asked only when it must be.

The store's own memory, never its truth: what was accepted a moment ago is handed on without being read
back (bounded in number and size), and of what lies on disk we keep how far a lane has come and when the
next is due. Losing all of it costs one look at the disk.
"""

from relay.model import Delivery

FRESH_DELIVERIES = 256
FRESH_BYTES = 4 << 10  # of one event's data; so at most 1 MiB an endpoint

Place = tuple[int, int]  # (due, event): the order of claims
START: Place = (-1, -1)
END: Place = (1 << 62, 1 << 62)


class Waiting:
    """The deliveries of one endpoint that can be claimed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.due_ms: int | None = 0  # of the next on disk; in the past: look
        self.closed = 0  # while above nothing is handed out: what is pending is being rearranged
        self.probed = START  # the place of the latest probe
        self.aged = 0  # how far the walk over what waits too long has come,
        self.aged_ms: int | None = None  # and since when the oldest waits that it has passed
        self._place = START  # how far the lane has come on disk
        self._fresh: dict[tuple[int, int], Delivery] = {}

    @property
    def next_due_ms(self) -> int | None:
        """When the next can be claimed; in the past: now."""
        if self.closed:
            return None  # whoever rearranges wakes the lane
        return 0 if self._fresh else self.due_ms

    def is_due(self, now_ms: int) -> bool:
        """Tell whether something on disk can be claimed."""
        return not self.closed and self.due_ms is not None and self.due_ms <= now_ms

    def offer(self, delivery: Delivery, due_ms: int) -> None:
        """Remember what was just accepted, or that it is to be found on disk."""
        if len(self._fresh) < FRESH_DELIVERIES and len(delivery.event.data) <= FRESH_BYTES:
            self._fresh[delivery.handle] = delivery
        else:
            self.rewind(due_ms)

    def rewind(self, due_ms: int) -> None:
        """Note that something on disk falls due at `due_ms`, perhaps behind where the lane has come."""
        self.due_ms = due_ms if self.due_ms is None else min(self.due_ms, due_ms)
        self._place = min(self._place, (due_ms - 1, 0))

    def start_look(self) -> Place:
        """Return where to go on looking; a `rewind` during the look is not lost."""
        place, self._place, self.due_ms = self._place, END, None
        return place

    def end_look(self, reached: Place, due_ms: int | None) -> None:
        """Note how far the look came and when the next after it falls due."""
        self._place = min(self._place, reached)
        if due_ms is not None:
            self.due_ms = due_ms if self.due_ms is None else min(self.due_ms, due_ms)

    def forget_fresh(self, handle: tuple[int, int]) -> None:
        self._fresh.pop(handle, None)

    def take_fresh(self, limit: int) -> list[Delivery]:
        """Hand out up to `limit` of what was just accepted, in that order."""
        if self.closed:
            return []
        handles = list(self._fresh)[:limit] if len(self._fresh) > limit else list(self._fresh)
        return [self._fresh.pop(handle) for handle in handles]
