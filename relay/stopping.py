"""Being asked to stop: signals in, an event and a call out."""

import asyncio
import signal
from collections.abc import Callable


class Stop:
    """SIGTERM or SIGINT: the first asks to stop in order, the second to stop now."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._asked_again = asyncio.Event()
        self._now: Callable[[], None] = lambda: None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._ask)

    def on_second(self, now: Callable[[], None]) -> None:
        """Call `now` at the second signal, also when it has already come."""
        self._now = now
        if self._asked_again.is_set():
            now()

    async def asked_again_within(self, seconds: float) -> None:
        """Return after this time, or at the second signal."""
        try:
            async with asyncio.timeout(seconds):
                await self._asked_again.wait()
        except TimeoutError:
            pass

    def _ask(self) -> None:
        if self.asked.is_set():
            self._asked_again.set()
            self._now()
        self.asked.set()
