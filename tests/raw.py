"""Requests as bytes, for what no HTTP client would send."""

import contextlib
import re
import socket
from typing import NamedTuple

import orjson


class Answer(NamedTuple):
    """What came back until the other side closed or nothing came any more."""

    text: bytes
    closed: bool

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/[0-9.]+ ([0-9]{3}) ", self.text)]

    @property
    def problem(self) -> dict[str, object]:
        """The first answer, which has to be a whole problem+json with its length."""
        head, _, rest = self.text.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        assert fields[b"content-type"] == b"application/problem+json", self.text
        problem = orjson.loads(rest[: int(fields[b"content-length"])])
        assert problem["status"] == self.statuses[0]
        return problem


def head(line: str, *fields: str, host: str | None = "localhost") -> bytes:
    """Write a head; the fields are whole lines."""
    hosts = [f"Host: {host}"] if host is not None else []
    return "\r\n".join([line, *hosts, *fields, "", ""]).encode("latin-1")


def speak(port: int, data: bytes, *, patience: float = 5.0) -> Answer:
    """Send bytes and return what is answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as stream:
        with contextlib.suppress(OSError):  # refused in the middle of it: the answer says why
            stream.sendall(data)
        return listen(stream)


def listen(stream: socket.socket) -> Answer:
    """Return all that comes until the end, or until the stream's time-out."""
    text = b""
    try:
        while piece := stream.recv(1 << 16):
            text += piece
    except TimeoutError:
        return Answer(text, closed=False)
    except OSError:
        pass
    return Answer(text, closed=True)
