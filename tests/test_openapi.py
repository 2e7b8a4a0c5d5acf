"""The description at /openapi.json: valid, complete, and true of a relay that runs."""

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from relay.api import make_app
from relay.config.check import keys
from relay.config.settings import DeliverySettings, EndpointSettings
from relay.signing import SCHEMES
from tests.process import RelayProcess, free_port, relay_process

TOKEN = "sk_fuzzed"
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
FUZZ_SECONDS = 12
# What is asked of every answer: no 5xx, and no status, content type, header or shape that is not described.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
CATALOGUE = """
[events."post.published"]
description = "A post is public now."
sample = { postId = "post_abc123" }

[events."post.failed"]
sample = []
"""


@pytest.fixture
def document() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[1] / "relay/api/openapi.json").read_bytes())


def config(port: int, *, more: str = "") -> str:
    """Return a config whose endpoints, its own and the API's, can only be on this port of this machine."""
    return f"""
allow_private_for_api = true
ports = [{port}]

[delivery]
retry_schedule = ["50ms", "1h"]

[[endpoints]]
id = "main"
url = "https://127.0.0.1:{port}/main"
events = ["*"]
secret = "{SECRET}"
{more}
"""


def test_the_document_is_valid_openapi(document):
    """Generators of clients refuse a document that is not."""
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


def test_every_route_is_described_and_every_description_has_its_route(document):
    """A route that is missing here does not exist for those who read, one too many breaks their client."""
    app = make_app(None, hosts=None)
    routes = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.method != "HEAD"  # GET without its body
    }

    described = {
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }

    assert described == routes


def test_every_setting_of_an_endpoint_is_described(document):
    """A setting is added in the config's tables; this is what reminds of the document."""
    schemas = document["components"]["schemas"]
    settings = {*keys(EndpointSettings), *keys(DeliverySettings)} - {"secrets"}

    assert set(schemas["Settings"]["properties"]) == settings
    assert set(schemas["Scheme"]["enum"]) == set(SCHEMES)


def test_the_document_is_served_to_everyone_as_it_is_kept(tmp_path, document):
    """Tools fetch it before they have a token."""
    with relay_process(tmp_path, config(free_port()), {"RELAY_SERVER__TOKENS": ""}) as relay:
        assert relay.call("GET", "/openapi.json") == (200, document)


def strict(document: dict[str, Any], port: int) -> dict[str, Any]:
    """Return a copy for fuzzing: every answer has the members described and no others, URLs lead here."""
    copy = json.loads(json.dumps(document))
    for schema in objects(copy):
        schema.setdefault("additionalProperties", False)
    urls = [f"https://127.0.0.1:{port}/{name}" for name in ("one", "two?token=abc", "main")]
    copy["components"]["schemas"]["Settings"]["properties"]["url"] = {"enum": urls}
    return copy


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every schema with members that is somewhere in there."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            yield from objects(each)
