"""How a command ends: the exit codes of contract section 9, and the error that carries one."""

from enum import IntEnum


class Exit(IntEnum):
    """What the exit code tells a script."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 69
    DISK = 74  # the outbox is damaged, or its disk is failing
    TIMED_OUT = 75  # or the outbox is held by another relay
    CONFIG = 78  # or the outbox is of a newer relay
    INTERRUPTED = 130


class CommandError(Exception):
    """A command cannot do what it was asked; the text is one sentence for the person who asked."""

    def __init__(self, sentence: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(sentence)
        self.code = code
