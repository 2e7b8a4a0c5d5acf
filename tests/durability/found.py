"""The checker put to the test: what each planted fault must be found by."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

from tests.durability import runs, shim
from tests.durability.zygote import Zygote

FOUND = {
    "skips_the_sync": ("power", "lost"),
    "answers_before_the_commit": ("killed", "lost"),
    "marks_delivered_before_sending": ("killed", "misrecorded"),
    "drops_one_in_a_thousand": ("calm", "lost"),
    "new_id_on_retry": ("calm", "id_changes"),
    "one_id_for_two": ("calm", "id_collisions"),
    "serialises_again": ("calm", "body_mismatch"),
    "signs_with_an_old_time": ("calm", "bad_signature"),
    "delivers_twice": ("calm", "unexplained_duplicates"),
    "delivers_what_nobody_posted": ("calm", "unexpected"),
    "retries_early": ("calm", "early_retries"),
    "never_gives_up": ("calm", "too_many_attempts"),
    "retries_in_a_year": ("calm", "undrained"),
    "loses_an_attempt_row": ("calm", "unrecorded"),
    "dies_without_a_reason": ("calm", "orphans"),
    "forgets_an_endpoint": ("calm", "wrong_fan_out"),
    "breaks_the_order": ("calm", "overlaps"),
    "forgets_what_a_key_was_for": ("calm", "conflicts_taken"),
}
AT_ONCE = 4


async def hunt(zygote: Zygote, folder: Path, names: Iterable[str] = FOUND) -> list[str]:
    """Plant each of these faults, and none; return what was missed or found wrongly."""
    missed: list[str] = []
    turns = asyncio.Semaphore(AT_ONCE)

    async def run(name: str | None, how: str, expected: str | None) -> None:
        events = 1050 if name == "drops_one_in_a_thousand" else 160
        async with turns:
            report = await runs.planted(folder, zygote, name, how, events=events)
        if expected is None and report.broken:
            missed.append(f"found although nothing was planted:\n{report}")
        elif expected is not None and expected not in report.broken:
            missed.append(f"{name} was not found as {expected}:\n{report}")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run(None, "calm", None))
        for name in names:
            how, expected = FOUND[name]
            if how != "power" or shim.build() is not None:
                tasks.create_task(run(name, how, expected))
    return missed
