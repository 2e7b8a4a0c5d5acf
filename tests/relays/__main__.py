"""Several relays on one PostgreSQL, left alone and troubled: `python -m tests.relays`.

Prints what the checker found; exits 1 if anything is not as promised.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests import postgres
from tests.durability.checker import Report
from tests.durability.zygote import Zygote
from tests.relays import runs


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.relays", description=__doc__)
    parser.add_argument("--relays", type=int, default=4)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=20261125)
    parser.add_argument("--only", choices=("calm", "troubled"))
    parser.add_argument("--rate", type=float, default=1000.0, help="events a second, when troubled")
    parser.add_argument("--folder", type=Path, help="where the logs stay (default: nowhere)")
    return parser.parse_args(words)


def whole(report: Report, *, once: bool) -> bool:
    """Tell whether all is as promised."""
    figures = report.figures
    fine = not report.broken and not figures["ended by themselves"] and not figures["left over"]
    return fine and not (once and figures["duplicates"])


async def run(given: argparse.Namespace, folder: Path) -> bool:
    fine = True
    async with Zygote() as zygote:
        with postgres.running() as server:
            how = {"relays": given.relays, "events": given.events, "seed": given.seed}
            if given.only != "troubled":
                report = await runs.calm(folder / "calm", zygote, server, **how)
                print(f"calm\n{report}\n", flush=True)
                fine = whole(report, once=True)
            if given.only != "calm":
                report = await runs.troubled(
                    folder / "troubled", zygote, server, rate=given.rate, posters=64, **how
                )
                print(f"troubled\n{report}\n", flush=True)
                fine = whole(report, once=False) and fine
    return fine


def main() -> int:
    given = arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="relay-relays-") as temporary:
        folder = given.folder or Path(temporary)
        return 0 if asyncio.run(run(given, folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
