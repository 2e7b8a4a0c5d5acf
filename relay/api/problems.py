"""Errors as the API says them: `application/problem+json` (RFC 9457).

Handlers raise `Problem`; the framework's own errors are turned into the same form.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus

import orjson
from aiohttp import web

TITLES: dict[int | str, tuple[str, str]] = {
    400: ("not-json", "The body is not JSON"),
    401: ("unauthorized", "A valid token is needed"),
    403: ("foreign-origin", "The request comes from another site"),
    404: ("not-found", "There is nothing here"),
    405: ("method-not-allowed", "The method is not allowed here"),
    408: ("too-slow", "The request did not arrive in time"),
    409: ("conflict", "The change does not fit what is there"),
    413: ("too-large", "The request is too large"),
    415: ("unsupported-media-type", "The content type is not supported"),
    417: ("expectation-failed", "What is expected cannot be done"),
    421: ("foreign-host", "This host is not ours"),
    422: ("invalid", "The request is not valid"),
    500: ("internal-error", "The relay failed"),
    501: ("not-implemented", "The relay does not do this"),
    503: ("unavailable", "The relay cannot take this now"),
    "not-http": ("not-http", "The request is not HTTP"),
}


class Problem(Exception):  # noqa: N818 - the RFC's word for it
    """An error answer: its status, one sentence, and for validation every mistake with its place.

    `kind` names the problem where its status alone does not.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Iterable[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.status = status
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    def response(self) -> web.Response:
        name, title = TITLES.get(self.kind or self.status, ("about:blank", HTTPStatus(self.status).phrase))
        content: dict[str, object] = {
            "type": name if ":" in name else f"/problems/{name}",
            "title": title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            content["errors"] = [{"pointer": pointer, "detail": detail} for pointer, detail in self.errors]
        return web.Response(
            body=orjson.dumps(content),
            status=self.status,
            headers={"Content-Type": "application/problem+json", **self.headers},
        )


def of_framework(error: web.HTTPException) -> Problem:
    """Turn aiohttp's own 404, 405, 413 into ours, keeping what its headers say (Allow)."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return Problem(error.status, error.text or error.reason, headers=headers)
