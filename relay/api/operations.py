"""What machines ask: does the process answer, can it keep events, how the API looks; a backup, a reload."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path

from aiohttp import web

from relay.api.answers import answer, invalid, unavailable
from relay.api.connections import ALWAYS
from relay.api.problems import Problem
from relay.api.state import State
from relay.config import ConfigError
from relay.outbox import ElsewhereError, StoppingError

BACKUP_CHUNK = 256 << 10


class Operations:
    """The handlers; a receiver's trouble never shows here (contract section 4)."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._one_backup = asyncio.Lock()
        self._description = resources.files("relay.api").joinpath("openapi.json").read_bytes()

    def routes(self) -> list[web.RouteDef]:
        return [
            *self.health(),
            web.get("/openapi.json", self.describe),
            web.get("/v1/backup", self.backup, allow_head=False),
            web.post("/v1/reload", self.reload),
        ]

    def health(self) -> list[web.RouteDef]:
        """Return what a second address serves, too."""
        return [web.get("/livez", self.live), web.get("/readyz", self.ready)]

    async def live(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(self, _request: web.Request) -> web.Response:
        why_not = self._state.unready or self._state.outbox.trouble()
        if why_not is not None:
            # Answered, not raised: at the second address no guard turns a problem into an answer.
            return Problem(503, why_not).response()
        return web.Response(text="ok\n")

    async def describe(self, _request: web.Request) -> web.Response:
        """Answer with the OpenAPI document, which is written by hand beside this file."""
        return web.Response(body=self._description, content_type="application/json")

    async def reload(self, _request: web.Request) -> web.Response:
        """Read the config again, and answer with what that changed; one with mistakes changes nothing."""
        try:
            reloaded = await self._state.reload()
        except ConfigError as error:
            raise invalid([("#", problem) for problem in error.problems]) from None
        except StoppingError as error:
            raise unavailable(str(error)) from None
        changes = reloaded.changes
        return answer(
            {
                "added": changes.added,
                "changed": changes.changed,
                "removed": changes.removed,
                "cancelled": sum(changes.cancelled.values()),
                "set_aside": changes.aside,
                "needs_restart": reloaded.needs_restart,
            }
        )

    async def backup(self, request: web.Request) -> web.StreamResponse:
        """Answer with a consistent copy of the outbox, secrets of the API's endpoints included."""
        async with self._one_backup, self._copy() as copied:
            response = web.StreamResponse(
                headers={
                    **ALWAYS,
                    "Content-Type": "application/vnd.sqlite3",
                    "Content-Disposition": 'attachment; filename="relay-backup.db"',
                    "Cache-Control": "no-store",
                }
            )
            with await asyncio.to_thread(copied.open, "rb") as file:
                response.content_length = os.fstat(file.fileno()).st_size
                with suppress(ConnectionError):  # whoever asked has gone
                    await response.prepare(request)
                    while chunk := await asyncio.to_thread(file.read, BACKUP_CHUNK):
                        await response.write(chunk)
                    await response.write_eof()
            return response

    @asynccontextmanager
    async def _copy(self) -> AsyncIterator[Path]:
        try:
            async with self._state.outbox.backup() as copied:
                yield copied
        except StoppingError as error:
            raise unavailable(str(error)) from None
        except ElsewhereError as error:
            raise Problem(501, str(error)) from None
