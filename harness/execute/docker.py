"""One container a run, by the Docker SDK on a host: ``harness run --executor docker``.

In: a ``StageTask``. Out: the supervisor's outcome. The image gives the environment (packages, Python, system); the code is
mounted from this checkout, so that what runs is what the fit key names. The container has no network, a read-only root, no
capabilities, and sees of the host the public parts of its domains, its inputs, and its own folders:

    /app/harness  /app/METHOD or /methods/METHOD  /imports  /job.json  /spec.json  /domains/*  /inputs/*     read-only
    /out  /cache  /scratch  /checkpoint                                                                 the method's
    /desk (status)  /log.txt                                       the supervisor's, out of the method's reach by Landlock

The container's standard input is the supervisor's life line: a harness that is killed closes it, and the run ends.

    HARNESS_IMAGE    the image (default utgrec-bench:cuda where there is a GPU, else utgrec-bench:cpu, as compose builds it)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import contract, provenance
from harness.contract import DomainRef, InvalidOutput, write_json
from harness.execute.handover import broken, checked_outcome
from harness.execute.local import BOOT, interrupted, make_spec
from harness.execute.stage import StageFolder, StageTask, huggingface_home, remove_tree, stage_imports
from harness.method import Method
from harness.paths import PROJECT, Paths
from harness.record import Environment
from harness.supervise import TERM_GRACE
from harness.values import ConfigError, digest

APP = Path("/app")
LABEL = "utgrec-bench"
SLACK = 256 << 20
"""Memory for the supervisor beside the method's budget: the supervisor is to see an excess first and name it."""
TMP_BYTES = 1 << 30
PIDS = 4096
ABOUT = """
import json, os, platform, sys, sysconfig
from importlib import metadata
packages = {}
for name in sys.argv[1:]:
    try: packages[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
own = os.environ.get("HARNESS_ENVIRONMENTS", "")
print(json.dumps({
    "executable": sys.executable, "python": platform.python_version(), "packages": packages,
    "prefixes": sorted({sys.prefix, sys.base_prefix, sysconfig.get_paths()["purelib"]}),
    "environments": sorted(os.path.join(own, name) for name in os.listdir(own)) if os.path.isdir(own) else [],
}))
"""


def _sdk() -> Any:
    """The Docker SDK, imported where it is used. By name, because mypy takes the project's folder ``docker`` for it."""
    return importlib.import_module("docker")


class DockerExecutor:
    """Raises ConfigError where there is no engine or no image."""

    level = "container"

    def __init__(self, paths: Paths, image: str | None = None):
        self._paths = paths
        self._name = image or os.environ.get("HARNESS_IMAGE") or f"{LABEL}:{'cuda' if provenance.gpus() else 'cpu'}"
        self._stopped = threading.Event()
        with self._api() as api:
            self._image = self._find_image(api)
            self._cpus = float(api.info().get("NCPU") or 1)
            self._remove_leftovers(api)

    def stop(self) -> None:
        self._stopped.set()

    # ---------------------------------------------------------------------------------------- engine and image

    @contextlib.contextmanager
    def _api(self) -> Iterator[Any]:
        """A client for one thread."""
        docker = _sdk()

        try:
            client = docker.from_env(timeout=120)
        except docker.errors.DockerException as error:
            raise ConfigError(f"no Docker engine answers ({error}); `docker info` says more. Without Docker: --executor local") from error
        try:
            yield client.api
        finally:
            client.close()

    def _find_image(self, api: Any) -> dict[str, Any]:
        docker = _sdk()

        try:
            found: dict[str, Any] = api.inspect_image(self._name)
        except docker.errors.ImageNotFound:
            raise ConfigError(
                f"there is no image {self._name}: make it with `docker compose build benchmark`, or let HARNESS_IMAGE name another"
            ) from None
        return found

    @functools.cached_property
    def _variables(self) -> dict[str, str]:
        """The image's environment variables."""
        return dict(entry.split("=", 1) for entry in self._image["Config"].get("Env") or [])

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        """Python and packages of the image, asked once an image by a container that does nothing else."""
        key = digest({"image": self._image["Id"], "asked": [ABOUT, *provenance.RESULT_PACKAGES]})[:16]
        path = self._paths.results / "images" / f"{key}.json"
        with contextlib.suppress(OSError, ValueError):
            cached: dict[str, Any] = json.loads(path.read_text())
            return cached
        python = self._variables.get("HARNESS_PYTHON", "python")
        with self._api() as api:
            config = api.create_host_config(network_mode="none", read_only=True, cap_drop=["ALL"])
            entrypoint = [python, "-c", ABOUT, *provenance.RESULT_PACKAGES]
            container = api.create_container(
                self._image["Id"], entrypoint=entrypoint, command=[], user="65534:65534", host_config=config, labels=self._labels()
            )
            try:
                api.start(container)
                code = api.wait(container)["StatusCode"]
                said = api.logs(container, stdout=True, stderr=bool(code)).decode(errors="replace")
            finally:
                api.remove_container(container, force=True)
        if code:
            raise ConfigError(f"image {self._name}: its Python cannot be asked for its packages: {said.strip()[-500:]}")
        about: dict[str, Any] = json.loads(said)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
        return about

    def environment(self) -> Environment:
        """This machine, with the image's Python and packages."""
        return provenance.environment().model_copy(
            update={
                "image": f"{self._name}@{self._image['Id']}",
                "python": self._about["python"],
                "packages": self._about["packages"],
                "lock": None,
            }
        )

    def _python(self, method: Method) -> Path:
        """The method's Python in the image. Raises ConfigError where the image lacks the method's own environment."""
        if method.requirements is None:
            return Path(self._about["executable"])
        version = tuple(int(part) for part in self._about["python"].split(".")[:2])
        key = hashlib.sha256(method.requirements.read_bytes() + f"{version}".encode()).hexdigest()[:12]  # as harness.environments
        for folder in self._about["environments"]:
            if Path(folder).name == f"{method.name}-{key}":
                return Path(folder) / "bin" / "python"
        raise ConfigError(f"image {self._name} lacks the environment of {method.requirements}; `docker compose build benchmark` makes it")

    # ---------------------------------------------------------------------------------------------- one stage

    def run(self, task: StageTask) -> dict[str, Any]:
        import requests

        docker = _sdk()

        if self._stopped.is_set():
            return interrupted()
        desk = task.folder.path / "desk"
        try:
            remove_tree(desk)
            desk.mkdir()
            task.folder.log.touch()
            task.job.cache.mkdir(parents=True, exist_ok=True)
            mounts = self._prepare(task, desk)
            with self._api() as api:
                self._remove_leftovers(api, task.folder)
                outcome = self._run_container(api, task, mounts, desk)
            remove_tree(desk)
        except (docker.errors.DockerException, requests.exceptions.RequestException, ConfigError, OSError) as error:
            return broken(f"Docker could not run this: {error}")
        write_json(task.folder.path / "status.json", outcome)
        return outcome

    def _prepare(self, task: StageTask, desk: Path) -> dict[str, tuple[Path, bool]]:
        """Write job, imports and spec with the container's paths. Returns the mounts: target -> (source, writable)."""
        stage_imports(task.folder.imports, task.method, self._paths.project)
        mounts: dict[str, tuple[Path, bool]] = {"/app/harness": (PROJECT / "harness", False), "/imports": (task.folder.imports, False)}
        for source in task.method.source_folders(self._paths.project):
            mounts[str(self._inside(source, task.method))] = (source, False)
        for domain in task.job.domains:
            mounts[f"/domains/{domain.name}"] = (domain.path, False)
        for name, folder in task.job.inputs.items():
            mounts[f"/inputs/{name}"] = (folder, False)
        own = {"/out": task.job.output, "/cache": task.job.cache, "/scratch": task.job.scratch, "/checkpoint": task.job.checkpoint}
        mounts |= {target: (source, True) for target, source in {**own, "/desk": desk, "/log.txt": task.folder.log}.items()}
        mounts |= {f"/{name}": (task.folder.path / name, False) for name in ("job.json", "spec.json")}

        job = dataclasses.replace(
            task.job,
            domains=tuple(DomainRef(domain.name, Path("/domains", domain.name)) for domain in task.job.domains),
            inputs={name: Path("/inputs", name) for name in task.job.inputs},
            output=Path("/out"),
            cache=Path("/cache"),
            scratch=Path("/scratch"),
            checkpoint=Path("/checkpoint"),
        )
        there = dataclasses.replace(
            task,
            folder=StageFolder(Path("/")),
            job=job,
            method=task.method.model_copy(update={"folder": self._inside(task.method.folder, task.method)}),
            python=self._python(task.method),
            gpu=None if task.gpu is None else 0,  # the container sees one GPU only
        )
        spec = make_spec(there, dataclasses.replace(self._paths, project=APP), set(self._about["prefixes"]))
        spec["status"] = "/desk/status.json"
        spec["env"].pop("LD_LIBRARY_PATH", None)  # that of this machine
        spec["env"] |= {"LD_LIBRARY_PATH": self._variables["LD_LIBRARY_PATH"]} if "LD_LIBRARY_PATH" in self._variables else {}
        if huggingface_home().is_dir():
            mounts["/huggingface"] = (huggingface_home(), False)
            spec["env"]["HF_HOME"] = "/huggingface"
            spec["read"].append("/huggingface")
        job.write(task.folder.path / "job.json")
        write_json(task.folder.path / "spec.json", spec)
        return mounts

    def _inside(self, source: Path, method: Method) -> Path:
        """What a folder or module of the project, or of a method elsewhere, is called in the container."""
        if source.is_relative_to(self._paths.project):
            return APP / source.relative_to(self._paths.project)
        return Path("/methods", method.name)

    def _create(self, api: Any, task: StageTask, mounts: dict[str, tuple[Path, bool]]) -> Any:
        docker = _sdk()

        budget = task.job.budget
        gpus = [docker.types.DeviceRequest(device_ids=[str(task.gpu)], capabilities=[["gpu", "compute", "utility"]])]
        config = api.create_host_config(
            mounts=[
                docker.types.Mount(target, str(source.resolve()), type="bind", read_only=not writable)
                for target, (source, writable) in mounts.items()
            ],
            network_mode="none",
            read_only=True,
            tmpfs={"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={TMP_BYTES}"},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            mem_limit=budget.memory + SLACK,
            memswap_limit=budget.memory + SLACK,
            nano_cpus=int(min(budget.threads, self._cpus) * 1e9),
            pids_limit=PIDS,
            shm_size=budget.memory // 2,
            init=True,
            device_requests=gpus if task.gpu is not None else None,
        )
        return api.create_container(
            self._image["Id"],
            entrypoint=[self._about["executable"], "-I", "-S", "-c", BOOT, str(APP), "/spec.json"],
            command=[],
            user=f"{os.getuid()}:{os.getgid()}",
            environment={"HARNESS_CONTAINER": "worker"},
            working_dir="/",
            stdin_open=True,
            labels=self._labels(task.folder, f"{task.job.run_id}/{task.job.stage}"),
            host_config=config,
        )

    def _run_container(self, api: Any, task: StageTask, mounts: dict[str, tuple[Path, bool]], desk: Path) -> dict[str, Any]:
        container = self._create(api, task, mounts)
        try:
            lifeline = api.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            try:
                api.start(container)
                said = self._watch(api, container, getattr(lifeline, "_sock", lifeline), task.job.budget.deadline)
            finally:
                lifeline.close()
            api.wait(container, timeout=60)
            state = api.inspect_container(container)["State"]
        finally:
            api.remove_container(container, force=True, v=True)
        return _outcome(desk / "status.json", state, said)

    def _watch(self, api: Any, container: Any, line: socket.socket, deadline: float) -> bytes:
        """Until the container ends. Returns the start of what the supervisor printed (nothing, if all is well), in the engine's frames."""
        said, asked = b"", False
        kill_at = time.monotonic() + deadline + TERM_GRACE + 60  # for a supervisor that hangs itself
        while True:
            if select.select([line], [], [], 0.2)[0]:
                data = line.recv(1 << 16)
                if not data:
                    return said
                said += data[: max(0, 4096 - len(said))]
            if self._stopped.is_set() and not asked:
                asked, kill_at = True, time.monotonic() + TERM_GRACE + 10
                line.shutdown(socket.SHUT_WR)
            if time.monotonic() > kill_at:
                kill_at = float("inf")
                api.kill(container)

    # --------------------------------------------------------------------------------------- leftover containers

    def _labels(self, folder: StageFolder | None = None, run: str = "") -> dict[str, str]:
        return {f"{LABEL}.results": str(self._paths.results), f"{LABEL}.stage": str(folder.path) if folder else "", f"{LABEL}.run": run}

    def _remove_leftovers(self, api: Any, mine: StageFolder | None = None) -> None:
        """Remove what killed harnesses left: at the start all whose stage nobody holds, before a stage those of that stage."""
        docker = _sdk()

        wanted = f"{LABEL}.stage={mine.path}" if mine else f"{LABEL}.results={self._paths.results}"
        for container in api.containers(all=True, filters={"label": wanted}):
            stage = container["Labels"].get(f"{LABEL}.stage")
            with contextlib.ExitStack() as held:
                if mine is None and not stage and container["State"] == "running":
                    continue  # another harness asks the image for its packages
                if mine is None and stage and Path(stage).is_dir() and held.enter_context(StageFolder(Path(stage)).locked()) is None:
                    continue  # another harness on these results runs it now
                with contextlib.suppress(docker.errors.APIError):
                    api.remove_container(container["Id"], force=True, v=True)


def _unframed(data: bytes) -> bytes:
    """The text in a stream in which the engine puts 8 bytes (which of stdout and stderr, 0, 0, 0, length) before every piece."""
    text = b""
    while len(data) > 8:
        end = 8 + int.from_bytes(data[4:8], "big")
        text, data = text + data[8:end], data[end:]
    return text


def _outcome(path: Path, state: dict[str, Any], said: bytes) -> dict[str, Any]:
    """The supervisor's status, or why there is none; ``state`` is the engine's word on how the container ended."""
    try:
        outcome = checked_outcome(contract.read_regular(path, 1 << 16))
    except InvalidOutput:
        words = _unframed(said).decode(errors="replace")[-500:] or state.get("Error", "")
        outcome = interrupted(f"the container ended without a status (exit status {state.get('ExitCode')}) {words}".strip())
        killed = True
    else:
        killed = outcome["ended_by"] == "exit" and outcome["signal"] == "SIGKILL"
    if killed and state.get("OOMKilled"):
        outcome |= {"ended_by": "memory", "reason": "killed by the kernel: the container's memory limit was reached"}
    return outcome
