"""Samples in, rows of a document and a table for people out."""

import statistics
from typing import Any

from tests.bench.budget import Figure, Measurement


def row(measurement: Measurement, figure: Figure, samples: list[float]) -> dict[str, Any]:
    """One figure with its budget, what came out, and what to say of it; on a curve, also where."""
    median = statistics.median(samples)
    place = {} if measurement.at is None else {"at": measurement.at}
    return {
        "measurement": measurement.name,
        **place,
        "figure": figure.name,
        "unit": figure.unit,
        "floor": figure.floor,
        "aim": figure.aim,
        "at_least": figure.at_least,
        "median": median,
        "min": min(samples),
        "max": max(samples),
        "samples": samples,
        "verdict": verdict(figure, median),
    }


def verdict(figure: Figure, median: float) -> str:
    """Say which of floor and aim are met; the floor is the one that counts."""
    if figure.floor is not None and not within(figure, figure.floor, median):
        return "floor MISSED"
    if figure.aim is not None:
        return "aim met" if within(figure, figure.aim, median) else "aim missed"
    return "" if figure.floor is None else "floor met"


def within(figure: Figure, bound: float, value: float) -> bool:
    return value >= bound if figure.at_least else value <= bound


def table(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out in columns."""
    lines = [("figure", "floor", "aim", "median", "min to max", "")]
    for each in rows:
        sign = "≥ " if each["at_least"] else "≤ "
        floor, aim = ("" if each[name] is None else f"{sign}{each[name]:g}" for name in ("floor", "aim"))
        spread = f"{short(each['min'])} to {short(each['max'])}"
        median = f"{short(each['median'])} {each['unit']}"
        name = f"{each['figure']}, {each['measurement']} {each['at']:,}" if "at" in each else each["figure"]
        lines.append((name, floor, aim, median, spread, each["verdict"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def short(value: float) -> str:
    """Write a number with three digits that count, or all of them before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text(document: dict[str, Any]) -> str:
    """Write a document for the eye: what was measured on, then its rows."""
    lines = [f"{name}: {value}" for name, value in document["machine"].items()]
    return "\n".join((*lines, "", table(document["figures"])))
