"""Signing: what each scheme puts into its headers, held against what their owners published."""

import base64
import hashlib
import hmac
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import VerifyKey

from relay.model import Message, Secret
from relay.signing import SCHEMES, GenericForm, UnusableSecretError, scheme_of, secret_of, together

STANDARD_SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
BODY = b'{"type":"order.paid","data":{"id":1}}'


def message(body: bytes = BODY, *, id_: str = "msg_0001", timestamp: int = 1_700_000_000) -> Message:
    return Message(
        id=id_, type="order.paid", body=body, content_type="application/json", attempt=1, timestamp=timestamp
    )


def signed(signature, *secrets: str, of: Message | None = None) -> dict[str, str]:
    """Return the headers of one scheme; secrets are newest first."""
    return dict(scheme_of(signature)([Secret(text) for text in secrets])(of or message()))


def hex_of(key: bytes, content: bytes, algorithm: str = "sha256") -> str:
    return hmac.new(key, content, algorithm).hexdigest()


PUBLISHED = message(b'{"test": 2432232314}', id_="msg_p5jXN8AQM9LWM0D4loKWxJek", timestamp=1_614_265_330)


@pytest.mark.parametrize(
    ("scheme", "secret", "of", "header", "value"),
    [
        (
            "standard", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", PUBLISHED,
            "webhook-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        ),
        (
            "svix", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", PUBLISHED,
            "svix-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        ),
        (
            "standard-ed25519", PRIVATE, PUBLISHED, "webhook-signature",
            "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg==",
        ),
        (
            "github", "It's a Secret to Everybody", message(b"Hello, World!"),
            "X-Hub-Signature-256", "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
        ),
    ],
)  # fmt: skip
def test_the_published_vectors_come_out(scheme, secret, of, header, value):
    """What the owners of a scheme wrote down is what their receivers compute."""
    assert signed(scheme, secret, of=of)[header] == value


@pytest.mark.parametrize(
    ("signature", "secret", "headers"),
    [
        (
            "standard", STANDARD_SECRET,
            {"webhook-signature": "v1,dpbNkp/kPssr/HpErxkdpx7JTBtJNyAIFt9yQ0B58fU="},
        ),
        (
            "svix", STANDARD_SECRET,
            {
                "svix-id": "msg_0001",
                "svix-timestamp": "1700000000",
                "svix-signature": "v1,dpbNkp/kPssr/HpErxkdpx7JTBtJNyAIFt9yQ0B58fU=",
            },
        ),
        (
            "stripe", "relay-test-secret",
            {
                "Stripe-Signature": "t=1700000000,"
                "v1=afc2f85397eb58ab034d99ad3a631c3e4adf3c4e23c12f3303fa202e3ef2f15d",
            },
        ),
        (
            "github", "relay-test-secret",
            {
                "X-Hub-Signature-256":
                    "sha256=be1f75c484ad57096342e8e7a31275948be5d96da1f636a4b2c48772498b0545",
                "X-GitHub-Event": "order.paid",
                "X-GitHub-Delivery": "msg_0001",
            },
        ),
        (
            "socialsyncer", "relay-test-secret",
            {
                "X-SocialSyncerAPI-Signature":
                    "be1f75c484ad57096342e8e7a31275948be5d96da1f636a4b2c48772498b0545",
                "X-SocialAPI-Signature": "be1f75c484ad57096342e8e7a31275948be5d96da1f636a4b2c48772498b0545",
            },
        ),
        (
            "shopify", "relay-test-secret",
            {
                "X-Shopify-Hmac-Sha256": "vh91xIStVwljQujnoxJ1lIvl2W2h9jakssSHckmLBUU=",
                "X-Shopify-Topic": "order.paid",
                "X-Shopify-Webhook-Id": "msg_0001",
            },
        ),
        (
            "slack", "relay-test-secret",
            {
                "X-Slack-Signature": "v0=e7f1bd5dac877b0c1cf85f46cd496bfdcd8d197daaa40c39c2e22322fef30d25",
                "X-Slack-Request-Timestamp": "1700000000",
            },
        ),
        (
            GenericForm(header="X-Hub-Signature", prefix="sha1=", algorithm="sha1"), "relay-test-secret",
            {"X-Hub-Signature": "sha1=d76d3fba12eefa469d72bf2fc5c65c34e917c103"},
        ),
        (
            GenericForm(header="X-Mine"), "relay-test-secret",
            {"X-Mine": "be1f75c484ad57096342e8e7a31275948be5d96da1f636a4b2c48772498b0545"},
        ),
        (
            GenericForm(header="X-Mine", prefix="HMAC ", encoding="base64"), "relay-test-secret",
            {"X-Mine": "HMAC vh91xIStVwljQujnoxJ1lIvl2W2h9jakssSHckmLBUU="},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_one_message_in_every_scheme(signature, secret, headers):
    """Exactly these headers and no others, computed once outside of the relay."""
    assert signed(signature, secret) == headers


def test_a_generic_form_can_use_a_longer_hash():
    """SHA-512 is what a few receivers ask for; the standard library computes it another way here."""
    form = GenericForm(header="X-Mine", algorithm="sha512", encoding="base64")

    mac = hmac.new(b"relay-test-secret", BODY, hashlib.sha512).digest()
    assert signed(form, "relay-test-secret") == {"X-Mine": base64.b64encode(mac).decode()}


@pytest.mark.parametrize("scheme", ["standard", "svix"])
def test_a_secret_without_whsec_is_taken_as_its_text(scheme):
    """Secrets from before the standard are any text, and its libraries call that the raw format."""
    mac = hmac.new(b"s3cret", b"msg_0001.1700000000." + BODY, "sha256").digest()

    assert signed(scheme, "s3cret")[f"{'webhook' if scheme == 'standard' else 'svix'}-signature"] == (
        f"v1,{base64.b64encode(mac).decode()}"
    )


def test_the_stripe_key_is_the_whole_secret_with_its_whsec():
    """Stripe's libraries never decode it; here is the difference that bites."""
    mac = hex_of(STANDARD_SECRET.encode(), b"1700000000." + BODY)

    assert signed("stripe", STANDARD_SECRET) == {"Stripe-Signature": f"t=1700000000,v1={mac}"}


def test_schemes_with_room_sign_with_every_live_secret_newest_first():
    """A receiver can change its secret at any moment of the overlap."""
    new, old = "whsec_bmV3", "old"
    for scheme, header, separator in (
        ("standard", "webhook-signature", " "),
        ("svix", "svix-signature", " "),
        ("stripe", "Stripe-Signature", ","),
    ):
        alone = [signed(scheme, secret)[header] for secret in (new, old)]
        joined = separator.join(alone).replace(",t=1700000000", "")  # Stripe's time stands there once
        assert signed(scheme, new, old)[header] == joined


@pytest.mark.parametrize(
    "signature", ["socialsyncer", "github", "shopify", "slack", GenericForm(header="X-Mine")], ids=str
)
def test_schemes_with_room_for_one_sign_with_the_oldest(signature):
    """No receiver breaks before it was changed."""
    assert signed(signature, "newest", "newer", "old") == signed(signature, "old")
    assert signed(signature, "newest", "newer", "old") != signed(signature, "newest")


def test_each_kind_of_secret_is_for_its_own_schemes():
    """Private keys sign as ed25519 alone, and a receiver's secret is never taken for one."""
    for scheme in set(SCHEMES) - {"standard-ed25519"}:
        assert signed(scheme, PRIVATE, "a", PRIVATE) == signed(scheme, "a")
        with pytest.raises(UnusableSecretError, match="needs a secret besides those that begin whsk_"):
            signed(scheme, PRIVATE)
    assert signed("standard-ed25519", "a", PRIVATE, "b") == signed("standard-ed25519", PRIVATE)
    with pytest.raises(UnusableSecretError, match="none of the secrets is a private key"):
        signed("standard-ed25519", "a")


def test_ed25519_signs_with_every_live_key_and_takes_a_bare_seed():
    """Key pairs are written with their public half by some tools and without by others."""
    seed = base64.b64decode(PRIVATE.removeprefix("whsk_"))[:32]
    bare = "whsk_" + base64.b64encode(seed).decode()
    other = "whsk_" + base64.b64encode(bytes(32)).decode()

    assert signed("standard-ed25519", bare) == signed("standard-ed25519", PRIVATE)
    first, second = signed("standard-ed25519", other, PRIVATE)["webhook-signature"].split(" ")
    assert second == signed("standard-ed25519", PRIVATE)["webhook-signature"]
    assert first == signed("standard-ed25519", other)["webhook-signature"] != second
    VerifyKey(base64.b64decode(PUBLIC)).verify(
        b"msg_0001.1700000000." + BODY, base64.b64decode(second.removeprefix("v1a,"))
    )


def test_without_its_extra_ed25519_says_what_to_install(monkeypatch):
    """It is the only scheme that the standard library cannot sign."""
    monkeypatch.setitem(sys.modules, "nacl.signing", None)

    with pytest.raises(UnusableSecretError, match=re.escape("pip install 'relay[ed25519]'")):
        signed("standard-ed25519", PRIVATE)
    assert signed("standard", STANDARD_SECRET)


def test_nobody_pays_for_ed25519_who_does_not_use_it():
    """A relay without the extra has to start, and one with it should not load it for nothing."""
    code = "import sys, relay.config; sys.exit('nacl' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0


@pytest.mark.parametrize(
    ("scheme", "secret", "why"),
    [
        ("standard", "whsec_", "nothing follows whsec_"),
        ("standard", "whsec_a*b=", "what follows whsec_ is not base64"),
        ("svix", "whsec_ä", "what follows whsec_ is not base64"),
        ("standard-ed25519", "whsk_", "nothing follows whsk_"),
        ("standard-ed25519", "whsk_a*b=", "what follows whsk_ is not base64"),
        ("standard-ed25519", "whsk_AAAA", "is not 32 or 64 bytes"),
        ("standard-ed25519", "whsk_" + "A" * 86, "its public half belongs to another private key"),
    ],
)
def test_a_secret_that_was_copied_badly_is_told_apart(scheme, secret, why):
    """Better refused at the start than answered 401 by every receiver; and it is not shown."""
    with pytest.raises(UnusableSecretError, match=why) as caught:
        signed(scheme, secret)

    assert secret.partition("_")[2] == "" or secret not in str(caught.value)


def test_a_lost_padding_is_no_reason_to_refuse():
    """A double click in many programs leaves the equals sign out."""
    assert signed("standard", STANDARD_SECRET.rstrip("=")) == signed("standard", STANDARD_SECRET)


def test_what_shares_a_header_stands_in_it_side_by_side():
    """One webhook-signature header: most receivers read only the first of two."""
    shared, private = ([Secret(STANDARD_SECRET)], [Secret(PRIVATE)])
    sign = together(
        [SCHEMES["standard"](shared), SCHEMES["github"](shared), SCHEMES["standard-ed25519"](private)]
    )

    headers = list(sign(message()))

    one, other = signed("standard", STANDARD_SECRET), signed("standard-ed25519", PRIVATE)
    assert headers == [
        ("webhook-signature", f"{one['webhook-signature']} {other['webhook-signature']}"),
        *signed("github", STANDARD_SECRET).items(),
    ]


@given(st.binary(min_size=24, max_size=64))
def test_a_new_secret_carries_its_bytes(random):
    """What `relay secret new` prints is the key that signs, whatever chance gave."""
    mac = hmac.new(random, b"msg_0001.1700000000." + BODY, "sha256").digest()

    assert signed("standard", secret_of(random)) == {
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}"
    }


def test_signed_bodies_are_bytes_and_not_text():
    """A body of no encoding at all is signed as it is."""
    body = bytes(range(256))

    assert (
        signed("github", "key", of=message(body))["X-Hub-Signature-256"] == f"sha256={hex_of(b'key', body)}"
    )
