"""What was done to a relay, read as stretches of time: from the log of faults to when what explains what."""

from itertools import pairwise

from tests.durability.journal import Line

FOUND_MS = 2000  # a relay that ended by itself is found after so long at the latest


def crashes(faults: list[Line]) -> list[tuple[int, int]]:
    """Return from when to when outcomes can have gone unrecorded.

    A stop in order cuts off only what its grace was too short for; a second signal ends the grace.
    """
    grace_ms = next(line["grace_ms"] for line in faults if line["kind"] == "plan")
    found: list[tuple[int, int]] = []
    began: float | None = None
    for line in faults:
        if line["kind"] == "signal" and line["name"] == "SIGKILL":
            began = min(line["t"], began if began is not None else line["t"])
        elif line["kind"] == "signal" and line["name"] in ("SIGTERM", "SIGINT"):
            began = line["t"] + grace_ms if began is None else min(began, line["t"])
        elif line["kind"] == "ended":
            found_dead = line["t"] - FOUND_MS  # it ended by itself or by the shim, a little earlier
            first = found_dead if began is None else began
            if line["code"] != 0 and first > line["t"]:  # before the stop was over
                first = found_dead
            if first <= line["t"]:
                found.append((int(first), line["t"]))
            began = None
    return found


def freezes(faults: list[Line]) -> list[tuple[int, int]]:
    signals = [line for line in faults if line["kind"] == "signal" and line["name"] in ("SIGSTOP", "SIGCONT")]
    return [(stop["t"], go["t"]) for stop, go in pairwise(signals) if stop["name"] == "SIGSTOP"]


def failures(faults: list[Line]) -> list[tuple[int, int]]:
    """Return from when to when the disk failed."""
    found: list[tuple[int, int]] = []
    began: int | None = None
    for line in faults:
        if line["kind"] == "disk" and line["failing"]:
            began = line["t"]
        elif line["kind"] == "disk" and began is not None:
            found.append((began, line["t"]))
            began = None
    return found
