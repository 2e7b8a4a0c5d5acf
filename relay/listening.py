"""Where requests are taken: an address of the config in, a socket that is served out."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path

from aiohttp import web

from relay.api import make_app, make_ops_app
from relay.api.connections import Connections
from relay.api.guard import Access
from relay.api.state import STATE, State
from relay.config import Address, Server
from relay.page import Page

log = logging.getLogger("relay")

SOCKET_MODE = 0o660
MOST_CONNECTIONS = 1000  # of whoever submits, at once
MOST_OPS_CONNECTIONS = 16
BACKLOG = 1024


class ListenError(Exception):
    """The address cannot be listened on; the text is one sentence for the operator."""


@asynccontextmanager
async def listening(
    server: Server, state: State, access: Access, most: int
) -> AsyncIterator[frozenset[tuple[str, int]]]:
    """Take requests at the configured address, over so many connections at the most.

    Yields the addresses that deliveries may never go to.
    """
    page = Page(state, access).routes() if server.page else ()
    app = make_app(state, access, beside=page)
    async with AsyncExitStack() as runners:
        taken = [await runners.enter_async_context(site(app, server.listen, min(MOST_CONNECTIONS, most)))]
        if server.ops_listen is not None:
            ops = site(make_ops_app(state), server.ops_listen, MOST_OPS_CONNECTIONS)
            taken.append(await runners.enter_async_context(ops))
        state.addresses = [shown(each) for each in taken]
        log.info("listening", extra={"addresses": state.addresses})
        yield frozenset(address for address in taken if isinstance(address, tuple))


def shown(taken: tuple[str, int] | str) -> str:
    return f"unix:{taken}" if isinstance(taken, str) else str(Address(host=taken[0], port=taken[1]))


@asynccontextmanager
async def site(app: web.Application, address: Address, most: int) -> AsyncIterator[tuple[str, int] | str]:
    """Serve one app at one address; yields the address as it really is (port 0 is any free one)."""
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
    # The socket outlives the server: asyncio's own loop fails on stopping to serve one that is closed.
    with bound(address) as listener:
        await runner.setup()
        if STATE in app:
            app[STATE].servers.append(runner)
        try:
            take = Connections(runner, most=most)
            with closing(
                await asyncio.get_running_loop().create_server(take, sock=listener, backlog=BACKLOG)
            ):
                name = listener.getsockname()
                yield name if isinstance(name, str) else (name[0], name[1])
        finally:
            await runner.cleanup()


@contextmanager
def bound(address: Address) -> Iterator[socket.socket]:
    """Bind a socket to the address; a unix socket's file goes with it. Raises ListenError."""
    try:
        listener = bound_unix(address.path) if address.path is not None else bound_tcp(address)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror or error}") from error
    with listener:
        made = address.path.stat().st_ino if address.path is not None else None
        try:
            yield listener
        finally:
            # Only our own: whoever put another in its place is listening there.
            if address.path is not None and address.path.exists() and address.path.stat().st_ino == made:
                address.path.unlink()


def bound_tcp(address: Address) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
    except OSError:
        listener.close()
        raise
    return listener


def bound_unix(path: Path) -> socket.socket:
    """Bind a unix socket that the app's group may use; one that a crash left behind is taken over."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ListenError(f"cannot listen on unix:{path}: somebody else is listening there")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
    except OSError:
        listener.close()
        raise
    return listener
