"""A process seen from outside: started, heard, weighed and, whatever happens, ended.

In comes a command line; out come the lines it prints and its CPU time and memory as Linux counts them. What
a process is for, and what it is asked, is none of this module's business.
"""

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_LINE = 16 << 20  # the times of thousands of arrivals


class UnmeasuredError(Exception):
    """The benchmark could not be carried out; the text says where it stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One process, whose complaints go to a file."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    async def hear(self, *, seconds: float) -> Any:
        """Return the next line it prints, parsed as JSON; silence and an early end are errors."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                line = await self.process.stdout.readline()
        except TimeoutError:
            raise self.failed(f"said nothing for {seconds:g} s") from None
        if not line:
            raise self.failed("ended before it answered")
        return json.loads(line)

    async def ask(self, line: str, *, seconds: float) -> Any:
        """Write one line to it and hear the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        return await self.hear(seconds=seconds)

    def failed(self, what: str) -> UnmeasuredError:
        """Build the error that quotes the last it wrote."""
        tail = self.log.read_text(errors="replace")[-2000:].strip()
        return UnmeasuredError(f"{self.name} {what}\n{tail}")

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far, also of those that have ended."""
        # This is clock_getcpuclockid(3): nanoseconds, where /proc/PID/stat has hundredths of a second.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def resident_megabytes(self) -> float:
        return self._megabytes("status", "VmRSS:")

    def proportional_megabytes(self) -> float:
        """Memory with what is shared with other processes divided among them."""
        return self._megabytes("smaps_rollup", "Pss:")

    def _megabytes(self, file: str, label: str) -> float:
        lines = Path(f"/proc/{self.process.pid}/{file}").read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith(label))
        return int(kibibytes) * 1024 / 1e6

    async def rest(self, *, seconds: float = 3) -> None:
        """Wait until it has used next to no CPU for 50 ms, or give up and let the figures show it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            await asyncio.sleep(0.05)
            if self.cpu_seconds() - before < 0.001:
                return


@asynccontextmanager
async def started(
    *command: str, name: str, log: Path, environment: Mapping[str, str] | None = None, heard: bool = True
) -> AsyncIterator[Running]:
    """Start a process and kill it at the end of the block: nothing it holds is kept.

    The stdout of one that is not `heard` goes where its complaints go, so that it cannot fill a pipe.
    """
    with log.open("wb") as complaints:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if heard else complaints,
            stderr=complaints,
            limit=LONGEST_LINE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that Ctrl-C comes to the benchmark alone, which then ends the others
        )
    try:
        yield Running(name=name, process=process, log=log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def obey(carry_out: Callable[[str], Awaitable[object]]) -> None:
    """Inside such a process: answer each line on stdin with one line of JSON, until stdin ends."""
    orders = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    try:
        while line := await orders.readline():
            print(json.dumps(await carry_out(line.decode())), flush=True)
    finally:
        pipe.close()


def new_loop(kind: str = "auto") -> asyncio.AbstractEventLoop:
    """Make the loop that was asked for; `auto` is uvloop where it is installed."""
    if kind == "uvloop" or (kind == "auto" and importlib.util.find_spec("uvloop")):
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.SelectorEventLoop()
