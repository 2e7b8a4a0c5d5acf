"""How much room the outbox has: bounds a person set in, a refusal out. How large it is was measured last."""

from asyncpg import Connection

from relay.outbox import Bounds, Size
from relay.outbox.admission import refusal_of

BYTES = (
    "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'relay' AND c.relkind = 'r'"
)
PENDING = "SELECT coalesce(sum(pending), 0)::bigint FROM relay.tallies"


class Room:
    """What is left of the bounds."""

    def __init__(self, name: str, bounds: Bounds) -> None:
        self.bytes = 0
        self.pending = 0  # deliveries, of all relays
        self.relays = 1
        self.dropped = 0  # outcomes
        self._name = name
        self._bounds = bounds

    async def measure(self, link: Connection) -> None:
        """Look how large the outbox is."""
        self.bytes = await link.fetchval(BYTES)
        self.pending = await link.fetchval(PENDING)
        self.relays = await link.fetchval("SELECT count(*) FROM relay.relays")

    def size(self) -> Size:
        return Size(
            file_bytes=self.bytes,
            log_bytes=0,
            used_bytes=self.bytes,
            disk_free_bytes=None,
            bounds=self._bounds,
            relays=self.relays,
            dropped=self.dropped,
        )

    def refusal(self, more: int = 1) -> str | None:
        """Say in a sentence why so many more deliveries cannot be taken on, if that is so."""
        return refusal_of(self._bounds, name=self._name, used_bytes=self.bytes, pending=self.pending + more)
