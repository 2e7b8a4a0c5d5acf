"""Signing: a message and an endpoint's secrets in, the headers that prove it out.

Each scheme is one pure function that prepares its keys once and returns the signer for every message
after that, with one entry in `SCHEMES`; what a receiver wants beyond those is spelt out as a
`GenericForm`. Names become signers in the configuration, so nothing that sends ever compares a string.
What each scheme signs, and with which bytes of the secret, is the table of contract section 5.

Secrets come newest first. A header with room for several signatures gets one for each. One with room
for a single one is signed with the oldest: a receiver that was not yet changed keeps verifying until
the rotation's overlap ends (contract 4, rotate-secret).
"""

import base64
import binascii
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay.model import Headers, Message, Secret, Signer

Scheme = Callable[[Sequence[Secret]], Signer]

PRIVATE_KEY = "whsk_"
SHARED_KEY = "whsec_"


class UnusableSecretError(ValueError):
    """A scheme finds no key among the secrets; the text says why and what to do."""


def standard(secrets: Sequence[Secret]) -> Signer:
    """Sign id.timestamp.body with each live secret (Standard Webhooks 1.0.0, "Signature scheme")."""
    keys = standard_keys(secrets)

    def sign(message: Message) -> Headers:
        return (("webhook-signature", standard_signatures(keys, message)),)

    return sign


def standard_ed25519(secrets: Sequence[Secret]) -> Signer:
    """Sign the same with each private key; whoever has the public one can verify and nobody can forge."""
    try:
        from nacl.signing import SigningKey
    except ImportError:
        raise UnusableSecretError("it needs an extra: pip install 'relay[ed25519]'") from None
    pairs = ed25519_pairs(secrets)
    keys = [SigningKey(seed) for seed, _ in pairs]
    if any(public not in (b"", bytes(key.verify_key)) for key, (_, public) in zip(keys, pairs, strict=True)):
        raise UnusableSecretError("its public half belongs to another private key: copy the secret again")

    def sign(message: Message) -> Headers:
        content = standard_content(message)
        signatures = (base64_of(key.sign(content).signature) for key in keys)
        return (("webhook-signature", " ".join(f"v1a,{signature}" for signature in signatures)),)

    return sign


def svix(secrets: Sequence[Secret]) -> Signer:
    """Sign as `standard` does, under the names that came before the standard."""
    keys = standard_keys(secrets)

    def sign(message: Message) -> Headers:
        return (
            ("svix-id", message.id),
            ("svix-timestamp", str(message.timestamp)),
            ("svix-signature", standard_signatures(keys, message)),
        )

    return sign


def stripe(secrets: Sequence[Secret]) -> Signer:
    """Sign timestamp.body with each live secret; the key is its whole text, `whsec_` and all."""
    keys = [secret.reveal().encode() for secret in shared(secrets)]

    def sign(message: Message) -> Headers:
        content = b"%d.%b" % (message.timestamp, message.body)
        macs = (f",v1={hmac.digest(key, content, 'sha256').hex()}" for key in keys)
        return (("Stripe-Signature", f"t={message.timestamp}{''.join(macs)}"),)

    return sign


def socialsyncer(secrets: Sequence[Secret]) -> Signer:
    """Sign the body as hex under both names that the original service's samples read."""
    key = oldest_text(secrets)

    def sign(message: Message) -> Headers:
        mac = hmac.digest(key, message.body, "sha256").hex()
        return (("X-SocialSyncerAPI-Signature", mac), ("X-SocialAPI-Signature", mac))

    return sign


def github(secrets: Sequence[Secret]) -> Signer:
    """Sign the body; the type and the id of the event go beside it."""
    key = oldest_text(secrets)

    def sign(message: Message) -> Headers:
        return (
            ("X-Hub-Signature-256", f"sha256={hmac.digest(key, message.body, 'sha256').hex()}"),
            ("X-GitHub-Event", message.type),
            ("X-GitHub-Delivery", message.id),
        )

    return sign


def shopify(secrets: Sequence[Secret]) -> Signer:
    """Sign the body as base64; the type and the id of the event go beside it."""
    key = oldest_text(secrets)

    def sign(message: Message) -> Headers:
        return (
            ("X-Shopify-Hmac-Sha256", base64_of(hmac.digest(key, message.body, "sha256"))),
            ("X-Shopify-Topic", message.type),
            ("X-Shopify-Webhook-Id", message.id),
        )

    return sign


def slack(secrets: Sequence[Secret]) -> Signer:
    """Sign v0:timestamp:body."""
    key = oldest_text(secrets)

    def sign(message: Message) -> Headers:
        content = b"v0:%d:%b" % (message.timestamp, message.body)
        return (
            ("X-Slack-Signature", f"v0={hmac.digest(key, content, 'sha256').hex()}"),
            ("X-Slack-Request-Timestamp", str(message.timestamp)),
        )

    return sign


SCHEMES: dict[str, Scheme] = {
    "standard": standard,
    "standard-ed25519": standard_ed25519,
    "socialsyncer": socialsyncer,
    "svix": svix,
    "stripe": stripe,
    "github": github,
    "shopify": shopify,
    "slack": slack,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenericForm:
    """A scheme without a name: the body's MAC, written as the receiver wants to read it."""

    header: str
    prefix: str = ""
    encoding: str = "hex"  # or base64
    algorithm: str = "sha256"  # or sha512, sha1

    def __str__(self) -> str:
        return self.header

    def __call__(self, secrets: Sequence[Secret]) -> Signer:
        """Sign the body; this is the form's `Scheme`."""
        key, write = oldest_text(secrets), ENCODINGS[self.encoding]

        def sign(message: Message) -> Headers:
            return ((self.header, self.prefix + write(hmac.digest(key, message.body, self.algorithm))),)

        return sign


Signature = str | GenericForm  # as `signatures` of an endpoint lists them


def scheme_of(signature: Signature) -> Scheme:
    """Return what prepares a signature's keys."""
    return signature if isinstance(signature, GenericForm) else SCHEMES[signature]


def together(signers: Sequence[Signer]) -> Signer:
    """Sign in all these ways at once; what several say in one header stands in it side by side.

    Only `standard` and `standard-ed25519` share one, and there a space divides signatures (Standard Webhooks
    1.0.0, "Signature scheme").
    """

    def sign(message: Message) -> Headers:
        headers: dict[str, str] = {}
        for each in signers:
            for name, value in each(message):
                headers[name] = f"{headers[name]} {value}" if name in headers else value
        return headers.items()

    return sign


def standard_content(message: Message) -> bytes:
    return b"%b.%d.%b" % (message.id.encode(), message.timestamp, message.body)


def standard_signatures(keys: Sequence[bytes], message: Message) -> str:
    content = standard_content(message)
    return " ".join(f"v1,{base64_of(hmac.digest(key, content, 'sha256'))}" for key in keys)


def standard_keys(secrets: Sequence[Secret]) -> list[bytes]:
    """Take the keys: what follows `whsec_` base64-decoded, else the UTF-8 text."""
    texts = (secret.reveal() for secret in shared(secrets))
    return [decoded(text, "whsec_") if text.startswith("whsec_") else text.encode() for text in texts]


def ed25519_pairs(secrets: Sequence[Secret]) -> list[tuple[bytes, bytes]]:
    """Take the keys behind `whsk_`: base64 of 32 bytes of seed, which the 32 of the public key may follow."""
    texts = [secret.reveal() for secret in secrets if is_private(secret)]
    if not texts:
        raise UnusableSecretError(f"none of the secrets is a private key, which begins {PRIVATE_KEY}")
    keys = [decoded(text, PRIVATE_KEY) for text in texts]
    if any(len(key) not in (32, 64) for key in keys):
        raise UnusableSecretError(f"what follows {PRIVATE_KEY} is not 32 or 64 bytes: copy the secret again")
    return [(key[:32], key[32:]) for key in keys]


def shared(secrets: Sequence[Secret]) -> list[Secret]:
    """Return those that the receiver has too, so all but private keys; at least one."""
    found = [secret for secret in secrets if not is_private(secret)]
    if not found:
        raise UnusableSecretError(f"it needs a secret besides those that begin {PRIVATE_KEY}")
    return found


def is_private(secret: Secret) -> bool:
    return secret.reveal().startswith(PRIVATE_KEY)


def oldest_text(secrets: Sequence[Secret]) -> bytes:
    return shared(secrets)[-1].reveal().encode()


def decoded(text: str, prefix: str) -> bytes:
    """Return the bytes whose base64 follows the prefix. Raises UnusableSecretError."""
    encoded = text.removeprefix(prefix)
    try:
        # Secrets are copied by hand; a lost padding is no reason to refuse one.
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError as error:  # also when it is not even ASCII
        raise UnusableSecretError(f"what follows {prefix} is not base64: copy the secret again") from error
    if not key:
        raise UnusableSecretError(f"nothing follows {prefix}: copy the secret again")
    return key


def base64_of(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def secret_of(random: bytes, kind: str = SHARED_KEY) -> str:
    """Write 32 random bytes as a secret (Standard Webhooks 1.0.0, "Signature scheme")."""
    return kind + base64_of(random)


ENCODINGS: dict[str, Callable[[bytes], str]] = {"hex": bytes.hex, "base64": base64_of}
ALGORITHMS = ("sha256", "sha512", "sha1")
