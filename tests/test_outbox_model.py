"""The outbox against a model of it: whatever is done in whatever order, both say the same.

The model is what the contract promises, in a dictionary; hypothesis looks for a sequence of verbs, restarts
and crashes after which the store says something else.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from relay.model import Delivery, Health, Owed, Secret, Standing, State, Verdict
from relay.outbox import Backlog, ConflictError, Ended, KeptEndpoint, open_outbox
from tests import postgres
from tests.test_outbox import NOW, attempt, submission

ENDPOINTS = {"main": False, "ordered": True, "other": False}  # id -> keeps order
LONG = 1_000_000
STEPS, EXAMPLES = 40, 25

WEIGHTS = {
    "accept": 5, "claim": 5, "record": 6, "release": 1, "probe": 1, "wait": 2, "replay_event": 1,
    "replay_endpoint": 4, "expire": 2, "drop_or_return": 1, "restart": 1,
}  # fmt: skip
WEIGHTED = [name for name, weight in WEIGHTS.items() for _ in range(weight)]

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Owing:
    """What the model knows of a delivery."""

    seq: int
    endpoint: str
    key: str | None
    due_ms: int
    accepted_ms: int
    state: State = State.PENDING
    attempts: int = 0
    steps: int = 0
    since_ms: int | None = None
    claimed: Delivery | None = None


@dataclass
class Known:
    """What the model knows of an event."""

    seq: int
    content: str
    deliveries: dict[str, Owing] = field(default_factory=dict)


class OutboxMachine(RuleBasedStateMachine):
    """The verbs of the outbox as rules; each does the same to the store and to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "relay.db"
        self.now = NOW
        self.events: dict[str, Known] = {}
        self.keys: dict[str, str] = {}  # idempotency key -> event id
        self.live = set(ENDPOINTS)
        self.healths: dict[str, Health] = {}
        self.made = self.crashes = 0

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()
        self.folder.cleanup()

    @initialize()
    def begin(self) -> None:
        self.runner.run(self.open())

    async def open(self) -> None:
        self.stack = AsyncExitStack()
        self.outbox = await self.stack.enter_async_context(open_outbox(self.place()))
        cancelled = await self.outbox.register(sorted(self.live))
        assert cancelled == {}

    def place(self) -> Path | Secret:
        return self.path

    # What the model says

    def owings(self) -> list[Owing]:
        return [each for known in self.events.values() for each in known.deliveries.values()]

    def pending(self, endpoint: str) -> list[Owing]:
        return [each for each in self.owings() if each.endpoint == endpoint and each.state is State.PENDING]

    def is_oldest(self, owing: Owing) -> bool:
        rivals = [each for each in self.pending(owing.endpoint) if each.key == owing.key]
        return owing.key is None or all(owing.seq <= each.seq for each in rivals)

    def is_held_back(self, owing: Owing) -> bool:
        """Of its key the oldest goes, or what was in flight when an older one was replayed."""
        rivals = [each for each in self.pending(owing.endpoint) if each.key == owing.key and each.claimed]
        return owing.key is not None and (not self.is_oldest(owing) or bool(rivals))

    # The verbs

    def accept(self, draw: Draw) -> None:
        endpoints = draw(
            st.sampled_from([{"ordered"}, {"ordered", "main"}, {"main", "other"}, set(ENDPOINTS), set()])
        )
        key = draw(st.sampled_from(["k1", "k1", "k2", None]))
        idempotency_key = draw(st.sampled_from([None, None, None, "i1", "i2"]))
        content = draw(st.sampled_from(["1", "2"]))
        self.made += 1
        bare = submission(f"{self.made}", "main", key=idempotency_key, content=content, at_ms=self.now)
        asked = replace(
            bare,
            event=replace(bare.event, key=key),
            endpoints=tuple(Owed(each, "event", ENDPOINTS[each]) for each in sorted(endpoints)),
        )
        before = self.keys.get(idempotency_key)
        if before is not None and self.events[before].content != content:
            try:
                self.runner.run(self.outbox.accept([asked]))
            except ConflictError:
                return
            raise AssertionError("a conflict was not seen")
        (receipt,) = self.runner.run(self.outbox.accept([asked]))
        assert receipt.duplicate == (before is not None)
        if before is not None:
            assert receipt.id == before
            return
        known = self.events[receipt.id] = Known(seq=self.made, content=content)
        for each in sorted(endpoints & self.live):
            known.deliveries[each] = Owing(
                seq=self.made,
                endpoint=each,
                key=key if ENDPOINTS[each] else None,
                due_ms=self.now,
                accepted_ms=self.now,
            )
        assert receipt.endpoints == tuple(sorted(endpoints & self.live))
        if idempotency_key is not None:
            self.keys[idempotency_key] = receipt.id

    def claim(self, draw: Draw) -> None:
        endpoint = draw(st.sampled_from(["ordered", "ordered", "main", "other"]))
        limit = draw(st.integers(1, 4))
        could = [
            each
            for each in self.pending(endpoint)
            if not each.claimed and each.due_ms <= self.now and not self.is_held_back(each)
        ]
        claimed = self.runner.run(self.outbox.claim(endpoint, limit, self.now))
        assert len(claimed) <= limit
        for delivery in claimed:
            owing = self.events[delivery.event.id].deliveries[endpoint]
            assert owing in could, "handed out what may not go"
            assert (delivery.attempts, delivery.steps, delivery.due_ms) == (
                owing.attempts,
                owing.steps,
                owing.due_ms,
            )
            assert delivery.replayed == (owing.since_ms is not None)
            owing.claimed = delivery
        if endpoint in self.live:
            assert len(claimed) == min(limit, len(could)), "held back what may go"

    def probe(self, draw: Draw) -> None:
        endpoint = draw(st.sampled_from(["ordered", "main"]))
        could = [each for each in self.pending(endpoint) if not each.claimed and not self.is_held_back(each)]
        delivery = self.runner.run(self.outbox.probe(endpoint))
        if delivery is None:
            assert could == []
            return
        owing = self.events[delivery.event.id].deliveries[endpoint]
        assert owing in could
        owing.claimed = delivery

    def claimed(self) -> list[Owing]:
        return sorted((each for each in self.owings() if each.claimed), key=lambda each: each.seq)

    def record(self, draw: Draw) -> None:
        if not self.claimed():
            return
        result = draw(st.sampled_from(["delivered", "again", "now", "dead", "dead"]))
        owing = draw(st.sampled_from(self.claimed()))
        delivery = owing.claimed
        assert delivery is not None
        verdict = {
            "delivered": Verdict(state=State.DELIVERED, steps=owing.steps),
            "again": Verdict(state=State.PENDING, steps=owing.steps + 1, due_ms=self.now + 7),
            "now": Verdict(state=State.PENDING, steps=owing.steps, due_ms=owing.due_ms),
            "dead": Verdict(state=State.DEAD, steps=owing.steps),
        }[result]
        health = draw(st.sampled_from([None, Health(standing=Standing.DOWN, failures=5)]))
        reason = None if result == "delivered" else "timeout"
        self.runner.run(
            self.outbox.record(delivery, attempt(delivery, reason, self.now), verdict, health=health)
        )
        if health is not None:
            self.healths[owing.endpoint] = health
        owing.claimed = None
        owing.attempts += 1
        owing.state, owing.steps = verdict.state, verdict.steps
        if verdict.due_ms is not None:
            owing.due_ms = verdict.due_ms

    def release(self, draw: Draw) -> None:
        if not self.claimed():
            return
        owing = draw(st.sampled_from(self.claimed()))
        assert owing.claimed is not None
        self.runner.run(self.outbox.release([owing.claimed]))
        owing.claimed = None

    def wait(self, draw: Draw) -> None:
        milliseconds = draw(st.sampled_from([1, 7, 20]))
        self.now += milliseconds

    def replay_event(self, draw: Draw) -> None:
        if not self.events:
            return
        id_ = draw(st.sampled_from(sorted(self.events)))
        self.revive(Ended(event_id=id_), list(self.events[id_].deliveries.values()), 0)

    def replay_endpoint(self, draw: Draw) -> None:
        endpoint = draw(st.sampled_from(["ordered", "ordered", "main", "other"]))
        state = draw(st.sampled_from([State.DEAD, State.DELIVERED, State.CANCELLED]))
        spacing = draw(st.sampled_from([0, 0, 5]))
        owings = [each for each in self.owings() if each.endpoint == endpoint and each.state is state]
        self.revive(Ended(endpoint=endpoint, state=state), owings, spacing)

    def revive(self, ended: Ended, owings: list[Owing], spacing: int) -> None:
        over = [each for each in owings if each.state is not State.PENDING and each.endpoint in self.live]
        count = self.runner.run(self.outbox.revive(ended, self.now, spacing))
        assert count == len(over)
        for index, owing in enumerate(sorted(over, key=lambda each: each.seq)):
            owing.state, owing.steps = State.PENDING, 0
            owing.due_ms, owing.since_ms = self.now + index * spacing, self.now

    def expire(self, draw: Draw) -> None:
        endpoint = draw(st.sampled_from(["ordered", "main"]))
        age = draw(st.sampled_from([0, 10, 30]))
        before = self.now - age

        def waits_since(owing: Owing) -> int:
            starts = [at for at in (owing.accepted_ms, owing.since_ms) if at is not None and at <= self.now]
            return max(starts, default=0)

        old = [each for each in self.pending(endpoint) if not each.claimed and waits_since(each) <= before]
        ended = 0
        while True:
            patience = self.runner.run(self.outbox.expire(endpoint, before, 0, self.now))
            ended += len(patience.expired)
            if not patience.more:
                break
        assert endpoint not in self.live or ended == len(old)
        if endpoint in self.live:
            for each in old:
                each.state = State.DEAD

    def drop_or_return(self, draw: Draw) -> None:
        if len(self.live) < 2 or self.claimed():
            return
        endpoint = draw(st.sampled_from(sorted(ENDPOINTS)))
        if endpoint in self.live:
            count = self.runner.run(self.outbox.drop_endpoint(endpoint))
            assert count == len(self.pending(endpoint))
            for each in self.pending(endpoint):
                each.state = State.CANCELLED
            self.live.discard(endpoint)
            self.healths.pop(endpoint, None)
        else:
            self.runner.run(
                self.outbox.keep_endpoint(KeptEndpoint(id=endpoint, settings=b"{}", paused=False))
            )
            self.live.add(endpoint)

    def restart(self, draw: Draw) -> None:
        """What was claimed is due as before; a crash is seen as the files lie on the disk at that moment."""
        left = self.stack
        if draw(st.booleans()):
            self.crash()
        else:
            self.runner.run(left.aclose())
        for each in self.claimed():
            each.claimed = None
        self.runner.run(self.open())
        self.runner.run(left.aclose())  # where a crash has left it open

    def crash(self) -> None:
        self.crashes += 1
        later = self.path.with_name(f"crash{self.crashes}.db")
        for suffix in ("", "-wal"):
            shutil.copy(f"{self.path}{suffix}", f"{later}{suffix}")
        self.path = later
        self.runner.run(self.stack.aclose())

    @rule(act=st.sampled_from(WEIGHTED), data=st.data())
    def act(self, act, data) -> None:
        """Do one of them; weighted, because left to itself hypothesis hardly gets to a second replay."""
        getattr(self, act)(data.draw)

    # What must always hold

    @invariant()
    def the_backlog_is_what_is_pending_and_dead(self) -> None:
        if not hasattr(self, "outbox"):
            return
        assert self.runner.run(self.outbox.backlog()) == {
            endpoint: Backlog(
                pending=len(self.pending(endpoint)),
                dead=sum(each.endpoint == endpoint and each.state is State.DEAD for each in self.owings()),
            )
            for endpoint in self.live
        }

    @invariant()
    def stories_and_health_are_as_they_were_told(self) -> None:
        for id_, known in list(self.events.items())[-4:]:
            story = self.runner.run(self.outbox.story(id_))
            assert story is not None
            told = {each.endpoint: (each.state, len(each.attempts)) for each in story.deliveries}
            assert told == {each.endpoint: (each.state, each.attempts) for each in known.deliveries.values()}
        if hasattr(self, "outbox"):
            pasts = self.runner.run(self.outbox.pasts())
            for endpoint in self.live & pasts.keys():
                assert pasts[endpoint].health == self.healths.get(endpoint, Health())


TestOutboxAgainstItsModel = OutboxMachine.TestCase
TestOutboxAgainstItsModel.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


class PostgresMachine(OutboxMachine):
    """The same against PostgreSQL; a crash is a relay that is not heard of any more."""

    server = ""

    @initialize()
    def begin(self) -> None:
        self.url = self.runner.run(postgres.new_database(self.server, f"relay_{uuid4().hex}"))
        super().begin()

    def teardown(self) -> None:
        super().teardown()
        asyncio.run(postgres.drop_database(self.url))

    def place(self) -> Path | Secret:
        return Secret(self.url)

    def crash(self) -> None:
        self.runner.run(self.vanish())

    async def vanish(self) -> None:
        connection = await asyncpg.connect(self.url)
        await connection.execute("UPDATE relay.relays SET beat_at = 'epoch'")
        await connection.close()


@pytest.fixture
def _server(postgres_server: str) -> None:
    PostgresMachine.server = postgres_server


TestPostgresAgainstTheModel = pytest.mark.usefixtures("_server")(PostgresMachine.TestCase)
TestPostgresAgainstTheModel.settings = settings(
    TestOutboxAgainstItsModel.settings, max_examples=EXAMPLES // 3
)
