"""`relay secret new`: a secret in the form of Standard Webhooks, which all schemes but ed25519 take.

For that one it makes a key pair: the private half to sign with, the public one for the receiver.
"""

import os
import secrets
import sys
from argparse import Namespace
from pathlib import Path

from relay.cli.exits import CommandError, Exit
from relay.cli.output import show_json
from relay.cli.verification import PUBLIC_KEY, check
from relay.signing import PRIVATE_KEY, secret_of

RANDOM_BYTES = 32  # as many as SHA-256 gives


def new(arguments: Namespace) -> int:
    secret, public = made_pair() if arguments.ed25519 else (made(), None)
    if arguments.json:
        show_json({"secret": secret} | ({"public": public} if public else {}))
        return Exit.DONE
    print(secret)
    if public:  # apart from the secret, which is the one that goes into a file
        print(f"its public key, for the receiver: {public}", file=sys.stderr)
    return Exit.DONE


def made() -> str:
    return secret_of(secrets.token_bytes(RANDOM_BYTES))


def made_pair() -> tuple[str, str]:
    """Make a private key with its public one. Raises CommandError."""
    try:
        from nacl.signing import SigningKey
    except ImportError:
        raise CommandError("keys of ed25519 need an extra: pip install 'relay[ed25519]'") from None
    key = SigningKey.generate()
    seed, public = bytes(key), bytes(key.verify_key)
    return secret_of(seed + public, PRIVATE_KEY), secret_of(public, PUBLIC_KEY)


def read_secret(file: str | None) -> str | None:
    """Read the secrets, one a line, from the file, else from the environment. Raises CommandError."""
    try:
        text = Path(file).read_text() if file is not None else os.environ.get("RELAY_SECRET", "")
        secret = text.strip()
        check(secret)
    except OSError as error:
        raise CommandError(f"the secret file {file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # also of a file that is no text
        raise CommandError(f"the secret cannot be used: {error}") from None
    if file is not None and not secret:
        raise CommandError(f"the secret file {file} is empty")
    return secret or None
