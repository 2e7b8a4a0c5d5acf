"""The bare handler, the yardstick: accept an event, sign it, forward it, answer 202; store nothing.

It is what a careful person would write with the same libraries if no event were ever lost: one shared
session, keep-alive, verified TLS, both of the relay's default signatures. It shares no code with the relay,
so that a change there cannot move the yardstick.
"""

import argparse
import base64
import hashlib
import hmac
import ssl
import time
import uuid
from collections.abc import AsyncIterator

import aiohttp
import orjson
from aiohttp import web
from yarl import URL

from tests.bench.processes import new_loop


class Bare:
    """The handler of `POST /v1/events` with what it keeps between requests."""

    def __init__(self, url: str, secret: str) -> None:
        self._url = URL(url)
        self._text = secret.encode()
        self._key = base64.b64decode(secret.removeprefix("whsec_"))

    async def session(self, _app: web.Application) -> AsyncIterator[None]:
        """Keep one session open for as long as the server runs."""
        connector = aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context())
        timeout = aiohttp.ClientTimeout(total=15)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
        ) as self._session:
            yield

    async def accept(self, request: web.Request) -> web.Response:
        submitted = orjson.loads(await request.read())
        event_id = f"evt_{uuid.uuid4().hex}"
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        body = orjson.dumps({"event": submitted["event"], "timestamp": now, "data": submitted["data"]})
        async with self._session.post(self._url, data=body, headers=self._headers(event_id, body)) as answer:
            await answer.read()
        status = 202 if answer.ok else 502
        return web.Response(
            status=status, body=orjson.dumps({"id": event_id}), content_type="application/json"
        )

    def _headers(self, event_id: str, body: bytes) -> dict[str, str]:
        timestamp = str(int(time.clock_gettime(time.CLOCK_REALTIME)))
        content = f"{event_id}.{timestamp}.".encode() + body
        mac = base64.b64encode(hmac.digest(self._key, content, hashlib.sha256)).decode()
        hexadecimal = hmac.digest(self._text, body, hashlib.sha256).hex()
        return {
            "Content-Type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": timestamp,
            "webhook-attempt": "1",
            "webhook-signature": f"v1,{mac}",
            "X-SocialSyncerAPI-Signature": hexadecimal,
            "X-SocialAPI-Signature": hexadecimal,
        }


async def ready(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--secret", required=True)
    parser.add_argument("--loop", default="auto")
    options = parser.parse_args()
    bare = Bare(options.url, options.secret)
    app = web.Application()
    app.cleanup_ctx.append(bare.session)
    app.router.add_post("/v1/events", bare.accept)
    app.router.add_get("/readyz", ready)
    loop = new_loop(options.loop)
    web.run_app(app, host="127.0.0.1", port=options.port, access_log=None, print=None, loop=loop)


if __name__ == "__main__":
    main()
