"""Where requests may go: every range at both edges, and the texts of addresses and URLs."""

import random
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import pytest

from relay.egress import _REFUSED, Policy, check_url, judge
from tests.figures import figure

EVERYTHING = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))

# range, reason, whether what lies just before and just after it may be dialled
IPV4 = [
    ("0.0.0.0/8", "reserved", None, True),
    ("10.0.0.0/8", "private", True, True),
    ("100.64.0.0/10", "private", True, True),
    ("127.0.0.0/8", "loopback", True, True),
    ("168.63.129.16/32", "metadata", True, True),
    ("169.254.0.0/16", "link_local", True, True),
    ("172.16.0.0/12", "private", True, True),
    ("192.0.0.0/24", "reserved", True, True),
    ("192.0.2.0/24", "reserved", True, True),
    ("192.31.196.0/24", "reserved", True, True),
    ("192.52.193.0/24", "reserved", True, True),
    ("192.88.99.0/24", "reserved", True, True),
    ("192.168.0.0/16", "private", True, True),
    ("192.175.48.0/24", "reserved", True, True),
    ("198.18.0.0/15", "reserved", True, True),
    ("198.51.100.0/24", "reserved", True, True),
    ("203.0.113.0/24", "reserved", True, True),
    ("224.0.0.0/4", "multicast", True, False),
    ("240.0.0.0/4", "reserved", False, None),
]
IPV6 = [
    ("1fff::/16", "reserved", False, True),
    ("2001::/23", "reserved", True, True),
    ("2001:db8::/32", "reserved", True, True),
    ("2002::/16", "reserved", True, True),
    ("2620:4f:8000::/48", "reserved", True, True),
    ("3fff::/20", "reserved", True, True),
    ("4000::/3", "reserved", True, False),
    ("fc00::/7", "private", False, False),
    ("fe80::/10", "link_local", False, False),
    ("fec0::/10", "reserved", False, False),
    ("ff00::/8", "multicast", False, None),
]


@pytest.mark.parametrize(("text", "reason", "before", "after"), IPV4 + IPV6)
def test_a_range_is_refused_exactly_to_its_edges(text, reason, before, after):
    """One address too few lets a request into a network; one too many keeps it from a customer."""
    network = ip_network(text)
    first, last = network.network_address, network.broadcast_address
    if text == "0.0.0.0/8":
        first += 1  # its first address has a reason of its own

    assert judge(str(first), ()) == judge(str(last), ()) == reason
    if before is not None:
        assert (judge(str(first - 1), ()) is None) is before
    if after is not None:
        assert (judge(str(last + 1), ()) is None) is after


SINGLE = {
    "0.0.0.0", "::", "::1", "169.254.169.254", "169.254.170.2", "100.100.100.200",  # noqa: S104 - judged
    "fd00:ec2::254", "fd20:ce::254",
}  # fmt: skip


def test_every_range_of_the_table_is_among_those_tested_here():
    """A range that is added one day gets its edges tested, too."""
    tested = {ip_network(text) for text, *_ in IPV4 + IPV6} | {ip_network(text) for text in SINGLE}
    edges = [(str(network.network_address), str(network.broadcast_address)) for network, _ in _REFUSED]
    exact = sum(judge(first, ()) is not None and judge(last, ()) is not None for first, last in edges)
    figure("ranges refused to both edges / all", f"{exact} / {len(_REFUSED)}")

    assert {network for network, _ in _REFUSED} - tested == set()
    assert exact == len(_REFUSED)


def test_verdicts_change_at_edges_and_nowhere_else():
    """Between two edges every address has one verdict; drawn from everywhere, most from near the edges."""
    numbers = random.Random(20260115)
    for family, networks in ((IPv4Address, IPV4), (IPv6Address, IPV6)):
        bits = family(0).max_prefixlen
        ranges = [ip_network(text) for text, *_ in networks]
        centres = [int(edge) for each in ranges for edge in (each.network_address, each.broadcast_address)]
        centres += [numbers.getrandbits(bits) for _ in range(100)]
        for centre in centres:
            for distance in (0, 1, numbers.getrandbits(4), numbers.getrandbits(16)):
                address = family((centre + distance) % (1 << bits))
                inside = any(address in each for each in ranges)
                beyond = family is IPv6Address and address not in IPv6Network("2000::/3")

                assert (judge(str(address), ()) is not None) is (inside or beyond), address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("0.0.0.0", "unspecified"),  # noqa: S104 - judged, never bound
        ("::", "unspecified"),
        ("169.254.169.254", "metadata"),
        ("169.254.170.2", "metadata"),
        ("169.254.0.1", "link_local"),
        ("100.100.100.200", "metadata"),
        ("168.63.129.16", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("fd20:ce::254", "metadata"),
        ("fe80::1", "link_local"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("203.0.113.7", "reserved"),
        ("2002:7f00:1::", "reserved"),  # 6to4 of 127.0.0.1
        ("2002:808:808::", "reserved"),  # and of a public address
        ("64:ff9b::a9fe:a9fe", "reserved"),  # NAT64 of the metadata service
        ("64:ff9b:1::1", "reserved"),
        ("2001:0:7f00:1::", "reserved"),  # Teredo
        ("fec0::1", "reserved"),  # site-local
        ("::7f00:1", "reserved"),  # IPv4-compatible
        ("100::1", "reserved"),
        ("5f00::1", "reserved"),
    ],
)
def test_what_nothing_may_open_stays_refused(address, reason):
    """A cloud's metadata service hands its keys to whoever asks: no line of a config may lead there."""
    assert judge(address, EVERYTHING) == judge(address, (ip_network(address),)) == reason


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("10.1.2.3", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd12:3456::1", "private"),
    ],
)
def test_loopback_and_private_addresses_are_opened_by_their_range_alone(address, reason):
    """Receivers in the own network are the operator's to allow, one range at a time."""
    assert judge(address, ()) == reason
    assert judge(address, (ip_network(address),)) is None
    assert judge(address, (ip_network("10.99.0.0/16"), ip_network("fd99::/16"))) == reason


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "192.0.1.1", "2606:4700:4700::1111", "2a00::1"])
def test_a_public_address_may_be_dialled(address):
    """A guard that refuses everything would pass every other test here."""
    assert judge(address, ()) is None


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:7f00:1", "loopback"),
        ("::ffff:a9fe:a9fe", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("::ffff:8.8.8.8", None),
    ],
)
def test_a_mapped_address_is_judged_as_the_ipv4_address_it_reaches(address, reason):
    """The kernel connects ::ffff:127.0.0.1 to 127.0.0.1."""
    assert judge(address, ()) == reason


@pytest.mark.parametrize(
    "text",
    [
        "", "localhost", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1",
        "127.0.0.01", "127.0.0.1.", "127.0.0.1:80", " 8.8.8.8", "8.8.8.8\n", "8.8.8.8%eth0", "fe80::1%eth0",
        "2a00::1%1", "[2a00::1]", "2A00::1", "2a00:0::1", "2a00:0:0:0:0:0:0:1", "0:0:0:0:0:ffff:a9fe:a9fe",
        "::FFFF:8.8.8.8", "١٢٧.0.0.1", "8.8.8.8/32",
    ],
)  # fmt: skip
def test_what_is_not_one_plain_address_is_refused(text):
    """A text that this judge and the kernel could read differently is a way around the judge."""
    assert judge(text, EVERYTHING) == "not_an_address"


def test_nothing_is_allowed_that_is_not_global():
    """The tables were written by hand; this compares them with the ones of Python."""
    numbers = random.Random(20260115)
    addresses = [IPv4Address(numbers.getrandbits(32)) for _ in range(4000)]
    addresses += [IPv6Address(numbers.getrandbits(128)) for _ in range(1000)]
    addresses += [IPv6Address(1 << 125 | numbers.getrandbits(125)) for _ in range(4000)]

    allowed = [address for address in addresses if judge(str(address), ()) is None]

    assert all(address.is_global and not address.is_multicast for address in allowed)
    assert len(allowed) > 6000


def test_api_endpoints_enter_private_ranges_only_when_told_so():
    """Who may register an endpoint need not be who wrote the config."""
    ranges = (ip_network("10.1.0.0/16"),)
    closed, opened = Policy(allow_private=ranges), Policy(allow_private=ranges, allow_private_for_api=True)

    assert closed.opened_to("config", plain=False) == opened.opened_to("config", plain=False) == ranges
    assert (closed.opened_to("api", plain=False), opened.opened_to("api", plain=False)) == ((), ranges)


def test_http_opens_this_machine_and_no_range_besides():
    """A range that was opened for https was not opened for sending events in clear."""
    policy = Policy(allow_private=(ip_network("10.1.0.0/16"),), allow_http=True)

    assert policy.opened_to("config", plain=True) == (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    assert policy.opened_to("api", plain=True) == ()


OPEN = Policy(allow_http=True)


@pytest.mark.parametrize(
    ("url", "policy"),
    [
        ("https://example.com", Policy()),
        ("HTTPS://EXAMPLE.com:8443/a/b?c=d&e=%20", Policy()),
        ("https://xn--bcher-kva.example/", Policy()),
        ("https://a/", Policy()),
        (f"https://{'a' * 63}.example/", Policy()),
        ("https://8.8.8.8/", Policy()),
        ("https://[2a00::1]:65535/", Policy()),
        ("https://[2A00::1]/", Policy()),
        ("https://example.com:1/", Policy()),
        ("https://example.com/" + "a" * 2028, Policy()),
        ("https://example.com/", Policy(ports=frozenset({443}))),
        ("https://example.com:8443/", Policy(ports=frozenset({8443}))),
        ("http://localhost/", OPEN),
        ("http://LOCALHOST:8080/", OPEN),
        ("http://127.0.0.1:8080/", OPEN),
        ("http://127.9.9.9/", OPEN),
        ("http://[::1]:8080/", OPEN),
    ],
)
def test_a_proper_url_is_accepted(url, policy):
    """What a receiver gives out as its URL should simply work."""
    assert check_url(url, policy) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/" + "a" * 2029, "longer"),
        ("https://example.com/a b", "space"),
        ("https://example.com\\@evil.example/", "backslash"),
        ("https://exämple.com/", "ASCII"),
        ("https://example.com/\n", "space"),
        ("https://\uff11\uff12\uff17.0.0.1/", "ASCII"),
        ("https://example.com/#a", "fragment"),
        ("https://example.com/#", "fragment"),
        ("https://user:word@example.com/", "user name"),
        ("https://127.0.0.1@example.com/", "user name"),
        ("https://@example.com/", "user name"),
        ("", "form"),
        ("example.com", "form"),
        ("//example.com/", "form"),
        ("https:example.com", "form"),
        ("https:/example.com", "form"),
        ("ftp://example.com/", "https://"),
        ("file:///etc/passwd", "host"),
        ("http://example.com/", "https://"),
        ("http://localhost/", "https://"),
        ("http://127.0.0.1/", "https://"),
        ("https:///path", "host"),
        ("https://:443/", "host"),
        ("https://?a", "host"),
        ("https://-a.example/", "host"),
        ("https://a-.example/", "host"),
        ("https://a..example/", "host"),
        ("https://.example/", "host"),
        ("https://example.com./", "host"),
        ("https://a_b.example/", "host"),
        ("https://a%2eexample/", "host"),
        (f"https://{'a' * 64}.example/", "host"),
        ("https://" + "a." * 126 + "aa/", "host"),
        ("https://127.1/", "host"),
        ("https://2130706433/", "host"),
        ("https://0x7f000001/", "host"),
        ("https://0x7f.0.0.0x1/", "host"),
        ("https://0177.0.0.1/", "host"),
        ("https://a.1/", "host"),
        ("https://a.0x/", "host"),
        ("https://[127.0.0.1]/", "host"),
        ("https://[fe80::1%25eth0]/", "host"),
        ("https://[0:0:0:0:0:0:0:1]/", "host"),
        ("https://[example]/", "host"),
        ("https://[]/", "host"),
        ("https://[::1/", "read"),
        ("https://::1/", "read"),
        ("https://example.com:/", "read"),
        ("https://example.com:a/", "read"),
        ("https://example.com:-1/", "read"),
        ("https://example.com:0/", "port"),
        ("https://example.com:65536/", "port"),
        ("https://example.com:443:443/", "read"),
    ],
)
def test_a_wrong_url_is_refused_in_one_sentence(url, words):
    """What two programs read differently is how requests get to where nobody meant them to go."""
    problem = check_url(url, Policy())

    assert problem is not None
    assert words in problem


@pytest.mark.parametrize("host", ["example.com", "10.0.0.1", "localhost.example", "128.0.0.1", "[fe80::1]"])
def test_http_is_for_loopback_alone(host):
    """Without TLS anybody on the way reads the event and its signatures."""
    problem = check_url(f"http://{host}/", OPEN)

    assert problem is not None
    assert "https://" in problem


@pytest.mark.parametrize("url", ["https://example.com:8443/", "https://example.com/"])
def test_a_port_that_is_not_listed_is_refused(url):
    """A list of ports keeps a URL from speaking to databases and mail servers."""
    problem = check_url(url, Policy(ports=frozenset({9443})))

    assert problem is not None
    assert "[egress] ports" in problem
