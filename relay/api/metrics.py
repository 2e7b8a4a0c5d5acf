"""`GET /metrics`, for Prometheus: how things stand, and what was counted; refusals are counted here."""

import asyncio
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from relay.about import build
from relay.api.state import State
from relay.api.webhooks import state_of
from relay.metrics.exposition import EndpointNow, Now, render
from relay.outbox import Backlog

SUBMISSIONS = frozenset({"/v1/events", "/v1/events/batch"})
REFUSALS: Mapping[int, str] = {
    400: "not_json",
    401: "unauthorized",
    403: "foreign",
    421: "foreign",
    408: "too_slow",
    413: "too_large",
    415: "content_type",
    422: "invalid",
    500: "failed",
}
NOTHING = Backlog(pending=0, dead=0)


def count_refusals(state: State) -> Middleware:
    """Return the outermost middleware, which sees every answer to a submission."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if response.status >= 400 and request.method == "POST" and request.path in SUBMISSIONS:
            unavailable = "full" if state.refusing is None else "stopping"
            default = unavailable if response.status == 503 else "other"
            state.metrics.refused[REFUSALS.get(response.status, default)] += 1
        return response

    return count


class Scrapes:
    """The handler; one scrape at a time, however many ask."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._one_at_a_time = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """Return what a second address serves, too."""
        return [web.get("/metrics", self.scrape)]

    async def scrape(self, request: web.Request) -> web.Response:
        async with self._one_at_a_time:
            now = await look(self._state)
            self._state.metrics.keep_only(now.endpoints.keys())
            text, type_ = await asyncio.to_thread(
                render, self._state.metrics, now, request.headers.get("Accept", "")
            )
        return web.Response(body=text, headers={"Content-Type": type_})


async def look(state: State) -> Now:
    """Ask the outbox's memory for what it holds, and the disk once for the oldest of each endpoint."""
    backlogs, pasts, size = await state.outbox.backlog(), await state.outbox.pasts(), state.outbox.size()
    now_ms = state.clock.now_ms()
    endpoints: dict[str, EndpointNow] = {}
    for registered in state.endpoints.all():
        id_ = registered.endpoint.id
        past, backlog = pasts.get(id_), backlogs.get(id_, NOTHING)
        oldest_ms = past.oldest_pending_ms if past is not None else None
        endpoints[id_] = EndpointNow(
            state=state_of(registered, past),
            pending=backlog.pending,
            dead=backlog.dead,
            oldest_seconds=max(0, now_ms - oldest_ms) / 1000 if oldest_ms is not None else 0.0,
        )
    return Now(
        build=build(),
        endpoints=endpoints,
        refusing=state.outbox.trouble() is not None,
        file_bytes=size.file_bytes,
        log_bytes=size.log_bytes,
        used_bytes=size.used_bytes,
        max_bytes=size.bounds.max_bytes,
        max_pending=size.bounds.max_pending,
        disk_free_bytes=size.disk_free_bytes,
        relays=size.relays,
        dropped=size.dropped,
        connections=sum(len(each.server.connections) for each in state.servers if each.server is not None),
        sending=state.sending(),
        most_sending=state.most_sending,
    )
