"""What commands print: tables for people, JSON for scripts."""

import json
from collections.abc import Mapping, Sequence


def show_json(content: object) -> None:
    print(json.dumps(content))


def show_table(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    for line in table(columns, rows):
        print(line)


def table(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Write rows under their columns; nothing foreign can move the cursor or break a line."""
    cells = [[printable(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(text) for text in each) for each in zip(columns, *cells, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in (columns, *cells)
    ]


def printable(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(printable(each) for each in value) or "-"
        case _:
            return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in str(value))
