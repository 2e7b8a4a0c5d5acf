"""relay_submit: what an application commits with its own data arrives, and what it rolls back never was.

The fault that every outbox exists for is that the row was committed and the event was not. These tests call
the function as applications do, over several drivers, against a relay in a process of its own.
"""

import asyncio
import json
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psycopg
import pytest
from psycopg.types.json import Json

from relay.sources.script import VERSION, script
from tests import postgres
from tests.figures import figure
from tests.process import RelayProcess, relay_process
from tests.receiver import Answer, Receiver
from tests.submit import run
from tests.test_docs import block

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
Begun = Callable[..., AbstractContextManager[RelayProcess]]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as each:
        yield each


@pytest.fixture
async def app(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The application's own connection, with relay_submit there."""
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(script("public"))
    await connection.execute("CREATE TABLE posts (id bigserial PRIMARY KEY, title text)")
    yield connection
    await connection.close()


@pytest.fixture
def made(tmp_path: Path, receiver: Receiver, postgres_url: str) -> Begun:
    """Makes a relay that reads this database, not yet started."""
    authority = tmp_path / "authority.pem"
    authority.write_bytes(receiver.authority.cert_pem.bytes())

    def make(more: str = "", source: str | None = None) -> AbstractContextManager[RelayProcess]:
        read = source if source is not None else sources(postgres_url)
        endpoint = (
            f'[[endpoints]]\nid = "main"\nurl = "{receiver.url}"\nevents = ["*"]\nsecret = "{SECRET}"\n'
        )
        config = f"{endpoint}{more}\n{read}"
        return relay_process(tmp_path, config, {"SSL_CERT_FILE": str(authority)}, start=False)

    return make


def sources(url: str, id_: str = "shop") -> str:
    return f'[[sources]]\nid = "{id_}"\nurl = "{url}"\n'


async def left(connection: asyncpg.Connection, count: int, within: float = 10.0) -> None:
    """Return as soon as so many rows are there: a delivery may come before the deletion."""
    async with asyncio.timeout(within):
        while await connection.fetchval("SELECT count(*) FROM relay_submissions") != count:
            await asyncio.sleep(0.02)


async def until(condition: Callable[[], object], what: str, within: float = 10.0) -> None:
    async with asyncio.timeout(within):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)
    assert what


def metric(relay: RelayProcess, name: str) -> float:
    text = str(relay.call("GET", "/metrics")[1])
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def lines(relay: RelayProcess, event: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, relay.log.splitlines()) if line["event"] == event]


async def test_a_commit_is_an_accepted_event_and_a_rollback_is_nothing(app, made, receiver):
    """The id that the function returned is the event's: the application can keep it with its own row."""
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with made() as relay:
        await asyncio.to_thread(relay.start)
        with pytest.raises(ZeroDivisionError):
            async with app.transaction():
                await app.execute("INSERT INTO posts (title) VALUES ('lost')")
                await app.fetchval("SELECT relay_submit('post.published', '{\"lost\": true}')")
                raise ZeroDivisionError
        async with app.transaction():
            post = await app.fetchval("INSERT INTO posts (title) VALUES ('kept') RETURNING id")
            id_ = await app.fetchval(
                """SELECT relay_submit('post.published', $1, "timestamp" => '2026-01-15 10:00:00+02',
                       key => 'post', traceparent => $2)""",
                json.dumps({"post": post, "z": 1.0, "a": "\u00fc"}),
                traceparent,
            )
            before = await asyncio.to_thread(relay.call, "GET", f"/v1/events/{id_}")
        (request,) = await receiver.wait_for(1)
        story = await asyncio.to_thread(relay.call, "GET", f"/v1/events/{id_}")
        await left(app, 0)
    assert before[0] == 404
    assert request.headers["webhook-id"] == id_
    assert request.headers["traceparent"].split("-")[1] == traceparent.split("-")[1]
    assert request.body.decode() == (
        '{"event":"post.published","timestamp":"2026-01-15T08:00:00.000Z","data":{"post":2,"z":1,"a":"\u00fc"}}'
    )
    assert story[0] == 200
    assert len(receiver.requests) == 1


async def test_the_readmes_examples_work_as_written(app, made, receiver, postgres_url):
    """To the letter, in SQL and in Python."""
    await app.execute("DROP TABLE posts; CREATE TABLE posts (id text PRIMARY KEY, state text)")
    await app.execute("INSERT INTO posts VALUES ('post_abc123', 'draft'), ('post_2', 'draft')")
    (sql,) = block("submitting in a transaction", "sql")
    (python,) = block("submitting in a transaction", "python")
    names: dict[str, Any] = {"json": json, "psycopg": psycopg, "Json": Json}
    exec(  # noqa: S102 - it is ours
        f"async def example(connection, url, post_id, account_id):\n{textwrap.indent(python, '    ')}", names
    )
    with made() as relay:
        await asyncio.to_thread(relay.start)
        await app.execute(sql)
        await names["example"](app, postgres_url, "post_2", "acc_7f3k2m")
        requests = await receiver.wait_for(3)
    assert [json.loads(each.body)["data"]["postId"] for each in requests].count("post_2") == 2
    assert await app.fetchval("SELECT count(*) FROM posts WHERE state = 'published'") == 2


async def test_psycopg_submits_too_and_several_events_of_one_transaction_keep_their_order(
    app, made, receiver, postgres_url
):
    def submit() -> list[str]:
        with psycopg.connect(postgres_url) as connection:  # commits at the end
            return [
                connection.execute(
                    "SELECT relay_submit(%s, %s, key => %s)", ("a", Json({"n": number}), "one")
                ).fetchone()[0]
                for number in range(20)
            ]

    with made('order = "key"') as relay:
        await asyncio.to_thread(relay.start)
        ids = await asyncio.to_thread(submit)
        requests = await receiver.wait_for(20)
    assert [request.headers["webhook-id"] for request in requests] == ids


REFUSED = {
    "relay_submit('no name', '{}')": "#/event: must be 1 to 128",
    "relay_submit('relay.x', '{}')": "#/event: relay.* is the relay's own",
    "relay_submit('unheard', '{}')": "#/event: ",
    "relay_submit('a', '{}', \"to\" => ARRAY['nobody'])": "#/to/0: there is no endpoint 'nobody'",
    "relay_submit('a', '{}', \"to\" => ARRAY[NULL]::text[])": "#/to: must be a list",
    "relay_submit('a', '1e400')": "#/data: not JSON",
    "relay_submit('a', '\"\\ud800\"')": "#/data: not JSON",
    "relay_submit('a', '{\"n\": 123456789012345678901234567890}')": "#/data/n: an integer must be",
    "relay_submit('a', to_json(repeat('x', 2000)))": "#: is 2003 bytes: one event may have 1024",
    "relay_submit('a', '{}', key => E'\\n')": "#/key: must be 1 to 255 printable",
    "relay_submit('a', '{}', idempotency_key => 'a b')": "#/idempotency_key: must be",
    "relay_submit('a', '{\"other\": 1}', idempotency_key => 'mine')": "#/idempotency_key: was used before",
    "relay_submit('a', '{}', \"timestamp\" => 'infinity')": "#/timestamp: must be",
    "relay_submit('a', '{}', \"timestamp\" => '4000-01-01 BC')": "#/timestamp: must be",
}


async def test_what_cannot_be_accepted_stays_with_its_reason_and_holds_up_nothing(app, made, receiver):
    """Somebody has to see it, mend it or drop it; meanwhile everybody else's events go out."""
    with made("[events.a]\n[events.b]\n") as relay:
        relay.config.write_text(
            relay.config.read_text().replace("[server]", '[server]\nmax_event_size = "1KiB"')
        )
        await asyncio.to_thread(relay.start)
        async with app.transaction():
            first = await app.fetchval("SELECT relay_submit('a', '{}', idempotency_key => 'mine')")
            for call in REFUSED:
                await app.execute(f"SELECT {call}")
            last = await app.fetchval("SELECT relay_submit('b', '{}', traceparent => 'broken')")
        await receiver.wait_for(2)
        await until(lambda: lines(relay, "submissions_refused"), "it is told")
        assert {request.headers["webhook-id"] for request in receiver.requests} == {first, last}
        rows = await app.fetch("SELECT id, refusal, refused_at FROM relay_submissions ORDER BY seq")
        for row, (call, reason) in zip(rows, REFUSED.items(), strict=True):
            assert row["refusal"].startswith(reason), call
            assert row["refused_at"] is not None
        (line,) = lines(relay, "submissions_refused")
        assert line["submissions"] == len(REFUSED)
        assert (line["source"], line["event_id"]) == ("shop", rows[0]["id"])
        assert await asyncio.to_thread(metric, relay, "relay_source_refused") == len(REFUSED)
        status = (await asyncio.to_thread(relay.call, "GET", "/v1/status"))[1]
        assert status["sources"] == [{"id": "shop", "error": None, "since": None, "refused": len(REFUSED)}]
        assert f"{len(REFUSED)} refused in shop" in status["sentence"]

        # As the README says: mended and submitted again, or dropped.
        await app.execute(
            "UPDATE relay_submissions SET event = 'a', refusal = NULL WHERE id = $1", rows[0]["id"]
        )
        await app.execute("DELETE FROM relay_submissions WHERE id = $1", rows[1]["id"])
        requests = await receiver.wait_for(3)
        assert requests[2].headers["webhook-id"] == rows[0]["id"]
        await left(app, len(REFUSED) - 2)


async def test_an_idempotency_key_is_one_for_the_api_and_for_transactions(app, made, receiver):
    with made() as relay:
        await asyncio.to_thread(relay.start)
        body = {"event": "a", "data": {"n": 1}}
        status, answer = await asyncio.to_thread(
            relay.call, "POST", "/v1/events", body, {"Idempotency-Key": "order-7"}
        )
        assert status == 202
        await app.execute("SELECT relay_submit('a', '{\"n\": 1}', idempotency_key => 'order-7')")
        await app.execute("SELECT relay_submit('a', '{\"n\": 2}')")
        requests = await receiver.wait_for(2)
        await left(app, 0)
        assert await asyncio.to_thread(metric, relay, "relay_events_duplicate_total") == 1
    assert requests[0].headers["webhook-id"] == answer["id"]


async def test_a_kill_between_keeping_and_deleting_makes_no_second_event(app, made, receiver):
    """The worst moment: the event is on disk, even delivered, and the row is still there."""
    await app.execute("""
        CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN PERFORM pg_advisory_xact_lock(7); RETURN OLD; END';
        CREATE TRIGGER hold BEFORE DELETE ON relay_submissions FOR EACH ROW EXECUTE FUNCTION hold();
        SELECT pg_advisory_lock(7)""")
    with made() as relay:
        await asyncio.to_thread(relay.start)
        plain = await app.fetchval("SELECT relay_submit('a', '{\"n\": 1}')")
        keyed = await app.fetchval("SELECT relay_submit('a', '{\"n\": 2}', idempotency_key => 'mine')")
        await receiver.wait_for(1)
        await asyncio.to_thread(relay.kill)
        await app.execute("SELECT pg_advisory_unlock(7)")
        await asyncio.to_thread(relay.start)
        await left(app, 0)
        await until(lambda: metric(relay, "relay_source_submissions_total{") >= 2, "both are counted")
        repeats = await asyncio.to_thread(metric, relay, 'relay_source_submissions_total{result="duplicates"')
        listed = await asyncio.to_thread(relay.call, "GET", "/v1/events")
        await receiver.wait_for(2)
    assert repeats >= 1
    assert {each["id"] for each in listed[1]["data"]} == {plain, keyed}


async def test_a_full_outbox_leaves_rows_where_they_are(app, made, receiver):
    """Nothing is refused for want of room: it waits in the application's database until there is some."""
    receiver.answers(*[Answer(503)] * 2)
    with made('retry_schedule = ["200ms", "1s", "1s"]') as relay:
        text = relay.config.read_text().replace("[egress]", "max_pending = 2\n[egress]")
        relay.config.write_text(text)
        await asyncio.to_thread(relay.start)
        async with app.transaction():
            for number in range(2):
                await app.execute("SELECT relay_submit('a', $1)", str(number))
        await receiver.wait_for(2)
        await app.execute("SELECT relay_submit('a', '2')")
        await until(lambda: lines(relay, "source_failing"), "it is told")
        assert "max_pending" in str(lines(relay, "source_failing")[0]["error"])
        requests = await receiver.wait_for(5)
        await until(lambda: lines(relay, "source_recovered"), "the end is told, too")
        await left(app, 0)
        assert (await asyncio.to_thread(relay.call, "GET", "/readyz"))[0] == 200
        assert len(lines(relay, "source_failing")) == 1
    assert sorted(json.loads(each.body)["data"] for each in requests) == [0, 0, 1, 1, 2]


async def test_a_relay_refuses_to_start_on_a_database_that_cannot_be_read(postgres_url, made, tmp_path):
    """One sentence, and what to do: not a relay that looks well and takes nothing."""
    connection = await asyncpg.connect(postgres_url)
    user = f"reader_{urlsplit(postgres_url).path[-12:]}"

    async def refusal(url: str = postgres_url) -> str:
        (tmp_path / "relay.log").unlink(missing_ok=True)
        with made(source=sources(url)) as relay:
            with pytest.raises(AssertionError, match="the relay ended"):
                await asyncio.to_thread(relay.start)
            assert relay.process.wait(10) == 78
            return str(lines(relay, "failed")[0]["error"])

    assert "run the SQL that `relay ops submit-sql` prints" in await refusal()
    await connection.execute(script("public"))
    await connection.execute(f"CREATE ROLE {user} LOGIN")
    try:
        parts = urlsplit(postgres_url)
        host = parts.netloc.rpartition("@")[2]
        other = urlunsplit(parts._replace(netloc=f"{user}@{host}"))
        assert "GRANT SELECT, UPDATE, DELETE ON public.relay_submissions" in await refusal(other)
    finally:
        await connection.execute(f"DROP ROLE {user}")
    await connection.execute(script("public").replace(f"SELECT {VERSION} ", f"SELECT {VERSION + 1} "))
    assert f"has version {VERSION + 1} there, this relay knows {VERSION}" in await refusal()
    await connection.close()


async def test_the_application_needs_no_more_than_to_execute(app, postgres_url):
    """Its role can submit, and neither read nor forge what others submitted."""
    user = f"app_{urlsplit(postgres_url).path[-12:]}"
    await app.execute(f"CREATE ROLE {user}")
    try:
        await app.execute(f"SET ROLE {user}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.fetchval("SELECT relay_submit('a', '{}')")
        await app.execute(f"RESET ROLE; GRANT EXECUTE ON FUNCTION relay_submit TO {user}; SET ROLE {user}")
        assert (await app.fetchval("SELECT relay_submit('a', '{}')")).startswith("evt_")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.fetch("SELECT * FROM relay_submissions")
        # A table of the same name in a schema of theirs catches nothing: the function's search_path is fixed.
        await app.execute("CREATE TEMP TABLE relay_submissions (id text)")
        await app.fetchval("SELECT relay_submit('a', '{}')")
    finally:
        await app.execute("RESET ROLE")
        await app.execute(f"DROP OWNED BY {user}; DROP ROLE {user}")
    assert await app.fetchval("SELECT count(*) FROM public.relay_submissions") == 2


async def test_the_commands_tell_of_sources(app, made, receiver, postgres_url, tmp_path):
    """What an operator sees first: the status, and a check before the start."""

    async def relay_says(*words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "relay", *words]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=20, env=running.environment
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    with made() as running:
        await asyncio.to_thread(running.start)
        await app.execute("SELECT relay_submit('no name', '{}')")
        await until(lambda: metric(running, "relay_source_refused"), "it is counted")
        assert "\nsource shop: is read, 1 refused\n" in await relay_says("status", "--url", running.url)
        config = ("check", "--connect", "--config", str(running.config))
        assert "\nsource shop  yes " in await relay_says(*config)
        assert ": ok, 1 endpoint, 1 source\n" in await relay_says(*config)
        await app.execute("DROP FUNCTION relay_submit_version()")
        told = json.loads(await relay_says(*config, "--json", code=1))
        assert told["sources"] == 1
        assert [each["ok"] for each in told["connections"]] == [True, False]
        assert "relay ops submit-sql" in told["connections"][1]["error"]
    assert await relay_says("ops", "submit-sql") == script("public")
    assert await relay_says("ops", "submit-sql", "--schema", "a b", "--portable") == script(
        "a b", portable=True
    )


async def test_sources_come_and_go_with_a_reload(app, made, receiver, postgres_server, postgres_url):
    other_url = await postgres.new_database(postgres_server, f"{urlsplit(postgres_url).path[1:]}_b")
    other = await asyncpg.connect(other_url)
    try:
        with made(source="") as relay:
            await asyncio.to_thread(relay.start)
            first = await app.fetchval("SELECT relay_submit('a', '1')")
            before = relay.config.read_text()
            relay.config.write_text(before + sources(postgres_url))
            assert (await asyncio.to_thread(relay.call, "POST", "/v1/reload"))[0] == 200
            await receiver.wait_for(1)

            relay.config.write_text(before + sources(other_url))
            status, answer = await asyncio.to_thread(relay.call, "POST", "/v1/reload")
            assert status == 422
            assert "there is no relay_submit in the schema public" in str(answer)
            second = await app.fetchval("SELECT relay_submit('a', '2')")
            await receiver.wait_for(2)  # the one before goes on

            await other.execute(script("public"))
            assert (await asyncio.to_thread(relay.call, "POST", "/v1/reload"))[0] == 200
            third = await other.fetchval("SELECT relay_submit('a', '3')")
            requests = await receiver.wait_for(3)
            await app.execute("SELECT relay_submit('a', '4')")
            assert await asyncio.to_thread(relay.stop) == 0
        assert [each.headers["webhook-id"] for each in requests] == [first, second, third]
        assert await app.fetchval("SELECT count(*) FROM relay_submissions") == 1
    finally:
        await other.close()
        await postgres.drop_database(other_url)


@pytest.fixture
def restartable() -> Iterator[postgres.Postgres]:
    try:
        with postgres.running() as server:
            yield server
    except LookupError as error:
        pytest.skip(str(error))


async def test_a_source_that_is_away_is_waited_for_and_told_once(restartable, made, receiver):
    """The application's database restarts: the relay stays ready, all else goes on, and nothing is lost."""
    connection = await asyncpg.connect(restartable.url)
    await connection.execute(script("public"))
    await connection.close()
    restartable.stop()
    with made(source=sources(restartable.url)) as relay:
        await asyncio.to_thread(relay.start)
        await until(lambda: lines(relay, "source_failing"), "it is told")
        assert (await asyncio.to_thread(relay.call, "GET", "/readyz"))[0] == 200
        assert await asyncio.to_thread(metric, relay, "relay_source_up") == 0
        status = (await asyncio.to_thread(relay.call, "GET", "/v1/status"))[1]
        assert status["sources"][0]["error"]
        assert "nothing comes from shop since" in status["sentence"]
        ids = []
        for _ in range(2):
            await asyncio.to_thread(restartable.start)
            connection = await asyncpg.connect(restartable.url)
            ids.append(await connection.fetchval("SELECT relay_submit('a', '{}')"))
            await connection.close()
            await receiver.wait_for(len(ids), within=20)
            await asyncio.to_thread(restartable.stop)
        assert len(lines(relay, "source_failing")) in (2, 3)  # of the third outage perhaps not yet
        assert len(lines(relay, "source_recovered")) == 2
    assert [each.headers["webhook-id"] for each in receiver.requests] == ids


async def test_exactly_the_committed_half_arrives_while_the_relay_is_killed(postgres_url, tmp_path):
    """The short form of `python -m tests.submit`."""
    found = await run(postgres_url, tmp_path, transactions=600, relays=1, seconds=3.0, seed=5)
    figure("transactions / committed / kills / met again", found.told().partition(";")[0])
    assert found.wrong() == []
    assert found.kills > 0
    assert 0 < found.committed < found.transactions


async def test_several_relays_on_one_outbox_take_what_is_submitted_there(postgres_url, tmp_path):
    """The outbox's own database is a source by itself; order per key holds across relays and kills."""
    found = await run(postgres_url, tmp_path, transactions=400, relays=2, seconds=2.0, seed=6, shared=True)
    assert found.wrong() == []
    assert 0 < found.committed < found.transactions
