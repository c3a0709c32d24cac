"""The conductor's side of the jobs volume: stages run in a worker container that has no network and no answers.

In: a ``StageTask``. Out: the supervisor's outcome, and the method's output in the stage's folder as if it had run here.
The public parts of domains go into a volume of their own, once. ``handover.py`` says what lies where; the worker's side
is ``service.py``. Nobody needs a Docker socket.

    HARNESS_JOBS    the jobs volume (default /jobs)
    HARNESS_PUBLIC  public parts of domains, which the worker mounts read-only (default /public)
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import contract
from harness.contract import DomainRef, InvalidOutput, write_json
from harness.execute.handover import (
    ALIVE,
    CANCEL,
    DONE,
    NEW,
    STALE,
    STATUS,
    Follower,
    Pinned,
    TooMuch,
    TreeCopy,
    Volume,
    broken,
    checked_outcome,
    make_folder,
    share,
)
from harness.execute.local import environment_prefixes, interrupted, make_spec
from harness.execute.service import serve
from harness.execute.stage import StageFolder, StageTask, stage_imports
from harness.method import find_methods
from harness.paths import Paths
from harness.record import CACHED_STATES, Environment
from harness.supervise import TERM_GRACE
from harness.values import ConfigError, build

__all__ = ["WorkerExecutor", "serve"]

PATIENCE = 120.0
"""Seconds to wait for a worker that has not started yet."""
HOW_TO_START = "start it with `docker compose up -d worker`; `docker compose logs worker` says why it does not run"


class WorkerExecutor:
    """``stale`` and ``patience`` are seconds: how old a heartbeat may be, and how long to wait for a worker at the start."""

    def __init__(
        self, paths: Paths, jobs: Path | None = None, public: Path | None = None, *, stale: float = STALE, patience: float = PATIENCE
    ):
        self._paths = paths
        self._volume = Volume(jobs or Path(os.environ.get("HARNESS_JOBS") or "/jobs"))
        self._public = public or Path(os.environ.get("HARNESS_PUBLIC") or "/public")
        self._stale, self._patience = stale, patience
        self._lock = threading.Lock()
        self._active: set[Pinned] = set()
        self._heart: threading.Thread | None = None
        self._stopped = threading.Event()
        self._domain_lock = threading.Lock()
        self._domains: dict[Path, Path] = {}
        atexit.register(self._retire_checkpoints)

    @property
    def level(self) -> str:
        return str(self._announced["level"])

    def environment(self) -> Environment:
        """The worker's machine and packages. Waits for the worker; raises ConfigError if none answers."""
        return build(Environment, self._announced["environment"], self._volume.announcement)

    def stop(self) -> None:
        self._stopped.set()

    # --------------------------------------------------------------------------------------------- the worker

    @functools.cached_property
    def _announced(self) -> dict[str, Any]:
        """``worker.json`` of a living worker that has the same methods as we."""
        limit = time.monotonic() + self._patience
        while not (said := self._living_worker()):
            if time.monotonic() > limit:
                raise ConfigError(f"no worker has answered in {self._volume.root} for {self._patience:.0f} s; {HOW_TO_START}")
            time.sleep(0.1)
        theirs = said["methods"]
        for name, method in find_methods(self._paths, broken={}).items():
            if theirs.get(name) != method.source_hash(self._paths.project):
                raise ConfigError(
                    f"the worker has another version of method {name!r} than this container; make both anew: "
                    "docker compose build benchmark && docker compose up -d --force-recreate worker"
                )
        return said

    def _living_worker(self) -> dict[str, Any] | None:
        try:
            self._volume.make()
            now = self._volume.now()
        except OSError as error:
            mend = "run this by docker compose, or let HARNESS_JOBS name a folder that the worker shares"
            raise ConfigError(f"the jobs volume {self._volume.root} cannot be used ({error}); {mend}") from error
        try:
            if now - self._volume.announcement.stat().st_mtime > self._stale:
                return None
            said = json.loads(contract.read_regular(self._volume.announcement, 1 << 20))
        except (OSError, InvalidOutput, ValueError):
            return None
        return said if isinstance(said, dict) and isinstance(said.get("methods"), dict) and {"level", "environment"} <= set(said) else None

    def _worker_is_dead(self, folder: Pinned) -> bool:
        try:
            return (folder.mtime(ALIVE) or 0.0) - self._volume.announcement.stat().st_mtime > self._stale
        except OSError:
            return True

    # ------------------------------------------------------------------------------------------------ one task

    def run(self, task: StageTask) -> dict[str, Any]:
        if self._stopped.is_set():
            return interrupted()
        self._retire_checkpoints()
        try:
            with self._handed_over(task) as folder:
                return self._take_back(task, folder, self._follow(task, folder))
        except (OSError, ConfigError) as error:
            return broken(f"the job could not be handed to the worker, or its output not taken back: {error}")

    @contextlib.contextmanager
    def _handed_over(self, task: StageTask) -> Iterator[Pinned]:
        """The task's folder in the volume, complete. The worker removes it when the block ends, or when we die."""
        self._volume.make()
        name = f"{task.job.method}.{task.job.stage}.{uuid.uuid4().hex[:12]}"
        building = self._volume.tasks / (NEW + name)
        make_folder(building)
        with Pinned(building) as folder:
            folder.put(ALIVE)
            self._keep_alive(folder)
            try:
                self._write_task(task, building, self._volume.tasks / name)
                share(building)
                building.rename(building.with_name(name))
                yield folder
            finally:
                with self._lock:
                    self._active.discard(folder)
                with contextlib.suppress(OSError):
                    folder.put(DONE)

    def _write_task(self, task: StageTask, building: Path, place: Path) -> None:
        """Everything in ``building``, with names as they are when it has become ``place``."""
        job = dataclasses.replace(
            task.job,
            domains=tuple(DomainRef(domain.name, self._public_copy(domain.path)) for domain in task.job.domains),
            inputs={name: place / "inputs" / name for name in task.job.inputs},
            output=place / "out",
            cache=self._volume.caches / task.job.method,
            scratch=place / "scratch",
            checkpoint=self._volume.checkpoints / task.job.method / task.folder.path.name,
        )
        stage_imports(StageFolder(building).imports, task.method, self._paths.project)
        (building / "inputs").mkdir()
        for name, source in task.job.inputs.items():
            with Pinned(source) as folder:
                TreeCopy(most=1 << 62).copy(folder, building / "inputs" / name)
        job.write(building / "job.json")
        there = dataclasses.replace(task, folder=StageFolder(place), job=job)
        spec = make_spec(there, self._paths, environment_prefixes(task.python))
        write_json(building / "spec.json", spec)

    def _follow(self, task: StageTask, folder: Pinned) -> dict[str, Any]:
        """Wait for the end, bringing log and curves along. Returns the outcome."""
        targets = {"log.txt": task.folder.log, f"out/{contract.PROGRESS}": task.folder.out / contract.PROGRESS}
        followers = [Follower(folder, name, target) for name, target in targets.items()]
        pause, given_up = 0.02, float("inf")
        while not folder.has(STATUS):
            for follower in followers:
                follower.follow()
            if self._stopped.is_set() and given_up == float("inf"):
                folder.put(CANCEL)
                given_up = time.monotonic() + TERM_GRACE + 10
            if time.monotonic() > given_up:
                return interrupted()
            if self._worker_is_dead(folder) and not folder.has(STATUS):
                return interrupted(f"the worker has not answered for {self._stale:.0f} s, or has stopped; {HOW_TO_START}")
            time.sleep(pause)
            pause = min(0.3, pause * 1.2)
        for follower in followers:
            while follower.follow():
                pass
        try:
            return checked_outcome(contract.read_regular(folder.path / STATUS, 1 << 16))
        except InvalidOutput as error:
            return broken(f"the worker's {error}")

    def _take_back(self, task: StageTask, folder: Pinned, outcome: dict[str, Any]) -> dict[str, Any]:
        """Copy the output of a run that came to its end; of others only log and curves are of use."""
        if outcome["ended_by"] != "exit" or outcome["exit_code"] not in (0, contract.EXIT_SKIPPED):
            return outcome
        try:
            with folder.below("out") as output:
                TreeCopy(task.job.budget.disk).copy(output, task.folder.out)
        except TooMuch:
            reason = f"its output is larger than the budget of {task.job.budget.disk / 2**30:.2f} GiB"
            return outcome | {"ended_by": "disk", "reason": reason}
        return outcome

    # ------------------------------------------------------------------------------- heartbeat, domains, checkpoints

    def _keep_alive(self, folder: Pinned) -> None:
        with self._lock:
            self._active.add(folder)
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, daemon=True)
                self._heart.start()

    def _beat(self) -> None:
        while True:
            with self._lock:
                for folder in self._active:
                    with contextlib.suppress(OSError):
                        folder.touch(ALIVE)
            time.sleep(min(1.0, self._stale / 10))

    def _public_copy(self, source: Path) -> Path:
        """The public part of a domain in the public volume; copied if it is not there, whole or not at all."""
        with self._domain_lock:
            if source not in self._domains:
                self._domains[source] = self._copy_public(source)
            return self._domains[source]

    def _copy_public(self, source: Path) -> Path:
        from harness.data.write import public_digest

        info = json.loads((source / "domain.json").read_text())
        target = self._public / f"{info['name']}-{info['digest'][:12]}"
        sizes = {file.name: file.stat().st_size for file in source.iterdir()}
        if target.is_dir() and {file.name: file.stat().st_size for file in target.iterdir()} == sizes:
            return target
        building = self._public / f".{target.name}.{uuid.uuid4().hex[:8]}"
        shutil.copytree(source, building)
        try:
            building.chmod(0o755)
            for file in building.iterdir():
                file.chmod(0o644)
            if public_digest(building) != info["digest"]:
                raise ConfigError(f"{source}: its content does not have the digest in domain.json; prepare the domain again")
            if target.exists():
                target.rename(building.with_name(building.name + ".old"))
                shutil.rmtree(building.with_name(building.name + ".old"), ignore_errors=True)
            building.rename(target)
        except OSError:
            if not target.is_dir():  # else another conductor was faster
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return target

    def _retire_checkpoints(self) -> None:
        """Give the checkpoints of stages that are finished to the worker for removal.

        Only what the stage's own folder says counts, so that a checkpoint outlives whatever happens before it is sealed.
        """
        with contextlib.suppress(OSError):
            for path in self._volume.checkpoints.glob("*/*"):
                result = StageFolder(self._paths.stages / path.parent.name / path.name).result()
                if result and result.get("state") in CACHED_STATES:
                    with contextlib.suppress(OSError):
                        path.rename(self._volume.trash / uuid.uuid4().hex)
