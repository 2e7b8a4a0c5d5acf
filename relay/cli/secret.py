"""`relay secret new`: a secret in the form of Standard Webhooks, which all schemes but ed25519 take."""

import os
import secrets
from argparse import Namespace
from pathlib import Path

from relay.cli.exits import CommandError, Exit
from relay.cli.output import show_json
from relay.cli.verification import standard_key
from relay.signing import secret_of

RANDOM_BYTES = 32  # as many as SHA-256 gives


def new(arguments: Namespace) -> int:
    if arguments.json:
        show_json({"secret": made()})
    else:
        print(made())
    return Exit.DONE


def made() -> str:
    return secret_of(secrets.token_bytes(RANDOM_BYTES))


def read_secret(file: str | None) -> str | None:
    """Read the secret from the file, else from the environment. Raises CommandError."""
    try:
        text = Path(file).read_text() if file is not None else os.environ.get("RELAY_SECRET", "")
        secret = text.strip()
        standard_key(secret)
    except OSError as error:
        raise CommandError(f"the secret file {file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # also of a file that is no text
        raise CommandError(f"the secret cannot be used: {error}") from None
    if file is not None and not secret:
        raise CommandError(f"the secret file {file} is empty")
    return secret or None
