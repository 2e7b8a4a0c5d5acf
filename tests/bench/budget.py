"""A measurement and its figures: what a line of the table is made of."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.bench.stage import Stage

Samples = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A line of the table; without floor and aim it only explains the others."""

    name: str
    unit: str = ""
    floor: float | None = None
    aim: float | None = None
    at_least: bool = False  # floor and aim are to be reached, not to be kept under


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What is measured together, because one round shows all of it."""

    name: str
    round: Callable[[Stage], Awaitable[Samples]]
    figures: tuple[Figure, ...]
    at: int | None = None  # where on a curve

    @property
    def label(self) -> str:
        return self.name if self.at is None else f"{self.name} {self.at:,}"
