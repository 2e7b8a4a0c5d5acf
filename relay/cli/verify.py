"""`relay verify`: a captured request and the secret in, what its signatures are worth out, and why.

A signature that is wrong says nothing about what made it so. The usual causes are tried one by one:
where the same signature agrees with a body or a secret that is only a little different, that is the cause.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from relay import canonical
from relay.cli.exits import CommandError, Exit
from relay.cli.output import printable, show_json
from relay.cli.secret import read_secret
from relay.cli.verification import (
    DIGITS,
    PUBLIC_KEY,
    SCHEMES,
    TOLERANCE_SECONDS,
    Headers,
    Scheme,
    Worth,
    all_verified,
    each_of,
    generic_schemes,
    value,
)
from relay.clock import SystemClock

AGREES = (Worth.VERIFIED, Worth.STALE)
EVENT_MEMBERS = ("event", "timestamp", "data")  # in the order they are sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A request as somebody wrote it down, and the secrets it is judged with, one a line."""

    headers: Headers
    body: bytes
    secret: str
    at: int  # when it was received, in seconds since 1970
    schemes: Mapping[str, Scheme]  # to look for

    def worth(self, scheme: str) -> Worth:
        return self.schemes[scheme].judge(self.headers, self.body, self.secret, self.at)

    def agrees(self, scheme: str, *, body: bytes | None = None, secret: str | None = None) -> bool:
        """Tell whether a signature is right for this body and secret instead."""
        body, secret = self.body if body is None else body, self.secret if secret is None else secret
        try:
            return self.schemes[scheme].judge(self.headers, body, secret, self.at) in AGREES
        except ValueError:
            return False  # a secret that the scheme cannot take a key from


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one signature is worth, and when it is not verified the reason in a sentence."""

    worth: Worth
    why: str | None = None


def verify(arguments: Namespace) -> int:
    captured = capture(arguments)
    findings = examine(captured)
    if not findings:
        raise CommandError(unsigned(captured))
    verified = all_verified(finding.worth for finding in findings.values())
    if arguments.json:
        signatures = {scheme: asdict(finding) for scheme, finding in findings.items()}
        show_json({"verified": verified, "signatures": signatures})
    else:
        for scheme, finding in findings.items():
            print(f"{scheme}: {finding.worth}" + (f": {finding.why}" if finding.why else ""))
    return Exit.DONE if verified else Exit.FAILED


def capture(arguments: Namespace) -> Captured:
    """Read what the arguments name. Raises CommandError."""
    secret = read_secret(arguments.secret_file)
    if secret is None:
        raise CommandError("there is no secret: set RELAY_SECRET or name a --secret-file", Exit.USAGE)
    lines = list(arguments.header)
    if arguments.headers_file is not None:
        lines += read(arguments.headers_file).decode(errors="surrogateescape").splitlines()
    headers = dict(parsed(lines))
    if not headers:
        raise CommandError("there are no headers: give --header or --headers-file", Exit.USAGE)
    at = arguments.at
    return Captured(
        headers=headers,
        body=read(arguments.body),
        secret=secret,
        at=seconds(at) if at is not None else SystemClock().now_ms() // 1000,
        schemes=SCHEMES | generic_schemes(arguments.header_scheme),
    )


def read(path: str) -> bytes:
    """Read a file, or standard input for `-`, byte by byte as it is. Raises CommandError."""
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None


def parsed(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Read lines of `Name: value`; empty ones and the request line are passed over. Raises CommandError."""
    for line in lines:
        name, colon, value = line.partition(":")
        if not line.strip() or line.rstrip().endswith((" HTTP/1.0", " HTTP/1.1", " HTTP/2")):
            continue
        if not colon or not name.strip() or " " in name.strip():
            raise CommandError(f"{printable(line)!r} is not a header: write NAME: VALUE", Exit.USAGE)
        yield name.strip().lower(), value.strip()


def seconds(text: str) -> int:
    """Read a time of RFC 3339. Raises CommandError."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise CommandError(f"{text!r} is not a time like 2026-01-15T10:00:00Z", Exit.USAGE)
    return int(at.timestamp())


def examine(captured: Captured) -> dict[str, Finding]:
    """Judge every signature that the request carries."""
    worths = {scheme: captured.worth(scheme) for scheme in captured.schemes}
    right = [scheme for scheme, worth in worths.items() if worth in AGREES]
    return {
        scheme: Finding(worth=worth, why=reason(captured, scheme, worth, right))
        for scheme, worth in worths.items()
        if worth is not Worth.MISSING
    }


def reason(captured: Captured, scheme: str, worth: Worth, right: list[str]) -> str | None:
    """Say in a sentence why a signature is not verified; `right` are the schemes that agree."""
    if worth is Worth.VERIFIED:
        return None
    if worth is Worth.STALE:
        return too_old(captured, captured.schemes[scheme].covers[-1])
    if worth is Worth.NO_KEY:
        return other_secret(captured, scheme) or without_key(captured.schemes[scheme])
    return (
        missing(captured, scheme)
        or changed_body(captured, scheme)
        or other_secret(captured, scheme)
        or unlike(captured.schemes[scheme], right)
        or "none of the usual causes: it is another secret, or what the body says was changed"
    )


def too_old(captured: Captured, header: str) -> str:
    """Tell by how much the time of a right signature is off."""
    sent_at = value(captured.headers, header) or ""
    if not DIGITS.fullmatch(sent_at):
        return f"right, but {header} {printable(sent_at)} is not in whole seconds since 1970"
    age = captured.at - int(sent_at)
    if age < 0:
        return f"right, but made {-age} s in the future: the clocks differ, or --at is wrong"
    return f"right, but made {age} s ago and not within {TOLERANCE_SECONDS} s: say with --at when it came"


def missing(captured: Captured, scheme: str) -> str | None:
    for name in captured.schemes[scheme].covers:
        if value(captured.headers, name) is None:
            return f"the header {name} is missing, and the signature covers it"
    return None


def without_key(scheme: Scheme) -> str:
    """Say which kind of secret a signature needs, none of which is at hand."""
    if scheme.asymmetric:
        return f"it is not judged: that takes the public key, which begins {PUBLIC_KEY}"
    return "it is not judged: that takes the secret it is signed with, and there are only keys of ed25519"


def changed_body(captured: Captured, scheme: str) -> str | None:
    """Tell what happened to the body on its way, if undoing it makes the signature agree."""
    if not captured.body:
        return "the body is empty: capture it before anything reads it"
    for how, body in bodies(captured.body):
        if captured.agrees(scheme, body=body):
            return f"the body was changed on its way here: {how}; verify the bytes as they arrive"
    return None


def bodies(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Undo what is often done to a body between the signer and whoever verifies."""
    yield "a line break was added at its end", body.rstrip(b"\r\n")
    try:
        value = canonical.parse(body.removeprefix(b"\xef\xbb\xbf"))
        yield "it was parsed and written again as other JSON", canonical.encode(value)
    except (canonical.NotJSON, canonical.Unrepresentable):
        return
    if isinstance(value, dict) and set(value) == set(EVENT_MEMBERS):
        ordered = canonical.encode({name: value[name] for name in EVENT_MEMBERS})
        yield "it was parsed and written again with its members in another order", ordered


def other_secret(captured: Captured, scheme: str) -> str | None:
    """Tell what is different about a secret, if the signature agrees with what it probably is."""
    for given in each_of(captured.secret):
        for how, secret in secrets(given):
            if captured.agrees(scheme, secret=secret):
                return f"the secret is not the one it was signed with: {how}"
    return None


def secrets(secret: str) -> Iterator[tuple[str, str]]:
    """Undo what often happens to a secret that is copied by hand, or read by other rules than ours."""
    yield "it has quotes around it", secret.strip("\"'")
    if secret.startswith("whsec_"):
        yield "the signer took what follows whsec_ as text, not as base64", secret.removeprefix("whsec_")
    else:
        yield "it lost the whsec_ at its start, which makes the rest base64", f"whsec_{secret}"


def unlike(scheme: Scheme, right: list[str]) -> str | None:
    """Tell what it means that other schemes agree with this body and this secret."""
    if not right:
        return None
    suspects = "this signature was changed, or it is made with the older secret while a new one is phased in"
    if scheme.covers:
        suspects = f"{', '.join(scheme.covers)} or the signature itself was changed"
    return f"body and secret are right, for {right[0]} agrees: {suspects}"


def unsigned(captured: Captured) -> str:
    """Say that there is nothing to verify, and which header may be what somebody looks for."""
    like = [printable(name) for name in captured.headers if "signature" in name or "hmac" in name]
    known = f"only the schemes {', '.join(captured.schemes)} are verified here; --header-scheme adds one"
    if like:
        return f"the request has no signature of a scheme known here but {', '.join(like)}: {known}"
    return f"the request has no signature among its headers: {known}"
