"""One stage on disk, and what every executor needs to run it.

    stages/METHOD/STAGE-KEY/
        job.json  spec.json  log.txt  status.json  stage.json     the harness's own, out of the method's reach
        out/ scratch/ checkpoint/                                  the method's

``stage.json`` is written last, when the outcome has been read and checked: a stage is finished when it says ``ok`` or
``skipped``, and its ``out/`` is read-only from then on. The ``lock`` is held while the stage runs, by the harness and by
its supervisor, so that two harnesses on one results folder run it once and a killed harness's supervisor is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.contract import PROGRESS, Job, write_json
from harness.method import Method, list_files
from harness.paths import PROJECT
from harness.record import Environment


@dataclass(frozen=True)
class StageFolder:
    path: Path

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def imports(self) -> Path:
        return self.path / "imports"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def result_path(self) -> Path:
        return self.path / "stage.json"

    def result(self) -> dict[str, Any] | None:
        """What ``stage.json`` says, or None where the stage has not been finished or was torn."""
        try:
            return json.loads(self.result_path.read_text())
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[int | None]:
        """The lock's file descriptor, or None if somebody else runs this stage now."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield handle
        finally:
            os.close(handle)

    def clear(self) -> None:
        """Make ready for a start: everything of an earlier attempt goes, but for its checkpoint and the curve that leads to it."""
        self.result_path.unlink(missing_ok=True)
        self.checkpoint.mkdir(exist_ok=True)
        progress, kept = self.out / PROGRESS, self.path / f"{PROGRESS}.kept"
        if any(self.checkpoint.iterdir()) and progress.is_file() and not progress.is_symlink():
            os.replace(progress, kept)  # the method goes on from its checkpoint, and so does its curve
        remove_tree(self.imports)
        for folder in (self.out, self.scratch):
            remove_tree(folder)
            folder.mkdir(parents=True)
        if kept.exists():
            os.replace(kept, progress)
        for name in ("log.txt", "status.json", "job.json", "spec.json"):
            (self.path / name).unlink(missing_ok=True)

    def finish(self, result: dict[str, Any]) -> None:
        """Seal the stage: outputs read-only, scratch gone; the checkpoint goes with success."""
        for folder in (self.scratch, self.imports):
            remove_tree(folder)
        done = result["state"] in ("ok", "skipped")
        if done:
            with contextlib.suppress(RecursionError):  # a skipped stage's folder has not been looked at: it can be of any depth
                for root, folders, files in os.walk(self.out):
                    for name in (*files, *folders):
                        path = Path(root, name)
                        if not path.is_symlink():
                            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
            self.out.chmod(0o555)
        write_json(self.result_path, result)
        if done:  # not before it is sealed: a harness killed in between would train from the start
            remove_tree(self.checkpoint)


def remove_tree(folder: Path) -> None:
    """Remove a folder whatever its permissions; links in it are removed, not followed."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        try:
            _open_up(str(folder))
            for root, folders, _ in os.walk(folder):  # goes into a folder only after it has been opened up here
                for name in folders:
                    _open_up(os.path.join(root, name))
            shutil.rmtree(folder)
        except (OSError, RecursionError):
            # Python's is recursive and needs paths; rm goes down any depth. What it cannot remove either is an error.
            done = subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True, text=True)
            if folder.exists():
                raise OSError(errno.EIO, f"cannot be removed: {done.stderr.strip()[-300:]}", str(folder)) from None


def _open_up(folder: str) -> None:
    with contextlib.suppress(OSError):  # another user's, in which we may write all the same
        if not os.path.islink(folder):
            os.chmod(folder, 0o700)


@dataclass(frozen=True)
class StageTask:
    """A stage to run: the job for the method, and what the executor needs beside it."""

    folder: StageFolder
    job: Job
    method: Method
    python: Path
    lock: int
    """File descriptor of the stage's lock; the supervisor inherits it."""
    gpu: int | str | None = None


class Executor(Protocol):
    """Runs stages. ``run`` blocks until the stage has ended and returns the supervisor's outcome (``status.json``)."""

    @property
    def level(self) -> str:
        """Isolation that its runs reach: ``container``, ``landlock``, ``user`` or ``convention``."""

    def environment(self) -> Environment:
        """The machine and packages that runs see (in a worker container, that container's)."""

    def run(self, task: StageTask) -> dict[str, Any]: ...

    def stop(self) -> None:
        """End all running stages; they come back as interrupted."""


def method_environment(task: StageTask, imports: str) -> dict[str, str]:
    """The environment of the method's process: small, the same everywhere, nothing of the caller's."""
    job = task.job
    threads = str(job.budget.threads)
    scratch = str(job.scratch)
    environment = {
        "PATH": os.pathsep.join([str(task.python.parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/local/cuda/bin"]),
        "PYTHONPATH": imports,
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "HARNESS_RUN": f"{job.run_id}/{job.stage}",
        "CUDA_VISIBLE_DEVICES": "" if task.gpu is None else str(task.gpu),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(huggingface_home()),
        "TOKENIZERS_PARALLELISM": "false",
        "MPLCONFIGDIR": scratch,
        "TORCHINDUCTOR_CACHE_DIR": str(job.cache / "inductor"),
        "TRITON_CACHE_DIR": str(job.cache / "triton"),
    }
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "POLARS_MAX_THREADS",
        "RAYON_NUM_THREADS",
    ):
        environment[name] = threads
    if library_path := os.environ.get("LD_LIBRARY_PATH"):
        environment["LD_LIBRARY_PATH"] = library_path
    return environment


def huggingface_home() -> Path:
    """Where models by hub id lie: read-only for methods, filled by the user beforehand."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def stage_imports(folder: Path, method: Method, project: Path) -> Path:
    """What a method can import from this project, in one folder: its PYTHONPATH. Returns ``folder``.

    Copies, because a Python under Landlock finds no package in a folder that it may not list: ``harness`` with the contract and nothing
    else, the declared ``sources``, and the method's own folder under its name in the project (``baselines.tiger``).
    """
    files = [(PROJECT, PROJECT / "harness" / name) for name in ("__init__.py", "contract.py")]
    for root in method.source_folders(project):
        if root.is_relative_to(project):
            files += [(project, path) for path in (list_files(root) if root.is_dir() else [root])]
    for base, source in files:
        target = folder / source.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return folder
