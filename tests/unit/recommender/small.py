"""A small domain, ids and jobs for tests of the recommender's training, and a program that trains in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import Budget, Domain, DomainRef, Job
from tests.unit.baselines.running import ROOT, markov_histories, write_domain
from utgrec.semantic_ids import SemanticIds

USERS, ITEMS, WIDTH = 60, 40, 4
TINY = {
    "d_model": 16, "d_ff": 32, "heads": 2, "d_kv": 8, "encoder_layers": 1, "decoder_layers": 1,
    "batch": 32, "epochs": 3, "learning_rate": 1e-2, "valid_beams": 10,
}  # fmt: skip

PROGRAM = """
import sys
from pathlib import Path
from harness.contract import Job
from tests.unit.recommender import small
from utgrec.recommender import checkpoint, run, settings

job = Job.read(sys.argv[1])
run.recommend_with(job, small.ids_of(job.domain.n_items), settings.Settings.of(job.configuration)).write(job)
"""


def make_domain(folder: Path, *, users: int = USERS, items: int = ITEMS, seed: int = 0, name: str = "small") -> Domain:
    write_domain(folder / "public", markov_histories(users, items, seed), items)
    info = folder / "public" / "domain.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"name": name, "digest": f"{seed:016x}"}))
    return Domain.read(folder / "public")


def ids_of(items: int, *, width: int = WIDTH, seed: int = 0) -> SemanticIds:
    """Random ids of three codes, one item each."""
    tuples = np.random.default_rng(seed).choice(width**3, items, replace=False)
    return SemanticIds.of(np.stack(np.unravel_index(tuples, (width,) * 3), 1), (width,) * 3)


def make_job(folder: Path, *domains: Domain, seconds: float = 300, **changes: Any) -> Job:
    """A job with new folders; ``configuration`` and the like are given by name."""
    folders = {name: folder / name for name in ("output", "cache", "scratch", "checkpoint")}
    for path in folders.values():
        path.mkdir(parents=True)
    values: dict[str, Any] = {
        "run_id": "run", "stage": "fit", "method": "small", "configuration": TINY, "inputs": {}, "seed": 1, "k": 10,
        "domains": tuple(DomainRef(domain.name, domain.path) for domain in domains),
        "budget": Budget(seconds=seconds, deadline=300, memory=4 << 30, disk=1 << 30, threads=1), **folders,
    }  # fmt: skip
    return Job(**{**values, **changes})


def environment() -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return os.environ | threads | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


def start(program: str, job: Job, *launcher: str, arguments: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Run a program on a job; ``launcher`` are the arguments of Python before the program's."""
    folder = job.output.parent
    job.write(folder / "job.json")
    (folder / "program.py").write_text(program)
    command = [sys.executable, *launcher, str(folder / "program.py"), str(folder / "job.json"), *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], seconds: float = 200) -> str:
    """What a process has printed. One that hangs is ended, with its children, before that is an error."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends the processes it has started
        raise AssertionError(f"not done after {seconds} s; it printed:\n{process.communicate()[0]}") from None


def curve(job: Job) -> dict[int, dict[str, float]]:
    """The points of the progress curve by step."""
    lines = [json.loads(line) for line in (job.output / "progress.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"] for line in lines}
