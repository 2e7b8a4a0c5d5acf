"""`relay listen`: a receiver to develop against; each request becomes one line.

With a script of answers it fails on purpose, late or with a Retry-After, to show what the relay makes of it.
"""

import asyncio
import sys
from argparse import Namespace
from dataclasses import asdict

from relay.cli.arguments import Answer
from relay.cli.exits import CommandError, Exit
from relay.cli.output import printable, show_json
from relay.cli.receiver import Arrival, Receiver, server_tls
from relay.cli.secret import read_secret
from relay.cli.verification import generic_schemes


def listen(arguments: Namespace) -> int:
    if arguments.key is not None and arguments.cert is None:
        raise CommandError("a --key is of no use without its --cert", Exit.USAGE)
    secret = read_secret(arguments.secret_file)
    if secret is None:
        say("no --secret-file and no RELAY_SECRET: signatures are not verified")
    asyncio.run(receive(arguments, secret))
    return Exit.DONE


async def receive(arguments: Namespace, secret: str | None) -> None:
    """Print each request, until `--count` have come or somebody interrupts."""
    script = iter(arguments.answer)
    receiver = Receiver(
        secret=secret,
        answer=lambda _event: next(script, Answer(200)),
        generic=generic_schemes(arguments.header_scheme),
    )
    tls = server_tls(arguments.cert, arguments.key) if arguments.cert is not None else None
    async with receiver.listening(arguments.port, tls) as url:
        say(f"listening on {url}")
        printed = 0
        while printed != arguments.count:
            arrival = await receiver.arrivals.get()
            if arguments.json:
                show_json(asdict(arrival))
            else:
                print(line(arrival, judged=secret is not None))
            sys.stdout.flush()  # whoever reads a pipe wants to see it now
            printed += 1


def line(arrival: Arrival, *, judged: bool) -> str:
    signatures = ", ".join(f"{scheme} {worth}" for scheme, worth in arrival.signatures.items())
    return "  ".join(
        [
            arrival.at,
            printable(arrival.event),
            printable(arrival.id),
            f"attempt {printable(arrival.attempt)}",
            signatures or ("no signature" if judged else "not verified"),
            f"answered {arrival.answered}",
        ]
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
