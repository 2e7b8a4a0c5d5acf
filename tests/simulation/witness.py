"""The witness: stands between the relay and its outbox and writes down what is asked and what is answered.

It changes nothing. What was asked and not answered before a crash may have happened or not; the judge needs
to know of which things that may be said.
"""

from collections.abc import Sequence
from typing import Any

from relay.model import Attempt, Delivery, Health, Receipt, Submission, Verdict
from relay.outbox import Ended, Outbox, Patience
from tests.simulation.journal import Journal


class Witness:
    """`relay.outbox.Outbox`, written down; verbs that change no delivery's fate pass by unseen."""

    def __init__(self, outbox: Outbox, journal: Journal) -> None:
        self._outbox = outbox
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outbox, name)

    def _look(self, sql: str, *values: object) -> list[Any]:
        """Read what is committed, at once: between two hops no transaction is open."""
        rows: list[Any] = self._outbox._committer._db._conn.execute(sql, values).fetchall()  # type: ignore[attr-defined]
        return rows

    async def accept(self, submissions: Sequence[Submission]) -> list[Receipt]:
        call = self._journal.number()
        self._journal.note("accept", call=call, offered=[_offered(each) for each in submissions])
        try:
            receipts = await self._outbox.accept(submissions)
        except Exception:
            self._journal.note("unaccepted", call=call)
            raise
        self._journal.note("accepted", call=call, kept=self._kept(receipts))
        return receipts

    def _kept(self, receipts: Sequence[Receipt]) -> list[tuple[int, str, tuple[str, ...]]]:
        kept = []
        for receipt in receipts:
            if not receipt.duplicate:
                found = self._look("SELECT seq FROM events WHERE id = ?", receipt.id)
                kept.append((found[0][0] if found else 0, receipt.id, receipt.endpoints))
        return kept

    async def record(
        self,
        delivery: Delivery,
        attempt: Attempt,
        verdict: Verdict,
        *,
        health: Health | None = None,
        news: Sequence[Submission] = (),
    ) -> list[Receipt]:
        call = self._journal.number()
        self._journal.note(
            "record", call=call, endpoint=delivery.endpoint, id=delivery.event.id, number=attempt.number,
            reason=attempt.reason, state=verdict.state.value, steps=verdict.steps, due_ms=verdict.due_ms,
            health=health, news=[_offered(each) for each in news],
        )  # fmt: skip
        receipts = await self._outbox.record(delivery, attempt, verdict, health=health, news=news)
        self._journal.note("recorded", call=call, kept=self._kept(receipts))
        return receipts

    async def expire(self, endpoint: str, before_ms: int, age_from_ms: int, now_ms: int) -> Patience:
        call = self._journal.number()
        self._journal.note("expire", call=call, endpoint=endpoint)
        patience = await self._outbox.expire(endpoint, before_ms, age_from_ms, now_ms)
        ids = [each.event_id for each in patience.expired]
        self._journal.note("expired", call=call, endpoint=endpoint, ids=ids)
        return patience

    async def keep_health(self, endpoint: str, health: Health) -> None:
        call = self._journal.number()
        self._journal.note("health", call=call, endpoint=endpoint, health=health)
        await self._outbox.keep_health(endpoint, health)
        self._journal.note("kept", call=call, endpoint=endpoint)

    async def revive(self, ended: Ended, now_ms: int, spacing_ms: float = 0.0) -> int:
        call = self._journal.number()
        self._journal.note("revive", call=call, endpoint=ended.endpoint, ended=ended)
        count = await self._outbox.revive(ended, now_ms, spacing_ms)
        rows = self._look(
            "SELECT e.id, p.id FROM deliveries d JOIN events e ON e.seq = d.event JOIN endpoints p"
            " ON p.number = d.endpoint WHERE d.state = 0 AND d.since = ?"
            " AND (e.id = ? OR ? IS NULL) AND (p.id = ? OR ? IS NULL)",
            now_ms, ended.event_id, ended.event_id, ended.endpoint, ended.endpoint,
        )  # fmt: skip
        self._journal.note("revived", call=call, revived=rows, spacing_seconds=spacing_ms / 1000)
        return count


def _offered(submission: Submission) -> tuple[str, str | None, tuple[tuple[str, bool], ...]]:
    """Return id, key, and to whom it is owed, in order or not."""
    event = submission.event
    return event.id, event.key, tuple((owed.endpoint, owed.ordered) for owed in submission.endpoints)


SNAPSHOT = (
    "SELECT e.seq, e.id, p.id, d.state, d.attempts, d.steps, d.key, d.since FROM deliveries d"
    " JOIN events e ON e.seq = d.event JOIN endpoints p ON p.number = d.endpoint ORDER BY e.seq"
)
