"""The driver: the application that submits and the operator who interferes, with what they were answered.

What was under way when the relay was killed has an unknown outcome; it is done again after the next start,
with the same idempotency key where there is one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from relay.api.state import State
from relay.config import Config
from relay.endpoints import ConflictError, Endpoints, UnknownEndpointError
from relay.ingest import Draft
from relay.model import Endpoint
from relay.model import State as DeliveryState
from relay.outbox import ConflictError as KeyConflictError
from relay.outbox import Ended
from tests.simulation.journal import Journal
from tests.simulation.plan import Action


def registered(endpoints: Endpoints) -> dict[str, tuple[Endpoint, bool]]:
    """Return every endpoint, and whether it is paused."""
    return {each.endpoint.id: (each.endpoint, each.paused) for each in endpoints.all()}


class Driver:
    """Does a plan's actions, each in its time, over all lives of the relay."""

    def __init__(self, actions: Sequence[Action], journal: Journal, chance: Random) -> None:
        self._actions = deque(actions)
        self._journal = journal
        self._chance = chance
        self._under_way: dict[int, Action] = {}
        self._ids: list[str] = []
        self.config: Callable[..., Config]
        self.change_clock: Callable[[int], None] = lambda _by_ms: None

    def cut_off(self) -> None:
        """Note that the relay was killed: what was under way is to be done again."""
        again = list(self._under_way.values())
        self._under_way.clear()
        self._actions.extendleft(reversed(again))

    def take_due(self, kind: str, until: float) -> list[Action]:
        """Take out what is due until then, of one kind, and has to be done while the relay is off."""
        due = [action for action in self._actions if action.kind == kind and action.at <= until]
        self._actions = deque(action for action in self._actions if action not in due)
        return due

    @property
    def is_done(self) -> bool:
        return not self._actions

    async def drive(self, state: State, until: float) -> None:
        """Do what is due until a time, and return when it has come and all is done."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while self._actions and self._actions[0].at <= until:
                await asyncio.sleep(max(0.0, self._actions[0].at - loop.time()))
                tasks.create_task(self._do(self._actions.popleft(), state))
            await asyncio.sleep(max(0.0, until - loop.time()))

    async def _do(self, action: Action, state: State) -> None:
        number = self._journal.number()
        self._under_way[number] = action
        about = {
            name: value
            for name, value in action.what.items()
            if name in {"id", "paused", "by_ms", "values", "absent"}
        }
        self._journal.note("doing", op=number, did=action.kind, **about)
        try:
            answer = await getattr(self, action.kind)(state, **action.what)
        except (ConflictError, UnknownEndpointError, KeyConflictError) as error:
            answer = type(error).__name__
        if self._journal.alive:
            self._under_way.pop(number, None)
            self._journal.note("done", op=number, did=action.kind, answer=answer, **about)

    # The application

    async def submit(self, state: State, drafts: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
        values = [
            Draft(
                value={name: value for name, value in draft.items() if name != "idempotency_key"},
                idempotency_key=draft.get("idempotency_key"),
            )
            for draft in drafts
        ]
        receipts = await state.ingest.submit(values)
        self._ids += [receipt.id for receipt in receipts if not receipt.duplicate]
        return [
            (
                draft["data"]["n"],
                draft.get("idempotency_key"),
                "other" in draft["data"],
                receipt.id,
                receipt.endpoints,
                receipt.duplicate,
            )
            for draft, receipt in zip(drafts, receipts, strict=True)
        ]

    # The operator

    async def pause(self, state: State, id: str, *, paused: bool) -> str:  # noqa: A002
        await state.endpoints.pause(id, paused=paused)
        return "paused" if paused else "resumed"

    async def let_go(self, state: State, id_: str) -> None:
        """Resume an endpoint now that the faults are over."""
        await self._do(Action(0.0, "pause", {"id": id_, "paused": False}), state)

    async def put(self, state: State, values: dict[str, Any]) -> object:
        registered, _ = await state.endpoints.put(values)
        return registered.endpoint

    async def patch(self, state: State, id: str, values: dict[str, Any]) -> object:  # noqa: A002
        return (await state.endpoints.patch(id, values)).endpoint

    async def remove(self, state: State, id: str) -> int:  # noqa: A002
        return await state.endpoints.remove(id)

    async def replay(self, state: State, id: str, of: str, type: str | None, spacing_ms: float) -> int:  # noqa: A002
        state.endpoints.get(id)
        ended = Ended(endpoint=id, state=DeliveryState(of), type=type)
        try:
            return await state.outbox.revive(ended, state.clock.now_ms(), spacing_ms)
        finally:
            state.wake([id])

    async def replay_one(self, state: State, nth: float) -> int:
        if not self._ids:
            return 0
        id_ = self._ids[int(nth * len(self._ids))]
        try:
            return await state.outbox.revive(Ended(event_id=id_), state.clock.now_ms())
        finally:
            state.wake(state.ingest.subscriptions.endpoints)

    async def reload(self, state: State, absent: frozenset[str], changes: dict[str, Any]) -> object:
        config = self.config(absent, changes)
        await state.endpoints.reload(
            configured=config.endpoints, defaults=config.delivery, policy=config.egress.policy
        )
        return registered(state.endpoints)

    async def set_clock(self, _state: State, by_ms: int) -> None:
        self.change_clock(by_ms)
