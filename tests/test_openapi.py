"""The description at /openapi.json: valid, complete, and true of a relay that runs."""

import asyncio
import http.client
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from relay.api import make_app
from relay.api.guard import Access
from relay.config.check import keys
from relay.config.endpoint import CONFIG_ALONE
from relay.config.settings import DeliverySettings, EndpointSettings
from relay.formats import FORMATS
from relay.signing import SCHEMES
from tests.process import RelayProcess, relay_process, unmeasured
from tests.receiver import Receiver

TOKEN = "sk_fuzzed"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
TYPE = "post.published"
CATALOGUE = f"""
[events."{TYPE}"]
sample = {{ postId = "post_abc123" }}
[events."post.failed"]
description = "A post did not get through."
"""

FUZZ_SECONDS = 150  # a third of that on two cores of its own
EXAMPLES = 4  # for each operation and phase
# Left out: positive_data_acceptance, because rules about what else there is (ids, catalogue, ports) are no
# schema's; allow_header_conformance, because GET /v1/events/batch is the event of the id "batch".
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "use_after_free",
    "ensure_resource_availability",
    "ignored_auth",
)


@pytest.fixture
def document() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[1] / "relay/api/openapi.json").read_bytes())


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver(tls=False) as each:
        yield each


def test_the_document_is_valid_openapi(document):
    """Generators of clients refuse a document that is not."""
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


def test_every_route_is_described_and_every_description_has_its_route(document):
    """A route that is missing here does not exist for those who read; one too many breaks their client."""
    app = make_app(None, Access(None))  # its routes are there without anything behind them
    routes = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"  # GET without its body
    }

    described = {
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }

    assert described == routes


def test_every_setting_of_an_endpoint_is_described(document):
    """A new setting is a line in the config's tables; this reminds of the document."""
    schemas = document["components"]["schemas"]
    settings = {*keys(EndpointSettings), *keys(DeliverySettings)} - {"secrets", *CONFIG_ALONE}

    assert set(schemas["Settings"]["properties"]) == settings
    assert schemas["Scheme"]["enum"] == list(SCHEMES)
    assert schemas["Format"]["enum"] == list(FORMATS)


def test_the_document_is_served_to_everyone_as_it_is_kept(tmp_path, document):
    """Tools fetch it before they have a token."""
    with guarded(tmp_path, CATALOGUE) as relay:
        connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=10)
        connection.request("GET", "/openapi.json")
        answer = connection.getresponse()
        served = answer.read()
        connection.close()
        assert relay.call("GET", "/v1/events")[0] == 401, "and nothing else"

    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert json.loads(served) == document


def test_ndjson_is_taken_as_the_document_shows_it(tmp_path, document):
    """The one body that the fuzzer below cannot write."""
    content = document["paths"]["/v1/events/batch"]["post"]["requestBody"]["content"]["application/x-ndjson"]

    with relay_process(tmp_path, "") as relay:
        status, answer = relay.call(
            "POST", "/v1/events/batch", content["example"].encode(), {"Content-Type": "application/x-ndjson"}
        )

    assert status == 202
    assert [receipt["event"] for receipt in answer["events"]] == ["post.published", "post.failed"]


@pytest.mark.long
async def test_a_relay_without_tokens_answers_nothing_that_is_not_described(tmp_path, document, receiver):
    """A client made from the document meets nothing it cannot read, whatever it sends."""
    with relay_process(tmp_path, endpoints(receiver)) as relay:
        await fuzz(relay, document, receiver)
    assert receiver.requests, "events went out meanwhile"


@pytest.mark.long
async def test_a_relay_with_tokens_answers_nothing_that_is_not_described(tmp_path, document, receiver):
    """The same with a token, with a catalogue, and for those who have no token."""
    with guarded(tmp_path, endpoints(receiver) + CATALOGUE) as relay:
        await fuzz(relay, document, receiver, WITH_TOKEN)
        newest = newest_event(relay)
        await fuzz(relay, document, receiver, phases="coverage")
        assert newest_event(relay) == newest, "without a token nothing is kept"


def endpoints(receiver: Receiver) -> str:
    """Return a config whose endpoints, the API's too, are on this machine and this port alone."""
    return f"""
allow_http = true
allow_private_for_api = true
ports = [{receiver.port}]
[[endpoints]]
id = "main"
url = "{receiver.url}"
events = ["*"]
secret = "{SECRET}"
"""


@contextmanager
def guarded(folder: Path, config: str) -> Iterator[RelayProcess]:
    """Run a relay that wants a token."""
    with relay_process(folder, config, start=False) as relay:
        table, rest = relay.config.read_text().split("\n", 1)
        relay.config.write_text(f'{table}\ntokens = ["{TOKEN}"]\n{rest}')
        relay.start()
        yield relay


def newest_event(relay: RelayProcess) -> str:
    _, page = relay.call("GET", "/v1/events?limit=1", headers=WITH_TOKEN)
    return page["data"][0]["id"]


async def fuzz(
    relay: RelayProcess,
    document: dict[str, Any],
    receiver: Receiver,
    headers: Mapping[str, str] | None = None,
    *,
    phases: str = "examples,coverage,fuzzing,stateful",
) -> None:
    """Let schemathesis call every operation, one by one and in rows, and check every answer."""
    headers = dict(headers or {})
    settings = {"id": "mine", "url": f"{receiver.url}/mine", "events": ["post.*"], "secret": SECRET}
    relay.call("POST", "/v1/webhooks/settings", settings, headers)
    described = relay.folder / "openapi.json"
    described.write_text(json.dumps(sharpened(document, receiver)))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(described), f"--url={relay.url}"),
        *(f"--header={name}: {value}" for name, value in headers.items()),
        *(f"--checks={','.join(CHECKS)}", f"--phases={phases}", f"--max-examples={EXAMPLES}"),
        # The same requests every time: what fails here is what was changed, not what chance has found.
        *("--generation-deterministic", "--no-color"),
    ]
    done = await asyncio.to_thread(
        partial(
            subprocess.run,
            command,
            cwd=relay.folder,
            env=unmeasured(),
            capture_output=True,
            text=True,
            timeout=FUZZ_SECONDS,
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"event":"request_failed"' not in relay.log


def sharpened(document: dict[str, Any], receiver: Receiver) -> dict[str, Any]:
    """Return a copy for fuzzing: answers may have no other members, and requests often name what is there."""
    copy = json.loads(json.dumps(document))
    for schema in objects(copy):
        schema.setdefault("additionalProperties", False)
    schemas = copy["components"]["schemas"]
    schemas["EventType"] = {"anyOf": [{"enum": [TYPE, "post.failed"]}, schemas["EventType"]]}
    schemas["EndpointId"] = {"anyOf": [{"enum": ["main", "mine"]}, schemas["EndpointId"]]}
    schemas["Settings"]["properties"]["url"] = {
        "enum": [receiver.url, f"{receiver.url}/mine", f"{receiver.url}/other?token=abc"]
    }
    del copy["paths"]["/v1/events/batch"]["post"]["requestBody"]["content"]["application/x-ndjson"]
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
