"""How long ``harness table`` takes over 10,000 records: read, validate, build, write all files, print. At most 5 s.

Run with ``make bench`` (pytest --benchmark-only). The records are as large as real ones: all metrics, all slices, the
packages of the environment, a log tail. The limit is held against process CPU time (``cpu_s`` beside the wall times),
which is the wall time of this one-threaded command on a machine that does nothing else.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from harness import metrics, record
from harness.record import read_records
from harness.runspec import Plan
from harness.table import build_table, to_rich, write_tables
from tests.unit.table_examples import plan, planned, recorded

LIMIT_S = 5.0
METHODS, DOMAINS, SEEDS = 200, 10, 5
SLICES = {"target_popularity": 6, "popularity_share": 3, "warm_cold": 2, "history_length": 4}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    means = metrics.means(rng.integers(0, 51, 1000))
    slices = {kind: {f"part {i}": record.Slice(n=100, metrics=means) for i in range(count)} for kind, count in SLICES.items()}
    environment = record.Environment(
        hardware="hw", cpu="A CPU", cpus=2, memory=1 << 34, packages={f"package-{i}": "1.2.3" for i in range(60)}
    )
    runs = [
        planned(f"Method {method}", f"domain{domain}", seed + 1)
        for method in range(METHODS)
        for domain in range(DOMAINS)
        for seed in range(SEEDS)
    ]
    raw = recorded(runs[0], status=record.Status(state="ok", log_tail="a line of the log\n" * 40), slices=slices, valid_metrics=means)
    raw = raw.model_copy(update={"environment": environment, "isolation": record.Isolation(level="landlock")}).model_dump(mode="json")
    for run in runs:
        summary = metrics.summarise(rng.integers(0, 51, 100)) | {metrics.COVERAGE: record.Metric(mean=0.2, n=100)}
        raw["metrics"] = {name: metric.model_dump() for name, metric in summary.items()}
        raw["run"]["id"], raw["domain"]["name"], raw["seed"] = run.id, run.domain, run.seed
        raw["method"]["title"] = raw["method"]["name"] = run.title
        (folder / f"{run.id}.json").write_text(json.dumps(raw, indent=1))
    return plan(*runs, metrics=("recall_at_5", "recall_at_10", "ndcg_at_5", "ndcg_at_10")), folder


def test_table_over_10000_records(benchmark: BenchmarkFixture, suite: tuple[Plan, Path], tmp_path: Path) -> None:
    planned_runs, folder = suite
    cpu_s: list[float] = []

    def table_command() -> str:
        started = time.process_time()
        records = read_records(folder, [run.id for run in planned_runs.runs])
        assert len(records) == METHODS * DOMAINS * SEEDS
        table = build_table(planned_runs, records)
        write_tables(table, tmp_path)
        console = Console(width=120, file=io.StringIO())
        console.print(to_rich(table))
        cpu_s.append(time.process_time() - started)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    printed = benchmark.pedantic(table_command, rounds=5, warmup_rounds=0)
    assert "10000 of 10000 runs ok" in printed
    benchmark.extra_info["cpu_s"] = statistics.median(cpu_s)
    assert statistics.median(cpu_s) <= LIMIT_S
