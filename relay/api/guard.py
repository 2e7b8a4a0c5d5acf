"""Who may talk to the API: every request comes in, and goes on or is refused before its body is read.

Against pages that a browser on the same machine was tricked into (DNS rebinding, forged forms): `Host`,
`Origin`, `Sec-Fetch-Site`. Against everyone else on the machine: tokens. Whatever happens behind, the
answer to an error is `application/problem+json`.
"""

import hmac
import logging
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from relay.api import bodies
from relay.api.answers import unavailable
from relay.api.problems import Problem, of_framework
from relay.model import Secret
from relay.outbox import UnavailableError

log = logging.getLogger("relay.api")

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:@\s]+)(?::[0-9]*)?")
CLOSE = {"Connection": "close"}


class Access:
    """Whom the guard lets in; a new config changes it."""

    def __init__(self, hosts: AbstractSet[str] | None, tokens: Sequence[Secret] = ()) -> None:
        self.change(hosts, tokens)

    def change(self, hosts: AbstractSet[str] | None, tokens: Sequence[Secret]) -> None:
        """Let these in from now on; `hosts` None means that the listener is a unix socket, which has none."""
        self.hosts = hosts
        self.keys = [token.reveal().encode() for token in tokens]


def guard(access: Access) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            refuse_unfit(request, access.hosts)
            if access.keys and belongs_to_service(request):
                refuse_unknown(request, access.keys)
            return await handler(request)
        except Problem as problem:
            return problem.response()
        except web.HTTPException as error:
            return of_framework(error).response()
        except UnavailableError as error:
            return unavailable(str(error)).response()
        except Exception:
            log.exception("request_failed", extra={"method": request.method, "path": request.path})
            return Problem(500, "the relay failed on this request; its log says how").response()

    return check


def refuse_unfit(request: web.Request, hosts: AbstractSet[str] | None) -> None:
    """Raise for what a browser was tricked into, and for a body that would have to be unpacked."""
    headers = request.headers
    host = headers.get("Host", "").lower()
    if hosts is not None and not (host_name(host) in hosts and host_name(authority(request, host)) in hosts):
        raise Problem(421, "the Host header names another host; add it to server.allowed_hosts if it is ours")
    origin = headers.get("Origin")
    if origin is not None and origin.lower() != f"http://{host}":
        raise Problem(403, "pages of other origins may not talk to the relay")
    if headers.get("Sec-Fetch-Site", "none") not in {"same-origin", "none"} and not opens_page(request):
        raise Problem(403, "pages of other sites may not talk to the relay")
    if "Content-Encoding" in headers:
        raise Problem(415, "send the body as it is, without Content-Encoding")
    if headers.get("Transfer-Encoding", "chunked").strip().lower() != "chunked":
        raise Problem(501, "the only Transfer-Encoding taken here is chunked")
    if "Transfer-Encoding" in headers and request.version < HttpVersion11:
        raise Problem(400, "HTTP/1.0 has no Transfer-Encoding", kind="not-http", headers=CLOSE)
    if headers.get("Expect", bodies.CONTINUE).lower() != bodies.CONTINUE:
        raise Problem(417, f"the only expectation known here is {bodies.CONTINUE}")


def opens_page(request: web.Request) -> bool:
    """Tell whether somebody follows a link to the status page: whoever linked to it sees nothing of it."""
    fetched = {name: request.headers.get(f"Sec-Fetch-{name}") for name in ("Mode", "Dest")}
    return (
        request.method == "GET"
        and request.path == "/"
        and fetched == {"Mode": "navigate", "Dest": "document"}
    )


def authority(request: web.Request, host: str) -> str:
    """Return whom the target of a request names; only a whole URL names any but the Host (RFC 9112 3.2)."""
    target = request.raw_path
    if target.startswith("/") or target == "*":
        return host
    return (request.url.authority if "://" in target else target).lower()


def belongs_to_service(request: web.Request) -> bool:
    """Tell whether tokens guard this: by the route that was found, however its path was spelled."""
    resource = request.match_info.route.resource
    return request.path.startswith("/v1") or (resource is not None and resource.canonical.startswith("/v1"))


def refuse_unknown(request: web.Request, keys: Sequence[bytes]) -> None:
    """Raise unless the request carries one of the tokens; takes as long for every wrong one."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = token.strip().encode(errors="surrogateescape")
    # Every key is compared, so that time tells neither which nor how much of it was right.
    matches = [hmac.compare_digest(given, key) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Problem(
            401, "send Authorization: Bearer with one of the tokens", headers={"WWW-Authenticate": "Bearer"}
        )


@lru_cache(maxsize=64)
def host_name(host: str) -> str:
    """Drop port and brackets of a Host header (RFC 9110 section 7.2); what has another form names nobody."""
    match = HOST.fullmatch(host)
    return match["name"].strip("[]") if match else ""
