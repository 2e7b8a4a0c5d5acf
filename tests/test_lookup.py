"""Look-ups of names: few at once, one for each name; a resolver that hangs delays only what is unknown."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import pytest

from relay import lookup, sender
from relay.lookup import Names
from tests.figures import figure
from tests.hostile import HostileReceiver, loopback_sender, message, to

AT_ONCE = 16


class Resolver:
    """A resolver as a script: what `answers` has, as soon as a name is not held; notes what it is asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Sequence[str] | OSError] = {}
        self.asked: list[str] = []
        self.at_once = 0
        self._held: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self._busy = 0

    def hold(self, *hosts: str) -> None:
        self._held |= {host: threading.Event() for host in hosts}

    def let_go(self, *hosts: str) -> None:
        for host in hosts or list(self._held):
            self._held.pop(host).set()

    def __call__(self, host: str) -> Sequence[str]:
        with self._lock:
            self.asked.append(host)
            self._busy += 1
            self.at_once = max(self.at_once, self._busy)
        if (held := self._held.get(host)) is not None:
            held.wait(10)
        with self._lock:
            self._busy -= 1
        answer = self.answers.get(host, ["192.0.2.1"])
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.fixture
def resolver() -> Iterator[Resolver]:
    resolver = Resolver()
    yield resolver
    resolver.let_go()


@pytest.fixture
async def receiver() -> AsyncIterator[HostileReceiver]:
    async with HostileReceiver("known.example", "new.example") as receiver:
        yield receiver


def hanging(count: int = AT_ONCE) -> list[str]:
    return [f"hanging-{number}.example" for number in range(count)]


async def until(condition: Callable[[], bool], within: float = 5.0) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.001)


async def saturate(names: Names, resolver: Resolver, tasks: asyncio.TaskGroup) -> list[asyncio.Task[object]]:
    """Have every look-up that there is room for hang."""
    resolver.hold(*hanging())
    waiting: list[asyncio.Task[object]] = [tasks.create_task(names.addresses(host)) for host in hanging()]
    await until(lambda: len(set(resolver.asked) & set(hanging())) == AT_ONCE)
    return waiting


NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
NO_ANSWER = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def test_those_who_ask_for_a_name_at_once_share_one_look_up(resolver):
    """Thirty-two attempts of one endpoint must not be thirty-two questions."""
    resolver.answers["a.example"] = ["8.8.8.8", "8.8.4.4", "8.8.8.8"]
    resolver.hold("a.example")
    names = Names(resolver)
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(names.addresses("a.example")) for _ in range(32)]
        await until(lambda: resolver.asked == ["a.example"])
        resolver.let_go()

    assert {task.result() for task in asking} == {("8.8.8.8", "8.8.4.4")}
    assert resolver.asked == ["a.example"]


async def test_no_more_than_sixteen_look_ups_are_under_way(resolver):
    """A thread for every name would be the way from a dead name server to a dead relay."""
    hosts = [f"name-{number}.example" for number in range(100)]
    resolver.hold(*hosts)
    names = Names(resolver)
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(names.addresses(host)) for host in hosts]
        await until(lambda: len(resolver.asked) == AT_ONCE)
        resolver.let_go()

    assert all(task.result() == ("192.0.2.1",) for task in asking)
    assert resolver.at_once == AT_ONCE


async def test_an_answer_is_asked_for_again_when_it_is_no_longer_fresh(resolver, monkeypatch):
    """A receiver that moved must get its events at the new address within seconds."""
    now = 1000.0
    monkeypatch.setattr(lookup, "monotonic", lambda: now)
    names = Names(resolver)

    first = await names.addresses("a.example")
    resolver.answers["a.example"] = ["192.0.2.2"]
    now += 9.9
    second = await names.addresses("a.example")
    now += 0.2
    third = await names.addresses("a.example")

    assert (first, second, third) == (("192.0.2.1",), ("192.0.2.1",), ("192.0.2.2",))


async def test_a_known_name_goes_on_while_the_resolver_is_busy_and_learns_later(resolver):
    """Other names' trouble is no trouble of one that was found before."""
    names = Names(resolver, fresh_seconds=0)
    await names.addresses("known.example")
    async with asyncio.TaskGroup() as tasks:
        await saturate(names, resolver, tasks)
        resolver.answers["known.example"] = ["192.0.2.2"]
        async with asyncio.timeout(0.5):
            meanwhile = await names.addresses("known.example")
        resolver.let_go()
        await until(lambda: resolver.asked.count("known.example") == 2)

    assert meanwhile == ("192.0.2.1",)
    assert await names.addresses("known.example") == ("192.0.2.2",)


async def test_a_known_name_whose_look_up_hangs_goes_on_after_a_moment(resolver):
    """Its last addresses are most likely still right, and whatever they are is judged at the dial."""
    names = Names(resolver, fresh_seconds=0)
    await names.addresses("known.example")
    resolver.hold("known.example")
    async with asyncio.timeout(3):
        assert await names.addresses("known.example") == ("192.0.2.1",)
    async with asyncio.timeout(0.5):  # it has been waited for already
        assert await names.addresses("known.example") == ("192.0.2.1",)
    resolver.let_go()

    assert resolver.asked.count("known.example") == 2


@pytest.mark.parametrize(
    "failure", [NO_ANSWER, socket.gaierror(socket.EAI_FAIL, "x"), OSError(24, "Too many open files")]
)
async def test_a_known_name_outlives_a_resolver_that_fails(resolver, failure):
    """That nobody could say is not that there is none."""
    names = Names(resolver, fresh_seconds=0)
    await names.addresses("known.example")
    resolver.answers["known.example"] = failure

    assert await names.addresses("known.example") == ("192.0.2.1",)


async def test_a_known_name_is_not_kept_alive_for_ever(resolver, monkeypatch):
    """An address that nobody has confirmed for a day may be somebody else's by now."""
    now = 1000.0
    monkeypatch.setattr(lookup, "monotonic", lambda: now)
    names = Names(resolver)
    await names.addresses("known.example")
    resolver.answers["known.example"] = NO_ANSWER
    for _ in range(23):
        now += 3600
        assert await names.addresses("known.example") == ("192.0.2.1",)
    now += 3601

    assert not names.knows("known.example")
    with pytest.raises(socket.gaierror):
        await names.addresses("known.example")


@pytest.mark.parametrize("answer", [NO_SUCH_NAME, []])
async def test_a_name_that_is_gone_is_gone_at_once(resolver, answer):
    """The resolver answered, and the answer is that there is none: nothing is sent to where it once was."""
    names = Names(resolver, fresh_seconds=0)
    await names.addresses("known.example")
    resolver.answers["known.example"] = answer

    with pytest.raises(socket.gaierror):
        await names.addresses("known.example")
    assert not names.knows("known.example")


async def test_what_no_resolver_could_be_asked_is_a_failed_look_up():
    """A name that the system's own code refuses must not leave its askers waiting."""
    with pytest.raises(socket.gaierror):
        await Names().addresses("a" * 64 + ".example")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_look_up_that_breaks_gives_its_place_back():
    """A fault of our own must not use up, one by one, the few places there are."""

    def ask(host: str) -> Sequence[str]:
        if host == "good.example":
            return ["192.0.2.1"]
        raise ZeroDivisionError

    names = Names(ask)
    for number in range(2 * AT_ONCE):
        with pytest.raises(OSError, match="broke"):
            await names.addresses(f"bad-{number}.example")

    assert await names.addresses("good.example") == ("192.0.2.1",)
    for thread in threading.enumerate():  # each says how it broke after it gave its place back
        if thread.name == "look-up":
            thread.join(10)


async def test_what_is_remembered_is_bounded(resolver, monkeypatch):
    """Endpoints of the API may name a new host every second."""
    monkeypatch.setattr(lookup, "_KEPT_NAMES", 10)
    resolver.answers["many.example"] = [f"8.8.{high}.{low}" for high in range(16) for low in range(256)]
    names = Names(resolver)
    for number in range(30):
        await names.addresses(f"name-{number}.example")

    assert [number for number in range(30) if names.knows(f"name-{number}.example")] == list(range(20, 30))
    assert len(await names.addresses("many.example")) == 64


def test_a_look_up_that_outlives_the_relay_ends_quietly(resolver):
    """A stop does not wait for a name server, and its late answer is not a traceback."""
    resolver.hold("slow.example")
    names = Names(resolver)

    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await names.addresses("slow.example")

    asyncio.run(scenario())
    (thread,) = [each for each in threading.enumerate() if each.name == "look-up"]
    resolver.let_go()
    thread.join(5)

    assert not thread.is_alive()


# What that means for deliveries


async def test_waiting_for_a_turn_costs_no_attempt_and_none_of_its_time(resolver, receiver):
    """Sixteen dead names of others would otherwise fail the first delivery to a new endpoint."""
    resolver.answers["new.example"] = ["127.0.0.1"]
    names = Names(resolver)
    async with loopback_sender(names=names) as sending, asyncio.TaskGroup() as tasks:
        await saturate(names, resolver, tasks)
        attempt = tasks.create_task(
            sending.send(to(receiver.url("/ok", "new.example"), timeout_seconds=0.5), message())
        )
        waited, _ = await asyncio.wait([attempt], timeout=0.8)
        resolver.let_go()

    assert waited == set()
    assert attempt.result().reason is None
    assert attempt.result().milliseconds < 500


async def test_a_turn_that_does_not_come_is_an_attempt_that_was_not_made(resolver, receiver, monkeypatch):
    """The lane hands the delivery back unspent and has its places free for others meanwhile."""
    monkeypatch.setattr(sender, "_TURN_SECONDS", 0.2)
    names = Names(resolver)
    async with loopback_sender(names=names) as sending, asyncio.TaskGroup() as tasks:
        await saturate(names, resolver, tasks)
        outcome = await sending.send(to(receiver.url("/ok", "new.example")), message())
        resolver.let_go()

    assert (outcome.unspent, outcome.reason, receiver.requests) == (True, "dns_error", [])


async def test_names_that_hang_delay_no_receiver_that_is_known(resolver, receiver):
    """One customer's dead name server is no reason for another's events to be late."""
    resolver.answers["known.example"] = ["127.0.0.1"]
    names = Names(resolver, fresh_seconds=0)  # so that every connection wants a look-up
    known = to(receiver.url("/close", "known.example"), id="known")
    async with loopback_sender(names=names) as sending, asyncio.TaskGroup() as tasks:
        await sending.send(known, message())
        resolver.hold(*hanging(20))
        attempts = [
            tasks.create_task(sending.send(to(f"https://{host}/", id=host, timeout_seconds=1), message()))
            for host in hanging(20)
        ]
        await until(lambda: len(set(resolver.asked) & set(hanging(20))) == AT_ONCE)
        healthy = [await sending.send(known, message()) for _ in range(100)]
        still_hanging = sum(not attempt.done() for attempt in attempts)
        resolver.let_go()
    slowest = sorted(outcome.milliseconds for outcome in healthy)[98]
    figure("healthy p99 beside 20 names that hang (ms)", slowest)

    assert {outcome.reason for outcome in healthy} == {None}
    assert still_hanging >= 4  # those whose turn had not come
    assert slowest < 1000


async def test_last_known_addresses_are_judged_like_any(resolver, receiver):
    """An address from memory is as good as one just looked up: it is what the dial goes to that counts."""
    resolver.answers["known.example"] = ["127.0.0.1"]
    names = Names(resolver, fresh_seconds=0)
    known = to(receiver.url("/close", "known.example"))
    async with loopback_sender(names=names) as sending:
        first = await sending.send(known, message())
        resolver.answers["known.example"] = NO_ANSWER
        second = await sending.send(known, message())
        sending.own_addresses = frozenset({("127.0.0.1", receiver.port)})
        third = await sending.send(known, message())

    assert [outcome.reason for outcome in (first, second, third)] == [None, None, "blocked_address"]
    assert len(receiver.requests) == 2
