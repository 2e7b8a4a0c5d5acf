"""Connections to the database: its address in, one to work with out; its errors in, ours out.

Whatever goes wrong on a connection, it is thrown away: a new one knows whether the database is there. Every
use has a limit, kept by hanging up, because a server that says nothing any more would not hear a request to
cancel.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
from asyncpg import Connection

from relay.model import Secret
from relay.outbox import AwayError, DamagedError, FullError, OutboxError
from relay.outbox.place import shown

T = TypeVar("T")

CONNECT_SECONDS = 5.0
LIMIT_SECONDS = 10.0  # of one use: a few statements on few rows
IDLE_MS = 5_000  # that a transaction may stay open while its relay says nothing, as when it is stopped
AWAY_SECONDS = 0.2  # in which it is not asked again
LOOKS = 2  # before the others that are in the way are left to themselves
CACHE = "statement_cache_size"
# A plan made while a table was small must not walk over it when it has grown; no pooler knows such settings.
SETTINGS = {"application_name": "relay", "enable_seqscan": "off"}

BROKEN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

# By the first two or all five characters of what PostgreSQL calls a state.
AGAIN = ("40", "23505")  # serialization, deadlock; the same key in another relay's batch
FULL = ("53100",)
REFUSED = ("28", "3D", "42501", "3F")  # who we are, which database, what we may
DAMAGED = ("XX001", "XX002")
OURS = ("42", "22", "23", "21", "0A", "2B")  # mistakes in our SQL


class AgainError(Exception):
    """Somebody else was in the way; nothing was written, and the next try may do."""


class Links:
    """Up to `most` connections to one database."""

    def __init__(self, url: Secret, most: int) -> None:
        self.name = shown(url)
        self._dsn, self._cache = _split(url.reveal())
        self._slots = asyncio.Semaphore(most)
        self._idle: list[Connection] = []
        self._failed: str | None = None
        self._failed_until = 0.0

    @property
    def pooled(self) -> bool:
        """Whether a pooler in between may give every transaction another connection."""
        return self._cache == 0

    @asynccontextmanager
    async def link(self, seconds: float | None = None) -> AsyncIterator[Connection]:
        """Lend a connection; what goes wrong meanwhile ends it. Raises AgainError, OutboxError."""
        async with self._slots:
            connection = await self._take_unless_away()
            limit = asyncio.get_running_loop().call_later(seconds or LIMIT_SECONDS, connection.terminate)
            try:
                yield connection
            except BROKEN as error:
                connection.terminate()
                meaning = translated(error, self.name)
                if isinstance(meaning, AwayError):
                    self.close()  # the others will not have fared better
                    self._away(meaning)
                raise meaning from error
            except BaseException:
                connection.terminate()
                raise
            else:
                self._idle.append(connection)
            finally:
                limit.cancel()

    async def look(self, look: Callable[[Connection], Awaitable[T]]) -> T:
        """Read with a connection to ourselves. Raises OutboxError."""
        for _ in range(LOOKS):
            try:
                async with self.link() as link:
                    return await look(link)
            except AgainError:
                continue
        raise AwayError(f"{self.name} is too busy: what was accepted is safe")

    async def open(self) -> Connection:
        """Open one connection that the caller has to itself. Raises OutboxError."""
        try:
            connection = await asyncpg.connect(
                self._dsn,
                timeout=CONNECT_SECONDS,
                target_session_attrs="read-write",
                statement_cache_size=self._cache,
                server_settings=SETTINGS if self._cache else {},
            )
        except (*BROKEN, ValueError) as error:
            raise translated(error, self.name) from error
        _hear_of_silence(connection)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()

    async def _take_unless_away(self) -> Connection:
        """Take a connection; who waited for his turn behind one that failed just now is told the same."""
        if self._failed is not None and time.monotonic() < self._failed_until:
            raise AwayError(self._failed)
        try:
            return await self._take()
        except AwayError as error:
            self._away(error)
            raise

    def _away(self, error: AwayError) -> None:
        self._failed, self._failed_until = str(error), time.monotonic() + AWAY_SECONDS

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self.open()


@asynccontextmanager
async def transaction(link: Connection) -> AsyncIterator[None]:
    """Begin and commit; what is raised in between leaves an open transaction to be hung up on."""
    await link.execute(f"BEGIN; SET LOCAL idle_in_transaction_session_timeout = {IDLE_MS}")
    yield
    await link.execute("COMMIT")


def translated(error: Exception, name: str) -> Exception:
    """Return what an error of the database's means for the outbox; a fault of our own stays what it is."""
    state = getattr(error, "sqlstate", None) or ""
    meaning: Exception = AwayError(
        f"{name} cannot be reached or does not answer ({_told(error)}): what was accepted is safe"
    )
    if isinstance(error, ValueError):
        meaning = OutboxError(f"outbox.url cannot be used ({error})")
    elif state.startswith(AGAIN):
        meaning = AgainError(str(error))
    elif state.startswith(FULL):
        meaning = FullError(f"there is no room for {name} ({error}): what was accepted stays safe")
    elif state.startswith(REFUSED):
        meaning = OutboxError(f"{name} refuses us ({error}): check outbox.url and what its user may do")
    elif state.startswith(DAMAGED):
        meaning = DamagedError(f"{name} is damaged ({error}): check the database, then start again")
    elif state.startswith(OURS):
        meaning = error
    return meaning


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _split(url: str) -> tuple[str, int]:
    """Take from an address what is ours: how many statements a connection may prepare."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    cache = next((value for name, value in query if name == CACHE), "100")
    rest = urlencode([(name, value) for name, value in query if name != CACHE])
    return urlunsplit(parts._replace(query=rest)), int(cache)


def _hear_of_silence(connection: Connection) -> None:
    """Let the system notice a peer that is gone without a word, between two uses too."""
    sock = connection._transport.get_extra_info("socket")  # noqa: SLF001 - asyncpg has no setting for it
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(LIMIT_SECONDS * 1000)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
