"""Where requests may go: an address or a URL in, the reason why not out.

Two questions, both answered with None for yes. `judge` is asked at every dial, because only there the
address is known that will really be connected to; `check_url` is asked once, when an endpoint is written
down. Nothing here resolves a name, opens a socket or knows whose endpoint it is.

The ranges are the special-purpose registries of IANA as explicit tables: `is_global` alone would let NAT64,
site-local and multicast addresses through, and differs between versions of Python. It is asked last, so that
what a later Python knows to be special is refused too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

_MAX_URL_CHARACTERS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What [egress] in the config says."""

    allow_private: tuple[Network, ...] = ()
    allow_private_for_api: bool = False
    ports: frozenset[int] | None = None  # None: any
    allow_http: bool = False

    def opened_to(self, source: str, *, plain: bool) -> tuple[Network, ...]:
        """Return the ranges that endpoints from "config" or "api" may enter besides the public ones.

        Without TLS (`plain`) it is only ever this machine, which is what `allow_http` is for.
        """
        if source != "config" and not self.allow_private_for_api:
            return ()
        return LOOPBACK if plain else self.allow_private


def _ranges(reason: str, *networks: str) -> tuple[tuple[Network, str], ...]:
    return tuple((ip_network(network), reason) for network in networks)


LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))

# The first range that holds an address names the reason: single addresses stand before what surrounds them.
_REFUSED = (
    *_ranges("unspecified", "0.0.0.0/32", "::/128"),
    *_ranges(
        "metadata", "169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16",
        "fd00:ec2::254", "fd20:ce::254",
    ),
    *_ranges("link_local", "169.254.0.0/16", "fe80::/10"),
    *((network, "loopback") for network in LOOPBACK),
    *_ranges("private", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    *_ranges("multicast", "224.0.0.0/4", "ff00::/8"),
    *_ranges(
        "reserved",
        "0.0.0.0/8", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
        "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    ),
)  # fmt: skip
_OPENABLE = frozenset({"loopback", "private"})
# Everything else of IPv6 is unassigned, translated or tunnelled to somewhere we could not judge.
_GLOBAL_IPV6 = IPv6Network("2000::/3")


def canonical(address: str) -> IPv4Address | IPv6Address | None:
    """Read an address in its one spelling, or return None; of a mapped one the IPv4 address inside."""
    try:
        ip = ip_address(address)
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    if mapped is not None:
        # Python before 3.13 writes these in hex, later ones and the system with dots.
        high, low = divmod(int(mapped), 1 << 16)
        return mapped if address in {f"::ffff:{mapped}", f"::ffff:{high:x}:{low:x}"} else None
    # What has two spellings could be read as two addresses; a zone names an interface of this machine.
    return ip if address == str(ip) and "%" not in address else None


def judge(address: str, allow: Sequence[Network]) -> str | None:
    """Return why this address must not be dialled, or None; `allow` opens only loopback and private ones."""
    ip = canonical(address)
    if ip is None:
        return "not_an_address"
    reason = _special(ip)
    if reason in _OPENABLE and any(ip in network for network in allow):
        return None
    return reason


@lru_cache(maxsize=4096)
def _special(ip: IPv4Address | IPv6Address) -> str | None:
    for network, reason in _REFUSED:
        if ip in network:
            return reason
    if (ip.version == 6 and ip not in _GLOBAL_IPV6) or not ip.is_global:
        return "reserved"
    return None


_URL = re.compile(r"(?P<scheme>[A-Za-z]+)://(?P<authority>[^/?#]*)(?P<rest>[^#]*)(?P<fragment>#.*)?")
_AUTHORITY = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>[0-9]{1,5}))?")
_PRINTABLE = re.compile(r"[!-\[\]-~]*")  # ASCII without space and backslash
_LABEL = "(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*{_LABEL}")
_NUMERIC = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")


def check_url(url: str, policy: Policy) -> str | None:
    """Say in one sentence what is wrong with an endpoint's URL, or None.

    The raw text is looked at, before any parser: a host that two parsers read differently is refused.
    """
    if len(url) > _MAX_URL_CHARACTERS:
        return f"is longer than {_MAX_URL_CHARACTERS} characters"
    if not _PRINTABLE.fullmatch(url):
        return "holds a space, a backslash or a character beyond printable ASCII"
    match = _URL.fullmatch(url)
    if match is None:
        return "is not of the form https://host/path"
    if match["fragment"] is not None:
        return "has a fragment (#…), which is never sent"
    if "@" in match["authority"]:
        return "holds a user name or password: put it into a header"
    return _check_place(match["scheme"].lower(), match["authority"], policy)


def _check_place(scheme: str, authority: str, policy: Policy) -> str | None:
    """Look at scheme, host and port, which depend on each other and on the policy."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return "has a host or port that cannot be read"
    host = match["host"]
    if not (_is_name(host) or is_literal(host)):
        return "has a host that is neither a name nor an IP address in its usual form"
    if scheme != "https" and not (scheme == "http" and policy.allow_http and is_loopback(host)):
        return "must begin with https://" + (
            " (http:// only to localhost or a loopback address)" if policy.allow_http else ""
        )
    port = int(match["port"]) if match["port"] is not None else {"https": 443, "http": 80}[scheme]
    if not 1 <= port <= 65535:
        return "has a port outside 1 to 65535"
    if policy.ports is not None and port not in policy.ports:
        return f"has port {port}, which is not one of [egress] ports"
    return None


def refuses_literal(url: str, allow: Sequence[Network]) -> bool:
    """Tell whether a URL that `check_url` has nothing against names an address that may not be dialled."""
    match = _URL.fullmatch(url)
    place = _AUTHORITY.fullmatch(match["authority"]) if match is not None else None
    host = place["host"] if place is not None else ""
    return is_literal(host) and judge(host.strip("[]").lower(), allow) is not None


def _is_name(host: str) -> bool:
    # A name that ends in a number is an address to some programs and a name to others.
    return _NAME.fullmatch(host) is not None and not _NUMERIC.fullmatch(host.rpartition(".")[2])


def is_literal(host: str) -> bool:
    """Tell whether the host of a URL is an address in its one spelling, IPv6 in brackets."""
    if host.startswith("["):
        return ":" in host and canonical(host[1:-1].lower()) is not None
    return ":" not in host and canonical(host) is not None


def is_loopback(host: str) -> bool:
    """Tell whether the host of a URL is this machine by its very text."""
    return host.lower() == "localhost" or judge(host.strip("[]").lower(), ()) == "loopback"
