"""`relay secret new`: a secret in the form of Standard Webhooks, that every scheme with a shared secret takes."""

import base64
import json
import secrets
from argparse import Namespace

from relay.cli.exits import Exit

KEY_BYTES = 32  # of 24 to 64 (Standard Webhooks 1.0.0), as long as what SHA-256 gives


def new(arguments: Namespace) -> int:
    secret = made()
    print(json.dumps({"secret": secret}) if arguments.json else secret)
    return Exit.DONE


def made() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}"
