"""Relays in processes of their own, started in a tenth of the time.

`python -m tests.durability.zygote` imports all that `relay serve` needs and then forks a relay for every line
it is told: `{"config", "environment", "log", "plant"}` in, `{"started": pid}` and `{"ended": pid, "code"}`
out. What runs in the fork is the command line itself. `Zygote` is the other side of it.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.durability import shim
from tests.process import unmeasured

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1
LONGEST_START_SECONDS = 30.0


class Zygote:
    """Starts relays and tells when they ended; all of them end with it."""

    def __init__(self, library: Path | None = None) -> None:
        self._library = library
        self._process: asyncio.subprocess.Process | None = None
        self._started: asyncio.Queue[int] = asyncio.Queue()
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._one = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    async def start(self, order: Mapping[str, Any]) -> tuple[int, asyncio.Future[int]]:
        """Start a relay; return its pid, and its exit code when it has one (negative: the signal)."""
        assert self._process is not None
        assert self._process.stdin is not None
        async with self._one, asyncio.timeout(LONGEST_START_SECONDS):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            pid = await self._started.get()
        return pid, self._ended.setdefault(pid, asyncio.get_running_loop().create_future())

    async def __aenter__(self) -> Self:
        # Its relays are killed on purpose, so measuring their coverage would only make them slow.
        environment = unmeasured()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.durability.zygote",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment | {"PYTHONPATH": str(ROOT)} | shim.preload(self._library),
            cwd=ROOT,
        )
        self._reader = asyncio.get_running_loop().create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._reader is not None
        self._process.stdin.close()  # at which it kills what still runs
        await self._process.wait()
        await self._reader

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "started" in said:
                # A pid may come again: its new owner waits for a new end.
                if (ended := self._ended.get(said["started"])) is not None and ended.done():
                    del self._ended[said["started"]]
                self._started.put_nowait(said["started"])
            else:
                ended = self._ended.setdefault(said["ended"], asyncio.get_running_loop().create_future())
                ended.set_result(said["code"])


def tell(**said: object) -> None:
    os.write(1, json.dumps(said).encode() + b"\n")


def run(order: Mapping[str, Any]) -> int:
    """Be a relay; return its exit code."""
    from relay.cli import main

    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    if order["plant"]:
        from tests.durability.planted import plant

        plant(order["plant"])
    return main(["serve", "--config", order["config"]])


def fork(order: Mapping[str, Any], inherited: tuple[int, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in inherited:
            os.close(descriptor)
        code = run(order)
    except BaseException:  # noqa: BLE001 - this copy of the process must not go on with the loop below
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Nursery:
    """Forks relays and buries them."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._woken, wake = os.pipe()
        self._own = (self._woken, wake)
        for descriptor in self._own:
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Fork a relay for every line, until the lines end; then end them."""
        waiting = b""
        while True:
            ready, _, _ = select.select([0, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if 0 in ready:
                got = os.read(0, 65536)
                if not got:
                    break
                *lines, waiting = (waiting + got).split(b"\n")
                for line in lines:
                    self._fork(json.loads(line))
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        for pid in self._running:
            os.waitpid(pid, 0)

    def _fork(self, order: Mapping[str, Any]) -> None:
        pid = fork(order, self._own)
        self._running.add(pid)
        tell(started=pid)

    def _reap(self) -> None:
        for pid in sorted(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._running.discard(pid)
                tell(ended=pid, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    import relay.cli.serving
    import relay.outbox.sqlite
    import relay.serve  # noqa: F401 - imported so that every fork has them

    with contextlib.suppress(ImportError):
        import uvloop  # noqa: F401
    Nursery().serve()
