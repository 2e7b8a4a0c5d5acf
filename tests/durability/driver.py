"""The application of a run: posts numbered events and writes down every answer before it counts."""

import asyncio
import random
from collections.abc import Callable

import aiohttp
import orjson

from tests.durability import plan
from tests.durability.journal import Journal

POST_SECONDS = 20.0
BACK_OFF_SECONDS = 0.03
TWINS = 16  # one in so many is posted twice at the same moment
CONFLICTS = 40  # one in so many keys is used again for other content
ABANDONED = 29  # one in so many of the unknown is never posted again


class Driver:
    """Posts to whatever `url` is at the moment.

    An unknown outcome is posted again with the same key. A few are given up, so that what was kept without
    its application knowing is put to the test too.
    """

    def __init__(self, url: Callable[[], str], journal: Journal, *, seed: int, rate: float = 200.0) -> None:
        self.acknowledged: dict[int, str] = {}
        self.unknown: set[int] = set()
        self.refused = 0
        self._url = url
        self._journal = journal
        self._seed = seed
        self._next = 0
        self._pause = 1 / rate
        self._chance = random.Random(f"{seed}/driver")

    async def post_until(self, stop: asyncio.Event, *, posters: int = 8, most: int = 1_000_000) -> None:
        """Keep posting over kept-alive connections, whatever becomes of the relay."""
        async with self._client() as client, asyncio.TaskGroup() as tasks:
            for _ in range(posters):
                tasks.create_task(self._keep_posting(client, stop, posters * self._pause, most))

    async def post(self, count: int, *, at_once: int = 8) -> None:
        """Post so many new events as fast as they are taken; each once."""
        numbers = iter(range(self._next, self._next + count))
        self._next += count

        async def work(client: aiohttp.ClientSession) -> None:
            for number in numbers:
                await self._submit(client, number)

        async with self._client() as client, asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(work(client))

    async def settle(self) -> None:
        """Post again what is unknown and not given up, until it is known."""
        async with asyncio.timeout(60), self._client() as client:
            while left := sorted(number for number in self.unknown if number % ABANDONED):
                for number in left:
                    await self._post(client, number)

    def _client(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=POST_SECONDS))

    async def _keep_posting(
        self, client: aiohttp.ClientSession, stop: asyncio.Event, pause: float, most: int
    ) -> None:
        while not stop.is_set() and self._next < most:
            again = [number for number in self.unknown if number % ABANDONED]
            if again and self._chance.random() < 0.5:
                number = self._chance.choice(again)
            else:
                number = self._next
                self._next += 1
            await self._submit(client, number)
            await asyncio.sleep(pause if number in self.acknowledged else max(pause, BACK_OFF_SECONDS))

    async def _submit(self, client: aiohttp.ClientSession, number: int) -> None:
        """Post an event, some of them twice at once; then perhaps misuse its key."""
        async with asyncio.TaskGroup() as posts:
            for _ in range(2 if number % TWINS == 3 else 1):
                posts.create_task(self._post(client, number))
        if number in self.acknowledged and number % CONFLICTS == 7:
            await self._conflict(client, number)

    async def _post(self, client: aiohttp.ClientSession, number: int) -> None:
        post = plan.post(self._seed, number)
        self._journal.write(
            kind="post", n=number, type=post.type, order=post.key, sha256=post.digest, seed=self._seed
        )
        if number not in self.acknowledged:
            self.unknown.add(number)
        try:
            status, receipt = await self._send(client, post.submission, number)
        except (aiohttp.ClientError, OSError, TimeoutError, orjson.JSONDecodeError) as error:
            self._journal.write(kind="unknown", n=number, why=type(error).__name__)
            return
        if status in {200, 202}:
            self._journal.write(
                kind="ack",
                n=number,
                id=receipt["id"],
                status=status,
                endpoints=receipt["endpoints"],
                duplicate=receipt["duplicate"],
            )
            self.acknowledged[number] = receipt["id"]
            self.unknown.discard(number)
        elif status < 500 or status == 503:
            self._journal.write(kind="refused", n=number, status=status)
            self.refused += 1
        else:
            self._journal.write(kind="unknown", n=number, why=f"http_{status}")

    async def _conflict(self, client: aiohttp.ClientSession, number: int) -> None:
        other = plan.post(self._seed, number).submission.replace(b'"n":', b'"m":')
        try:
            status, _ = await self._send(client, other, number)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return
        self._journal.write(kind="conflict", n=number, status=status)

    async def _send(self, client: aiohttp.ClientSession, body: bytes, number: int) -> tuple[int, dict]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"n-{self._seed}-{number}"}
        async with client.post(f"{self._url()}/v1/events", data=body, headers=headers) as answer:
            return answer.status, orjson.loads(await answer.read())
