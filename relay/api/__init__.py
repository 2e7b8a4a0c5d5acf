"""The API on localhost: HTTP in, HTTP out, no rules. One file per resource; here they become one app."""

from collections.abc import Sequence

from aiohttp import web

from relay.api.bodies import wait_until_read
from relay.api.events import LARGEST_BATCH, Events
from relay.api.guard import Access, guard
from relay.api.metrics import Scrapes, count_refusals
from relay.api.operations import Operations
from relay.api.state import STATE, State
from relay.api.status import StatusRoutes
from relay.api.webhooks import Webhooks


def make_app(state: State, access: Access, *, beside: Sequence[web.RouteDef] = ()) -> web.Application:
    """Join guard and handlers; `beside` are routes that are no part of the API: the status page."""
    guards = [count_refusals(state), guard(access)]
    app = web.Application(middlewares=guards, client_max_size=LARGEST_BATCH)
    app[STATE] = state
    routes = Events(state).routes() + Webhooks(state).routes() + Operations(state).routes()
    routes += [*Scrapes(state).routes(), *StatusRoutes(state).routes(), *beside]
    options = {"expect_handler": wait_until_read}
    app.add_routes(
        [web.RouteDef(each.method, each.path, each.handler, each.kwargs | options) for each in routes]
    )
    return app


def make_ops_app(state: State) -> web.Application:
    """Return health and metrics, for a second address: a kubelet's probe knows no Host of ours, no token."""
    app = web.Application()
    app.add_routes(Operations(state).health() + Scrapes(state).routes())
    return app
