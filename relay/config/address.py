"""Addresses: where the relay listens, which hosts are its own, which private ranges it may enter, its proxy.

Pure: text of the config in, values out; `WrongValueError` says why a text will not do. What may be dialled is
judged by `relay.egress`.
"""

import re
from base64 import b64encode
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv6Address,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from relay import egress
from relay.config.check import WrongValueError, quoted
from relay.model import Proxy, Secret

_HOST_AND_PORT = re.compile(r"(?:\[(?P<ipv6>[^\]]*)\]|(?P<name>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
_PROXY = re.compile(r"(?i:http)://(?:(?P<login>[!-.0-?A-~]*)@)?(?P<address>[^@/]+)/?")
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)(?:(?!-)[A-Za-z0-9-]{1,63}(?<!-)\.)*(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_SOCKET_PATH_BYTES = 107  # what the address of a unix socket has room for on Linux


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the relay listens: the unix socket at `path` when there is one, else host and port."""

    host: str = ""
    port: int = 0  # 0 takes any free one
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach it."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Read "host:port", "[ipv6]:port" or "unix:/path"."""
    if text.startswith("unix:"):
        return Address(path=_socket_path(text))
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise WrongValueError(
            f'{quoted(text)} is not an address such as "127.0.0.1:8484" or "unix:/run/relay/relay.sock"'
        )
    ipv6 = match["ipv6"]
    if not (_is_host(match["name"]) if ipv6 is None else _is_ip(ipv6, IPv6Address)):
        raise WrongValueError(f"{quoted(text)} does not begin with a host name or an IP address")
    return Address(host=(ipv6 or match["name"]).lower(), port=int(match["port"]))


def parse_path(text: str) -> Path:
    """Read the path of a file."""
    if not text or "\0" in text:
        raise WrongValueError("is not a path")
    return Path(str(text))


def parse_host(text: str) -> str:
    """Read what a Host header may name, without its port, which is not compared."""
    bare = text.removeprefix("[").removesuffix("]")
    if not (_is_host(text) or _is_ip(bare, IPv6Address)):
        raise WrongValueError(f"{quoted(text)} is not a host name or an IP address without a port")
    return bare.lower()


def parse_database(text: str) -> Secret:
    """Read "postgresql://user:password@host:port/database?…"; a mistake shows nothing of it."""
    try:
        parts = urlsplit(text)
        cache = dict(parse_qsl(parts.query)).get("statement_cache_size", "0")
        parts.port  # noqa: B018 - raises when it is none
    except ValueError:
        raise WrongValueError("is not an address") from None
    if parts.scheme not in {"postgresql", "postgres"} or parts.fragment:
        raise WrongValueError('is not an address such as "postgresql://relay@db.internal/relay"')
    if not (cache.isascii() and cache.isdigit()):
        raise WrongValueError("says statement_cache_size, which is a whole number; 0 behind a pooler")
    return Secret(str(text))


def parse_proxy(text: str) -> Proxy:
    """Read "http://host:port" or "http://user:password@host:port"; a mistake shows nothing of it."""
    match = _PROXY.fullmatch(text)
    place = _HOST_AND_PORT.fullmatch(match["address"]) if match is not None else None
    if match is None or place is None:
        raise WrongValueError('is not a proxy such as "http://proxy.internal:3128"')
    host = (place["name"] if place["ipv6"] is None else place["ipv6"]).lower()
    ip = egress.canonical(host)
    if ip is None and (place["ipv6"] is not None or not _is_host(host)):
        raise WrongValueError("does not name a proxy by a host name or an IP address")
    if not 1 <= int(place["port"]) <= 65535:
        raise WrongValueError("has a port outside 1 to 65535")
    if ip is not None and (reason := egress.judge(str(ip), (ip_network(ip),))) is not None:
        raise WrongValueError(f"is at an address that stays refused whatever the config says ({reason})")
    login = match["login"]
    word = b64encode(unquote(login).encode()).decode() if login is not None else None
    return Proxy(
        host=host,
        port=int(place["port"]),
        authorization=Secret(f"Basic {word}") if word is not None else None,
    )


def parse_network(text: str) -> egress.Network:
    """Read a range of addresses; one that stays refused whatever the config says is a mistake."""
    try:
        network = ip_network(text)
    except ValueError:
        raise WrongValueError(f"{quoted(text)} is not a range of addresses{_meant_range(text)}") from None
    reason = egress.judge(str(network.network_address), (network,))
    if reason is not None:
        raise WrongValueError(f"{quoted(text)} stays refused whatever the config says ({reason})")
    return network


def _socket_path(text: str) -> Path:
    path = text.removeprefix("unix:")
    if not path or "\0" in path or len(path.encode()) > _SOCKET_PATH_BYTES:
        raise WrongValueError(
            f"{quoted(text)} does not name a unix socket, a path of 1 to {_SOCKET_PATH_BYTES} bytes"
        )
    return Path(path)


def _is_host(text: str) -> bool:
    # A name that ends in a number is an address to some programs and a name to others.
    if text.rpartition(".")[2].isdigit():
        return _is_ip(text, IPv4Address)
    return _HOST_NAME.fullmatch(text) is not None


def _is_ip(text: str, version: type[IPv4Address] | type[IPv6Address]) -> bool:
    try:
        version(text)
    except ValueError:
        return False
    return True


def _meant_range(text: str) -> str:
    """10.1.2.3/16 names one address inside a range: say which range."""
    try:
        return f'; did you mean "{ip_interface(text).network}"?'
    except ValueError:
        return ' such as "10.1.0.0/16"'
