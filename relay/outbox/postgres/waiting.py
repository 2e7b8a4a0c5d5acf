"""When something waits for one endpoint, so that the database is asked only when it must be."""

from relay.outbox.waiting import START


class Waiting:
    """What we know of an endpoint's deliveries; never the truth. Losing all of it costs one look."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.due_ms: int | None = 0  # of the next that nobody has claimed; in the past: look
        self.probed = START  # the place of the latest probe
        self.aged = 0  # how far the walk over what waits too long has come,
        self.aged_ms: int | None = None  # and since when the oldest waits that it has passed

    def rewind(self, due_ms: int) -> None:
        """Note that something falls due at `due_ms`."""
        self.due_ms = due_ms if self.due_ms is None else min(self.due_ms, due_ms)

    def start_look(self) -> None:
        """Begin to look; a `rewind` during the look is not lost."""
        self.due_ms = None

    def end_look(self, due_ms: int | None) -> None:
        if due_ms is not None:
            self.rewind(due_ms)
