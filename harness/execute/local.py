"""Run stages as child processes of this machine, one supervisor each.

In: a ``StageTask``. Out: the supervisor's outcome. The supervisor's standard input is the life line: closing it, or
dying, ends the run.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any

from harness import isolation, provenance
from harness.contract import write_json
from harness.execute.stage import StageTask, huggingface_home, method_environment, stage_imports
from harness.paths import PROJECT, Paths
from harness.record import Environment

BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from harness.supervise import main; main()"


class LocalExecutor:
    def __init__(self, paths: Paths):
        self._paths = paths
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self.level = isolation.best_level()

    def environment(self) -> Environment:
        return provenance.environment()

    def run(self, task: StageTask) -> dict[str, Any]:
        folder = task.folder
        spec_path = write_spec(task, self._paths)
        with self._lock:
            if self._stopped:
                return interrupted()
            process = start_supervisor(spec_path, folder.path / "supervisor.txt", task.lock)
            self._running.add(process)
        try:
            process.wait()
        finally:
            with self._lock:
                self._running.discard(process)
                close_lifeline(process)
        return read_outcome(folder.path / "status.json", process.returncode, folder.path / "supervisor.txt")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                close_lifeline(process)


def start_supervisor(spec_path: Path, complaints: Path, lock: int) -> subprocess.Popen[bytes]:
    """Start a supervisor on a spec. It holds ``lock`` open, and what it prints (nothing, if all is well) goes to ``complaints``."""
    command = [sys.executable, "-I", "-S", "-c", BOOT, str(PROJECT), str(spec_path)]
    with open(complaints, "wb") as said:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True, pass_fds=(lock,))


def close_lifeline(process: subprocess.Popen[bytes]) -> None:
    """Tell a supervisor that its harness is gone: it ends its run and says ``interrupted``."""
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()


def write_spec(task: StageTask, paths: Paths) -> Path:
    """Write ``job.json``, what the method imports, and the supervisor's ``spec.json``; return the latter's path."""
    task.job.cache.mkdir(parents=True, exist_ok=True)
    task.job.write(task.folder.path / "job.json")
    stage_imports(task.folder.imports, task.method, paths.project)
    spec_path = task.folder.path / "spec.json"
    write_json(spec_path, make_spec(task, paths, environment_prefixes(task.python)))
    return spec_path


def make_spec(task: StageTask, paths: Paths, prefixes: set[str]) -> dict[str, Any]:
    """What the supervisor is told. All paths are those of the place where it runs, so the task, the project's folder
    and the prefixes of the Python environment must be given as they are called there."""
    job, folder = task.job, task.folder
    job_path = folder.path / "job.json"
    read = [*task.method.source_folders(paths.project), folder.imports, job_path, huggingface_home(), *job.inputs.values()]
    read += [domain.path for domain in job.domains]
    return {
        "argv": [str(task.python), str(task.method.program), str(job_path)],
        "env": method_environment(task, str(folder.imports)),
        "cwd": str(job.scratch),
        "log": str(folder.log),
        "status": str(folder.path / "status.json"),
        "read": [*sorted({*prefixes, str(task.python.parent.parent)}), *map(str, read)],
        "write": [str(p) for p in (job.output, job.cache, job.scratch, job.checkpoint)],
        "hidden": [str(p) for p in (paths.data, paths.results, paths.project)],
        "deadline": job.budget.deadline,
        "memory": job.budget.memory,
        "disk": job.budget.disk,
    }


def environment_prefixes(python: Path) -> set[str]:
    """Folders of this Python environment, and of the interpreter behind another one: what a method's process must read."""
    return {sys.prefix, sys.base_prefix, sysconfig.get_paths()["purelib"], str(python.resolve().parent.parent)}


def read_outcome(path: Path, returncode: int | None, complaints: Path) -> dict[str, Any]:
    """The supervisor's ``status.json``; where it left none it was killed itself, and that is the reason given."""
    try:
        outcome: dict[str, Any] = json.loads(path.read_text())
        return outcome
    except (OSError, ValueError):
        said = complaints.read_text(errors="replace")[-500:] if complaints.exists() else ""
        return interrupted(f"the supervisor ended without a status (exit status {returncode}) {said}".strip())


def interrupted(reason: str = "the harness was stopped") -> dict[str, Any]:
    return {
        "ended_by": "lifeline",
        "reason": reason,
        "exit_code": None,
        "signal": None,
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "peak_memory": 0,
        "isolation": {},
    }
