"""The database of a source: its connections and every statement; rows come out, or why it does not answer.

Only statements that other engines which speak PostgreSQL's protocol have too; LISTEN is a hint that may fail.
No statement is prepared by name, for poolers in transaction mode lose those.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from relay.model import Source
from relay.sources.rows import Row, Waiting
from relay.sources.script import CHANNEL, VERSION, quoted, script

CONNECT_SECONDS = 5.0
STATEMENT_SECONDS = 20.0
# A relay that hangs with rows in its hands must neither keep them nor hold back the database's vacuum.
HELD_SECONDS = 30
# The deletion need not survive a power cut: the rows would come again, and be recognised.
BEGIN = (
    "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; "
    f"SET LOCAL idle_in_transaction_session_timeout = '{HELD_SECONDS}s'; SET LOCAL synchronous_commit = off"
)
SIZE = 'octet_length(data::text) + coalesce(octet_length("to"::text), 0)' + "".join(
    f" + coalesce(octet_length({name}), 0)"
    for name in ("event", "key", "idempotency_key", "traceparent", "tracestate")
)
WAITS = "SELECT seq FROM {table} WHERE refusal IS NULL ORDER BY seq LIMIT 1"
TAKE = (
    f"SELECT seq, id, key, {SIZE} FROM {{table}}"  # noqa: S608 - of constants
    " WHERE refusal IS NULL ORDER BY seq LIMIT $1 FOR UPDATE SKIP LOCKED"
)
OF_KEYS = """
    SELECT key, seq FROM {table} WHERE refusal IS NULL AND key = ANY($1::text[]) AND seq <= $2
    ORDER BY key, seq"""
CONTENTS = """
    SELECT seq, id, event, data::text,
        CASE WHEN "timestamp" BETWEEN '0001-01-01 00:00:00Z' AND '9999-12-31 23:59:59Z'
            THEN to_char("timestamp" AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
            ELSE "timestamp"::text END,
        key, idempotency_key, "to", traceparent, tracestate,
        floor(extract(epoch FROM submitted_at) * 1000)::bigint
    FROM {table} WHERE seq = ANY($1::bigint[]) ORDER BY seq"""
DELETE = "DELETE FROM {table} WHERE seq = ANY($1::bigint[])"
REFUSE = """
    UPDATE {table} AS mine SET refusal = told.reason, refused_at = now()
    FROM unnest($1::bigint[], $2::text[]) AS told (seq, reason) WHERE mine.seq = told.seq"""
REFUSED = "SELECT count(*) FROM (SELECT 1 FROM {table} WHERE refusal IS NOT NULL LIMIT $1) AS few"
MOST_COUNTED = 10_000


class AwayError(Exception):
    """The source cannot be reached or does not answer; the text says why, for the operator."""


class UnfitError(Exception):
    """The source has not what reading it needs; the text is one sentence with the remedy."""


class MissingError(UnfitError):
    """There is no relay_submit."""


class Database:
    """One source, connected; every method raises AwayError, or UnfitError for what its owner has to mend."""

    def __init__(self, source: Source, connection: Any) -> None:
        self._source = source
        self._connection = connection
        self._table = f"{quoted(source.schema)}.relay_submissions"

    async def check(self) -> None:
        """Look whether function and table are there and may be used. Raises UnfitError."""
        with told(self._source):
            version = await self._connection.fetchval(
                f"SELECT {quoted(self._source.schema)}.relay_submit_version()"
            )
            if version > VERSION:
                raise UnfitError(
                    f"source {self._source.id}: relay_submit has version {version} there, "
                    f"this relay knows {VERSION}: start the newer relay"
                )
            await self._connection.fetch(self._sql(TAKE), 0)

    async def install(self) -> None:
        """Make function and table, where the database is the relay's own."""
        with told(self._source):
            # Of relays that start together one makes them; the others would fail at names that are taken.
            await self._connection.execute(
                f"BEGIN; SELECT pg_advisory_xact_lock(1919249529, 2); {script(self._source.schema)}; COMMIT"
            )

    async def waits(self) -> bool:
        """Tell whether any row waits, whoever has it in hand."""
        with told(self._source):
            return await self._connection.fetchval(self._sql(WAITS)) is not None

    async def refused(self) -> int:
        """Count the rows that were refused and are still there, up to a bound."""
        with told(self._source):
            return int(await self._connection.fetchval(self._sql(REFUSED), MOST_COUNTED))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """What is taken inside is ours until the end; what is settled counts when this ends without an error.

        After an error the connection is of no use any more; once it is closed the rows are free.
        """
        with told(self._source):
            await self._connection.execute(BEGIN)
        yield
        with told(self._source):
            await self._connection.execute("COMMIT")

    async def take(self, most: int) -> list[Waiting]:
        """Lock the oldest rows that nobody else has."""
        with told(self._source):
            return [Waiting(*row) for row in await self._connection.fetch(self._sql(TAKE), most)]

    async def of_keys(self, keys: Sequence[str], last: int) -> dict[str, list[int]]:
        """Return all rows of these keys that wait, up to a number, whoever has them in hand."""
        found: dict[str, list[int]] = {}
        with told(self._source):
            for key, seq in await self._connection.fetch(self._sql(OF_KEYS), keys, last):
                found.setdefault(key, []).append(seq)
        return found

    async def contents(self, seqs: Sequence[int]) -> list[Row]:
        """Read rows that are ours, in order."""
        with told(self._source):
            return [Row(*row) for row in await self._connection.fetch(self._sql(CONTENTS), seqs)]

    async def settle(self, done: Sequence[int], refusals: Mapping[int, str]) -> None:
        """Delete what was accepted, and write down why the rest was not."""
        with told(self._source):
            if done:
                await self._connection.execute(self._sql(DELETE), done)
            if refusals:
                await self._connection.execute(self._sql(REFUSE), list(refusals), list(refusals.values()))

    def _sql(self, statement: str) -> str:
        return statement.replace("{table}", self._table)


@asynccontextmanager
async def opened(source: Source) -> AsyncIterator[Database]:
    """Connect to a source. Raises AwayError."""
    async with _connected(source) as connection:
        yield Database(source, connection)


@asynccontextmanager
async def listening(source: Source, heard: Callable[[], None]) -> AsyncIterator[None]:
    """Call `heard` when somebody says that a row was committed, as far as that can be had: a hint."""
    async with AsyncExitStack() as stack:
        with suppress(AwayError, UnfitError), told(source):
            connection = await stack.enter_async_context(_connected(source))
            await connection.add_listener(CHANNEL, lambda *_: heard())
        yield


@asynccontextmanager
async def _connected(source: Source) -> AsyncIterator[Any]:
    import asyncpg

    with told(source):
        connection = await asyncpg.connect(
            _address(source),
            timeout=CONNECT_SECONDS,
            command_timeout=STATEMENT_SECONDS,
            statement_cache_size=0,
            server_settings={"application_name": "relay"},
        )
    try:
        yield connection
    finally:
        connection.terminate()  # to close in order would wait for a server that may be away


def _address(source: Source) -> str:
    """Return the address as the driver takes it; that no statement is prepared was said already."""
    parts = urlsplit(source.url.reveal())
    query = [(name, value) for name, value in parse_qsl(parts.query) if name != "statement_cache_size"]
    return urlunsplit(parts._replace(query=urlencode(query)))


@contextmanager
def told(source: Source) -> Iterator[None]:
    """Turn what the driver raises into our own errors; it is an extra, so it is loaded where it is needed."""
    import asyncpg

    try:
        yield
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError):
        raise MissingError(
            f"source {source.id}: there is no relay_submit in the schema {source.schema}: "
            f"run the SQL that `relay ops submit-sql` prints there"
        ) from None
    except asyncpg.UndefinedColumnError as error:
        raise UnfitError(
            f"source {source.id}: the table of relay_submit is not the relay's ({error}): "
            "compare it with what `relay ops submit-sql` prints"
        ) from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise UnfitError(
            f"source {source.id}: {error}: GRANT SELECT, UPDATE, DELETE ON "
            f"{quoted(source.schema)}.relay_submissions to the user of its url"
        ) from None
    except TimeoutError:
        raise AwayError("it did not answer in time") from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        raise AwayError(str(error) or type(error).__name__) from None
