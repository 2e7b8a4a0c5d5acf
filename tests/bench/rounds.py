"""Measurements in, their rows out: all rounds are run here.

Round after round, each measurement is run once in each, so that a busy stretch of the machine falls on all of
them and no measurement has it to itself.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tests.bench.budget import Measurement
from tests.bench.report import row
from tests.bench.stage import Stage


async def run(stage: Stage, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return a row for each figure, and how busy the machine was during each round of each measurement."""
    samples: defaultdict[tuple[Measurement, str], list[float]] = defaultdict(list)
    rounds = []
    for number in range(1, stage.options.rounds + 1):
        for each in measurements:
            print(f"{each.label}: round {number} of {stage.options.rounds}", file=sys.stderr)
            busy, began = os.getloadavg()[0], time.monotonic()
            for name, value in (await each.round(stage)).items():
                samples[each, name].append(value)
            rounds.append(
                {
                    "measurement": each.label,
                    "round": number,
                    "load_average": [busy, os.getloadavg()[0]],
                    "seconds": round(time.monotonic() - began, 1),
                }
            )
    rows = [row(each, figure, samples[each, figure.name]) for each in measurements for figure in each.figures]
    return {"figures": rows, "rounds": rounds}
