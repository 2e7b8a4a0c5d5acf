"""One entry of `signatures`: a scheme's name or an inline table in, what `relay.signing` knows it as out."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from relay.config.check import Report, Scalar, WrongValueError, read_table
from relay.config.header import name_problem
from relay.config.lines import Place
from relay.config.quantity import one_of
from relay.signing import ALGORITHMS, ENCODINGS, SCHEMES, GenericForm, Signature

# What can stand at the beginning of a header's value and arrive as it is.
_PREFIX = re.compile(r"(?:[\x21-\x7e][\x20-\x7e]*)?")


def _parse_header(text: str) -> str:
    if problem := name_problem(text):
        raise WrongValueError(problem)
    return str(text)


def _parse_prefix(text: str) -> str:
    if not _PREFIX.fullmatch(text):
        raise WrongValueError("is not printable ASCII, or begins with a space")
    return str(text)


def _word(words: tuple[str, ...]) -> Scalar[str]:
    return Scalar(str, f"one of {', '.join(words)}", one_of(*words))


_NAME = Scalar(str, "a scheme's name or a table with its header", one_of(*SCHEMES))


@dataclass(frozen=True, slots=True, kw_only=True)
class _GenericSettings:
    """The keys of an inline table."""

    header: Annotated[str, Scalar(str, "the name of a header", _parse_header)]
    prefix: Annotated[str, Scalar(str, "text", _parse_prefix)] = ""
    encoding: Annotated[str, _word(tuple(ENCODINGS))] = "hex"
    algorithm: Annotated[str, _word(ALGORITHMS)] = "sha256"


class SignatureEntry:
    """Reads the name of a scheme, or a table that spells one out."""

    toml: type = str

    def read(self, raw: Any, at: Place, report: Report) -> Signature | None:
        if not isinstance(raw, dict):
            return _NAME.read(raw, at, report)
        (fields,) = read_table(raw, at, report, _GenericSettings)
        return GenericForm(**fields) if report.clean(at) else None
