"""Nothing is sent where it does not belong: forbidden places, however written and whenever they turn up."""

import ast
import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from ipaddress import ip_network
from pathlib import Path

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

import relay
from relay.api.webhooks import _met
from relay.dialling import Guard, Way, chosen
from relay.egress import Policy
from relay.lookup import Names
from tests.figures import figure
from tests.hostile import LOOPBACK, HostileReceiver, loopback_sender, message, to

# Of every class that is refused, and every cloud's metadata service.
FORBIDDEN = (
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200",  # noqa: S104 - no bind
    "127.0.0.1", "127.1.2.3", "127.255.255.254", "168.63.129.16", "169.254.0.1", "169.254.169.254",
    "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.0.1",
    "192.168.255.255", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255",
    "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:7f00:1",
    "::ffff:a9fe:a9fe", "::ffff:a00:1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:db8::1", "2002:7f00:1::",
    "2002:a9fe:a9fe::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fd12:3456::1",
    "fd20:ce::254", "fe80::1", "fec0::1", "ff02::1",
)  # fmt: skip
# Ways to write 127.0.0.1 and 169.254.169.254, or to lead a reader of URLs astray.
SPELLINGS = (
    "2130706433", "0x7f000001", "0x7F.0x0.0x0.0x1", "017700000001", "0177.0.0.1", "127.1", "127.0.1",
    "127.0.0.1.", "127.0.0.01", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518",
    "169.16689662", "[::1%25lo]", "[fe80::1%25eth0]", "[::ffff:7f00:0001]", "[::FFFF:127.0.0.1]",
    "[0:0:0:0:0:ffff:a9fe:a9fe]", "[0000::0001]", "[0:0:0:0:0:0:0:1]", "localhost.",
    "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "\u24dbocalhost", "user@127.0.0.1",
    "example.com@127.0.0.1", "127.0.0.1#@example.com", "127.0.0.1\\@example.com", "example.com%40127.0.0.1",
    "127.0.0.1%00.example.com", "127.0.0.1%09", "[::]", "[::127.0.0.1]", "0", "0.0.0.0.",
)  # fmt: skip


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every connection that is begun in the test, by its address; the canary that no firewall hides."""
    dialled: list[object] = []
    connect = socket.socket.connect

    def noting(self: socket.socket, address: object) -> None:
        if self.type == socket.SOCK_STREAM and self.family != socket.AF_UNIX:
            dialled.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noting)
    return dialled


@pytest.fixture
async def receiver() -> AsyncIterator[HostileReceiver]:
    async with HostileReceiver("turning.example", "*.turning.example", "many.example") as receiver:
        yield receiver


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("source", ["config", "api"])
async def test_no_forbidden_address_is_dialled_however_it_is_come_by(dialled, source, caplog):
    """As the URL's own text, as a name's only address, as one among good ones: it is never even tried."""
    urls = [f"https://{bracketed(address)}:9/" for address in FORBIDDEN]
    urls += [f"https://{spelling}:9/" for spelling in SPELLINGS]
    urls += [
        f"https://{address.replace(':', '-').replace('.', '-')}-only.example:9/" for address in FORBIDDEN
    ]
    urls += [
        f"https://{address.replace(':', '-').replace('.', '-')}-among.example:9/" for address in FORBIDDEN
    ]
    addresses = {address.replace(":", "-").replace(".", "-"): address for address in FORBIDDEN}

    def ask(host: str) -> Sequence[str]:
        label = host.removesuffix(".example")
        if label.endswith("-only"):
            return [addresses[label.removesuffix("-only")]]
        return ["8.8.8.8", addresses[label.removesuffix("-among")], "1.1.1.1"]

    async with loopback_sender(Policy(), names=Names(ask)) as sender:
        outcomes = [
            await sender.send(to(url, id=str(number), source=source, timeout_seconds=1), message())
            for number, url in enumerate(urls)
        ]
    figure(f"forbidden addresses dialled / tried ({source})", f"{len(dialled)} / {len(urls)}")

    assert dialled == []
    assert {outcome.reason for outcome in outcomes} == {"blocked_address"}
    assert not caplog.records  # no traceback, no surprise


@pytest.mark.parametrize(
    "answers",
    [["127.0.0.1", "::1"], ["10.0.0.1"] * 5, ["8.8.8.8", "fe80::1%lo"], ["127.1"], ["x"], ["8.8.8.8", ""]],
)
async def test_a_name_of_nothing_but_bad_answers_is_one_plain_refusal(dialled, answers, caplog):
    """Some clients fail with an error of their own when every address of a name is refused."""
    async with loopback_sender(Policy(), names=Names(lambda host: answers)) as sender:
        outcome = await sender.send(to("https://evil.example/"), message())

    assert (outcome.reason, dialled, caplog.records) == ("blocked_address", [], [])


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "a.localhost", "ip6-localhost"])
async def test_names_of_this_machine_lead_nowhere(dialled, host):
    """Whatever the system makes of them, it is this machine or nothing."""
    async with loopback_sender(Policy()) as sender:
        outcome = await sender.send(to(f"https://{host}:9/", timeout_seconds=3), message())

    assert outcome.reason in {"blocked_address", "dns_error"}
    assert dialled == []


@asynccontextmanager
async def canaries(port: int, *hosts: str) -> AsyncIterator[list[str]]:
    """Listen where nobody may come; yields who came nevertheless."""
    reached: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(writer.get_extra_info("sockname")[0])
        writer.close()

    async with AsyncExitStack() as servers:
        for host in hosts:
            await servers.enter_async_context(await asyncio.start_server(note, host, port))
        yield reached


async def test_a_name_that_turns_between_any_two_look_ups_is_followed_nowhere(receiver):
    """DNS rebinding: good when it is judged, bad when it is dialled, back before anybody looks."""
    chance = random.Random(20260115)
    good, bad = "127.0.0.1", ("127.0.0.2", "127.0.0.3")
    asked = []

    def ask(host: str) -> Sequence[str]:
        answer = chance.choice(
            [[good], [chance.choice(bad)], [good, *bad], [bad[0], good], [good] * 9 + [bad[1]]]
        )
        asked.append(answer)
        return answer

    policy = Policy(allow_private=(ip_network("127.0.0.1/32"),))
    names = Names(ask, fresh_seconds=0)
    endpoints = [
        to(receiver.url("/close", f"n{number}.turning.example"), id=str(number)) for number in range(20)
    ]
    async with canaries(receiver.port, *bad) as reached, loopback_sender(policy, names=names) as sender:

        async def deliver(number: int) -> list[str | None]:
            return [(await sender.send(endpoints[number], message())).reason for _ in range(50)]

        async with asyncio.TaskGroup() as tasks:
            senders = [tasks.create_task(deliver(number)) for number in range(20)]
        reasons = [reason for task in senders for reason in task.result()]
    figure("rebinding flips reached / deliveries", f"{len(reached)} / {len(reasons)}")

    assert reached == []
    assert set(reasons) == {None, "blocked_address"}
    assert len(reasons) == 1000
    assert reasons.count(None) == len(receiver.requests)
    assert len(asked) >= 1000


async def test_a_pooled_connection_stays_where_it_was_judged(receiver):
    """While it is open nobody looks the name up, and it leads to where it led."""
    turning = {"to": "127.0.0.1"}
    policy = Policy(allow_private=(ip_network("127.0.0.1/32"),))
    names = Names(lambda host: [turning["to"]], fresh_seconds=0)
    async with (
        canaries(receiver.port, "127.0.0.2") as reached,
        loopback_sender(policy, names=names) as sender,
    ):
        endpoint = to(receiver.url("/ok", "turning.example"))
        await sender.send(endpoint, message())
        turning["to"] = "127.0.0.2"
        pooled = await sender.send(endpoint, message())
        await sender.change(policy, {"main"})
        fresh = await sender.send(endpoint, message())

    assert (pooled.reason, fresh.reason, reached) == (None, "blocked_address", [])
    assert receiver.connections == 1


async def test_a_range_is_open_to_whom_the_config_says_and_no_further(dialled):
    """Six questions, each of which some guard has answered wrongly."""
    ten, api = Policy(allow_private=(ip_network("10.1.0.0/16"),)), "api"
    wide = Policy(allow_private=(ip_network("0.0.0.0/0"), ip_network("::/0")), allow_private_for_api=True)
    asked = [
        (ten, "config", "10.1.0.0", True),
        (ten, "config", "10.0.255.255", False),
        (ten, "config", "10.2.0.0", False),
        (ten, api, "10.1.0.0", False),
        (wide, api, "169.254.169.254", False),
        (wide, "config", "fd00:ec2::254", False),
    ]
    answers = []
    for policy, source, address, _ in asked:
        async with loopback_sender(policy) as sender:
            endpoint = to(f"https://{bracketed(address)}:9/", source=source, timeout_seconds=0.05)
            answers.append((await sender.send(endpoint, message())).reason != "blocked_address")
    figure(
        "opened ranges as the config says / asked",
        f"{sum(a == b[3] for a, b in zip(answers, asked, strict=True))} / 6",
    )

    assert answers == [expected for *_, expected in asked]
    assert [address[0] for address in dialled] == ["10.1.0.0"]


# What may be learned from a refusal


async def test_every_refusal_answers_alike():
    """A different word or a longer wait for some addresses would make the relay a scanner of the network."""
    async with loopback_sender(
        Policy(), names=Names(lambda host: [host.partition(".")[0].replace("-", ".")])
    ) as sender:
        answers, slowest = set(), 0
        for number, address in enumerate(FORBIDDEN):
            urls = [f"https://{bracketed(address)}/"]
            if ":" not in address:
                urls.append(f"https://{address.replace('.', '-')}.example/")
            for url in urls:
                outcome = await sender.send(to(url, id=f"{number}{url}", source="api"), message())
                shown = _met(outcome)
                slowest = max(slowest, shown.pop("milliseconds"))
                answers.add(tuple(shown.items()))
                assert outcome.detail is not None  # for the operator's log, where it says which and why
                assert address not in str(shown)
    figure("different answers to refused addresses", len(answers))

    assert len(answers) == 1
    assert slowest < 250


# What the environment may not do


async def test_the_environment_changes_neither_way_nor_words(receiver, monkeypatch, tmp_path):
    """Proxies and passwords of the environment are for people's tools; a proxy would go around the guard."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password word\n")
    async with canaries(0, "127.0.0.1") as reached, asyncio.timeout(10):
        server = await asyncio.start_server(lambda r, w: reached.append("proxy") or w.close(), "127.0.0.1", 0)
        proxy = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.lower(), proxy)
        monkeypatch.setenv("NETRC", str(netrc))
        async with server, loopback_sender() as sender:
            outcome = await sender.send(to(receiver.url("/ok")), message())

    assert (outcome.reason, reached) == (None, [])
    assert "authorization" not in receiver.requests[0].headers


# How it hangs together


async def test_the_hook_that_judges_sees_every_dial_of_this_aiohttp(monkeypatch):
    """Everything rests on this one hook: a release that dials past it must not come into use unnoticed."""
    seen: list[str] = []

    def hook(info: aiohttp.AddrInfoType) -> socket.socket:
        seen.append(info[4][0])
        raise OSError(13, "seen")

    class Resolver(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
            several = ["127.0.0.3", "127.0.0.4", "127.0.0.5"] if host == "three.example" else ["127.0.0.2"]
            return [
                ResolveResult(hostname=host, host=each, port=port, family=socket.AF_INET, proto=0, flags=0)
                for each in several
            ]

        async def close(self) -> None:
            pass

    dials = {
        "http://127.0.0.1/": {"127.0.0.1"},
        "http://[::1]/": {"::1"},
        "http://[::ffff:127.0.0.1]/": {"::ffff:127.0.0.1", "::ffff:7f00:1"},
        "http://one.example/": {"127.0.0.2"},
        "http://three.example/": {"127.0.0.3", "127.0.0.4", "127.0.0.5"},
        "through http://127.0.0.6:1": {"127.0.0.6"},
        "through http://one.example:1": {"127.0.0.2"},
    }
    hooked = 0
    connector = aiohttp.TCPConnector(resolver=Resolver(), socket_factory=hook, use_dns_cache=False)
    async with aiohttp.ClientSession(connector=connector) as session:
        for way, expected in dials.items():
            seen.clear()
            url, proxy = ("https://a.example/", way.split()[1]) if way.startswith("through") else (way, None)
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.post(url, proxy=proxy)
            hooked += bool(seen) and set(seen) <= expected
    figure(f"kinds of dial that the guard sees, aiohttp {aiohttp.__version__}", f"{hooked} / {len(dials)}")

    assert hooked == len(dials)


CONNECTS = {
    "ClientSession", "TCPConnector", "UnixConnector", "ws_connect", "urlopen", "HTTPConnection",
    "HTTPSConnection", "create_connection", "open_connection", "open_unix_connection",
    "create_datagram_endpoint", "sock_connect", "connect", "connect_ex", "sendto",
}  # fmt: skip
# Where a connection may be made, and to what: the only way to another machine is the first.
KNOWN = {
    ("dialling.py", "ClientSession"): "to receivers, judged by the guard",
    ("dialling.py", "TCPConnector"): "its connector",
    ("dialling.py", "connect"): "a datagram socket that sends nothing",
    ("reach.py", "connect"): "of the same connector, for a look that sends nothing",
    ("systemd.py", "sendto"): "to the unix socket of the service manager",
    ("database.py", "connect"): "to a source, the app's own database, which only the config names",
    ("links.py", "connect"): "to the outbox's database, which only the config names",
    ("listening.py", "connect_ex"): "to the unix socket of another relay, to see whether it lives",
    ("client.py", "HTTPConnection"): "of the command line, to the relay",
    ("client.py", "connect"): "of the command line, to the relay",
}


def test_one_place_makes_connections_to_other_machines():
    """A second way out would be one that nobody judges."""
    found = {
        (path.name, name)
        for path in Path(relay.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in connecting(node)
    }
    sessions = sum(
        path.read_text().count("aiohttp.ClientSession(") for path in Path(relay.__file__).parent.rglob("*.py")
    )

    assert found - set(KNOWN) == set()
    assert sessions == 1


def connecting(node: ast.AST) -> Iterator[str]:
    """Name what a call, or a class made from another, connects with."""
    makers: list[ast.expr] = []
    if isinstance(node, ast.Call):
        makers = [node.func]
    elif isinstance(node, ast.ClassDef):
        makers = list(node.bases)
    for maker in makers:
        name = (
            maker.attr
            if isinstance(maker, ast.Attribute)
            else maker.id
            if isinstance(maker, ast.Name)
            else ""
        )
        database = (
            isinstance(maker, ast.Attribute)
            and isinstance(maker.value, ast.Name)
            and "sqlite" in maker.value.id
        )
        if name in CONNECTS and not database:
            yield name


# Of a name's addresses


@pytest.mark.parametrize(
    ("addresses", "tried"),
    [
        (["1.1.1.1"], ["1.1.1.1"]),
        (["a::1", "a::2", "a::3", "a::4", "a::5", "1.1.1.1", "2.2.2.2"], ["a::1", "a::2", "a::3", "1.1.1.1"]),
        (["1.1.1.1", "a::1", "a::2", "a::3", "a::4"], ["1.1.1.1", "a::1", "a::2", "a::3"]),
        ([f"1.1.1.{last}" for last in range(60)], ["1.1.1.0", "1.1.1.1", "1.1.1.2", "1.1.1.3"]),
    ],
)
def test_of_both_families_one_at_least_is_tried(addresses, tried):
    """Where IPv6 leads nowhere, a name of many IPv6 addresses must still be reached by its IPv4 one."""
    assert list(chosen(addresses)) == tried


@asynccontextmanager
async def black_hole(host: str, port: int) -> AsyncIterator[None]:
    """Take no connection at this address: its queue is full, so the system drops whoever knocks."""
    with ExitStack() as held:
        held.enter_context(socket.create_server((host, port), backlog=0))
        for _ in range(4):
            filler = held.enter_context(socket.socket())
            filler.settimeout(0)
            filler.connect_ex((host, port))
        yield


async def test_an_address_that_answers_nothing_does_not_hold_up_the_next(receiver):
    """Half-broken networks are common: the other address has the event within the second."""
    names = Names(lambda host: ["127.0.0.7", "127.0.0.1"])
    async with black_hole("127.0.0.7", receiver.port), loopback_sender(names=names) as sender:
        outcome = await sender.send(to(receiver.url("/ok", "many.example")), message())

    assert outcome.reason is None
    assert outcome.milliseconds < 1000


async def test_a_network_that_drops_everything_ends_as_a_connect_time_out(receiver):
    """Nothing was sent, so the attempt is no ambiguous one; and it ends when it is said to."""
    async with black_hole("127.0.0.7", receiver.port), loopback_sender() as sender:
        for seconds in (0.6, 5):  # a loop held up past both deadlines cannot tell them apart
            endpoint = to(receiver.url("/ok", "127.0.0.7"), timeout_seconds=seconds)
            outcome = await sender.send(endpoint, message())
            if outcome.milliseconds < seconds * 1000:
                break

    assert outcome.reason == "connect_timeout"
    assert seconds * 800 <= outcome.milliseconds < seconds * 1000


@pytest.mark.parametrize(
    ("answers", "reasons"),
    [
        ([], {"dns_error"}),
        ([f"127.{a}.{b}.1" for a in range(16) for b in range(256)], {"conn_refused"}),
        (["2a00::1"], {"unreachable", "connect_timeout", "conn_refused"}),
    ],
    ids=["none", "four thousand", "IPv6 alone"],
)
async def test_odd_answers_of_a_name_server_are_named_failures(answers, reasons):
    """What comes from a stranger's name server is a stranger's word."""
    async with loopback_sender(names=Names(lambda host: answers)) as sender:
        outcome = await sender.send(to("https://odd.example:9/", timeout_seconds=1), message())

    assert outcome.reason in reasons


def test_judging_costs_next_to_nothing():
    """It is asked at every dial; a figure, and a bound that only a blunder breaks."""
    guard = Guard(Way(allow=LOOPBACK.allow_private), Names(), lambda address, port: False)
    addresses = ["127.0.0.1", "8.8.8.8", "2606:4700:4700::1111", "::1"]
    begun = time.process_time()
    for _ in range(2500):
        for address in addresses:
            guard.check(address, 443)
    each = (time.process_time() - begun) / 10_000
    figure("judging one address (µs of CPU)", each * 1e6)

    assert each < 1e-3
