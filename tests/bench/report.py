"""Samples in, a table for people or JSON for machines out."""

import importlib.metadata
import importlib.util
import os
import platform
import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

from tests.bench.budget import Figure
from tests.bench.stage import Options, disk, filesystem


def row(figure: Figure, samples: list[float]) -> dict[str, Any]:
    """One figure with its budget, what came out, and what to say of it."""
    median = statistics.median(samples)
    return {
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
        lines.append((each["figure"], floor, aim, median, spread, each["verdict"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def short(value: float) -> str:
    """Write a number with three digits that count, or all of them before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine(options: Options) -> dict[str, Any]:
    """Describe what the figures were measured on."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "kernel": platform.release(),
        "disk": filesystem(disk()),
        "python": platform.python_version(),
        "aiohttp": importlib.metadata.version("aiohttp"),
        "sqlite": sqlite3.sqlite_version,
        "loop": loop_name(options.loop),
        "rounds": options.rounds,
        "events": options.events,
        "self_test": options.self_test,
    }


def loop_name(kind: str) -> str:
    if kind == "asyncio" or not importlib.util.find_spec("uvloop"):
        return "asyncio"
    return f"uvloop {importlib.metadata.version('uvloop')}"
