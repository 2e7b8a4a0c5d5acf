"""`relay secret new`: a secret in the form of Standard Webhooks, which all schemes but ed25519 take."""

import secrets
from argparse import Namespace

from relay.cli.exits import Exit
from relay.cli.output import show_json
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
