"""Signing: a message and an endpoint's secrets in, the headers that prove it out.

Each scheme is one pure function that prepares its keys once and returns the signer for every message
after that, with one entry in `SCHEMES`. Names become signers in the configuration, so nothing that
sends ever compares a string. What each scheme signs, and with which bytes of the secret, is the table
of contract section 5.
"""

import base64
import binascii
import hmac
from collections.abc import Callable, Sequence

from relay.model import Headers, Message, Secret, Signer


class UnusableSecretError(ValueError):
    """A secret that the scheme cannot take its key from; the text says why and what to do."""


def standard(secrets: Sequence[Secret]) -> Signer:
    """Sign id.timestamp.body with each live secret (Standard Webhooks 1.0.0, "Signature scheme")."""
    keys = [standard_key(secret) for secret in secrets]

    def sign(message: Message) -> Headers:
        content = b"%b.%d.%b" % (message.id.encode(), message.timestamp, message.body)
        macs = (binascii.b2a_base64(hmac.digest(key, content, "sha256"), newline=False) for key in keys)
        return (("webhook-signature", " ".join(f"v1,{mac.decode()}" for mac in macs)),)

    return sign


def socialsyncer(secrets: Sequence[Secret]) -> Signer:
    """Sign the body as hex under both names that the original service's samples read.

    The header has room for one signature, so the oldest secret signs: a receiver that was not yet
    changed keeps verifying until the rotation's overlap ends (contract 4, rotate-secret).
    """
    key = secrets[-1].reveal().encode()

    def sign(message: Message) -> Headers:
        mac = hmac.digest(key, message.body, "sha256").hex()
        return (("X-SocialSyncerAPI-Signature", mac), ("X-SocialAPI-Signature", mac))

    return sign


def standard_key(secret: Secret) -> bytes:
    """Take the key bytes: what follows `whsec_` base64-decoded, else the UTF-8 text."""
    text = secret.reveal()
    if not text.startswith("whsec_"):
        return text.encode()
    encoded = text.removeprefix("whsec_")
    try:
        # Secrets are copied by hand; a lost padding is no reason to refuse one.
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise UnusableSecretError("what follows whsec_ is not base64: copy the secret again") from error
    if not key:
        raise UnusableSecretError("nothing follows whsec_: copy the secret again")
    return key


def secret_of(random: bytes) -> str:
    """Write 24 to 64 random bytes as a signing secret (Standard Webhooks 1.0.0, "Signature scheme")."""
    return "whsec_" + base64.b64encode(random).decode()


Scheme = Callable[[Sequence[Secret]], Signer]

SCHEMES: dict[str, Scheme] = {
    "standard": standard,
    "socialsyncer": socialsyncer,
}
