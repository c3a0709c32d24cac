"""Publishing 1,000 records to a real local MLflow server: at most two minutes; and finding that nothing is new.

Run with ``make bench`` (pytest --benchmark-only). The limit is held against the process CPU time of publisher and server
together (``cpu_s`` beside the wall time): they take turns, so that is the wall time on a machine that does nothing else,
but for the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import psutil
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness import mlflow_server
from harness.tracking import PublishSummary, pending, publish, publishing
from tests.unit.tracking import examples as ex

METHODS = tuple(f"method{i:02}" for i in range(20))
DOMAINS = tuple(f"domain{i:02}" for i in range(10))
LIMIT = 120.0


@pytest.mark.benchmark(max_time=0.0, warmup=False)
def test_publish_1000_records(benchmark: BenchmarkFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with record, log and two curves of 20 points; the server's start is not counted. Then again, with nothing new."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plan = ex.plan_of("bench", METHODS, DOMAINS, seeds=5)
    records = {run.id: ex.record_of(run, value=0.1 + i / 5000) for i, run in enumerate(plan.runs)}
    assert len(records) == 1000
    for run in plan.runs:
        ex.write_stage(tmp_path, run, steps=20)
    rounds = itertools.count()

    with contextlib.closing(mlflow_server.ensure(tmp_path)) as server:

        def publish_all() -> PublishSummary:
            again = plan.model_copy(update={"suite": f"bench {next(rounds)}"})
            return publishing.publish_to(server, again, records, lambda _: None, tmp_path, {})

        before = cpu_seconds(tmp_path)
        summary = benchmark.pedantic(publish_all, rounds=1)
        used = cpu_seconds(tmp_path) - before
        benchmark.extra_info["cpu_s"] = round(used, 1)
        assert summary.created == 1000 + 200 + 1
        assert pending(plan.model_copy(update={"suite": "bench 0"}), records, tmp_path, {}) == []
        again = publish(plan.model_copy(update={"suite": "bench 0"}), records, lambda _: None, tmp_path, {})
        assert again.unchanged == 1201
    assert used <= LIMIT


def cpu_seconds(results: Path) -> float:
    """What this process and the server's have used so far."""
    group = psutil.Process(json.loads((results / "mlflow" / "process.json").read_text())["group"])
    processes = [psutil.Process(), group, *group.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)
