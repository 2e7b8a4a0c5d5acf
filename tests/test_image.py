"""The image as a container runtime runs it: `python -m pytest -m image`, apart from everything else.

It wants root, debootstrap, buildah, podman and runc, and takes minutes. The base is a stand-in, Debian's own
Python under the real base's name, because the real one cannot be had everywhere: our Dockerfile is tried
here, not what it is built on.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import free_port

pytestmark = pytest.mark.image

ROOT = Path(__file__).parent.parent
BASE = "docker.io/library/python:3.13-slim"
TOOLS = ("debootstrap", "buildah", "podman", "runc")
PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
CERTIFICATES = "/etc/ssl/certs"  # whom this machine trusts, the build trusts too
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")  # else those of a larger machine


class Engine:
    """buildah and podman on a storage of their own, which is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._storage = (
            *("--root", str(folder / "storage"), "--runroot", str(folder / "run")),
            *("--storage-driver", "overlay"),
        )

    def buildah(self, *words: str, within: float = 120.0, fails: bool = False) -> str:
        return self._run("buildah", *self._storage, *words, within=within, fails=fails)

    def podman(self, *words: str, within: float = 60.0, fails: bool = False) -> str:
        engine = ("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none")
        return self._run("podman", *self._storage, *engine, *words, within=within, fails=fails)

    def _run(self, *command: str, within: float, fails: bool) -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=within)
        assert (done.returncode != 0) == fails, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in TOOLS):
        pytest.skip(f"wants root, {', '.join(TOOLS)}")
    folder = tmp_path_factory.mktemp("image")
    each = Engine(folder)
    try:
        yield each
    finally:
        each.podman("rm", "--all", "--force")
        each.buildah("rmi", "--all", "--force")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    """Build the image on the stand-in; return its name."""
    root, packed = engine.folder / "base", engine.folder / "base.tar"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "trixie", str(root)]
    subprocess.run(command, capture_output=True, check=True, timeout=900)
    subprocess.run(["tar", "-C", root, "-cf", packed, "."], check=True, timeout=300)
    working = engine.buildah("from", "scratch")
    engine.buildah("add", "--quiet", working, str(packed), "/")
    engine.buildah("config", "--env", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", working)
    engine.buildah("commit", "--quiet", "--format", "docker", working, BASE)
    engine.buildah("rm", working)
    built = ("bud", "--format", "docker", "--pull=never", "--isolation", "chroot", "--network", "host")
    engine.buildah(*built, "--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro", "--tag", "relay", ".", within=900)
    return "relay"


def test_the_image_says_how_it_is_to_be_run(engine, image):
    """An orchestrator reads this and asks nobody."""
    told = json.loads(engine.buildah("inspect", "--type", "image", image))["Docker"]["config"]
    assert told["User"] == "10001:10001"
    assert told["Healthcheck"]["Test"] == ["CMD", "relay", "healthcheck"]
    assert told["StopSignal"] == "SIGTERM"
    assert list(told["Volumes"]) == ["/var/lib/relay"]
    assert told["Entrypoint"] + told["Cmd"] == ["relay", "serve", "--config", "/etc/relay/relay.toml"]


def test_it_serves_as_pid_1_of_nobody_on_a_read_only_root_and_stops_in_order(engine, image):
    """All that a careful operator takes away from a container, and SIGTERM to the only process there is."""
    config = engine.folder / "relay.toml"
    config.write_text(f'[server]\nlisten = "127.0.0.1:{free_port()}"\n')
    config.chmod(0o644)
    for parent in (engine.folder, engine.folder.parent):
        parent.chmod(0o755)
    engine.podman(
        *("run", "--detach", "--name", "relay", "--network", "host", *LIMITS, "--log-driver", "k8s-file"),
        *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),  # noqa: S108
        *("--volume", f"{config}:/etc/relay/relay.toml:ro", image),
    )
    asking = "for _ in $(seq 100); do relay healthcheck 2>/dev/null && exit 0; sleep 0.1; done; exit 1"
    engine.podman("exec", "relay", "sh", "-c", asking)
    status = engine.podman("exec", "relay", "cat", "/proc/1/status").split("\n")
    assert {"Name:\trelay", "Uid:\t10001\t10001\t10001\t10001", "CapEff:\t0000000000000000"} <= set(status)
    assert engine.podman("exec", "relay", "relay", "version").startswith("relay ")
    engine.podman("exec", "relay", "touch", "/anywhere", fails=True)
    engine.podman("exec", "relay", "touch", "/var/lib/relay/here")

    engine.podman("stop", "--time", "20", "relay")

    assert engine.podman("inspect", "relay", "--format", "{{.State.ExitCode}}") == "0"
