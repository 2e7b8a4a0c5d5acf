"""`relay drain`: wait until nothing is pending, so that what comes after it may rely on that."""

from argparse import Namespace
from time import monotonic, sleep
from typing import Any

from relay.cli.ask import ask
from relay.cli.exits import CommandError, Exit
from relay.cli.output import show_json
from relay.cli.progress import Progress

POLL_SECONDS = 0.5
HELD = ("paused", "gone")  # what is pending there stays so until a person does something


def drain(arguments: Namespace) -> int:
    started = monotonic()
    with Progress() as progress:
        pending = wait(arguments, started, progress)
    left = sum(pending.values())
    if arguments.json:
        seconds = round(monotonic() - started, 1)
        show_json({"drained": not left, "pending": left, "endpoints": pending, "seconds": seconds})
    elif not left:
        print("nothing is pending")
    if left:
        each = ", ".join(f"{endpoint} {count:,}" for endpoint, count in pending.items())
        raise CommandError(f"{left:,} still pending: {each}", Exit.TIMED_OUT)
    return Exit.DONE


def wait(arguments: Namespace, started: float, progress: Progress) -> dict[str, int]:
    """Return what is pending, by endpoint, when that is nothing or the time is over."""
    until = started + arguments.timeout if arguments.timeout is not None else None
    at_first: int | None = None
    told: set[str] = set()
    while True:
        endpoints = ask(arguments, "GET", "/v1/webhooks/settings")["data"]
        pending = {each["id"]: each["pending"] for each in endpoints if each["pending"]}
        left, now = sum(pending.values()), monotonic()
        if not left or (until is not None and now >= until):
            return pending
        at_first = at_first if at_first is not None else left
        for each in endpoints:
            if each["state"] in HELD and each["pending"] and each["id"] not in told:
                told.add(each["id"])
                progress.say(held(each))
        progress.tell(how_far(left, at_first - left, now - started))
        sleep(POLL_SECONDS if until is None else max(0.0, min(POLL_SECONDS, until - now)))


def held(endpoint: dict[str, Any]) -> str:
    id_, state, pending = endpoint["id"], endpoint["state"], endpoint["pending"]
    return f"{id_} is {state}, its {pending:,} pending wait for: relay endpoints resume {id_}"


def how_far(left: int, gone: int, seconds: float) -> str:
    """Say how much is left, and for how long when it gets less."""
    text = f"{left:,} pending"
    if gone <= 0 or seconds <= 0:
        return text
    rate = gone / seconds
    return f"{text}, {rate:,.1f}/s, about {roughly(left / rate)} left"


def roughly(seconds: float) -> str:
    """Write a length of time as people say it: 75 -> "1m15s", 90061 -> "25h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m" if whole < 36_000 else f"{whole // 3600}h"
