"""An application in Python that posts its events to the relay, each in a request of its own, with aiohttp.

It answers each order on stdin, `{"events": …}`, when so many are handed over and answered with 202.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator

import aiohttp

from tests.bench.load import event
from tests.bench.processes import new_loop, obey

AT_ONCE = 32


async def post(session: aiohttp.ClientSession, url: str, numbers: Iterator[int]) -> None:
    for number in numbers:
        async with session.post(url, json=event(number)) as answer:
            if answer.status != 202:
                raise ConnectionError(f"an event was answered {answer.status}")


async def serve(url: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:

        async def hand_over(order: str) -> dict[str, float]:
            started_at = time.monotonic()
            numbers = iter(range(json.loads(order)["events"]))
            async with asyncio.TaskGroup() as posting:
                for _ in range(AT_ONCE):
                    posting.create_task(post(session, url, numbers))
            return {"started_at": started_at, "ended_at": time.monotonic()}

        await obey(hand_over)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--loop", default="auto")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=lambda: new_loop(options.loop)) as runner:
        runner.run(serve(options.url))


if __name__ == "__main__":
    main()
