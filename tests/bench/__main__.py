"""`python -m tests.bench`: options in, rounds run, a table or JSON on stdout; progress goes to stderr."""

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from tests.bench import comparison, curves
from tests.bench.compared.setup import NAMES, set_up
from tests.bench.figures import MEASUREMENTS, TURNS
from tests.bench.machine import machine
from tests.bench.markdown import markdown
from tests.bench.processes import UnmeasuredError
from tests.bench.profile import profile
from tests.bench.report import text
from tests.bench.rounds import run
from tests.bench.stage import Options, Stage, open_stage

ROUNDS = 7
ROUNDS_OF_CURVES = 3
EPILOG = """
With --compare: `--setup all` first (apt: redis-server, nodejs, npm; pip: celery[redis], huey, requests into
.bench/venv; npm: bullmq, ioredis into .bench/node). What is not there is skipped with its reason.

  python -m tests.bench --json > figures.json
  python -m tests.bench --setup all && python -m tests.bench --compare all --json > compared.json
  python -m tests.bench --curves --json --plot curves.svg > curves.json
  python -m tests.bench --read figures.json --read compared.json --read curves.json --table
"""


async def bench(arguments: argparse.Namespace, options: Options) -> list[dict[str, Any]] | str:
    """Measure what was asked for; a profile comes as text."""
    end_on_termination()
    async with open_stage(options) as stage:
        if arguments.profile:
            return await profile(stage, arguments.profile)
        described = machine(options, stage.folder)
        return [{"machine": described, **await measured(stage, arguments)}]


async def measured(stage: Stage, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.compare:
        rivals, skipped = comparison.chosen(several(arguments.compare), stage.options)
        for name, reason in skipped.items():
            print(f"{name} is skipped: {reason}", file=sys.stderr)
        if not rivals:
            raise UnmeasuredError("there is nobody to compare with")
        found = await run(stage, [comparison.comparison(rivals)])
        return {"systems": comparison.described(rivals, stage.options), "skipped": skipped, **found}
    chosen = curves.points(quick=stage.options.quick) if arguments.curves else MEASUREMENTS
    return await run(stage, [each for each in chosen if arguments.only in {None, each.name}])


def several(name: str) -> tuple[str, ...]:
    return NAMES if name == "all" else (name,)


def end_on_termination() -> None:
    """Let SIGTERM, as a time limit sends it, end the child processes like Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def parse() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the budgets of the design.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", choices=[*NAMES, "all"], help="beside what teams use today")
    what.add_argument("--curves", action="store_true", help="what grows with endpoints, backlog, bodies …")
    what.add_argument("--profile", type=Path, metavar="FILE", help="py-spy's stacks of one round")
    what.add_argument("--read", type=Path, metavar="JSON", action="append", help="what was measured before")
    what.add_argument("--setup", choices=[*NAMES, "all"], help="install what --compare needs")
    names = sorted({each.name for each in (*MEASUREMENTS, *curves.CURVES)})
    parser.add_argument("--only", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, of curves {ROUNDS_OF_CURVES}")
    parser.add_argument("--events", type=int, default=4000, help="counted in each round")
    parser.add_argument("--backlog", type=int, default=1_000_000, help="deliveries that wait, where some do")
    parser.add_argument("--tools", type=Path, default=Path(".bench"), help="where --setup installs")
    parser.add_argument(
        "--loop", choices=["auto", "uvloop", "asyncio"], default="auto", help="of both systems"
    )
    parser.add_argument("--json", action="store_true", help="print a document instead of a table")
    parser.add_argument("--table", action="store_true", help="print tables in Markdown, for the README")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves as .svg or .png")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not how fast")
    parser.add_argument(
        "--self-test", action="store_true", help="bare handler in both seats: ratios must be 1"
    )
    arguments = parser.parse_args()
    rounds = arguments.rounds or (ROUNDS_OF_CURVES if arguments.curves else ROUNDS)
    if min(rounds, arguments.events // TURNS) < 1:
        parser.error(f"at least one round and {TURNS} events")
    quick = arguments.quick
    options = Options(
        rounds=1 if quick else rounds,
        events=200 if quick else arguments.events,
        loop=arguments.loop,
        idle_seconds=0.2 if quick else 3,
        self_test=arguments.self_test,
        backlog=2_000 if quick else arguments.backlog,
        tools=arguments.tools,
        quick=quick,
    )
    return arguments, options


def documents(arguments: argparse.Namespace, options: Options) -> list[dict[str, Any]] | str:
    if arguments.read:
        return [stored(file) for file in arguments.read]
    return asyncio.run(bench(arguments, options))


def stored(file: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UnmeasuredError(f"{file} is not what --json printed: {error}") from None
    return document


def printed(arguments: argparse.Namespace, found: list[dict[str, Any]] | str) -> str:
    """Return what is to be printed, and draw what is to be drawn."""
    if isinstance(found, str):
        return found
    if arguments.plot:
        from tests.bench.plot import plot

        plot(found, arguments.plot)
    if arguments.json:
        return "\n".join(json.dumps(each, indent=1) for each in found)
    write = markdown if arguments.table else text
    return "\n\n".join(map(write, found))


def main() -> int:
    arguments, options = parse()
    try:
        if arguments.setup:
            for name in several(arguments.setup):
                set_up(name, options.tools)
        else:
            print(printed(arguments, documents(arguments, options)))
    except (UnmeasuredError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
