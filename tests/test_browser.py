"""Pages a browser was tricked into opening, in a real browser: none of them gets an event into the relay.

The pages do what pages of strangers can do to a service on the same machine: forms, fetches, images,
scripts, beacons, and a name that first led to the stranger and now leads here (DNS rebinding).
"""

import http.server
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process import RelayProcess, relay_process

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
STRANGERS_NAME = "rebound.test"
EVENT = '{"event":"post.published","data":{}}'

pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="wants Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="wants Playwright: pip install playwright"
    ),
]

# What a page tries, with `url` where events are submitted; each returns when the browser is done with it.
TRICKS = {
    # The form's one field is written as `name=value`: split so that the whole is JSON.
    "a form": """url => new Promise(done => {
        const frame = document.body.appendChild(document.createElement('iframe'));
        frame.name = 'answer';
        const form = document.body.appendChild(document.createElement('form'));
        Object.assign(form, {action: url, method: 'POST', enctype: 'text/plain', target: 'answer'});
        const field = form.appendChild(document.createElement('input'));
        field.name = '{"event":"post.published","data":{"a":"';
        field.value = '"}}';
        frame.onload = () => done('sent');
        form.submit();
    })""",
    "a fetch without CORS": """(url, body) => fetch(
        url, {method: 'POST', mode: 'no-cors', body}).then(() => 'sent', String)""",
    "a fetch of JSON": """(url, body) => fetch(
        url, {method: 'POST', headers: {'Content-Type': 'application/json'}, body}).then(() => 'sent', String)""",
    "an image": """url => new Promise(done => {
        const image = new Image();
        image.onload = image.onerror = () => done('sent');
        image.src = url;
    })""",
    "a script": """url => new Promise(done => {
        const script = document.createElement('script');
        script.onload = script.onerror = () => done('sent');
        script.src = url;
        document.head.append(script);
    })""",
    "a beacon": """(url, body) => navigator.sendBeacon(
        url, new Blob([body], {type: 'text/plain'})) ? 'sent' : 'refused'""",
}
