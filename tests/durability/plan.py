"""What a run consists of, all of it a function of its seed: events, receivers, answers."""

import hashlib
import json
import random
from dataclasses import dataclass

AWKWARD = (
    "plain",
    "Grüße, 世界, 🦊",
    'quo"ted \\ back',
    "line\nbreak\ttab",
    "\u2028 and \u2029",
    "</script>",
    "\u0001\u001f\u007f",
)
TYPES = ("load.a", "load.b", "load.c")
KEYS = 12  # ordering keys in use


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """One event as the driver posts it; `body` is what receivers must get, to the byte."""

    number: int
    type: str
    key: str | None
    body: bytes

    @property
    def submission(self) -> bytes:
        order = f',"key":"{self.key}"' if self.key is not None else ""
        return self.body[:-1] + order.encode() + b"}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


def post(seed: int, number: int) -> Post:
    # Written as JavaScript would: Python's json agrees on all of this (numbers as keys come first).
    chance = random.Random(f"{seed}/post/{number}")
    data = {
        "z": chance.choice(AWKWARD),
        "n": number,
        "a": [
            chance.randrange(-(2**53), 2**53),
            chance.random() < 0.5,
            None,
            (chance.randrange(64) * 2 + 1) / 128,
        ],
        "pad": chance.randbytes(chance.choice((8, 200, 200, 200, 3000))).hex(),
        "": {"10": [], "b": {}, "nested": chance.choice(AWKWARD)},
    }
    type_ = TYPES[number % len(TYPES)]
    day = f"2026-01-{1 + number % 28:02d}T10:00:00.{number % 1000:03d}Z"
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    body = f'{{"event":"{type_}","timestamp":"{day}","data":{text}}}'.encode()
    key = f"k{chance.randrange(KEYS)}" if number % 2 else None
    return Post(number=number, type=type_, key=key, body=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One receiver, its entry in the config, and how often it misbehaves (shares of its answers)."""

    id: str
    events: tuple[str, ...]
    ordered: bool = False
    refuses: float = 0.0  # 503
    dawdles: float = 0.0  # takes it, after 30 to 120 ms
    hangs: float = 0.0  # takes it, after the relay has given up waiting
    cuts: float = 0.0  # reads it and drops the connection
    hopeless: int = 0  # every so many-th event is always refused, until the receiver is healed
    timeout_seconds: float = 2.0
    schedule_ms: tuple[int, ...] = (60, 90, 120, 150, 200, 250, 300)
    concurrency: int = 32

    def wants(self, type_: str) -> bool:
        return any(
            each in ("*", type_) or (each.endswith(".*") and type_.startswith(each[:-1]))
            for each in self.events
        )

    def answer(self, seed: int, number: int, attempt: int, nth: int) -> "Answer":
        """Decide the answer to the nth request for a delivery."""
        if self.hopeless and number % self.hopeless == 1:
            return Answer(status=503)
        share = random.Random(f"{seed}/{self.id}/{number}/{attempt}/{nth}").random()
        for limit, answer in (
            (self.refuses, Answer(status=503)),
            (self.dawdles, Answer(delay=0.03 + 0.09 * share)),
            (self.hangs, Answer(delay=self.timeout_seconds + 0.2)),
            (self.cuts, Answer(cut=True)),
        ):
            if share < limit:
                return answer
            share -= limit
        return Answer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int = 200
    delay: float = 0.0
    cut: bool = False  # nothing is answered


STEADY = Endpoint(id="steady", events=("*",), dawdles=0.1)
FLAKY = Endpoint(
    id="flaky",
    events=("load.a", "load.b"),
    refuses=0.15,
    dawdles=0.1,
    hangs=0.002,
    cuts=0.03,
    hopeless=53,
)
ORDERED = Endpoint(id="ordered", events=("load.*",), ordered=True, refuses=0.1, dawdles=0.05, cuts=0.02)
THREE = (STEADY, FLAKY, ORDERED)
