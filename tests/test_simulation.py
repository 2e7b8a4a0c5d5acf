"""The whole relay in simulated worlds of three days each: restarts, kills, every fault, wrong clocks.

What may happen there is in `tests/simulation/plan.py`, what must hold in `judge.py`. By hand:
`python -m tests.simulation --seeds 1000`.
"""

import subprocess
import sys

import pytest

from tests.process import unmeasured
from tests.simulation.faults import FAULTS

# A little less than a minute, so that the last world ends in time.
SECONDS = 57


def simulate(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run the simulation apart from this process, whose loop and chance are real; unmeasured, for speed."""
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    ran = subprocess.run(
        command, env=unmeasured(), capture_output=True, text=True, timeout=seconds, check=False
    )
    print(ran.stdout, ran.stderr)
    return ran


@pytest.mark.long
def test_every_promise_is_kept_in_as_many_worlds_as_fit_in_a_minute():
    """A seed that breaks one is printed, and happens in the same way again."""
    ran = simulate("--seconds", str(SECONDS), "--jobs", "1", seconds=240)
    assert ran.returncode == 0, ran.stdout[-20_000:]
    assert "every promise was kept" in ran.stdout


@pytest.mark.long
def test_every_fourth_planted_fault_is_found():
    """A judge that never condemns proves nothing: each breaks a promise in one of the first worlds.

    The command finds all of them.
    """
    ran = simulate("--prove", "--every", "4", seconds=300)
    planted = len(list(FAULTS)[::4])
    assert ran.returncode == 0, ran.stdout
    assert f"{planted} of {planted} planted faults found" in ran.stdout


def test_a_seed_happens_the_same_way_again():
    """What a failing seed shows can be looked at as often as it takes."""
    first, second = (simulate("--seed", "4", "--quiet", seconds=120) for _ in range(2))
    assert "journal" in first.stdout
    assert first.stdout == second.stdout
