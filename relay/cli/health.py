"""`relay healthcheck`: is the relay ready? Its exit code is what a container's probe looks at."""

import os
from argparse import Namespace
from pathlib import Path

from relay.cli.client import call
from relay.cli.exits import CommandError, Exit

TIMEOUT_SECONDS = 2.0
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - where to ask, not where to listen


def healthcheck(arguments: Namespace) -> int:
    url = arguments.url or os.environ.get("RELAY_URL") or configured_url(arguments.config)
    status, answer = call("GET", "/readyz", url=url, timeout_seconds=TIMEOUT_SECONDS)
    if status != 200:
        detail = answer.get("detail") if isinstance(answer, dict) else None
        raise CommandError(f"the relay is not ready: {detail or f'it answered {status}'}")
    return Exit.DONE


def configured_url(option: str | None) -> str | None:
    """Return where the config says that the relay listens; None when it does not say.

    A config that was broken after the start does not stop the relay, so it must not fail the probe: no
    mistake is told here.
    """
    listen = os.environ.get("RELAY_SERVER__LISTEN") or listen_in_file(option)
    if listen is None or listen.startswith("unix:"):
        return listen
    host, _, port = listen.rpartition(":")
    return f"http://{EVERY_ADDRESS.get(host, host)}:{port}"


def listen_in_file(option: str | None) -> str | None:
    """Read the one value, for to import `relay.config` takes as long as the whole probe may take."""
    import tomllib

    given = option or os.environ.get("RELAY_CONFIG")
    paths = [Path(given)] if given else [Path("relay.toml"), Path("/etc/relay/relay.toml")]
    try:
        path = next(path for path in paths if path.exists())
        listen = tomllib.loads(path.read_text("utf-8-sig"))["server"]["listen"]
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None
    return resolved(path) if "$" in str(listen) else str(listen)


def resolved(path: Path) -> str | None:
    """Read the value the long way, when it is put together from the environment."""
    from relay.config import ConfigError, load

    try:
        return str(load(path, os.environ).server.listen)
    except ConfigError:
        return None
