"""What the service manager is told: how the relay stands goes in, a datagram to $NOTIFY_SOCKET goes out.

systemd's protocol (sd_notify(3)) is lines of KEY=VALUE to a unix socket. That nobody
listens or no socket is named is no mistake: most relays are started by something else.
"""

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from relay.clock import Clock


class ServiceManager:
    """Who started us, as the environment names it."""

    def __init__(self, environ: Mapping[str, str], clock: Clock) -> None:
        name = environ.get("NOTIFY_SOCKET", "")
        # A name that begins with @ is in Linux' abstract namespace.
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        self._clock = clock
        self._watchdog_us = 0
        if environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with suppress(ValueError):
                self._watchdog_us = int(environ.get("WATCHDOG_USEC", "0"))

    def ready(self) -> None:
        """Say that the relay serves; also after a reload."""
        self._tell("READY=1")

    def reloading(self) -> None:
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={round(self._clock.monotonic() * 1e6)}")

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    async def watched(self) -> None:
        """Say that the loop runs, twice as often as the manager wants to hear it; until cancelled."""
        never = asyncio.Event()
        while self._address and self._watchdog_us > 0:
            self._tell("WATCHDOG=1")
            await self._clock.wait(never, self._clock.now_ms() + self._watchdog_us // 2000)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
            telling.settimeout(0.0)
            telling.sendto(state.encode(), self._address)
