"""The status page in a real browser: what it shows, what it can do, and what cannot fool it."""

import http.client
import http.server
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trustme

from tests.browser import PATIENCE_MS, chromium
from tests.process import RelayProcess, relay_process

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TOKEN = "sk_of_the_page"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
# What a stranger writes who wants to be more than text: markup, script, style, and a reversed direction.
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'&amp;</td></table>\u202eevil"
TYPE = "post.published"


class Receiver(http.server.ThreadingHTTPServer):
    """Answers what `answers` says for a path, else 200; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.answers: dict[str, tuple[int, str]] = {}
        self.got: list[tuple[str, str]] = []


class Taking(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        self.server.got.append((path, self.headers["webhook-id"]))
        status, answer = self.server.answers.get(path, (200, "taken"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer.encode())))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@contextmanager
def receiving(context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Receive on plain HTTP, or with TLS."""
    with Receiver() as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.handle_error = lambda *_: None  # who does not trust us hangs up
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        yield server
        server.shutdown()
        serving.join()


def config(receiver: Receiver) -> str:
    """Return the config of a relay with one endpoint of every kind of luck."""
    url = f"http://127.0.0.1:{receiver.server_port}"
    return f"""
allow_http = true
[[endpoints]]
id = "main"
url = "{url}/main"
events = ["*"]
secret = "{SECRET}"
description = '''{HOSTILE}'''
[[endpoints]]
id = "crm"
url = "{url}/crm?key=hidden"
events = ["post.*"]
secret = "{SECRET}"
retry_schedule = ["10ms"]
down_after = 0
[[endpoints]]
id = "legacy"
url = "{url}/legacy"
events = ["post.failed"]
secret = "{SECRET}"
retry_schedule = ["2s", "1h"]
down_after = 2
probe_interval = "10m"
[events."{TYPE}"]
sample = {{ postId = "post_abc123" }}
[events."post.failed"]
sample = {{ postId = "post_abc123" }}
"""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as each:
        yield each


@pytest.fixture
def relay(tmp_path: Path, receiver: Receiver) -> Iterator[RelayProcess]:
    with relay_process(tmp_path, config(receiver)) as process:
        yield process


class Troubled(NamedTuple):
    """A relay in trouble, for tests that leave it as it is; `dead` is an event that crm did not take."""

    relay: RelayProcess
    receiver: Receiver
    dead: str


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troubled]:
    folder = tmp_path_factory.mktemp("troubled")
    with receiving() as receiver, relay_process(folder, config(receiver)) as relay:
        yield Troubled(relay, receiver, trouble(relay, receiver))


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with chromium() as each:
        yield each


@contextmanager
def opened(browser: "Browser", relay: RelayProcess, **options: Any) -> "Iterator[Page]":
    """Open the page; in the end its console must hold nothing: no error, no breach of its policy."""
    complaints: list[str] = []
    expected = options.pop("expected", ())
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        page.goto(f"{relay.url}/")
        yield page
        assert [each for each in complaints if not any(known in each for known in expected)] == []
    finally:
        context.close()


@pytest.fixture
def page(browser: "Browser", troubled: Troubled) -> "Iterator[Page]":
    with opened(browser, troubled.relay) as each:
        yield each


def until(condition: Callable[[], Any], within: float = 10.0) -> Any:
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
    return found


def submit(relay: RelayProcess, type_: str = TYPE, data: object = None, **headers: str) -> str:
    content = {"event": type_, "data": data or {"postId": "post_1"}}
    status, receipt = relay.call("POST", "/v1/events", content, headers)
    assert status == 202
    return receipt["id"]


def status(relay: RelayProcess) -> dict[str, Any]:
    code, answer = relay.call("GET", "/v1/status")
    assert code == 200
    return answer


def endpoint(relay: RelayProcess, id_: str) -> dict[str, Any]:
    return next(each for each in status(relay)["endpoints"] if each["id"] == id_)


def trouble(relay: RelayProcess, receiver: Receiver) -> str:
    """Let three events be dead at crm, and bring legacy down; return the first one's id."""
    receiver.answers |= {"/crm": (503, HOSTILE), "/legacy": (500, "no")}
    dead = submit(relay, data={"text": HOSTILE, "number": 2**64 - 1})
    for _ in range(2):
        submit(relay, "post.failed")
    until(lambda: endpoint(relay, "legacy")["state"] == "down" and endpoint(relay, "crm")["dead"] == 3)
    return dead


# Steering it


def test_an_endpoint_is_paused_and_resumed_by_its_button(troubled, page):
    """At three in the morning nobody looks up a command."""
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="main"))

    row.get_by_role("button", name="Pause main").click()
    page.get_by_role("status").filter(has_text="main is paused.").wait_for()
    assert endpoint(troubled.relay, "main")["state"] == "paused"
    assert "main is paused" in page.locator("#sentence").inner_text()

    row.get_by_role("button", name="Resume main").click()
    page.get_by_role("status").filter(has_text="main is active.").wait_for()
    assert endpoint(troubled.relay, "main")["state"] == "active"
    assert page.evaluate("document.activeElement.textContent") == "Pause main", "where the focus was"


def test_what_is_down_is_let_go_again_by_its_button(relay, receiver, browser):
    """A receiver that has come back is not to be waited for."""
    trouble(relay, receiver)
    with opened(browser, relay) as page:
        row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="legacy"))
        assert row.get_by_text("down").is_visible()

        del receiver.answers["/legacy"]  # not before: an attempt still under way would bring it up again
        row.get_by_role("button", name="Resume legacy").click()

        until(lambda: endpoint(relay, "legacy")["pending"] == 0)
        row.get_by_text("active").wait_for()
        assert "is down" not in page.locator("#sentence").inner_text()


def test_a_sample_is_sent_by_a_button_and_the_answer_shown(troubled, page):
    """Whether a receiver works is asked before an event depends on it."""
    sent = len(troubled.receiver.got)

    page.get_by_role("button", name="Test crm").click()
    dialog = page.get_by_role("dialog", name="Test crm")
    dialog.get_by_label("Sample of").select_option(TYPE)
    dialog.get_by_role("button", name="Send").click()
    dialog.get_by_text("http_503: the receiver answered 503").wait_for()
    assert "<script>alert(2)</script>" in dialog.inner_text()
    dialog.get_by_role("button", name="Close").click()

    page.get_by_role("button", name="Test main").click()
    page.get_by_role("dialog", name="Test main").get_by_role("button", name="Send").click()
    page.get_by_text("Delivered: main answered 200").wait_for()
    assert [path for path, _ in troubled.receiver.got[sent:]] == ["/crm", "/main"]


def test_a_dead_delivery_is_sent_again_by_its_button(relay, receiver, browser):
    """What was given up is one click from where it is shown."""
    dead = trouble(relay, receiver)
    del receiver.answers["/crm"]
    with opened(browser, relay) as page:
        page.get_by_role("button", name=f"Replay {dead} to crm").click()

        page.get_by_role("status").filter(has_text=f"{dead} goes to crm again.").wait_for()
        until(lambda: endpoint(relay, "crm")["dead"] == 2)
        page.get_by_role("button", name=f"Replay {dead} to crm").wait_for(state="detached")
    assert receiver.got[-1] == ("/crm", dead)


def test_all_dead_deliveries_of_an_endpoint_are_sent_again_once_it_was_confirmed(relay, receiver, browser):
    """After an outage there are hundreds, and a slip of the mouse must not send them."""
    trouble(relay, receiver)
    del receiver.answers["/crm"]
    with opened(browser, relay) as page:
        page.get_by_label("Of", exact=True).select_option("crm")
        asked = []
        page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
        page.get_by_role("button", name="Replay all").click()
        assert asked == ["Send all dead deliveries of crm again?"]
        assert endpoint(relay, "crm")["dead"] == 3, "dismissed"

        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Replay all").click()
        page.get_by_role("status").filter(has_text="3 deliveries go out again.").wait_for()
        until(lambda: endpoint(relay, "crm") | {"dead": 0, "pending": 0} == endpoint(relay, "crm"))
        page.locator("#dead").get_by_text("Nothing was given up.").wait_for()


def test_older_dead_deliveries_come_page_by_page(relay, receiver, browser):
    """A list that shows all of a bad night would be no list."""
    receiver.answers["/crm"] = (503, "no")
    ids = [submit(relay, data={"number": number}) for number in range(14)]
    until(lambda: endpoint(relay, "crm")["dead"] == len(ids))
    with opened(browser, relay) as page:
        shown = page.locator("#dead tbody tr")
        page.get_by_role("button", name="Show older ones").wait_for()
        assert shown.count() == 10

        page.get_by_role("button", name="Show older ones").click()
        page.get_by_role("link", name=ids[0]).wait_for()

        assert shown.count() == len(ids)


def test_one_event_tells_its_whole_story(relay, receiver, browser):
    """Found by its id, with its data, every attempt and every answer; and sent again from there."""
    dead = trouble(relay, receiver)
    with opened(browser, relay) as page:
        page.get_by_label("Event", exact=True).fill(dead)
        page.get_by_role("button", name="Show its story").click()
        story = page.get_by_role("dialog", name=TYPE)
        story.get_by_role("heading", name="crm dead").wait_for()
        attempts = story.get_by_role("table", name="Attempts at crm").get_by_role("row")
        assert [text.split("\t")[0] for text in attempts.all_inner_texts()] == ["Attempt", "1", "2"]
        assert story.get_by_role("heading", name="main delivered").is_visible()
        data = story.get_by_role("group", name="Data").inner_text()
        assert "<script>alert(2)</script>" in data
        assert "18446744073709551615" in data, "not rounded"

        receiver.answers["/crm"] = (200, "at last")
        story.get_by_role("button", name="Replay to crm").click()
        story.get_by_role("heading", name="crm delivered").wait_for()
        assert story.get_by_role("cell", name="at last").is_visible()
        page.keyboard.press("Escape")
        story.wait_for(state="hidden")


def test_an_event_that_is_not_there_is_said_to_be_missing(troubled, browser):
    """An id is copied wrongly more often than an event is lost."""
    with opened(browser, troubled.relay, expected=["404"]) as page:
        page.get_by_label("Event", exact=True).fill("evt_of/nobody")
        page.keyboard.press("Enter")
        page.get_by_role("dialog", name="No such event").get_by_text(
            "there is no event of this id"
        ).wait_for()


# Showing it


def test_the_page_keeps_up_by_itself(relay, receiver, browser):
    """Who has it open on the wall sees what happens."""
    with opened(browser, relay) as page:
        assert "3 endpoints, 0 waiting, 0 dead" in page.locator("#sentence").inner_text()

        dead = trouble(relay, receiver)

        page.get_by_text("legacy is down since").first.wait_for()
        page.get_by_role("table", name="Recent failures").get_by_text(dead).first.wait_for()
        page.get_by_role("img", name="Last hour 3 accepted 3 delivered 8 failed attempts").wait_for()
        crm = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="crm")).first.inner_text()
        assert "0 %" in crm
        assert "the receiver answered 503" in crm


def test_a_relay_that_stops_answering_is_said_to(relay, browser):
    """A page that froze looks like a relay that has nothing to do."""
    with opened(browser, relay, expected=["ERR_CONNECTION_REFUSED", "ERR_EMPTY", "ERR_CONNECTION"]) as page:
        relay.kill()
        page.get_by_role("status").filter(has_text="The relay does not answer").wait_for()
        relay.start()
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # somebody looks again
        page.get_by_role("status").filter(has_text="The relay answers again.").wait_for()


def test_what_strangers_write_stays_text(troubled, browser):
    """Answers, descriptions and data are written by others, who would like to act in our name."""
    for options in ({}, {"java_script_enabled": False}):
        with opened(browser, troubled.relay, **options) as page:
            if not options:
                page.get_by_role("button", name="Replay all").wait_for()
            for table in ("endpoints", "failures", "dead"):
                shown = page.locator(f"#{table} tbody")
                assert "<script>alert(2)</script>" in shown.inner_text()
                assert r"\u{202e}evil" in shown.inner_text(), "what would reverse the text is written out"
                assert shown.locator("script, img").count() == 0
            assert page.locator("table").count() == 3, "no cell broke out of its table"


def test_nothing_on_the_page_keeps_people_out(troubled, browser):
    """Colours that are told apart, names for whatever can be pressed, tables that are read as tables."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="wants axe").Axe()
    found = []
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
        options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
        with opened(browser, troubled.relay, **options) as page:
            page.get_by_role("button", name="Replay all").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
            found.append(axe.run(page))
            if width < 1280:
                continue
            page.goto(f"{troubled.relay.url}/#{troubled.dead}")
            page.get_by_role("heading", name="crm dead").wait_for()
            found.append(axe.run(page, context="#story"))
            page.keyboard.press("Escape")
            page.get_by_role("button", name="Test crm").click()
            page.get_by_role("dialog", name="Test crm").wait_for()
            found.append(axe.run(page, context="#tester"))
    assert all(each.response["passes"] for each in found), "it had something to look at"
    assert [each.generate_report() for each in found if each.violations_count] == []


def test_the_page_follows_the_systems_dark_mode(troubled, browser):
    """Light in the eyes is no help at night."""
    grounds = []
    for scheme in ("light", "dark"):
        with opened(browser, troubled.relay, color_scheme=scheme) as page:
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(246, 247, 246)", "rgb(20, 24, 26)"]


def test_a_narrow_page_is_still_a_table_to_a_screen_reader(troubled, browser):
    """Cards for the eye must not take the columns from the ear."""
    with opened(browser, troubled.relay, viewport={"width": 360, "height": 740}) as page:
        page.get_by_role("button", name="Pause main").wait_for()
        seen = page.get_by_role("table", name="Endpoints").aria_snapshot()
    assert 'columnheader "Next try"' in seen
    assert "rowheader" in seen
    assert 'button "Pause main"' in seen


def test_everything_can_be_done_with_the_keyboard_alone(relay, receiver, browser):
    """Pause, test, find, replay: by Tab, Enter and Escape, and the focus is never lost to a refresh."""
    dead = trouble(relay, receiver)
    del receiver.answers["/crm"]
    with opened(browser, relay) as page:
        page.get_by_role("button", name="Replay all").wait_for()

        tab_to(page, "Pause main")
        page.keyboard.press("Enter")
        page.get_by_role("status").filter(has_text="main is paused.").wait_for()
        before = page.locator("#at").inner_text()
        until(lambda: page.locator("#at").inner_text() != before)
        assert focused(page) == "Resume main", "after a refresh"

        page.keyboard.press("Tab")
        assert focused(page) == "Test main"
        page.keyboard.press("Enter")
        page.get_by_role("dialog", name="Test main").wait_for()
        tab_to(page, "Send")
        page.keyboard.press("Enter")
        page.get_by_text("Delivered: main answered 200").wait_for()
        page.keyboard.press("Escape")
        assert focused(page) == "Test main", "where it was before"

        tab_to(page, dead)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="crm dead").wait_for()
        tab_to(page, "Replay to crm")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="crm delivered").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("dialog").wait_for(state="hidden")

        tab_to(page, "Replay evt_", starts=True)
        page.keyboard.press("Enter")
        page.get_by_role("status").filter(has_text="goes to crm again.").wait_for()
        until(lambda: endpoint(relay, "crm")["dead"] == 1)
        assert page.evaluate("document.activeElement !== document.body"), "and not at the top of the page"


def focused(page: "Page") -> str:
    return page.evaluate("document.activeElement.textContent.trim()")


def tab_to(page: "Page", text: str, *, starts: bool = False) -> None:
    """Press Tab until what has the focus says this."""
    for _ in range(120):
        page.keyboard.press("Tab")
        if focused(page) == text or (starts and focused(page).startswith(text)):
            return
    raise AssertionError(f"no Tab leads to {text}")


# Without scripts, as text, and with tokens


def test_without_scripts_the_page_is_a_table(troubled, browser):
    """A text browser over ssh, or a policy that forbids scripts, still shows how all stands."""
    with opened(browser, troubled.relay, java_script_enabled=False) as page:
        assert "legacy is down since" in page.locator("#sentence").inner_text()
        rows = page.get_by_role("table", name="Endpoints").get_by_role("row").all_inner_texts()
        assert [row.split("\n")[0].split("\t")[0] for row in rows] == ["Endpoint", "crm", "legacy", "main"]
        assert troubled.dead in page.get_by_role("table", name="Dead deliveries").inner_text()
        assert "3 accepted, 3 delivered, 8 failed attempts." in page.locator("#hour").inner_text()
        assert page.get_by_role("button").count() == 0, "nothing that does nothing"


def test_the_page_is_text_for_whoever_asks_for_text(relay, receiver):
    """`curl -H 'Accept: text/plain'` on the machine itself; no answer of a receiver moves its cursor."""
    receiver.answers["/crm"] = (503, "\x1b[2J\r\nForged: line")
    dead = submit(relay)
    until(lambda: endpoint(relay, "crm")["dead"] == 1)

    _, text = relay.call("GET", "/", headers={"Accept": "text/plain"})

    assert "Ready. 3 endpoints, 0 waiting, 1 dead.\n" in text
    assert [line for line in text.splitlines() if line.startswith("crm ")] != []
    assert f"{TYPE} {dead}" in text
    assert "\x1b" not in text
    assert "\nForged" not in text
    for accept in ("*/*", "text/html,application/xhtml+xml,*/*;q=0.8", "text/plain;q=0.5, text/html"):
        assert relay.call("GET", "/", headers={"Accept": accept})[1].startswith("<!doctype html>")


@pytest.fixture
def guarded(tmp_path: Path, receiver: Receiver) -> Iterator[RelayProcess]:
    """Run a relay that wants a token."""
    with relay_process(tmp_path, config(receiver), start=False) as process:
        process.config.write_text(
            process.config.read_text().replace("[server]", f'[server]\ntokens = ["{TOKEN}"]')
        )
        process.start()
        yield process


def test_with_tokens_the_page_asks_for_one_and_keeps_it_for_the_session(guarded, browser):
    """The page is for everyone who reaches it, what it shows and does for those who may."""
    submit(guarded, **WITH_TOKEN)
    with opened(browser, guarded, expected=["401"]) as page:
        field = page.get_by_label("This relay wants a token")
        field.wait_for()
        assert "Ready. 3 endpoints" in page.locator("#sentence").inner_text()
        assert not page.get_by_role("table").first.is_visible()

        field.fill("sk_wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").filter(has_text="not one of the relay's tokens").wait_for()

        field.fill(TOKEN)
        page.keyboard.press("Enter")
        page.get_by_role("rowheader", name="main").wait_for()
        page.get_by_role("button", name="Pause main").click()
        page.get_by_role("status").filter(has_text="main is paused.").wait_for()

        page.reload()
        page.get_by_role("rowheader", name="main").wait_for()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]

        page.get_by_role("button", name="Forget the token").click()
        field.wait_for()
        assert page.evaluate("sessionStorage.length") == 0
        assert not page.get_by_role("table").first.is_visible()


def test_without_a_token_nobody_sees_more_than_the_sentence(guarded, receiver, browser):
    """Addresses, answers and ids of events are nobody's business who has no token."""
    receiver.answers["/crm"] = (503, "for our eyes")
    dead = submit(guarded, **WITH_TOKEN)
    until(lambda: guarded.call("GET", "/v1/status", headers=WITH_TOKEN)[1]["dead"] == 1)

    _, text = guarded.call("GET", "/", headers={"Accept": "text/plain"})
    _, html = guarded.call("GET", "/")
    with opened(browser, guarded, java_script_enabled=False) as page:
        seen = page.locator("body").inner_text()

    assert text.splitlines()[1:] == ["Ready. 3 endpoints, 0 waiting, 1 dead."]
    assert "Ready. 3 endpoints, 0 waiting, 1 dead." in seen
    assert "wants a token" not in seen
    assert "needs a token and a script" in seen
    for told in (text, html):
        assert not any(secret in told for secret in (dead, "for our eyes", f":{receiver.server_port}", TYPE))
    assert guarded.call("GET", "/v1/status")[0] == 401


def test_what_plagues_operators_is_named_as_what_it_is(tmp_path, receiver):
    """An expired certificate, a receiver that asks for time, a full outbox: three nights, three remedies."""
    authority = trustme.CA()
    trusted = tmp_path / "authority.pem"
    trusted.write_bytes(authority.cert_pem.bytes())
    receiver.answers["/busy"] = (429, "slow down")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The clock is the machine's: this is long over.
    authority.issue_cert("127.0.0.1", not_after=datetime(2026, 1, 1, tzinfo=UTC)).configure_cert(context)
    with receiving(context) as expired:
        endpoints = f"""
allow_http = true
[[endpoints]]
id = "busy"
url = "http://127.0.0.1:{receiver.server_port}/busy"
events = ["*"]
secret = "{SECRET}"
[[endpoints]]
id = "expired"
url = "https://127.0.0.1:{expired.server_port}/"
events = ["*"]
secret = "{SECRET}"
"""
        environment = {"SSL_CERT_FILE": str(trusted), "RELAY_OUTBOX__MAX_PENDING": "4"}
        with relay_process(tmp_path, endpoints, environment) as relay:
            for _ in range(2):
                submit(relay)
            assert relay.call("POST", "/v1/events", {"event": TYPE, "data": {}})[0] == 503
            until(lambda: all(each["last_error"] for each in status(relay)["endpoints"]))
            _, text = relay.call("GET", "/", headers={"Accept": "text/plain"})
            asked = subprocess.run(
                [sys.executable, "-m", "relay", "status", "--url", relay.url],
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            _, metrics = relay.call("GET", "/metrics")

    for named in ("max_pending", "http_429", "tls_cert"):
        assert named in asked.stdout
    assert asked.returncode == 1, "a full outbox is a failure to a script"
    assert re.search(r'relay_delivery_attempts_total\{endpoint="busy",reason="http_429"\} [1-9]', metrics)
    assert re.search(r'relay_delivery_attempts_total\{endpoint="expired",reason="tls_cert"\} [1-9]', metrics)
    assert re.search(r"^relay_outbox_refusing 1(\.0)?$", metrics, re.MULTILINE)
    lines = {line.split(" ")[0]: line for line in text.splitlines() if line}
    assert lines["Not"].startswith("Not ready: ")
    assert "max_pending" in lines["Not"]
    assert "http_429 the receiver answered 429" in lines["busy"]
    assert "tls_cert the receiver's certificate does not verify" in lines["expired"]


# How it is served


def test_the_page_may_load_nothing_but_its_own_files(troubled):
    """Whatever a stranger's text might become, the browser would run and fetch nothing for it."""
    for path in ("/", "/page/relay.css", "/page/relay.js", "/page/relay.svg"):
        answered = headers_of(troubled.relay, path)
        policy = dict(each.strip().split(" ", 1) for each in answered["Content-Security-Policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "connect-src": "'self'",
            "img-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert answered["X-Content-Type-Options"] == "nosniff"
        assert answered["Referrer-Policy"] == "no-referrer"
        assert answered["Cache-Control"] == ("no-store" if path == "/" else "no-cache")


def test_the_browser_keeps_the_pages_files_until_they_are_others(troubled):
    """A page that is opened over a slow line in an outage loads what it has."""
    tag = headers_of(troubled.relay, "/page/relay.js")["ETag"]
    assert troubled.relay.call("GET", "/page/relay.js", headers={"If-None-Match": tag}) == (304, "")
    assert troubled.relay.call("GET", "/page/relay.js", headers={"If-None-Match": '"other"'})[0] == 200
    for path in ("/page/index.html", "/page/__init__.py", "/page/..%2frecent.py", "/page/"):
        assert troubled.relay.call("GET", path)[0] == 404


def test_there_is_no_page_if_the_config_says_so(tmp_path):
    """Who wants the API alone gets the API alone."""
    with relay_process(tmp_path, "", {"RELAY_SERVER__PAGE": "false"}) as relay:
        assert [relay.call("GET", path)[0] for path in ("/", "/page/relay.js")] == [404, 404]
        assert relay.call("GET", "/v1/status")[0] == 200


def headers_of(relay: RelayProcess, path: str) -> Message:
    connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        return answer.headers
    finally:
        connection.close()
