"""Everything that is checked, in tiers with their seconds: `python -m tests` (see the README, Developing).

The same for people and for CI. `python -m tests lint types` runs some tiers only.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
BIN = Path(PYTHON).parent


def run(*command: str | Path, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, **options)  # type: ignore[call-overload]


def format_() -> None:
    run(BIN / "ruff", "format", "--check", ".")


def lint() -> None:
    run(BIN / "ruff", "check", ".")


def imports() -> None:
    run(BIN / "lint-imports")


def types() -> None:
    run(BIN / "mypy")


def tests() -> None:
    run(BIN / "coverage", "erase")
    # More than there are cores: most tests wait for processes and sockets most of the time.
    workers = ("--numprocesses", str(2 + (os.cpu_count() or 1)), "--dist", "worksteal")
    run(BIN / "pytest", *workers, "--cov", "--cov-report=term", "--cov-fail-under=90")


def wheel() -> None:
    """Build the wheel, put it alone into a folder, and run the demo from there."""
    with tempfile.TemporaryDirectory() as folder:
        run(PYTHON, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
        (built,) = Path(folder).glob("*.whl")
        installed = Path(folder) / "installed"
        run(PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, built)
        environment = os.environ | {"PYTHONPATH": str(installed)}
        where = "import relay, sys; sys.exit(not relay.__file__.startswith(sys.argv[1]))"
        subprocess.run([PYTHON, "-c", where, str(installed)], check=True, cwd=folder, env=environment)
        subprocess.run([PYTHON, "-m", "relay", "demo"], check=True, cwd=folder, env=environment, timeout=60)


TIERS: dict[str, Callable[[], None]] = {
    "format": format_,
    "lint": lint,
    "imports": imports,
    "types": types,
    "tests": tests,
    "wheel": wheel,
}


def main(names: list[str]) -> int:
    took: dict[str, str] = {}
    failed = False
    for name in names or TIERS:
        started = time.monotonic()
        try:
            TIERS[name]()
            result = "ok"
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            result, failed = f"FAILED: {error}", True
        took[name] = f"{time.monotonic() - started:6.1f} s  {result}"
    for name, line in took.items():
        print(f"{name:8} {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
