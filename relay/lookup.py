"""Names of receivers: a host in, its addresses out, as the system's resolver says.

The resolver is asked in threads of its own, few at once and once at a time for each name, so that one that
hangs delays no other work. A name that was found before goes on with the addresses it had when the resolver
is busy or does not answer; one that was never found waits for its turn with `begin`, before an attempt's
time starts to run. Nothing here judges an address: that is done at every dial.
"""

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

# Looks one name up, in a thread; raises OSError when it has no address or there is no answer.
Ask = Callable[[str], Sequence[str]]

_AT_ONCE = 16
_FRESH_SECONDS = 10.0
_FAILURE_SECONDS = 1.0  # how long one answer of "there is no such name" serves those who ask just after it
_STALE_SECONDS = 86_400.0  # RFC 8767, "Serving Stale Data": one day at the least of what it suggests
_PATIENCE_SECONDS = 1.0  # with a resolver, when there are addresses to go on with
_KEPT_NAMES = 4096
_KEPT_ADDRESSES = 64  # of one name; more than anybody tries

# The resolver's word that a name has no address; every other failure is the resolver's own.
_NO_ADDRESS = frozenset(
    code
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY")
    if (code := getattr(socket, name, None)) is not None
)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What was last heard of a name; without addresses `error` says why."""

    addresses: tuple[str, ...]
    error: tuple[int, str] | None
    heard_at: float
    fresh_until: float


class _LookUp:
    """One question that waits for a thread or for its answer."""

    def __init__(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        self.host = host
        self.loop = loop
        self.begun = loop.create_future()  # of when
        self.answer: asyncio.Future[_Answer] = loop.create_future()


class Names:
    """The addresses of names. `fresh_seconds`: how long an answer holds before it is asked for again."""

    def __init__(self, ask: Ask | None = None, *, fresh_seconds: float = _FRESH_SECONDS) -> None:
        self._ask = ask or ask_the_system
        self._fresh_seconds = fresh_seconds
        self._heard: dict[str, _Answer] = {}  # the longest unasked first
        self._under_way: dict[str, _LookUp] = {}
        self._queue: deque[_LookUp] = deque()
        self._running = 0

    def knows(self, host: str) -> bool:
        """Tell whether there is something to go on with, without a look-up that may have to wait."""
        answer = self._heard.get(host)
        if answer is None:
            return False
        now = monotonic()
        return now < answer.fresh_until or self._stale(answer, now)

    async def begin(self, host: str, within_seconds: float) -> bool:
        """Wait until a look-up of this name is no longer waiting for others; tell whether that came about."""
        look_up = self._under_way.get(host) or self._look_up(host)
        if look_up.begun.done():
            return True
        try:
            async with asyncio.timeout(within_seconds):
                await asyncio.shield(look_up.begun)
        except TimeoutError:
            return False
        return True

    async def addresses(self, host: str) -> Sequence[str]:
        """Return the addresses of a name, one at least. Raises OSError."""
        answer = self._heard.get(host)
        if answer is None or answer.fresh_until <= monotonic():
            answer = await self._ask_anew(host, answer)
        if answer.error is not None:
            raise socket.gaierror(*answer.error)
        return answer.addresses

    async def addresses_soon(self, host: str) -> Sequence[str] | None:
        """Return the addresses of a name, or None when they cannot be had in a moment."""
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await self.addresses(host)
        except OSError:  # TimeoutError is one
            return None

    def forget(self) -> None:
        """Forget all answers, so that every name is asked for anew."""
        self._heard.clear()

    async def _ask_anew(self, host: str, before: _Answer | None) -> _Answer:
        look_up = self._under_way.get(host) or self._look_up(host)
        if before is None or not self._stale(before, monotonic()):
            return await asyncio.shield(look_up.answer)
        # There is something to go on with: it is better than waiting for a resolver that is busy or hangs.
        begun = look_up.begun
        patience = begun.result() + _PATIENCE_SECONDS - monotonic() if begun.done() else 0.0
        if patience <= 0:
            return before
        try:
            async with asyncio.timeout(patience):
                return await asyncio.shield(look_up.answer)
        except TimeoutError:
            return before

    @staticmethod
    def _stale(answer: _Answer, now: float) -> bool:
        """Tell whether an answer that is no longer fresh is better than none."""
        return bool(answer.addresses) and now < answer.heard_at + _STALE_SECONDS

    def _look_up(self, host: str) -> _LookUp:
        look_up = self._under_way[host] = _LookUp(host)
        self._queue.append(look_up)
        self._go_on()
        return look_up

    def _go_on(self) -> None:
        """Begin as many look-ups as there is room for."""
        while self._queue and self._running < _AT_ONCE:
            look_up = self._queue.popleft()
            self._running += 1
            look_up.begun.set_result(monotonic())
            try:
                threading.Thread(target=self._run, args=(look_up,), name="look-up", daemon=True).start()
            except RuntimeError:
                failure = socket.gaierror(socket.EAI_AGAIN, "there is no thread for another look-up")
                look_up.loop.call_soon(self._take, look_up, failure)

    def _run(self, look_up: _LookUp) -> None:
        """Ask, in a thread."""
        result: Sequence[str] | OSError = socket.gaierror(socket.EAI_FAIL, "the look-up broke")
        try:
            result = self._ask(look_up.host)
        except OSError as error:
            result = error
        except UnicodeError:  # no resolver would know it either
            result = socket.gaierror(socket.EAI_NONAME, "not a name that can be looked up")
        finally:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever wanted to know
                look_up.loop.call_soon_threadsafe(self._take, look_up, result)

    def _take(self, look_up: _LookUp, result: Sequence[str] | OSError) -> None:
        """Keep an answer, and tell those who wait for it."""
        self._running -= 1
        del self._under_way[look_up.host]
        answer = self._answer(result, self._heard.pop(look_up.host, None), monotonic())
        self._heard[look_up.host] = answer
        while len(self._heard) > _KEPT_NAMES:
            del self._heard[next(iter(self._heard))]
        if not look_up.answer.done():
            look_up.answer.set_result(answer)
        self._go_on()

    def _answer(self, result: Sequence[str] | OSError, before: _Answer | None, now: float) -> _Answer:
        if not isinstance(result, OSError):
            addresses = tuple(dict.fromkeys(result))[:_KEPT_ADDRESSES]
            if addresses:
                return _Answer(addresses, None, now, now + self._fresh_seconds)
            result = socket.gaierror(socket.EAI_NONAME, "the name has no address")
        elif result.errno not in _NO_ADDRESS and before is not None and self._stale(before, now):
            # The resolver failed, not the name; ask again in a while, and not for every attempt.
            return _Answer(before.addresses, None, before.heard_at, now + self._fresh_seconds)
        error = (result.errno or socket.EAI_FAIL, result.strerror or "the look-up failed")
        return _Answer((), error, now, now + min(_FAILURE_SECONDS, self._fresh_seconds))


def ask_the_system(host: str) -> list[str]:
    """Ask the system's resolver, which may take as long as it likes. Raises OSError."""
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(info[4][0]) for info in infos]
