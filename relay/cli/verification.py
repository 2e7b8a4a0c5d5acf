"""Verification: a request as it arrived and the secret in, what each of its signatures is worth out.

Written from what the schemes say and not with `relay.signing`, so that a mistake of the signer shows
here. Pure: the time comes in.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Callable, Mapping
from enum import StrEnum

TOLERANCE_SECONDS = 300  # older or newer requests may be replayed ones (Standard Webhooks 1.0.0)
DIGITS = re.compile(r"[0-9]{1,12}")


class Worth(StrEnum):
    """What a scheme's signature is worth."""

    VERIFIED = "verified"
    WRONG = "wrong"
    STALE = "stale"  # right, but made long ago
    MISSING = "missing"


Headers = Mapping[str, str]  # by lower-case name
Check = Callable[[Headers, bytes, str, int], Worth]


def verify(headers: Headers, body: bytes, secret: str, now: int) -> dict[str, Worth]:
    """Judge the signature of every scheme known here; `now` is in seconds since 1970."""
    return {name: check(headers, body, secret, now) for name, check in SCHEMES.items()}


def standard(headers: Headers, body: bytes, secret: str, now: int) -> Worth:
    """webhook-signature: v1 and base64 of HMAC-SHA256 over id.timestamp.body, one for each live secret."""
    given = headers.get("webhook-signature")
    if given is None:
        return Worth.MISSING
    sent_id, sent_at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    signed = f"{sent_id}.{sent_at}.".encode(errors="surrogateescape") + body
    mac = hmac.new(standard_key(secret), signed, "sha256").digest()
    wanted = f"v1,{base64.b64encode(mac).decode()}"
    if not any(same(signature, wanted) for signature in given.split(" ")):
        return Worth.WRONG
    fresh = DIGITS.fullmatch(sent_at) and abs(now - int(sent_at)) <= TOLERANCE_SECONDS
    return Worth.VERIFIED if fresh else Worth.STALE


def socialsyncer(headers: Headers, body: bytes, secret: str, _now: int) -> Worth:
    """X-SocialSyncerAPI-Signature and X-SocialAPI-Signature: hex of HMAC-SHA256 over the body."""
    names = ("x-socialsyncerapi-signature", "x-socialapi-signature")
    given = [headers[name] for name in names if name in headers]
    if not given:
        return Worth.MISSING
    wanted = hmac.new(secret.encode(), body, "sha256").hexdigest()
    return Worth.VERIFIED if all(same(each, wanted) for each in given) else Worth.WRONG


SCHEMES: dict[str, Check] = {"standard": standard, "socialsyncer": socialsyncer}


def standard_key(secret: str) -> bytes:
    """Take the key: base64 behind `whsec_`, else the text itself. Raises ValueError."""
    prefix, encoded = secret[:6], secret[6:]
    if prefix != "whsec_":
        return secret.encode()
    try:
        return base64.b64decode(encoded.rstrip("=") + "=" * (-len(encoded.rstrip("=")) % 4), validate=True)
    except binascii.Error:
        raise ValueError("what follows whsec_ is not base64") from None


def same(given: str, wanted: str) -> bool:
    """Compare in a time that tells nothing."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode())
