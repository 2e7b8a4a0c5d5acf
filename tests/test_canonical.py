"""Canonical JSON against its rules, against real JavaScript, and against anything at all.

The tables say each rule once. The corpus asks the Node on this machine what it writes for thousands of
values. The properties look for a value or a text that nobody thought of.
"""

import json
import math
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from relay import canonical
from relay.canonical import JSON, NotJSON, Unrepresentable, encode, parse

CORPUS_SIZE = 24_000
SAME = None  # the text is canonical already


def rewritten(text: str) -> str:
    return encode(parse(text.encode())).decode()


def problems(text: str, pointer: str = "#") -> tuple[tuple[str, str], ...]:
    with pytest.raises(Unrepresentable) as refusal:
        encode(parse(text.encode()), pointer)
    return refusal.value.problems


@pytest.mark.parametrize(
    ("written", "canonically"),
    [
        ("1.0", "1"),
        ("-1.0", "-1"),
        ("1e2", "100"),
        ("1E+2", "100"),
        ("100.0e-2", "1"),
        ("12.50", "12.5"),
        ("0", SAME),
        ("-0", "0"),
        ("-0.0", "0"),
        ("0e0", "0"),
        ("-0e-5", "0"),
        ("0.1", SAME),
        ("0.0001", SAME),
        ("1e-5", "0.00001"),
        ("0.000001", SAME),
        ("0.0000012345", "0.0000012345"),
        ("-1e-6", "-0.000001"),
        ("1e-7", SAME),
        ("0.0000001", "1e-7"),
        ("9.5E-07", "9.5e-7"),
        ("-1.5e-10", SAME),
        ("5e-324", SAME),
        ("2e-324", "0"),
        ("1e-400", "0"),
        ("2.2250738585072014e-308", SAME),
        ("1.7976931348623157e308", "1.7976931348623157e+308"),
        ("1e15", "1000000000000000"),
        ("1e16", "10000000000000000"),
        ("123456789012345680000.0", "123456789012345680000"),
        ("999999999999999900000.0", "999999999999999900000"),
        ("1e20", "100000000000000000000"),
        ("1e21", "1e+21"),
        ("-123e20", "-1.23e+22"),
        ("1e+100", SAME),
        ("9007199254740993.0", "9007199254740992"),
    ],
)
def test_doubles_are_written_as_javascript_writes_numbers(written, canonically):
    """A receiver in Node re-serialises before it verifies; one digit apart is a failed signature."""
    expected = written if canonically is SAME else canonically

    assert rewritten(written) == expected
    assert rewritten(f"[{written}]") == f"[{expected}]"
    assert rewritten(f'{{"n":{written},"o":{written}}}') == f'{{"n":{expected},"o":{expected}}}'


@pytest.mark.parametrize(
    "integer",
    [2**53, 2**53 + 1, -(2**53) - 1, 10**18, -(2**63), 2**63 - 1, 2**63, 10**19, 2**64 - 1],
)
def test_integers_of_64_bits_stay_exact(integer):
    """Ids of other services are integers beyond 2^53; a receiver that can hold them must get them whole."""
    assert rewritten(f'{{"id":{integer}}}') == f'{{"id":{integer}}}'
    assert rewritten(str(integer)) == str(integer)


@pytest.mark.parametrize(
    "digits",
    [
        "18446744073709551616",
        "-9223372036854775809",
        "1" + "0" * 21,
        "-1" + "0" * 400,
        "1" * 5000,
        "-" + "1" * 5000,
    ],
    ids=lambda digits: f"{digits[:9]}… of {len(digits)} characters",
)
@pytest.mark.parametrize("text", ["{}", " {}", "[{}]", "[0,{}]", "[ {} ]", '{{"a":{}}}', '{{"a": {}}}'])
def test_integers_beyond_64_bits_are_refused_and_never_rounded(text, digits):
    """A rounded id points at somebody else's post."""
    ((_, sentence),) = problems(text.format(digits))

    assert "2^64-1" in sentence


def test_the_largest_double_integers_written_as_doubles_are_no_integers():
    """Whoever writes 1e19 or 2.0 asked for a double, whatever else the text holds."""
    assert rewritten("[1e25,18446744073709551616.0,184467440737095516160e-1]") == (
        "[1e+25,18446744073709552000,18446744073709552000]"
    )


def test_a_refused_integer_that_a_later_member_replaces_does_no_harm():
    """Only the last of duplicate members is the value."""
    assert rewritten('{"a":18446744073709551616,"b":2,"a":1}') == '{"a":1,"b":2}'


def test_every_mistake_is_named_by_its_place():
    """Somebody who fixes one mistake at a time gives up at the third."""
    text = '{"a/b":[1,18446744073709551616],"m~n é%":{"0":-9223372036854775809},"ok":1}'

    found = problems(text, "#/data")

    assert [pointer for pointer, _ in found] == ["#/data/a~1b/1", "#/data/m~0n%20%C3%A9%25/0"]


def test_a_refusal_names_a_bounded_number_of_mistakes():
    """One hostile array must not become an answer of megabytes."""
    found = problems(f"[{','.join([str(2**64)] * 1000)}]")

    assert [pointer for pointer, _ in found] == [f"#/{index}" for index in range(canonical.MAX_PROBLEMS)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "NaN",
        "Infinity",
        "-Infinity",
        "[NaN]",
        "1e400",
        "[-1e400]",
        "[1e400,18446744073709551616]",
        "[NaN,18446744073709551616]",
        '["\\ud800",18446744073709551616]',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\ud800x"',
        '{"\\ud800":1}',
        "01",
        "1.",
        ".5",
        "+1",
        "1 2",
        "[1,]",
        '{"a":1,}',
        "{'a':1}",
        '"\t"',
        '"\x00"',
        '"\\x41"',
        "\ufeff{}",
        "\xa01",
        "1\x00",
        "// no\n1",
    ],
)
def test_what_is_not_json_is_refused(text):
    """A lax reader would sign something other than what the application meant."""
    with pytest.raises(NotJSON):
        parse(text.encode())


@pytest.mark.parametrize(
    "text", [b"\xff", b'"\xed\xa0\x80"', b'{"a":1}\xff', b'["\xc0\xaf",18446744073709551616]']
)
def test_what_is_not_utf_8_is_not_json(text):
    """JSON between systems is UTF-8 (RFC 8259 section 8.1); guessing an encoding changes the text."""
    with pytest.raises(NotJSON, match="UTF-8"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b'{"a":\n "b" 2}', "line 2 column 6"),
        (b'{"a":1,\n"b":"\\ud800"}', "line 2 column 6: no low surrogate"),
        (b"[1,\n2,1e400]", "line 2 column 3: number is infinity"),
        (b'{"a":\n "x\xffy"}', "line 2, byte 9"),
    ],
)
def test_a_refusal_says_where(text, where):
    """The text was made by a program; its author has only the message to find the place."""
    with pytest.raises(NotJSON, match=where):
        parse(text)


@pytest.mark.parametrize("levels", [1025, 100_000])
@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_bottomless_nesting_is_not_json(bracket, levels):
    """Nesting is the classical way to break a parser's stack."""
    with pytest.raises(NotJSON):
        parse((bracket * levels).encode())


def test_nesting_that_the_exact_parser_cannot_follow_is_refused_too():
    """A long integer brings in a second parser, with limits of its own."""
    with pytest.raises(NotJSON):
        parse(b"[" * 100_000 + b"18446744073709551616")


@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_allowed_to_64_levels(before, after):
    """Receivers' parsers have limits as well; what we accept, all of them must read."""
    deepest = before * 64 + "1" + after * 64
    name = "0" if before == "[" else "a"

    assert rewritten(deepest) == deepest
    assert [pointer for pointer, _ in problems(before + deepest + after)] == ["#" + f"/{name}" * 64]
    assert [pointer for pointer, _ in problems(before * 900 + "1" + after * 900)] == ["#" + f"/{name}" * 64]


def test_breadth_is_not_depth():
    """A carousel of a hundred pictures is flat."""
    text = f"[{','.join(['{}', '[]'] * 100)}]"

    assert rewritten(text) == text


@pytest.mark.parametrize(
    ("written", "canonically"),
    [
        ('{"a":1,"b":2,"a":3}', '{"a":3,"b":2}'),
        ('{"b":1,"1":2,"b":3,"0":4,"1":5}', '{"0":4,"1":5,"b":3}'),
        ('{"b":1,"10":2,"9":3,"a":4}', '{"9":3,"10":2,"b":1,"a":4}'),
        ('{"a":0,"\\u0037":1}', '{"7":1,"a":0}'),
        ('{"4294967295":1,"4294967294":2,"0":3}', '{"0":3,"4294967294":2,"4294967295":1}'),
        ('{"01":1,"-1":2,"1.5":3,"+1":4,"":5,"1 ":6,"٣":7}', SAME),
        (
            '{"10000000000":1,"99999999999999999999":2,"2":3}',
            '{"2":3,"10000000000":1,"99999999999999999999":2}',
        ),
        ('{"z":{"a":[{"b":1,"2":2}]}}', '{"z":{"a":[{"2":2,"b":1}]}}'),
        ('{"b":{"\\"1":1,"0":2}}', '{"b":{"0":2,"\\"1":1}}'),
        ('{"__proto__":1,"constructor":2,"a":3}', SAME),
        (' { "a" : [ 1 , 2 ] } \r\n\t', '{"a":[1,2]}'),
    ],
)
def test_members_come_in_the_order_of_javascript(written, canonically):
    """JavaScript moves integer-like names to the front, and a duplicate keeps its first place."""
    assert rewritten(written) == (written if canonically is SAME else canonically)


@pytest.mark.parametrize(
    ("written", "canonically"),
    [
        (r'"\b\t\n\f\r\"\\"', SAME),
        (r'"\u0008\u0009\u000a\u000C\u000D\u0022\u005c"', r'"\b\t\n\f\r\"\\"'),
        (r'"\u0000\u000B\u001F"', r'"\u0000\u000b\u001f"'),
        (r'"\/\u002f"', '"//"'),
        (r'"\u007f\u0080\u2028\u2029\ufeff\uffff"', '"\x7f\x80\u2028\u2029\ufeff\uffff"'),
        (r'"\ud83d\ude00é"', '"😀é"'),
        (r'"\u00e9<>&"', '"é<>&"'),
    ],
)
def test_strings_are_escaped_as_javascript_escapes_them(written, canonically):
    """There are a dozen right ways to escape a string, and only one that the receiver will choose."""
    assert rewritten(written) == (written if canonically is SAME else canonically)


def test_a_number_that_json_cannot_hold_is_written_as_javascript_writes_it():
    """No text holds one, but a sample in the configuration can: TOML knows nan and inf."""
    assert encode([math.nan, math.inf, 1.0]) == encode([math.nan, math.inf, 1]) == b"[null,null,1]"


def test_what_is_no_json_value_is_a_programming_error():
    """Only values that `parse` could have made are written; our mistake must not look like the user's."""
    with pytest.raises(TypeError):
        encode({"a": object()})


# The corpus: texts with every trap above, many thousand times, in the words of a seeded dice.

EDGES = [
    "0",
    "-0",
    "-0.0",
    "0.1",
    "5e-324",
    "1e21",
    "1e20",
    "1e-6",
    "1e-7",
    "9007199254740992",
    "-9007199254740992",
]
NAMES = ["a", "b", "id", "0", "1", "2", "10", "01", "-1", "1.5", "4294967294", "4294967295", "4294967296"]
NAMES += ["", "__proto__", "é", "\u2028", "\\u0031", "1e3", "line1", " 1", "99999999999", '\\"1']
PIECES = [
    "a",
    "é",
    "\u2028",
    "\u2029",
    "\x7f",
    "\x80",
    "😀",
    "<",
    "\ufeff",
    "1.0,",
    ":1e5,",
    "{[",
    '\\"1\\":',
    "2.0}",
]
PIECES += [
    r"\b",
    r"\t",
    r"\n",
    r"\f",
    r"\r",
    r"\"",
    r"\\",
    r"\/",
    r"\u0000",
    r"\u001F",
    r"\u007f",
    r"\ud83d\uDE00",
]


def any_double(dice: random.Random) -> str:
    (double,) = struct.unpack("<d", dice.randbytes(8))
    return repr(double) if math.isfinite(double) else "0"


NUMBERS = [
    any_double,
    lambda dice: f"{dice.choice(['', '-'])}{dice.randrange(1, 10**17)}e{dice.randrange(-26, 8)}",
    lambda dice: (
        f"{dice.uniform(-10, 10):.{dice.randrange(1, 12)}f}{dice.choice(['', 'e0', 'E+20', 'e-06'])}"
    ),
    lambda dice: f"{dice.randrange(1, 10**6)}e-{dice.randrange(310, 328)}",  # subnormal
    lambda dice: str(dice.randrange(-(2**53), 2**53 + 1)),
    lambda dice: f"{dice.randrange(-100, 100)}{dice.choice(['', '.0', '.50'])}",
    lambda dice: f"{dice.randrange(10**18, 10**24)}{dice.choice(['.0', '.5', 'e-3'])}",  # by the exact parser
    lambda dice: dice.choice(EDGES),
]


def number(dice: random.Random) -> str:
    return dice.choice(NUMBERS)(dice)


def string(dice: random.Random) -> str:
    if dice.randrange(4) == 0:
        code = dice.choice([dice.randrange(0x20, 0xD800), dice.randrange(0xE000, 0x110000)])
        return json.dumps(chr(code), ensure_ascii=dice.random() < 0.5)
    return f'"{"".join(dice.choices(PIECES, k=dice.randrange(6)))}"'


def text(dice: random.Random, levels: int) -> str:
    """Write a random JSON text on one line."""
    space = dice.choice(["", "", "", " ", "\t\r"])
    kind = dice.randrange(10 if levels else 7)
    if kind < 4:
        return space + number(dice)
    if kind < 6:
        return string(dice)
    if kind == 6:
        return dice.choice(["true", "false", "null", "[]", "{}"])
    members = [text(dice, levels - 1) for _ in range(dice.randrange(1, 6))]
    if kind == 7:
        return f"[{space}{f'{space},'.join(members)}{space}]"
    return (
        "{" + ",".join(f'{space}"{dice.choice(NAMES)}"{space}:{member}' for member in members) + space + "}"
    )


def corpus() -> Iterator[str]:
    dice = random.Random(20260115)
    for index in range(CORPUS_SIZE):
        # A third are bare numbers, where most of the rules are.
        yield number(dice) if index % 3 == 0 else text(dice, levels=3)


def test_node_writes_the_same_bytes():
    """The promise is about real JavaScript; our reading of ECMA-262 is only an opinion."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on PATH: nothing to compare with")
    texts = list(corpus())
    program = Path(__file__).with_name("canonical.mjs")
    answer = subprocess.run(
        [node, program], input="\n".join(texts).encode(), capture_output=True, timeout=30, check=True
    )

    pairs = zip(texts, answer.stdout.split(b"\n"), strict=True)
    wrong = [
        (text, ours, theirs) for text, theirs in pairs if (ours := encode(parse(text.encode()))) != theirs
    ]

    assert wrong[:5] == []


# Properties.

DOUBLES = st.floats(allow_nan=False, allow_infinity=False)
WHOLE_DOUBLES = st.integers(-(10**25), 10**25).map(float)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
KEYS = st.text(max_size=5) | st.integers(0, 2**33).map(str) | st.sampled_from(["01", "-1", '"1', "1.0,"])
SCALARS = st.none() | st.booleans() | INTEGERS | DOUBLES | WHOLE_DOUBLES | st.text() | KEYS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
FRAGMENTS = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b'":',
    b",",
    b"\\u",
    b"d800",
    b"1e400",
    b"NaN",
    b"-",
    b"0.",
    b"1",
    b"e5",
]
FRAGMENTS += [
    b'"a":',
    b'"\\ud800"',
    b'"1":',
    b"18446744073709551616",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b" ",
]


@settings(max_examples=200, deadline=None)
@given(VALUES)
@example([1e21])
@example({"1": 1, "0": 2})
@example([{"a": 1.0}])
@example({"a": [1e16]})
def test_the_fast_way_misses_nothing_that_the_careful_way_would_change(value: JSON):
    """The hot path returns what orjson wrote unless a pattern matches; a miss is a wrong signature."""
    assert encode(value) == orjson.dumps(canonical._like_javascript(value))


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_canonical_bytes_stay_as_they_are_when_written_again(value: JSON):
    """What a replay reads back from the outbox, and what a receiver re-serialises, must be the same bytes."""
    assume(not holds_a_double_that_reads_back_as_a_refused_integer(value))

    once = encode(parse(json.dumps(value).encode()))

    assert encode(parse(once)) == once


def holds_a_double_that_reads_back_as_a_refused_integer(value: JSON) -> bool:
    """JavaScript writes doubles below 1e21 in whole digits, as it would an integer of that size."""
    if isinstance(value, float):
        return abs(value) < 1e21 and not -(2**63) < value < 2**64
    if isinstance(value, dict | list):
        members = value.values() if isinstance(value, dict) else value
        return any(map(holds_a_double_that_reads_back_as_a_refused_integer, members))
    return False


TEXTS = st.lists(st.sampled_from(FRAGMENTS)).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS | VALUES.map(json.dumps).map(str.encode))
def test_both_parsers_agree_on_every_text(source):
    """A long integer anywhere must change nothing about the rest: neither what is taken nor what it means."""
    assert value_or_refusal(b"[" + source + b",1e18]") == value_or_refusal(
        b"[" + source + b",1000000000000000000e0]"
    )


def value_or_refusal(source: bytes) -> str:
    try:
        return repr(parse(source))
    except NotJSON:
        return "refused"


@settings(max_examples=300, deadline=None)
@given(st.binary() | TEXTS)
def test_any_bytes_are_json_or_refused_by_name(source):
    """Anything else would be a 500 that a stranger's bytes can cause."""
    with suppress(NotJSON, Unrepresentable):
        encode(parse(source))
