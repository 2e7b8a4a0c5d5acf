"""Where things stand in a TOML file: its text in, the line of every table and key out.

`tomllib` forgets positions, and a mistake is only half told without its line. The text is known to be
valid TOML when it comes here, so this scanner steps over values instead of reading them, and what it
does not expect cannot occur.
"""

import re
import tomllib
from bisect import bisect_right

Place = tuple[str | int, ...]  # ("endpoints", 2, "url"): names of keys and indices of lists

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BRACKETS = re.compile(r"[\[\]]{1,2}")
# A multi-line string may end in five quotes: up to two of its own before the three that close it.
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' r"'''.*?'{3,5}|" r'"(?:\\.|[^"\\])*"|' r"'[^']*'",
    re.DOTALL,
)
# Up to the end of the value: dates may hold a space.
_OTHER_VALUE = re.compile(r"[^,\]}#\n]+")


def lines_of(text: str) -> dict[Place, int]:
    """Map each table, key and entry of an array of tables to the line (from 1) where it first stands."""
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


class _Scanner:
    """A position in the text, and what was seen before it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._entries: dict[Place, int] = {}  # index of the latest [[entry]] of each array of tables
        self.lines: dict[Place, int] = {(): 1}

    def document(self) -> None:
        table: Place = ()
        self._take(_BLANK)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._assignment(table)
            self._take(_BLANK)

    def _header(self) -> Place:
        start = self._at
        opens_entry = self._take(_BRACKETS) == "[["
        *outer, last = self._key()
        place: Place = ()
        for name in outer:
            place = self._latest((*place, name))
        place = (*place, last)
        if opens_entry:
            self._entries[place] = self._entries.get(place, -1) + 1
        place = self._latest(place)
        self._take(_BRACKETS)
        self._note(place, start)
        return place

    def _latest(self, place: Place) -> Place:
        """Below the name of an array of tables, a header means its latest entry."""
        return (*place, self._entries[place]) if place in self._entries else place

    def _assignment(self, table: Place) -> None:
        start = self._at
        place = (*table, *self._key())
        self._note(place, start)
        self._at = self._text.index("=", self._at) + 1
        self._take(_SPACE)
        self._value(place)

    def _key(self) -> list[str]:
        names: list[str] = []
        while True:
            self._take(_SPACE)
            if self._text[self._at] in "\"'":
                # Escapes in a quoted key are read by the parser that reads the file.
                names.append(tomllib.loads(f"key = {self._take(_STRING)}")["key"])
            else:
                names.append(self._take(_BARE_KEY))
            self._take(_SPACE)
            if self._text[self._at] != ".":
                return names
            self._at += 1

    def _value(self, place: Place) -> None:
        match self._text[self._at]:
            case "[":
                self._array(place)
            case "{":
                self._note(place, self._at)
                self._inline_table(place)
            case '"' | "'":
                self._take(_STRING)
            case _:
                self._take(_OTHER_VALUE)

    def _array(self, place: Place) -> None:
        index = 0
        while self._next_item() != "]":
            self._value((*place, index))
            index += 1
        self._at += 1

    def _inline_table(self, place: Place) -> None:
        while self._next_item() != "}":
            self._assignment(place)
        self._at += 1

    def _next_item(self) -> str:
        """Step over an opening bracket or a comma to what follows: an item, or the closing bracket."""
        if self._text[self._at] in "[{,":
            self._at += 1
        self._take(_BLANK)
        if self._text[self._at] == ",":
            return self._next_item()
        return self._text[self._at]

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        taken = match.group() if match else ""
        self._at += len(taken)
        return taken

    def _note(self, place: Place, start: int) -> None:
        """Remember the line; a dotted name also makes the tables on its way."""
        line = bisect_right(self._newlines, start) + 1
        for length in range(1, len(place) + 1):
            self.lines.setdefault(place[:length], line)
