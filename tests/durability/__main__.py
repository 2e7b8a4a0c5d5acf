"""Kill, cut off and starve a relay as often as you like: `python -m tests.durability --kills 1000`.

Prints the scoreboard as the README has it; exits 1 if anything is not as promised. `check FOLDER` judges the
logs of one run again.
"""

import argparse
import asyncio
import errno
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

from relay.outbox.schema import VERSIONS
from tests.durability import runs, shim
from tests.durability.checker import check
from tests.durability.found import FOUND, hunt
from tests.durability.migrations import killed_migrations
from tests.durability.runs import Result
from tests.durability.zygote import Zygote

Row = tuple[str, Result]
Play = Callable[[Path, Zygote], Awaitable[Result]]


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.durability", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="kill -9 at random moments")
    parser.add_argument("--between", type=int, default=0, help="kills between a 2xx and its record")
    parser.add_argument("--power-cuts", type=int, default=0)
    parser.add_argument(
        "--calls", action="store_true", help="an end, a power cut and each error at every call"
    )
    parser.add_argument("--troubles", type=int, default=0, help="of all kinds, one after another")
    parser.add_argument("--planted", action="store_true", help="see the checker find planted faults")
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--folder", type=Path, help="where the logs stay (default: nowhere)")
    given = parser.parse_args(words)
    if not (
        given.kills or given.between or given.power_cuts or given.calls or given.troubles or given.planted
    ):
        # All of it, in about six minutes.
        given.kills, given.between, given.power_cuts, given.troubles = 60, 50, 30, 20
        given.calls = given.planted = True
    return given


def plays(given: argparse.Namespace) -> Iterator[tuple[str, Play]]:
    """Name what is to be done, and how; what needs a disk that fails comes last."""
    seed = given.seed
    if given.planted:
        yield f"planted faults found, of {len(FOUND)}", hunted
    if given.kills:
        yield "kill -9 at a random moment", partial(runs.kills, cycles=given.kills, seed=seed)
    if given.between:
        yield (
            "kill -9 between a receiver's 2xx and its record",
            partial(runs.between_answer_and_record, count=given.between, seed=seed),
        )
    if shim.build() is None:
        print("no compiler here: what needs a disk that fails is left out", file=sys.stderr)
        return
    if given.power_cuts:
        yield "power cut", partial(runs.power_cuts, cycles=given.power_cuts, seed=seed)
    if given.calls:
        yield from plays_at_calls(seed)
    if given.troubles:
        yield "trouble of any kind", partial(runs.nemesis, faults=given.troubles, seed=seed)


def plays_at_calls(seed: int) -> Iterator[tuple[str, Play]]:
    for start, again in (("the first", False), ("a later", True)):
        for name, power in (("kill -9", False), ("power cut", True)):
            yield (
                f"{name} after each storage call from {start} start on",
                partial(runs.kill_points, seed=seed, power=(power,), again=again),
            )
    for version in range(1, len(VERSIONS)):
        yield (
            f"kill -9 after each storage call of a start on schema {version}",
            partial(killed_migrations, seed=seed, version=version),
        )
    for number, persistent in runs.FAULTS:
        when = "from a storage call on, for each" if persistent else "at each storage call"
        yield (
            f"{errno.errorcode[number]} {when}",
            partial(runs.disk_errors, seed=seed, faults=[(number, persistent)]),
        )


async def play(given: argparse.Namespace, folder: Path) -> list[Row]:
    rows: list[Row] = []
    for name, run in plays(given):
        began = time.monotonic()
        async with Zygote(shim.build()) as zygote:
            result = await run(folder / str(len(rows)), zygote)
        rows.append((name, result))
        print(f"{name}: {result.trials} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


async def hunted(folder: Path, zygote: Zygote) -> Result:
    missed = await hunt(zygote, folder)
    result = Result(trials=len(FOUND) - len(missed))
    for each in missed:
        result.report.fault("undetected", each)
    return result


def board(rows: list[Row]) -> str:
    """Write the scoreboard as a table."""
    lines = [
        "| fault | n | acknowledged | lost | bound | duplicates | unexplained | ghosts | bad bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in rows:
        figures = result.report.figures
        if not figures["acknowledged"]:
            lines.append(f"| {name} | {result.trials} | | | | | | | |")
            continue
        cells = (
            name,
            f"{result.trials:,}",
            f"{figures['acknowledged']:,}",
            figures["lost"],
            f"{3 / result.trials:.1%}" if result.sampled else "all",
            f"{figures['duplicates']:,}",
            figures["unexplained_duplicates"],
            figures["unexpected"],
            figures["body_mismatch"] + figures["bad_signature"],
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    if words[:1] == ["check"]:
        report = check(Path(words[1]))
        print(report)
        return int(bool(report.broken))
    given = arguments(words)
    with tempfile.TemporaryDirectory(prefix="relay-durability-") as scratch:
        rows = asyncio.run(play(given, given.folder or Path(scratch)))
    print(board(rows))
    wrong = 0
    for name, result in rows:
        exits = result.report.examples["exit codes"]
        if result.report.broken or exits:
            wrong = 1
            print(f"\n{name}\n{result.report}", *exits, sep="\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
