"""What the log says: lines of a closed list, and never more of them than somebody can read."""

import ast
import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay import logs
from relay.metrics import Tally
from relay.model import Delivery, Event, Outcome, State, Verdict
from relay.outbox import Expired
from relay.report import SUMMED_UP_SECONDS, TURNS, Reporter
from tests.clock import START_MS, MovedClock
from tests.lanes import OK, REFUSED
from tests.process import relay_process
from tests.receiver import Receiver

ROOT = Path(__file__).parent.parent
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}
EVENT = Event(
    id="evt_1",
    type="post.published",
    timestamp="2026-01-15T10:00:00.000Z",
    data=b"{}",
    accepted_at_ms=START_MS,
)
DELIVERY = Delivery(
    handle=(1, 1),
    event=EVENT,
    endpoint="main",
    format="event",
    attempts=0,
    steps=0,
    due_ms=START_MS,
    digest=b"",
)
AGAIN = Verdict(state=State.PENDING, steps=1, due_ms=START_MS + 5_000)
DEAD = Verdict(state=State.DEAD, steps=1)
DONE = Verdict(state=State.DELIVERED, steps=0)


class Log(logging.Handler):
    """The relay's log as it is written: its lines, and how many bytes they are."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logs.JsonLines())
        self.addFilter(logs.Repeats())
        self.lines: list[dict[str, object]] = []
        self.bytes = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        self.bytes += len(line) + 1
        self.lines.append(json.loads(line))

    @property
    def events(self) -> list[object]:
        return [line["event"] for line in self.lines]


@pytest.fixture
def log() -> Iterator[Log]:
    log, logger = Log(), logging.getLogger("relay")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    yield log
    logger.removeHandler(log)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def reporter(clock: MovedClock) -> Reporter:
    return Reporter("main", lambda *_, of: [], clock, Tally())


# The closed list


def said() -> dict[str, set[str]]:
    """Every line that the code says, with the fields it gives in so many words."""
    found: dict[str, set[str]] = {line: set() for line, _ in TURNS.values()}
    for path in (ROOT / "relay").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if (
                node.func.attr in LEVELS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
            ):
                told = node.args[1 if node.func.attr == "log" else 0]
                extra = next((each.value for each in node.keywords if each.arg == "extra"), None)
                fields = (
                    {key.value for key in extra.keys if isinstance(key, ast.Constant)}
                    if isinstance(extra, ast.Dict)
                    else set()
                )
                if isinstance(told, ast.Constant):
                    found.setdefault(told.value, set()).update(fields)
            elif node.func.attr == "_tell" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                found.setdefault(node.args[1].value, set())
    return found


def test_what_the_code_says_is_the_closed_list():
    """Who searches a log, or alerts on it, needs to know every line there can be."""
    found = said()
    assert found.keys() | {"library"} == logs.EVENTS.keys()
    for event, fields in found.items():
        assert fields <= set(logs.EVENTS[event]), event


def test_the_readme_documents_every_line_with_its_fields():
    text = (ROOT / "README.md").read_text().partition("\n## Logs\n")[2].partition("\n## ")[0]
    attempt = re.search(r"^\*attempt\* is (.*?\(one sentence\))", text, re.MULTILINE)[1]
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|([^|]*)\| [^|]+ \|$", text, re.MULTILINE)
    documented = {
        event: set(re.findall(r"`(\w+)`", fields.replace("*attempt*", attempt)))
        for event, _, fields in rows[1:]
    }
    assert documented == {event: set(fields) for event, fields in logs.EVENTS.items()}


# Repeated failures


def test_the_first_failure_is_told_at_once_and_what_follows_once_a_minute(reporter, clock, log):
    """Somebody who looks at the log sees at once that something fails, and still sees it an hour later."""
    for _ in range(100):
        reporter.attempted(DELIVERY, 1, REFUSED, AGAIN, AGAIN.due_ms)
        clock.advance(seconds=1)

    first, summed_up = log.lines
    assert (first["event"], first["reason"], first["retry_in_seconds"]) == ("attempt_failed", "http_503", 5.0)
    assert summed_up["event"] == "endpoint_failing"
    assert (summed_up["failures"], summed_up["seconds"], summed_up["endpoint"]) == (60, 60.0, "main")
    assert (summed_up["reason"], summed_up["event_id"]) == ("http_503", "evt_1")
    assert "dead" not in summed_up


def test_the_first_dead_delivery_is_told_at_once_and_the_others_are_counted(reporter, clock, log):
    reporter.attempted(DELIVERY, 1, REFUSED, AGAIN)
    for _ in range(3):
        reporter.attempted(DELIVERY, 2, REFUSED, DEAD)
    reporter.expired([Expired(event_id="evt_2", type="post.published", attempts=3)] * 7)
    reporter.expired([Expired(event_id="evt_3", type="post.published", attempts=3)] * 5)
    clock.advance(seconds=SUMMED_UP_SECONDS)
    reporter.attempted(DELIVERY, 1, REFUSED, AGAIN)

    assert log.events == ["attempt_failed", "delivery_dead", "deliveries_expired", "endpoint_failing"]
    assert (log.lines[-1]["failures"], log.lines[-1]["dead"], log.lines[-1]["level"]) == (3, 7, "error")


def test_what_was_counted_is_told_when_it_is_over(reporter, clock, log):
    """By the first success after the minute, or by the stop."""
    for _ in range(3):
        reporter.attempted(DELIVERY, 1, REFUSED, AGAIN)
    reporter.attempted(DELIVERY, 2, OK, DONE)
    assert log.events == ["attempt_failed"]
    clock.advance(seconds=SUMMED_UP_SECONDS)
    reporter.attempted(DELIVERY, 2, OK, DONE)
    reporter.attempted(DELIVERY, 2, OK, DONE)
    assert log.events == ["attempt_failed", "endpoint_failing"]
    assert log.lines[-1]["failures"] == 2

    clock.advance(seconds=SUMMED_UP_SECONDS)
    for _ in range(2):
        reporter.attempted(DELIVERY, 1, REFUSED, AGAIN)
    reporter.ended()
    reporter.ended()
    assert log.events[2:] == ["attempt_failed", "endpoint_failing"]


def test_failures_far_apart_are_each_told(reporter, clock, log):
    for _ in range(3):
        reporter.attempted(DELIVERY, 1, REFUSED, AGAIN)
        clock.advance(seconds=SUMMED_UP_SECONDS)
    assert log.events == ["attempt_failed"] * 3


@pytest.mark.parametrize("flapping", [False, True])
def test_a_hundred_thousand_failed_attempts_are_a_log_one_can_read(flapping, reporter, clock, log, capsys):
    """A receiver that is down all night must not fill the disk; nor one that answers every other attempt."""
    for number in range(100_000):
        reporter.attempted(DELIVERY, number, REFUSED, AGAIN if number % 4 else DEAD)
        if flapping:
            reporter.attempted(DELIVERY, number, OK, DONE)
        clock.advance(seconds=0.036)

    with capsys.disabled():
        print(f"\n100,000 failed attempts in an hour: {len(log.lines)} lines, {log.bytes / 1000:.1f} kB")
    assert 55 <= len(log.lines) <= 65
    assert log.bytes < 100_000
    counted = sum(int(line.get("failures", 1)) for line in log.lines)
    assert 98_000 < counted <= 100_000


def test_at_debug_every_attempt_is_told(reporter, log):
    logging.getLogger("relay").setLevel(logging.DEBUG)
    for number in range(1, 4):
        reporter.attempted(DELIVERY, number, REFUSED, AGAIN)
    reporter.attempted(DELIVERY, 4, OK, DONE)
    assert [(line["event"], line["attempt"], line["level"]) for line in log.lines] == [
        ("attempt_failed", 1, "warning"),
        ("attempt_failed", 2, "debug"),
        ("attempt_failed", 3, "debug"),
        ("attempt_delivered", 4, "debug"),
    ]


def test_an_attempt_that_could_not_be_made_is_no_failure_of_the_receiver(reporter, clock, log):
    unspent = Outcome(milliseconds=1, reason="conn_refused", unspent=True)
    for _ in range(3):
        reporter.unspent(DELIVERY, 1, unspent)
    clock.advance(seconds=SUMMED_UP_SECONDS)
    reporter.unspent(DELIVERY, 1, unspent)
    assert log.events == ["attempt_unspent", "endpoint_failing"]
    assert (log.lines[-1]["unspent"], log.lines[-1]["failures"]) == (3, 0)


# Faults of our own, and libraries


def test_the_same_fault_is_traced_once_a_minute(log):
    """A trace is kilobytes, and a fault that meets every attempt would write one for each."""
    for fault in [ZeroDivisionError()] * 50 + [KeyError()]:
        logging.getLogger("relay").error(
            "attempt_broke", exc_info=fault, extra={"endpoint": "main", "event_id": "evt_1"}
        )
    assert log.events == ["attempt_broke"] * 2
    assert "ZeroDivisionError" in str(log.lines[0]["trace"])


def test_what_a_library_says_has_the_form_of_our_lines():
    """The list of events is closed: a library's sentence is a field, and repeats are held back."""
    log, logger = Log(), logging.getLogger("somebody.else")
    logger.addHandler(log)
    for number in range(5):
        logger.warning("it is %s o'clock", number)
    logger.removeHandler(log)
    (line,) = log.lines
    assert (line["event"], line["logger"], line["message"]) == ("library", "somebody.else", "it is 0 o'clock")
    stream = logs.Text().format(
        logging.makeLogRecord({"name": "somebody.else", "msg": "oh", "levelname": "ERROR"})
    )
    assert stream.endswith("error   library logger=somebody.else message=oh")


def test_what_was_held_back_is_counted_in_the_next_line(monkeypatch):
    log, logger = Log(), logging.getLogger("somebody.else")
    monkeypatch.setattr(logs, "SELDOM_SECONDS", 0.05)
    monkeypatch.setattr(logger, "propagate", False)  # what others count is written on the record, too
    logger.addHandler(log)
    for _ in range(5):
        logger.warning("oh")
    while len(log.lines) < 2:  # 50 ms
        logger.warning("oh")
    logger.removeHandler(log)
    assert "untold" not in log.lines[0]
    assert int(str(log.lines[1]["untold"])) >= 4


# A real relay


def config(receiver: Receiver) -> str:
    return f"""
[logging]
level = "debug"
[[endpoints]]
id = "main"
url = "{receiver.url}?key=in_the_query"
events = ["*"]
secret = "{SECRET}"
headers = {{ Authorization = "Bearer in_a_header" }}
retry_schedule = ["10ms"]
[[endpoints]]
id = "inward"
url = "https://10.9.8.7/?key=in_the_query"
events = ["*"]
secret = "{SECRET}"
retry_schedule = []
"""


async def test_a_real_log_says_what_runs_and_what_is_wrong_and_gives_nothing_away(tmp_path):
    """At 3 a.m. one line has to do; and the log goes to people who may not read what is delivered."""
    async with Receiver() as receiver:
        (tmp_path / "authority.pem").write_bytes(receiver.authority.cert_pem.bytes())
        receiver.answers(503)
        environment = {"SSL_CERT_FILE": str(tmp_path / "authority.pem")}
        with relay_process(tmp_path, config(receiver), environment) as relay:
            event = {"event": "post.published", "data": {"text": "in_the_payload"}}
            status, _ = await asyncio.to_thread(relay.call, "POST", "/v1/events", event)
            assert status == 202
            second = (await receiver.wait_for(2))[1]
            assert await asyncio.to_thread(relay.stop) == 0
            text, port = relay.log, relay.port

    lines = [json.loads(line) for line in text.splitlines()]
    by_event = {line["event"]: line for line in lines}
    for line in lines:
        assert line.keys() - {"ts", "level", "event", "trace"} <= set(logs.EVENTS[line["event"]])
    started = by_event["started"]
    assert started["config"] == str(tmp_path / "relay.toml")
    assert started["outbox"] == str(tmp_path / "relay.db")
    assert started["addresses"] == [f"127.0.0.1:{port}"]
    assert (started["endpoints"], started["pending"]) == (2, 0)
    assert started["loop"] in {"uvloop", "asyncio"}
    assert (by_event["attempt_failed"]["endpoint"], by_event["attempt_failed"]["reason"]) == (
        "main",
        "http_503",
    )
    assert by_event["attempt_delivered"]["attempt"] == 2
    assert by_event["delivery_dead"]["reason"] == "blocked_address"
    assert by_event["delivery_dead"]["detail"] == "10.9.8.7 is private"
    assert lines[-1]["event"] == "stopped"
    signature = second.headers["webhook-signature"].removeprefix("v1,")
    for hidden in ("in_the_payload", "in_the_query", "in_a_header", SECRET, SECRET[6:], signature):
        assert hidden not in text


async def test_a_log_for_people_says_the_same_as_text(tmp_path):
    with relay_process(tmp_path, '[logging]\nformat = "text"\n') as relay:
        assert await asyncio.to_thread(relay.stop) == 0
        first = relay.log.splitlines()[1]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT[\d:.]{12}Z info    started config=\S+relay\.toml version=.*", first
    )


def test_configure_takes_json_where_nobody_looks_on(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root, relay = logging.getLogger(), logging.getLogger("relay")
    before, level = root.handlers[:], relay.level
    try:
        logs.configure("info", None)
        relay.info("stopped")
    finally:
        root.handlers[:] = before
        relay.setLevel(level)
        logging.getLogger("aiohttp.server").setLevel(logging.NOTSET)
    assert json.loads(stream.getvalue())["event"] == "stopped"
