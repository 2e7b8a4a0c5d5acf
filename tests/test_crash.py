"""kill -9 at random moments under load: nothing acknowledged is lost, nothing comes twice without a cause."""

import asyncio
import hashlib
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import aiohttp
import orjson

from tests.process import RelayProcess, relay_process
from tests.receiver import Answer, Receiver, Request

KILLS = 10
POSTERS = 8
CONFIG = """
[[endpoints]]
id = "main"
url = "{url}"
events = ["*"]
secret = "crash-test-secret"
retry_schedule = ["100ms", "200ms", "200ms", "200ms", "200ms", "200ms", "200ms", "200ms", "200ms"]
"""


class Driver:
    """Posts numbered events and keeps what it was answered; unknown outcomes are posted again."""

    def __init__(self, relay: RelayProcess) -> None:
        self.relay = relay
        self.submitted: set[int] = set()
        self.acknowledged: dict[int, str] = {}  # number -> event id
        self.unknown: set[int] = set()

    async def post_until_killed(self) -> None:
        async with aiohttp.ClientSession() as client, asyncio.TaskGroup() as posters:
            for _ in range(POSTERS):
                posters.create_task(self._post_on(client))

    async def settle(self) -> None:
        """Post again what is unknown, with the same key, until all is acknowledged."""
        async with aiohttp.ClientSession() as client:
            for number in sorted(self.unknown):
                await self._post(client, number)
        assert not self.unknown

    async def _post_on(self, client: aiohttp.ClientSession) -> None:
        try:
            while True:
                number = len(self.submitted)
                self.submitted.add(number)
                self.unknown.add(number)
                await self._post(client, number)
        except (aiohttp.ClientError, OSError):
            return  # killed

    async def _post(self, client: aiohttp.ClientSession, number: int) -> None:
        body = orjson.dumps({"event": "crash.test", "data": {"n": number, "pad": "x" * 400}})
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"n-{number}"}
        async with client.post(f"{self.relay.url}/v1/events", data=body, headers=headers) as answer:
            receipt = orjson.loads(await answer.read())
            assert answer.status in {200, 202}, receipt
            assert self.acknowledged.setdefault(number, receipt["id"]) == receipt["id"]
            self.unknown.discard(number)


def number_of(request: Request) -> int:
    return int(orjson.loads(request.body)["data"]["n"])


async def test_ten_kills_under_load_lose_nothing_and_double_nothing_without_cause(tmp_path: Path, capsys):
    chance = random.Random(20261124)
    killed_at: list[float] = []
    async with Receiver() as receiver:
        # One in ten is refused, one in ten answered late, so that kills meet every stage of a delivery.
        script = [chance.choice([503, Answer(delay=0.05), *[200] * 8]) for _ in range(20_000)]
        answered = dict(enumerate(each if isinstance(each, int) else each.status for each in script))
        receiver.answers(*script)
        authority = tmp_path / "authority.pem"
        authority.write_bytes(receiver.authority.cert_pem.bytes())
        config = CONFIG.format(url=receiver.url)
        with relay_process(tmp_path, config, {"SSL_CERT_FILE": str(authority)}, start=False) as relay:
            driver = Driver(relay)
            for _ in range(KILLS):
                await asyncio.to_thread(relay.start)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(driver.post_until_killed())
                    await asyncio.sleep(chance.uniform(0.05, 0.6))
                    killed_at.append(asyncio.get_running_loop().time())
                    await asyncio.to_thread(relay.kill)
            await asyncio.to_thread(relay.start)
            await driver.settle()
            async with asyncio.timeout(30):
                while await asyncio.to_thread(waiting, relay):
                    await asyncio.sleep(0.1)

    arrivals = defaultdict(list)
    for index, request in enumerate(receiver.requests):
        arrivals[request.headers["webhook-id"]].append((request, answered.get(index, 200)))

    ids = set(driver.acknowledged.values())
    assert len(ids) == len(driver.submitted), "one id for each event"
    assert {number_of(request) for request in receiver.requests} <= driver.submitted, "nothing unsubmitted"
    lost = ids - {id_ for id_, got in arrivals.items() if any(status == 200 for _, status in got)}
    assert not lost
    assert set(arrivals) == ids
    for number, id_ in driver.acknowledged.items():
        assert {number_of(request) for request, _ in arrivals[id_]} == {number}
    for got in arrivals.values():
        assert len({hashlib.sha256(request.body).digest() for request, _ in got}) == 1
        taken = [request.at for request, status in got if status == 200]
        for earlier, later in pairwise(taken):
            assert any(earlier < at + 0.5 and at < later for at in killed_at), "twice without a crash between"
    doubled = sum(sum(status == 200 for _, status in got) > 1 for got in arrivals.values())
    with capsys.disabled():
        print(f"\n{KILLS} kills, {len(ids)} events acknowledged, 0 lost, {doubled} seen twice across a kill")


def waiting(relay: RelayProcess) -> bool:
    """Tell whether any event is still owed to anyone."""
    cursor = ""
    while True:
        _, page = relay.call("GET", f"/v1/events?limit=200{cursor}")
        for event in page["data"]:
            if any(each["state"] == "pending" for each in event["deliveries"]):
                return True
        if page["next_cursor"] is None:
            return False
        cursor = f"&cursor={page['next_cursor']}"
