"""Pages that a browser was tricked into opening, in a real browser: none gets an event into the relay.

The pages do what a stranger's page can do to a service on the same machine: forms, fetches, beacons,
images, scripts, and a name that first led to the stranger and now leads here (DNS rebinding).
"""

import http.server
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import orjson
import pytest

from tests.browser import PATIENCE_MS, chromium
from tests.figures import figure
from tests.process import RelayProcess, relay_process

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVENT = {"event": "post.published", "data": {}}

# What a page does with the URL for events, and what comes of it: the relay's answer, or None where the
# browser itself goes no further, or shows no answer, because the relay does not allow it to.
TRICKS = {
    # As text/plain a form sends `name=value`, so name and value together can be JSON.
    "form": (
        """([url]) => {
            const form = document.body.appendChild(document.createElement('form'));
            Object.assign(form, {action: url, method: 'POST', enctype: 'text/plain'});
            const field = form.appendChild(document.createElement('input'));
            field.name = '{"event": "post.published", "data": {"a": "';
            field.value = '"}}';
            form.submit();
        }""",
        403,
    ),
    "fetch-without-cors": (
        "([url, body]) => { fetch(url, {method: 'POST', mode: 'no-cors', body}).catch(() => {}); }",
        403,
    ),
    "beacon": ("([url, body]) => { navigator.sendBeacon(url, body); }", 403),
    "fetch-of-json": (
        """([url, body]) => {
            const headers = {'Content-Type': 'application/json'};
            fetch(url, {method: 'POST', headers, body}).catch(() => {});
        }""",
        None,
    ),
    "image": ("([url]) => { new Image().src = url; }", None),
    "script": (
        "([url]) => { document.head.appendChild(document.createElement('script')).src = url; }",
        None,
    ),
}


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    with relay_process(tmp_path_factory.mktemp("relay"), "") as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with chromium() as each:
        yield each


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    with browser.new_page() as each:
        each.set_default_timeout(PATIENCE_MS)
        yield each


@pytest.fixture(scope="module")
def strangers_port() -> Iterator[int]:
    """Serve an empty page, into which the tests put what a stranger would have written there."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        yield server.server_port
        server.shutdown()
        serving.join()


@pytest.fixture(params=["127.0.0.1", "localhost"], ids=["same-site", "cross-site"])
def strangers_page(request: pytest.FixtureRequest, page: "Page", strangers_port: int) -> "Page":
    page.goto(f"http://{request.param}:{strangers_port}/")
    return page


class EmptyPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><body></body>")

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.mark.parametrize(("trick", "answered"), TRICKS.values(), ids=TRICKS)
def test_no_page_of_another_origin_submits_an_event(relay, strangers_page, trick, answered):
    """The relay listens where every page that is open on the machine can send requests to."""
    before = stored(relay)

    with strangers_page.expect_request(f"{relay.url}/v1/events") as asked:
        strangers_page.evaluate(trick, [f"{relay.url}/v1/events", orjson.dumps(EVENT).decode()])
    answer = asked.value.response()

    told(relay, before)
    assert (answer.status if answer is not None else None) == answered
    assert stored(relay) == before
    assert submitted(relay) in stored(relay), "as it must for a client that is no page"


def test_a_link_from_elsewhere_opens_the_status_page_which_no_stranger_sees_into(relay, strangers_page):
    """Dashboards and chats link to it in an outage; a frame around it could steal clicks."""
    strangers_page.set_content(f'<a href="{relay.url}/" target="_blank" rel="opener">relay</a>')
    with strangers_page.context.expect_page() as linked:
        strangers_page.get_by_role("link").click()
    linked.value.get_by_text("Ready. No endpoint yet").wait_for()
    assert linked.value.evaluate("window.opener") is None, "nobody who opened it holds on to it"
    linked.value.close()

    with strangers_page.expect_response(f"{relay.url}/") as framed:
        strangers_page.set_content(f'<iframe src="{relay.url}/"></iframe>')
    assert framed.value.status == 403


def test_a_page_whose_name_was_rebound_to_the_relay_submits_no_event(relay, page):
    """To the browser page and relay are of one origin then; only the Host tells."""
    before = stored(relay)
    strangers_name = f"http://rebound.test:{relay.port}"

    opened = page.goto(f"{strangers_name}/livez")
    answered = page.evaluate(
        """async ([url, body]) => {
            const headers = {'Content-Type': 'application/json'};
            return [
                (await fetch(url, {method: 'POST', headers, body})).status,
                (await fetch(url)).status,
            ];
        }""",
        [f"{strangers_name}/v1/events", orjson.dumps(EVENT).decode()],
    )

    told(relay, before)
    assert (opened.status, answered) == (421, [421, 421])
    assert stored(relay) == before
    assert submitted(relay) in stored(relay), "as it must for a client that is no page"


attacks = {"tried": 0, "stored an event": 0}


def told(relay: RelayProcess, before: list[str]) -> None:
    attacks["tried"] += 1
    attacks["stored an event"] += stored(relay) != before
    figure("browser attacks that stored an event / tried", "{stored an event} / {tried}".format(**attacks))


def stored(relay: RelayProcess) -> list[str]:
    """Return the ids of what is in the outbox, as a client that is no browser sees it."""
    _, listed = relay.call("GET", "/v1/events?limit=200")
    return [event["id"] for event in listed["data"]]


def submitted(relay: RelayProcess) -> str:
    status, receipt = relay.call("POST", "/v1/events", EVENT)
    assert status == 202
    return receipt["id"]
