"""A damaged outbox: the exit code, one sentence of advice, and not a byte changed."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from relay.outbox import DamagedError, open_outbox
from tests.process import RelayProcess, relay_process
from tests.test_outbox import NOW, submission

ENDPOINT = '[[endpoints]]\nid = "main"\nurl = "https://127.0.0.1:9/"\nevents = ["*"]\nsecret = "s"\n'


def used(folder: Path) -> Path:
    """Leave an outbox as a relay does that was killed: with its log ahead of the file."""
    with relay_process(folder, ENDPOINT) as relay:
        for number in range(300):
            status, _ = relay.call(
                "POST", "/v1/events", {"event": "a", "data": {"n": number, "x": "y" * 500}}
            )
            assert status == 202
        relay.kill()
    return folder / "relay.db"


def hashes(folder: Path) -> dict[str, str]:
    return {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest()
        for each in folder.iterdir()
        if each.name.startswith("relay.db")
        and each.stat().st_size
        and not each.name.endswith(("lock", "shm"))
    }


def start(folder: Path) -> tuple[int, list[str]]:
    """Start a relay that is to refuse; return its exit code and what it said of the failure."""
    config = RelayProcess(folder, ENDPOINT).config
    ended = subprocess.run(
        [sys.executable, "-m", "relay", "serve", "--config", str(config)],
        capture_output=True, text=True, timeout=20, check=False, env=os.environ,
    )  # fmt: skip
    assert "Traceback" not in ended.stderr
    return ended.returncode, [line for line in ended.stderr.splitlines() if '"failed"' in line]


def settle(path: Path) -> None:
    """Put the log ahead into the file, as if the relay was killed right then: it would heal the file."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    path.with_name("relay.db-wal").touch()


def header(path: Path) -> None:
    settle(path)
    with path.open("r+b") as file:
        file.write(b"\0" * 64)


def pages(path: Path) -> None:
    """Overwrite everything behind the first page."""
    settle(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def text(path: Path) -> None:
    settle(path)
    path.write_text("this is no database\n" * 100)


def foreign(path: Path) -> None:
    for each in path.parent.glob("relay.db*"):
        each.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (a)")
    db.close()


def log_ahead_lost(path: Path) -> None:
    path.with_name("relay.db-wal").unlink()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    settle(path)


@pytest.mark.parametrize(
    ("damage", "code", "advice"),
    [
        (header, 74, "restore a backup"),
        (pages, 74, "check the disk"),
        (text, 74, "restore a backup"),
        (foreign, 74, "choose another outbox.path"),
        (log_ahead_lost, 74, "put it back"),
        (newer, 78, "start the newer relay"),
    ],
)
def test_a_damaged_outbox_is_refused_with_advice_and_stays_as_it_is(tmp_path, damage, code, advice):
    """Whoever repairs it later needs every byte; a new and empty outbox in its place would hide the loss."""
    path = used(tmp_path)
    damage(path)
    before = hashes(tmp_path)

    refused, said = start(tmp_path)

    assert refused == code
    assert len(said) == 1
    assert advice in said[0]
    assert hashes(tmp_path) == before
    assert start(tmp_path)[0] == code, "also at the second try"
    assert hashes(tmp_path) == before


def test_a_log_ahead_that_is_lost_can_be_given_up_on_purpose(tmp_path):
    path = used(tmp_path)
    log_ahead_lost(path)
    assert start(tmp_path)[0] == 74
    path.with_name("relay.db.lock").unlink()
    with relay_process(tmp_path, ENDPOINT) as relay:
        assert relay.call("GET", "/readyz")[0] == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_a_relay_ended_the_next_one_starts(tmp_path, number):
    """The check for a lost log ahead must not mistake an ordinary end for a loss."""
    for _ in range(3):
        with relay_process(tmp_path, ENDPOINT) as relay:
            assert relay.call("POST", "/v1/events", {"event": "a", "data": 1})[0] == 202
            assert relay.process is not None
            relay.process.send_signal(number)
            relay.process.wait(15)


async def test_a_disk_that_fails_under_a_live_outbox_does_not_look_like_a_lost_log(tmp_path):
    path = tmp_path / "relay.db"
    with pytest.raises(ExceptionGroup):
        async with open_outbox(path) as outbox:
            await outbox.register(["main"])
            raise DamagedError("the disk fails")
    async with open_outbox(path) as outbox:
        await outbox.register(["main"])
        await outbox.accept([submission("a", at_ms=NOW)])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    relay = RelayProcess(tmp_path, ENDPOINT)
    text_ = relay.config.read_text().replace(str(tmp_path / "relay.db"), str(tmp_path / "file" / "relay.db"))
    relay.config.write_text(text_)
    ended = subprocess.run(
        [sys.executable, "-m", "relay", "serve", "--config", str(relay.config)],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert ended.returncode == 74
    assert "check outbox.path and its folder" in ended.stderr
