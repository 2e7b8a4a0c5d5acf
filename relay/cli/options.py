"""What options are, and those that several commands have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from relay.cli import arguments


# Tuples with names instead of dataclasses: importing `dataclasses` costs a sixth of the 100 ms.
class Option(NamedTuple):
    """One argument, in the words of argparse's `add_argument`."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


def option(*names: str, **settings: Any) -> Option:
    return Option(names, settings)


CONFIG = option(
    "--config",
    metavar="PATH",
    help="the config file (default: $RELAY_CONFIG, else ./relay.toml, else /etc/relay/relay.toml)",
)
URL = option(
    "--url",
    help="where the relay listens, http://HOST:PORT or unix:/PATH "
    "(default: $RELAY_URL, else http://127.0.0.1:8484); its token is taken from $RELAY_TOKEN",
)
JSON = option("--json", action="store_true", help="print JSON, one object a line")
SECRET_FILE = option(
    "--secret-file",
    metavar="PATH",
    help="the file with the secret to verify with, or several of them, one a line: whsec_…, a text, "
    "or for standard-ed25519 whpk_… or whsk_… (default: they are in $RELAY_SECRET)",
)
HEADER_SCHEME = option(
    "--header-scheme",
    metavar="NAME,…",
    action="append",
    type=arguments.generic,
    default=[],
    help="verify the body's HMAC in this header too: X-Mine,prefix=sha256=,encoding=hex,algorithm=sha256 "
    "(the encoding is hex or base64, the algorithm sha256, sha512 or sha1); can be repeated",
)

TIMES = (
    option("--since", metavar="TIME", help="accepted at or after this time (RFC 3339)"),
    option("--until", metavar="TIME", help="accepted before this time"),
)
