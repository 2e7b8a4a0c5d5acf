"""A real relay in a process of its own, for tests that start, stop and kill it."""

import contextlib
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import orjson

# Below those that the system gives to outgoing connections, or somebody's connection may take one meanwhile.
PORTS = range(10_000, 32_000)


def free_port() -> int:
    """Return a port where nobody listens; by chance, because other tests look for one too."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def unmeasured() -> dict[str, str]:
    """Return our environment for a process whose coverage would only make it slow."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


class RelayProcess:
    """`python -m relay serve`, its config and its outbox in one folder."""

    def __init__(
        self,
        folder: Path,
        config: str,
        environment: Mapping[str, str] | None = None,
        outbox: str | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.config = folder / "relay.toml"
        self.outbox = outbox or f'path = "{folder / "relay.db"}"'
        self.configure(config)
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "relay.log").read_text()

    def configure(self, config: str, server: str = "") -> None:
        """Write the config anew; `server` goes into its first table."""
        self.config.write_text(
            f'[server]\nlisten = "127.0.0.1:{self.port}"\n{server}\n'
            f"[outbox]\n{self.outbox}\n"
            f'[egress]\nallow_private = ["127.0.0.0/8", "::1/128"]\n{config}'
        )

    def start(self) -> None:
        with (self.folder / "relay.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "relay", "serve", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        self.wait_until_ready()

    def wait_until_ready(self, within: float = 60.0) -> None:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, f"the relay ended:\n{self.log}"
            with contextlib.suppress(OSError):
                if self.call("GET", "/readyz")[0] == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"not ready within {within} s:\n{self.log}")

    def call(
        self, method: str, path: str, content: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, object]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            body = content if content is None or isinstance(content, bytes) else orjson.dumps(content)
            connection.request(method, path, body, {"Content-Type": "application/json"} | dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, orjson.loads(text) if text[:1] in b"{[" and text else text.decode()
        finally:
            connection.close()

    def kill(self) -> None:
        """Kill -9: nothing is closed, nothing is said."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self, within: float = 60.0) -> int:
        """Stop in order; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


@contextlib.contextmanager
def relay_process(
    folder: Path,
    config: str,
    environment: Mapping[str, str] | None = None,
    *,
    start: bool = True,
    outbox: str | None = None,
) -> Iterator[RelayProcess]:
    process = RelayProcess(folder, config, environment, outbox)
    try:
        if start:
            process.start()
        yield process
    finally:
        process.end()
