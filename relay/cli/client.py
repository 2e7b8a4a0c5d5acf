"""One request to the running relay: method, path and content in, status and JSON out.

For the commands that look at or change a running relay. With the standard library alone, because they
start in under 100 ms; redirects and proxies are not followed.
"""

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from relay.cli.exits import CommandError, Exit

DEFAULT_URL = "http://127.0.0.1:8484"


class UnreachableError(CommandError):
    """No relay answers at the address."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"no relay answers at {url}: {why}", Exit.UNREACHABLE)


def call(
    method: str,
    path: str,
    body: object = None,
    *,
    url: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 30.0,
) -> tuple[int, Any]:
    """Ask the relay at `url`, else at $RELAY_URL, else where it listens by default.

    A `body` of bytes is sent as it is, anything else as JSON. The answer is JSON, or text where the relay
    answers text. Raises UnreachableError.
    """
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with answered(method, path, content, url=url, headers=headers, timeout_seconds=timeout_seconds) as answer:
        return answer.status, decoded(answer.read())


@contextmanager
def answered(
    method: str,
    path: str,
    content: bytes | None = None,
    *,
    url: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float,
) -> Iterator[http.client.HTTPResponse]:
    """Ask the relay and hand out its answer, to be read; `timeout_seconds` may pass without a byte.

    What goes wrong with the connection is an UnreachableError, as long as it is handed out.
    """
    url = url or os.environ.get("RELAY_URL") or DEFAULT_URL
    connection = connect(url, timeout_seconds)
    try:
        connection.request(method, path, content, {**usual_headers(os.environ), **(headers or {})})
        yield connection.getresponse()
    except TimeoutError:
        raise UnreachableError(url, f"nothing came within {timeout_seconds:g} s") from None
    except OSError as error:
        raise UnreachableError(url, error.strerror or str(error)) from None
    except http.client.HTTPException:
        raise UnreachableError(url, "what answers there does not speak HTTP") from None
    finally:
        connection.close()


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def connect(url: str, timeout_seconds: float) -> http.client.HTTPConnection:
    """Make the connection that a URL names, not yet opened."""
    if url.startswith("unix:/"):
        return UnixConnection(url.removeprefix("unix:"), timeout_seconds)
    try:
        parts = urlsplit(url)
        if (parts.scheme, parts.path.strip("/"), parts.query) == ("http", "", "") and parts.hostname:
            return http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_seconds)
    except ValueError:  # a port that is none, half an IPv6 address
        pass
    raise CommandError("the relay's URL is not http://HOST:PORT or unix:/PATH", Exit.USAGE)


def usual_headers(environ: Mapping[str, str]) -> dict[str, str]:
    token = environ.get("RELAY_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise CommandError("RELAY_TOKEN holds characters that no token has", Exit.USAGE)
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    return {"Content-Type": "application/json", **authorization}


def decoded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode(errors="replace")
