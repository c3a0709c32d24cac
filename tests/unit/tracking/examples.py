"""Plans and records for the tests of publishing, and a full look at what a server holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import record as r
from harness.record import Record, write_record
from harness.runspec import Budget, Plan, PlannedRun, PlannedStage
from harness.tracking.rest import Rest


@dataclass(frozen=True)
class Local:
    """The server of the tests, and the folder of its database and artifacts."""

    uri: str
    folder: Path

    def held(self, suite: str, *, ids: bool = True) -> dict[str, Any]:
        return contents(self.folder, suite, ids=ids)

    def call(self, *args: Any) -> dict[str, Any]:
        with contextlib.closing(Rest(self.uri)) as rest:
            return rest.call(*args)


METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_20", "recall_at_50", "ndcg_at_5", "ndcg_at_10", "mrr_at_50")
SECOND = 1_760_000_000


def planned(method: str, domain: str, seed: int, **changes: Any) -> PlannedRun:
    key = hashlib.sha256(f"{method} {domain} {seed}".encode()).hexdigest()
    values: dict[str, Any] = {
        "id": f"{method}.paper.{domain}.s{seed}.{key[:12]}",
        "method": method,
        "config": "paper",
        "title": method.upper(),
        "domain": domain,
        "seed": seed,
        "fit_key": key,
        "stages": (PlannedStage(name="fit", key=key, domains=(domain,)),),
        "configuration": {"lr": 0.001, "layers": [64, 64], "optimizer": {"name": "adam", "betas": [0.9, 0.98]}, "dropout@1": None},
        "budget": Budget(seconds=60, deadline=120, memory=1 << 30, disk=1 << 30, threads=1),
    }
    return PlannedRun(**{**values, **changes})


def plan_of(suite: str, methods: tuple[str, ...] = ("popularity", "sasrec"), domains: tuple[str, ...] = ("toys",), seeds: int = 2) -> Plan:
    runs = tuple(planned(m, d, s) for m in methods for d in domains for s in range(1, seeds + 1))
    return Plan(suite=suite, title=f"The {suite} suite", runs=runs)


def record_of(run: PlannedRun, state: str = "ok", value: float = 0.1, reason: str = "", simulated: bool = False) -> Record:
    """``value`` shifts all metrics, so that seeds and methods differ."""
    ok = state == "ok"
    metrics = {
        name: r.Metric(mean=value + i / 100, low=value + i / 100 - 0.01, high=value + i / 100 + 0.01, n=900)
        for i, name in enumerate(METRICS)
    }
    return Record(
        run=r.Run(id=run.id, fit_key=run.fit_key, score_key="score" + run.fit_key[:8], stage_keys={s.name: s.key for s in run.stages}),
        method=r.Method(
            name=run.method,
            config=run.config,
            title=run.title,
            lineage="reimplementation",
            source_hash="s" * 64,
            configuration=run.configuration,
        ),
        domain=r.DomainCard(
            name=run.domain,
            digest="sha256:" + "d" * 64,
            users=900,
            items=300,
            interactions=9000,
            train_interactions=7200,
            simulated=simulated,
        ),
        seed=run.seed,
        budget=r.BudgetUsed(seconds=60, memory=1 << 30, threads=1),
        status=r.Status(state=state, reason=reason, stage=None if ok else "fit", exit_code=0 if ok else 1),
        metrics=metrics if ok else {},
        valid_metrics={"ndcg_at_10": value + 0.05} if ok else {},
        behaviour={"invalid": 0, "beam width": 50, "encoder": "none", "oracle": None} if ok else {},
        training=r.Training(best_valid=0.2, stopped_by="patience", steps=500, epochs=5) if ok else r.Training(),
        cost=r.Cost(
            stages={"fit": 12.5}, fit_seconds=12.0, predict_seconds=0.5, users_per_second=1800.0, peak_memory=1 << 28, parameters=4000
        ),
        environment=r.Environment(hardware="cpu-2", cpu="a processor", cpus=2, memory=8 << 30),
        provenance=r.Provenance(
            git_sha="a" * 40, dirty=False, command="harness run", started="2026-01-02T03:04:05+00:00", finished="2026-01-02T03:05:05+00:00"
        ),
        isolation=r.Isolation(level="landlock"),
    )


def write_records(results: Path, records: dict[str, Record]) -> None:
    for one in records.values():
        write_record(results / "records", one)


def progress_line(step: int, time: float | None = None, **metrics: float) -> str:
    return (
        json.dumps({"time": SECOND + step if time is None else time, "stage": "fit", "step": step, "of": None, "metrics": metrics}) + "\n"
    )


def stage_folder(results: Path, run: PlannedRun) -> Path:
    """Where the harness keeps a stage: the progress file in ``out/``, the log beside it."""
    folder = results / "stages" / run.method / f"fit-{run.fit_key[:16]}"
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return folder


def write_stage(results: Path, run: PlannedRun, steps: int = 5) -> Path:
    folder = stage_folder(results, run)
    (folder / "log.txt").write_text(f"log of {run.id}\n")
    lines = (progress_line(step, loss=1.0 / (step + 1), valid_ndcg_at_10=step / 100) for step in range(steps))
    (folder / "out" / "progress.jsonl").write_text("".join(lines))
    return folder / "out" / "progress.jsonl"


def nowhere() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def no_logs(_: str) -> None:
    return None


def example(suite: str, results: Path) -> tuple[Plan, dict[str, Record]]:
    """Two methods with two seeds each, records and stages on disk; the last run has failed."""
    plan = plan_of(suite)
    records = {run.id: record_of(run, value=0.1 + i / 50) for i, run in enumerate(plan.runs)}
    last = plan.runs[-1]
    records[last.id] = record_of(last, "timeout", reason="the deadline of 120 s passed")
    write_records(results, records)
    for run in plan.runs:
        write_stage(results, run)
    return plan, records


def table_files(folder: Path) -> dict[str, Path]:
    texts = {
        "table.md": "| method | R@10 |\n|---|---|\n| POPULARITY | .1 |\n",
        "table.html": "<table></table>",
        "table.csv": "a,b\n",
        "table.tex": "%",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name.partition(".")[2]: folder / name for name in texts}


def contents(server: Path, suite: str, *, ids: bool = True) -> dict[str, Any]:
    """All that a local server holds of a suite, by run id: rows of its database and artifact files, nothing left out.

    Read past the server, so that what the client does not show is seen as well (and because it is a hundred times
    faster). ``ids=False`` leaves out what differs between two servers that were told the same.
    """
    with contextlib.closing(sqlite3.connect(f"file:{server / 'mlflow.db'}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row

        def rows(query: str, *values: str) -> list[sqlite3.Row]:
            return database.execute(query, values).fetchall()

        found = rows(
            "select r.* from runs r join experiments e using (experiment_id) where e.name = ? and r.lifecycle_stage = 'active'", suite
        )
        tags = {run["run_uuid"]: dict(map(tuple, rows("select key, value from tags where run_uuid = ?", run["run_uuid"]))) for run in found}
        keys = {run_id: own["harness.run_id"] for run_id, own in tags.items()}
        assert len(set(keys.values())) == len(keys), "two MLflow runs for one run id"
        out = {}
        for run in found:
            run_id = run["run_uuid"]
            own = tags[run_id]
            own["mlflow.parentRunId"] = keys.get(own.get("mlflow.parentRunId", ""), "")
            if not ids:
                own.pop("harness.session", None)
            history: dict[str, list[tuple[int, int, float]]] = {}
            for point in rows("select * from metrics where run_uuid = ? order by key, step, timestamp, value", run_id):
                assert not point["is_nan"]
                history.setdefault(point["key"], []).append((point["step"], point["timestamp"], point["value"]))
            inputs = rows(
                "select d.name, d.digest, d.dataset_profile from inputs i join datasets d on d.dataset_uuid = i.source_id "
                "where i.destination_id = ?",
                run_id,
            )
            folder = server / "artifacts" / run["artifact_uri"].partition(":")[2].strip("/")
            out[keys[run_id]] = {
                "id": run_id if ids else None,
                "name": run["name"],
                "status": run["status"],
                "tags": own,
                "params": dict(map(tuple, rows("select key, value from params where run_uuid = ?", run_id))),
                "history": history,
                "shown": dict(map(tuple, rows("select key, value from latest_metrics where run_uuid = ?", run_id))),
                "inputs": [tuple(row) for row in inputs],
                "artifacts": {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()},
            }
        return out
