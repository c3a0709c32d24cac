"""Plans and records made by hand, for the tests of tables and their benchmark."""

from __future__ import annotations

from typing import Any

from harness import record
from harness.metrics import METRICS
from harness.record import Record
from harness.runspec import Budget, Plan, PlannedRun

BUDGET = Budget(seconds=60, deadline=120, memory=1 << 30, disk=1 << 30, threads=1)


def planned(title: str, domain: str = "office", seed: int = 1, *, method: str | None = None, missing: str = "") -> PlannedRun:
    method = method or title.lower().replace(" ", "_")
    return PlannedRun(
        id=f"{method}.{title}.{domain}.s{seed}",
        method=method,
        config="default",
        title=title,
        domain=domain,
        seed=seed,
        fit_key="f" * 64,
        stages=(),
        configuration={},
        budget=BUDGET,
        missing=missing,
    )


def recorded(run: PlannedRun, value: float = 0.1, *, simulated: bool = False, hardware: str = "hw", **parts: Any) -> Record:
    """An ok record of a planned run in which every metric is ``value``; ``parts`` replaces fields of Record."""
    known: dict[str, Any] = {
        "status": record.Status(state="ok"),
        "isolation": record.Isolation(level="container"),
        "cost": record.Cost(fit_seconds=12.5, users_per_second=340.0, peak_memory=3 << 29, parameters=1234),
        "metrics": {name: record.Metric(mean=value, n=100) for name in METRICS},
    }
    if "status" in parts and parts["status"].state != "ok":
        known["metrics"] = {}
    return Record(
        run=record.Run(id=run.id, fit_key=run.fit_key),
        method=record.Method(name=run.method, config=run.config, title=run.title, lineage="wrapper", source_hash="0", configuration={}),
        domain=record.DomainCard(
            name=run.domain, digest="d", users=100, items=50, interactions=900, train_interactions=700, simulated=simulated
        ),
        seed=run.seed,
        budget=record.BudgetUsed(seconds=60, memory=1 << 30, threads=1),
        environment=record.Environment(hardware=hardware, cpu="A CPU", cpus=2, memory=1 << 34),
        **(known | parts),
    )


def status(state: Any, reason: str = "", **fields: Any) -> record.Status:
    return record.Status(state=state, reason=reason, **fields)


def plan(*runs: PlannedRun, metrics: tuple[str, ...] = ("recall_at_10", "ndcg_at_10")) -> Plan:
    return Plan(suite="toy", title="A toy suite", runs=runs, metrics=metrics)


def trivial(domain: str = "office") -> list[PlannedRun]:
    """The two rows that every table of real data must have."""
    return [planned("Popularity", domain), planned("Last item", domain)]


def table_inputs(values: dict[tuple[str, str], list[float]], *, simulated: tuple[str, ...] = ()) -> tuple[Plan, dict[str, Record]]:
    """A plan and ok records from (title, domain) -> one value a seed."""
    runs = [(planned(title, domain, seed), value) for (title, domain), seeds in values.items() for seed, value in enumerate(seeds, 1)]
    records = {run.id: recorded(run, value, simulated=run.domain in simulated) for run, value in runs}
    return plan(*(run for run, _ in runs)), records
