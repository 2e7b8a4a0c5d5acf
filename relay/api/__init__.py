"""The API on localhost: HTTP in, HTTP out, no rules. One file per resource; here they become one app."""

from aiohttp import web

from relay.api.bodies import wait_until_read
from relay.api.events import LARGEST_BATCH, Events
from relay.api.guard import Access, guard
from relay.api.operations import Operations
from relay.api.state import State
from relay.api.webhooks import Webhooks


def make_app(state: State, access: Access) -> web.Application:
    """Join guard and handlers."""
    app = web.Application(middlewares=[guard(access)], client_max_size=LARGEST_BATCH)
    routes = Events(state).routes() + Webhooks(state).routes() + Operations(state).routes()
    options = {"expect_handler": wait_until_read}
    app.add_routes(
        [web.RouteDef(each.method, each.path, each.handler, each.kwargs | options) for each in routes]
    )
    return app


def make_ops_app(state: State) -> web.Application:
    """Return health alone, for a second address: a kubelet's probe knows no Host of ours and no token."""
    app = web.Application()
    app.add_routes(Operations(state).health())
    return app
