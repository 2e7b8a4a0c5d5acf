"""What a sender weighs while every hostile receiver answers it: `python -m tests.weighing URL CA_FILE`.

Prints the resident memory at rest and its peak over the set, in KiB, and how many outcomes were wrong.
"""

import asyncio
import gc
import ssl
import sys
from pathlib import Path

from relay.sender import open_sender
from tests.hostile import LOOPBACK, message, right, to, try_all


def resident(name: str) -> int:
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1])


async def main(base: str, ca_file: str) -> None:
    context = ssl.create_default_context(cafile=ca_file)
    async with open_sender(policy=LOOPBACK, version="1", ssl_context=context) as sender:
        for _ in range(3):
            await sender.send(to(f"{base}/ok"), message())
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        idle = resident("VmRSS")
        outcomes = await try_all(base, sender, timeout_seconds=2.0)
        peak = resident("VmHWM")
        for path in [path for path, outcome in outcomes.items() if not right(path, outcome)]:
            outcomes |= await try_all(base, sender, timeout_seconds=5.0, paths=[path])  # on a busy machine
        print(idle, peak, sum(not right(path, outcome) for path, outcome in outcomes.items()))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
