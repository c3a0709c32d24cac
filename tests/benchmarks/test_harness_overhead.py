"""What the harness itself costs: a suite of 200 instant runs, and `harness --help`.

The peer of a run is the same program started by hand with the same job: what is left is spawn, isolation, supervision,
checking, scoring and the record. Floors: two forks and a Python start without site (about 20 ms), the hash of the
outputs, and two fsyncs.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.execute.stage import stage_imports
from harness.method import load_method
from harness.paths import PROJECT
from harness.schedule import stage_folder
from harness.suite import Entry
from tests.faults import lab

RUNS = 200
PART = 20


def test_a_suite_of_200_instant_runs(benchmark: Any, tmp_path: Path) -> None:
    """Parts of the suite and starts by hand take turns, so that a busy minute hits both."""
    paths = lab.make_paths(tmp_path, ["instant"])
    lab.make_domain(paths)
    entries = [Entry(method="instant", configs=("default",))]
    warm = lab.make_fake_plan(paths, entries, seeds=2, seconds=31)
    lab.carry_out(warm, paths, slots=1)
    plan = lab.make_fake_plan(paths, entries, seeds=RUNS, seconds=30)
    each, alone = [], []

    def suite() -> None:
        for start in range(0, RUNS, PART):
            part = plan.model_copy(update={"runs": plan.runs[start : start + PART]})
            began = time.perf_counter()
            lab.carry_out(part, paths, slots=1)
            each.append((time.perf_counter() - began) / PART)
            alone.append(statistics.median(start_by_hand(paths, warm) for _ in range(5)))

    benchmark.pedantic(suite, rounds=1)
    overhead = statistics.median(run - child for run, child in zip(each, alone, strict=True))
    benchmark.extra_info |= {
        "runs": RUNS, "child alone s": statistics.median(alone), "a run s": statistics.median(each), "overhead a run s": overhead
    }  # fmt: skip
    assert overhead <= 0.2


def start_by_hand(paths: Any, plan: Any) -> float:
    """Seconds that the same program takes with the same job, started without the harness."""
    run = plan.runs[0]
    folder = stage_folder(paths, "instant", run.stages[-1])
    job = (folder.path / "job.json").read_text()
    for name in ("out", "scratch"):
        (paths.results / "alone" / name).mkdir(parents=True, exist_ok=True)
    alone = paths.results / "alone" / "job.json"
    alone.write_text(job.replace(str(folder.out), str(alone.parent / "out")).replace(str(folder.scratch), str(alone.parent / "scratch")))
    imports = stage_imports(paths.results / "imports", load_method(paths.methods[0] / "instant", paths.project), paths.project)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(imports), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    subprocess.run([sys.executable, str(paths.methods[0] / "instant" / "run.py"), str(alone)], env=environment, check=True)
    return time.perf_counter() - began


def test_help_costs_little(benchmark: Any) -> None:
    """User CPU seconds of `harness --help`; the floor is `python -c pass`."""

    def user_cpu(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, cwd=PROJECT, check=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    spent = [user_cpu("-m", "harness.cli", "--help") for _ in range(7)]
    floor = statistics.median(user_cpu("-c", "pass") for _ in range(7))
    benchmark.pedantic(lambda: user_cpu("-m", "harness.cli", "--help"), rounds=5)
    benchmark.extra_info |= {"user CPU s": statistics.median(spent), "python alone, user CPU s": floor}
    assert statistics.median(spent) < 0.4
