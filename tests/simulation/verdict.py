"""One seed in, what was found out."""

import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.journal import Journal
from tests.simulation.judge import Judge, Violation
from tests.simulation.plan import NEVER
from tests.simulation.world import World, seeded

MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge found in one world."""

    seed: int
    journal: Journal
    violations: list[Violation]
    figures: Counter[str]
    hours: float
    judge: Judge

    def lines(self) -> list[str]:
        """Write what is wrong for people, each with what led to it."""
        lines = []
        for violation in self.violations[:5]:
            lines.append(f"{violation.figure}: {violation.text}")
            lines += [f"    {line[:250]}" for line in self.judge.context(violation)]
        return lines


def judge_seed(seed: int) -> Verdict:
    """Let the world of a seed happen, in a folder in memory where there is one, and judge it."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder, seeded(seed):
        world = World(seed, Path(folder))
        try:
            world.run()
        except Exception as error:  # noqa: BLE001 - whatever ends the relay is a broken promise
            broken = [Violation("broke", _reason(error), len(world.journal.entries) - 1)]
        else:
            broken = []
    judge = Judge(world.journal, world.network.bodies)
    violations = judge.judge(
        forgets=world.plan.retention_seconds < NEVER, drained_after=world.drained_after, whole=not broken
    )
    return Verdict(seed, world.journal, violations + broken, judge.figures, world.now / 3600, judge)


def _reason(error: BaseException) -> str:
    """Write the first leaf of an error, and where it was raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {error} ({places})"
