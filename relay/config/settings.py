"""The tables of the config: which keys there are, how each is read, and its default.

A new key is one line here: the type of the field, the reader of its value, its name in the file when
that differs, its default (none: the key is required).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from relay import egress, formats
from relay.config.address import (
    Address,
    parse_address,
    parse_database,
    parse_host,
    parse_network,
    parse_path,
    parse_proxy,
)
from relay.config.check import ListOf, Report, Scalar, has_type
from relay.config.database import parse_schema
from relay.config.header import HeaderTable
from relay.config.lines import Place
from relay.config.quantity import duration_between, number_between, one_of, parse_rate, size_between
from relay.config.signature import SignatureEntry
from relay.config.values import (
    parse_endpoint_id,
    parse_json,
    parse_secret,
    parse_source,
    parse_subscription,
    parse_token,
)
from relay.model import Proxy, Secret, TlsFiles
from relay.signing import Signature

# The delays before each retry, Standard Webhooks 1.0.0, "Deliverability and reliability".
STANDARD_SCHEDULE = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
_LOOPBACK = Address(host="127.0.0.1", port=8484)


def _duration(shortest: str, longest: str) -> Scalar[float]:
    return Scalar(str, 'a duration with its unit, such as "30s"', duration_between(shortest, longest))


def _number(low: int, high: int) -> Scalar[int]:
    return Scalar(int, f"a whole number from {low} to {high}", number_between(low, high))


def _word(*words: str) -> Scalar[str]:
    return Scalar(str, f"one of {', '.join(words)}", one_of(*words))


class _RetrySchedule:
    """Reads a list of durations, or the name of a schedule."""

    toml: type = str
    _delays = ListOf(_duration("0s", "30d"), '"standard" or a list of durations')

    def read(self, raw: Any, at: Place, report: Report) -> tuple[float, ...] | None:
        return STANDARD_SCHEDULE if raw == "standard" else self._delays.read(raw, at, report)


class _JsonTable:
    """Reads a table that is kept as it is."""

    toml: type = dict

    def read(self, raw: Any, at: Place, report: Report) -> object | None:
        return _JSON.read(raw, at, report) if has_type(raw, dict, "a table", at, report) else None


_TEXT = Scalar(str, "text", str)
_SWITCH = Scalar(bool, "true or false", bool)
_PATH = Scalar(str, "a path", parse_path)
_PROXY = Scalar(str, 'a proxy such as "http://proxy.internal:3128"', parse_proxy)
_DATABASE = Scalar(str, 'an address such as "postgresql://relay@db.internal/relay"', parse_database)
_ADDRESS = Scalar(str, 'an address such as "127.0.0.1:8484"', parse_address)
_HOSTS = ListOf(Scalar(str, "a host name", parse_host), "a list of host names")
_NETWORKS = ListOf(Scalar(str, 'a range such as "10.1.0.0/16"', parse_network), "a list of address ranges")
_PORTS = ListOf(_number(1, 65535), "a list of ports", at_least=1)
_EVENT_SIZE = Scalar(str, 'a size with its unit, such as "256KiB"', size_between("1B", "16MiB"))
_RATE = Scalar(str, 'a rate such as "50/s"', parse_rate)
_OUTBOX_SIZE = Scalar(str, 'a size with its unit, such as "10GiB"', size_between("1MiB", "1000TiB"))
_SOURCE = Scalar(str, "a URI reference", parse_source)
_TOKENS = ListOf(Scalar(str, "text", parse_token), "a list of tokens")
_SECRET = Scalar(str, "text", parse_secret)
_SECRETS = ListOf(_SECRET, "a list of secrets", at_least=1)
_SIGNATURES = ListOf(SignatureEntry(), "a list of schemes", at_least=1, distinct=True)
_FORMAT = _word(*formats.FORMATS)
_ENDPOINT_ID = Scalar(str, "text", parse_endpoint_id)
_EVENTS = ListOf(Scalar(str, "an event type", parse_subscription), "a list of event types", at_least=1)
_SCHEMA = Scalar(str, "the name of a schema", parse_schema)
_JSON = Scalar(object, "a value", parse_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """[server]: where and how submissions are taken."""

    listen: Annotated[Address, _ADDRESS] = _LOOPBACK
    ops_listen: Annotated[Address | None, _ADDRESS] = None
    source: Annotated[str, _SOURCE] = formats.DEFAULT_SOURCE
    tokens: Annotated[tuple[Secret, ...], _TOKENS] = ()
    allowed_hosts: Annotated[tuple[str, ...], _HOSTS] = ()
    max_event_size: Annotated[int, _EVENT_SIZE] = 256 * 1024
    shutdown_grace_seconds: Annotated[float, _duration("0s", "1h"), "shutdown_grace"] = 8.0
    linger_seconds: Annotated[float, _duration("0s", "1h"), "linger"] = 0.0
    page: Annotated[bool, _SWITCH] = True
    loop: Annotated[Literal["auto", "asyncio", "uvloop"], _word("auto", "asyncio", "uvloop")] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxSettings:
    """[outbox]: where events are kept, and for how long."""

    path: Annotated[Path, _PATH] = Path("relay.db")
    url: Annotated[Secret | None, _DATABASE] = None  # of a database, in place of a file
    durability: Annotated[Literal["full", "normal"], _word("full", "normal")] = "full"
    retention_seconds: Annotated[float, _duration("1s", "3650d"), "retention"] = 7 * 86_400.0
    max_size: Annotated[int, _OUTBOX_SIZE] = 10 << 30
    max_pending: Annotated[int | None, _number(1, 1_000_000_000)] = None
    listen_url: Annotated[Secret | None, _DATABASE] = None
    heartbeat_seconds: Annotated[float, _duration("50ms", "1m"), "heartbeat"] = 5.0
    dead_after_seconds: Annotated[float, _duration("200ms", "1h"), "dead_after"] = 20.0

    @property
    def place(self) -> Path | Secret:
        """Where the outbox is."""
        return self.url if self.url is not None else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySettings:
    """[delivery]: how events are brought to every endpoint that does not say otherwise."""

    timeout_seconds: Annotated[float, _duration("1ms", "1h"), "timeout"] = 15.0
    retry_schedule: Annotated[tuple[float, ...], _RetrySchedule()] = (5.0, 300.0, 18_000.0)
    max_age_seconds: Annotated[float, _duration("1s", "3650d"), "max_age"] = 7 * 86_400.0
    down_after: Annotated[int, _number(0, 1000)] = 5
    probe_interval_seconds: Annotated[float, _duration("10ms", "1d"), "probe_interval"] = 30.0
    probe_max_seconds: Annotated[float, _duration("10ms", "1d"), "probe_max"] = 600.0
    concurrency: Annotated[int, _number(1, 1000)] = 32
    rate: Annotated[float | None, _RATE] = None  # attempts a second
    order: Annotated[Literal["none", "key"], _word("none", "key")] = "none"
    signatures: Annotated[tuple[Signature, ...], _SIGNATURES] = ("standard", "socialsyncer")
    format: Annotated[str, _FORMAT] = "event"
    source: str = formats.DEFAULT_SOURCE  # no key: that of [server], which formats show
    headers: Annotated[tuple[tuple[str, Secret], ...], HeaderTable()] = ()
    tls_ca_file: Annotated[Path | None, _PATH] = None
    client_cert_file: Annotated[Path | None, _PATH] = None
    client_key_file: Annotated[Path | None, _PATH] = None
    tls: TlsFiles | None = None  # no key: what these three hold
    proxy: Annotated[Proxy | None, _PROXY] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressSettings:
    """[egress]: where deliveries may go."""

    allow_private: Annotated[tuple[egress.Network, ...], _NETWORKS] = ()
    allow_private_for_api: Annotated[bool, _SWITCH] = False
    ports: Annotated[tuple[int, ...] | None, _PORTS] = None  # None: all
    allow_http: Annotated[bool, _SWITCH] = False

    @property
    def policy(self) -> egress.Policy:
        """The same as the guard wants it."""
        return egress.Policy(
            allow_private=self.allow_private,
            allow_private_for_api=self.allow_private_for_api,
            ports=None if self.ports is None else frozenset(self.ports),
            allow_http=self.allow_http,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging:
    """[logging]: what the relay tells on stderr; without a format text on a terminal, JSON elsewhere."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], _word("debug", "info", "warning", "error")
    ] = "info"
    format: Annotated[Literal["json", "text"] | None, _word("json", "text")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """[[endpoints]]: one receiver; every key of [delivery] may stand here too."""

    id: Annotated[str, _ENDPOINT_ID]
    url: Annotated[str, _TEXT]  # judged where [egress] is at hand
    events: Annotated[tuple[str, ...], _EVENTS]
    description: Annotated[str, _TEXT] = ""
    secret: Annotated[Secret | None, _SECRET] = None
    secrets: Annotated[tuple[Secret, ...], _SECRETS] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """[[sources]]: a PostgreSQL of an application's own, where `relay_submit` is called."""

    id: Annotated[str, _ENDPOINT_ID]
    url: Annotated[Secret, _DATABASE]
    schema: Annotated[str, _SCHEMA] = "public"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSettings:
    """[events."…"]: a type of event the application may post."""

    description: Annotated[str, _TEXT] = ""
    sample: Annotated[object, _JSON] = None
    schema: Annotated[Mapping[str, object] | None, _JsonTable()] = None


# The tables that stand once, and whose single values a variable can set.
TABLES: Mapping[str, type] = {
    "server": Server,
    "outbox": OutboxSettings,
    "delivery": DeliverySettings,
    "egress": EgressSettings,
    "logging": Logging,
}
