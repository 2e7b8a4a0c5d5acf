"""`relay backup`: a consistent copy of the outbox comes from the running relay and becomes a file, whole."""

import os
import stat
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from time import monotonic

from relay.cli.client import answered, decoded
from relay.cli.exits import CommandError, Exit
from relay.cli.output import show_json
from relay.cli.progress import Progress

CHUNK_BYTES = 256 << 10
# Nothing comes before the relay has made its copy, which of a large outbox on a busy disk takes a while.
SILENCE_SECONDS = 3600.0
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def backup(arguments: Namespace) -> int:
    path = Path(arguments.file)
    refuse(path)
    started = monotonic()
    with Progress() as progress, beside(path) as descriptor:
        progress.tell("the relay makes its copy")
        with answered("GET", "/v1/backup", url=arguments.url, timeout_seconds=SILENCE_SECONDS) as answer:
            if answer.status != 200:
                raise CommandError(said(answer))
            size = save(answer, descriptor, path, progress)
    if arguments.json:
        show_json({"file": str(path), "bytes": size, "seconds": round(monotonic() - started, 1)})
    else:
        print(f"{path}: {written(size)}")
    return Exit.DONE


def refuse(path: Path) -> None:
    """Refuse what cannot be a backup's place; another backup there is replaced, once the new one is whole."""
    if path.is_dir():
        raise CommandError(f"{path} is a folder: name the file", Exit.USAGE)
    if any(path.with_name(path.name + end).exists() for end in ("-wal", ".lock")):
        raise CommandError(f"{path} is an outbox itself: name another file", Exit.USAGE)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise CommandError(f"{path} is no file: name one", Exit.USAGE)


@contextmanager
def beside(path: Path) -> Iterator[int]:
    """Open a file for ourselves alone beside `path`; it takes that name at the end, or is gone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        yield descriptor
        with telling(path):
            os.fsync(descriptor)
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        os.close(descriptor)
        with suppress(FileNotFoundError):
            partial.unlink()


def save(answer: HTTPResponse, descriptor: int, path: Path, progress: Progress) -> int:
    """Write the answer's body; return its size. Raises CommandError when it is not the whole of a copy."""
    length, size = int(answer.headers["Content-Length"] or 0), 0
    while chunk := answer.read(CHUNK_BYTES):
        if size == 0 and not chunk.startswith(b"SQLite format 3\0"):
            raise CommandError("what came is no copy of an outbox")
        with telling(path):
            write_all(descriptor, chunk)
        size += len(chunk)
        progress.tell(f"{written(size)} of {written(length)}")
    if not length or size != length:
        raise CommandError(
            f"the relay broke off after {written(size)} of {written(length)}: nothing was kept"
        )
    return size


def write_all(descriptor: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Let the new name survive a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Say what failed on our own disk; the connection's failures are told elsewhere."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> CommandError:
    return CommandError(f"{path} cannot be written: {error.strerror}")


def said(answer: HTTPResponse) -> str:
    problem = decoded(answer.read(1 << 16))
    detail = problem.get("detail") if isinstance(problem, dict) else None
    hint = " (the token is taken from $RELAY_TOKEN)" if answer.status == 401 else ""
    return f"{detail or f'the relay answered {answer.status}'}{hint}"


def written(size: float) -> str:
    """Write a size for people: 13002342 -> "12.4 MiB"."""
    unit = UNITS[0]
    for unit in UNITS:  # noqa: B007 - where it ends is the result
        if size < 1024:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
