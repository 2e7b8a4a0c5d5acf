"""Health for machines: `/livez` (the process answers) and `/readyz` (it can keep events)."""

from aiohttp import web

from relay.api.problems import Problem
from relay.api.state import State


class Operations:
    """The handlers; a receiver's trouble never shows here (contract section 4)."""

    def __init__(self, state: State) -> None:
        self._state = state

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/livez", self.live), web.get("/readyz", self.ready)]

    async def live(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(self, _request: web.Request) -> web.Response:
        why_not = self._state.unready or self._state.outbox.trouble()
        if why_not is not None:
            raise Problem(503, why_not)
        return web.Response(text="ok\n")
