"""A signed webhook sent with requests, as a task does it, and the application that hands the tasks over.

It runs in the environment of the library that is measured, so it imports only requests and what needs
nothing. `WEBHOOK_URL`, `WEBHOOK_SECRET` and `WEBHOOK_CA` in the environment say where to, signed with what,
and whom to trust.
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import requests

from tests.bench.load import event

_thread = threading.local()  # requests does not promise that threads may share a session


def post(event_id: str, body: str) -> None:
    """Sign and send; anything but 2xx raises, so that the library tries again."""
    if not hasattr(_thread, "session"):
        _thread.session = requests.Session()
        _thread.session.verify = os.environ["WEBHOOK_CA"]
        _thread.session.trust_env = False  # or it looks for proxies and a .netrc before each request
    key = base64.b64decode(os.environ["WEBHOOK_SECRET"].removeprefix("whsec_"))
    timestamp = str(int(time.clock_gettime(time.CLOCK_REALTIME)))
    mac = hmac.digest(key, f"{event_id}.{timestamp}.{body}".encode(), hashlib.sha256)
    headers = {
        "Content-Type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}",
    }
    answer = _thread.session.post(
        os.environ["WEBHOOK_URL"], data=body.encode(), headers=headers, timeout=15, allow_redirects=False
    )
    answer.raise_for_status()


def submission(number: int) -> tuple[str, str]:
    """Make an event's id and the body of its webhook."""
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    made = event(number)
    content = {"event": made["event"], "timestamp": timestamp, "data": made["data"]}
    return f"evt_{uuid.uuid4().hex}", json.dumps(content, separators=(",", ":"))


def hand_over_as_ordered(hand_over: Callable[[str, str], object], *, threads: int) -> None:
    """Answer each order on stdin, `{"events": …}`, when so many events are handed over, until stdin ends."""
    with ThreadPoolExecutor(threads) as pool:
        for order in sys.stdin:
            started_at = time.monotonic()
            events = range(json.loads(order)["events"])
            for _ in pool.map(lambda number: hand_over(*submission(number)), events):
                pass
            print(json.dumps({"started_at": started_at, "ended_at": time.monotonic()}), flush=True)
