"""The relay beside what teams use today: events/s and CPU per event of each, in turns within one round.

Counted is from the first hand-over to the last arrival, and the CPU of every process but the receiver: the
application that hands over, the broker, the workers; the application and the relay.
"""

from functools import partial

from tests.bench.budget import Figure, Measurement, Samples
from tests.bench.compared.rivals import RIVALS, Line, Rival, relay
from tests.bench.compared.setup import NAMES, missing, versions
from tests.bench.stage import Options, Stage
from tests.bench.tally import Tally

WARM_UP = 0.25  # of the events that are then counted; Celery and huey also come up meanwhile
BUDGETS = {"BullMQ": (0.7, 1.2)}  # of the events/s against it: floor and aim


def comparison(rivals: tuple[Rival, ...]) -> Measurement:
    """Return what measures the relay beside these."""
    return Measurement(
        name="comparison",
        round=partial(compare, rivals),
        figures=(
            Figure(name="relay events/s"),
            Figure(name="relay CPU per event", unit="µs"),
            Figure(name="relay memory", unit="MB"),
            *(figure for rival in rivals for figure in figures(rival.name)),
        ),
    )


def figures(name: str) -> tuple[Figure, ...]:
    floor, aim = BUDGETS.get(name, (None, None))
    return (
        Figure(name=f"events/s against {name}", floor=floor, aim=aim, at_least=True),
        Figure(name=f"CPU per event against {name}"),
        Figure(name=f"{name} events/s"),
        Figure(name=f"{name} CPU per event", unit="µs"),
        Figure(name=f"{name} memory", unit="MB"),
    )


async def compare(rivals: tuple[Rival, ...], stage: Stage) -> Samples:
    """Give each rival two turns, with one of the relay's before and one after."""
    samples: Samples = {}
    in_all = Tally()
    async with relay(stage) as ours:
        await take_turn(stage, ours, Tally(), WARM_UP)
        for rival in rivals:
            beside, theirs = Tally(), Tally()
            async with rival.open(stage) as line:
                await take_turn(stage, line, Tally(), rival.share * WARM_UP)
                for each, tally, share in (
                    (ours, beside, 0.5),
                    (line, theirs, rival.share / 2),
                    (line, theirs, rival.share / 2),
                    (ours, beside, 0.5),
                ):
                    await take_turn(stage, each, tally, share)
                samples |= against(rival.name, beside, theirs, line.megabytes())
            in_all += beside
        samples["relay memory"] = ours.megabytes()
    samples["relay events/s"] = in_all.events / in_all.seconds
    samples["relay CPU per event"] = in_all.cpu / in_all.events * 1e6
    return samples


async def take_turn(stage: Stage, line: Line, tally: Tally, share: float) -> None:
    """Bring a share of the round's events to the receiver and note what it took."""
    events = max(1, int(stage.options.events * share))
    cpu = line.cpu_seconds()
    handed = await stage.hand_over(line.app, line.carriers[-1], {"events": events})
    await line.rest()
    tally.events += events
    tally.seconds += handed["last_at"] - handed["started_at"]
    tally.cpu += line.cpu_seconds() - cpu


def against(name: str, ours: Tally, theirs: Tally, megabytes: float) -> Samples:
    return {
        f"events/s against {name}": (ours.events / ours.seconds) / (theirs.events / theirs.seconds),
        f"CPU per event against {name}": (ours.cpu / ours.events) / (theirs.cpu / theirs.events),
        f"{name} events/s": theirs.events / theirs.seconds,
        f"{name} CPU per event": theirs.cpu / theirs.events * 1e6,
        f"{name} memory": megabytes,
    }


def chosen(names: tuple[str, ...], options: Options) -> tuple[tuple[Rival, ...], dict[str, str]]:
    """Return who can be measured of those asked for, and why the others cannot."""
    reasons = {name: missing(name, options.tools) for name in names}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return tuple(rival for rival in RIVALS if rival.tool in names and rival.tool not in skipped), skipped


def described(rivals: tuple[Rival, ...], options: Options) -> list[dict[str, object]]:
    """Say of each who it is, for the document."""
    found = {name: versions(name, options.tools) for name in NAMES if name in {each.tool for each in rivals}}
    return [
        {
            "name": rival.name,
            "settings": rival.settings,
            "keeps": rival.keeps,
            "versions": found[rival.tool],
        }
        for rival in rivals
    ]
