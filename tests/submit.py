"""Transactions, half of them rolled back, while relays are killed: exactly what was committed arrives.

    python -m tests.submit                         10,000 transactions within a minute, one relay
    python -m tests.submit --relays 3              relays that share it, each with its own outbox
    python -m tests.submit --relays 3 --shared     relays on one outbox, in the same database
    python -m tests.submit --transactions 1000 --seconds 10 --seed 7

Applications on asyncpg and psycopg write a row of their own and submit an event in one transaction; chance,
or the application's own death, rolls half of them back. Relays are killed with -9 meanwhile.
Committed is what the database says is: the rows of the application itself. At the end a receiver has to have
got exactly their events, an outbox holds each once, and of each key the first arrivals are in the order of
the commits. Relays with an outbox each keep an event twice if one is killed between keeping and deleting: of
several that is told, and not wrong.
"""

import argparse
import asyncio
import json
import random
import re
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import psycopg
from psycopg.types.json import Json

from relay.sources.script import script
from tests import postgres
from tests.process import RelayProcess, relay_process
from tests.receiver import Receiver

APPLICATIONS = 8
TABLE = "CREATE TABLE posts (id text PRIMARY KEY, key text NOT NULL, number int NOT NULL)"
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
SETTLE_SECONDS = 120.0
BETWEEN_KILLS_SECONDS = (0.05, 0.6)


@dataclass
class Found:
    """What came out, to be looked at: every number from `missing` to `inversions` has to be 0."""

    transactions: int = 0
    relays: int = 1
    one: bool = True  # outbox
    committed: int = 0
    kills: int = 0
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    ghosts: list[str] = field(default_factory=list)
    kept_twice: list[str] = field(default_factory=list)
    left: int = 0
    inversions: list[str] = field(default_factory=list)
    repeats: int = 0  # recognised, which a kill between keeping and deleting makes
    arrived_twice: int = 0  # which a kill between the answer and its record makes

    def wrong(self) -> list[str]:
        """Say what must not be, in words."""
        wrong = {
            "missing": len(self.missing),
            "ghosts": len(self.ghosts),
            "kept twice": len(self.kept_twice) if self.one else 0,
            "left in the source": self.left,
            "inversions": len(self.inversions),
        }
        return [f"{name}: {count}" for name, count in wrong.items() if count]

    def told(self) -> str:
        on = "one outbox" if self.one else "an outbox each"
        return (
            f"{self.transactions} transactions, {self.committed} committed, {self.relays} relay(s) on {on}, "
            f"{self.kills} kills, {self.seconds:.0f} s; rows met again and recognised: {self.repeats}, "
            f"kept by two relays: {len(self.kept_twice)}, arrived twice: {self.arrived_twice}; "
            + (", ".join(self.wrong()) or "exactly the committed half arrived")
        )


async def applications(url: str, transactions: int, seconds: float, chance: random.Random) -> None:
    """Run so many transactions in about this time, half of them on each driver."""
    each = transactions // APPLICATIONS
    pause = seconds / each
    async with asyncio.TaskGroup() as tasks:
        for number in range(APPLICATIONS):
            seed = chance.random()
            if number % 2:
                tasks.create_task(
                    asyncio.to_thread(on_psycopg, url, number, each, pause, random.Random(seed))
                )
            else:
                tasks.create_task(on_asyncpg(url, number, each, pause, random.Random(seed)))


async def on_asyncpg(
    url: str, application: int, transactions: int, pause: float, chance: random.Random
) -> None:
    connection = await asyncpg.connect(url)
    try:
        for number in range(transactions):
            await asyncio.sleep(chance.expovariate(1 / pause))
            transaction = connection.transaction()
            await transaction.start()
            key = f"key-{application}-{chance.randrange(3)}"
            id_ = await connection.fetchval(
                "SELECT relay_submit('post.published', $1, key => $2, idempotency_key => $3)",
                json.dumps({"number": number}),
                key,
                f"{application}-{number}" if chance.random() < 0.3 else None,
            )
            await connection.execute("INSERT INTO posts VALUES ($1, $2, $3)", id_, key, number)
            if chance.random() < 0.5:
                await transaction.commit()
            elif chance.random() < 0.98:
                await transaction.rollback()
            else:  # the application dies
                connection.terminate()
                connection = await asyncpg.connect(url)
    finally:
        await connection.close()


def on_psycopg(url: str, application: int, transactions: int, pause: float, chance: random.Random) -> None:
    with psycopg.connect(url) as connection:
        for number in range(transactions):
            time.sleep(chance.expovariate(1 / pause))
            key = f"key-{application}-{chance.randrange(3)}"
            row = connection.execute(
                "SELECT relay_submit(%s, %s, key => %s)", ("post.published", Json({"number": number}), key)
            ).fetchone()
            assert row is not None
            connection.execute("INSERT INTO posts VALUES (%s, %s, %s)", (row[0], key, number))
            connection.commit() if chance.random() < 0.5 else connection.rollback()


async def killing(
    relays: list[RelayProcess], chance: random.Random, done: asyncio.Event, found: Found
) -> None:
    """Kill now one and now another, until done."""
    while not done.is_set():
        try:
            async with asyncio.timeout(chance.uniform(*BETWEEN_KILLS_SECONDS)):
                await done.wait()
        except TimeoutError:
            relay = chance.choice(relays)
            found.repeats += await asyncio.to_thread(repeats, relay)
            await asyncio.sleep(chance.uniform(0, 0.01))
            await asyncio.to_thread(relay.kill)
            found.kills += 1
            await asyncio.to_thread(relay.start)


def repeats(relay: RelayProcess) -> int:
    """Ask a relay how many rows it has met that it had kept before a kill."""
    text = str(relay.call("GET", "/metrics")[1])
    found = re.search(r'^relay_source_submissions_total\{result="duplicates".*\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found is not None else 0


async def run(
    url: str,
    folder: Path,
    *,
    transactions: int,
    relays: int,
    seconds: float,
    seed: int,
    shared: bool = False,
) -> Found:
    """Do all of it on this database, which is empty, and look at what came out."""
    chance = random.Random(seed)
    found = Found(
        transactions=transactions // APPLICATIONS * APPLICATIONS, relays=relays, one=shared or relays == 1
    )
    connection = await asyncpg.connect(url)
    await connection.execute(TABLE if shared else f"{script('public')}; {TABLE}")
    # The relay's own schema, where it makes the function itself.
    await connection.execute(
        await connection.fetchval(
            "SELECT format('ALTER DATABASE %I SET search_path = public, relay', current_database())"
        )
    )
    await connection.execute("SET search_path = public, relay")
    begun = time.monotonic()
    async with Receiver() as receiver:
        with ExitStack() as stack:
            running = [
                stack.enter_context(made(folder / str(n), receiver, url, shared=shared))
                for n in range(relays)
            ]
            for relay in running:
                await asyncio.to_thread(relay.start)
            done = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(killing(running, chance, done, found))
                await applications(url, found.transactions, seconds, chance)
                committed = {
                    row["id"]: row for row in await connection.fetch("SELECT id, key, number FROM posts")
                }
                await arrived(receiver, set(committed), done)
            await settled(connection, running)
            found.left = await connection.fetchval("SELECT count(*) FROM relay_submissions")
            for relay in running:
                found.repeats += await asyncio.to_thread(repeats, relay)
                await asyncio.to_thread(relay.stop)
        judge(found, committed, [each.headers["webhook-id"] for each in receiver.requests])
    if shared:
        kept = [row["id"] for row in await connection.fetch("SELECT id FROM relay.events")]
    else:
        kept = [id_ for n in range(relays) for id_ in events(folder / str(n))]
    await connection.close()
    found.kept_twice = sorted(id_ for id_, times in Counter(kept).items() if times > 1)
    found.seconds = time.monotonic() - begun
    return found


@contextmanager
def made(folder: Path, receiver: Receiver, url: str, *, shared: bool) -> Iterator[RelayProcess]:
    folder.mkdir()
    authority = folder / "authority.pem"
    authority.write_bytes(receiver.authority.cert_pem.bytes())
    config = (
        f'[[endpoints]]\nid = "main"\nurl = "{receiver.url}"\nevents = ["*"]\nsecret = "{SECRET}"\n'
        'order = "key"\nretry_schedule = ["1s", "1s", "1s", "1s", "1s"]\n'
    )
    outbox = f'url = "{url}"\nheartbeat = "500ms"\ndead_after = "2s"' if shared else None
    if not shared:
        config += f'[[sources]]\nid = "app"\nurl = "{url}"\n'
    environment = {"SSL_CERT_FILE": str(authority)}
    with relay_process(folder, config, environment, start=False, outbox=outbox) as relay:
        yield relay


async def arrived(receiver: Receiver, ids: set[str], done: asyncio.Event) -> None:
    """Wait until all of these have arrived, or no more come; then nobody is killed any more."""
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end:
        if ids <= {each.headers["webhook-id"] for each in receiver.requests}:
            break
        await asyncio.sleep(0.1)
    done.set()


async def settled(connection: asyncpg.Connection, relays: list[RelayProcess]) -> None:
    """Wait until nothing is in the source or pending any more; what stays then is told."""
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end:
        left = await connection.fetchval("SELECT count(*) FROM relay_submissions")
        pending = [(await asyncio.to_thread(each.call, "GET", "/v1/status"))[1] for each in relays]
        if not left and not any(each["pending"] for each in pending):  # type: ignore[index]
            return
        await asyncio.sleep(0.1)


def judge(found: Found, committed: dict[str, asyncpg.Record], came: list[str]) -> None:
    """Hold what came, in the order of arrival, against what was committed."""
    first = list(dict.fromkeys(came))
    found.committed = len(committed)
    found.missing = sorted(committed.keys() - set(first))
    found.ghosts = sorted(set(first) - committed.keys())
    found.arrived_twice = len(came) - len(first)
    last: Counter[str] = Counter()
    for id_ in (
        first if found.relays == 1 else ()
    ):  # relays with an outbox each know nothing of each other's order
        if (row := committed.get(id_)) is not None:
            if row["number"] + 1 <= last[row["key"]]:
                found.inversions.append(id_)
            last[row["key"]] = row["number"] + 1


def events(folder: Path) -> list[str]:
    """Look into an outbox itself."""
    with closing(sqlite3.connect(folder / "relay.db")) as db:
        return [id_ for (id_,) in db.execute("SELECT id FROM events")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transactions", type=int, default=10_000)
    parser.add_argument("--relays", type=int, default=1)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with postgres.running() as server, tempfile.TemporaryDirectory(prefix="relay-submit-") as folder:
        found = asyncio.run(
            run(
                server.url,
                Path(folder),
                transactions=arguments.transactions,
                relays=arguments.relays,
                seconds=arguments.seconds,
                shared=arguments.shared,
                seed=arguments.seed,
            )
        )
    print(found.told())
    return 1 if found.wrong() else 0


if __name__ == "__main__":
    sys.exit(main())
