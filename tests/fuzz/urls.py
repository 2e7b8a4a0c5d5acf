"""URLs, addresses and proxies: refused in a sentence, or read alike by everybody who reads them after us."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_network
from random import Random
from urllib.parse import urlsplit

from yarl import URL

from relay.config.address import parse_proxy
from relay.config.check import WrongValueError
from relay.egress import Policy, canonical, check_url, judge, refuses_literal
from relay.model import Proxy
from tests.fuzz.damage import Budget, Tally, spliced

HOSTS = [
    "example.com", "a", "xn--bcher-kva.example", "127.0.0.1", "127.1", "2130706433", "0x7f000001",
    "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[::FFFF:7f00:1]", "[64:ff9b::7f00:1]", "[fe80::1%25eth0]",
    "localhost", "8.8.8.8", "[2606:4700:4700::1111]", "169.254.169.254", "a.b.c.d.e.f",
    "a" * 63 + ".example", "1.2.3.4.5", "a-b.example", "\uff11\uff12\uff17.0.0.1", "b\xfccher.example",
    "\u24c1ocalhost", "127\u30020\u30020\u30021",
]  # fmt: skip
RESTS = ("", "/a?b=c", ":8443/")
URLS = [f"{scheme}://{host}{rest}" for scheme in ("https", "http") for host in HOSTS for rest in RESTS]
TOKENS = [
    "@", ":", "/", "//", "\\", "#", "?", "%", "%00", "%2e", "%40", "[", "]", "..", ".", "-", "_", "\t",
    "\n", "\r\n", " ", "\x00", ":443", ":0", ":65536", ":-1", "https:", "user:word@", "\u200b", "\ufe0f",
    "\u212a", "\ud800", "\uff0e", "1e3",
]  # fmt: skip
POLICIES = [
    Policy(),
    Policy(allow_http=True),
    Policy(allow_private=(ip_network("0.0.0.0/0"), ip_network("::/0")), ports=frozenset({443, 8443})),
]
LDH = re.compile(r"(?=.{1,253}\Z)(?:(?!-)[A-Za-z0-9-]{1,63}(?<!-)\.)*(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def run(*, seed: int, count: int | None = None, seconds: float | None = None) -> Tally:
    """No URL is accepted that two parsers read differently, or that leads to a host of no plain form."""
    chance, tally = Random(seed), Tally()
    for _ in Budget(count, seconds):
        url, policy = spliced(chance, URLS, TOKENS), chance.choice(POLICIES)
        try:
            problem = None if check_url(url, policy) is not None else accepted(url, policy)
        except Exception as error:  # noqa: BLE001 - any is a find
            problem = f"raised {error!r}"
        tally.note(url, problem)
    return tally


def accepted(url: str, policy: Policy) -> str | None:
    """Say what is wrong with an accepted URL."""
    by_standard, by_client = urlsplit(url), URL(url, encoded=True)
    host = (by_client.raw_host or "").lower()
    port = by_client.port
    literal = canonical(host)
    standard_port = by_standard.port or {"https": 443, "http": 80}[by_client.scheme]
    verdicts = {
        "parsers differ on the host": by_standard.hostname == host,
        "parsers differ on the port": standard_port == port,
        "has a user": by_client.user is None and by_standard.username is None,
        "is not https": by_client.scheme == "https" or (policy.allow_http and is_local(host)),
        "has a forbidden port": port is not None and (policy.ports is None or port in policy.ports),
        "has a host of no plain form": literal is not None or LDH.fullmatch(host) is not None,
        "has a name that is a number": literal is not None or not host.rpartition(".")[2].isdigit(),
        "is longer than it may be": len(url) <= 2048,
        "is not sent as it was given": by_client.raw_path_qs in {"/", *tails(url)},
        "is refused and no address": not refuses_literal(url, ()) or literal is not None,
    }
    return next((problem for problem, holds in verdicts.items() if not holds), None)


def tails(url: str) -> set[str]:
    """Return what may be asked for: all behind host and port, less the sign of an empty query."""
    rest = url.partition("://")[2]
    tail = rest[len(re.split(r"[/?]", rest, maxsplit=1)[0]) :]
    return {each.removesuffix("?") for each in (tail, "/" + tail)} | {tail}


def is_local(host: str) -> bool:
    literal = canonical(host)
    return host == "localhost" or (literal is not None and literal.is_loopback)


ADDRESSES = [
    "127.0.0.1", "8.8.8.8", "::1", "::ffff:127.0.0.1", "2606:4700:4700::1111", "169.254.169.254", "fe80::1",
    "64:ff9b::808:808", "2002:808:808::", "255.255.255.255", "fd00:ec2::254", "100.100.100.200",
    "::ffff:808:808",
]  # fmt: skip
ADDRESS_TOKENS = [
    ".", ":", "::", "0", "00", "0x", "%", "%eth0", "/", " ", "\n", "ffff", "a9fe", "\u0661", "-", "+", "e",
]  # fmt: skip


def run_addresses(*, seed: int, count: int | None = None, seconds: float | None = None) -> Tally:
    """No text is allowed that is not one address in its one spelling, public or opened."""
    chance, tally = Random(seed), Tally()
    everything = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    for _ in Budget(count, seconds):
        text = spliced(chance, ADDRESSES, ADDRESS_TOKENS)
        problem = None
        try:
            if judge(text, ()) is None:
                problem = None if public(text) else "is allowed and not public"
            elif judge(text, everything) is None:
                ip = canonical(text)
                problem = None if ip is not None and is_openable(ip) else "is opened"
        except Exception as error:  # noqa: BLE001 - any is a find
            problem = f"raised {error!r}"
        tally.note(text, problem)
    return tally


def public(text: str) -> bool:
    ip = canonical(text)
    return ip is not None and ip.is_global and not ip.is_multicast and not ip.is_link_local


def is_openable(ip: IPv4Address | IPv6Address) -> bool:
    shared = ip.version == 4 and ip in ip_network("100.64.0.0/10")
    return ip.is_private or ip.is_loopback or shared


PROXIES = [
    "http://proxy.internal:3128", "http://user:word@proxy:80/", "http://[fd00::1]:3128",
    "http://10.0.0.1:3128", "http://169.254.169.254:80", "http://a%40b:c@127.0.0.1:1", "https://proxy:443",
    "socks5://proxy:1080",
]  # fmt: skip


def run_proxies(*, seed: int, count: int | None = None, seconds: float | None = None) -> Tally:
    """A proxy is refused without a word of it, or has a host and a port; never at a metadata service."""
    chance, tally = Random(seed), Tally()
    for _ in Budget(count, seconds):
        text = spliced(chance, PROXIES, TOKENS)
        problem = None
        try:
            proxy = parse_proxy(text)
        except WrongValueError as error:
            problem = "shows its password" if "word" in str(error) else None
        except Exception as error:  # noqa: BLE001 - any is a find
            problem = f"raised {error!r}"
        else:
            problem = None if usable(proxy) else "is taken"
        tally.note(text, problem)
    return tally


def usable(proxy: Proxy) -> bool:
    ip = canonical(proxy.host)
    opened = ip is None or judge(str(ip), (ip_network(ip),)) is None
    plain = ip is not None or LDH.fullmatch(proxy.host) is not None
    url = URL.build(scheme="http", host=proxy.host, port=proxy.port)
    return opened and plain and 1 <= proxy.port <= 65535 and url.raw_host == proxy.host
