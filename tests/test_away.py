"""The database away, hanging, or a standby: nothing is lost or ended, and the relay goes on by itself."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from relay.model import Secret, State
from relay.outbox import AwayError, Outbox, open_outbox
from relay.outbox.postgres import links
from relay.outbox.sharing import Sharing
from tests import postgres
from tests.process import RelayProcess, relay_process
from tests.receiver import Receiver
from tests.test_outbox import DELIVERED, NOW, attempt, names, submission
from tests.test_postgres import ENDPOINT

QUICK = Sharing(beat_seconds=0.1, dead_seconds=60.0, look_seconds=0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Postgres]:
    """A server of our own: it is stopped."""
    try:
        with postgres.running() as running:
            yield running
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture
async def url(server: postgres.Postgres, tmp_path: Path) -> AsyncIterator[str]:
    address = await postgres.new_database(server.url, f"away_{tmp_path.name}"[:60])
    yield address
    await postgres.drop_database(address)


@pytest.fixture
async def outbox(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Outbox]:
    monkeypatch.setattr(links, "LIMIT_SECONDS", 0.5)
    monkeypatch.setattr(links, "CONNECT_SECONDS", 0.5)
    async with open_outbox(Secret(url), sharing=QUICK) as opened:
        await opened.register(["main"])
        yield opened


async def eventually(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.02)


async def goes_on(outbox: Outbox) -> None:
    """Take events again, by itself."""
    await eventually(lambda: outbox.trouble() is None)
    async with asyncio.timeout(20):
        while True:
            try:
                (receipt,) = await outbox.accept([submission("later", key="later")])
            except AwayError:
                await asyncio.sleep(0.05)
            else:
                assert receipt.id == "evt_later"
                return


@pytest.mark.parametrize("how", ["frozen", "crashed"])
async def test_outcomes_wait_until_the_database_is_back_and_submissions_are_refused(outbox, server, how):
    await outbox.accept([submission("a"), submission("b")])
    (a, b) = await outbox.claim("main", 2, NOW)

    async with asyncio.TaskGroup() as tasks:
        server.signal(signal.SIGSTOP) if how == "frozen" else server.stop("immediate")
        try:
            recorded = tasks.create_task(outbox.record(a, attempt(a), DELIVERED))
            with pytest.raises(AwayError, match="cannot be reached or does not answer"):
                await outbox.accept([submission("c")])
            assert "cannot be reached" in (outbox.trouble() or "")
            assert await outbox.claim("main", 9, NOW) == []
            assert await outbox.probe("main") is None
            async with asyncio.timeout(10):
                await outbox.release([b])
            assert not recorded.done()
        finally:
            server.signal(signal.SIGCONT) if how == "frozen" else server.start()

    await goes_on(outbox)
    (told,) = (await outbox.story("evt_a")).deliveries
    assert told.state is State.DELIVERED
    async with asyncio.timeout(20):
        found: list[str] = []
        while "b" not in found:
            found += names(await outbox.claim("main", 9, NOW))
            await asyncio.sleep(0.02)


async def test_a_claim_whose_answer_was_lost_is_free_again(outbox, server):
    """Whoever claimed does not know of it, and lives: nobody would ever come for it."""
    await outbox.accept([submission("a")])
    server.signal(signal.SIGSTOP)
    try:
        assert await outbox.claim("main", 9, NOW) == []
    finally:
        server.signal(signal.SIGCONT)  # and now the server makes the claim
    async with asyncio.timeout(20):
        while not (found := await outbox.claim("main", 9, NOW + 60_000)):
            outbox._waiting["main"].rewind(0)
            await asyncio.sleep(0.02)
    assert names(found) == ["a"]


async def test_a_standby_is_as_good_as_none(outbox, url):
    """After a failover the old address may answer, but keep nothing."""
    connection = await asyncpg.connect(url)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    for _ in range(3):
        with pytest.raises(AwayError):
            await outbox.accept([submission("a")])
    await connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await connection.close()
    await goes_on(outbox)


async def test_the_end_does_not_wait_for_a_database_that_is_away(url, server, monkeypatch):
    monkeypatch.setattr(links, "LIMIT_SECONDS", 0.5)
    monkeypatch.setattr(links, "CONNECT_SECONDS", 0.5)
    async with asyncio.timeout(10):
        async with open_outbox(Secret(url), sharing=QUICK) as outbox:
            await outbox.register(["main"])
            await outbox.accept([submission("a")])
            await outbox.claim("main", 1, NOW)
            server.stop("immediate")
    server.start()
    async with open_outbox(Secret(url), sharing=Sharing(dead_seconds=0.0)) as outbox:
        await outbox.register(["main"])
        assert names(await outbox.claim("main", 1, NOW)) == ["a"]


async def test_a_relay_says_that_its_database_is_away_and_takes_events_again_when_it_is_back(
    tmp_path, url, server
):
    authority = tmp_path / "authority.pem"
    async with Receiver() as receiver:
        authority.write_bytes(receiver.authority.cert_pem.bytes())
        config, trusted = ENDPOINT.format(receiver.url), {"SSL_CERT_FILE": str(authority)}
        outbox = f'url = "{url}"\nheartbeat = "100ms"'
        with relay_process(tmp_path, config, trusted, outbox=outbox) as relay:
            server.stop("immediate")
            status, problem = await submitted(relay)
            assert status == 503
            assert "cannot be reached or does not answer" in problem["detail"]
            assert (await asyncio.to_thread(relay.call, "GET", "/readyz"))[0] == 503
            assert (await asyncio.to_thread(relay.call, "GET", "/livez"))[0] == 200
            assert (await asyncio.to_thread(relay.call, "GET", "/metrics"))[0] in {200, 503}
            server.start()
            async with asyncio.timeout(20):
                while (await submitted(relay))[0] != 202:
                    await asyncio.sleep(0.05)
            await receiver.wait_for(1, within=20)
            assert await asyncio.to_thread(relay.stop) == 0
            assert relay.log.count("outbox_away") == 1, "once a minute"


async def submitted(relay: RelayProcess) -> tuple[int, object]:
    event = {"event": "post.published", "data": {}}
    return await asyncio.to_thread(relay.call, "POST", "/v1/events", event)
