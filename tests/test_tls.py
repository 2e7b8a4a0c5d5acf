"""TLS towards receivers: who is believed, what is shown, from which files, and that nothing turns it off."""

import asyncio
import re
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import relay
from relay.config import ConfigError, SettingsError, load, read_api_endpoint
from relay.config.settings import DeliverySettings
from relay.egress import Policy
from relay.lookup import Names
from relay.model import TlsFiles
from relay.tls import TlsFilesError, read_files
from tests.figures import figure
from tests.hostile import HostileReceiver, loopback_sender, message, to
from tests.receiver import Answer, Receiver

ENDPOINT = """\
[[endpoints]]
id = "main"
url = "https://example.com/hooks"
events = ["*"]
secret = "s3cret"
"""


class Files:
    """An authority and a client's certificate of it, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.client = self.authority.issue_cert(common_name="relay")
        self.ca = self.write("ca.pem", self.authority.cert_pem.bytes())
        self.cert = self.write("client.pem", self.client.cert_chain_pems[0].bytes())
        self.key = self.write("client.key", self.client.private_key_pem.bytes())

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def encrypted_key(self) -> Path:
        key = serialization.load_pem_private_key(self.client.private_key_pem.bytes(), None)
        return self.write(
            "encrypted.key",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"word"),
            ),
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def server_of(authority: trustme.CA, *, asks_for: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if asks_for is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        asks_for.configure_trust(context)
    return context


# Whom the relay believes


async def test_own_authorities_stand_in_place_of_the_systems(files):
    """A company's receivers are believed by the company's word alone, and nobody else's counts for them."""
    own = read_files(files.ca, None, None)
    async with (
        HostileReceiver(context=server_of(files.authority)) as internal,
        HostileReceiver() as public,
        loopback_sender() as sender,
    ):
        reasons = {
            (name, settings is own): (
                await sender.send(to(each.url("/ok"), id=f"{name}{settings is own}", tls=settings), message())
            ).reason
            for name, each in (("internal", internal), ("public", public))
            for settings in (own, None)
        }

    assert reasons == {
        ("internal", True): None,
        ("internal", False): "tls_cert",
        ("public", True): "tls_cert",
        ("public", False): None,
    }


EARLIER, LATER = datetime(2020, 1, 1, tzinfo=UTC), datetime(2090, 1, 1, tzinfo=UTC)
CERTIFICATES: dict[str, Callable[[], trustme.LeafCert]] = {
    "expired": lambda: Receiver.authority.issue_cert("127.0.0.1", not_after=EARLIER),
    "not yet valid": lambda: Receiver.authority.issue_cert(
        "127.0.0.1", not_before=LATER, not_after=LATER.replace(year=2099)
    ),
    "another host": lambda: Receiver.authority.issue_cert("other.example"),
    "another address": lambda: Receiver.authority.issue_cert("127.0.0.2"),
    "only a common name": lambda: Receiver.authority.issue_cert(common_name="127.0.0.1"),
    "a wildcard too deep": lambda: Receiver.authority.issue_cert("*.receiver.example"),
    "an unknown authority": lambda: trustme.CA().issue_cert("127.0.0.1"),
}


async def test_a_certificate_that_does_not_hold_gets_no_byte_of_an_event():
    """Whoever answers there may be anybody: neither body nor signature nor header may reach them."""
    reached = 0
    outcomes = {}

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal reached
        reached += len(await reader.read(1))
        writer.close()

    names = Names(lambda host: ["127.0.0.1"])
    for trouble, issue in CERTIFICATES.items():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issue().configure_cert(context)
        host = "a.b.receiver.example" if "wildcard" in trouble else "127.0.0.1"
        server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
        async with server, loopback_sender(names=names) as sender:
            port = server.sockets[0].getsockname()[1]
            outcomes[trouble] = await sender.send(to(f"https://{host}:{port}/"), message())
    figure(
        "bytes sent before the certificate was verified", f"{reached} over {len(CERTIFICATES)} certificates"
    )

    assert {trouble: outcome.reason for trouble, outcome in outcomes.items()} == dict.fromkeys(
        CERTIFICATES, "tls_cert"
    )
    assert reached == 0


async def test_a_renewed_certificate_is_believed_at_the_next_attempt():
    """An expired certificate is the commonest outage; when it is over, nothing here has to be restarted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CERTIFICATES["expired"]().configure_cert(context)
    async with HostileReceiver(context=context) as receiver, loopback_sender() as sender:
        endpoint = to(receiver.url("/ok"))
        before = [(await sender.send(endpoint, message())).reason for _ in range(3)]
        Receiver.authority.issue_cert("127.0.0.1").configure_cert(context)
        after = await sender.send(endpoint, message())

    assert (before, after.reason) == (["tls_cert"] * 3, None)


def test_nothing_in_the_relay_can_switch_verification_off():
    """Every switch to turn it off is found one day by somebody who needs it to work right now."""
    switches = re.compile(
        r"CERT_NONE|CERT_OPTIONAL|check_hostname|verify_mode|_create_unverified|ssl=(False|None)|verify_ssl"
        r"|Fingerprint|set_ciphers|SECLEVEL"
    )
    found = {
        path.name: match.group()
        for path in Path(relay.__file__).parent.rglob("*.py")
        if (match := switches.search(path.read_text())) is not None
    }

    assert found == {}


# What the relay shows


@pytest.mark.parametrize("together", [False, True])
async def test_a_receiver_that_asks_is_shown_the_certificate(files, together):
    """Mutual TLS: some receivers let in only whom they know."""
    both = files.write("both.pem", files.key.read_bytes() + files.cert.read_bytes())
    shown = read_files(None, both, None) if together else read_files(None, files.cert, files.key)
    context = server_of(files.authority, asks_for=files.authority)
    trusting = read_files(files.ca, shown.cert, shown.key)
    async with HostileReceiver(context=context) as receiver, loopback_sender() as sender:
        known = await sender.send(to(receiver.url("/ok"), id="a", tls=trusting), message())
        unknown = await sender.send(
            to(receiver.url("/ok"), id="b", tls=read_files(files.ca, None, None)), message()
        )

    assert known.reason is None
    assert unknown.reason in {"tls_error", "conn_closed", "conn_reset"}
    assert len(receiver.requests) == 1


async def test_endpoints_that_show_or_trust_other_things_share_no_connection(files):
    """A connection made with one endpoint's certificate must carry no other's events."""
    settings = [
        read_files(files.ca, None, None),
        read_files(files.ca, files.cert, files.key),
        read_files(files.ca, None, None),
    ]
    async with HostileReceiver(context=server_of(files.authority)) as receiver, loopback_sender() as sender:
        for number, each in enumerate(settings):
            await sender.send(to(receiver.url("/ok"), id=str(number), tls=each), message())

    assert (len(receiver.requests), receiver.connections) == (3, 2)


async def test_a_file_with_new_contents_is_another_setting(files):
    """A reload after a renewal must not go on with the connections of the old certificate."""
    before = read_files(files.ca, files.cert, files.key)
    again = read_files(files.ca, files.cert, files.key)
    renewed = files.authority.issue_cert(common_name="relay")
    files.write("client.pem", renewed.cert_chain_pems[0].bytes())
    files.write("client.key", renewed.private_key_pem.bytes())
    after = read_files(files.ca, files.cert, files.key)
    async with HostileReceiver(context=server_of(files.authority)) as receiver, loopback_sender() as sender:
        for settings in (before, again, after):
            await sender.send(to(receiver.url("/ok"), tls=settings), message())
        await until(lambda: receiver.open == 1)

    assert (before == again, before == after) == (True, False)
    assert receiver.connections == 2


async def test_a_file_that_has_vanished_uses_up_no_attempt(files):
    """It was there at the start; that somebody removed it is no receiver's fault."""
    settings = read_files(files.ca, None, None)
    files.ca.unlink()
    async with loopback_sender() as sender:
        outcome = await sender.send(to("https://127.0.0.1:9/", tls=settings), message())

    assert (outcome.reason, outcome.unspent) == ("tls_error", True)
    assert outcome.detail == "tls_ca_file cannot be read: No such file or directory"


# Connections of yesterday's settings


async def test_a_tightened_policy_uses_no_connection_of_the_old_one():
    """A pooled connection is not dialled again, so nobody would ask the new policy about it."""
    async with HostileReceiver() as receiver, loopback_sender() as sender:
        endpoint = to(receiver.url("/ok"))
        first = await sender.send(endpoint, message())
        await sender.change(Policy(), {"main"})
        await until(lambda: receiver.open == 0)
        second = await sender.send(endpoint, message())

    assert (first.reason, second.reason, len(receiver.requests)) == (None, "blocked_address", 1)


async def test_a_change_lets_attempts_under_way_go_on_to_their_end():
    """A reload drops no work (contract section 8)."""
    async with Receiver() as receiver, loopback_sender() as sender, asyncio.TaskGroup() as tasks:
        receiver.answers(Answer(200, delay=0.5))
        slow = tasks.create_task(sender.send(to(receiver.url), message()))
        await receiver.wait_for(1)
        await sender.change(Policy(), ())
        meanwhile = await sender.send(to(receiver.url, id="other"), message())
        assert not slow.done()

    assert (slow.result().reason, meanwhile.reason) == (None, "blocked_address")


async def test_a_new_url_closes_the_connections_to_the_old_one():
    """Where deliveries no longer go, no connection is kept open."""
    async with HostileReceiver() as old, HostileReceiver() as new, loopback_sender() as sender:
        await sender.send(to(old.url("/ok")), message())
        await sender.send(to(new.url("/ok")), message())
        await until(lambda: old.open == 0)

    assert (len(old.requests), len(new.requests)) == (1, 1)


# What is told of the files


def problems(folder: Path, text: str) -> list[str]:
    path = folder / "relay.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    told = [problem.replace(f"{folder}/", "") for problem in caught.value.problems]
    return [problem.removesuffix(' (endpoint "main")') for problem in told]


def test_good_files_are_taken_and_an_endpoint_may_have_its_own(files):
    path = files.write(
        "relay.toml",
        f'[delivery]\ntls_ca_file = "{files.ca}"\nproxy = "http://u:p%40ss@[fd00::1]:3128/"\n'
        f"{ENDPOINT}{ENDPOINT.replace('main', 'own')}"
        f'client_cert_file = "{files.cert}"\nclient_key_file = "{files.key}"\nproxy = "http://Proxy:80"\n'.encode(),
    )
    main, own = load(path, {}).endpoints

    assert main.tls == TlsFiles(ca=files.ca, cert=None, key=None, digest=main.tls.digest)
    assert (own.tls.ca, own.tls.cert, own.tls.key) == (files.ca, files.cert, files.key)
    assert (str(main.proxy), main.proxy.authorization.reveal()) == ("[fd00::1]:3128", "Basic dTpwQHNz")
    assert (str(own.proxy), own.proxy.authorization) == ("proxy:80", None)
    assert "p@ss" not in repr(main)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('tls_ca_file = "missing.pem"', "tls_ca_file: cannot be read: No such file or directory"),
        ('tls_ca_file = "{folder}"', "tls_ca_file: cannot be read: Is a directory"),
        ('tls_ca_file = "{folder}/client.key"', "tls_ca_file: holds no certificate in PEM form"),
        ('tls_ca_file = "{folder}/junk"', "tls_ca_file: holds no certificate in PEM form"),
        ('tls_ca_file = "/dev/zero"', "tls_ca_file: is larger than any such file"),
        ('tls_ca_file = ""', "tls_ca_file: is not a path"),
        ("tls_ca_file = true", "tls_ca_file: expected a path, not a boolean"),
        ('client_cert_file = "missing.pem"', "client_cert_file: cannot be read: No such file or directory"),
        ('client_cert_file = "{folder}/junk"', "client_cert_file: holds no certificate in PEM form"),
        ('client_cert_file = "{folder}/client.pem"', "client_cert_file: holds no private key in PEM form"),
        ('client_key_file = "{folder}/client.key"', "client_key_file: stands without client_cert_file"),
        (
            'client_cert_file = "{folder}/client.pem"\nclient_key_file = "{folder}/missing.key"',
            "client_key_file: cannot be read: No such file or directory",
        ),
        (
            'client_cert_file = "{folder}/client.pem"\nclient_key_file = "{folder}/junk"',
            "client_key_file: holds no private key in PEM form",
        ),
        (
            'client_cert_file = "{folder}/client.pem"\nclient_key_file = "{folder}/other.key"',
            "client_key_file: does not belong to the certificate of client_cert_file",
        ),
        (
            'client_cert_file = "{folder}/client.pem"\nclient_key_file = "{folder}/encrypted.key"',
            "client_key_file: is encrypted, and there is nobody to ask for the password",
        ),
    ],
)
@pytest.mark.parametrize("table", ["delivery", "endpoints"])
def test_a_file_that_will_not_do_is_told_with_its_line(files, table, lines, expected):
    """Before the first event, not at three in the night when the first one is to go out."""
    files.write("junk", b"junk")
    files.write("other.key", trustme.CA().issue_cert("a.example").private_key_pem.bytes())
    files.encrypted_key()
    lines = lines.replace("{folder}", str(files.folder))
    text = f"[delivery]\n{lines}\n{ENDPOINT}" if table == "delivery" else f"{ENDPOINT}{lines}\n"
    key = expected.partition(":")[0]
    number = next(index for index, line in enumerate(text.splitlines(), 1) if line.startswith(key))
    place = "delivery" if table == "delivery" else "endpoints[0]"

    assert problems(files.folder, text) == [f"relay.toml:{number}: {place}.{expected}"]


def test_what_an_endpoint_makes_of_the_default_is_its_own_mistake(files):
    """The key of [delivery] was right until this endpoint put another certificate beside it."""
    other = files.write("other.pem", trustme.CA().issue_cert("a.example").cert_chain_pems[0].bytes())
    text = (
        f'[delivery]\nclient_cert_file = "{files.cert}"\nclient_key_file = "{files.key}"\n'
        f'{ENDPOINT}client_cert_file = "{other}"\n'
    )

    assert problems(files.folder, text) == [
        "relay.toml:9: endpoints[0].client_cert_file: "
        "client_key_file does not belong to the certificate of client_cert_file"
    ]


@pytest.mark.parametrize(
    ("proxy", "expected"),
    [
        ("proxy:3128", 'is not a proxy such as "http://proxy.internal:3128"'),
        ("https://proxy:3128", 'is not a proxy such as "http://proxy.internal:3128"'),
        ("socks5://proxy:1080", 'is not a proxy such as "http://proxy.internal:3128"'),
        ("http://proxy", 'is not a proxy such as "http://proxy.internal:3128"'),
        ("http://canary:canary@proxy:3128/path", 'is not a proxy such as "http://proxy.internal:3128"'),
        ("http://canary@@proxy:3128", 'is not a proxy such as "http://proxy.internal:3128"'),
        ("http://proxy:0", "has a port outside 1 to 65535"),
        ("http://proxy:99999", "has a port outside 1 to 65535"),
        ("http://canary:canary@127.1:3128", "does not name a proxy by a host name or an IP address"),
        ("http://[]:3128", "does not name a proxy by a host name or an IP address"),
        ("http://-a:3128", "does not name a proxy by a host name or an IP address"),
        (
            "http://169.254.169.254:80",
            "is at an address that stays refused whatever the config says (metadata)",
        ),
        ("http://[fe80::1]:80", "is at an address that stays refused whatever the config says (link_local)"),
    ],
)
def test_a_wrong_proxy_is_told_without_its_password(tmp_path, proxy, expected):
    told = problems(tmp_path, f'{ENDPOINT}proxy = "{proxy}"\n')

    assert told == [f"relay.toml:6: endpoints[0].proxy: {expected}"]


@pytest.mark.parametrize("key", ["tls_ca_file", "client_cert_file", "client_key_file", "proxy"])
def test_the_api_sets_none_of_these_and_looks_at_no_file(key):
    """Who may register an endpoint must neither read this machine's files nor choose its ways out."""
    settings = {"id": "a", "url": "https://a.example/", "events": ["*"], "secret": "s", key: "/etc/shadow"}

    with pytest.raises(SettingsError) as caught:
        read_api_endpoint(settings, DeliverySettings(), Policy())

    assert caught.value.problems == ((f"#/{key}", "is set in the config alone"),)


@pytest.mark.parametrize("key", ["verify", "insecure", "tls_verify", "skip_tls_verify", "ssl"])
def test_no_setting_of_the_api_switches_verification_off(key):
    """What is unknown is refused, so nobody believes it did something."""
    settings = {"id": "a", "url": "https://a.example/", "events": ["*"], "secret": "s", key: False}

    with pytest.raises(SettingsError) as caught:
        read_api_endpoint(settings, DeliverySettings(), Policy())

    assert [pointer for pointer, _ in caught.value.problems] == [f"#/{key}"]


def test_endpoints_of_the_api_go_the_way_that_delivery_says(files):
    """A network's only way out is everybody's, and the company's authorities are too."""
    path = files.write(
        "relay.toml", f'[delivery]\ntls_ca_file = "{files.ca}"\nproxy = "http://proxy:3128"\n'.encode()
    )
    settings = {"id": "a", "url": "https://a.example/", "events": ["*"], "secret": "s"}
    config = load(path, {})
    files.ca.unlink()  # it was read at the start

    endpoint = read_api_endpoint(settings, config.delivery, Policy())

    assert (endpoint.tls.ca, str(endpoint.proxy)) == (files.ca, "proxy:3128")


def test_a_key_without_its_certificate_never_becomes_a_context(files):
    """Read by no config, but the rule is the module's own."""
    with pytest.raises(TlsFilesError):
        read_files(None, None, files.key)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
