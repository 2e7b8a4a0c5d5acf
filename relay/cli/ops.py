"""`relay ops`: what comes with the relay for other programs, printed for where it belongs."""

import sys
from argparse import Namespace
from pathlib import Path

from relay.cli.exits import Exit

OPS = Path(__file__).parent.parent / "ops"


def grafana(_arguments: Namespace) -> int:
    return printed("grafana.json")


def alerts(_arguments: Namespace) -> int:
    return printed("alerts.yaml")


def submit_sql(arguments: Namespace) -> int:
    from relay.sources.script import script

    sys.stdout.write(script(arguments.schema, portable=arguments.portable))
    return Exit.DONE


def printed(name: str) -> int:
    sys.stdout.write((OPS / name).read_text(encoding="utf-8"))
    return Exit.DONE
