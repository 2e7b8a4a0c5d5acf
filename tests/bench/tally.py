"""What a system's turns add up to."""

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Tally:
    """What a system's turns of one round add up to; times in seconds."""

    events: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    receiver_cpu: float = 0.0
    load_cpu: float = 0.0

    def __iadd__(self, other: "Tally") -> "Tally":
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self
