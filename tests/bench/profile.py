"""Where the relay's time goes: py-spy beside it during one round, its busiest functions out."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from tests.bench.processes import UnmeasuredError, started
from tests.bench.stage import Stage

SHOWN = 25


async def profile(stage: Stage, stacks: Path) -> str:
    """Load the relay under py-spy, keep the stacks it saw in a file, and list the functions by self time.

    The file is in the collapsed form that flamegraph tools and speedscope read. The figures of such a round
    would be worth nothing.
    """
    async with stage.system("relay") as system:
        await stage.submit(system, stage.options.events // 4)
        command = (py_spy(), "record", "--pid", str(system.running.process.pid), "--format", "raw")
        settings = ("--rate", "250", "--duration", "600", "--threads", "--function", "--output", str(stacks))
        async with started(
            *command, *settings, name="py-spy", log=stage.folder / "py-spy.log", heard=False
        ) as spy:
            await stage.submit(system, stage.options.events)
            with contextlib.suppress(ProcessLookupError):
                spy.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(30):
                await spy.process.wait()
            if spy.process.returncode:
                raise spy.failed(f"ended with code {spy.process.returncode}")
    return busiest(stacks)


def py_spy() -> str:
    """Find the program beside this Python or on the path."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if found := shutil.which("py-spy", path=places):
        return found
    raise UnmeasuredError("py-spy is not installed; `pip install py-spy` brings it")


def busiest(stacks: Path) -> str:
    """Sum collapsed stacks by their last function."""
    own: Counter[str] = Counter()
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        own[stack.rpartition(";")[2]] += int(count)
    total = own.total() or 1
    return "\n".join(f"{count / total:6.1%}  {function}" for function, count in own.most_common(SHOWN))
