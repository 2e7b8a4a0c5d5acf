"""The relay's own log: one line a record, whatever it holds, and no secret by any way a value can be told."""

import copy
import json
import logging
import pickle
import string
import sys
import traceback
from dataclasses import asdict, astuple, dataclass, fields, replace

import orjson
import pytest

from relay.logs import JsonLines, Text
from relay.model import Secret
from tests.lanes import endpoint

FOREIGN = {
    "line ends": "a\r\nb\nc\u2028d\u2029e\x85f\x0b\x0c\x1c\x1d\x1e",
    "a record": '\n{"level":"critical","event":"forged"}\n',
    "controls of terminals": "\x1b[2J\x9b31m\x7f\x07\x08\0",
    "half a character": "\udcff\ud800",
    "an integer": 2**70,
    "bytes": b"\xff\n\x1b",
    "a nesting": {"a": ["\n\x1b", {"b": Secret("canary")}]},
    "a name": {"\n\x9b": 1},
}


def record(value: object, *, error: bool = False) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "relay", "msg": "attempt_failed", "levelno": 30, "levelname": "WARNING", "value": value}
    )
    if error:
        try:
            raise ValueError(value)  # noqa: TRY301 - for its traceback
        except ValueError:
            made.exc_info = sys.exc_info()
    return made


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_record_is_one_line_of_json_whatever_it_holds(name, error):
    line = JsonLines().format(record(FOREIGN[name], error=error))
    assert line.splitlines() == [line]
    assert not [character for character in line if character < " " or "\x7f" <= character <= "\x9f"]
    told = json.loads(line)
    assert (told["event"], told["level"]) == ("attempt_failed", "warning")
    assert ("trace" in told) == error
    line.encode()


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_record_for_people_is_one_line_and_a_traceback_keeps_behind_its_margin(name, error):
    first, *rest = Text().format(record(FOREIGN[name], error=error)).split("\n")
    assert "attempt_failed" in first
    assert bool(rest) == error
    assert all(line.startswith("  | ") for line in rest)
    for line in (first, *rest):
        assert line.splitlines() == [line]
        assert not [character for character in line if character < " " or "\x7f" <= character <= "\x9f"]
        line.encode()


# Secrets


CANARY = "canary-Sh0wn-N0where"


@dataclass
class Holder:
    name: str
    secret: Secret


@dataclass(frozen=True, slots=True)
class Frozen:
    secrets: tuple[Secret, ...]


HOLDER = Holder("main", Secret(CANARY))
WAYS = {
    "str": str,
    "repr": repr,
    "ascii": ascii,
    "format": format,
    "format with a width": lambda secret: f"{secret:>50}|{secret!s:5}|{secret!r}",
    "percent": lambda secret: "%s %r %50s" % (secret, secret, secret),  # noqa: UP031 - one of the ways
    "str.format": "{0} {0!r} {0.__class__}".format,
    "template": lambda secret: string.Template("$a").substitute(a=secret),
    "join of reprs": lambda secret: repr([secret, (secret,), {secret: secret}]),
    "dataclass": lambda _: repr(HOLDER) + repr(Frozen((HOLDER.secret,))),
    "asdict": lambda _: repr(asdict(HOLDER)) + repr(astuple(HOLDER)) + repr(replace(HOLDER, name="a")),
    "copy": lambda secret: repr(copy.copy(secret)) + repr(copy.deepcopy([secret])),
    "dir": lambda secret: repr(dir(secret)) + repr(Secret.__slots__) + repr(fields(HOLDER)),
    "default of json": lambda secret: json.dumps({"a": secret}, default=str),
    "default of orjson": lambda secret: orjson.dumps(HOLDER, default=str).decode(),
    "log": lambda secret: JsonLines().format(record({"a": [secret, HOLDER]}, error=True)),
    "log for people": lambda secret: Text().format(record(secret, error=True)),
    "locals of a traceback": lambda secret: failing([secret]),
    "endpoint": lambda secret: repr(endpoint("main", headers=(("X-Key", secret),))),
}


def failing(secret: object) -> str:
    held = {"secret": secret}
    try:
        raise ValueError(secret, held)  # noqa: TRY301 - for its traceback
    except ValueError as error:
        return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


@pytest.mark.parametrize("name", WAYS)
def test_no_text_form_of_a_secret_shows_it(name):
    told = WAYS[name](Secret(CANARY))
    assert CANARY not in told
    assert name == "dir" or "***" in told, "shown, but masked"


def test_a_secret_is_no_text_and_leaves_the_process_in_no_form():
    secret = Secret(CANARY)
    for refused in (
        lambda: json.dumps(secret), lambda: orjson.dumps(secret), lambda: orjson.dumps(HOLDER),
        lambda: "" + secret, lambda: "".join([secret]), lambda: bytes(secret), lambda: list(secret),
        lambda: secret[0],
        *(lambda version=version: pickle.dumps(secret, version) for version in range(6)),
        lambda: pickle.dumps(HOLDER), lambda: vars(secret),
    ):  # fmt: skip
        with pytest.raises(TypeError) as error:
            refused()
        assert CANARY not in str(error.value)


def test_a_secret_is_still_itself():
    secret = Secret(CANARY)
    assert secret.reveal() == copy.deepcopy(secret).reveal() == CANARY
    assert secret == Secret(CANARY)
    assert secret != Secret("other")
    assert secret != CANARY
    assert {secret: 1}[Secret(CANARY)] == 1
