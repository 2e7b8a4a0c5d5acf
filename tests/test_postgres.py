"""What only the PostgreSQL outbox does: its schema, its address, what the database says."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from relay.config import ConfigError, load
from relay.model import Secret
from relay.outbox import DamagedError, ElsewhereError, NewerSchemaError, OutboxError, open_outbox
from relay.outbox.place import shown
from tests.process import RelayProcess, relay_process
from tests.receiver import Receiver
from tests.test_outbox import DEAD, NOW, attempt, names, submission

ENDPOINT = (
    '[[endpoints]]\nid = "main"\nurl = "{}"\nevents = ["*"]\nsecret = "whsec_c2VjcmV0LXNlY3JldC1zZWM="\n'
)


async def run(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def test_relays_that_start_at_once_on_an_empty_database_make_one_schema(postgres_url):
    ready = asyncio.Barrier(4)

    async def one(name: str) -> list[str]:
        async with open_outbox(Secret(postgres_url)) as outbox:
            await outbox.register(["main"])
            await outbox.accept([submission(name)])
            await ready.wait()
            story = await outbox.story(f"evt_{name}")
            await ready.wait()
            return [each.state for each in story.deliveries]

    async with asyncio.TaskGroup() as tasks:
        ran = [tasks.create_task(one(name)) for name in "abcd"]
    assert [each.result() for each in ran] == [["pending"]] * 4


async def test_a_newer_schema_is_refused_untouched(postgres_url):
    async with open_outbox(Secret(postgres_url)):
        pass
    await run(postgres_url, "UPDATE relay.version SET number = 99")
    with pytest.raises(NewerSchemaError, match=r"has schema 99, this relay knows \d+: start the newer relay"):
        async with open_outbox(Secret(postgres_url)):
            pass


async def test_a_schema_of_this_name_that_is_no_outbox_is_refused_untouched(postgres_url):
    await run(postgres_url, "CREATE SCHEMA relay; CREATE TABLE relay.mine (id int)")
    with pytest.raises(DamagedError, match="no outbox: choose another database"):
        async with open_outbox(Secret(postgres_url)):
            pass


async def test_a_backup_is_the_databases_business(postgres_url):
    async with open_outbox(Secret(postgres_url)) as outbox:
        with pytest.raises(ElsewhereError, match="pg_dump"):
            async with outbox.backup():
                pass


async def test_what_text_cannot_hold_is_kept_all_the_same(postgres_url):
    """A receiver may answer with any bytes; PostgreSQL has no NUL in a text."""
    async with open_outbox(Secret(postgres_url)) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
        (a,) = await outbox.claim("main", 1, NOW)
        await outbox.record(a, replace(attempt(a, "http_500"), answer="a\x00b"), DEAD)
        (delivery,) = (await outbox.story("evt_a")).deliveries
        assert delivery.attempts[0].answer == "a\ufffdb"


async def test_without_prepared_statements_it_does_the_same(postgres_url):
    """A pooler may give every transaction another connection, which has prepared nothing."""
    url = postgres_url + ("&" if "?" in postgres_url else "?") + "statement_cache_size=0"
    async with open_outbox(Secret(url)) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a")])
        assert names(await outbox.claim("main", 1, NOW)) == ["a"]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (
            "postgresql://me:secret@db.internal:5432/relay?sslmode=require",
            "postgresql://me@db.internal:5432/relay",
        ),
        ("postgres://db/relay?password=secret", "postgresql://db/relay"),
        ("postgresql://me:secret@a:1,b:2/relay", "postgresql://me@a:1,b:2/relay"),
        ("postgresql:///relay?host=/run/postgresql", "postgresql:///relay"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url, text):
    assert shown(Secret(url)) == text


@pytest.mark.parametrize(
    ("outbox", "problem"),
    [
        (
            'url = "mysql://me:secret@db/relay"',
            'is not an address such as "postgresql://relay@db.internal/relay"',
        ),
        ('url = "postgresql://me:secret@[db/relay"', "is not an address"),
        ('url = "postgresql://db/relay?statement_cache_size=none"', "statement_cache_size, which is a whole"),
        ('url = "postgresql://db/relay"\npath = "relay.db"', "outbox.path: stands beside url"),
        ('url = "postgresql://db/relay"\ndurability = "full"', "outbox.durability: stands beside url"),
        ('heartbeat = "5s"\ndead_after = "9s"', "outbox.dead_after: dead_after must be twice"),
    ],
)
def test_a_wrong_address_is_told_without_its_secrets(tmp_path, outbox, problem):
    path = tmp_path / "relay.toml"
    path.write_text(f"[outbox]\n{outbox}\n{ENDPOINT.format('https://example.com/')}")
    with pytest.raises(ConfigError) as told:
        load(path, {})
    assert problem in str(told.value)
    assert "secret@" not in str(told.value)


def test_a_secret_of_the_address_comes_from_the_environment_and_is_masked(tmp_path):
    path = tmp_path / "relay.toml"
    url = "postgresql://relay:${env:DATABASE_PASSWORD}@db/relay"
    path.write_text(f'[outbox]\nurl = "{url}"\n{ENDPOINT.format("https://example.com/")}')
    config = load(path, {"DATABASE_PASSWORD": "hunter2"})
    assert config.outbox.place.reveal() == "postgresql://relay:hunter2@db/relay"
    assert "hunter2" not in repr(config)


def test_without_the_extra_one_sentence_says_what_to_install():
    code = (
        "import asyncio, sys\n"
        "sys.modules['asyncpg'] = None\n"
        "from relay.model import Secret\n"
        "from relay.outbox import OutboxError, open_outbox\n"
        "async def main():\n"
        "    async with open_outbox(Secret('postgresql://db/relay')): pass\n"
        "try: asyncio.run(main())\n"
        "except OutboxError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "outbox.url needs the extra: pip install relay[postgres]\n"


async def test_a_database_that_is_not_there_is_named_at_the_start(tmp_path):
    with pytest.raises(OutboxError, match="postgresql://me@/relay cannot be reached or does not answer"):
        async with open_outbox(Secret(f"postgresql://me:secret@/relay?host={tmp_path}")):
            pass


async def test_a_relay_on_postgresql_delivers_across_restarts(tmp_path: Path, postgres_url):
    authority = tmp_path / "authority.pem"
    async with Receiver() as receiver:
        authority.write_bytes(receiver.authority.cert_pem.bytes())
        config, trusted = ENDPOINT.format(receiver.url), {"SSL_CERT_FILE": str(authority)}
        with relay_process(tmp_path, config, trusted, outbox=f'url = "{postgres_url}"') as relay:
            await post(relay, 1)
            await receiver.wait_for(1)
            relay.kill()
            relay.start()
            await post(relay, 2)
            await receiver.wait_for(2)
            assert relay.stop() == 0
            assert "postgresql://" in relay.log


async def post(relay: RelayProcess, number: int) -> None:
    event = {"event": "post.published", "data": {"n": number}}
    assert (await asyncio.to_thread(relay.call, "POST", "/v1/events", event))[0] == 202
