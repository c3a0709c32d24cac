"""Small domains and a runner for method programs, without the rest of the harness.

A method is started as the harness starts it: as a process in an empty folder that can import only ``harness.contract``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.contract import META, PREDICTIONS, PROGRESS, VALID_PREDICTIONS, Budget, DomainRef, Job, Meta, read_meta, read_predictions

ROOT = Path(__file__).resolve().parents[3]
BASELINES = ROOT / "baselines"


def write_domain(path: Path, sequences: list[list[int]], n_items: int, texts: list[dict[str, str | None]] | None = None) -> np.ndarray:
    """Write the public part of a domain from whole histories. Returns the hidden test targets [U]."""
    path.mkdir(parents=True)
    users = pa.table(
        {
            "user": pa.array(range(len(sequences)), pa.int32()),
            "train": pa.array([s[:-2] for s in sequences], pa.list_(pa.int32())),
            "valid": pa.array([s[-2] for s in sequences], pa.int32()),
        }
    )
    pq.write_table(users, path / "users.parquet")
    texts = texts or [{"text": f"item number {i}", "title": f"item number {i}", "brand": None, "categories": None} for i in range(n_items)]
    items = {"item": pa.array(range(n_items), pa.int32())}
    items |= {key: pa.array([row[key] for row in texts], pa.string()) for key in texts[0]}
    pq.write_table(pa.table(items), path / "items.parquet")
    counts = {"users": len(sequences), "items": n_items, "interactions": sum(map(len, sequences))}
    counts["train_interactions"] = counts["interactions"] - 2 * len(sequences)
    info = {"schema": 1, "name": "small", "counts": counts, "digest": "0" * 16, "protocol": "loo-v1", "simulated": True}
    (path / "domain.json").write_text(json.dumps({**info, "release": None, "tie_rate": None}))
    return np.array([s[-1] for s in sequences])


def markov_histories(users: int, items: int, seed: int = 0, length: tuple[int, int] = (5, 12)) -> list[list[int]]:
    """Histories in which each item has one frequent successor (0.7) and otherwise anything may follow."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(items)
    histories = []
    for _ in range(users):
        history = [int(rng.integers(items))]
        for _ in range(int(rng.integers(*length)) - 1):
            history.append(int(successor[history[-1]]) if rng.random() < 0.7 else int(rng.integers(items)))
        histories.append(history)
    return histories


@dataclass(frozen=True)
class SmallDomain:
    path: Path
    targets: np.ndarray
    n_users: int
    n_items: int

    def recall_at_10(self, items_UK: np.ndarray) -> float:
        return float((items_UK[:, :10] == self.targets[:, None]).any(1).mean())


@dataclass(frozen=True)
class Outcome:
    """What a finished method left: lists [U, K] for test and validation, meta, the output folder."""

    items: np.ndarray
    valid_items: np.ndarray
    meta: Meta
    output: Path


def load_configuration(method: str, name: str) -> dict[str, Any]:
    """The resolved hyper-parameters of a configuration, with ``extends`` followed."""
    table = tomllib.loads((BASELINES / method / "method.toml").read_text())["configs"]

    def resolve(key: str) -> dict[str, Any]:
        own = dict(table[key])
        return {**(resolve(own.pop("extends")) if "extends" in own else {}), **own}

    return {k: v for k, v in resolve(name).items() if k not in ("title", "needs", "stages", "paper")}


def load_program(method: str) -> ModuleType:
    """A method's ``run.py`` as a module, together with the modules beside it, which no other test will see."""
    folder, before = BASELINES / method, set(sys.modules)
    spec = importlib.util.spec_from_file_location(f"baselines_{method}_run", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before - {spec.name}:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    return module


class Runner:
    """Starts method programs on a domain and reads what they leave."""

    def __init__(self, folder: Path):
        self.folder = folder
        package = folder / "path" / "harness"
        package.mkdir(parents=True)
        for name in ("__init__.py", "contract.py"):
            shutil.copy(ROOT / "harness" / name, package / name)
        self._runs = 0

    def job(self, method: str, domain: Path, configuration: dict[str, Any], **changes: Any) -> tuple[Job, Path]:
        self._runs += 1
        base = self.folder / f"run{self._runs}"
        folders = {name: base / name for name in ("output", "cache", "scratch", "checkpoint")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        values: dict[str, Any] = {
            "run_id": base.name, "stage": "fit", "method": method, "configuration": configuration,
            "domains": (DomainRef("small", domain),), "inputs": {}, "seed": 1,
            "budget": self.budget(), **folders,
        }  # fmt: skip
        job = Job(**{**values, **changes})
        job.write(base / "job.json")
        return job, base / "job.json"

    def start(self, job: Job, job_file: Path) -> subprocess.Popen[str]:
        return self._start(job, job_file, [str(BASELINES / job.method / "run.py"), str(job_file)])

    def start_many(self, jobs: list[tuple[Job, Path]]) -> subprocess.Popen[str]:
        """All jobs of one method, one after the other in one process; its log lies beside the first job."""
        program = str(BASELINES / jobs[0][0].method / "run.py")
        return self._start(*jobs[0], [str(Path(__file__).with_name("many.py")), program, *(str(job_file) for _, job_file in jobs)])

    def _start(self, job: Job, job_file: Path, arguments: list[str]) -> subprocess.Popen[str]:
        threads = str(job.budget.threads)
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(job.scratch), "TMPDIR": str(job.scratch), "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.folder / "path"),
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        }  # fmt: skip
        command = [sys.executable, *arguments]
        with open(job_file.with_name("log"), "a") as log:
            return subprocess.Popen(command, cwd=job.scratch, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)

    def run(self, method: str, domain: SmallDomain, configuration: dict[str, Any], **changes: Any) -> Outcome:
        job, job_file = self.job(method, domain.path, configuration, **changes)
        return self.finish(job, job_file, domain)

    def finish(self, job: Job, job_file: Path, domain: SmallDomain) -> Outcome:
        self.wait(self.start(job, job_file), job_file)
        return self.outcome(job, domain)

    @staticmethod
    def wait(process: subprocess.Popen[str], job_file: Path) -> None:
        status = process.wait(timeout=300)
        assert status == 0, f"{' '.join(map(str, process.args))} ended with {status}\n{job_file.with_name('log').read_text()[-4000:]}"

    @staticmethod
    def budget(seconds: float = 120) -> Budget:
        return Budget(seconds=seconds, deadline=300, memory=4 << 30, disk=1 << 30, threads=1)

    @staticmethod
    def outcome(job: Job, domain: SmallDomain) -> Outcome:
        files = (job.output / PREDICTIONS, job.output / VALID_PREDICTIONS)
        items, valid_items = (read_predictions(file, domain.n_users, domain.n_items) for file in files)
        return Outcome(items, valid_items, read_meta(job.output / META), job.output)

    def cut(self, job: Job, job_file: Path, domain: SmallDomain) -> Outcome:
        """Kill a run as soon as it has a checkpoint, start it again, and make sure that it went on from there."""
        self.kill_when(self.start(job, job_file), lambda: any(job.checkpoint.glob("last.pt*")))
        done = self.steps(job)
        outcome = self.finish(job, job_file, domain)
        after = self.steps(job)[len(done) :]
        assert done == list(range(1, len(done) + 1))
        assert 1 < after[0] <= done[-1] + 1, f"first epochs {done}, then {after}"
        assert after == list(range(after[0], after[-1] + 1))
        return outcome

    @staticmethod
    def steps(job: Job) -> list[int]:
        return [json.loads(line)["step"] for line in (job.output / PROGRESS).read_text().splitlines()]

    @staticmethod
    def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool], timeout: float = 120) -> None:
        """Send SIGKILL to a started method as soon as ``ready()`` is true."""
        end = time.monotonic() + timeout
        while not ready():
            assert process.poll() is None, "the method ended before it could be killed"
            assert time.monotonic() < end, "the method never came to the point where it should be killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
