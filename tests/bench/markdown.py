"""A document in, the README's tables out."""

from typing import Any

Row = dict[str, Any]


def markdown(document: dict[str, Any]) -> str:
    """Write a document's tables, and a line that says on what, with how many rounds and when."""
    rows: list[Row] = document["figures"]
    if "systems" in document:
        tables = compared(document["systems"], rows)
    elif any("at" in each for each in rows):
        tables = curves(rows)
    else:
        tables = budgets(rows)
    return "\n".join((*tables, "", origin(document)))


def budgets(rows: list[Row]) -> list[str]:
    lines = ["| figure | floor | aim | measured |", "|---|---|---|---|"]
    for each in rows:
        floor, aim = bound(each, "floor"), bound(each, "aim")
        lines.append(f"| {each['figure']} | {floor} | {aim} | {measured(each)}{judged(each)} |")
    return lines


def compared(systems: list[dict[str, Any]], rows: list[Row]) -> list[str]:
    found = {each["figure"]: each for each in rows}
    lines = [
        "| system | events/s | CPU per event, all processes | memory without the app "
        "| relay's events/s against it | relay's CPU against it | what it keeps |",
        "|---|---|---|---|---|---|---|",
        "| **relay**, one request an event, `full` "
        f"| {value(found['relay events/s'])} | {value(found['relay CPU per event'])} "
        f"| {value(found['relay memory'])} | | | all |",
    ]
    for system in systems:
        name = system["name"]
        cells = (f"{name} events/s", f"{name} CPU per event", f"{name} memory")
        plain = " | ".join(value(found[cell]) for cell in cells)
        speed, cpu = found[f"events/s against {name}"], found[f"CPU per event against {name}"]
        against = f"{measured(speed)}{judged(speed)} | {measured(cpu)}"
        lines.append(f"| {name} | {plain} | {against} | {system['keeps']} |")
    for system in systems:
        versions = ", ".join(f"{name} {version}" for name, version in system["versions"].items())
        lines += ["", f"{system['name']}: {system['settings']} ({versions})."]
    return lines


def curves(rows: list[Row]) -> list[str]:
    by_curve: dict[str, dict[str, list[Row]]] = {}
    for each in rows:
        by_curve.setdefault(each["measurement"], {}).setdefault(each["figure"], []).append(each)
    lines = ["| what grows | places | figure | medians |", "|---|---|---|---|"]
    for curve, figures in by_curve.items():
        for figure, points in figures.items():
            places = " / ".join(f"{each['at']:,}" for each in points)
            medians = " / ".join(short(each["median"]) for each in points)
            medians = f"{medians} {points[0]['unit']}".rstrip()
            lines.append(f"| {curve} | {places} | {figure} | {medians} |")
        if curve.startswith("connections") and len(figures["RSS"]) > 1:
            lines.append(f"| {curve} | | memory of each | {each_kilobytes(figures['RSS']):.0f} kB |")
    return lines


def each_kilobytes(points: list[Row]) -> float:
    """Divide what memory grew by from the first place to the last among the connections that came."""
    first, last = points[0], points[-1]
    return float((last["median"] - first["median"]) / (last["at"] - first["at"]) * 1e3)


def origin(document: dict[str, Any]) -> str:
    machine = document["machine"]
    loads = [each["load_average"][0] for each in document["rounds"]]
    return (
        f"Medians of {machine['rounds']} rounds with their spread, on {machine['date'][:10]} at commit "
        f"`{machine['commit']}`: {machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, "
        f"{machine['disk']}, an fsync {machine['fsync_ms']} ms, Python {machine['python']}, "
        f"aiohttp {machine['packages']['aiohttp']}, SQLite {machine['sqlite']}, {machine['loop']}; "
        f"load average {min(loads):.1f} to {max(loads):.1f}."
    )


def bound(row: Row, name: str) -> str:
    if row[name] is None:
        return ""
    return f"{'≥' if row['at_least'] else '≤'} {row[name]:g} {row['unit']}".rstrip()


def measured(row: Row) -> str:
    spread = f" ({short(row['min'])} to {short(row['max'])})" if row["min"] != row["max"] else ""
    return f"{value(row)}{spread}"


def value(row: Row) -> str:
    return f"{short(row['median'])} {row['unit']}".rstrip()


def judged(row: Row) -> str:
    """Say what was missed; what was met needs no word."""
    return {"floor MISSED": ", **floor missed**", "aim missed": ", aim missed"}.get(row["verdict"], "")


def short(number: float) -> str:
    """Write a number with three digits that count, or all of them before the point."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
