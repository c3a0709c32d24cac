"""A small laboratory: one domain, the fake methods, a plan over their configurations, run by the real scheduler."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from harness import provenance
from harness.data.domain import write_domain
from harness.data.source import SourceDomain, ragged
from harness.environments import pythons
from harness.execute.local import LocalExecutor
from harness.execute.stage import Executor
from harness.method import find_methods
from harness.paths import PROJECT, Paths
from harness.record import Record
from harness.runspec import Plan, PlannedRun, PlannedStage
from harness.schedule import Scheduler, Slot
from harness.suite import BudgetFile, Entry, Suite, make_plan

FAKES = Path(__file__).resolve().parents[1] / "fakes"


class Silent:
    """An observer that remembers what ran."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def run_started(self, run: PlannedRun) -> None: ...

    def stage_started(self, run: PlannedRun, stage: PlannedStage, folder: object) -> None:
        self.stages.append(run.id)

    def run_finished(self, run: PlannedRun, record: Record, cached: bool) -> None: ...


def make_paths(root: Path, fakes: Iterable[str], port: int = 0) -> Paths:
    """Results and data under ``root``, and copies of fake methods there (so that an attack on its own folder harms nothing)."""
    methods = root / "methods"
    for name in fakes:
        shutil.copytree(FAKES / name, methods / name)
        path = methods / name / "method.toml"
        path.write_text(path.read_text().replace("port = 0", f"port = {port}"))
    return Paths(PROJECT, root / "data", root / "results", (methods,))


def make_domain(paths: Paths, name: str = "small", users: int = 120, items: int = 80, seed: int = 1) -> None:
    generator = np.random.default_rng(seed)
    lists = [list(generator.choice(items, size=generator.integers(4, 12), replace=False)) for _ in range(users)]
    source = SourceDomain(
        user_ids=[f"user{i}" for i in range(users)],
        item_ids=[f"item{i}" for i in range(items)],
        sequences=ragged(lists),
        columns={"title": [f"title of item {i}" for i in range(items)]},
    )
    write_domain(paths.domain(name), source)


def make_fake_plan(
    paths: Paths,
    entries: Iterable[Entry],
    seeds: int = 1,
    seconds: float = 4.0,
    grace: float = 1.0,
    memory_gib: float = 0.7,
    disk_gib: float = 0.2,
    domain: str = "small",
) -> Plan:
    suite = Suite(
        name="faults",
        title="Faults",
        domains=(domain,),
        seeds=seeds,
        budget=BudgetFile(seconds=seconds, grace=grace, memory_gib=memory_gib, disk_gib=disk_gib),
        run=tuple(entries),
    )
    methods = find_methods(paths)
    digests = provenance.environment_digests(tuple(methods.values()), provenance.environment())
    return make_plan(suite, paths, methods, digests, "cpu")


def carry_out(
    plan: Plan, paths: Paths, slots: int = 2, observer: Silent | None = None, executor: Executor | None = None
) -> dict[str, Record]:
    """Run a plan; records by configuration name (with one seed)."""
    methods = find_methods(paths)
    scheduler = Scheduler(plan, paths, methods, executor or LocalExecutor(paths), pythons(methods.values(), paths, print))
    records = scheduler.run([Slot()] * slots, observer or Silent())
    return {record.method.config: record for record in records.values()}
