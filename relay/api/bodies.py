"""Bodies of requests: bounded in size and time, and of the type they say."""

import asyncio

import aiohttp
from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError

from relay import canonical
from relay.api.problems import Problem

BODY_SECONDS = 30.0
JSON = "application/json"
NDJSON = "application/x-ndjson"
CONTINUE = "100-continue"


async def read(request: web.Request, limit: int) -> bytes:
    """Return the body. Raises 413 over `limit` bytes and 408 when it does not arrive."""
    if (request.content_length or 0) > limit:
        raise too_large(limit)
    content = request.content
    if content.is_eof():  # small bodies come with their head
        body = content.read_nowait()
        if len(body) > limit:
            raise too_large(limit)
        return body
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await ask_for(request)
            async for chunk in content.iter_any():
                size += len(chunk)
                if size > limit:
                    raise too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise Problem(
            408, f"the body did not arrive within {BODY_SECONDS:.0f} s", headers={"Connection": "close"}
        ) from None
    except (ConnectionError, aiohttp.ClientError, HttpProcessingError, web.RequestPayloadError):
        # Nobody is left to read this; it only keeps a stranger's hang-up from looking like our fault.
        raise Problem(400, "the body broke off") from None
    return b"".join(chunks)


async def wait_until_read(_request: web.Request) -> None:
    """Take the place of aiohttp's answer to `Expect`, which asks for bodies that nobody may want."""


async def ask_for(request: web.Request) -> None:
    """Say that the body is wanted to who waits for that (RFC 9110 section 10.1.1)."""
    if request.headers.get("Expect", "").lower() == CONTINUE and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun


def too_large(limit: int) -> Problem:
    return Problem(413, f"at most {limit} bytes are taken here")


def content_type(request: web.Request, *allowed: str) -> str:
    """Return the media type of the body. Raises 415 unless it is one of `allowed`."""
    media_type, _, parameters = request.headers.get("Content-Type", "").partition(";")
    media_type = media_type.strip().lower()
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if media_type not in allowed or charset not in {"", "utf-8"}:
        raise Problem(415, f"send Content-Type: {' or '.join(allowed)}, in UTF-8")
    return media_type


def parse(body: bytes) -> canonical.JSON:
    """Return the value of a JSON text. Raises 400."""
    try:
        return canonical.parse(body)
    except canonical.NotJSON as error:
        raise Problem(400, str(error)) from None


async def members(request: web.Request, limit: int, *, optional: bool = False) -> dict[str, canonical.JSON]:
    """Return the body's object; `optional` lets an empty body stand for an empty one. Raises 4xx."""
    if optional and not request.body_exists:
        return {}
    content_type(request, JSON)
    value = parse(await read(request, limit) or (b"{}" if optional else b""))
    if not isinstance(value, dict):
        raise Problem(422, "the body must be an object", errors=[("#", "must be an object")])
    return value
