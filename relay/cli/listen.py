"""`relay listen`: a receiver to develop against; each request becomes one line.

With a script of answers it fails on purpose, to show what the relay makes of it.
"""

import asyncio
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict

from relay.cli.exits import Exit
from relay.cli.output import printable, show_json
from relay.cli.receiver import Arrival, Receiver
from relay.cli.secret import read_secret


def listen(arguments: Namespace) -> int:
    secret = read_secret(arguments.secret_file)
    if secret is None:
        say("no --secret-file and no RELAY_SECRET: signatures are not verified")
    asyncio.run(receive(arguments, secret))
    return Exit.DONE


async def receive(arguments: Namespace, secret: str | None) -> None:
    """Print each request, until `--count` have come or somebody interrupts."""
    script: Iterable[int] = iter(arguments.answer)
    receiver = Receiver(secret=secret, answer=lambda _event: next(iter(script), 200))
    async with receiver.listening(arguments.port) as url:
        say(f"listening on {url}")
        printed = 0
        while printed != arguments.count:
            arrival = await receiver.arrivals.get()
            if arguments.json:
                show_json(asdict(arrival))
            else:
                print(line(arrival))
            sys.stdout.flush()  # whoever reads a pipe wants to see it now
            printed += 1


def line(arrival: Arrival) -> str:
    signatures = ", ".join(f"{scheme} {worth}" for scheme, worth in arrival.signatures.items())
    return "  ".join(
        [
            arrival.at,
            printable(arrival.event),
            printable(arrival.id),
            f"attempt {printable(arrival.attempt)}",
            signatures or "not verified",
            f"answered {arrival.answered}",
        ]
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
