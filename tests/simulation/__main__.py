"""`python -m tests.simulation`: many worlds of three simulated days each, or one of them told in full.

--seed 7                 one world, everything that happened in it, and what is wrong with it
--seeds 1000             as many worlds; ends with the first that goes wrong
--seconds 57             as many worlds as fit
--prove                  with each fault of `faults.py` planted in turn: all have to be found
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import islice

from tests.simulation.faults import FAULTS
from tests.simulation.journal import told
from tests.simulation.verdict import Verdict, judge_seed

SEEDS_TO_PROVE = 12
HIGHEST_ARE_KEPT = "most_"  # figures of this name are not added up


def main() -> int:
    given = arguments().parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of names have an order too
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])  # noqa: S606
    if given.prove:
        return prove(list(FAULTS)[:: given.every], given.jobs)
    if given.seed is None:
        seeds = range(given.first, given.first + given.seeds)
        return run_many(seeds, given.seconds, given.jobs, keep_going=given.keep_going)
    with FAULTS[given.plant]() if given.plant else nullcontext():
        return tell(judge_seed(given.seed), quiet=given.quiet)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="let one world happen and tell everything")
    parser.add_argument("--quiet", action="store_true", help="tell only what is wrong with it")
    parser.add_argument("--plant", choices=sorted(FAULTS), help="with a fault in the relay, to be found")
    parser.add_argument("--seeds", type=int, default=1_000_000, help="how many worlds")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of real time, at the most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="so many at once")
    parser.add_argument("--keep-going", action="store_true", help="after a seed that goes wrong")
    parser.add_argument("--prove", action="store_true", help="that every planted fault is found")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="prove it of each Nth fault alone")
    return parser


def run_many(seeds: range, seconds: float, jobs: int, *, keep_going: bool) -> int:
    """Let worlds happen until one goes wrong, all are done or the time is over."""
    begun = time.monotonic()
    done, wrong, hours, figures = 0, list[int](), 0.0, Counter[str]()
    for seed, lines, its_hours, its_figures in judged(seeds, begun + seconds, jobs):
        done, hours = done + 1, hours + its_hours
        add(figures, its_figures)
        if lines:
            wrong.append(seed)
            print(f"seed {seed} breaks a promise; again: python -m tests.simulation --seed {seed}")
            print("\n".join(lines), flush=True)
            if not keep_going:
                break
    took = time.monotonic() - begun
    print(f"{done} seeds, {hours:.0f} simulated hours in {took:.0f} s: {hours / took:.0f} hours a second")
    print(", ".join(f"{name} {count}" for name, count in sorted(figures.items())))
    print(f"{len(wrong)} went wrong: {wrong}" if wrong else "every promise was kept")
    return int(bool(wrong))


Summary = tuple[int, list[str], float, Counter[str]]


def judged(seeds: Iterable[int], deadline: float, jobs: int) -> Iterator[Summary]:
    """Yield what came of each seed, in order; begin none after the deadline."""
    with ProcessPoolExecutor(jobs) as workers:
        running = [workers.submit(summary, seed, deadline) for seed in _at_most(seeds, jobs * 4)]
        rest = iter(seeds)
        for _ in running:
            next(rest)
        while running:
            summed = running.pop(0).result()
            if summed is None:
                return
            try:
                yield summed
            except GeneratorExit:
                workers.shutdown(wait=False, cancel_futures=True)
                raise
            running += [workers.submit(summary, seed, deadline) for seed in _at_most(rest, 1)]


def _at_most(seeds: Iterable[int], count: int) -> Sequence[int]:
    return list(islice(seeds, count))


def summary(seed: int, deadline: float) -> Summary | None:
    """Judge one seed unless it is too late."""
    if time.monotonic() > deadline:
        return None
    verdict = judge_seed(seed)
    return seed, verdict.lines(), verdict.hours, verdict.figures


def add(figures: Counter[str], more: Counter[str]) -> None:
    for name, count in more.items():
        figures[name] = (
            max(figures[name], count) if name.startswith(HIGHEST_ARE_KEPT) else figures[name] + count
        )


def tell(verdict: Verdict, *, quiet: bool) -> int:
    """Print everything that happened in one world."""
    if not quiet:
        for entry in verdict.journal.entries:
            print(told(entry))
    print(", ".join(f"{name} {count}" for name, count in sorted(verdict.figures.items())))
    print(f"journal {verdict.journal.digest()}")
    print("\n".join(verdict.lines()) or "every promise was kept")
    return int(bool(verdict.violations))


def prove(faults: list[str], jobs: int) -> int:
    """Print for every planted fault which seed found it, and by which broken promise."""
    missed = 0
    with ProcessPoolExecutor(jobs) as workers:
        for fault, found in zip(faults, workers.map(find, faults), strict=True):
            print(f"{fault}: {found or 'NOT FOUND'}", flush=True)
            missed += found is None
    print(f"{len(faults) - missed} of {len(faults)} planted faults found")
    return int(bool(missed))


def find(fault: str) -> str | None:
    """Return which seed shows a planted fault, and how; None if none of the first ones does."""
    with FAULTS[fault]():
        for seed in range(1, SEEDS_TO_PROVE + 1):
            violations = judge_seed(seed).violations
            if violations:
                return f"seed {seed}, {violations[0].figure}: {violations[0].text[:100]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
