"""Tables as HTML and as text: whatever stands in a cell stays text there."""

import unicodedata
from html import escape

from relay.page.tables import HEADINGS, NOTHING, Cell, Table

TITLES = {"endpoints": "Endpoints", "failures": "Recent failures", "dead": "Dead deliveries"}
ROW_HEADING = "Endpoint"
WIDEST = 60  # characters of a cell, as text


def escaped(text: str) -> str:
    """Write foreign text so that it is not markup, in an element or in quotes, and all of it is seen."""
    return escape("".join(_seen(each) for each in text), quote=True)


def html(name: str, table: Table | None) -> str:
    """Write head and body of a table; without one, of one that the script is to fill."""
    headings = HEADINGS[name]
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    rows = table.rows if table is not None else ()
    body = "".join(
        f"<tr>{''.join(_cell(heading, cell) for heading, cell in zip(headings, row, strict=True))}</tr>"
        for row in rows
    )
    if not rows:
        body = f'<tr class="nothing"><td colspan="{len(headings)}">{NOTHING[name]}</td></tr>'
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def _cell(heading: str, cell: Cell) -> str:
    first, *others = cell
    lines = escaped(first) + "".join(f"<small>{escaped(each)}</small>" for each in others)
    element = "th" if heading == ROW_HEADING else "td"
    scope = ' scope="row"' if element == "th" else ""
    return f'<{element}{scope} data-label="{heading}">{lines}</{element}>'


def text(table: Table) -> str:
    """Write a table in columns; nothing foreign can move the cursor or break a line."""
    title = TITLES[table.id].upper()
    if not table.rows:
        return f"{title}\n{NOTHING[table.id]}\n"
    rows = [[_printable(" ".join(cell)) for cell in row] for row in table.rows]
    headings = [heading.lower() for heading in HEADINGS[table.id]]
    widths = [max(len(each) for each in column) for column in zip(headings, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    )
    return "\n".join([title, *lines, ""])


def _seen(character: str) -> str:
    """Write out what cannot be seen: control characters, changes of direction."""
    unseen = unicodedata.category(character).startswith("C") and character not in "\n\t"
    return f"\\u{{{ord(character):x}}}" if unseen else character


def _printable(cell: str) -> str:
    shown = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in cell)
    return shown if len(shown) <= WIDEST else shown[: WIDEST - 1] + "…"
