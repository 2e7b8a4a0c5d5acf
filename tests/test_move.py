"""`relay move`: an outbox leaves its SQLite file for PostgreSQL whole, whatever comes in between."""

import asyncio
import contextlib
import io
import json
import os
import random
import re
import secrets
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest

from relay.cli import main
from relay.model import Delivery, Secret
from relay.outbox import (
    KeptEndpoint,
    MovedError,
    Outbox,
    Query,
    holding,
    moving,
    open_outbox,
    schema,
)
from relay.outbox.postgres import arrival
from tests import moves
from tests.process import relay_process
from tests.receiver import Receiver
from tests.test_outbox import DELIVERED, NOW, attempt, submission

ENDPOINT = (
    '[[endpoints]]\nid = "main"\nurl = "{}"\nevents = ["*"]\nsecret = "whsec_c2VjcmV0LXNlY3JldC1zZWM="\n'
)
LIVE = ["main", "other", "paused"]


class Told(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


async def relay(*arguments: str, config: Path) -> Told:
    """Call a command as the command line does, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = await asyncio.to_thread(main, [*arguments, "--config", str(config.with_name("relay.toml"))])
    return Told(code, out.getvalue(), err.getvalue())


async def served(config: Path) -> Told:
    """Start a relay, which ends at once."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relay", "serve", "--config", str(config),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return Told(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of an outbox, with a config beside it that names it."""
    url = ENDPOINT.format("https://127.0.0.1:9/")
    (tmp_path / "relay.toml").write_text(f'[outbox]\npath = "{tmp_path / "relay.db"}"\n{url}')
    return tmp_path / "relay.db"


@pytest.fixture
async def filled(file: Path) -> Path:
    """An outbox with something of all that one can hold."""
    async with open_outbox(file) as outbox:
        await moves.fill(outbox)
    return file


async def picture(outbox: Outbox) -> dict[str, Any]:
    """Return what an outbox says of what it holds."""
    listed = (await outbox.events(Query(limit=1000))).stories
    return {
        "listed": listed,
        "stories": [await outbox.story(story.event.id) for story in listed],
        "endpoints": await outbox.endpoints(),
        "pasts": await outbox.pasts(),
        "last_seen": await outbox.last_seen(),
    }


async def deliver_all(outbox: Outbox) -> dict[str, list[Delivery]]:
    """Deliver what is pending; return it by endpoint, in the order and as it was handed out."""
    await outbox.register(LIVE)
    handed: dict[str, list[Delivery]] = {}
    later = NOW + moves.DAY_MS
    for endpoint in LIVE:
        handed[endpoint] = []
        while claimed := await outbox.claim(endpoint, 7, later):
            # Each store numbers what is new in its own way.
            handed[endpoint] += [replace(each, handle=(0, 0), epoch=0) for each in claimed]
            for each in claimed:
                await outbox.record(each, attempt(each, at_ms=later), DELIVERED)
    return handed


async def run(url: str, sql: str) -> Any:
    link = await asyncpg.connect(url)
    try:
        return await link.fetchval(sql)
    finally:
        await link.close()


def without_nul(value: Any) -> Any:
    """Write what PostgreSQL cannot hold as it is kept there."""
    return repr(value).replace("\\x00", "\ufffd")


async def test_what_is_moved_is_what_it_was(filled, postgres_url, tmp_path):
    """By the verbs of every outbox: no story, no endpoint, no order and no secret changes on the way."""
    copy = tmp_path / "copy.db"
    copy.write_bytes(filled.read_bytes())
    done = await relay("move", "--to", postgres_url, "--json", config=filled)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["whole"] is True
    assert told["sqlite"] == told["postgresql"]
    assert min(told["sqlite"].values()) > 0, "nothing of what an outbox can hold was left out"

    async with open_outbox(copy) as before, open_outbox(Secret(postgres_url)) as after:
        assert without_nul(await picture(after)) == without_nul(await picture(before))
        assert KeptEndpoint(id="paused", settings=moves.SECRET, paused=True) in await after.endpoints()
        await before.register(LIVE)
        await after.register(LIVE)
        assert await after.backlog() == await before.backlog()
        new = [submission("new", "main", key="idem-3", content="other than idem-3")]
        for outbox in (before, after):
            (receipt,) = await outbox.accept([submission("again", "main", key="idem-7")])
            assert (receipt.id, receipt.duplicate) == ("evt_n7", True)
            with pytest.raises(Exception, match=r"\(0,\)"):
                await outbox.accept(new)
            await outbox.accept([moves.ordered("x-new", "x"), submission("newest", "other")])
        handed = await deliver_all(after)
        assert handed == await deliver_all(before)
        assert "evt_x-new" in [each.event.id for each in handed["main"]]
        assert {each.pending for each in (await after.backlog()).values()} == {0}
        (newest, *_) = (await after.events(Query(limit=1))).stories
        assert newest.event.id == "evt_newest", "numbers go on after those that were moved"


def test_all_that_the_file_has_is_moved(tmp_path):
    """What a later schema adds to one store must not be forgotten on the way to the other."""
    db = sqlite3.connect(tmp_path / "relay.db", isolation_level=None)
    with contextlib.closing(db):
        schema.prepare(db, "relay.db")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        # Of the clock PostgreSQL has what its latest event and attempts say.
        assert tables - {"sqlite_sequence", "clock"} == set(arrival.COLUMNS)
        for table, columns in arrival.COLUMNS.items():
            names = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
            fared = set(arrival.FARED) if table == "endpoints" else set()
            assert names == set(columns) | fared, table


async def test_all_that_the_database_has_is_filled_or_of_relays_at_work(postgres_url):
    async with open_outbox(Secret(postgres_url)):
        pass
    columns = "FROM information_schema.columns WHERE table_schema = 'relay'"
    tables = await run(postgres_url, f"SELECT array_agg(DISTINCT table_name::text) {columns}")
    at_work = {"relays", "holders", "turns", "claims", "version"}
    assert set(tables) - at_work == {*arrival.COLUMNS, "tallies"}
    for table, expected in arrival.COLUMNS.items():
        of_table = f"SELECT array_agg(column_name::text) {columns} AND table_name = '{table}'"
        live = {"live"} if table == "endpoints" else set()  # when a relay delivers to it
        assert set(await run(postgres_url, of_table)) == set(expected) | live, table


def test_a_move_that_is_killed_anywhere_is_completed_by_the_next(postgres_url_alone):
    """At some calls of the database; `python -m tests.moves` does it at each."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.moves", postgres_url_alone, "6", str(secrets.randbelow(1 << 30))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "6 moves killed, 0 wrong\n"), (done.args, done.stderr)


@pytest.fixture
async def postgres_url_alone(postgres_url: str) -> str:
    return postgres_url


async def test_a_command_that_is_killed_at_any_time_is_completed_by_the_next(file, postgres_url):
    """By the clock, not by the call: what is under way in the server may end after us."""
    async with open_outbox(file) as outbox:
        await outbox.register(["main", "other"])
        for n in range(0, 6000, 1000):
            await outbox.accept([submission(f"{i}", "main", "other") for i in range(n, n + 1000)])
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-m", "relay", "move", "--to", postgres_url],
            cwd=file.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.2, 0.9))
            process.kill()
    done = await relay("move", "--to", postgres_url, config=file)
    assert done.returncode == 0, done.stderr
    assert await run(postgres_url, "SELECT count(DISTINCT id) FROM relay.events") == 6000
    assert await run(postgres_url, "SELECT sum(pending)::bigint FROM relay.tallies") == 12000


async def part(file: Path, url: str) -> None:
    """Move, and break off after the first batch."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c",
        "import sys; from pathlib import Path; from tests import moves;"
        "moves.moved_in_part(Path(sys.argv[1]), sys.argv[2])",
        str(file), url,
    )  # fmt: skip
    assert await process.wait() == 0
    assert 0 < await run(url, "SELECT count(*) FROM relay.events") < 50


async def test_no_relay_starts_on_a_part(filled, postgres_url, tmp_path):
    await part(filled, postgres_url)
    with pytest.raises(MovedError, match=r"holds only a part of .*relay\.db so far: run relay move again"):
        async with open_outbox(Secret(postgres_url)):
            pass
    (tmp_path / "target.toml").write_text(
        f'[outbox]\nurl = "{postgres_url}"\n{ENDPOINT.format("https://a.b/")}'
    )
    refused = await served(tmp_path / "target.toml")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (78, 1)
    assert "run relay move again" in refused.stderr


async def test_what_a_relay_did_after_a_move_broke_off_is_moved_too(filled, postgres_url, tmp_path):
    """A person whose move fails goes on with the file; what was moved of it is out of date then."""
    await part(filled, postgres_url)
    async with open_outbox(filled) as outbox:
        await outbox.register(LIVE)
        handed = await outbox.claim("other", 30, NOW + moves.DAY_MS)
        for each in handed:
            await outbox.record(each, attempt(each), DELIVERED)
        await outbox.accept([submission("since")])
    done = await relay("move", "--to", postgres_url, config=filled)
    assert done.returncode == 0, done.stderr
    async with open_outbox(Secret(postgres_url)) as outbox:
        assert (await outbox.story("evt_since")) is not None
        await outbox.register(LIVE)
        again = await outbox.claim("other", 1000, NOW + moves.DAY_MS)
        assert again
        assert not {each.event.id for each in again} & {each.event.id for each in handed}


async def test_a_relay_that_joins_while_a_move_begins_is_either_seen_or_refused(filled, postgres_url):
    """It looked at the database before the move did; nobody may work on what is not all there."""
    async with open_outbox(Secret(postgres_url)):
        pass
    await run(postgres_url, "TRUNCATE relay.relays, relay.endpoints, relay.events")
    mover = await asyncpg.connect(postgres_url)
    async with mover.transaction():
        await arrival.lock(mover)
        joining = asyncio.ensure_future(enter(postgres_url))  # noqa: TID251 - a relay beside us
        while not await mover.fetchval("SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted)"):
            await asyncio.sleep(0.01)
        await arrival.begin(mover, "token", "somewhere")
    await mover.close()
    with pytest.raises(BaseExceptionGroup) as told:
        await joining
    assert told.group_contains(MovedError, match="only a part")


async def enter(url: str) -> None:
    async with open_outbox(Secret(url)):
        pass


async def test_no_relay_starts_on_a_file_that_was_moved(filled, postgres_url, monkeypatch):
    """It would deliver all again; and it is told where its outbox is, without the password."""
    before = content_of(filled)
    url = with_password(postgres_url)
    monkeypatch.setenv("PGSECRET", "hunter2")
    reference = url.replace("hunter2", "${env:PGSECRET}")
    done = await relay("move", "--to", reference, config=filled)
    assert done.returncode == 0, done.stderr
    assert "set outbox.url in place of outbox.path" in done.stderr
    refused = await served(filled.with_name("relay.toml"))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (78, 1)
    assert "relay.db was moved to postgresql://" in refused.stderr
    assert "hunter2" not in done.stdout + done.stderr + refused.stderr + filled.read_bytes().decode("latin1")
    with contextlib.closing(sqlite3.connect(filled)) as db:
        assert db.execute("PRAGMA application_id").fetchone() != (schema.APPLICATION_ID,), "for older relays"
    assert content_of(filled) == before

    again = await relay("move", "--to", url.replace(":hunter2", ""), config=filled)
    assert (again.returncode, "nothing is left to move" in again.stderr) == (0, True)


def with_password(url: str) -> str:
    """Give the address a password; one that has its own keeps it, under the same name here."""
    return re.sub(r"//([^:@/]+)(:[^@/]*)?@", r"//\1:hunter2@", url)


def content_of(file: Path) -> list[list[tuple[Any, ...]]]:
    with contextlib.closing(sqlite3.connect(file)) as db:
        return [db.execute(f"SELECT * FROM {table}").fetchall() for table in arrival.COLUMNS]  # noqa: S608


async def test_a_move_can_be_taken_back(filled, postgres_url, tmp_path):
    done = await relay("move", "--undo", config=filled)
    assert (done.returncode, done.stderr) == (1, f"relay: {filled} was not moved\n")
    assert (await relay("move", "--to", postgres_url, config=filled)).returncode == 0
    await run(postgres_url, "DROP SCHEMA relay CASCADE")
    refused = await relay("move", "--to", postgres_url, config=filled)
    assert refused.returncode == 78
    assert "relay move --undo takes that back first" in refused.stderr
    done = await relay("move", "--undo", config=filled)
    assert (done.returncode, done.stdout) == (0, "")
    assert "is an outbox again: drop the schema relay of postgresql://" in done.stderr
    async with open_outbox(filled) as outbox:
        await outbox.register(LIVE)
        assert len(await outbox.claim("other", 100, NOW)) > 10
    assert (await relay("move", "--to", postgres_url, config=filled)).returncode == 0


# Who is refused


async def test_a_file_that_a_relay_holds_is_not_moved(filled, postgres_url, tmp_path):
    with holding.held(filled):
        refused = await relay("move", "--to", postgres_url, config=filled)
    assert refused.returncode == 75
    assert refused.stderr.endswith(f"is held by another relay (process {os.getpid()}): stop it first\n")
    assert await run(postgres_url, "SELECT to_regnamespace('relay') IS NULL")


async def test_a_database_that_holds_something_else_is_left_alone(filled, postgres_url, tmp_path):
    async with open_outbox(Secret(postgres_url)) as outbox:
        await outbox.register(["theirs"])
        refused = await relay("move", "--to", postgres_url, config=filled)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert "holds an outbox already: name an empty database" in refused.stderr
        assert [each.id for each in await outbox.endpoints()] == ["theirs"]
    await run(postgres_url, "UPDATE relay.version SET number = 99")
    await run(postgres_url, "TRUNCATE relay.relays, relay.endpoints")
    refused = await relay("move", "--to", postgres_url, config=filled)
    assert (refused.returncode, "has schema 99" in refused.stderr) == (78, True)
    async with open_outbox(filled) as outbox:
        assert len(await outbox.endpoints()) == 4, "and the file is an outbox as before"


async def test_a_part_of_another_outbox_is_left_alone(filled, postgres_url, tmp_path):
    await part(filled, postgres_url)
    async with open_outbox(tmp_path / "second.db"):
        pass
    with pytest.raises(MovedError, match="holds a part of another outbox: finish that move"):
        await moving.move(tmp_path / "second.db", Secret(postgres_url), lambda _: None)
    assert (await moving.move(filled, Secret(postgres_url), lambda _: None)).whole


async def test_a_file_of_a_newer_relay_or_no_outbox_is_not_moved(filled, postgres_url, tmp_path):
    with contextlib.closing(sqlite3.connect(filled)) as db:
        db.execute("PRAGMA user_version = 99")
    refused = await relay("move", "--to", postgres_url, config=filled)
    assert (refused.returncode, "start the newer relay" in refused.stderr) == (78, True)
    filled.unlink()
    refused = await relay("move", "--to", postgres_url, config=filled)
    assert (refused.returncode, refused.stderr) == (1, f"relay: {filled} is not there: check outbox.path\n")
    assert not filled.exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "say either --to URL or --undo"),
        (["--to", "postgresql://a/b", "--undo"], 2, "say either --to URL or --undo"),
        (["--to", "postgresql://me:hunter2@db/relay"], 2, "--to has a password in clear: write ${env:NAME}"),
        (["--to", "postgresql://db/relay?password=hunter2"], 2, "has a password in clear"),
        (["--to", "postgresql://me:${env:NOT_SET}@db/relay"], 2, "--to the variable NOT_SET is not set"),
        (["--to", "mysql://db/relay"], 2, "--to is not an address such as"),
        (["--to", "postgresql://me@127.0.0.1:9/relay"], 69, "cannot be reached or does not answer"),
    ],
)
async def test_a_wrong_call_is_told_in_one_sentence(filled, words, code, says):
    told = await relay("move", *words, config=filled)
    assert (told.returncode, told.stdout, len(told.stderr.splitlines())) == (code, "", 1), told.stderr
    assert says in told.stderr
    assert "hunter2" not in told.stderr


async def test_a_config_that_names_the_database_already_has_no_file_to_move(filled):
    config = filled.with_name("relay.toml")
    config.write_text('[outbox]\nurl = "postgresql://db/relay"\n')
    told = await relay("move", "--undo", config=filled)
    assert told.returncode == 78
    assert "call this with one that still has outbox.path" in told.stderr
    config.unlink()
    assert (await relay("move", "--undo", config=filled)).returncode == 78


async def test_without_the_extra_one_sentence_says_what_to_install(filled, monkeypatch):
    for name in [each for each in sys.modules if each.startswith(("asyncpg", "relay.outbox.postgres"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    told = await relay("move", "--to", "postgresql://db/relay", config=filled)
    needs = "relay: relay move needs the extra: pip install relay[postgres]\n"
    assert (told.returncode, told.stderr) == (1, needs)


async def test_a_move_that_is_not_whole_is_told_and_marks_nothing(filled, postgres_url, tmp_path):
    """As when somebody deletes rows meanwhile: better found before the file is given up."""
    await part(filled, postgres_url)
    await run(postgres_url, "DELETE FROM relay.deliveries WHERE state = 1")
    done = await relay("move", "--to", postgres_url, config=filled)
    assert done.returncode == 1
    assert "nothing is marked as moved" in done.stderr
    with pytest.raises(MovedError):
        async with open_outbox(Secret(postgres_url)):
            pass
    async with open_outbox(filled):
        pass


# From end to end


async def test_a_relay_delivers_from_the_database_what_it_had_taken_into_the_file(tmp_path, postgres_url):
    authority = tmp_path / "authority.pem"
    async with Receiver() as receiver:
        authority.write_bytes(receiver.authority.cert_pem.bytes())
        settings = 'order = "key"\nretry_schedule = ["2s", "2s", "2s"]\ndown_after = 0\n'
        config, trusted = ENDPOINT.format(receiver.url) + settings, {"SSL_CERT_FILE": str(authority)}
        receiver.answers(503)
        with relay_process(tmp_path, config, trusted) as process:
            posted = [await post(process, n) for n in range(6)]
            await receiver.wait_for(1)
            assert process.stop() == 0
            done = await relay("move", "--to", postgres_url, config=process.config)
            assert done.returncode == 0, done.stderr
            process.outbox = f'url = "{postgres_url}"'
            process.configure(config)
            process.start()
            assert (await post(process, 3)) == posted[3], "the key is known, so it is no new event"
            last = await post(process, 6)
            requests = await receiver.wait_for(8, within=20)
            assert process.stop() == 0
        ids = [each.headers["webhook-id"] for each in requests]
        assert ids[0] == ids[1] == posted[0]
        assert ids[1:] == [*posted, last]


async def post(process: Any, number: int) -> str:
    event = {"event": "post.published", "data": {"n": number}, "key": "k"}
    header = {"Idempotency-Key": f"key-{number}"}
    status, told = await asyncio.to_thread(process.call, "POST", "/v1/events", event, header)
    assert status in {200, 202}
    return str(told["id"])
