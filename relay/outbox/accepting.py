"""Deciding on what is submitted: submissions and the keys in use in, receipts or a conflict out. Pure."""

from collections.abc import Callable, Container, Sequence
from dataclasses import replace

from relay.model import Receipt, Submission
from relay.outbox import ConflictError

Accepted = list[Receipt] | ConflictError
Known = tuple[bytes | None, Receipt]


class Keys:
    """The idempotency keys in use: kept (`look` tells), taken in this transaction, or by this batch.

    The ids that events came with are told apart from keys by a space, and looked up by `look_id`.
    """

    def __init__(self, look: Callable[[str], Known | None], look_id: Callable[[str], Known | None]) -> None:
        self._look = look
        self._look_id = look_id
        self._taken: dict[str, Known] = {}
        self._mine: dict[str, Known] = {}

    def known(self, key: str) -> Known | None:
        """Return fingerprint and receipt of the event that was submitted under this key."""
        return self._mine.get(key) or self._taken.get(key) or self._look(key)

    def known_id(self, id_: str) -> Known | None:
        """Return the same of the event that has this id."""
        name = f"id {id_}"
        return self._mine.get(name) or self._taken.get(name) or self._look_id(id_)

    def use(self, submission: Submission) -> None:
        known = (submission.fingerprint, _receipt(submission, duplicate=True))
        if submission.idempotency_key is not None:
            self._mine[submission.idempotency_key] = known
        if submission.known_by_id:
            self._mine[f"id {submission.event.id}"] = known

    def settle(self, *, kept: bool) -> None:
        """End the batch at hand: what it used is taken if the batch is kept, else free again."""
        if kept:
            self._taken |= self._mine
        self._mine = {}


def decide(
    accepts: Sequence[Sequence[Submission]], keys: Keys, endpoints: Container[str]
) -> tuple[list[Accepted], list[Submission]]:
    """Return what becomes of each batch, and what is new in all of them."""
    accepted: list[Accepted] = []
    new: list[Submission] = []
    for submissions in accepts:
        result = accept_all([_live(each, endpoints) for each in submissions], keys, new)
        keys.settle(kept=not isinstance(result, ConflictError))
        accepted.append(result)
    return accepted, new


def accept_all(submissions: Sequence[Submission], keys: Keys, new: list[Submission]) -> Accepted:
    """Append what is new among `submissions` to `new`, all or nothing."""
    receipts: list[Receipt] = []
    kept: list[Submission] = []
    conflicts: list[int] = []
    for index, submission in enumerate(submissions):
        key = submission.idempotency_key
        known = keys.known(key) if key is not None else None
        repeat = keys.known_id(submission.event.id) if submission.known_by_id else None
        if repeat is not None:
            receipts.append(repeat[1])
        elif known is None:
            receipts.append(_receipt(submission, duplicate=False))
            kept.append(submission)
            keys.use(submission)
        elif known[0] == submission.fingerprint:
            receipts.append(known[1])
        else:
            conflicts.append(index)
    if conflicts:
        return ConflictError(tuple(conflicts))
    new += kept
    return receipts


def _live(submission: Submission, endpoints: Container[str]) -> Submission:
    """Leave out endpoints that were dropped while the submission was on its way."""
    if all(owed.endpoint in endpoints for owed in submission.endpoints):
        return submission
    return replace(
        submission, endpoints=tuple(owed for owed in submission.endpoints if owed.endpoint in endpoints)
    )


def _receipt(submission: Submission, *, duplicate: bool) -> Receipt:
    event = submission.event
    return Receipt(
        id=event.id,
        type=event.type,
        timestamp=event.timestamp,
        endpoints=tuple(owed.endpoint for owed in submission.endpoints),
        duplicate=duplicate,
    )
