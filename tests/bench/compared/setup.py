"""What the compared systems need: whether it is here, in which versions, and how it comes here.

Python packages go into `venv` and npm packages into `node` in the folder of tools. Redis and Node come from
the system's packages.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.bench.processes import UnmeasuredError

PROGRAMS = {"redis-server": "redis-server", "node": "nodejs", "npm": "npm"}  # and Debian's packages
NEEDS = {
    "celery": (("redis-server",), ("celery[redis]", "requests"), ()),
    "huey": ((), ("huey", "requests"), ()),
    "bullmq": (("redis-server", "node", "npm"), (), ("bullmq", "ioredis")),
}
NAMES = tuple(NEEDS)


def python(tools: Path) -> str:
    return str(tools / "venv/bin/python")


def modules(tools: Path) -> Path:
    return tools / "node"


def missing(name: str, tools: Path) -> str | None:
    """Say what a system lacks and how to get it, or nothing when it can be measured."""
    programs, wheels, packages = NEEDS[name]
    lacking = [program for program in programs if shutil.which(program) is None]
    lacking += [each for each in map(bare, wheels) if not list((tools / "venv").glob(f"lib/*/*/{each}"))]
    lacking += [each for each in packages if not (modules(tools) / "node_modules" / each).exists()]
    if not lacking:
        return None
    return f"{', '.join(lacking)} not found: `python -m tests.bench --setup {name}` brings what is missing"


def bare(requirement: str) -> str:
    return requirement.partition("[")[0]


def set_up(name: str, tools: Path) -> None:
    """Install what a system lacks; programs only as root."""
    programs, wheels, packages = NEEDS[name]
    if lacking := [PROGRAMS[program] for program in programs if shutil.which(program) is None]:
        install = ("apt-get", "install", "-y", "-q", "--no-install-recommends", *lacking)
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise UnmeasuredError(f"programs are missing; as root on Debian: {shlex.join(install)}")
        run("apt-get", "update", "-q")
        run(*install)
    if wheels:
        if not Path(python(tools)).exists():
            run(sys.executable, "-m", "venv", str(tools / "venv"))
        run(python(tools), "-m", "pip", "install", "-q", "--upgrade", *wheels)
    if packages:
        modules(tools).mkdir(parents=True, exist_ok=True)
        run("npm", "install", "--silent", "--prefix", str(modules(tools)), *packages)


def run(*command: str) -> None:
    print(f"+ {shlex.join(command)}", file=sys.stderr)
    try:
        subprocess.run(command, check=True, timeout=600, stdout=sys.stderr)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnmeasuredError(f"setting up failed: {error}") from error


def versions(name: str, tools: Path) -> dict[str, str]:
    """Return the version of everything a system was measured with."""
    programs, wheels, packages = NEEDS[name]
    found = {each: number(said(each, "--version")) for each in programs if each != "npm"}
    if wheels:
        ask = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        names = sorted({*map(bare, wheels), *(("redis", "kombu") if programs else ())})
        found |= zip(names, said(python(tools), "-c", ask, *names).split(), strict=True)
    for each in packages:
        about = modules(tools) / "node_modules" / each / "package.json"
        found[each] = json.loads(about.read_text())["version"]
    return found


def number(sentence: str) -> str:
    """Find the version in what a program says of itself."""
    found = re.search(r"\d+\.\d+[.\d]*", sentence)
    return found[0] if found else sentence


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
