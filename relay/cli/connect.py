"""`relay check --connect`: each endpoint is connected to and verified, each source looked at."""

import asyncio
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from time import perf_counter

from relay import __version__
from relay.config import Config
from relay.model import Endpoint, Source
from relay.reach import Reached, reach
from relay.sender import Sender, open_sender
from relay.sources.database import AwayError, UnfitError
from relay.sources.reader import check

AT_ONCE = 32


def reached(config: Config) -> list[dict[str, object]]:
    """Return what each endpoint and then each source met, in the order of the config."""
    return [*(told(each) for each in asyncio.run(_reach_all(config))), *asyncio.run(_look_at(config.sources))]


async def _reach_all(config: Config) -> list[Reached]:
    slots = asyncio.Semaphore(AT_ONCE)
    listen = config.server.listen
    own = frozenset({(listen.host, listen.port)}) if listen.path is None else frozenset()
    async with (
        open_sender(policy=config.egress.policy, version=__version__, own_addresses=own) as sender,
        asyncio.TaskGroup() as tasks,
    ):
        reaching = [tasks.create_task(_in_turn(slots, sender, endpoint)) for endpoint in config.endpoints]
    return [each.result() for each in reaching]


async def _look_at(sources: Sequence[Source]) -> list[dict[str, object]]:
    return [await _looked_at(each) for each in sources]


async def _looked_at(source: Source) -> dict[str, object]:
    started, error = perf_counter(), None
    try:
        await check(source)
    except (AwayError, UnfitError) as wrong:
        error = str(wrong)
    return {
        "source": source.id,
        "ok": error is None,
        "milliseconds": round((perf_counter() - started) * 1000),
        "error": error,
    }


async def _in_turn(slots: asyncio.Semaphore, sender: Sender, endpoint: Endpoint) -> Reached:
    async with slots:
        return await reach(sender, endpoint)


def told(met: Reached) -> dict[str, object]:
    """Write what was met in the words of `relay test`."""
    until = met.certificate_until
    error = None
    if met.reason is not None:
        error = f"{met.reason}: {met.detail}" if met.detail else met.reason
    return {
        "endpoint": met.endpoint,
        "ok": met.reason is None,
        "milliseconds": met.milliseconds,
        "address": met.address,
        "tls": met.tls,
        "certificate_until": _day(until) if until is not None else None,
        "error": error,
    }


def _day(written: str) -> str:
    """Turn a certificate's way of writing a time into RFC 3339."""
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(written), UTC).isoformat()[:-6] + "Z"
