"""`python -m tests.bench`: options in, rounds run, a table or JSON on stdout; progress goes to stderr."""

import argparse
import asyncio
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path

from tests.bench.figures import MEASUREMENTS, TURNS, Measurement
from tests.bench.processes import UnmeasuredError
from tests.bench.profile import profile
from tests.bench.report import machine, row, table
from tests.bench.stage import Options, Stage, open_stage


async def measure(stage: Stage, measurement: Measurement) -> list[dict[str, object]]:
    """Run all rounds of one measurement and make its rows."""
    samples = defaultdict(list)
    for number in range(1, stage.options.rounds + 1):
        print(f"{measurement.name}: round {number} of {stage.options.rounds}", file=sys.stderr)
        for name, value in (await measurement.round(stage)).items():
            samples[name].append(value)
    return [row(figure, samples[figure.name]) for figure in measurement.figures]


async def bench(arguments: argparse.Namespace, options: Options) -> str:
    """Do what was asked and return what is to be printed."""
    end_on_termination()
    async with open_stage(options) as stage:
        if arguments.profile:
            return await profile(stage, arguments.profile)
        chosen = [each for each in MEASUREMENTS if arguments.only in {None, each.name}]
        rows = [each for measurement in chosen for each in await measure(stage, measurement)]
    described = machine(options)
    if arguments.json:
        return json.dumps({"machine": described, "figures": rows}, indent=1)
    return "\n".join((*(f"{name}: {value}" for name, value in described.items()), "", table(rows)))


def end_on_termination() -> None:
    """Let SIGTERM, as a time limit sends it, end the child processes like Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def parse() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measure the budgets of the design."
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--events", type=int, default=4000, help="counted in each round")
    parser.add_argument("--backlog", type=int, default=1_000_000, help="deliveries that wait, where some do")
    parser.add_argument("--only", choices=[each.name for each in MEASUREMENTS])
    parser.add_argument(
        "--loop", choices=["auto", "uvloop", "asyncio"], default="auto", help="of both systems"
    )
    parser.add_argument("--json", action="store_true", help="print a document instead of a table")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not how fast")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="no figures: py-spy's stacks of one round"
    )
    parser.add_argument(
        "--self-test", action="store_true", help="bare handler in both seats: ratios must be 1"
    )
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.events // TURNS) < 1:
        parser.error(f"at least one round and {TURNS} events")
    quick = arguments.quick
    options = Options(
        rounds=1 if quick else arguments.rounds,
        events=200 if quick else arguments.events,
        loop=arguments.loop,
        idle_seconds=0.2 if quick else 3,
        self_test=arguments.self_test,
        backlog=2_000 if quick else arguments.backlog,
    )
    return arguments, options


def main() -> int:
    arguments, options = parse()
    try:
        print(asyncio.run(bench(arguments, options)))
    except UnmeasuredError as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
