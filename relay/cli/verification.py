"""Verification: a request as it arrived and the secrets in, what each of its signatures is worth out.

Written from what the schemes say and not with `relay.signing`, so that a mistake of the signer shows
here. Pure: the time comes in. Secrets are one text with one of them a line, as a file holds them; a
signature is right when it agrees with any that its scheme can use.
"""

import base64
import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

TOLERANCE_SECONDS = 300  # older or newer requests may be replayed ones (Standard Webhooks 1.0.0)
DIGITS = re.compile(r"[0-9]{1,12}")
PUBLIC_KEY, PRIVATE_KEY = "whpk_", "whsk_"
SEED_BYTES = PUBLIC_BYTES = 32


class Worth(StrEnum):
    """What a scheme's signature is worth."""

    VERIFIED = "verified"
    STALE = "stale"  # right, but made long ago
    WRONG = "wrong"
    NO_KEY = "no key"  # it cannot be judged with the secrets at hand
    MISSING = "missing"


Headers = Mapping[str, str]  # by lower-case name


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one scheme is read: where its signatures stand, what they cover, and when one is right."""

    signatures: Callable[[Headers], list[str]]
    right: Callable[[str, bytes, str], bool]  # a secret, what is signed, and a signature given
    covers: tuple[str, ...] = ()  # what is signed besides the body; the time is the last
    frame: str = ""  # how that stands before the body
    asymmetric: bool = False  # verified with a key pair
    enough: Callable[[Iterable[bool]], bool] = any  # of several signatures

    def judge(self, headers: Headers, body: bytes, secrets: str, now: int) -> Worth:
        """Judge what the request carries. Raises ValueError when a secret holds no key."""
        given = self.signatures(headers)
        if not given:
            return Worth.MISSING
        usable = [secret for secret in each_of(secrets) if is_of_a_pair(secret) == self.asymmetric]
        if not usable:
            return Worth.NO_KEY
        values = [value(headers, name) or "" for name in self.covers]
        signed = self.frame.format(*values).encode(errors="surrogateescape") + body
        if not any(self.enough(self.right(secret, signed, each) for each in given) for secret in usable):
            return Worth.WRONG
        return Worth.VERIFIED if not values or fresh(values[-1], now) else Worth.STALE


def verify(
    headers: Headers, body: bytes, secrets: str, now: int, generic: Mapping[str, Scheme] | None = None
) -> dict[str, Worth]:
    """Judge every signature that the request carries; `now` is in seconds since 1970."""
    worths = {
        name: scheme.judge(headers, body, secrets, now)
        for name, scheme in (SCHEMES | dict(generic or {})).items()
    }
    return {name: worth for name, worth in worths.items() if worth is not Worth.MISSING}


def all_verified(worths: Iterable[Worth]) -> bool:
    """Tell whether something is verified, and nothing that could be judged is not."""
    return set(worths) - {Worth.NO_KEY} == {Worth.VERIFIED}


# Secrets


def each_of(secrets: str) -> list[str]:
    return [line.strip() for line in secrets.splitlines() if line.strip()]


def is_of_a_pair(secret: str) -> bool:
    return secret.startswith((PUBLIC_KEY, PRIVATE_KEY))


def check(secrets: str) -> None:
    """Raise ValueError when there is a secret among them that no key can be taken from."""
    for secret in each_of(secrets):
        public_key(secret) if is_of_a_pair(secret) else standard_key(secret)


def standard_key(secret: str) -> bytes:
    """Take the key: base64 behind `whsec_`, else the text itself. Raises ValueError."""
    return decoded(secret, "whsec_") if secret.startswith("whsec_") else secret.encode()


def public_key(secret: str) -> Callable[[bytes, bytes], object]:
    """Return what verifies content and signature, and raises CryptoError. Raises ValueError."""
    try:
        from nacl.signing import SigningKey, VerifyKey
    except ImportError:
        raise ValueError("keys of standard-ed25519 need an extra: pip install 'relay[ed25519]'") from None
    prefix = secret[:5]
    key = decoded(secret, prefix)
    if prefix == PUBLIC_KEY and len(key) == PUBLIC_BYTES:
        return VerifyKey(key).verify
    if prefix == PRIVATE_KEY and len(key) in (SEED_BYTES, SEED_BYTES + PUBLIC_BYTES):
        return SigningKey(key[:SEED_BYTES]).verify_key.verify
    raise ValueError(f"what follows {prefix} is no key of ed25519: it has {len(key)} bytes")


def decoded(secret: str, prefix: str) -> bytes:
    encoded = secret.removeprefix(prefix).rstrip("=")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:  # also when it is not even ASCII
        raise ValueError(f"what follows {prefix} is not base64") from None


# Headers


def value(headers: Headers, name: str) -> str | None:
    """Return a header, or a member of one, which is named like `stripe-signature's t`."""
    header, _, member = name.partition("'s ")
    if member:
        return next(iter(members(headers, header, member)), None)
    return headers.get(header)


def members(headers: Headers, header: str, member: str) -> list[str]:
    """Return all members of this name in a header like `t=1,v1=00,v1=ff`."""
    pairs = (part.strip().partition("=") for part in headers.get(header, "").split(","))
    return [text for name, _, text in pairs if name == member]


def found_in(*names: str) -> Callable[[Headers], list[str]]:
    return lambda headers: [headers[name] for name in names if name in headers]


def listed_in(header: str, *, v1a: bool = False) -> Callable[[Headers], list[str]]:
    """Return what finds, in a space-separated list, those that are v1a, or all others."""

    def signatures(headers: Headers) -> list[str]:
        given = headers[header].split(" ") if header in headers else []
        return [each for each in given if each.startswith("v1a,") == v1a]

    return signatures


def stripe_signatures(headers: Headers) -> list[str]:
    """Return each v1; a header without any still is a signature, and a wrong one."""
    return members(headers, "stripe-signature", "v1") or found_in("stripe-signature")(headers)


def fresh(sent_at: str, now: int) -> bool:
    return bool(DIGITS.fullmatch(sent_at)) and abs(now - int(sent_at)) <= TOLERANCE_SECONDS


# What is right


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def mac(
    prefix: str = "",
    *,
    write: Callable[[bytes], str] = bytes.hex,
    key: Callable[[str], bytes] = str.encode,
    algorithm: str = "sha256",
) -> Callable[[str, bytes, str], bool]:
    """Tell with an HMAC, written as hex unless it is said otherwise."""

    def right(secret: str, signed: bytes, given: str) -> bool:
        return same(given, prefix + write(hmac.new(key(secret), signed, algorithm).digest()))

    return right


def same(given: str, wanted: str) -> bool:
    """Compare in a time that tells nothing."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode())


def ed25519(secret: str, signed: bytes, given: str) -> bool:
    verified_with = public_key(secret)
    from nacl.exceptions import CryptoError

    try:
        verified_with(signed, base64.b64decode(given.removeprefix("v1a,"), validate=True))
    except (CryptoError, ValueError):
        return False
    return True


def generic_schemes(forms: Iterable[Mapping[str, str]]) -> dict[str, Scheme]:
    """Return schemes without a name, as `arguments.generic` reads them, each under its header."""
    return {form["header"]: generic(**form) for form in forms}


def generic(*, header: str, prefix: str = "", encoding: str = "hex", algorithm: str = "sha256") -> Scheme:
    write = base64_of if encoding == "base64" else bytes.hex
    return Scheme(signatures=found_in(header.lower()), right=mac(prefix, write=write, algorithm=algorithm))


# What each signs, with which bytes of the secret and under which header: the table of contract section 5.
SCHEMES: dict[str, Scheme] = {
    "standard": Scheme(
        signatures=listed_in("webhook-signature"),
        covers=("webhook-id", "webhook-timestamp"),
        frame="{}.{}.",
        right=mac("v1,", write=base64_of, key=standard_key),
    ),
    "standard-ed25519": Scheme(
        signatures=listed_in("webhook-signature", v1a=True),
        covers=("webhook-id", "webhook-timestamp"),
        frame="{}.{}.",
        right=ed25519,
        asymmetric=True,
    ),
    "socialsyncer": Scheme(
        signatures=found_in("x-socialsyncerapi-signature", "x-socialapi-signature"),
        right=mac(),
        enough=all,  # a receiver reads one of the two, and we do not know which
    ),
    "svix": Scheme(
        signatures=listed_in("svix-signature"),
        covers=("svix-id", "svix-timestamp"),
        frame="{}.{}.",
        right=mac("v1,", write=base64_of, key=standard_key),
    ),
    "stripe": Scheme(
        signatures=stripe_signatures,
        covers=("stripe-signature's t",),
        frame="{}.",
        right=mac(),
    ),
    "github": Scheme(signatures=found_in("x-hub-signature-256"), right=mac("sha256=")),
    "shopify": Scheme(signatures=found_in("x-shopify-hmac-sha256"), right=mac(write=base64_of)),
    "slack": Scheme(
        signatures=found_in("x-slack-signature"),
        covers=("x-slack-request-timestamp",),
        frame="v0:{}:",
        right=mac("v0="),
    ),
}
