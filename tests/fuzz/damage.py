"""What fuzzers share: damaged texts from a seeded source of chance, how long to go on, and a tally."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

_SHOWN = 300


@dataclass(slots=True)
class Budget:
    """How long to go on: so many inputs, or so many seconds."""

    count: int | None = None
    seconds: float | None = None
    _begun: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[int]:
        number = 0
        while not self._spent(number):
            yield number
            number += 1

    def _spent(self, number: int) -> bool:
        if self.count is not None and number >= self.count:
            return True
        return self.seconds is not None and time.monotonic() - self._begun >= self.seconds


@dataclass(slots=True)
class Tally:
    """What came of it: how many inputs there were, and each that was not handled cleanly, with the reason."""

    tried: int = 0
    unclean: list[str] = field(default_factory=list)

    def note(self, given: object, problem: str | None) -> None:
        """Count one input; `problem` says what was wrong with what it made."""
        self.tried += 1
        if problem is not None:
            self.unclean.append(f"{problem}: {given!r:.{_SHOWN}}")


def spliced(chance: Random, corpus: list[str], tokens: list[str]) -> str:
    """Take one text of the corpus and damage it a few times: cut, doubled, turned, or with a token put in."""
    text = chance.choice(corpus)
    for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
        at = chance.randint(0, len(text))
        match chance.randrange(6):
            case 0:
                text = text[:at] + chance.choice(tokens) + text[at:]
            case 1:
                text = text[:at] + text[at + chance.randint(1, 4) :]
            case 2:
                text = text[:at] + chance.choice(corpus)[chance.randrange(8) :]
            case 3:
                text = (
                    text[:at]
                    + chr(chance.choice((chance.randrange(128), chance.randrange(0x3000))))
                    + text[at:]
                )
            case 4:
                text = text[:at] + text[max(0, at - 5) : at] * chance.choice((2, 2, 200)) + text[at:]
            case _:
                text = text.swapcase() if chance.random() < 0.2 else text[:at] + text[at:][::-1]
    return text
