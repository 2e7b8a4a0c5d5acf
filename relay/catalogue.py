"""The event catalogue: which types there are, what they look like, and whether data fits (contract 4).

Without a catalogue any type goes. The JSON Schemas of a catalogue are an extra (`relay[schema]`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import NoReturn

MOST_PROBLEMS = 50  # told of one event: a large list with one mistake in each item has one mistake

Problem = tuple[str, str]  # where in the data (a JSON pointer's end), what is wrong
Validate = Callable[[object], Iterable[Problem]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventType:
    """A type of event the application posts, for people and for tests."""

    type: str
    description: str = ""
    sample: object = None
    schema: Mapping[str, object] | None = None


class Catalogue:
    """The types that may be posted; all of them when it is empty."""

    def __init__(self, types: Iterable[EventType]) -> None:
        self.types = {each.type: each for each in types}
        self._validate = {
            each.type: validator(each.schema) for each in self.types.values() if each.schema is not None
        }

    def wrong_type(self, type_: str) -> str | None:
        """Say why a type may not be posted, with the one that was probably meant."""
        if not self.types or type_ in self.types:
            return None
        near = get_close_matches(type_, self.types, n=1)
        return f"is not in the catalogue; did you mean {near[0]!r}?" if near else "is not in the catalogue"

    def wrong_data(self, type_: str, data: object) -> list[Problem]:
        """Return what in the data does not fit the type's schema, if it has one."""
        validate = self._validate.get(type_)
        return list(validate(data)) if validate is not None else []


class SchemaError(ValueError):
    """A schema that cannot be used; the text says why and what to do."""


def validator(schema: Mapping[str, object]) -> Validate:
    """Compile a JSON Schema (2020-12 unless it says otherwise). Raises SchemaError."""
    try:
        import jsonschema_rs
    except ImportError:
        raise SchemaError("schemas need the extra: pip install 'relay[schema]'") from None
    try:
        compiled = jsonschema_rs.validator_for(dict(schema), mask="the value", retriever=_refuse_to_fetch)
    except (ValueError, jsonschema_rs.ValidationError) as error:
        raise SchemaError(f"is not a JSON Schema: {str(error).splitlines()[0]}") from None

    def validate(data: object) -> Iterable[Problem]:
        for error in islice(compiled.iter_errors(data), MOST_PROBLEMS):
            path = "".join(
                "/" + str(step).replace("~", "~0").replace("/", "~1") for step in error.instance_path
            )
            yield path, error.message

    return validate


def _refuse_to_fetch(uri: str) -> NoReturn:
    raise ValueError(f"the relay fetches nothing; put {uri} under $defs")
