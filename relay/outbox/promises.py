"""Promises to those who wait for what is written: promises and what became of them in, everyone told."""

import asyncio
from collections.abc import Sequence
from typing import Any

Promise = asyncio.Future[Any]


def keep(promises: Sequence[Promise], results: Sequence[Any]) -> None:
    for promise, result in zip(promises, results, strict=True):
        if not promise.done():  # who waited may have been cancelled; what was written stays written
            promise.set_result(result)


def fail(promises: Sequence[Promise], error: BaseException) -> None:
    for promise in promises:
        if not promise.done():
            promise.set_exception(error)
