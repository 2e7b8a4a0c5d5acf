"""Where the config comes from: a TOML file and the environment in, one tree of raw values out.

Every value is traced to its line or its variable, so that a mistake can say where to go. Nothing here
knows what the values mean.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay.config.check import UNRESOLVED, Report, Substituted, WrongValueError, dotted, keys, nearest, quoted
from relay.config.lines import Place, lines_of

_TOML_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_REFERENCE = re.compile(r"\$(?:\$|\{([^}]*)\}?)")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_MALFORMED = "${ does not begin ${env:NAME}, ${env:NAME:-default} or ${file:PATH}; $$ is a plain $"
_LAST_NEWLINE = re.compile(r"\r?\n\Z")


class UnreadableError(Exception):
    """The file cannot be read at all; the text begins with its name and, where there is one, the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The raw tables and where each value stands."""

    path: Path
    tables: dict[str, Any]
    lines: Mapping[Place, int]
    variables: Mapping[Place, str]  # of the values that come from the environment

    def told(self, report: Report) -> tuple[str, ...]:
        """Write down what is wrong: first the file's mistakes by line, then the environment's."""
        mistakes = []
        for at, text in report.found:
            variable = next((self.variables[part] for part in _within(at) if part in self.variables), None)
            line = next(self.lines[part] for part in _within(at) if part in self.lines)
            where = variable or f"{self.path}:{line}"
            order = (variable is not None, line)
            mistakes.append((order, f"{where}: {dotted(at)}: {text}{self._endpoint(at)}"))
        return tuple(text for _, text in sorted(mistakes, key=lambda mistake: mistake[0]))

    def _endpoint(self, at: Place) -> str:
        """Name the endpoint whose key is wrong: an index alone has to be counted."""
        match at:
            case ("endpoints", int(index), key, *_) if key != "id":
                name = self.tables["endpoints"][index].get("id")
                named = isinstance(name, str) and not isinstance(name, Substituted) and len(name) <= 64
                return f' (endpoint "{name}")' if named and name.isprintable() else ""
            case _:
                return ""


def read_source(
    path: Path, environ: Mapping[str, str], overridable: Mapping[str, type], report: Report
) -> Source:
    """Read the file, let variables override its keys, and substitute what its values refer to."""
    text = _text_of(path)
    try:
        tables = tomllib.loads(text)
        lines = lines_of(text)
    except RecursionError:
        raise UnreadableError(f"{path}:1: is nested too deeply") from None
    except ValueError as error:
        raise UnreadableError(_syntax_mistake(path, text, str(error))) from None
    variables = _override(tables, environ, overridable, report)
    substituted = _Substitution(environ, variables, report).of(tables, ())
    return Source(path=path, tables=substituted, lines=lines, variables=variables)


def substituted(written: str, environ: Mapping[str, str]) -> str:
    """Substitute what one value from elsewhere refers to. Raises WrongValueError."""
    return _REFERENCE.sub(_Substitution(environ, {}, Report())._referred, written)  # noqa: SLF001 - our own


def _text_of(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableError(f"{path}:{line}: is not UTF-8") from None


def _syntax_mistake(path: Path, text: str, message: str) -> str:
    position = _TOML_POSITION.search(message)
    if position and position[1]:
        line, column = position[1], f" (column {position[2]})"
    else:
        line, column = text.rstrip("\n").count("\n") + 1, ""
    return f"{path}:{line}: is not TOML: {_TOML_POSITION.sub('', message)}{column}"


def _override(
    tables: dict[str, Any], environ: Mapping[str, str], overridable: Mapping[str, type], report: Report
) -> dict[Place, str]:
    """Put each RELAY_TABLE__KEY into the tables; return which places came from which variable."""
    variables: dict[Place, str] = {}
    for variable, text in sorted(environ.items()):
        table, separator, name = variable.removeprefix("RELAY_").lower().partition("__")
        if not variable.startswith("RELAY_") or not separator:
            continue
        place = (table, name)
        variables[place] = variable
        try:
            value = _override_value(table, name, text, overridable)
        except WrongValueError as wrong:
            report.wrong(place, str(wrong))
            continue
        if isinstance(raw := tables.setdefault(table, {}), dict):
            raw[name] = value
    return variables


def _override_value(table: str, name: str, text: str, overridable: Mapping[str, type]) -> object:
    """Read the variable's text as what the key holds in TOML."""
    if table not in overridable:
        raise WrongValueError(f"no table with keys that a variable can set{nearest(table, overridable)}")
    known = keys(overridable[table])
    if name not in known:
        raise WrongValueError(f"unknown key{nearest(name, known)}")
    toml = known[name].reader.toml
    if toml in (list, dict):
        raise WrongValueError("a variable can set single values only, no lists and no tables")
    if not _is_utf8(text):
        raise WrongValueError("is not UTF-8 text")
    if toml is bool and text in ("true", "false"):
        return text == "true"
    if toml is int and text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    return text


@dataclass(frozen=True, slots=True)
class _Substitution:
    """Replaces ${env:NAME}, ${env:NAME:-default}, ${file:PATH} and $$ in text, once."""

    environ: Mapping[str, str]
    overridden: Mapping[Place, str]
    report: Report

    def of(self, value: Any, at: Place) -> Any:
        if at in self.overridden:
            return value
        match value:
            case dict():
                return {name: self.of(item, (*at, name)) for name, item in value.items()}
            case list():
                return [self.of(item, (*at, index)) for index, item in enumerate(value)]
            case str() if "$" in value:
                return self._text(value, at)
            case _:
                return value

    def _text(self, written: str, at: Place) -> object:
        try:
            text = Substituted(_REFERENCE.sub(self._referred, written))
        except WrongValueError as wrong:
            self.report.wrong(at, str(wrong))
            return UNRESOLVED
        text.written = written
        return text

    def _referred(self, match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        kind, _, name = match[1].partition(":")
        if not match[0].endswith("}") or kind not in ("env", "file"):
            # Not shown as it is written: it may be part of a secret that has these characters by chance.
            raise WrongValueError(_MALFORMED)
        return _file(name) if kind == "file" else self._variable(name)

    def _variable(self, name: str) -> str:
        match = _VARIABLE.fullmatch(name)
        if match is None:
            raise WrongValueError(_MALFORMED)
        # As in a shell, :- stands in for an empty variable too.
        text = self.environ.get(match[1], "" if match[2] is not None else None)
        if text is None:
            raise WrongValueError(f"the variable {match[1]} is not set")
        if not _is_utf8(text):
            raise WrongValueError(f"the variable {match[1]} is not UTF-8 text")
        return text or match[2] or ""


def _file(name: str) -> str:
    try:
        text = Path(name).read_bytes().decode()
    except OSError as error:
        raise WrongValueError(f"the file {quoted(name)} cannot be read: {error.strerror}") from None
    except ValueError:
        raise WrongValueError(f"the file {quoted(name)} is not UTF-8 text") from None
    return _LAST_NEWLINE.sub("", text)


def _is_utf8(text: str) -> bool:
    """Variables may hold bytes that are no text; Python carries them as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _within(at: Place) -> list[Place]:
    """The place itself and what it stands in, innermost first."""
    return [at[:length] for length in range(len(at), -1, -1)]
