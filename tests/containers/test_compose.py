"""The images and the plain compose file, for real: built, run, run again, looked into.

Needs a Docker engine (``make containers``; .ci/run starts one); skipped with the reason where none answers. Everything happens
in a copy of the working tree with a Compose project name of its own; as root, the copy's ``results/`` belongs to
another user, who must then own every file that the containers leave behind.

The tests build on each other in the order in which they stand: build, first run, second run, what can be seen from inside.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3000)]

PROJECT = Path(__file__).resolve().parents[2]
SUITE = os.environ.get("CONTAINER_SUITE", "smoke")
SOMEBODY = 12345
"""The user who owns the copy's results when the tests run as root."""


def run(*command: str, cwd: Path = PROJECT, env: dict[str, str] | None = None, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=cwd, env=env, timeout=timeout, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(f"$ {' '.join(command)}   [exit {done.returncode}, {time.monotonic() - started:.1f} s]\n{done.stdout}")
    return done


@dataclass
class Compose:
    """The compose file in a copy of the project, under a name of its own."""

    folder: Path
    env: dict[str, str]
    owner: int
    port: int
    outputs: dict[str, str] = field(default_factory=dict)
    records: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, *arguments: str, timeout: float = 1800, **env: str) -> subprocess.CompletedProcess[str]:
        return run("docker", "compose", *arguments, cwd=self.folder, env={**self.env, **env}, timeout=timeout)

    def inside(self, service: str, script: str) -> str:
        """What a Python script prints in a running service."""
        done = self("exec", "-T", service, "python", "-c", script)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def read_records(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.folder / "results" / "local" / "records").rglob("*.json"))}

    def get(self, path: str, host: str | None = None) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def has_table(output: str) -> bool:
    return all(part in output for part in ("Popularity", "Last item", "N@10"))


def free_port(wanted: int = 5000) -> int:
    """5000, as the README says, unless something listens there already."""
    for port in (wanted, 0):
        with socket.socket() as handle:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                handle.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(handle.getsockname()[1])
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    if shutil.which("docker") is None:
        pytest.skip("no docker client")
    if (answer := subprocess.run(["docker", "info"], capture_output=True, text=True)).returncode:
        pytest.skip(f"no Docker engine answers: {(answer.stderr or answer.stdout).strip().splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("clone") / "project"
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    (folder / "results").mkdir(exist_ok=True)
    owner = os.getuid()
    if owner == 0:
        owner = SOMEBODY
        for path in (folder, folder / "results", *(folder / "results").rglob("*")):
            os.chown(path, owner, owner)
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    port = free_port()
    env = {
        **os.environ,
        "COMPOSE_PROJECT_NAME": f"utgrec-test-{os.getpid()}",
        "SUITE": SUITE,
        "MLFLOW_PORT": str(port),
        "GIT_SHA": sha,
        "COMPOSE_PROGRESS": "plain",
    }
    for name in ("COMPOSE_FILE", "DEVICE", "FLASH_ATTN"):
        env.pop(name, None)
    it = Compose(folder, env, owner, port)
    yield it
    it("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "10")


def test_compose_file_keeps_its_promises(compose: Compose) -> None:
    """No Docker socket, no GPU in the plain file; the worker has no network, no answers, no powers; one service has internet."""
    shown = compose("--profile", "*", "config", "--format", "json")
    assert shown.returncode == 0
    plan = json.loads(shown.stdout)
    services = plan["services"]
    assert set(services) == {"benchmark", "worker", "mlflow", "data", "tests"}
    assert "docker.sock" not in shown.stdout
    assert "nvidia" not in json.dumps([service.get("deploy") for service in services.values()])

    worker = services["worker"]
    assert worker["network_mode"] == "none"
    assert worker["read_only"] is True
    assert worker["cap_drop"] == ["ALL"]
    assert not worker.get("cap_add")
    assert worker["security_opt"] == ["no-new-privileges:true"]
    mounts = {(mount["source"], mount.get("read_only", False)) for mount in worker["volumes"]}
    assert mounts == {("jobs", False), ("public", True), (str(compose.folder / "data" / "huggingface"), True)}
    assert "MLFLOW_TRACKING_URI" not in worker["environment"]

    def has_internet(service: dict[str, dict[str, object]]) -> bool:
        for name in service.get("networks", {}):
            network = plan["networks"][name]
            if (
                not network.get("internal")
                and network.get("driver_opts", {}).get("com.docker.network.bridge.enable_ip_masquerade") != "false"
            ):
                return True
        return not service.get("networks") and service.get("network_mode") != "none"

    assert [name for name, service in services.items() if has_internet(service)] == ["data"]

    gpu = json.loads(compose("-f", "docker-compose.yml", "-f", "docker/compose.gpu.yml", "config", "--format", "json").stdout)["services"]
    assert gpu["worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert not gpu["benchmark"].get("deploy")
    assert gpu["worker"]["build"]["args"]["DEVICE"] == "cuda"
    assert gpu["worker"]["network_mode"] == "none"


def test_images_build(compose: Compose) -> None:
    done = compose("build", "benchmark", "mlflow")
    assert done.returncode == 0, done.stdout[-4000:]
    sizes = run("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}", "--filter", "reference=utgrec-bench*")
    assert "utgrec-bench:cpu" in sizes.stdout


def test_a_code_change_reinstalls_nothing(compose: Compose) -> None:
    touched = compose.folder / "harness" / "touched.py"
    touched.write_text('"""A change of code."""\n')
    done = compose("build", "benchmark")
    touched.unlink()
    assert done.returncode == 0
    assert "venv: installing" not in done.stdout
    assert "[benchmark requirements" in done.stdout  # the step is there, and came from the cache


def test_first_run_ends_with_a_table(compose: Compose) -> None:
    """The README's command. All planned runs are done in the worker, at isolation level container, and logged to MLflow."""
    done = compose("up", "--exit-code-from", "benchmark", "benchmark")
    compose.outputs["first"] = done.stdout
    compose.records = compose.read_records()
    assert done.returncode == 0, done.stdout[-6000:]
    assert compose.records
    for name, content in compose.records.items():
        record = json.loads(content)
        assert record["status"]["state"] in ("ok", "skipped"), (name, record["status"])
        if record["status"]["state"] == "ok":
            assert record["isolation"]["level"] == "container", (name, record["isolation"])
            assert record["isolation"]["network"] is True
            assert record["provenance"]["git_sha"] == compose.env["GIT_SHA"]
    assert has_table(done.stdout)
    assert "NO GPU IS USED" in done.stdout


def test_second_run_resumes_and_retrains_nothing(compose: Compose) -> None:
    """Plain ``up``, as a user types it: exits by itself; records stay as they are, to the byte; MLflow goes on serving."""
    started = time.monotonic()
    done = compose("up", "benchmark")
    seconds = time.monotonic() - started
    assert done.returncode == 0
    assert compose.read_records() == compose.records
    assert has_table(done.stdout)
    print(f"second up: {seconds:.0f} s")


def test_mlflow_answers_on_this_machine(compose: Compose) -> None:
    assert compose.get("/health") == (200, "OK")
    assert compose.get("/", host="evil.example")[0] == 403
    status, answer = compose.get("/api/2.0/mlflow/experiments/search?max_results=100")
    assert status == 200
    names = [experiment["name"] for experiment in json.loads(answer)["experiments"]]
    assert any(SUITE in name for name in names), names


def test_services_find_each_other_by_name_and_nothing_else(compose: Compose) -> None:
    script = (
        "import socket, urllib.request as u\n"
        "print(u.urlopen('http://mlflow:5000/health', timeout=20).read().decode())\n"
        "try: socket.create_connection(('1.1.1.1', 443), 4); print('INTERNET')\n"
        "except OSError as error: print('no internet:', error)\n"
    )
    done = compose("run", "--rm", "-T", "--no-deps", "benchmark", "python", "-c", script)
    assert done.returncode == 0
    assert "OK" in done.stdout
    assert "no internet" in done.stdout
    assert "no internet" in compose.inside("mlflow", script.replace("mlflow:5000", "127.0.0.1:5000"))


def test_worker_is_shut_in(compose: Compose) -> None:
    """From inside the worker: no network device, nothing writable but its places, no powers, no answers and no results."""
    seen = json.loads(
        compose.inside(
            "worker",
            """
import json, os, socket
def writable(folder):
    try:
        path = os.path.join(folder, "probe"); open(path, "w").close(); os.unlink(path); return True
    except OSError: return False
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
places = ["/", "/app", "/app/results", "/app/baselines", "/opt/venv", "/opt/environments", "/public", "/etc", "/jobs", "/tmp"]
found = []
for root in ("/jobs", "/public", "/app/data", "/app/results", "/tmp"):
    for folder, folders, files in os.walk(root):
        found += [os.path.join(folder, name) for name in folders + files]
print(json.dumps({
    "network": sorted(os.listdir("/sys/class/net")),
    "writable": [place for place in places if writable(place)],
    "uid": os.getuid(), "capabilities": status["CapBnd"].strip(), "no_new_privileges": status["NoNewPrivs"].strip(),
    "private": [p for p in found if "private" in p.split("/") or any(word in os.path.basename(p) for word in ("targets", "ranks"))],
    "records": [p for p in found if "records" in p.split("/")], "socket": os.path.exists("/var/run/docker.sock"),
    "environment": [n for n in os.environ if "MLFLOW_TRACKING" in n],
}))
""",
        )
    )
    assert seen.pop("uid") == 10001
    assert seen == {
        "network": ["lo"],
        "writable": ["/jobs", "/tmp"],
        "capabilities": "0000000000000000",
        "no_new_privileges": "1",
        "private": [],
        "records": [],
        "socket": False,
        "environment": [],
    }


def test_files_on_the_host_belong_to_the_caller(compose: Compose) -> None:
    mine = [path for top in ("results", "data") for path in (compose.folder / top, *(compose.folder / top).rglob("*"))]
    assert len(mine) > 10
    strangers = [f"{path} belongs to {path.lstat().st_uid}" for path in mine if path.lstat().st_uid != compose.owner]
    assert not strangers, strangers[:10]


def test_a_failure_is_passed_on(compose: Compose) -> None:
    done = compose("run", "--rm", "-T", "--no-deps", "benchmark", "harness", "run", "--suite", "nonesuch")
    assert done.returncode not in (0, 125, 126, 127)
    assert "nonesuch" in done.stdout


def test_data_service_answers(compose: Compose) -> None:
    done = compose("run", "--rm", "-T", "data", "--help")
    assert done.returncode == 0
    assert "simulate" in done.stdout


def test_tests_run_in_the_image(compose: Compose) -> None:
    """A quick part of what ``docker compose run --rm tests`` runs."""
    command = "python -m pytest -q -p no:cacheprovider tests/unit/test_metrics.py tests/unit/test_contract.py tests/unit/test_suite.py"
    done = compose("run", "--rm", "-T", "tests", *command.split())
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
