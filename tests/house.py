"""A domain, a jobs volume and a fake method whose configuration says what it does: what tests of executors run.

``House.run`` does with an executor what the scheduler does: clear the stage, run it, read the result, seal it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import Budget, DomainRef, Job, Ragged
from harness.data.domain import SourceDomain, write_domain
from harness.execute.outcome import read_stage_result
from harness.execute.stage import Executor, StageFolder, StageTask
from harness.execute.worker import WorkerExecutor
from harness.method import load_method
from harness.paths import PROJECT, Paths

STALE = 15.0
"""Long enough for a disk that is busy with other things: touching a file can wait for its journal."""
SECONDS = 60.0
"""Nothing here takes this long; what does has hung."""

METHOD = """
name = "fake"
title = "Fake"
lineage = "trivial"
sources = ["baselines/popularity"]
[configs.default]
"""

PROGRAM = """
import json, os, signal, socket, sys, time
from pathlib import Path
import numpy as np
from harness.contract import Job, Meta, Progress, main, skip, write_predictions
from baselines.popularity import run as shared  # a module of the project, declared in sources

def predictions(job):
    items = np.broadcast_to(np.arange(job.k, dtype=np.int32), (job.domain.n_users, job.k))
    write_predictions(job, items)
    write_predictions(job, items, valid=True)
    Meta(timings={"fit": 0.1}).write(job)

def hang(job):
    (job.checkpoint / "weights").write_text("half")
    (job.cache / "pid").write_text(str(os.getpid()))
    print("working", flush=True)
    time.sleep(600)

def daemon(job):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            (job.cache / "daemon").write_text(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    while not (job.cache / "daemon").exists():
        time.sleep(0.01)
    hang(job)

def look(job, secret):
    # what can be had from here: written as JSON, the name of the error for what cannot
    def write(path):
        with open(path, "a") as file:
            file.write("x")
    def status(name):
        return [line.split()[1] for line in open("/proc/self/status") if line.startswith(name + ":")][0]
    attempts = {
        "secret": lambda: os.listdir(secret),
        "domains": lambda: sorted(os.listdir(job.domains[0].path)),
        "write domain": lambda: write(job.domains[0].path / "domain.json"),
        "write contract": lambda: write(os.environ["PYTHONPATH"] + "/harness/contract.py"),
        "write job": lambda: write(sys.argv[1]),
        "write program": lambda: write(__file__),
        "write harness": lambda: write("/app/harness/contract.py"),
        "write log": lambda: write("/log.txt"),
        "write status": lambda: write("/desk/status.json"),
        "write root": lambda: write("/file"),
        "network": lambda: socket.create_connection(("1.1.1.1", 53), 2),
        "interfaces": lambda: sorted(os.listdir("/sys/class/net")),
        "capabilities": lambda: int(status("CapEff"), 16),
        "new privileges": lambda: status("NoNewPrivs"),
        "user": lambda: os.getuid(),
        "engine": lambda: os.path.exists("/var/run/docker.sock"),
        "variables": lambda: sorted(os.environ),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            found[name] = attempt()
        except OSError as error:
            found[name] = type(error).__name__
    (job.output / "look.json").write_text(json.dumps(found))

def fit(job):
    out, do = job.output, job.configuration["do"]
    if do == "ok":
        Progress(job).log(1, of=2, loss=0.5)
        predictions(job)
        print("done" if shared.fit else "")
    elif do == "crash":
        raise RuntimeError("no luck today")
    elif do == "skip":
        skip(job, "no pictures")
    elif do in ("hang", "daemon"):
        globals()[do](job)
    elif do == "resume":
        print("found", (job.checkpoint / "weights").read_text())
        predictions(job)
    elif do == "inputs":
        assert (job.inputs["first"] / "deep" / "note").read_text() == "from the first stage"
        try:
            (job.inputs["first"] / "mine").write_text("x")
        except PermissionError:
            predictions(job)
    elif do == "shut":
        predictions(job)
        (out / "closed").mkdir()
        (out / "closed" / "file").write_text("x")
        os.chmod(out / "closed" / "file", 0)
        os.chmod(out / "closed", 0)
        os.chmod(out, 0o500)
    elif do == "closed scratch":
        predictions(job)
        for folder in (job.scratch, job.checkpoint):
            (folder / "x" / "y").mkdir(parents=True)
            os.chmod(folder / "x", 0)
    elif do == "sparse":
        predictions(job)
        for name in ("a", "b"):
            with open(out / name, "wb") as file:
                file.truncate(job.budget.disk - 1)
    elif do == "neighbour":
        predictions(job)
        for folder in (job.output.parents[1], job.cache.parents[1], job.output.parent):
            try:
                sys.exit(f"can see {list(folder.iterdir())}")
            except PermissionError:
                pass
    elif do == "memory":
        hoard = [bytearray(os.urandom(1 << 20) * 8) for _ in range(1 << 20)]
    elif do == "look":
        predictions(job)
        look(job, job.configuration["secret"])
    else:
        predictions(job)
        {
            "link": lambda: (out / "x").symlink_to("/etc/passwd"),
            "folder link": lambda: (out / "x").symlink_to("/etc"),
            "fifo": lambda: os.mkfifo(out / "x"),
            "curve is a fifo": lambda: os.mkfifo(out / "progress.jsonl"),
            "predictions linked": lambda: (os.rename(out / "predictions.npz", out / "p"), (out / "predictions.npz").symlink_to("p")),
            "predictions twice": lambda: os.link(out / "predictions.npz", out / "p"),
            "no predictions": lambda: os.unlink(out / "predictions.npz"),
            "pickle": lambda: np.savez(out / "predictions.npz", users=np.array([{}], object), items=np.array([{}], object)),
        }[do]()

main(fit)
"""


@dataclass
class House:
    """Paths, one domain, one method whose configuration says what it does, and a jobs volume."""

    paths: Paths
    jobs: Path
    public: Path

    def worker(self) -> subprocess.Popen[bytes]:
        code = f"from pathlib import Path; from harness.execute.worker import serve; serve(Path({str(self.jobs)!r}), stale={STALE})"
        environment = os.environ | {"HARNESS_METHODS": str(self.paths.methods[0]), "HARNESS_ISOLATION": "auto"}
        return subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL)

    def executor(self) -> WorkerExecutor:
        return WorkerExecutor(self.paths, self.jobs, self.public, stale=STALE, patience=SECONDS)

    @contextlib.contextmanager
    def task(self, do: str, name: str = "", **change: Any) -> Iterator[StageTask]:
        folder = StageFolder(self.paths.stages / "fake" / (name or do.replace(" ", "-")))
        inputs, more = change.pop("inputs", {}), change.pop("configuration", {})
        budget = replace(Budget(seconds=20, deadline=SECONDS, memory=2 << 30, disk=64 << 20, threads=1), **change)
        job = Job(
            run_id=f"{self.tag}.{do}",
            stage="fit",
            method="fake",
            configuration={"do": do, **more},
            domains=(DomainRef("tiny", self.paths.public("tiny")),),
            inputs=inputs,
            output=folder.out,
            cache=self.paths.caches / "fake",
            scratch=folder.scratch,
            checkpoint=folder.checkpoint,
            seed=1,
            budget=budget,
        )
        with folder.locked() as lock:
            assert lock is not None
            folder.clear()
            yield StageTask(folder, job, load_method(self.paths.methods[0] / "fake", self.paths.project), Path(sys.executable), lock)

    def run(self, executor: Executor, do: str, name: str = "", **change: Any) -> dict[str, Any]:
        with self.task(do, name, **change) as task:
            result = read_stage_result(executor.run(task), task.folder, task.job, self.paths, last=True)
            task.folder.finish(result)
            return result

    def interrupt(self, executor: Executor, pid: Path, name: str = "") -> dict[str, Any]:
        """Run ``hang`` and stop the executor once it has written its checkpoint and its ``pid``."""
        pid.unlink(missing_ok=True)
        threading.Thread(target=lambda: (read_pid(pid), executor.stop()), daemon=True).start()
        return self.run(executor, "hang", name)

    @property
    def cache(self) -> Path:
        return self.jobs / "cache" / "fake"

    @property
    def tag(self) -> str:
        """Marks the processes of this house."""
        return f"fake{zlib.crc32(str(self.jobs).encode())}"

    def is_quiet(self) -> bool:
        """No process of a run lives. Process ids would not do: the method may count in a namespace of its own."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"HARNESS_RUN={self.tag}".encode() in path.read_bytes():
                    return False
        return True


def build_house(root: Path) -> House:
    method = root / "methods" / "fake"
    method.mkdir(parents=True)
    (method / "method.toml").write_text(METHOD)
    (method / "run.py").write_text(PROGRAM)
    shutil.copytree(PROJECT / "baselines" / "popularity", root / "project" / "baselines" / "popularity")
    (root / "jobs").mkdir()
    (root / "public").mkdir()
    items, users = 60, 8
    sequences = Ragged(np.arange(users * 5, dtype=np.int64) % items, np.arange(0, users * 5 + 1, 5))
    columns = {"title": [f"thing {i}" for i in range(items)]}
    source = SourceDomain(
        user_ids=[f"u{i}" for i in range(users)], item_ids=[f"i{i}" for i in range(items)], sequences=sequences, columns=columns
    )
    write_domain(root / "data" / "tiny", source)
    return House(Paths(root / "project", root / "data", root / "results", (root / "methods",)), root / "jobs", root / "public")


def wait_for(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.02)
    return value


def read_pid(path: Path) -> int:
    return int(wait_for(lambda: path.exists() and path.read_text()))
