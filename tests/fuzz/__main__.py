"""`python -m tests.fuzz`: a hundred thousand inputs for each fuzzer, and a table of what came of them."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Protocol

from tests.fuzz import answers, bodies, urls


class Told(Protocol):
    """What every fuzzer returns."""

    tried: int
    unclean: list[str]


# Each takes `seed` and either `count` or `seconds`.
FUZZERS: dict[str, Callable[..., Told]] = {
    "addresses": urls.run_addresses,
    "answers": answers.run,
    "bodies": bodies.run,
    "proxies": urls.run_proxies,
    "urls": urls.run,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FUZZERS)}; all without any")
    parser.add_argument("--count", type=int, default=100_000, help="inputs for each")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(arguments)
    lines, failed = [], False
    for name in chosen.names or FUZZERS:
        started = time.monotonic()
        result = FUZZERS[name](seed=chosen.seed, count=chosen.count)
        took = time.monotonic() - started
        lines.append(f"{name:12} unclean {len(result.unclean)} of {result.tried}, {took:.0f} s")
        failed = failed or bool(result.unclean)
        for each in result.unclean[:10]:
            print(f"{name}: {each}", flush=True)
    print(*lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
