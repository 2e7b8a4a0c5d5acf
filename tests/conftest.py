"""What every test gets: an outbox of each kind, a loop that loses no task's error, a log of known lines."""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from relay import logs
from relay.model import Secret
from relay.outbox import Outbox, open_outbox
from tests import figures, postgres

STORES = ("sqlite", "postgres")
# What every store promises is tested on each; whoever only needs an outbox gets the first.
CONTRACT = frozenset({"test_outbox", "test_order", "test_patience"})


@pytest.fixture(autouse=True)
def no_error_is_lost() -> Iterator[None]:
    """Fail a test in which a task died unheard: asyncio only logs that, and warnings do not catch it."""
    lost: list[str] = []
    listener = logging.Handler(logging.ERROR)
    listener.emit = lambda record: lost.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("asyncio").addHandler(listener)
    yield
    logging.getLogger("asyncio").removeHandler(listener)
    assert not lost


@pytest.fixture(autouse=True)
def no_line_of_the_log_is_unknown() -> Iterator[None]:
    """Fail a test in which the relay says what `logs.EVENTS`, and so the README, does not have."""
    unknown: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: unknown.extend(logs.undocumented(record))  # type: ignore[method-assign]
    logging.getLogger("relay").addHandler(listener)
    yield
    logging.getLogger("relay").removeHandler(listener)
    assert not unknown


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The address of a PostgreSQL that all tests of this process share."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(postgres.anywhere())
        except LookupError as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture
async def postgres_url(postgres_server: str) -> AsyncIterator[str]:
    """The address of an empty database, for this test alone."""
    url = await postgres.new_database(postgres_server, f"relay_{uuid4().hex}")
    yield url
    await postgres.drop_database(url)


@pytest.fixture
def open_store(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[], AbstractAsyncContextManager[Outbox]]:
    """Open the same outbox, again and again; one parameter for each kind of store."""
    if request.param == "postgres":
        url = Secret(request.getfixturevalue("postgres_url"))
        return lambda: open_outbox(url)
    return lambda: open_outbox(tmp_path / "relay.db")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "open_store" in metafunc.fixturenames:
        promised = metafunc.module.__name__.rpartition(".")[2] in CONTRACT
        metafunc.parametrize("open_store", STORES if promised else STORES[:1], indirect=True)


@pytest.fixture
async def outbox(
    open_store: Callable[[], AbstractAsyncContextManager[Outbox]],
) -> AsyncIterator[Outbox]:
    async with open_store() as opened:
        await opened.register(["main", "other"])
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the long tests evenly: each worker begins with a stretch of the list, none may end with them."""
    long = [item for item in items if item.get_closest_marker("long")]
    if len(long) < 2:
        return
    items[:] = [item for item in items if not item.get_closest_marker("long")]
    for number, item in enumerate(long):
        items.insert(number * (len(items) + 1) // len(long), item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Fail what skips where everything that tests may want has been installed."""
    report = yield
    if report.skipped and os.environ.get("RELAY_TESTS_SKIP_NOTHING"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped where nothing may: {report.longrepr}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker measured to the process that tells it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = figures.all()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker measured; one that crashed has nothing to tell."""
    for name, value in getattr(node, "workeroutput", {}).get("figures", {}).items():
        figures.figure(name, value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what was measured, after what failed."""
    if lines := figures.table():
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.line(line)
