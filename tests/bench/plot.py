"""The curves of a document, drawn: one small picture each, all from zero, so that flat looks flat."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.curves import CURVES
from tests.bench.processes import UnmeasuredError

COLUMNS = 4
SHOWN = {"endpoints": 1, "fan-out": 1, "body": 1, "pending": 1}  # the CPU; of the others what comes first


def plot(documents: list[dict[str, Any]], file: Path) -> None:
    """Draw each curve: the median of every place, and the spread of its rounds as a bar."""
    rows = [each for document in documents for each in document["figures"] if "at" in each]
    drawn = [curve for curve in CURVES if any(each["measurement"] == curve.name for each in rows)]
    if not drawn:
        raise UnmeasuredError("there are no curves to draw: they come from --curves")
    mpl.rcParams |= {
        "svg.hashsalt": "relay",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    lines = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 2.7 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flat
    for curve, axis in itertools.zip_longest(drawn, axes):
        if curve is None:
            axis.set_axis_off()
            continue
        shown = curve.figures[SHOWN.get(curve.name, 0)]
        points = [each for each in rows if (each["measurement"], each["figure"]) == (curve.name, shown.name)]
        draw(axis, points)
        axis.set_title(f"{shown.name}, {shown.unit}" if shown.unit else shown.name, loc="left", fontsize=10)
        axis.set_xlabel(curve.of)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def draw(axis: Axes, points: list[dict[str, Any]]) -> None:
    # Places are written evenly spaced: they grow by about the same factor, and zero is one of them.
    places = range(len(points))
    medians = [each["median"] for each in points]
    below = [each["median"] - each["min"] for each in points]
    above = [each["max"] - each["median"] for each in points]
    axis.errorbar(places, medians, yerr=[below, above], marker="o", markersize=4, capsize=3, color="#1f5fa8")
    for place, median in zip(places, medians, strict=True):
        axis.annotate(
            f"{median:,.0f}", (place, median), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_xticks(places, [spelled(each["at"]) for each in points])
    axis.set_xlim(-0.4, len(points) - 0.6)
    axis.set_ylim(0, max(each["max"] for each in points) * 1.25)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def spelled(number: int) -> str:
    for size, sign in ((10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:g}{sign}"
    return str(number)
