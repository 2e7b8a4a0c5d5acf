"""`relay status`: how the relay and its endpoints stand, once, or live until somebody interrupts."""

import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from time import monotonic, sleep
from typing import Any, NamedTuple

from relay.cli.ask import ask
from relay.cli.client import UnreachableError, call
from relay.cli.drain import roughly
from relay.cli.exits import Exit
from relay.cli.output import printable, show_json, table
from relay.cli.progress import ERASE_REST, is_live

LIVE_SECONDS = 1.0
LINES_SECONDS = 10.0
ACCEPTED = re.compile(r"^relay_events_accepted_total(?:\{.*\})? (\S+)$", re.MULTILINE)
DELIVERED = re.compile(r"^relay_delivery_attempts_total\{(.*)\} (\S+)$", re.MULTILINE)
ENDPOINT = re.compile(r'endpoint="([^"]*)"')


class Counts(NamedTuple):
    """What was counted since the relay's start, and when that was read."""

    at: float
    accepted: float
    delivered: Mapping[str, float]  # by endpoint


class Look(NamedTuple):
    """What one look at the relay saw."""

    state: str
    ready: bool
    endpoints: Sequence[dict[str, Any]]
    sources: Sequence[dict[str, Any]] = ()
    counts: Counts | None = None


def status(arguments: Namespace) -> int:
    if arguments.watch:
        return watch(arguments)
    seen = look(arguments)
    if arguments.json:
        told = {"state": seen.state, "ready": seen.ready, "endpoints": seen.endpoints}
        show_json({**told, "sources": seen.sources})
    else:
        print("\n".join(lines(seen)))
    return Exit.DONE if seen.ready else Exit.FAILED


def watch(arguments: Namespace) -> int:
    """Look again and again; a relay that ends meanwhile is a state to show, not the end."""
    live = is_live(sys.stdout) and not arguments.json
    interval = arguments.interval or (LIVE_SECONDS if live else LINES_SECONDS)
    before, seen = None, counting(arguments)
    screen = Screen(live=live)
    try:
        while True:
            rates = Rates(before, seen.counts)
            if arguments.json:
                show_json(as_json(seen, rates))
                sys.stdout.flush()
            else:
                screen.show(lines(seen, rates))
            sleep(interval)
            before = seen.counts
            try:
                seen = counting(arguments)
            except UnreachableError as error:
                seen = Look(str(error), ready=False, endpoints=())
    finally:
        screen.close()


def look(arguments: Namespace) -> Look:
    code, answer = call("GET", "/readyz", url=arguments.url)
    endpoints = ask(arguments, "GET", "/v1/webhooks/settings")["data"]
    sources = ask(arguments, "GET", "/v1/status")["sources"]
    why_not = (
        answer.get("detail", f"it answered {code}") if isinstance(answer, dict) else f"it answered {code}"
    )
    return Look("ready" if code == 200 else f"not ready: {why_not}", code == 200, endpoints, sources)


def counting(arguments: Namespace) -> Look:
    seen = look(arguments)
    code, text = call("GET", "/metrics", url=arguments.url)
    return seen._replace(counts=counts(text, monotonic()) if code == 200 else None)


def counts(text: str, at: float) -> Counts | None:
    """Find in the text of a scrape what rates are made of."""
    accepted = ACCEPTED.search(text)
    if accepted is None:
        return None
    delivered: dict[str, float] = {}
    for labels, value in DELIVERED.findall(text):
        if 'reason="ok"' in labels and (endpoint := ENDPOINT.search(labels)):
            delivered[endpoint[1]] = float(value)
    return Counts(at, float(accepted[1]), delivered)


class Rates:
    """How much a second, between two looks; None when that cannot be told."""

    def __init__(self, before: Counts | None, now: Counts | None) -> None:
        self._before = before
        self._now = now

    @property
    def accepted(self) -> float | None:
        if self._before is None or self._now is None:
            return None
        return self._rate(self._before.accepted, self._now.accepted)

    @property
    def delivered(self) -> float | None:
        if self._before is None or self._now is None:
            return None
        return self._rate(sum(self._before.delivered.values()), sum(self._now.delivered.values()))

    def of(self, endpoint: str) -> float | None:
        if self._before is None or self._now is None:
            return None
        return self._rate(self._before.delivered.get(endpoint, 0.0), self._now.delivered.get(endpoint, 0.0))

    def _rate(self, before: float, now: float) -> float | None:
        assert self._before is not None and self._now is not None  # noqa: S101, PT018 - asked for by those above
        seconds = self._now.at - self._before.at
        # Less than before: the relay was started again.
        return (now - before) / seconds if now >= before and seconds > 0 else None


def lines(seen: Look, rates: Rates | None = None) -> list[str]:
    waiting = sum(each["pending"] for each in seen.endpoints)
    dead = sum(each["dead"] for each in seen.endpoints)
    head = f"{printable(seen.state)}, {waiting:,} waiting, {dead:,} dead"
    if rates is not None:
        head += f", {a_second(rates.accepted)} accepted, {a_second(rates.delivered)} delivered"
    head_and_sources = [head, *map(source, seen.sources)]
    if not seen.endpoints:
        return head_and_sources
    columns = ["id", "state", "pending", "dead", "oldest", "last success", "last error"]
    if rates is not None:
        columns.insert(5, "delivered")
    return [*head_and_sources, *table(columns, [row(each, rates) for each in seen.endpoints])]


def source(each: Mapping[str, Any]) -> str:
    """Say in a line how a source stands."""
    state = f"nothing comes since {each['since']}: {each['error']}" if each["error"] else "is read"
    return printable(f"source {each['id']}: {state}, {each['refused']:,} refused")


def row(endpoint: Mapping[str, Any], rates: Rates | None) -> dict[str, object]:
    oldest = endpoint["oldest_pending_seconds"]
    return {
        **endpoint,
        "oldest": roughly(oldest) if oldest is not None else None,
        "last success": endpoint["last_success_at"],
        "last error": endpoint["last_error"],
        "delivered": a_second(rates.of(endpoint["id"])) if rates is not None else None,
    }


def a_second(rate: float | None) -> str:
    return f"{rate:,.1f}/s" if rate is not None else "-/s"


def as_json(seen: Look, rates: Rates) -> dict[str, object]:
    return {
        "state": seen.state,
        "ready": seen.ready,
        "accepted_per_second": rates.accepted,
        "delivered_per_second": rates.delivered,
        "sources": seen.sources,
        "endpoints": [{**each, "delivered_per_second": rates.of(each["id"])} for each in seen.endpoints],
    }


class Screen:
    """Shows lines in the place of those before, on a terminal; below them, elsewhere."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._height = 0
        if live:
            sys.stdout.write("\x1b[?25l")  # the cursor would jump about

    def show(self, shown: Sequence[str]) -> None:
        if not self._live:
            print("\n".join(shown), end="\n\n", flush=True)
            return
        width, height = shutil.get_terminal_size()
        room = max(1, height - 1)
        if len(shown) > room:
            shown = [*shown[: room - 1], f"and {len(shown) - room + 1} more"]
        up = f"\x1b[{self._height}A" if self._height else ""
        text = "".join(f"{line[: width - 1]}{ERASE_REST}\n" for line in shown)
        sys.stdout.write(f"{up}{text}\x1b[J")
        sys.stdout.flush()
        self._height = len(shown)

    def close(self) -> None:
        if self._live:
            sys.stdout.write("\x1b[?25h")
            sys.stdout.flush()
