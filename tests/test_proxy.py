"""Deliveries through an egress proxy: the guard stays, the proxy's trouble is not the receiver's."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence

import aiohttp
import pytest
import uvloop

from relay.dialling import ProxyGuard, RefusedError, Way
from relay.egress import Policy
from relay.lookup import Names
from relay.model import Proxy, Secret
from tests.hostile import LOOPBACK, HostileReceiver, loopback_sender, message, right, to
from tests.process import RelayProcess, relay_process
from tests.proxy import ConnectProxy
from tests.receiver import Receiver

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
CLOSED = Policy()  # no private address: the proxy on loopback is the only one there is


@pytest.fixture
async def receiver() -> AsyncIterator[HostileReceiver]:
    async with HostileReceiver("outside.example") as receiver:
        yield receiver


@pytest.fixture
async def proxy(receiver: HostileReceiver) -> AsyncIterator[ConnectProxy]:
    """A proxy for which a name of the world outside is the receiver."""
    places = {f"outside.example:{receiver.port}": ("127.0.0.1", receiver.port)}
    async with ConnectProxy(places) as proxy:
        yield proxy


def by(proxy: ConnectProxy | int, **changes: object) -> Proxy:
    port = proxy if isinstance(proxy, int) else proxy.port
    return Proxy(**({"host": "127.0.0.1", "port": port} | changes))


def no_names(host: str) -> Sequence[str]:
    """A network inside which no name of the world outside is known."""
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def names_of(answers: Mapping[str, Sequence[str]]) -> Names:
    return Names(lambda host: answers.get(host) or no_names(host))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_delivery_goes_through_the_tunnel_with_tls_to_the_receiver_itself(loop):
    """The proxy sees where it goes and nothing of what is sent; one tunnel serves several deliveries."""

    async def scenario() -> None:
        async with HostileReceiver("outside.example") as receiver:
            places = {f"outside.example:{receiver.port}": ("127.0.0.1", receiver.port)}
            async with (
                ConnectProxy(places) as proxy,
                loopback_sender(CLOSED, names=Names(no_names)) as sender,
            ):
                way = by(proxy, authorization=Secret("Basic dTpw"))
                endpoint = to(receiver.url("/ok", "outside.example"), proxy=way)
                outcomes = [await sender.send(endpoint, message()) for _ in range(3)]

            assert [outcome.reason for outcome in outcomes] == [None] * 3
            assert proxy.asked == [f"CONNECT outside.example:{receiver.port}"]
            assert "Proxy-Authorization: Basic dTpw\r\n" in proxy.heads[0]
            assert "relay/1.2.3" in proxy.heads[0]
            assert len(receiver.requests) == 3
            assert all("proxy-authorization" not in each.headers for each in receiver.requests)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(scenario())


async def test_a_receiver_behind_the_proxy_misbehaves_under_the_same_names(receiver, proxy):
    """What a failure is called must not depend on the network's way out."""
    async with loopback_sender() as sender:
        for path in (
            "/silence",
            "/closed-at-once",
            "/reset-at-once",
            "/endless-body",
            "/status-500",
            "/redirect-301",
        ):
            endpoint = to(receiver.url(path), proxy=by(proxy), timeout_seconds=1)
            outcome = await sender.send(endpoint, message())

            if path == "/reset-at-once":  # a proxy may pass it on as the end of the connection
                assert outcome.reason in {"conn_reset", "conn_closed"}
            else:
                assert right(path, outcome), (path, outcome)
            assert not outcome.unspent


@pytest.mark.parametrize("mode", [400, 403, 407, 502, 503, 504, 302, "silent", "closing"])
async def test_a_proxy_that_makes_no_tunnel_uses_up_no_attempt(receiver, proxy, mode):
    """An hour's trouble of the network's way out must not end in dead deliveries at every receiver."""
    proxy.mode = mode
    async with loopback_sender() as sender:
        endpoint = to(receiver.url("/ok"), proxy=by(proxy), timeout_seconds=1)
        outcome = await sender.send(endpoint, message())
        proxy.mode = "tunnel"
        again = await sender.send(endpoint, message())

    assert (outcome.unspent, outcome.status, outcome.reason) == (True, None, "unreachable")
    assert outcome.detail is not None
    assert outcome.detail.startswith("the proxy: ")
    assert (again.reason, again.unspent) == (None, False)


@pytest.mark.parametrize("host", ["127.0.0.1", "proxy.example"])
async def test_a_proxy_that_is_down_uses_up_no_attempt(receiver, host):
    """Nothing listens where the proxy was, or nobody knows its name."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        way = by(unused.getsockname()[1], host=host)
        async with loopback_sender(names=Names(no_names)) as sender:
            outcome = await sender.send(to(receiver.url("/ok"), proxy=way), message())

    assert (outcome.unspent, outcome.reason, receiver.requests) == (True, "unreachable", [])


async def test_what_fails_after_the_tunnel_stands_is_the_receivers(receiver, proxy):
    """A certificate that does not hold is an attempt that failed, whoever carried it."""
    async with loopback_sender(names=Names(no_names)) as sender:
        places = {f"other.example:{receiver.port}": ("127.0.0.1", receiver.port)}
        async with ConnectProxy(places) as other:
            endpoint = to(receiver.url("/ok", "other.example"), proxy=by(other))
            outcome = await sender.send(endpoint, message())

    assert (outcome.reason, outcome.unspent, receiver.requests) == ("tls_cert", False, [])


async def test_a_handshake_that_hangs_behind_the_proxy_is_the_receivers(proxy):
    """The tunnel stood, so the receiver was asked, and did not answer."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server, loopback_sender() as sender:
        port = server.sockets[0].getsockname()[1]
        endpoint = to(f"https://127.0.0.1:{port}/", proxy=by(proxy), timeout_seconds=0.6)
        outcome = await sender.send(endpoint, message())

    assert (outcome.reason, outcome.unspent, len(proxy.asked)) == ("connect_timeout", False, 1)


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("127.0.0.1", {}),
        ("10.0.0.1", {}),
        ("169.254.169.254", {}),
        ("[::1]", {}),
        ("[::ffff:a9fe:a9fe]", {}),
        ("[64:ff9b::7f00:1]", {}),
        ("inside.example", {"inside.example": ["10.0.0.1"]}),
        ("inside.example", {"inside.example": ["8.8.8.8", "169.254.169.254"]}),
        ("inside.example", {"inside.example": ["::1"]}),
    ],
)
async def test_the_guard_judges_before_the_proxy_is_asked(proxy, host, answers):
    """A proxy may know no rules; what can be known here is refused here."""
    async with loopback_sender(CLOSED, names=names_of(answers)) as sender:
        outcome = await sender.send(to(f"https://{host}:8443/", proxy=by(proxy)), message())

    assert (outcome.reason, outcome.unspent, proxy.asked) == ("blocked_address", False, [])


async def test_a_name_that_only_the_proxy_can_resolve_is_the_proxys_to_judge(receiver, proxy, monkeypatch):
    """In many networks nothing but the proxy knows the names of the world outside, or answers at all."""
    monkeypatch.setattr("relay.lookup._PATIENCE_SECONDS", 0.1)
    over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang(host: str) -> Sequence[str]:
        asyncio.run_coroutine_threadsafe(over.wait(), loop).result(5)
        return ["10.0.0.1"]

    async with loopback_sender(CLOSED, names=Names(hang)) as sender:
        outcome = await sender.send(to(receiver.url("/ok", "outside.example"), proxy=by(proxy)), message())
        over.set()

    assert outcome.reason is None
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "proxy.example"])
async def test_the_proxy_alone_is_exempt_from_the_guard(receiver, proxy, host):
    """The proxy is on this machine here; a receiver beside it is not reached without the proxy."""
    names = names_of({"proxy.example": ["127.0.0.1"]})
    url = receiver.url("/ok", "outside.example")
    async with loopback_sender(CLOSED, names=names) as sender:
        through = await sender.send(to(url, id="a", proxy=by(proxy, host=host)), message())
        direct = await sender.send(to(receiver.url("/ok"), id="b"), message())

    assert (through.reason, direct.reason) == (None, "blocked_address")
    assert len(receiver.requests) == 1


async def test_nothing_but_the_proxy_is_dialled_on_its_endpoints_way():
    """Whatever a later client library makes of a redirect or an alternative address, it leads nowhere."""
    names = names_of({"proxy.example": ["10.0.0.1"]})
    proxy = by(3128, host="proxy.example")
    guard = ProxyGuard(
        Way(allow=LOOPBACK.allow_private, proxy=proxy), proxy, names, lambda address, port: False
    )
    await guard.resolve("proxy.example", 3128)

    guard.dial(tcp("10.0.0.1", 3128)).close()
    for address, port in (("10.0.0.1", 443), ("10.0.0.2", 3128), ("127.0.0.1", 3128), ("8.8.8.8", 443)):
        with pytest.raises(RefusedError):
            guard.dial(tcp(address, port))
    with pytest.raises(RefusedError):
        await guard.resolve("other.example", 3128)


def tcp(address: str, port: int) -> aiohttp.AddrInfoType:
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1", "224.0.0.1", "0.0.0.0"])  # noqa: S104
async def test_no_name_makes_a_metadata_service_a_proxy(receiver, address):
    """The floor that no config opens is under the proxy too."""
    names = names_of({"proxy.example": [address]})
    async with loopback_sender(names=names) as sender:
        outcome = await sender.send(to(receiver.url("/ok"), proxy=by(9, host="proxy.example")), message())

    assert (outcome.unspent, outcome.reason) == (True, "unreachable")
    assert "is " in (outcome.detail or "")


async def test_the_relays_own_listener_is_no_proxy(receiver, proxy):
    """It would be asked to deliver to itself, for ever."""
    own = frozenset({("127.0.0.1", proxy.port)})
    async with loopback_sender(own_addresses=own) as sender:
        outcome = await sender.send(to(receiver.url("/ok"), proxy=by(proxy)), message())

    assert (outcome.unspent, proxy.asked, receiver.requests) == (True, [], [])


async def test_endpoints_of_different_proxies_share_no_connection(receiver, proxy):
    """Which way out an endpoint takes is its own setting, also when another's tunnel is there already."""
    async with ConnectProxy() as other, loopback_sender() as sender:
        ways = [by(proxy), by(other), None, by(proxy, authorization=Secret("Basic eDp5"))]
        for number, way in enumerate(ways):
            await sender.send(to(receiver.url("/ok"), id=str(number), proxy=way), message())

    assert (len(proxy.asked), len(other.asked), receiver.connections) == (2, 1, 4)


async def test_plain_http_to_this_machine_takes_no_proxy(proxy):
    """The proxy would take "this machine" for its own."""
    policy = Policy(allow_http=True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with loopback_sender(policy) as sender:
            port = unused.getsockname()[1]
            outcome = await sender.send(to(f"http://127.0.0.1:{port}/", proxy=by(proxy)), message())

    assert (outcome.reason, outcome.unspent, proxy.asked) == ("conn_refused", False, [])


def test_events_wait_for_a_proxy_that_is_down_and_use_up_no_attempt(tmp_path):
    """Through the whole relay: what was accepted meanwhile goes out when the proxy is back, as attempt 1."""

    async def scenario() -> None:
        async with asyncio.timeout(60), HostileReceiver() as receiver:
            down = ConnectProxy()
            async with down:
                pass
            Receiver.authority.cert_pem.write_to_path(tmp_path / "ca.pem")
            config = (
                f'[delivery]\nretry_schedule = []\ntls_ca_file = "{tmp_path / "ca.pem"}"\n'
                f'proxy = "http://127.0.0.1:{down.port}"\n'
                f'[[endpoints]]\nid = "main"\nurl = "{receiver.url("/ok")}"\n'
                'events = ["*"]\nsecret = "s3cret"\n'
            )
            with relay_process(tmp_path, config) as relay:
                answer = await asyncio.to_thread(relay.call, "POST", "/v1/events", {"event": "a", "data": {}})
                event = f"/v1/events/{answer[1]['id']}"
                while "attempt_unspent" not in relay.log:
                    await asyncio.sleep(0.05)
                waiting = (await asyncio.to_thread(relay.call, "GET", event))[1]["deliveries"][0]
                async with down:
                    while not receiver.requests:
                        await asyncio.sleep(0.05)
                    async with asyncio.timeout(5):
                        while (await delivery(relay, event))["state"] != "delivered":
                            await asyncio.sleep(0.05)
                done = await delivery(relay, event)

        assert (waiting["state"], waiting["attempts"]) == ("pending", [])
        assert [(each["number"], each["status"]) for each in done["attempts"]] == [(1, 200)]
        assert receiver.requests[0].headers["webhook-attempt"] == "1"

    asyncio.run(scenario())


async def delivery(relay: RelayProcess, event: str) -> dict:
    return (await asyncio.to_thread(relay.call, "GET", event))[1]["deliveries"][0]
