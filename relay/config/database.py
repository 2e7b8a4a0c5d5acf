"""All [[sources]] tables in, a `relay.model.Source` of each out."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from relay.config.check import Report, WrongValueError, has_type, quoted, read_table
from relay.config.lines import Place
from relay.model import Source

OWN = "outbox"  # what the outbox's own database is called
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


def read_sources(raw: Any, kind: type, report: Report) -> tuple[Source, ...]:
    """Read all sources; those with a mistake are noted and left out."""
    at: Place = ("sources",)
    if not has_type(raw, list, "[[sources]] tables", at, report):
        return ()
    if raw and find_spec("asyncpg") is None:
        report.wrong(at, "need the extra: pip install 'relay[postgres]'")
    sources: dict[str, Source] = {}
    for index, table in enumerate(raw):
        source = _source(table, (*at, index), kind, report)
        if source is None:
            continue
        if source.id in sources:
            report.wrong((*at, index, "id"), f"{quoted(source.id)} is the id of another source already")
        elif any(source.url == each.url and source.schema == each.schema for each in sources.values()):
            report.wrong((*at, index, "url"), "is the url of another source already")
        else:
            sources[source.id] = source
    return tuple(sources.values())


def parse_schema(text: str) -> str:
    """Read the name of a schema."""
    if not _IDENTIFIER.fullmatch(text):
        raise WrongValueError(
            f"{quoted(text)} is not the name of a schema: A-Z a-z 0-9 _, 63 characters at most"
        )
    return str(text)


def _source(table: Mapping[str, Any], at: Place, kind: type, report: Report) -> Source | None:
    (own,) = read_table(table, at, report, kind)
    if own.get("id") == OWN:
        report.wrong((*at, "id"), f"{quoted(OWN)} is the outbox's own database: choose another")
    return Source(**own) if report.clean(at) else None
