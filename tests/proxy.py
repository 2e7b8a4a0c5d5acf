"""A proxy for tests: a real server that takes CONNECT and makes the tunnel, or misbehaves as told."""

import asyncio
from collections.abc import Mapping
from typing import Self


class ConnectProxy:
    """Leads every tunnel to where `places` says, else to where it was asked for; notes what it was asked.

    `mode`: "tunnel"; "silent", which never answers; "closing", which hangs up; or a status to answer with.
    """

    def __init__(
        self, places: Mapping[str, tuple[str, int]] | None = None, *, mode: str | int = "tunnel"
    ) -> None:
        self.asked: list[str] = []
        self.heads: list[str] = []
        self.mode = mode
        self.port = 0
        self._places = places or {}
        self._tasks: set[asyncio.Task[None] | None] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            if task is not None:
                task.cancel()
        while self._tasks:
            await asyncio.sleep(0)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split(maxsplit=2)
        self.asked.append(f"{method} {target}")
        self.heads.append(head)
        if self.mode == "silent":
            await reader.read(-1)
        elif isinstance(self.mode, int):
            writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 4\r\n\r\nsorry"[:-1] % self.mode)
            await writer.drain()
            await reader.read(-1)
        elif self.mode == "tunnel":
            host, _, port = target.rpartition(":")
            there = await asyncio.open_connection(*self._places.get(target, (host.strip("[]"), int(port))))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(carry(reader, there[1]))
                    both.create_task(carry(there[0], writer))
            except* OSError:
                pass
            finally:
                there[1].transport.abort()


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionError("one side is done")
