"""Relays that share an outbox: how they know of each other, and who is told what the others did."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from relay.model import Health, Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How relays that share an outbox know of each other."""

    beat_seconds: float = 5.0  # how often each says that it lives
    dead_seconds: float = 20.0  # after which silence it is dead, and what it claimed is free
    look_seconds: float = 1.0  # how often each looks what the others did, if it does not hear of it before
    listen_url: Secret | None = None  # where it hears of it; None: where the outbox is


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of an endpoint's pace is ours."""

    relays: int = 1  # that deliver to it
    place: int = 0  # ours among them, from 0

    def of(self, whole: int) -> int:
        """Return our part of so many; the parts of all relays add up to the whole, so it may be none."""
        return whole // self.relays + (self.place < whole % self.relays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Who is told what other relays did; none of it may wait."""

    woken: Callable[[Iterable[str]], None]  # something may be due at these endpoints
    stood: Callable[[str, Health], None]  # how an endpoint stands now
    shared: Callable[[str, Share], None]  # which part of an endpoint's pace is ours
    changed: Callable[[], None]  # endpoints were kept, changed or dropped
