"""`relay verify`: requests signed by others' code, broken in every usual way, and what it says of each."""

import base64
import hmac
import io
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from relay.cli import main

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
OTHER = "whsec_YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDU="
BODY = (
    '{"event":"post.published","timestamp":"2026-01-15T10:00:00.000Z","data":{"id":1.5,"name":"é"}}'.encode()
)
AT = datetime(2026, 1, 15, 10, tzinfo=UTC)
SENT_AT = str(int(AT.timestamp()))


def standard(body: bytes = BODY, secret: str = SECRET) -> dict[str, str]:
    return {
        "webhook-id": "evt_1",
        "webhook-timestamp": SENT_AT,
        "webhook-signature": Webhook(secret).sign("evt_1", AT, body.decode()),
    }


def socialsyncer(body: bytes = BODY, secret: str = SECRET) -> dict[str, str]:
    mac = hmac.new(secret.encode(), body, "sha256").hexdigest()
    return {"X-SocialSyncerAPI-Signature": mac, "X-SocialAPI-Signature": mac}


class Case:
    """A folder with a captured request, and what `relay verify` says of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def file(self, name: str, content: bytes | str) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def verify(self, headers: dict[str, str], body: bytes = BODY, secret: str = SECRET, at: str = ""):
        """Return the exit code and the findings."""
        code = main(
            [
                "verify", "--json", "--at", at or AT.isoformat(),
                "--headers-file", self.file("headers", "".join(f"{n}: {v}\r\n" for n, v in headers.items())),
                "--body", self.file("body", body),
                "--secret-file", self.file("secret", secret + "\n"),
            ]
        )  # fmt: skip
        told = self._capsys.readouterr()
        assert told.err == ""
        content = json.loads(told.out)
        assert content["verified"] == (code == 0)
        return code, content["signatures"]

    def refused(self, *words: str) -> tuple[int, str]:
        code = main(["verify", *words])
        told = self._capsys.readouterr()
        assert told.out == ""
        return code, told.err


@pytest.fixture
def case(tmp_path, capsys, monkeypatch) -> Case:
    monkeypatch.delenv("RELAY_SECRET", raising=False)
    return Case(tmp_path, capsys)


def test_a_request_that_is_as_it_was_signed_is_verified(case):
    """Else nothing it says of a broken one could be believed."""
    code, findings = case.verify(standard() | socialsyncer())
    assert code == 0
    assert findings == {
        "standard": {"worth": "verified", "why": None},
        "socialsyncer": {"worth": "verified", "why": None},
    }


CONTENT = json.loads(BODY)
ADDED = "a line break was added at its end"
REWRITTEN = "parsed and written again as other JSON"
REORDERED = "written again with its members in another order"
UNKNOWN = "it is another secret, or what the body says was changed"

# What came, the secret at hand, and a piece of the reason told.
BROKEN = {
    "a line break was added": (BODY + b"\n", SECRET, ADDED),
    "a line break of two": (BODY + b"\r\n", SECRET, ADDED),
    "printed for people": (json.dumps(CONTENT, indent=2).encode(), SECRET, REWRITTEN),
    "escaped": (json.dumps(CONTENT, separators=(",", ":")).encode(), SECRET, REWRITTEN),
    "marked with its byte order": (b"\xef\xbb\xbf" + BODY, SECRET, REWRITTEN),
    "members sorted": (json.dumps(CONTENT, sort_keys=True).encode(), SECRET, REORDERED),
    "no body": (b"", SECRET, "the body is empty"),
    "cut off": (BODY[:-1], SECRET, UNKNOWN),
    "an integer too large": (b"[18446744073709551616]", SECRET, UNKNOWN),
    "a value changed": (BODY.replace(b"1.5", b"2.5"), SECRET, UNKNOWN),
    "a list": (b"[]", SECRET, UNKNOWN),
    "another secret": (BODY, OTHER, UNKNOWN),
    "a secret of another kind": (BODY, "no base64!", UNKNOWN),
    "a secret without its start": (BODY, SECRET.removeprefix("whsec_"), "it lost the whsec_ at its start"),
    "a secret in quotes": (BODY, f'"{SECRET}"', "it has quotes around it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_it_says_which_part_of_a_request_disagrees(case, name):
    """'Wrong signature' is where people lose a day: the part that disagrees is what they look for."""
    body, secret, why = BROKEN[name]
    code, findings = case.verify(standard() | socialsyncer(), body, secret)
    assert (code, list(findings)) == (1, ["standard", "socialsyncer"])
    for finding in findings.values():
        assert finding["worth"] == "wrong"
        assert why in finding["why"]


def test_a_signer_that_does_not_know_whsec_is_told(case):
    """Half of all receivers written by hand take the text of a secret for its key, or the base64 for text."""
    text = SECRET.removeprefix("whsec_")
    key_as_text = Webhook(text.encode()).sign("evt_1", AT, BODY.decode())
    code, findings = case.verify(standard() | {"webhook-signature": key_as_text})
    assert code == 1
    assert "took what follows whsec_ as text, not as base64" in findings["standard"]["why"]


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ("2026-01-15T10:05:01Z", "made 301 s ago and not within 300 s"),
        ("2026-01-15T09:54:59+00:00", "made 301 s in the future"),
    ],
)
def test_a_right_signature_of_another_time_is_stale(case, at, why):
    """Receivers refuse it as a replayed one, though body and secret are right."""
    code, findings = case.verify(standard() | socialsyncer(), at=at)
    assert (code, findings["standard"]["worth"]) == (1, "stale")
    assert why in findings["standard"]["why"]
    assert findings["socialsyncer"]["worth"] == "verified", "it has no time to go by"
    assert case.verify(standard(), at="2026-01-15T10:05:00Z")[0] == 0
    assert case.verify(standard(), at="2026-01-15T09:55:00Z")[0] == 0


def test_without_a_time_given_it_is_now(case):
    """The usual case is a request that has just come."""
    headers = case.file("headers", "".join(f"{n}: {v}\n" for n, v in standard().items()))
    body, secret = case.file("body", BODY), case.file("secret", SECRET)
    assert main(["verify", "--headers-file", headers, "--body", body, "--secret-file", secret]) == 1
    told = case._capsys.readouterr()
    assert told.out.startswith("standard: stale: right, but made ")


def test_a_time_that_is_no_number_is_named(case):
    sent = standard() | {"webhook-timestamp": "2026-01-15T10:00:00Z"}
    signature = hmac.new(b"k", b"evt_1.2026-01-15T10:00:00Z." + BODY, "sha256").digest()
    sent["webhook-signature"] = f"v1,{base64.b64encode(signature).decode()}"
    code, findings = case.verify(sent, secret="k")
    assert (code, findings["standard"]["worth"]) == (1, "stale")
    assert "webhook-timestamp 2026-01-15T10:00:00Z is not in whole seconds" in findings["standard"]["why"]


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp"])
def test_a_signed_header_that_is_missing_is_named(case, name):
    """Some proxies and loggers keep only the headers they know."""
    headers = {key: value for key, value in standard().items() if key != name}
    _, findings = case.verify(headers)
    assert findings["standard"]["why"] == f"the header {name} is missing, and the signature covers it"


def test_a_scheme_that_agrees_clears_body_and_secret(case):
    """Then only that scheme's own headers are left to look at."""
    _, findings = case.verify(standard() | {"webhook-id": "evt_2"} | socialsyncer())
    assert findings["socialsyncer"]["worth"] == "verified"
    assert findings["standard"]["why"] == (
        "body and secret are right, for socialsyncer agrees: "
        "webhook-id, webhook-timestamp or the signature itself was changed"
    )
    code, findings = case.verify(standard() | socialsyncer(secret=OTHER))
    assert code == 1, "one right signature does not make up for a wrong one"
    assert findings["standard"]["worth"] == "verified"
    assert findings["socialsyncer"]["why"].endswith("the older secret while a new one is phased in")


def test_headers_are_read_as_they_are_copied(case, monkeypatch, capsys):
    """From a proxy's log, a browser or curl: with the request line, in any case, with empty lines."""
    lines = ["POST /hook HTTP/1.1", "Host: example.com:8443", ""]
    lines += [f"{name.upper()}:{value}" for name, value in standard().items() if name != "webhook-id"]
    monkeypatch.setenv("RELAY_SECRET", SECRET)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BODY)))
    headers = case.file("headers", "\n".join(lines))
    at = AT.isoformat()
    assert main(["verify", "--header", "Webhook-Id: evt_1", "--headers-file", headers, "--at", at]) == 0
    assert capsys.readouterr().out == "standard: verified\n"


def test_nothing_signed_is_told_with_what_looks_like_a_signature(case):
    """The scheme may simply be one that is not verified here."""
    case.file("body", BODY)
    words = ("--body", str(case.folder / "body"), "--secret-file", case.file("secret", SECRET))
    code, told = case.refused("--header", "X-Other-Signature: 1", *words)
    assert (code, "x-other-signature" in told, told.count("\n")) == (1, True, 1)
    code, told = case.refused("--header", "Host: example.com", *words)
    assert (code, "no signature among its headers" in told) == (1, True)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--header", "a: b"], 2, "there is no secret: set RELAY_SECRET or name a --secret-file"),
        (["--secret-file", "secret"], 2, "there are no headers: give --header or --headers-file"),
        (["--secret-file", "secret", "--header", "nonsense"], 2, "'nonsense' is not a header"),
        (["--secret-file", "secret", "--header", "two words: x"], 2, "'two words: x' is not a header"),
        (["--secret-file", "secret", "--header", ": x"], 2, "': x' is not a header"),
        (["--secret-file", "secret", "--headers-file", "none"], 1, "none cannot be read: No such file"),
        (["--secret-file", "secret", "--header", "a: b", "--body", "none"], 1, "none cannot be read"),
        (
            ["--secret-file", "secret", "--header", "a: b", "--body", "body", "--at", "noon"],
            2,
            "'noon' is not",
        ),
        (
            ["--secret-file", "secret", "--header", "a: b", "--body", "body", "--at", "2026-01-15T10:00:00"],
            2,
            "is not a time like 2026-01-15T10:00:00Z",
        ),
        (["--secret-file", "bad", "--header", "a: b"], 1, "what follows whsec_ is not base64"),
    ],
)
def test_what_cannot_be_judged_is_told_in_one_sentence(case, monkeypatch, words, code, says):
    """A usage mistake must not look like a wrong signature to a script."""
    monkeypatch.chdir(case.folder)
    case.file("secret", SECRET)
    case.file("bad", "whsec_*")
    case.file("body", BODY)
    exit_code, told = case.refused(*words)
    assert exit_code == code
    assert told.startswith("relay: ")
    assert says in told
    assert told.count("\n") == 1
    assert SECRET not in told


def test_a_process_reads_the_body_from_its_standard_input(tmp_path):
    """As it is called: a captured body is piped in, byte for byte."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    headers = [word for name, value in standard().items() for word in ("--header", f"{name}: {value}")]
    words = ["-m", "relay", "verify", *headers, "--secret-file", str(secret), "--at", AT.isoformat()]
    ran = subprocess.run([sys.executable, *words], input=BODY, capture_output=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"standard: verified\n", b"")


# The dialects besides these two, signed here by what their documentation says


def mac(content: bytes, secret: str = SECRET) -> hmac.HMAC:
    return hmac.new(secret.encode(), content, "sha256")


def dialects(body: bytes = BODY) -> dict[str, dict[str, str]]:
    signature = Webhook(SECRET).sign("evt_1", AT, body.decode())
    return {
        "svix": {"svix-id": "evt_1", "svix-timestamp": SENT_AT, "svix-signature": signature},
        "stripe": {
            "Stripe-Signature": f"t={SENT_AT},v1=00,v1={mac(f'{SENT_AT}.'.encode() + body).hexdigest()}"
        },
        "github": {"X-Hub-Signature-256": f"sha256={mac(body).hexdigest()}"},
        "shopify": {"X-Shopify-Hmac-Sha256": base64.b64encode(mac(body).digest()).decode()},
        "slack": {
            "X-Slack-Request-Timestamp": SENT_AT,
            "X-Slack-Signature": f"v0={mac(f'v0:{SENT_AT}:'.encode() + body).hexdigest()}",
        },
    }


DIALECTS = dialects()
TIMED = ("svix", "stripe", "slack")


@pytest.mark.parametrize("scheme", DIALECTS)
def test_every_dialect_is_verified_and_broken_by_one_byte_of_its_body(case, scheme):
    assert case.verify(DIALECTS[scheme]) == (0, {scheme: {"worth": "verified", "why": None}})
    code, findings = case.verify(DIALECTS[scheme], BODY + b"\n")
    assert (code, findings[scheme]["worth"]) == (1, "wrong")
    assert ADDED in findings[scheme]["why"]
    assert case.verify(DIALECTS[scheme], secret=OTHER)[1][scheme]["worth"] == "wrong"


@pytest.mark.parametrize("scheme", DIALECTS)
def test_a_dialect_with_a_time_is_stale_after_it(case, scheme):
    """Those without one cannot tell a replayed request, and must not pretend to."""
    _, findings = case.verify(DIALECTS[scheme], at="2026-01-15T10:05:01Z")
    assert findings[scheme]["worth"] == ("stale" if scheme in TIMED else "verified")
    assert scheme not in TIMED or "made 301 s ago" in findings[scheme]["why"]


@pytest.mark.parametrize(
    ("scheme", "header", "named"),
    [
        ("svix", "svix-id", "svix-id"),
        ("svix", "svix-timestamp", "svix-timestamp"),
        ("slack", "X-Slack-Request-Timestamp", "x-slack-request-timestamp"),
    ],
)
def test_a_header_that_a_dialect_signs_is_named_when_it_is_missing(case, scheme, header, named):
    headers = {name: text for name, text in DIALECTS[scheme].items() if name != header}
    assert case.verify(headers)[1][scheme]["why"].startswith(f"the header {named} is missing")


def test_a_stripe_signature_without_its_time_or_signature_is_wrong(case):
    """Its header holds both, and either can be cut off."""
    given = DIALECTS["stripe"]["Stripe-Signature"]
    _, findings = case.verify({"Stripe-Signature": given.partition(",")[2]})
    assert findings["stripe"]["why"].startswith("the header stripe-signature's t is missing")
    assert case.verify({"Stripe-Signature": given.partition(",")[0]})[1]["stripe"]["worth"] == "wrong"
    changed = {"Stripe-Signature": given.replace(f"t={SENT_AT}", f"t={int(SENT_AT) + 1}")}
    _, findings = case.verify(changed | DIALECTS["github"])
    assert (
        "github agrees: stripe-signature's t or the signature itself was changed"
        in (findings["stripe"]["why"])
    )


def test_a_signature_of_ed25519_is_verified_with_either_half_of_its_key(case):
    """A receiver has only the public half; whoever runs the relay may have only the private one."""
    from nacl.signing import SigningKey

    key = SigningKey(bytes(range(32)))
    content = f"evt_1.{SENT_AT}.".encode() + BODY
    signature = f"v1a,{base64.b64encode(key.sign(content).signature).decode()}"
    public = f"whpk_{base64.b64encode(bytes(key.verify_key)).decode()}"
    private = f"whsk_{base64.b64encode(bytes(key)).decode()}"
    headers = standard() | {"webhook-signature": signature}
    for secret in (public, private, f"{OTHER}\n{public}"):
        code, findings = case.verify(headers, secret=secret)
        assert (code, findings) == (0, {"standard-ed25519": {"worth": "verified", "why": None}})
    changed = case.verify(headers | {"webhook-id": "evt_2"}, secret=public)
    assert (changed[0], changed[1]["standard-ed25519"]["worth"]) == (1, "wrong")
    cut = case.verify(headers | {"webhook-signature": signature[:-4]}, secret=public)
    assert cut[1]["standard-ed25519"]["worth"] == "wrong"
    code, findings = case.verify(headers)
    assert (code, findings["standard-ed25519"]["worth"]) == (1, "no key")
    assert "takes the public key, which begins whpk_" in findings["standard-ed25519"]["why"]


def test_what_cannot_be_judged_does_not_undo_what_is_verified(case):
    """Both kinds share a header, and a receiver of one has no key of the other."""
    sent = standard()
    sent["webhook-signature"] += " v1a,AAAA"
    code, findings = case.verify(sent)
    assert code == 0
    assert {scheme: each["worth"] for scheme, each in findings.items()} == {
        "standard": "verified",
        "standard-ed25519": "no key",
    }


def test_a_scheme_without_a_name_is_spelt_out(case, capsys):
    given = f"X-Mine: sig={base64.b64encode(hmac.digest(SECRET.encode(), BODY, 'sha1')).decode()}"
    words = ["verify", "--header", given, "--body", case.file("body", BODY)]
    words += ["--secret-file", case.file("secret", SECRET), "--header-scheme"]
    assert main([*words, "X-Mine,prefix=sig=,encoding=base64,algorithm=sha1"]) == 0
    assert capsys.readouterr().out == "X-Mine: verified\n"
    assert main([*words, "X-Mine,prefix=sig=,encoding=base64"]) == 1
    assert capsys.readouterr().out.startswith("X-Mine: wrong: ")


@pytest.mark.parametrize("secret", ["whpk_AAAA", "whsk_AAAA", "whpk_*", "whsk_"])
def test_a_key_that_was_cut_off_is_told_before_anything_is_judged(case, secret):
    code, told = case.refused("--header", "a: b", "--secret-file", case.file("secret", secret))
    assert (code, told.count("\n")) == (1, 1)
    assert told.startswith(f"relay: the secret cannot be used: what follows {secret[:5]} is ")
