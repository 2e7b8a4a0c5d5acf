"""`relay listen` as a receiver over https: every dialect of a running relay, and failures on request."""

import contextlib
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

import pytest
import trustme

from relay.cli.arguments import Answer, answers
from tests.process import relay_process
from tests.test_cli import post, relay, surroundings

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
OTHER_SECRET = "whsec_ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA="
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
OTHER_PUBLIC = "whpk_O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik="
NAMED = (
    "standard", "standard-ed25519", "socialsyncer", "svix", "stripe", "github", "shopify", "slack",
)  # fmt: skip
GENERIC = '{ header = "X-Mine", prefix = "mac=", encoding = "base64", algorithm = "sha512" }'
HEADER_SCHEME = ("--header-scheme", "X-Mine,prefix=mac=,encoding=base64,algorithm=sha512")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1")
    cert, key = folder / "cert.pem", folder / "key.pem"
    for blob in issued.cert_chain_pems:
        blob.write_to_path(cert, append=True)
    issued.private_key_pem.write_to_path(key)
    return str(cert), str(key)


@contextlib.contextmanager
def listener(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `relay listen`; gives the process and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "listen", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings(**environment),
    )  # fmt: skip
    try:
        line = ""
        while not (found := re.fullmatch(r"listening on (https?://127\.0\.0\.1:\d+/)\n", line)):
            line = process.stderr.readline()
            assert line, "it ended before it listened"
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def port_of(url: str) -> int:
    return int(url.rstrip("/").rpartition(":")[2])


def told_by_listen(
    folder: Path, authority: trustme.CA, certificate: tuple[str, str], *secrets: str
) -> dict[str, str]:
    """Deliver one event signed in every scheme; return what `relay listen` says with these secrets."""
    authority.cert_pem.write_to_path(folder / "ca.pem")
    cert, key = certificate
    (folder / "secret").write_text("\n".join(secrets))
    options = ("--cert", cert, "--key", key, "--secret-file", str(folder / "secret"), *HEADER_SCHEME)
    with listener(*options, "--count", "1", "--json") as (process, url):
        assert url.startswith("https://")
        signatures = ", ".join([*map(json.dumps, NAMED), GENERIC])
        config = (
            f"[delivery]\nsignatures = [{signatures}]\n"
            f'[[endpoints]]\nid = "main"\nurl = "{url}"\nevents = ["*"]\n'
            f'secrets = ["{SECRET}", "{PRIVATE}"]\n'
        )
        with relay_process(folder, config, {"SSL_CERT_FILE": str(folder / "ca.pem")}) as sender:
            assert sender.call("POST", "/v1/events", {"event": "post.published", "data": {}})[0] == 202
            out, _ = process.communicate(timeout=15)
    return json.loads(out)["signatures"]


@pytest.mark.parametrize("half", [PUBLIC, PRIVATE], ids=["public", "private"])
def test_every_scheme_of_a_relay_is_verified_over_https(tmp_path, authority, certificate, half):
    """Whatever a receiver will read, it can be tried on the desk before there is a receiver."""
    told = told_by_listen(tmp_path, authority, certificate, SECRET, half)
    assert told == dict.fromkeys([*NAMED, "X-Mine"], "verified")


def test_with_other_secrets_every_scheme_is_wrong(tmp_path, authority, certificate):
    """A verifier that takes everything verifies nothing."""
    told = told_by_listen(tmp_path, authority, certificate, OTHER_SECRET, OTHER_PUBLIC)
    assert told == dict.fromkeys([*NAMED, "X-Mine"], "wrong")


def test_a_signature_without_a_key_of_its_kind_is_told_apart_from_a_wrong_one(
    tmp_path, authority, certificate
):
    """Nobody should look for a mistake where only the public key is not at hand."""
    told = told_by_listen(tmp_path, authority, certificate, SECRET)
    assert told == dict.fromkeys([*NAMED, "X-Mine"], "verified") | {"standard-ed25519": "no key"}


def answered(port: int) -> tuple[HTTPResponse, float]:
    """Post once; return the answer and the seconds it took."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        began = time.monotonic()
        connection.request("POST", "/", b"{}")
        response = connection.getresponse()
        return response, time.monotonic() - began
    finally:
        connection.close()


def test_an_answer_can_be_late_and_name_the_time_to_come_again():
    """A slow receiver and a Retry-After are what retry code is written for."""
    with listener("--answer", "503@1200ms+30,429+7,204", "--count", "3") as (process, url):
        late, late_seconds = answered(port_of(url))
        throttled, throttled_seconds = answered(port_of(url))
        taken, _ = answered(port_of(url))
        assert process.wait(10) == 0
    assert (late.status, late.headers["Retry-After"]) == (503, "30")
    assert late_seconds >= 1.2 > throttled_seconds
    assert (throttled.status, throttled.headers["Retry-After"]) == (429, "7")
    assert (taken.status, taken.headers["Retry-After"]) == (204, None)


def test_the_last_counted_request_is_answered_however_late():
    """Else the sender would see a reset that the script does not hold."""
    with listener("--answer", "503@1500ms", "--count", "1") as (process, url):
        assert post(port_of(url), b"{}") == 503
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("503,503,200", [Answer(503), Answer(503), Answer(200)]),
        ("503@2s", [Answer(503, 2.0)]),
        ("429+30", [Answer(429, retry_after=30)]),
        ("503@2s+30,200@1m", [Answer(503, 2.0, 30), Answer(200, 60.0)]),
        ("429+0", [Answer(429, retry_after=0)]),
    ],
)
def test_a_script_is_read_as_its_help_says(text, read):
    assert answers(text) == read


def test_with_a_certificate_neither_plain_http_nor_old_tls_is_answered(authority, certificate):
    """A desk that takes less than the relay demands would hide a mistake until production."""
    cert, key = certificate
    with listener("--cert", cert, "--key", key) as (_, url):
        with pytest.raises((HTTPException, ConnectionError)):
            post(port_of(url), b"{}")
        assert version_spoken(authority, port_of(url), ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with (
            pytest.warns(DeprecationWarning, match="TLSv1_1"),
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            version_spoken(authority, port_of(url), ssl.TLSVersion.TLSv1_1)


def version_spoken(authority: trustme.CA, port: int, newest: ssl.TLSVersion) -> str | None:
    """Shake hands with nothing newer than this, and without the limits of our own side."""
    context = ssl.create_default_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = newest
    authority.configure_trust(context)
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as spoken,
    ):
        return spoken.version()


def test_a_certificate_that_cannot_be_used_is_told_in_one_sentence(tmp_path, certificate):
    cert, _ = certificate
    other_key = tmp_path / "other.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(other_key)
    for options, says in (
        (("--cert", str(tmp_path / "none.pem")), "none.pem cannot be read: No such file or directory"),
        (("--cert", cert, "--key", str(other_key)), "are not a certificate and its unencrypted key"),
    ):
        told = relay("listen", "--port", "0", *options, RELAY_SECRET=SECRET)
        assert (told.returncode, told.stdout, told.stderr.count("\n")) == (1, "", 1)
        assert says in told.stderr
