"""Nothing lost: killed, cut off, stopped and frozen relays, judged afterwards from the logs of all sides.

The same runs, as long as you like, by `python -m tests.durability`.
"""

from collections.abc import AsyncIterator

import pytest

from relay.outbox.schema import VERSIONS
from tests.durability import runs, shim
from tests.durability.found import FOUND, hunt
from tests.durability.migrations import killed_migrations
from tests.durability.plan import Endpoint
from tests.durability.planted import PLANTS
from tests.durability.world import World
from tests.durability.zygote import Zygote
from tests.figures import figure

needs_compiler = pytest.mark.skipif(
    shim.build() is None, reason="the disk that fails is a C library for Linux; there is no compiler here"
)


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    async with Zygote(shim.build()) as started:
        yield started


@pytest.mark.long
async def test_the_checker_finds_planted_faults_and_nothing_else(tmp_path, zygote):
    """A checker that cannot fail proves nothing. Every second fault here, all by the command."""
    assert set(FOUND) == set(PLANTS)
    planted = list(FOUND)[::2]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    missed = await hunt(zygote, tmp_path / "first", planted)
    if missed:  # some show only if a kill falls into a moment that a busy machine may make too short
        missed = await hunt(zygote, tmp_path / "second", planted)
    assert not missed, "\n".join(missed)
    figure("planted faults found / planted", f"{len(planted)} / {len(planted)}")


def healthy(result: runs.Result, told: str) -> None:
    assert not result.report.broken, str(result.report)
    figures = result.report.figures
    acknowledged, duplicates = figures["acknowledged"], figures["duplicates"]
    figure(f"{told}: n", result.trials)
    figure(f"{told}: lost / acknowledged", f"0 / {acknowledged}")
    figure(f"{told}: unexplained / duplicates", f"0 / {duplicates}")


async def test_kill_9_at_random_under_load_loses_nothing(tmp_path, zygote):
    result = await runs.kills(tmp_path, zygote, cycles=1000, seconds=6, seed=20261124)
    assert result.trials > 0
    healthy(result, "kills")


async def test_each_kill_between_the_answer_and_its_record_is_one_duplicate(tmp_path, zygote):
    """At least once: what was answered and not recorded comes again, once, under the same id."""
    result = await runs.between_answer_and_record(tmp_path, zygote, count=20, seed=3)
    healthy(result, "kills between a 2xx and its record")
    assert result.report.figures["duplicates"] == 20


@needs_compiler
async def test_a_power_cut_takes_nothing_that_was_acknowledged(tmp_path, zygote):
    """Only what was synced is left, or some of the rest in any order."""
    for seed in (5, 6, 7):  # a cut on a busy machine may find all synced
        result = await runs.power_cuts(tmp_path / f"{seed}", zygote, cycles=12, seed=seed)
        healthy(result, "power cuts")
        if result.counts["blocks"] > 0:
            break
    assert result.counts["blocks"] > 0, "something unsynced was there to be lost"
    healthy(result, "power cuts")


@needs_compiler
async def test_the_same_power_cuts_take_events_when_commits_are_not_synced(tmp_path, zygote):
    """Else the test above would prove nothing."""
    result = await runs.power_cuts(tmp_path, zygote, cycles=2, seed=5, durability="normal")
    lost = result.report.broken["lost"]
    figure('power cuts with durability = "normal": deliveries lost', f"{lost} in {result.trials}")


@pytest.mark.long
@needs_compiler
async def test_an_end_after_any_storage_call_loses_nothing(tmp_path, zygote):
    """In turn by kill -9 and by a power cut; the command does both at each."""
    result = await runs.kill_points(tmp_path, zygote, seed=11, power=(False, True))
    assert result.trials > 50
    healthy(result, "storage calls, an end after each")


@needs_compiler
@pytest.mark.parametrize("version", range(1, len(VERSIONS)))
async def test_a_migration_that_is_killed_is_completed_by_the_next_start(tmp_path, zygote, version):
    """At some of its storage calls; the command does it at each."""
    result = await killed_migrations(tmp_path, zygote, seed=41, version=version, numbers=range(3, 60, 6))
    assert result.trials > 4
    healthy(result, f"storage calls of a start on schema {version}, a kill after each")


@pytest.mark.long
@needs_compiler
async def test_an_error_at_any_storage_call_loses_nothing_and_ends_in_order(tmp_path, zygote):
    """At every second one, each kind of error in turn; the command tries all at each."""
    result = await runs.disk_errors(tmp_path, zygote, seed=13, faults=runs.FAULTS, every=2)
    assert not result.report.examples["exit codes"], "\n".join(result.report.examples["exit codes"])
    healthy(result, "storage calls, an error at each")


@needs_compiler
async def test_one_trouble_after_another_loses_nothing(tmp_path, zygote):
    result = await runs.nemesis(tmp_path, zygote, faults=10, seed=17)
    healthy(result, "troubles")


@needs_compiler
async def test_a_sync_slower_than_a_retry_ends_nothing(tmp_path, zygote):
    """An outcome that is recorded late is due again at once, and claimed before its attempt is over."""
    unwilling = Endpoint(id="unwilling", events=("*",), refuses=0.7, schedule_ms=(5,) * 60)
    async with World(tmp_path / "w", zygote, seed=37, endpoints=[unwilling], shimmed=True) as world:
        await world.start()
        world.disk[shim.SLOW_SYNC_MS] = 30
        await world.driver.post(40, at_once=40)
        assert await world.drained(), world.log[-2000:]
        report = await world.finish()
    assert not report.broken, str(report)
