"""Answers of the API: contents in, responses out."""

from collections.abc import Sequence

import orjson
from aiohttp import web

from relay.api.problems import Problem

RETRY_AFTER_SECONDS = 5
MOST_MISTAKES = 1000  # as many as a batch may hold events

Mistake = tuple[str, str]  # where, what is wrong


def answer(content: object, status: int = 200) -> web.Response:
    return web.Response(
        body=orjson.dumps(content), status=status, headers={"Content-Type": "application/json"}
    )


def page(items: Sequence[object], next_cursor: str | None) -> dict[str, object]:
    """Make what every list answers."""
    return {"data": items, "next_cursor": next_cursor}


def invalid(mistakes: Sequence[Mistake]) -> Problem:
    detail = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else f"{mistakes[0][0]} {mistakes[0][1]}"
    if len(mistakes) > MOST_MISTAKES:
        detail += f", of which these are the first {MOST_MISTAKES}"
    return Problem(422, detail, errors=mistakes[:MOST_MISTAKES])


def unavailable(detail: str) -> Problem:
    return Problem(503, detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
