"""The config: a TOML file and the environment in, frozen objects that other modules own out.

Contract section 8. Every mistake is told at once, as `file:line: table.key: what is wrong`. Nothing else
in the relay reads the config or the environment.

    lines      where each key stands in the text
    source     file + overrides + substitution -> raw tables
    check      raw tables -> values, noting what is wrong
    quantity, address, header, signature, values     what single values mean
    settings   which keys there are
    endpoint   [[endpoints]] -> relay.model.Endpoint
    database   [[sources]] -> relay.model.Source
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from relay.catalogue import EventType, SchemaError, validator
from relay.config.address import Address, parse_database
from relay.config.check import Report, WrongValueError, has_type, keys, read_table, refuse_unknown
from relay.config.database import read_sources
from relay.config.endpoint import SettingsError, read_api_endpoint, read_endpoints, read_tls
from relay.config.lines import Place
from relay.config.quantity import parse_duration, parse_rate, parse_size
from relay.config.settings import (
    STANDARD_SCHEDULE,
    TABLES,
    DeliverySettings,
    EgressSettings,
    EventSettings,
    Logging,
    OutboxSettings,
    Server,
    SourceSettings,
)
from relay.config.source import UnreadableError, read_source, substituted
from relay.config.values import parse_event_type
from relay.model import Endpoint, Secret, Source

__all__ = [
    "STANDARD_SCHEDULE",
    "Address",
    "Config",
    "ConfigError",
    "DeliverySettings",
    "EgressSettings",
    "EventType",
    "Logging",
    "OutboxSettings",
    "Server",
    "SettingsError",
    "WrongValueError",
    "find",
    "load",
    "parse_duration",
    "parse_rate",
    "parse_size",
    "read_api_endpoint",
    "read_database",
]

T = TypeVar("T")

_DEFAULT_PATHS = (Path("relay.toml"), Path("/etc/relay/relay.toml"))


class ConfigError(Exception):
    """The config cannot be used; each problem is one line that says where it is and what is wrong."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the relay was told, checked."""

    server: Server
    outbox: OutboxSettings
    delivery: DeliverySettings
    egress: EgressSettings
    logging: Logging
    endpoints: tuple[Endpoint, ...]
    events: Mapping[str, EventType]
    sources: tuple[Source, ...] = ()


def find(option: str | None, environ: Mapping[str, str]) -> Path:
    """Return the file to read: the --config option, else $RELAY_CONFIG, else the first that exists."""
    given = option or environ.get("RELAY_CONFIG")
    candidates = (Path(given),) if given else _DEFAULT_PATHS
    for path in candidates:
        if _is_there(path):
            return path
    looked = " and ".join(str(path) for path in candidates)
    asked = "--config" if option else "RELAY_CONFIG" if given else "no --config, no RELAY_CONFIG"
    raise ConfigError((f"no config file: looked for {looked} ({asked})",))


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check the config; raise ConfigError with everything that is wrong with it."""
    report = Report()
    try:
        source = read_source(path, environ, TABLES, report)
    except UnreadableError as error:
        raise ConfigError((str(error),)) from None
    config = _config(source.tables, report)
    if report.found:
        raise ConfigError(source.told(report))
    return config


def read_database(written: str, environ: Mapping[str, str]) -> Secret:
    """Read a database's address as `outbox.url` holds it, with what it refers to. Raises WrongValueError."""
    return parse_database(substituted(written, environ))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()  # not is_file: a shell's <(command) is a pipe
    except OSError:  # a folder on the way may not be entered
        return False


def _config(tables: Mapping[str, Any], report: Report) -> Config:
    refuse_unknown(tables, [*TABLES, "endpoints", "events", "sources"], (), report)
    server = _table(Server, "server", tables, report)
    delivery = replace(_table(DeliverySettings, "delivery", tables, report), source=server.source)
    delivery = replace(delivery, tls=read_tls(delivery, tables.get("delivery", {}), ("delivery",), report))
    rules = _table(EgressSettings, "egress", tables, report)
    _check_listening(server, report)
    outbox = _table(OutboxSettings, "outbox", tables, report)
    _check_outbox(outbox, tables.get("outbox"), report)
    return Config(
        server=server,
        outbox=outbox,
        delivery=delivery,
        egress=rules,
        logging=_table(Logging, "logging", tables, report),
        endpoints=read_endpoints(tables.get("endpoints", []), delivery, rules.policy, report),
        events=_catalogue(tables.get("events", {}), report),
        sources=read_sources(tables.get("sources", []), SourceSettings, report),
    )


def _check_outbox(outbox: OutboxSettings, raw: Any, report: Report) -> None:
    """Note what is said of a file where the outbox is in a database, and a heart that beats too slowly."""
    if isinstance(raw, dict) and "url" in raw:
        for name, instead in (
            ("path", "the outbox is a file or in a database, not both: leave one out"),
            ("durability", "is of a file; that of a database is its own synchronous_commit"),
        ):
            if name in raw:
                report.wrong(("outbox", name), f"stands beside url: {instead}")
    if outbox.dead_after_seconds < 2 * outbox.heartbeat_seconds:  # one lost beat would be a death
        name = "dead_after" if "dead_after" in raw else "heartbeat"
        report.wrong(("outbox", name), "dead_after must be twice heartbeat at the least")


def _table(kind: type[T], name: str, tables: Mapping[str, Any], report: Report) -> T:
    (fields,) = read_table(tables.get(name, {}), (name,), report, kind)
    return kind(**fields)


def _catalogue(raw: Any, report: Report) -> dict[str, EventType]:
    at = ("events",)
    if not has_type(raw, dict, "a table for each event type", at, report):
        return {}
    return {name: _event_type(name, table, (*at, name), report) for name, table in raw.items()}


def _event_type(name: str, table: Any, at: Place, report: Report) -> EventType:
    try:
        parse_event_type(name)
    except WrongValueError as wrong:
        report.wrong(at, str(wrong))
    if (split := _split_name(table)) is not None:
        report.wrong((*at, split), f'a type with dots is quoted: [events."{name}.{split}"]')
        return EventType(type=name)
    (fields,) = read_table(table, at, report, EventSettings)
    event_type = EventType(type=name, **fields)
    if event_type.schema is not None:
        _check_schema(event_type, at, report)
    return event_type


def _check_schema(event_type: EventType, at: Place, report: Report) -> None:
    """Compile the schema and hold the sample against it: one that does not fit teaches the wrong thing."""
    try:
        validate = validator(event_type.schema or {})
    except SchemaError as error:
        report.wrong((*at, "schema"), str(error))
        return
    if event_type.sample is not None:
        for where, detail in validate(event_type.sample):
            report.wrong((*at, "sample"), f"does not fit the schema: {where or 'it'} {detail}")


def _split_name(table: Any) -> str | None:
    """Return the rest of a type that was not quoted, so that TOML made nested tables of its parts."""
    known = keys(EventSettings)
    inner = table.items() if isinstance(table, dict) else ()
    return next(
        (
            name
            for name, value in inner
            if isinstance(value, dict) and name not in known and not get_close_matches(name, known)
        ),
        None,
    )


def _check_listening(server: Server, report: Report) -> None:
    listen, ops_listen = server.listen, server.ops_listen
    # Without tokens anyone who can connect may submit, so only this machine may connect (contract 3).
    if not listen.is_local and not server.tokens and report.clean(("server", "tokens")):
        report.wrong(
            ("server", "listen"),
            f"{listen} can be reached from other machines: set server.tokens, "
            "or listen on 127.0.0.1 or a unix socket",
        )
    if ops_listen == listen and (listen.port or listen.path):
        report.wrong(("server", "ops_listen"), "is the same address as server.listen")
