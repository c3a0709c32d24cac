"""One container a run, with a real engine and the real image (``docker compose build benchmark``, made here if it is missing).

Skipped with the reason where no engine answers; .ci/run starts one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.execute.docker import LABEL, DockerExecutor
from harness.execute.local import LocalExecutor
from harness.execute.outcome import read_stage_result
from harness.execute.stage import StageTask
from harness.method import load_method
from harness.paths import PROJECT, Paths
from harness.values import ConfigError
from tests.house import House, build_house, read_pid, wait_for

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]

SOMEBODY = 12345


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """A client of an engine that has the image."""
    import docker

    try:
        client = docker.from_env(timeout=60)
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    image = os.environ.get("HARNESS_IMAGE", f"{LABEL}:cpu")
    if not client.images.list(name=image):
        subprocess.run(["docker", "compose", "build", "benchmark"], cwd=PROJECT, check=True)
    yield client.api
    client.close()


@pytest.fixture
def house(engine: Any, tmp_path: Path) -> Iterator[House]:
    house = build_house(tmp_path)
    yield house
    assert containers(engine, house) == [], "a container was left"


@pytest.fixture
def executor(house: House) -> DockerExecutor:
    return DockerExecutor(house.paths)


def containers(engine: Any, house: House, everything: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engine.containers(all=everything, filters={"label": f"{LABEL}.results={house.paths.results}"})
    return found


def test_a_run_gives_what_it_gives_locally(house: House, executor: DockerExecutor) -> None:
    local = house.run(LocalExecutor(house.paths), "ok", "local")
    result = house.run(executor, "ok", "there")
    assert result["state"] == "ok", result
    assert [entry["path"] for entry in result["outputs"]] == [entry["path"] for entry in local["outputs"]]
    folder = house.paths.stages / "fake" / "there"
    lists = [np.load(house.paths.stages / "fake" / name / "out" / "predictions.npz")["items"] for name in ("local", "there")]
    assert np.array_equal(*lists)  # not byte by byte: the image may have another zlib
    assert json.loads((folder / "out" / "progress.jsonl").read_text())["metrics"] == {"loss": 0.5}
    assert (folder / "log.txt").read_text() == "done\n"
    assert result["isolation"]["level"] == "container"
    assert result["isolation"]["network"]


@pytest.mark.parametrize(
    ("do", "state", "reason"),
    [
        ("crash", "failed", "no luck today"),
        ("skip", "skipped", "no pictures"),
        ("link", "invalid_output", "not a regular file"),
        ("fifo", "invalid_output", "not a regular file"),
        ("no predictions", "invalid_output", "missing"),
    ],
)
def test_states(house: House, executor: DockerExecutor, do: str, state: str, reason: str) -> None:
    result = house.run(executor, do)
    assert result["state"] == state
    assert reason in result["reason"]


def test_limits(house: House, executor: DockerExecutor) -> None:
    assert house.run(executor, "hang", deadline=1)["state"] == "timeout"
    result = house.run(executor, "memory", memory=256 << 20)
    assert result["state"] == "oom", result


def test_a_method_of_the_project_and_a_resumed_stage(house: House, executor: DockerExecutor) -> None:
    method = load_method(PROJECT / "baselines" / "popularity", PROJECT)
    runner = DockerExecutor(Paths(PROJECT, house.paths.data, house.paths.results, (PROJECT / "baselines",)))
    with house.task("popularity") as task:
        outcome = runner.run(StageTask(task.folder, task.job, method, Path(sys.executable), task.lock))
        result = read_stage_result(outcome, task.folder, task.job, house.paths, last=True)
    assert result["state"] == "ok", result
    assert house.interrupt(DockerExecutor(house.paths), house.paths.caches / "fake" / "pid", "long")["state"] == "interrupted"
    assert house.run(executor, "resume", "long")["state"] == "ok"
    assert "found half" in (house.paths.stages / "fake" / "long" / "log.txt").read_text()


@pytest.mark.parametrize("user", ["caller", "somebody"])
def test_what_a_method_sees(house: House, executor: DockerExecutor, monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    """The files belong to the caller, and the caller's powers do not matter: ``somebody`` is a caller who is not root."""
    before = os.umask(0)  # lets the pretended caller write where this process makes the folders
    try:
        if user == "somebody":
            monkeypatch.setattr(os, "getuid", lambda: SOMEBODY)
            monkeypatch.setattr(os, "getgid", lambda: SOMEBODY)
        result = house.run(executor, "look", configuration={"secret": str(house.paths.private("tiny"))})
    finally:
        os.umask(before)
    assert result["state"] == "ok", result
    out = house.paths.stages / "fake" / "look" / "out"
    seen = json.loads((out / "look.json").read_text())
    assert seen["domains"] == ["domain.json", "items.parquet", "users.parquet"]
    assert seen["secret"] in ("FileNotFoundError", "PermissionError")
    for attempt in ("domain", "contract", "job", "program", "harness", "log", "status", "root"):
        assert seen[f"write {attempt}"] in ("PermissionError", "OSError"), attempt
    assert seen["network"] in ("OSError", "PermissionError", "TimeoutError")
    assert seen["interfaces"] == ["lo"]
    assert seen["capabilities"] == 0
    assert seen["new privileges"] == "1"
    assert seen["engine"] is False
    assert not {"DOCKER_HOST", "MLFLOW_TRACKING_URI"} & set(seen["variables"])
    assert seen["user"] == os.getuid()
    assert {path.stat().st_uid for path in out.iterdir()} == {os.getuid()}


def test_stop(house: House, executor: DockerExecutor) -> None:
    result = house.interrupt(executor, house.paths.caches / "fake" / "pid")
    assert result["state"] == "interrupted"
    assert (house.paths.stages / "fake" / "hang" / "checkpoint" / "weights").exists()
    assert house.run(executor, "ok")["state"] == "interrupted"


def test_a_killed_harness_ends_its_container(engine: Any, house: House) -> None:
    """The container ends by itself; the next start removes it, but not that of a harness that lives."""
    code = (
        "import sys; from pathlib import Path; from harness.paths import Paths; from harness.execute.docker import DockerExecutor\n"
        "from tests.house import House; root = Path(sys.argv[1])\n"
        "house = House(Paths(root / 'project', root / 'data', root / 'results', (root / 'methods',)), root / 'jobs', root / 'public')\n"
        "house.run(DockerExecutor(house.paths), 'hang', 'orphan')"
    )
    harness = subprocess.Popen([sys.executable, "-c", code, str(house.jobs.parent)], cwd=PROJECT)
    read_pid(house.paths.caches / "fake" / "pid")
    (running,) = containers(engine, house, everything=False)
    DockerExecutor(house.paths)
    assert [container["Id"] for container in containers(engine, house, everything=False)] == [running["Id"]]
    harness.kill()
    harness.wait()
    wait_for(lambda: not containers(engine, house, everything=False))
    assert len(containers(engine, house)) == 1
    DockerExecutor(house.paths)
    assert containers(engine, house) == []
    assert (house.paths.stages / "fake" / "orphan" / "checkpoint" / "weights").exists()


def test_the_environment_is_the_images(engine: Any, house: House, executor: DockerExecutor) -> None:
    environment = executor.environment()
    assert environment.image is not None
    assert engine.inspect_image(environment.image.partition("@")[2])["Id"] in environment.image
    assert "numpy" in environment.packages
    before = [path.stat().st_mtime_ns for path in (house.paths.results / "images").iterdir()]
    assert DockerExecutor(house.paths).environment() == environment
    assert [path.stat().st_mtime_ns for path in (house.paths.results / "images").iterdir()] == before


def test_what_is_missing_is_named(house: House) -> None:
    with pytest.raises(ConfigError, match="docker compose build benchmark"):
        DockerExecutor(house.paths, image="utgrec-bench:no-such-image")
    (house.paths.methods[0] / "fake" / "requirements.txt").write_text("nothing==1\n")
    result = house.run(DockerExecutor(house.paths), "ok")
    assert result["state"] == "failed"
    assert "lacks the environment" in result["reason"]


def test_the_worker_is_another_user_than_the_conductor(engine: Any, tmp_path: Path) -> None:
    """The jobs volume between two containers without capabilities, as compose starts them: every mode must be right."""
    house = build_house(tmp_path / "house")
    methods = tmp_path / "methods"
    shutil.copytree(house.paths.methods[0], methods)
    for path in (tmp_path, methods):
        path.chmod(0o755)
    volumes = [engine.create_volume()["Name"] for _ in range(2)]
    image = os.environ.get("HARNESS_IMAGE", f"{LABEL}:cpu")
    binds = [f"{PROJECT / name}:/app/{name}:ro" for name in ("harness", "tests")]
    binds += [f"{methods}:/methods:ro", f"{volumes[0]}:/jobs"]

    def start(user: str, command: list[str], public: str, groups: list[str]) -> Any:
        config = engine.create_host_config(
            binds=[*binds, f"{volumes[1]}:/public:{public}"],
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            tmpfs={"/tmp": "exec,mode=1777"},
            init=True,
            group_add=groups,
        )
        variables = {"HARNESS_CONTAINER": "worker" if public == "ro" else "conductor", "HARNESS_METHODS": "/methods"}
        container = engine.create_container(image, command=command, user=user, environment=variables, host_config=config)
        engine.start(container)
        return container

    worker = start("10001:10001", ["harness", "worker"], "ro", [])
    conductor = start(f"{SOMEBODY}:{SOMEBODY}", ["python", "-c", CONDUCTOR], "rw", ["10001"])
    try:
        engine.wait(conductor, timeout=240)
        said = engine.logs(conductor, stderr=True).decode()
        assert said.strip(), engine.logs(worker).decode()
        results = json.loads(said.splitlines()[-1])
        engine.stop(worker, timeout=20)
        assert engine.inspect_container(worker)["State"]["ExitCode"] == 0
    finally:
        for container in (worker, conductor):
            engine.remove_container(container, force=True)
        for volume in volumes:
            engine.remove_volume(volume)
    assert results == {
        "ok": "ok",
        "neighbour": "ok",
        "shut": "ok",
        "closed scratch": "ok",
        "inputs": "ok",
        "crash": "failed",
        "fifo": "invalid_output",
        "hang": "interrupted",
        "resume": "ok",
        "left": [],
        "levels": ["container"],
        "owner": [SOMEBODY],
        "network": [],
    }, said


CONDUCTOR = """
import json, shutil
from pathlib import Path
from dataclasses import replace
from tests.house import build_house, wait_for
house = build_house(Path("/tmp/house"))
house = replace(house, jobs=Path("/jobs"), public=Path("/public"), paths=replace(house.paths, methods=(Path("/methods"),)))
executor = house.executor()
first = Path("/tmp/first/deep")
first.mkdir(parents=True)
(first / "note").write_text("from the first stage")
results = {do: house.run(executor, do) for do in ("ok", "neighbour", "shut", "closed scratch", "crash", "fifo")}
results["inputs"] = house.run(executor, "inputs", inputs={"first": first.parent})
results["hang"] = house.interrupt(house.executor(), house.cache / "pid", "long")
results["resume"] = house.run(executor, "resume", "long")
house.run(executor, "ok")
folders = [house.jobs / name for name in ("tasks", "trash", "checkpoints/fake/long", "checkpoints/fake/closed-scratch")]
def left():
    return sorted(str(path) for folder in folders if folder.is_dir() for path in folder.iterdir())
try:
    wait_for(lambda: not left(), 15)
except AssertionError:
    pass
out = house.paths.stages / "fake" / "ok" / "out"
print(json.dumps({name: result["state"] for name, result in results.items()} | {
    "left": left(),
    "levels": sorted({result["isolation"]["level"] for result in results.values()}),
    "owner": sorted({path.stat().st_uid for path in out.iterdir()}),
    "network": sorted(name for name, result in results.items() if not result["isolation"]["network"]),
}))
"""
