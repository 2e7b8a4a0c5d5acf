"""What is installed is what was pinned, and what runs needs next to nothing: files, image, pod."""

import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from relay.config import load
from tests.process import RelayProcess, free_port, relay_process
from tests.raw import head, speak
from tests.receiver import Receiver
from tests.test_docs import README, ROOT, block

PINNED = ROOT / ".ci" / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+)(?: ; (.*?))?((?: --hash=sha256:[0-9a-f]{64})+)")
WANTED = {
    "ci": PROJECT["project"]["dependencies"] + EXTRAS["dev"],
    "image": PROJECT["project"]["dependencies"] + EXTRAS["uvloop"] + EXTRAS["postgres"],
    "build": PROJECT["build-system"]["requires"],
}


def pins(name: str) -> dict[str, set[str]]:
    """Return each package of a file with its versions; several when Pythons differ."""
    versions: dict[str, set[str]] = {}
    text = (PINNED / f"{name}.txt").read_text().replace(" \\\n    ", " ")
    for line in text.splitlines():
        match = PIN.fullmatch(line)
        assert match, f"not pinned with a hash: {line}"
        versions.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    return versions


@pytest.mark.parametrize("name", WANTED)
def test_every_dependency_is_pinned_with_hashes_as_pyproject_wants_it(name):
    """After a change of pyproject.toml `.ci/lock` has to run."""
    pinned = pins(name)
    for each in map(Requirement, WANTED[name]):
        versions = pinned.get(canonicalize_name(each.name), set())
        assert versions, f"{each.name} is not in {name}.txt: run .ci/lock"
        assert all(version in each.specifier for version in versions), f"{each}: run .ci/lock"


def test_what_is_tested_is_what_runs():
    tested = pins("ci")
    for name in ("image", "build"):
        assert {each: tested.get(each) for each in pins(name)} == pins(name)


def test_the_pins_name_no_place_to_get_them_from():
    for path in PINNED.iterdir():
        assert not re.search(r"https?:|file:|index-url|find-links|git\+", path.read_text()), path


def test_there_is_a_wheel_for_every_python_and_platform_of_the_image():
    """A hash for each of many files: of one machine alone there would be a handful."""
    text = (PINNED / "image.txt").read_text().replace(" \\\n    ", " ")
    hashes = {match[1]: match[4].count("--hash") for match in map(PIN.fullmatch, text.splitlines()) if match}
    assert hashes["aiohttp"] > 40
    assert hashes["uvloop"] > 20


def test_the_image_and_ci_install_what_was_pinned_and_nothing_else():
    dockerfile, ci = (ROOT / "Dockerfile").read_text(), (ROOT / ".ci" / "run").read_text()
    installs = re.findall(r"pip install ([^\\&\n]*)", dockerfile)
    assert len(installs) == 3
    for each in installs:
        assert (
            "--require-hashes --only-binary :all: -r requirements/" in each or "--no-deps --no-index" in each
        )
    assert "--require-hashes --only-binary :all: --requirement .ci/requirements/ci.txt" in ci


def test_the_readmes_command_lists_what_the_image_holds(tmp_path):
    (command,) = block("sbom", "sh")
    listed = tmp_path / "relay.cdx.json"
    script = command.replace(".venv/bin/", f"{Path(sys.executable).parent}/").replace(
        "relay.cdx.json", str(listed)
    )
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, check=True, timeout=60)
    bom = json.loads(listed.read_text())
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["name"] == "relay"
    components = {(canonicalize_name(each["name"]), each["version"]) for each in bom["components"]}
    assert components == {(name, version) for name, versions in pins("image").items() for version in versions}
    assert all(each["purl"].startswith("pkg:pypi/") for each in bom["components"])


def test_the_same_source_makes_the_same_wheel(tmp_path):
    """So that who doubts a wheel can build it and compare."""
    made = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / name)]
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1760000000"}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60, env=environment)
        made += [each.read_bytes() for each in (tmp_path / name).iterdir()]
    assert len(made) == 2
    assert made[0] == made[1]


def test_the_readme_answers_the_eighteen_questions():
    section = README.partition("\n## Security\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| [A-Z][^|]*\? \| \S", line)]
    assert len(rows) == 18


# Running with next to nothing

BUSY = """[delivery]
retry_schedule = []
[[endpoints]]
id = "main"
url = "{url}"
events = ["*"]
secret = "s"
"""


@contextlib.contextmanager
def confined(folder: Path, config: str) -> Iterator[RelayProcess]:
    """Run a relay as the image does: as nobody, in a root that is read-only, with one folder to write to."""
    folder.chmod(0o711)
    data, settings = folder / "data", folder / "config"
    for each in (data, settings):
        each.mkdir(mode=0o755)
    os.chown(data, 10001, 10001)
    with relay_process(folder, config, start=False) as process:
        text = process.config.read_text().replace(str(folder / "relay.db"), "/data/relay.db")
        (settings / "relay.toml").write_text(text)
        read_only = ("/usr", "/bin", "/lib", "/lib64", "/etc", sys.base_prefix, sys.prefix, str(ROOT))
        binds = [word for path in read_only if Path(path).exists() for word in bound(path)]
        sandbox = [
            "bwrap", *binds, "--ro-bind", str(settings), "/config", "--bind", str(data), "/data",
            "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/", "--die-with-parent", "--clearenv",
            "--setenv", "PYTHONDONTWRITEBYTECODE", "1", "--chdir", "/data",
            "setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups", "--no-new-privs",
            "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all",
        ]  # fmt: skip
        command = [sys.executable, "-m", "relay", "serve", "--config", "/config/relay.toml"]
        with (folder / "relay.log").open("ab") as log:
            process.process = subprocess.Popen([*sandbox, *command], stdout=log, stderr=log)
        process.wait_until_ready()
        yield process


def bound(path: str) -> Iterator[str]:
    """Show a path, read-only; the folders above it are made open to all, which those of root may not be."""
    for parent in reversed(Path(path).parents[:-1]):
        yield from ("--dir", str(parent))
    yield from ("--ro-bind", path, path)


def inside(process: RelayProcess) -> int:
    """Return the relay's own process id: that of the sandbox's child."""
    children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text().split()
    return int(children[0]) if children else process.process.pid


async def test_the_relay_runs_as_nobody_in_a_read_only_root_with_no_capability(tmp_path):
    """Whoever broke in would own one folder; the same as `docker run --read-only --cap-drop ALL …`."""
    if os.geteuid() != 0 or shutil.which("bwrap") is None or shutil.which("setpriv") is None:
        pytest.skip("wants root, bubblewrap and setpriv")
    async with Receiver(tls=False) as receiver:
        with confined(tmp_path, "allow_http = true\n" + BUSY.format(url=receiver.url)) as process:
            for _ in range(5):
                event = {"event": "a", "data": 1}
                assert process.call("POST", "/v1/events", event)[0] == 202
            assert speak(process.port, head("GET /v1/backup HTTP/1.1", "Connection: close")).statuses == [200]
            await receiver.wait_for(5)
            pid = inside(process)
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
            written = written_to(pid)
            os.kill(pid, 15)
            assert process.process.wait(15) == 0, process.log
    assert status["Uid"].split() == ["10001"] * 4
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    (root,) = [options for _, at, _, options, *_ in mounts if at == "/"]
    assert "ro" in root.split(",")
    assert written
    assert {path for path in written if not path.startswith("/data/")} == set()
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "data").iterdir()} == {0o600}
    assert '"level":"error"' not in process.log


def written_to(pid: int) -> set[str]:
    """Return the files that a process has open for writing, its log aside."""
    paths = set()
    for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
        target = str(Path(f"/proc/{pid}/fd/{descriptor.name}").readlink())
        flags = int(re.search(r"flags:\s+(\d+)", descriptor.read_text())[1], 8)
        if flags & os.O_ACCMODE and target.startswith("/") and int(descriptor.name) > 2:
            paths.add(target)
    return {path for path in paths if not path.startswith("/dev/")}


# The pod

(MANIFEST,) = block("kubernetes", "yaml")
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def violations(pod: dict[str, Any]) -> list[str]:
    """Return what breaks the pod security standard "restricted" (which includes "baseline")."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if pod.get(name)]
    found += [f"volume {each['name']}" for each in pod.get("volumes", []) if set(each) - {"name"} - VOLUMES]
    outer = pod.get("securityContext", {})
    found += [name for name in ("sysctls", "seLinuxOptions", "windowsOptions") if name in outer]
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        own = container.get("securityContext", {})
        found += [f"{container['name']}: {wrong}" for wrong in container_violations(container, outer, own)]
    return found


def container_violations(
    container: dict[str, Any], outer: dict[str, Any], own: dict[str, Any]
) -> Iterator[str]:
    both = outer | own
    checks = {
        "runAsNonRoot": both.get("runAsNonRoot") is True,
        "runAsUser": both.get("runAsUser") != 0,
        "seccompProfile": both.get("seccompProfile", {}).get("type") in {"RuntimeDefault", "Localhost"},
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "privileged": not own.get("privileged"),
        "capabilities": own.get("capabilities", {}).get("drop") == ["ALL"],
        "added capabilities": set(own.get("capabilities", {}).get("add", [])) <= {"NET_BIND_SERVICE"},
        "procMount": own.get("procMount", "Default") == "Default",
        "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        "probe to a host": '"host"' not in json.dumps(container),
        "seLinuxOptions": "seLinuxOptions" not in own,
    }
    return (name for name, kept in checks.items() if not kept)


def test_the_readmes_pod_is_restricted():
    pod = yaml.safe_load(MANIFEST)["spec"]["template"]["spec"]
    assert violations(pod) == []
    assert pod["automountServiceAccountToken"] is False
    assert all(each["securityContext"]["readOnlyRootFilesystem"] for each in pod["initContainers"])


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "hostNetwork": lambda pod: pod.update(hostNetwork=True),
    "volume config": lambda pod: pod["volumes"][0].update(hostPath={"path": "/"}),
    "relay: runAsNonRoot": lambda pod: pod["securityContext"].pop("runAsNonRoot"),
    "relay: runAsUser": lambda pod: pod["initContainers"][0]["securityContext"].update(runAsUser=0),
    "relay: seccompProfile": lambda pod: pod["securityContext"].pop("seccompProfile"),
    "relay: capabilities": lambda pod: pod["initContainers"][0]["securityContext"].pop("capabilities"),
    "app: allowPrivilegeEscalation": lambda pod: pod["containers"][0].pop("securityContext"),
    "relay: hostPort": lambda pod: pod["initContainers"][0]["ports"][0].update(hostPort=80),
}


@pytest.mark.parametrize("name", SPOILED)
def test_the_check_of_the_pod_can_fail(name):
    pod = copy.deepcopy(yaml.safe_load(MANIFEST)["spec"]["template"]["spec"])
    SPOILED[name](pod)
    assert name in violations(pod)


def test_the_manifest_is_what_kubernetes_understands():
    import kubernetes_validate

    manifest = yaml.safe_load(MANIFEST)
    kubernetes_validate.validate(manifest, "1.33", strict=True)
    manifest["spec"]["template"]["spec"]["initContainers"][0]["restartpolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_the_pods_probes_find_what_they_ask_for(tmp_path):
    relay = yaml.safe_load(MANIFEST)["spec"]["template"]["spec"]["initContainers"][0]
    assert relay["restartPolicy"] == "Always", "which is what makes an init container a sidecar"
    port = str(free_port())
    environment = {each["name"]: each["value"] for each in relay["env"]}
    assert load(ROOT / "config.example.toml", environment).server.ops_listen is not None
    environment = {
        name: text.replace("0.0.0.0:8485", f"127.0.0.1:{port}") for name, text in environment.items()
    }
    assert [each["containerPort"] for each in relay["ports"]] == [8485]
    with relay_process(tmp_path, "", environment):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = relay[probe]["httpGet"]
            assert asked["port"] == relay["ports"][0]["name"]
            request = head(f"GET {asked['path']} HTTP/1.1", "Connection: close", host="10.244.0.7:8485")
            assert speak(int(port), request).statuses == [200], "a kubelet names the pod's address"
    image = (ROOT / "Dockerfile").read_text()
    assert f"USER {relay['securityContext']['runAsUser']}:{relay['securityContext']['runAsGroup']}" in image
    assert f"VOLUME {relay['volumeMounts'][0]['mountPath']}" in image
