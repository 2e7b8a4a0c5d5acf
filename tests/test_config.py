"""The config: what is read, and what a person is told who made a mistake."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from ipaddress import ip_network
from pathlib import Path

import pytest

from relay.config import (
    Address,
    Config,
    ConfigError,
    SettingsError,
    find,
    load,
    parse_duration,
    parse_size,
    read_api_endpoint,
)
from relay.config.check import keys
from relay.config.lines import lines_of
from relay.config.settings import (
    TABLES,
    DeliverySettings,
    EgressSettings,
    EndpointSettings,
    EventSettings,
    SourceSettings,
)
from relay.model import Message, Secret, Source
from relay.signing import GenericForm

EXAMPLE = Path(__file__).parent.parent / "config.example.toml"
CANARY = "canary-8d3f"
ENDPOINT = """\
[[endpoints]]
id = "main"
url = "https://example.com/hooks"
events = ["*"]
secret = "s3cret"
"""
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="

Load = Callable[..., Config]
Problems = Callable[..., tuple[str, ...]]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    """Load a config that holds this text."""

    def load_text(text: str | bytes, environ: Mapping[str, str] | None = None) -> Config:
        path = tmp_path / "relay.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path, environ or {})

    return load_text


@pytest.fixture
def problems(load_text: Load, tmp_path: Path) -> Problems:
    """Load a config that must not load, and return what is told, without the folder."""

    def problems(text: str | bytes, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as caught:
            load_text(text, environ)
        return tuple(problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems)

    return problems


def test_an_empty_file_means_the_defaults(load_text):
    """Whoever says nothing gets what the contract promises."""
    config = load_text("")

    assert config.server.listen == Address(host="127.0.0.1", port=8484)
    assert (config.server.max_event_size, config.server.shutdown_grace_seconds) == (262_144, 8)
    assert (config.outbox.path, config.outbox.durability) == (Path("relay.db"), "full")
    assert config.outbox.retention_seconds == 7 * 24 * 3600
    assert config.egress.policy.ports is None
    assert config.logging.format is None
    assert config.endpoints == ()
    assert config.events == {}


def test_every_key_is_read_into_its_field(load_text):
    """A key that is accepted and then forgotten would be worse than one refused."""
    config = load_text(
        """
        [server]
        listen = "[::1]:0"
        ops_listen = "unix:/run/relay/ops.sock"
        source = "https://shop.example/relay#1"
        tokens = ["sk_1", "sk_2"]
        allowed_hosts = ["Relay.internal", "10.0.0.1", "[fd00::1]"]
        max_event_size = "1MiB"
        shutdown_grace = "1m30s"
        linger = "500ms"
        loop = "asyncio"
        [outbox]
        path = "/var/lib/relay/relay.db"
        durability = "normal"
        retention = "1d"
        [egress]
        allow_private = ["10.1.0.0/16", "fd00:1::/32"]
        allow_private_for_api = true
        ports = [443, 8443]
        allow_http = true
        [logging]
        level = "debug"
        format = "text"
        """
    )

    server, outbox, egress, logging = config.server, config.outbox, config.egress, config.logging
    assert server.listen == Address(host="::1", port=0)
    assert server.ops_listen == Address(path=Path("/run/relay/ops.sock"))
    assert server.source == "https://shop.example/relay#1"
    assert server.tokens == (Secret("sk_1"), Secret("sk_2"))
    assert server.allowed_hosts == ("relay.internal", "10.0.0.1", "fd00::1")
    assert (server.max_event_size, server.shutdown_grace_seconds) == (1_048_576, 90)
    assert (server.linger_seconds, server.loop) == (0.5, "asyncio")
    assert (outbox.path, outbox.durability) == (Path("/var/lib/relay/relay.db"), "normal")
    assert outbox.retention_seconds == 86_400
    assert egress.allow_private == (ip_network("10.1.0.0/16"), ip_network("fd00:1::/32"))
    assert (egress.allow_private_for_api, egress.ports, egress.allow_http) == (True, (443, 8443), True)
    assert egress.policy.ports == frozenset({443, 8443})
    assert (logging.level, logging.format) == ("debug", "text")


def test_an_endpoint_takes_what_it_does_not_say_from_delivery(load_text):
    """One line changes the time-out of fifty endpoints, and one endpoint may still differ."""
    config = load_text(
        """
        [delivery]
        timeout = "3s"
        retry_schedule = ["1s", "2s"]
        headers = { "X-Environment" = "staging" }
        format = "standard"
        [[endpoints]]
        id = "plain"
        url = "https://example.com/a"
        events = ["post.published", "account.*", "relay.endpoint.down"]
        description = "the first"
        secret = "one"
        [[endpoints]]
        id = "own"
        url = "https://example.com/b"
        events = ["*"]
        secrets = ["new", "old"]
        timeout = "1500ms"
        retry_schedule = "standard"
        concurrency = 4
        signatures = ["socialsyncer", { header = "X-Mine", encoding = "base64" }]
        format = "data"
        [endpoints.headers]
        X-Team = "red"
        """
    )

    plain, own = config.endpoints
    assert (plain.timeout_seconds, plain.retry_schedule, plain.concurrency) == (3, (1, 2), 32)
    assert plain.headers == (("X-Environment", Secret("staging")),)
    assert plain.events == ("post.published", "account.*", "relay.endpoint.down")
    assert (plain.description, plain.source, plain.format) == ("the first", "config", "standard")
    assert plain.signatures == ("standard", "socialsyncer")
    assert (own.timeout_seconds, own.concurrency, own.format) == (1.5, 4, "data")
    assert own.signatures == ("socialsyncer", GenericForm(header="X-Mine", encoding="base64"))
    assert own.retry_schedule == (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    assert own.headers == (("X-Team", Secret("red")),)


def test_secrets_reach_their_schemes_newest_first(load_text):
    """Standard signs with every live secret; socialsyncer has room for one and takes the oldest."""
    both = headers_of(load_text(ENDPOINT.replace('secret = "s3cret"', 'secrets = ["new", "old"]')))
    old = headers_of(load_text(ENDPOINT.replace("s3cret", "old")))
    new = headers_of(load_text(ENDPOINT.replace("s3cret", "new")))

    assert both["webhook-signature"] == f"{new['webhook-signature']} {old['webhook-signature']}"
    one = "X-SocialSyncerAPI-Signature"
    assert both[one] == old[one] != new[one]


def test_private_keys_reach_ed25519_alone_and_its_signature_follows(load_text):
    """One list of secrets for both, and one header, however the schemes are listed."""
    text = ENDPOINT.replace('secret = "s3cret"', f'secrets = ["{PRIVATE}", "s3cret"]')
    both = headers_of(load_text(text + 'signatures = ["standard-ed25519", "standard", "github"]\n'))
    shared = headers_of(load_text(ENDPOINT + 'signatures = ["standard", "github"]\n'))
    private = headers_of(
        load_text(ENDPOINT.replace("s3cret", PRIVATE) + 'signatures = ["standard-ed25519"]\n')
    )

    joined = f"{shared['webhook-signature']} {private['webhook-signature']}"
    assert both == shared | {"webhook-signature": joined}


def test_the_newest_secret_of_the_api_has_to_do_alone():
    """When the overlap ends it is the only one: what it cannot sign then is refused now."""
    settings = {"id": "main", "url": "https://example.com/", "events": ["*"]}
    policy, defaults = EgressSettings().policy, DeliverySettings()

    rotated = read_api_endpoint(settings | {"secrets": ["new", "old"]}, defaults, policy)
    with pytest.raises(SettingsError) as caught:
        read_api_endpoint(
            settings | {"secrets": ["new", PRIVATE], "signatures": ["standard-ed25519"]}, defaults, policy
        )

    assert rotated.source == "api"
    why = "cannot sign as standard-ed25519: none of the secrets is a private key, which begins whsk_"
    assert caught.value.problems == (("#/secrets", why),)


def test_a_generic_form_is_read_with_its_defaults(load_text):
    """A header's name is enough for the commonest kind: hex of SHA-256, bare."""
    signatures = """signatures = [
      "standard", { header = "X-Mine" },
      { header = "X-Other", prefix = "HMAC ", encoding = "base64", algorithm = "sha512" },
    ]\n"""

    (endpoint,) = load_text(ENDPOINT + signatures).endpoints

    assert endpoint.signatures == (
        "standard",
        GenericForm(header="X-Mine", prefix="", encoding="hex", algorithm="sha256"),
        GenericForm(header="X-Other", prefix="HMAC ", encoding="base64", algorithm="sha512"),
    )


def test_a_format_that_shows_a_source_keeps_it(load_text):
    """What is accepted before the source was changed goes out with the one it had."""
    formats = ("event", "standard", "data", "cloudevents", "cloudevents-binary")
    texts = [f'[server]\nsource = "/shop"\n{ENDPOINT}format = "{name}"\n' for name in formats]

    kept = [load_text(text).endpoints[0].format for text in texts]

    assert kept == [
        "event",
        "standard",
        "data",
        "cloudevents;source=/shop",
        "cloudevents-binary;source=/shop",
    ]
    assert load_text(ENDPOINT + 'format = "cloudevents"\n').endpoints[0].format == "cloudevents"


@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        ("relay", True),
        ("/shop/1?a=b#c", True),
        ("urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66", True),
        ("https://[::1]/caf%C3%A9", True),
        ("", False),
        ("my shop", False),
        ("café", False),
        ("100%", False),
        ("a#b#c", False),
        ("a" * 256, False),
    ],
)
def test_a_source_is_a_uri_reference(load_text, problems, source, accepted):
    """CloudEvents 1.0 demands it, and libraries refuse events without."""
    text = f'[server]\nsource = "{source}"\n'

    if accepted:
        assert load_text(text).server.source == source
    else:
        assert "relay.toml:2: server.source: " in problems(text)[0]


def headers_of(config: Config) -> dict[str, str]:
    """Return what the only endpoint's requests are signed with."""
    message = Message(
        id="evt_1", type="t", body=b"{}", content_type="application/json", attempt=1, timestamp=1
    )
    (endpoint,) = config.endpoints
    pairs = [pair for sign in endpoint.sign for pair in sign(message)]
    assert len({name.lower() for name, _ in pairs}) == len(pairs), "a header twice"
    return dict(pairs)


def test_references_are_replaced_once_in_text_values_only(load_text, tmp_path):
    """What a variable holds is data: it can neither bring a reference of its own nor new keys."""
    (tmp_path / "token").write_text("sk_file\n\n"[:-1])
    (tmp_path / "two").write_text("a\n\n")
    config = load_text(
        f"""
        [outbox]
        path = "${{env:FOLDER:-/tmp}}/$${{env:X}}/${{env:EMPTY:-x}}${{env:EMPTY}}-$5.db"
        [server]
        tokens = ["${{file:{tmp_path}/token}}", "${{env:TOKEN}}"]
        [events.a]
        description = "${{file:{tmp_path}/two}}"
        sample = {{ "${{env:KEY}}" = "${{env:NESTED}}" }}
        """,
        {"FOLDER": "/data", "EMPTY": "", "TOKEN": "sk_env", "NESTED": "${env:TOKEN}"},
    )

    assert config.outbox.path == Path("/data/${env:X}/x-$5.db")
    assert config.server.tokens == (Secret("sk_file"), Secret("sk_env"))
    assert config.events["a"].description == "a\n"
    assert config.events["a"].sample == {"${env:KEY}": "${env:TOKEN}"}
    assert type(config.events["a"].description) is str


def test_nothing_follows_from_a_reference_that_leads_nowhere(problems):
    """One cause is told once, and the other mistakes of the file beside it."""
    text = """\
[[endpoints]]
id = "${env:GONE}"
url = "${env:GONE}"
events = ["${env:GONE}"]
secret = "${env:BYTES}"
headers = { X-A = "${env:GONE}" }
retry_schedule = ["${env:GONE}", 5]
[events.a]
sample = [{ at = "${env:GONE}" }]
"""
    told = problems(text, {"BYTES": "\udcff"})

    assert [problem.partition(": ")[2] for problem in told] == [
        "endpoints[0].id: the variable GONE is not set",
        "endpoints[0].url: the variable GONE is not set",
        "endpoints[0].events[0]: the variable GONE is not set",
        "endpoints[0].secret: the variable BYTES is not UTF-8 text",
        "endpoints[0].headers.X-A: the variable GONE is not set",
        "endpoints[0].retry_schedule[0]: the variable GONE is not set",
        'endpoints[0].retry_schedule[1]: expected a duration with its unit, such as "30s", not a bare number',
        "events.a.sample[0].at: the variable GONE is not set",
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[server]\nlisten = "0.0.0.0:1"\ntokens = [5]\n',
        '[delivery]\nsignatures = "socialsyncer"\n' + ENDPOINT.replace("s3cret", "whsec_!"),
        '[egress]\nallow_http = "yes"\n' + ENDPOINT.replace("https://example.com", "http://localhost"),
    ],
)
def test_nothing_follows_from_a_value_that_is_wrong_itself(problems, text):
    """What a wrong value was meant to be is not known, so nothing is held against it."""
    assert len(problems(text)) == 1


def test_two_listeners_may_both_take_a_free_port(load_text):
    """Port 0 means two different ports, so it is no clash."""
    server = load_text('[server]\nlisten = "127.0.0.1:0"\nops_listen = "127.0.0.1:0"\n').server

    assert server.ops_listen == server.listen


def test_a_variable_overrides_a_single_value(load_text):
    """A container image keeps its file and is told the rest by its environment."""
    environ = {
        "RELAY_SERVER__LISTEN": "127.0.0.1:9",
        "RELAY_EGRESS__ALLOW_HTTP": "true",
        "RELAY_DELIVERY__CONCURRENCY": "7",
        "RELAY_DELIVERY__RETRY_SCHEDULE": "standard",
        "RELAY_OUTBOX__PATH": "${env:HOME}",
        "RELAY_CONFIG": "x",
        "RELAY_URL": "x",
        "RELAY_TOKEN": "x",
        "RELAY_PORT_8484_TCP": "set by an orchestrator for a service named relay",
    }

    config = load_text('[server]\nlisten = "${env:NOT_SET}"\n' + ENDPOINT, environ)

    assert config.server.listen == Address(host="127.0.0.1", port=9)
    assert config.egress.allow_http is True
    assert config.endpoints[0].concurrency == 7
    assert len(config.endpoints[0].retry_schedule) == 9
    assert config.outbox.path == Path("${env:HOME}")


BROKEN = {
    "an unknown key": (
        '[server]\nlisen = "127.0.0.1:1"\n',
        'relay.toml:2: server.lisen: unknown key; did you mean "listen"?',
    ),
    "an unknown key like no other": (
        "[logging]\nxyz = 1\n",
        "relay.toml:2: logging.xyz: unknown key; known are level, format",
    ),
    "an unknown table": (
        "\n[sever]\n",
        'relay.toml:2: sever: unknown key; did you mean "server"?',
    ),
    "a table that is none": (
        'server = "127.0.0.1:1"\n',
        "relay.toml:1: server: expected a table, not text",
    ),
    "one table where there can be many": (
        '[endpoints]\nid = "a"\n',
        "relay.toml:1: endpoints: expected [[endpoints]] tables, not a table",
    ),
    "a bare number for a duration": (
        "[delivery]\n\ntimeout = 30\n",
        'relay.toml:3: delivery.timeout: expected a duration with its unit, such as "30s", not a bare number',
    ),
    "text that is no duration": (
        '[delivery]\ntimeout = "30 y"\n',
        'relay.toml:2: delivery.timeout: "30 y" is not a duration such as "500ms", "30s", "1h30m" or "7d"',
    ),
    "a duration out of range": (
        '[delivery]\ntimeout = "0s"\n',
        'relay.toml:2: delivery.timeout: "0s" is not from 1ms to 1h',
    ),
    "a bare number for a size": (
        "[server]\nmax_event_size = 262144\n",
        "relay.toml:2: server.max_event_size: "
        'expected a size with its unit, such as "256KiB", not a bare number',
    ),
    "text that is no size": (
        '[server]\nmax_event_size = "256KB"\n',
        'relay.toml:2: server.max_event_size: "256KB" is not a size such as "256KiB"; '
        "units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB",
    ),
    "text for a boolean": (
        '[egress]\nallow_http = "true"\n',
        "relay.toml:2: egress.allow_http: expected true or false, not text",
    ),
    "a boolean for a number": (
        "[delivery]\nconcurrency = true\n",
        "relay.toml:2: delivery.concurrency: expected a whole number from 1 to 1000, not a boolean",
    ),
    "a number out of range": (
        "[delivery]\nconcurrency = 0\n",
        "relay.toml:2: delivery.concurrency: 0 is not from 1 to 1000",
    ),
    "a word that is none of the list": (
        '[outbox]\ndurability = "ful"\n',
        'relay.toml:2: outbox.durability: "ful" is not one of full, normal',
    ),
    "an address without a port": (
        '[server]\nlisten = "127.0.0.1"\n',
        'relay.toml:2: server.listen: "127.0.0.1" is not an address such as "127.0.0.1:8484" '
        'or "unix:/run/relay/relay.sock"',
    ),
    "an open door": (
        '[server]\nlisten = "0.0.0.0:8484"\n',
        "relay.toml:2: server.listen: 0.0.0.0:8484 can be reached from other machines: set server.tokens, "
        "or listen on 127.0.0.1 or a unix socket",
    ),
    "two listeners on one address": (
        '[server]\nops_listen = "127.0.0.1:8484"\n',
        "relay.toml:2: server.ops_listen: is the same address as server.listen",
    ),
    "a range with an address inside": (
        '[egress]\nallow_private = [\n  "10.0.0.0/8",\n  "10.1.2.3/16",\n]\n',
        'relay.toml:2: egress.allow_private[1]: "10.1.2.3/16" is not a range of addresses; '
        'did you mean "10.1.0.0/16"?',
    ),
    "a list for a word": (
        "[logging]\nlevel = []\n",
        "relay.toml:2: logging.level: expected one of debug, info, warning, error, not a list",
    ),
    "a time for a duration": (
        "[server]\nlinger = 00:00:30\n",
        'relay.toml:2: server.linger: expected a duration with its unit, such as "30s", not a date or time',
    ),
    "text for a list": (
        '[server]\ntokens = "sk_1"\n',
        "relay.toml:2: server.tokens: expected a list of tokens, not text",
    ),
    "a token with a space": (
        '[server]\ntokens = ["sk_1", "sk 2", ""]\n',
        "relay.toml:2: server.tokens[1]: holds other than visible ASCII characters\n"
        "relay.toml:2: server.tokens[2]: is empty",
    ),
    "a size out of range": (
        '[server]\nmax_event_size = "1GiB"\n',
        'relay.toml:2: server.max_event_size: "1GiB" is not from 1B to 16MiB',
    ),
    "a host with a port": (
        '[server]\nallowed_hosts = ["relay.internal:8484"]\n',
        'relay.toml:2: server.allowed_hosts[0]: "relay.internal:8484" is not a host name or an IP address '
        "without a port",
    ),
    "no path": (
        '[outbox]\npath = ""\n',
        "relay.toml:2: outbox.path: is not a path",
    ),
    "a range that is none": (
        '[egress]\nallow_private = ["intranet"]\n',
        'relay.toml:2: egress.allow_private[0]: "intranet" is not a range of addresses such as "10.1.0.0/16"',
    ),
    "a header twice": (
        '[delivery.headers]\nX-A = "1"\nx-a = "2"\n',
        "relay.toml:3: delivery.headers.x-a: is given twice; upper and lower case are the same to HTTP",
    ),
    "headers that are no table": (
        "[delivery]\nheaders = []\n",
        "relay.toml:2: delivery.headers: expected a table of headers, not a list",
    ),
    "a type that is too long": (
        f"[events.{'a' * 129}]\n",
        f'relay.toml:1: events.{"a" * 129}: "{"a" * 120}…" is not an event type: '
        "dot-separated parts of A-Z a-z 0-9 _ -, 128 characters at most",
    ),
    "types that are no tables": (
        'events = ["a"]\n',
        "relay.toml:1: events: expected a table for each event type, not a list",
    ),
    "infinity in a sample": (
        "[events.a]\nsample = inf\n",
        "relay.toml:2: events.a.sample: holds a number that JSON cannot carry exactly",
    ),
    "a schema that is no table": (
        "[events.a]\nschema = true\n",
        "relay.toml:2: events.a.schema: expected a table, not a boolean",
    ),
    "an empty list of ports": (
        "[egress]\nports = []\n",
        "relay.toml:2: egress.ports: is empty; expected a list of ports",
    ),
    "a variable that is not set": (
        '[outbox]\npath = "${env:NOT_SET}/relay.db"\n',
        "relay.toml:2: outbox.path: the variable NOT_SET is not set",
    ),
    "a file that is not there": (
        '[server]\ntokens = ["${file:/gone/token}"]\n',
        'relay.toml:2: server.tokens[0]: the file "/gone/token" cannot be read: No such file or directory',
    ),
    "a reference of an unknown kind": (
        '[outbox]\npath = "${HOME}/relay.db"\n',
        "relay.toml:2: outbox.path: ${ does not begin ${env:NAME}, ${env:NAME:-default} or ${file:PATH}; "
        "$$ is a plain $",
    ),
    "an endpoint without its keys": (
        '\n[[endpoints]]\nid = "main"\n',
        'relay.toml:2: endpoints[0].url: is missing (endpoint "main")\n'
        'relay.toml:2: endpoints[0].events: is missing (endpoint "main")\n'
        'relay.toml:2: endpoints[0].secret: is missing (endpoint "main")',
    ),
    "an id twice": (
        ENDPOINT + ENDPOINT,
        "relay.toml:7: endpoints[1].id: is the id of endpoints[0] already",
    ),
    "an id with a dot": (
        ENDPOINT.replace('"main"', '"ma.in"'),
        'relay.toml:2: endpoints[0].id: "ma.in" is not 1 to 64 of A-Z a-z 0-9 _ -',
    ),
    "a star inside a pattern": (
        ENDPOINT.replace('"*"', '"post.*.failed"'),
        'relay.toml:4: endpoints[0].events[0]: "post.*.failed": a * stands alone or ends a prefix, '
        'as in "post.*" (endpoint "main")',
    ),
    "a pattern over the relay's own events": (
        ENDPOINT.replace('"*"', '"relay.endpoint.*"'),
        'relay.toml:4: endpoints[0].events[0]: "relay.endpoint.*" is none of the relay\'s own events; '
        'did you mean "relay.endpoint.gone"? (endpoint "main")',
    ),
    "both secret and secrets": (
        ENDPOINT + 'secrets = ["a"]\n',
        'relay.toml:6: endpoints[0].secrets: stands beside secret; give one of them (endpoint "main")',
    ),
    "a secret that a scheme cannot use": (
        ENDPOINT.replace("s3cret", "whsec_!!!"),
        "relay.toml:5: endpoints[0].secret: cannot sign as standard: "
        'what follows whsec_ is not base64: copy the secret again (endpoint "main")',
    ),
    "an empty secret": (
        ENDPOINT.replace("s3cret", ""),
        'relay.toml:5: endpoints[0].secret: is empty (endpoint "main")',
    ),
    "a secret copied with a blank": (
        ENDPOINT.replace("s3cret", " s3cret"),
        "relay.toml:5: endpoints[0].secret: begins or ends with white space, "
        'which was probably copied with it (endpoint "main")',
    ),
    "an unknown scheme": (
        ENDPOINT + 'signatures = ["standart"]\n',
        'relay.toml:6: endpoints[0].signatures[0]: "standart" is not one of standard, standard-ed25519, '
        'socialsyncer, svix, stripe, github, shopify, slack (endpoint "main")',
    ),
    "a scheme that is neither name nor table": (
        ENDPOINT + "signatures = [5]\n",
        "relay.toml:6: endpoints[0].signatures[0]: expected a scheme's name or a table with its header, "
        'not a bare number (endpoint "main")',
    ),
    "a generic form with mistakes": (
        "[delivery]\nsignatures = [\n  { prefix = ' x', encoding = 'hax', algorithm = 'md5', x = 1 },\n]\n",
        "relay.toml:3: delivery.signatures[0].x: unknown key; "
        "known are header, prefix, encoding, algorithm\n"
        "relay.toml:3: delivery.signatures[0].header: is missing\n"
        "relay.toml:3: delivery.signatures[0].prefix: is not printable ASCII, or begins with a space\n"
        'relay.toml:3: delivery.signatures[0].encoding: "hax" is not one of hex, base64\n'
        'relay.toml:3: delivery.signatures[0].algorithm: "md5" is not one of sha256, sha512, sha1',
    ),
    "a generic form in a header of the relay's own": (
        '[delivery]\nsignatures = [{ header = "Stripe-Signature" }, { header = "a b" }]\n',
        "relay.toml:2: delivery.signatures[0].header: is a header the relay sets itself\n"
        "relay.toml:2: delivery.signatures[1].header: is not a name a header can have",
    ),
    "a generic form twice": (
        '[delivery]\nsignatures = [{ header = "X-A" }, { header = "X-A", prefix = "" }]\n',
        "relay.toml:2: delivery.signatures[1]: is listed twice",
    ),
    "two generic forms in one header": (
        ENDPOINT + 'signatures = [{ header = "X-A" }, { header = "x-a", encoding = "base64" }]\n',
        "relay.toml:6: endpoints[0].signatures: with these and its headers it would set x-a twice "
        '(endpoint "main")',
    ),
    "a generic form in a header that is added": (
        ENDPOINT + 'signatures = [{ header = "X-A" }]\nheaders = { x-a = "1" }\n',
        "relay.toml:6: endpoints[0].signatures: with these and its headers it would set x-a twice "
        '(endpoint "main")',
    ),
    "a scheme without a key": (
        ENDPOINT + 'signatures = ["standard", "standard-ed25519"]\n',
        "relay.toml:5: endpoints[0].secret: cannot sign as standard-ed25519: "
        'none of the secrets is a private key, which begins whsk_ (endpoint "main")',
    ),
    "schemes without a key beside a private one": (
        ENDPOINT.replace("s3cret", PRIVATE)
        + 'signatures = ["standard-ed25519", "stripe", { header = "X-A" }]\n',
        "relay.toml:5: endpoints[0].secret: cannot sign as stripe: "
        'it needs a secret besides those that begin whsk_ (endpoint "main")\n'
        "relay.toml:5: endpoints[0].secret: cannot sign as X-A: "
        'it needs a secret besides those that begin whsk_ (endpoint "main")',
    ),
    "an unknown format": (
        ENDPOINT + 'format = "cloudevent"\n',
        'relay.toml:6: endpoints[0].format: "cloudevent" is not one of event, standard, cloudevents, '
        'cloudevents-binary, data (endpoint "main")',
    ),
    "a scheme listed twice": (
        '[delivery]\nsignatures = ["standard", "standard"]\n',
        "relay.toml:2: delivery.signatures[1]: is listed twice",
    ),
    "a header of the relay's own": (
        ENDPOINT + "[endpoints.headers]\nWebhook-Id = 'x'\n",
        'relay.toml:7: endpoints[0].headers.Webhook-Id: is a header the relay sets itself (endpoint "main")',
    ),
    "a header of HTTP's own": (
        '[delivery.headers]\nContent-Type = "text/plain"\n',
        "relay.toml:2: delivery.headers.Content-Type: is a header the relay sets itself",
    ),
    "a header name with a space": (
        '[delivery.headers]\n"X Y" = "1"\n',
        'relay.toml:2: delivery.headers."X Y": is not a name a header can have',
    ),
    "a header value with a line break": (
        '[delivery.headers]\nX-A = "1\\r\\nX-B: 2"\n',
        "relay.toml:2: delivery.headers.X-A: holds a control character",
    ),
    "a date in a sample": (
        '[events."post.published"]\nsample.at = 2026-01-15 10:00:00\n',
        'relay.toml:2: events."post.published".sample: '
        "holds a date or time, which JSON does not have; write it as text",
    ),
    "a number JSON cannot carry": (
        "[events.a]\nsample = [1, 1.5, -9223372036854775808, 18446744073709551616]\n",
        "relay.toml:2: events.a.sample: holds a number that JSON cannot carry exactly",
    ),
    "a type that is not quoted": (
        "[events.post.published]\ndescription = 'x'\n",
        'relay.toml:1: events.post.published: a type with dots is quoted: [events."post.published"]',
    ),
    "an unknown table of a type": (
        "[events.a.smaple]\nx = 1\n",
        'relay.toml:1: events.a.smaple: unknown key; did you mean "sample"?',
    ),
    "a type of the relay's own": (
        '[events."relay.x"]\n',
        'relay.toml:1: events."relay.x": is one of the relay\'s own events, which are relay.*',
    ),
    "a source with mistakes": (
        '[[sources]]\nid = "a b"\nurl = "mysql://root:hunter2@db/shop"\nschema = "x y"\nnotify = true\n',
        'relay.toml:2: sources[0].id: "a b" is not 1 to 64 of A-Z a-z 0-9 _ -\n'
        'relay.toml:3: sources[0].url: is not an address such as "postgresql://relay@db.internal/relay"\n'
        'relay.toml:4: sources[0].schema: "x y" is not the name of a schema: '
        "A-Z a-z 0-9 _, 63 characters at most\n"
        "relay.toml:5: sources[0].notify: unknown key; known are id, url, schema",
    ),
    "a port that is none": (
        '[[sources]]\nid = "shop"\nurl = "postgresql://app:hunter2@db:70000/shop"\n',
        "relay.toml:3: sources[0].url: is not an address",
    ),
    "a source of the outbox's name": (
        '[[sources]]\nid = "outbox"\n',
        "relay.toml:1: sources[0].url: is missing\n"
        'relay.toml:2: sources[0].id: "outbox" is the outbox\'s own database: choose another',
    ),
    "sources that are the same": (
        '[[sources]]\nid = "a"\nurl = "postgresql://db/a"\n[[sources]]\nid = "a"\nurl = "postgresql://db/b"\n'
        '[[sources]]\nid = "b"\nurl = "postgresql://db/a"\n',
        'relay.toml:5: sources[1].id: "a" is the id of another source already\n'
        "relay.toml:9: sources[2].url: is the url of another source already",
    ),
    "sources that are no tables": (
        "sources = 3\n",
        "relay.toml:1: sources: expected [[sources]] tables, not a bare number",
    ),
    "no TOML": (
        "[server]\nlisten =\n",
        "relay.toml:2: is not TOML: Invalid value (column 9)",
    ),
    "TOML that ends too soon": (
        "[server]\ntokens = [\n\n",
        "relay.toml:2: is not TOML: Invalid value",
    ),
    "bytes that are not text": (
        b"[server]\n# \xff\n",
        "relay.toml:2: is not UTF-8",
    ),
}


@pytest.mark.parametrize(("text", "told"), BROKEN.values(), ids=BROKEN)
def test_a_mistake_is_told_with_its_line_and_key(problems, text, told):
    """The sentence is all a person has at three in the morning: it is part of the promise."""
    assert "\n".join(problems(text)) == told


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("RELAY_SERVER__LISTEN", "here", '"here" is not an address such as "127.0.0.1:8484" or '),
        ("RELAY_SERVER__LISTN", "x", 'unknown key; did you mean "listen"?'),
        ("RELAY_SERVR__LISTEN", "x", 'no table with keys that a variable can set; did you mean "server"?'),
        ("RELAY_SERVER__TOKENS", "x", "a variable can set single values only, no lists and no tables"),
        ("RELAY_ENDPOINTS__URL", "x", "no table with keys that a variable can set; known are server, "),
        ("RELAY_EGRESS__ALLOW_HTTP", "yes", "expected true or false, not text"),
        ("RELAY_DELIVERY__CONCURRENCY", "9999", "9999 is not from 1 to 1000"),
        ("RELAY_DELIVERY__CONCURRENCY", "many", "expected a whole number from 1 to 1000, not text"),
        ("RELAY_OUTBOX__PATH", "\udcff", "is not UTF-8 text"),
    ],
)
def test_a_mistake_in_a_variable_names_the_variable(problems, variable, value, told):
    """No line of the file would be right: the file is not where it has to be mended."""
    key = variable.removeprefix("RELAY_").lower().replace("__", ".")

    (problem,) = problems("", {variable: value})

    assert problem.startswith(f"{variable}: {key}: {told}")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(problems):
    """Nobody should have to start the relay six times to find six mistakes."""
    text = """\
[[endpoints]]
id = "main"
url = "https://example.com/"
events = []
secret = ""

[[endpoints]]
id = "main"
url = "ftp://example.com/"
evnets = ["*"]
secret = "${env:NOT_SET}"
timeout = 5

[server]
listen = "0.0.0.0:1"
loop = "fast"

[egress]
prots = [443]
"""
    told = problems(text, {"RELAY_OUTBOX__DURABILITY": "some"})

    where = [re.sub(r"^(.*?: \S+): .*$", r"\1", problem) for problem in told]
    assert where == [
        "relay.toml:4: endpoints[0].events",
        "relay.toml:5: endpoints[0].secret",
        "relay.toml:7: endpoints[1].events",
        "relay.toml:8: endpoints[1].id",
        "relay.toml:9: endpoints[1].url",
        "relay.toml:10: endpoints[1].evnets",
        "relay.toml:11: endpoints[1].secret",
        "relay.toml:12: endpoints[1].timeout",
        "relay.toml:15: server.listen",
        "relay.toml:16: server.loop",
        "relay.toml:19: egress.prots",
        "RELAY_OUTBOX__DURABILITY: outbox.durability",
    ]


def test_the_error_itself_reads_as_its_problems(load_text, tmp_path):
    """Whoever prints the exception prints everything."""
    with pytest.raises(ConfigError) as caught:
        load_text("a = 1\nb = 2\n")

    assert str(caught.value) == "\n".join(caught.value.problems)
    assert str(caught.value).count(f"{tmp_path}/relay.toml:") == 2


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:0",
        "127.9.9.9:80",
        "[::1]:8484",
        "localhost:8484",
        "unix:/run/relay/relay.sock",
    ],
)
def test_this_machine_alone_needs_no_token(load_text, address):
    """The common case, an application beside the relay, is to work without ceremony."""
    server = load_text(f'[server]\nlisten = "{address}"\n').server

    assert server.listen.is_local
    assert str(server.listen) == address


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "relay.internal:1"])
def test_other_machines_need_a_token(load_text, problems, address):
    """A relay anyone can post to would sign what anyone says (contract 3, Authentication)."""
    text = f'[server]\nlisten = "{address}"\n'

    assert "set server.tokens" in problems(text)[0]
    assert not load_text(text + 'tokens = ["sk_1"]\n').server.listen.is_local


@pytest.mark.parametrize(
    "address",
    [
        ":8484",
        "8484",
        "::1:8484",
        "[::1]",
        "127.1:80",
        "localhost:65536",
        "a b:1",
        "-a:1",
        "[x]:1",
        "unix:",
        "",
    ],
)
def test_what_is_no_address_is_refused(problems, address):
    """A guess here could open a port nobody meant."""
    assert "relay.toml:2: server.listen: " in problems(f'[server]\nlisten = "{address}"\n')[0]


@pytest.mark.parametrize(
    "network", ["169.254.0.0/16", "169.254.169.254/32", "fe80::/10", "100.100.100.200/32"]
)
def test_metadata_ranges_cannot_be_opened(problems, network):
    """Whoever writes such a line believes in a permission that will never be given."""
    (problem,) = problems(f'[egress]\nallow_private = ["{network}"]\n')

    assert f'egress.allow_private[0]: "{network}" stays refused whatever the config says' in problem


@pytest.mark.parametrize(
    ("egress", "url", "accepted"),
    [
        ("", "https://example.com:8443/a?b=c", True),
        ("", "http://localhost/", False),
        ("allow_http = true", "http://localhost:8080/", True),
        ("allow_http = true", "http://127.0.0.1:8080/", True),
        ("allow_http = true", "http://example.com/", False),
        ("ports = [443]", "https://example.com/", True),
        ("ports = [443]", "https://example.com:8443/", False),
        ("", "https://user:pw@example.com/", False),
        ("", "https://example.com/#a", False),
        ("", "https://example.com/ä", False),
        ("", "https://example.com:0/", False),
        ("", "https://2130706433/", False),
        ("", "https:///x", False),
        ("", "https://example.com/" + "a" * 2030, False),
    ],
)
def test_a_url_is_judged_by_the_rules_of_egress(load_text, problems, egress, url, accepted):
    """What the guard would refuse at every attempt is better refused before the first."""
    text = f"[egress]\n{egress}\n" + ENDPOINT.replace("https://example.com/hooks", url)

    if accepted:
        assert load_text(text).endpoints[0].url == url
    else:
        (problem,) = problems(text)
        assert problem.startswith("relay.toml:5: endpoints[0].url: ")
        assert problem.endswith(' (endpoint "main")')


def test_secrets_are_never_shown(load_text, problems, tmp_path):
    """Errors and reprs end up in logs, and logs in many hands."""
    (tmp_path / "canary").write_text(CANARY)
    reference = f"${{file:{tmp_path}/canary}}"
    good = f"""
        [server]
        tokens = ["{CANARY}"]
        [delivery.headers]
        Authorization = "Bearer {CANARY}"
        [[endpoints]]
        id = "main"
        url = "https://example.com/"
        events = ["*"]
        secret = "{CANARY}"
        """
    bad = f"""
        [server]
        listen = "{reference}"
        tokens = ["{CANARY} ", 5]
        max_event_size = "{reference}"
        loop = "{reference}"
        allowed_hosts = ["{reference}:1"]
        [delivery]
        signatures = ["{reference}"]
        headers = {{ X-A = "{CANARY}\\n", Host = "{CANARY}" }}
        timeout = "{reference}"
        [egress]
        allow_private = ["{reference}"]
        [[endpoints]]
        id = "{reference}."
        url = "https://user:{CANARY}@example.com/"
        events = ["{reference}.*.*"]
        secrets = [
          "{CANARY} ", "whsec_{CANARY}", "{CANARY}${{{CANARY}", "${{env:{CANARY}!}}", "${{{CANARY}}}",
        ]
        [[endpoints]]
        id = "{reference}"
        url = "https://example.com/"
        events = ["*"]
        secret = "whsec_{CANARY}"
        signatures = ["standard"]
        """

    assert CANARY not in repr(load_text(good))
    for text in (bad, bad.replace(f'signatures = ["{reference}"]', ""), bad.replace("\n", f"= {CANARY}\n")):
        told = problems(text, {"RELAY_OUTBOX__DURABILITY": ""})
        assert told
        assert CANARY not in "\n".join(told)


def test_lines_are_found_in_every_way_of_writing_toml():
    """The line is where the person looks; a wrong one sends them away from the mistake."""
    text = '''\
top.dotted . "a b" = 1 # ]
[server]
tokens = [ # a comment with "quotes" and ]
  "a]", 'b"', """c
  ]""", [ { x = 1, y = { z = 2 } } ],
] # [not.a.table]
literal = \'\'\'
[not.a.table]
key = "no"\'\'\'\'\'
basic = """
\\"""
key = "no"
"""""
date = 2026-01-15 10:00:00 # with = a space
inline = { a = "}", b.c = [1,
2], "q=" = 3 }
after = 1

[ events . "post.published" ]
sample = 1
[events.'post.failed'.sample]
sub = 1
[["end\\u0070oints"]]
id = 1
[endpoints.headers]
X-A = 1
[[endpoints]]
id = 2
[[endpoints.deep]]
x = 1
[[endpoints.deep]]
x = 2
[endpoints.headers]
X-A = 2'''

    lines = lines_of(text)

    assert lines == {
        (): 1,
        ("top",): 1,
        ("top", "dotted"): 1,
        ("top", "dotted", "a b"): 1,
        ("server",): 2,
        ("server", "tokens"): 3,
        ("server", "tokens", 3): 5,
        ("server", "tokens", 3, 0): 5,
        ("server", "tokens", 3, 0, "x"): 5,
        ("server", "tokens", 3, 0, "y"): 5,
        ("server", "tokens", 3, 0, "y", "z"): 5,
        ("server", "literal"): 7,
        ("server", "basic"): 10,
        ("server", "date"): 14,
        ("server", "inline"): 15,
        ("server", "inline", "a"): 15,
        ("server", "inline", "b"): 15,
        ("server", "inline", "b", "c"): 15,
        ("server", "inline", "q="): 16,
        ("server", "after"): 17,
        ("events",): 19,
        ("events", "post.published"): 19,
        ("events", "post.published", "sample"): 20,
        ("events", "post.failed"): 21,
        ("events", "post.failed", "sample"): 21,
        ("events", "post.failed", "sample", "sub"): 22,
        ("endpoints",): 23,
        ("endpoints", 0): 23,
        ("endpoints", 0, "id"): 24,
        ("endpoints", 0, "headers"): 25,
        ("endpoints", 0, "headers", "X-A"): 26,
        ("endpoints", 1): 27,
        ("endpoints", 1, "id"): 28,
        ("endpoints", 1, "deep"): 29,
        ("endpoints", 1, "deep", 0): 29,
        ("endpoints", 1, "deep", 0, "x"): 30,
        ("endpoints", 1, "deep", 1): 31,
        ("endpoints", 1, "deep", 1, "x"): 32,
        ("endpoints", 1, "headers"): 33,
        ("endpoints", 1, "headers", "X-A"): 34,
    }


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_count_the_same_with_either_line_ending(problems, newline):
    """A file written on Windows is a file."""
    text = "\ufeff[server]\n\nlinger = 1\n".replace("\n", newline)

    assert problems(text)[0].startswith("relay.toml:3: server.linger: ")


def test_endpoints_may_be_written_inline(problems):
    """Two ways of writing an array of tables mean the same and are told the same."""
    text = """\
endpoints = [
  { id = "a", url = "https://example.com/", events = ["*"], secret = "a" },
  { id = "b", url = "https://example.com/", events = ["*"], secret = "" },
  { id = "c" , url = "https://example.com/", events = ["*"] }, 5,
]
"""
    assert problems(text) == (
        "relay.toml:1: endpoints[3]: expected a table, not a bare number",
        'relay.toml:3: endpoints[1].secret: is empty (endpoint "b")',
        'relay.toml:4: endpoints[2].secret: is missing (endpoint "c")',
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("1h30m", 5400), ("7d", 604_800), ("1d1h1m1s1ms", 90_061.001), ("0s", 0)],
)
def test_durations_are_sums_of_their_parts(text, seconds):
    """Written as people and Prometheus write them."""
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    "text", ["", "30", "s", "-1s", "1.5h", "1s1h", "1 s", "1S", "1w", "1s1s", "٣s", "1s\n"]
)
def test_what_is_no_duration_is_refused(text):
    """A guess at a unit is wrong by a factor of sixty."""
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_binary_and_decimal_sizes_differ():
    """1 GB is not 1 GiB, and KB is neither."""
    assert (parse_size("256KiB"), parse_size("1GiB"), parse_size("1B")) == (262_144, 1_073_741_824, 1)
    assert (parse_size("1kB"), parse_size("5MB"), parse_size("1GB")) == (1_000, 5_000_000, 1_000_000_000)
    for text in ("", "1", "KiB", "1KB", "1 KiB", "-1B", "1.5GiB", "1kib"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


def test_the_file_is_looked_for_where_the_contract_says(tmp_path, monkeypatch):
    """The option beats the variable, and the variable beats the folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("relay.toml", "option.toml", "variable.toml"):
        (tmp_path / name).write_text("")
    environ = {"RELAY_CONFIG": "variable.toml"}

    assert find("option.toml", environ) == Path("option.toml")
    assert find(None, environ) == Path("variable.toml")
    assert find(None, {}) == Path("relay.toml")


@pytest.mark.parametrize(
    ("option", "environ", "told"),
    [
        ("gone.toml", {"RELAY_CONFIG": "x"}, "no config file: looked for gone.toml (--config)"),
        (None, {"RELAY_CONFIG": "gone.toml"}, "no config file: looked for gone.toml (RELAY_CONFIG)"),
    ],
)
def test_a_file_that_was_asked_for_is_not_replaced_by_another(tmp_path, monkeypatch, option, environ, told):
    """A typing mistake must not start a relay with somebody else's endpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relay.toml").write_text("")

    with pytest.raises(ConfigError) as caught:
        find(option, environ)

    assert caught.value.problems == (told,)


def test_a_file_that_cannot_be_read_is_told_without_a_trace(tmp_path):
    """A folder, a missing file or a lost permission is a sentence, not a traceback."""
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "gone.toml", "No such file or directory")):
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        assert caught.value.problems == (f"{path}: cannot be read: {why}",)


def test_a_secret_file_that_is_no_text_is_told(problems, tmp_path):
    """Keys are sometimes mounted as raw bytes, which no scheme takes."""
    (tmp_path / "raw").write_bytes(b"\xff")

    (problem,) = problems(f'[outbox]\npath = "${{file:{tmp_path}/raw}}"\n')

    assert problem == 'relay.toml:2: outbox.path: the file "raw" is not UTF-8 text'


def test_deep_nesting_is_a_mistake_and_no_crash(problems):
    """A config is written by people, but a template can go wrong without end."""
    deep = "[" * 80 + "]" * 80
    endless = "[" * 100_000

    assert "is nested deeper than 64 levels" in problems(f"[events.a]\nsample = {deep}\n")[0]
    assert problems(f"sample = {endless}") == ("relay.toml:1: is nested too deeply",)


def test_the_example_is_valid_and_names_every_key():
    """The example is the reference most people read; a key it lacks does not exist for them."""
    text = EXAMPLE.read_text()
    config = load(EXAMPLE, {})
    known = [
        name
        for table in (*TABLES.values(), DeliverySettings, EndpointSettings, EventSettings)
        for name in keys(table)
    ]

    missing = [name for name in known if not re.search(rf"^(# )?{name} = ", text, re.MULTILINE)]

    assert missing == []
    assert set(config.events) == {
        "post.published",
        "post.failed",
        "post.scheduled",
        "account.disconnected",
        "account.connected",
    }
    assert all(event.sample and event.description for event in config.events.values())


def test_the_example_shows_a_source_and_its_default(load_text, tmp_path):
    """Its lines are set in further, because without their table they would belong to another."""
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    lines = EXAMPLE.read_text().splitlines()
    shown = [
        line.removeprefix("#").strip() for line in lines if re.match(r"# \[\[sources\]\]|#   \w+ = ", line)
    ]
    text = "\n".join(shown).replace("/run/secrets/shop_password", str(secret))

    (source,) = load_text(text).sources

    assert source == Source(id="shop", url=Secret("postgresql://relay:hunter2@db.internal/shop"))
    assert "hunter2" not in f"{source} {source!r}"
    assert [line.split(" = ")[0] for line in shown[1:]] == list(keys(SourceSettings))


def test_the_example_shows_the_defaults(load_text):
    """Whoever takes the comment sign away must not change anything by it."""
    keep = (
        "tokens",
        "allowed_hosts",
        "ops_listen",
        "headers",
        "allow_private",
        "ports",
        "secrets",
        "format",
        "rate",
        "max_pending",
        "tls_ca_file",
        "client_cert_file",
        "client_key_file",
        "proxy",
        "url",
        "listen_url",
    )
    lines = EXAMPLE.read_text().splitlines()
    commented = [line for line in lines if not re.match(rf"# ({'|'.join(keep)}|listen|rate) = ", line)]
    uncommented = "\n".join(re.sub(r"^# (\w+ = )", r"\1", line) for line in commented)

    assert _plain(load_text(uncommented)) == _plain(load(EXAMPLE, {}))


def _plain(config: Config) -> Config:
    """Signers are functions, made anew by each load; compare without them."""
    endpoints = tuple(dataclasses.replace(endpoint, sign=()) for endpoint in config.endpoints)
    return dataclasses.replace(config, endpoints=endpoints)
