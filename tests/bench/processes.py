"""A process seen from outside: started, heard, weighed and, whatever happens, ended.

In comes a command line; out come the lines it prints and its CPU time and memory as Linux counts them, its
children's included. What a process is for, and what it is asked, is none of this module's business.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
        """User and system time so far of it and its children, also of threads and children that ended."""
        return sum(map(cpu_seconds, family(self.process.pid)))

    def resident_megabytes(self) -> float:
        return self._megabytes("status", "VmRSS:")

    def proportional_megabytes(self) -> float:
        """Memory of it and its children, with what is shared with other processes divided among them."""
        return self._megabytes("smaps_rollup", "Pss:", family(self.process.pid))

    def _megabytes(self, file: str, label: str, processes: Sequence[int] = ()) -> float:
        kibibytes = 0
        for process in processes or (self.process.pid,):
            lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
            kibibytes += int(next(line.split()[1] for line in lines if line.startswith(label)))
        return kibibytes * 1024 / 1e6

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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its children
        await process.communicate()


def family(process: int) -> list[int]:
    """Return a process and all its descendants that are alive."""
    found = [process]
    for each in found:  # which grows meanwhile
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def cpu_seconds(process: int) -> float:
    """User and system time of a process and of those it waited for; none once it has ended."""
    try:
        # This is clock_getcpuclockid(3): nanoseconds, where /proc/PID/stat has hundredths of a second.
        own = time.clock_gettime(~process << 3 | 2)
        of_children = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[13:15]
    except OSError:
        return 0.0
    return own + sum(map(int, of_children)) / os.sysconf("SC_CLK_TCK")


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
