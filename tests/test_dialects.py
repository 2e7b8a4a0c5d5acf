"""Every receiver's dialect: what a running relay sends, verified by other people's libraries.

Nothing of `relay.signing` or `relay.formats` is used here: requests come over TLS from a real relay and are
judged by what receivers really use, in Python and in Node.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import gidgethub
import pytest
import standardwebhooks
import stripe
import svix.webhooks
from cloudevents.core.bindings import http
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from gidgethub.sansio import validate_event
from slack_sdk.signature import SignatureVerifier

from tests.process import RelayProcess, relay_process
from tests.receiver import Receiver, Request

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
OTHER_SECRET = "whsec_ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA="
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
OTHER_PUBLIC = "whpk_O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik="
GENERIC = {"header": "X-Mine", "prefix": "sha512=", "encoding": "base64", "algorithm": "sha512"}
WITH_ROOM = ("standard", "svix", "stripe")
WITH_ROOM_FOR_ONE = ("github", "slack", "socialsyncer", "shopify", "generic")
EVENT = {"event": "post.published", "data": {"text": "Grüße 🎉", "n": 1}, "key": "größe 50 %"}
TRACE = "0af7651916cd43dd8448eb211c80319c"
TOLERANCE_SECONDS = 300
NODE_FOLDER = Path(__file__).parent

Headers = dict[str, str]  # by lower-case name


# What receivers verify with


def verify_standard(secret: str, headers: Headers, body: bytes) -> None:
    standardwebhooks.Webhook(secret).verify(body, only("webhook-", headers))


def verify_svix(secret: str, headers: Headers, body: bytes) -> None:
    svix.webhooks.Webhook(secret).verify(body, only("svix-", headers))


def verify_stripe(secret: str, headers: Headers, body: bytes) -> None:
    stripe.WebhookSignature.verify_header(body, headers["stripe-signature"], secret, TOLERANCE_SECONDS)


def verify_github(secret: str, headers: Headers, body: bytes) -> None:
    validate_event(body, signature=headers["x-hub-signature-256"], secret=secret)


def verify_slack(secret: str, headers: Headers, body: bytes) -> None:
    if not SignatureVerifier(secret).is_valid_request(body, headers):
        raise ValueError("no")


def verify_ed25519(public: str, headers: Headers, body: bytes) -> None:
    """No published library verifies v1a yet; the mathematics are somebody else's all the same."""
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    (signature,) = (
        entry[4:] for entry in headers["webhook-signature"].split(" ") if entry.startswith("v1a,")
    )
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix("whpk_")))
    key.verify(base64.b64decode(signature), content)


def verify_mac(algorithm: str, header: str, write: Callable[[bytes], str]) -> Callable[..., None]:
    """Return what verifies as the owner's documentation shows it, where there is no library."""

    def verify(secret: str, headers: Headers, body: bytes) -> None:
        if headers[header] != write(hmac.new(secret.encode(), body, algorithm).digest()):
            raise ValueError("no")

    return verify


VERIFY: dict[str, Callable[[str, Headers, bytes], None]] = {
    "standard": verify_standard,
    "standard-ed25519": verify_ed25519,
    "svix": verify_svix,
    "stripe": verify_stripe,
    "github": verify_github,
    "slack": verify_slack,
    "socialsyncer": verify_mac("sha256", "x-socialsyncerapi-signature", bytes.hex),
    "shopify": verify_mac("sha256", "x-shopify-hmac-sha256", lambda mac: base64.b64encode(mac).decode()),
    "generic": verify_mac("sha512", "x-mine", lambda mac: f"sha512={base64.b64encode(mac).decode()}"),
}
REFUSALS = (
    standardwebhooks.WebhookVerificationError,
    stripe.SignatureVerificationError,
    gidgethub.ValidationFailure,
    InvalidSignature,
    ValueError,  # also what is not UTF-8 any more
)


def fits(scheme: str, secret: str, headers: Headers, body: bytes) -> bool:
    try:
        VERIFY[scheme](secret, headers, body)
    except REFUSALS:
        return False
    return True


def only(prefix: str, headers: Headers) -> Headers:
    return {name: value for name, value in headers.items() if name.startswith(prefix)}


def lowered(request: Request) -> Headers:
    return {name.lower(): value for name, value in request.headers.items()}


# A running relay


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as each:
        yield each


@asynccontextmanager
async def running(
    folder: Path, receiver: Receiver, config: str, **environment: str
) -> AsyncIterator[RelayProcess]:
    authority = folder / "authority.pem"
    authority.write_bytes(receiver.authority.cert_pem.bytes())
    environment["SSL_CERT_FILE"] = str(authority)
    with relay_process(folder, config, environment, start=False) as relay:
        await asyncio.to_thread(relay.start)
        yield relay


async def call(relay: RelayProcess, status: int, *arguments: object) -> dict:
    """Ask the relay; return what it says when it says so with this status."""
    answered, answer = await asyncio.to_thread(relay.call, *arguments)
    assert answered == status, answer
    return answer


def endpoint(url: str, id_: str = "main", **settings: str) -> str:
    lines = {"id": f'"{id_}"', "url": f'"{url}"', "events": '["*"]', "secret": f'"{SECRET}"'} | settings
    if "secrets" in settings:
        del lines["secret"]
    return "[[endpoints]]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items())


NAMED = [name for name in VERIFY if name != "generic"]
INLINE = "{ " + ", ".join(f'{name} = "{value}"' for name, value in GENERIC.items()) + " }"
EVERY_SCHEME = f"[{', '.join(f'{name!r}' for name in NAMED)}, {INLINE}]"


async def one_request(folder: Path, receiver: Receiver) -> Request:
    """Return a request that is signed in all schemes at once."""
    config = endpoint(receiver.url, secrets=f'["{PRIVATE}", "{SECRET}"]', signatures=EVERY_SCHEME)
    async with running(folder, receiver, config) as relay:
        await call(relay, 202, "POST", "/v1/events", EVENT)
        (request,) = await receiver.wait_for(1)
    return request


# Schemes

# Where the id and the time stand that a scheme signs.
SIGNED = {
    "standard": ("webhook-id", "webhook-timestamp"),
    "standard-ed25519": ("webhook-id", "webhook-timestamp"),
    "svix": ("svix-id", "svix-timestamp"),
    "stripe": ("stripe-signature",),
    "slack": ("x-slack-request-timestamp",),
}


def flipped(text: str) -> Iterator[str]:
    """Return the text with each of its bits flipped in turn, as far as it stays text."""
    data = text.encode("latin-1")
    for place in range(len(data) * 8):
        yield one_bit(data, place).decode("latin-1")


def one_bit(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def damaged(scheme: str, headers: Headers, body: bytes) -> Iterator[tuple[Headers, bytes]]:
    """Return the request with each bit of what the scheme signs flipped in turn."""
    for place in range(len(body) * 8):
        yield headers, one_bit(body, place)
    for name in SIGNED.get(scheme, ()):
        if name == "stripe-signature":
            time, _, rest = headers[name].removeprefix("t=").partition(",")
            values: Iterable[str] = (f"t={each},{rest}" for each in flipped(time))
        else:
            values = flipped(headers[name])
        for value in values:
            yield headers | {name: value}, body


async def test_every_scheme_verifies_over_the_wire_and_no_bit_of_it_can_change(tmp_path, receiver):
    """A library that says yes to one request says no to every other."""
    request = await one_request(tmp_path, receiver)
    headers, body = lowered(request), request.body

    for scheme in VERIFY:
        right, wrong = (PUBLIC, OTHER_PUBLIC) if scheme == "standard-ed25519" else (SECRET, OTHER_SECRET)
        assert fits(scheme, right, headers, body), scheme
        assert not fits(scheme, wrong, headers, body), scheme
        for changed_headers, changed_body in damaged(scheme, headers, body):
            assert not fits(scheme, right, changed_headers, changed_body), (scheme, changed_headers)

    assert len(request.headers.getall("webhook-signature")) == 1
    versions = [entry.partition(",")[0] for entry in headers["webhook-signature"].split(" ")]
    assert versions == ["v1", "v1a"]
    id_, type_ = headers["webhook-id"], "post.published"
    assert (headers["x-github-event"], headers["x-github-delivery"]) == (type_, id_)
    assert (headers["x-shopify-topic"], headers["x-shopify-webhook-id"]) == (type_, id_)
    assert headers["x-socialapi-signature"] == headers["x-socialsyncerapi-signature"]


NPM_INSTALL = ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock")
NPM_PATIENCE = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=4000")


@pytest.fixture(scope="module")
def node_packages() -> Path:
    """Install what `package.json` pins, once for as long as it says the same."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("wants Node and npm")
    pins = (NODE_FOLDER / "package.json").read_bytes()
    kept = Path(tempfile.gettempdir()) / f"relay-node-{os.getuid()}-{hashlib.sha256(pins).hexdigest()[:12]}"
    if not kept.exists():
        fresh = Path(tempfile.mkdtemp(prefix="relay-node-"))
        (fresh / "package.json").write_bytes(pins)
        npm = subprocess.run(
            [*NPM_INSTALL, *NPM_PATIENCE],
            cwd=fresh, capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        if npm.returncode != 0:
            shutil.rmtree(fresh)
            pytest.skip(f"npm cannot install: {npm.stderr.strip()[-300:]}")
        with contextlib.suppress(OSError):  # another run was faster, and its folder is as good
            fresh.rename(kept)
    shutil.copy(NODE_FOLDER / "dialects.mjs", kept)
    return kept


def fit_in_node(folder: Path, requests: list[tuple[str, str, Headers, bytes]]) -> list[bool]:
    question = [
        {"scheme": scheme, "secret": secret, "headers": headers, "body": base64.b64encode(body).decode()}
        for scheme, secret, headers, body in requests
    ]
    node = subprocess.run(
        ["node", "dialects.mjs"],
        cwd=folder, input=json.dumps(question), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert node.returncode == 0, node.stderr
    return json.loads(node.stdout)


async def test_every_scheme_verifies_in_node_and_no_bit_of_it_can_change(tmp_path, receiver, node_packages):
    """The same in the language that most receivers are written in."""
    request = await one_request(tmp_path, receiver)
    headers, body = lowered(request), request.body
    schemes = {"standard": "webhook-", "svix": "svix-", "stripe": "stripe-", "github": "x-"}
    good, bad = [], []
    for scheme, prefix in schemes.items():
        its_own = only(prefix, headers)
        good.append((scheme, SECRET, its_own, body))
        bad.append((scheme, OTHER_SECRET, its_own, body))
        bad += [(scheme, SECRET, *changed) for changed in damaged(scheme, its_own, body)]

    answers = await asyncio.to_thread(fit_in_node, node_packages, [*good, *bad])

    assert answers == [True] * len(good) + [False] * len(bad)
    assert len(bad) > 4 * 8 * len(body)


# Rotation

MANY = 10_000 if os.environ.get("RELAY_TESTS_SKIP_NOTHING") else 600
A_BATCH = 50
OVERLAP = "2s"


def secrets_that_fit(request: Request, secrets: list[str]) -> dict[str, list[int]]:
    """Return for each scheme which of the secrets a receiver may have in order to verify."""
    headers = lowered(request)
    return {
        scheme: [place for place, secret in enumerate(secrets) if fits(scheme, secret, headers, request.body)]
        for scheme in (*WITH_ROOM, *WITH_ROOM_FOR_ONE)
    }


async def submit(relay: RelayProcess, count: int) -> set[str]:
    """Post so many events, whose ids are returned, without waiting for their deliveries."""
    taken: set[str] = set()
    while len(taken) < count:
        answer = await call(relay, 202, "POST", "/v1/events/batch", {"events": [EVENT] * A_BATCH})
        taken |= {each["id"] for each in answer["events"]}
    return taken


async def test_a_rotation_amid_deliveries_breaks_no_receiver(tmp_path, receiver):
    """A receiver changes its secret at any moment of the overlap; at its end where there is room for one."""
    signatures = [*WITH_ROOM, *(name for name in WITH_ROOM_FOR_ONE if name != "generic"), GENERIC]
    main = {"id": "main", "url": receiver.url, "events": ["*"], "signatures": signatures}
    rotation = "/v1/webhooks/settings/main/rotate-secret"
    async with running(tmp_path, receiver, "allow_private_for_api = true\n") as relay:
        created = await call(relay, 201, "POST", "/v1/webhooks/settings", main)
        assert created["signatures"] == signatures
        old = created["secret"]
        before = await submit(relay, MANY // 3)
        rotated = await call(relay, 200, "POST", rotation, {"overlap": OVERLAP})
        secrets = [old, rotated["secret"]]
        during = await submit(relay, MANY // 3)
        await receiver.wait_for(len(before | during), within=90)
        async with asyncio.timeout(15):  # until the overlap's end has taken effect
            while secrets_that_fit(receiver.requests[-1], secrets)["github"] != [1]:
                during |= await submit(relay, A_BATCH)
                await receiver.wait_for(len(before | during))
        after = await submit(relay, MANY // 3)
        requests = await receiver.wait_for(len(before | during | after), within=90)

    sent = [request.headers["webhook-id"] for request in requests]
    assert sorted(sent) == sorted(before | during | after), "each was delivered at the first attempt"
    fitting = [secrets_that_fit(request, secrets) for request in requests]
    until = datetime.fromisoformat(rotated["overlap_until"]).timestamp()
    # The header has whole seconds: those of which all is before the end.
    early = [
        each
        for each, request in zip(fitting, requests, strict=True)
        if int(request.headers["webhook-timestamp"]) + 1 <= until
    ]
    fresh = [each for each, id_ in zip(fitting, sent, strict=True) if id_ not in before]
    late = [each for each, id_ in zip(fitting, sent, strict=True) if id_ in after]
    assert all(places for each in fitting for places in each.values())
    assert all(0 in each[scheme] for each in early for scheme in WITH_ROOM)
    assert all(1 in each[scheme] for each in fresh for scheme in WITH_ROOM)
    assert all(each[scheme] == [0] for each in early for scheme in WITH_ROOM_FOR_ONE)
    assert all(places == [1] for each in late for places in each.values())
    assert [0, 1] in [each["standard"] for each in early]


# Formats


async def test_each_endpoint_gets_its_format_the_same_on_every_attempt(tmp_path, receiver):
    """Body and attributes are one event's, whatever they look like, and a retry brings the same bytes."""
    names = ("event", "standard", "cloudevents", "cloudevents-binary", "data")
    config = (
        '[delivery]\nretry_schedule = ["700ms"]\n[events."post.published"]\nsample = { a = 1 }\n'
        + "".join(endpoint(f"{receiver.url}/{name}", name, format=f'"{name}"') for name in names)
    )
    receiver.answers(*[503] * len(names))
    async with running(tmp_path, receiver, config, RELAY_SERVER__SOURCE="/shop") as relay:
        parent = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "tracestate": "vendor=opaque,other=1"}
        receipt = await call(relay, 202, "POST", "/v1/events", EVENT, parent)
        requests = list(await receiver.wait_for(2 * len(names)))
        await call(relay, 200, "POST", "/v1/webhooks/test", {"event": "post.published"})
        samples = (await receiver.wait_for(3 * len(names)))[len(requests) :]

    sample = {each.path.rpartition("/")[2]: json.loads(each.body) for each in samples}
    assert sample["data"] == sample["cloudevents-binary"] == {"a": 1}
    assert sample["standard"]["type"] == sample["cloudevents"]["type"] == sample["event"]["event"]
    found = {name: [each for each in requests if each.path.endswith(f"/{name}")] for name in names}
    for first, second in found.values():
        assert first.body == second.body
        assert verify_standard(SECRET, lowered(first), first.body) is None
        assert attempt_free(first) == attempt_free(second)
        spans = [each.headers["traceparent"] for each in (first, second)]
        assert [span[:36] for span in spans] == [f"00-{TRACE}-"] * 2
        assert len({*spans, parent["traceparent"]}) == 3
        assert first.headers["tracestate"] == second.headers["tracestate"] == parent["tracestate"]
    assert read(found, "event") == {
        "event": "post.published", "timestamp": receipt["timestamp"], "data": EVENT["data"],
    }  # fmt: skip
    assert read(found, "standard") == {
        "type": "post.published", "timestamp": receipt["timestamp"], "data": EVENT["data"],
    }  # fmt: skip
    assert read(found, "data") == read(found, "cloudevents-binary") == EVENT["data"]
    for name in ("cloudevents", "cloudevents-binary"):
        first, _ = found[name]
        event = http.from_http_event(http.HTTPMessage(lowered(first), first.body))
        attributes = event.get_attributes()
        assert attributes.pop("time") == datetime.fromisoformat(receipt["timestamp"])
        assert attributes == {
            "specversion": "1.0", "id": receipt["id"], "source": "/shop", "type": "post.published",
            "subject": EVENT["key"], "datacontenttype": "application/json",
        }  # fmt: skip
        assert event.get_data() == EVENT["data"]
    types = {name: each.headers["Content-Type"] for name, (each, _) in found.items()}
    assert types.pop("cloudevents") == "application/cloudevents+json"
    assert set(types.values()) == {"application/json"}


def read(found: dict[str, list[Request]], name: str) -> object:
    return json.loads(found[name][0].body)


def attempt_free(request: Request) -> Headers:
    """Return the headers that have to be the same on every attempt."""
    own = ("webhook-timestamp", "webhook-attempt", "webhook-signature", "traceparent")
    return {name: value for name, value in lowered(request).items() if name not in own}


async def test_what_was_accepted_before_the_source_changed_keeps_it(tmp_path, receiver):
    """Consumers tell repeats by source and id: a replay with another source would be another event."""
    config = endpoint(receiver.url, format='"cloudevents"', retry_schedule='["1ms", "1ms", "1ms"]')
    receiver.answers(503, 503, 503)
    async with running(tmp_path, receiver, config) as relay:
        first = await call(relay, 202, "POST", "/v1/events", EVENT)
        await receiver.wait_for(4)
        relay.environment["RELAY_SERVER__SOURCE"] = "/other"
        assert await asyncio.to_thread(relay.stop) == 0
        await asyncio.to_thread(relay.start)
        await call(relay, 200, "POST", f"/v1/events/{first['id']}/replay", {"endpoint": "main"})
        await call(relay, 202, "POST", "/v1/events", EVENT)
        requests = await receiver.wait_for(6)

    sources = {(each.headers["webhook-id"], json.loads(each.body)["source"]) for each in requests}
    assert {source for id_, source in sources if id_ == first["id"]} == {"relay"}
    assert len({each.body for each in requests if each.headers["webhook-id"] == first["id"]}) == 1
    assert {source for id_, source in sources if id_ != first["id"]} == {"/other"}
