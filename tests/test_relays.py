"""Several relays on one PostgreSQL keep the promises of one: a short form of `python -m tests.relays`."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests import postgres
from tests.durability.zygote import Zygote
from tests.figures import figure
from tests.relays import runs
from tests.relays.__main__ import whole


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Postgres]:
    """A server of our own: it is crashed."""
    try:
        with postgres.running() as running:
            yield running
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    async with Zygote() as started:
        yield started


async def test_left_alone_they_deliver_each_event_exactly_once(tmp_path, zygote, server):
    report = await runs.calm(tmp_path, zygote, server, relays=3, events=150, seed=1)
    assert whole(report, once=True), str(report)


async def test_killed_frozen_and_with_their_database_crashed_they_lose_nothing(tmp_path, zygote, server):
    """In order by key, and twice only what a fault explains."""
    report = await runs.troubled(tmp_path, zygote, server, relays=3, seconds=5, seed=2)
    assert whole(report, once=False), str(report)
    figures = report.figures
    figure("relays: lost / acknowledged", f"0 / {figures['acknowledged']}")
    figure("relays: duplicates", figures["duplicates"])
