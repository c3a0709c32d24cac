"""`harness check NAME`: prove that a method keeps the contract.

In: a method. Out: one line a check, and exit status 0 only if none failed. Every run is a real one, by the scheduler and the
supervisor, on domains made for it: a simulated one with signal in it, two canaries with none that an honest method could see, and a
third that shows whether the method would be found (``harness/data/canary.py``). What is pre-trained is pre-trained for the first
run and taken by the canaries', as in a suite; the runs that are compared with the first make everything anew.
"""

from __future__ import annotations

import ast
import functools
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from harness import provenance
from harness.contract import PREDICTIONS, PROTOCOL, Domain, read_predictions
from harness.data.canary import bound, canary
from harness.data.simulate import sim_name, simulate
from harness.environments import pythons
from harness.execute.local import LocalExecutor
from harness.method import Method, find_methods, hash_tree, list_files, load_method
from harness.paths import Paths
from harness.record import Record
from harness.runspec import Plan, PlannedRun, PlannedStage
from harness.schedule import Scheduler, Slot, stage_folder
from harness.suite import BudgetFile, Entry, Suite, make_plan
from harness.values import ConfigError, nearest

TARGET, PRETRAIN = "Musical_Instruments", "Software"
FIRST, SECOND, HURRIED = "first", "second", "hurried"
"""Folders of results: what has run in one of them is not run in it again."""
Z_NEEDED = 5.0
SECONDS, SMALL_BUDGET = 120.0, 2.0
GPU_AGREEMENT = 0.99
"""Share of equal entries in the top 10 of two runs with one seed on a GPU; on a CPU all must be equal."""


@dataclass(frozen=True)
class Trial:
    """One finished run: its record, and the lists that were scored."""

    record: Record
    items_UK: np.ndarray | None
    public: Domain


class CheckFailed(Exception):
    """A check did not hold; the message says what was seen."""


class NotApplicable(Exception):
    """The method says that its needs are not met here."""


class Laboratory:
    """Domains and results of a check in one temporary folder."""

    def __init__(self, root: Path, method: Method, config: str, paths: Paths, console: Console):
        self._root, self._method, self._config = root, method, config
        self._pretrains = method.configs[config].pretrains
        self._paths = replace(paths, data=root / "data", results=root / "results")
        self._pythons = pythons([method], paths, console.print)
        self._executor = LocalExecutor(self._paths)
        environment = self._executor.environment()
        self.device = "cuda" if environment.gpu and "+cpu" not in environment.packages.get("torch", "+cpu") else "cpu"

    def prepare(self) -> None:
        """The domain with signal in it, and what the method may pre-train on under each of its protocols."""
        wanted = {protocol: [PRETRAIN] if self._pretrains else [] for protocol in (PROTOCOL, *self._method.file.protocols)}
        wanted[PROTOCOL].append(TARGET)
        for protocol, categories in wanted.items():
            simulate(self._paths.data, seed=11, users=400, items=160, categories=categories, protocol=protocol)

    def canary(self, kind: str, protocol: str) -> str:
        """A canary under a name that says nothing, with entropy that nobody has seen before."""
        name = f"domain_{secrets.token_hex(3)}"
        canary(self._paths.data / name, kind=kind, entropy=secrets.randbits(128), protocol=protocol)
        return name

    def public(self, domain: str) -> Path:
        return self._paths.public(domain)

    def run(self, domain: str, attempt: str, seconds: float = SECONDS) -> Trial:
        """Run the method once, with the results of ``attempt``. Raises CheckFailed if it does not end with valid output."""
        paths = replace(self._paths, results=self._root / attempt)
        plan = self._plan(paths, domain, seconds)
        run = plan.runs[0]
        if run.missing:
            raise NotApplicable(run.missing)
        scheduler = Scheduler(plan, paths, {self._method.name: self._method}, LocalExecutor(paths), self._pythons)
        record = scheduler.run([Slot(gpu=(provenance.visible_gpus() or ["0"])[0] if self.device == "cuda" else None)], _Nobody())[run.id]
        if record.status.state == "skipped":
            raise NotApplicable(record.status.reason)
        if not record.ok:
            tail = "\n".join(record.status.log_tail.splitlines()[-12:])
            raise CheckFailed(f"{record.status.state}: {record.status.reason}\n{tail}".strip())
        public = Domain.read(paths.public(domain))
        out = stage_folder(paths, run.method, run.stages[-1]).out
        return Trial(record, read_predictions(out / PREDICTIONS, public.test_users, public.n_items), public)

    def _plan(self, paths: Paths, domain: str, seconds: float) -> Plan:
        protocol = Domain.read(paths.public(domain)).protocol
        suite = Suite(
            name="check",
            title="Check",
            domains=(domain,),
            pretrain=(sim_name(PRETRAIN, protocol),) if self._pretrains else (),
            protocol=protocol,
            seeds=1,
            budget=BudgetFile(seconds=seconds, grace=180, memory_gib=8, disk_gib=4, threads=1),
            run=(Entry(method=self._method.name, configs=(self._config,)),),
        )
        digests = provenance.environment_digests((self._method,), self._executor.environment())
        return make_plan(suite, paths, {self._method.name: self._method}, digests, self.device)


class _Nobody:
    """An observer that does nothing."""

    def run_started(self, run: PlannedRun) -> None: ...
    def stage_started(self, run: PlannedRun, stage: PlannedStage, folder: object) -> None: ...
    def run_finished(self, run: PlannedRun, record: Record, cached: bool) -> None: ...


def check_method(name: str, config: str | None, quick: bool, console: Console) -> int:
    """Run all checks on a method, by name or by folder. Returns 0 if none failed."""
    paths = Paths.default()
    method = _find(name, paths)
    chosen = method.config(config).name if config else _default_config(method)
    console.print(f"checking [bold]{method.name}[/]/{chosen}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="harness-check-", ignore_cleanup_errors=True) as folder:
        laboratory = Laboratory(Path(folder), method, chosen, paths, console)
        laboratory.prepare()
        for title, check in _checks(method, laboratory, paths, quick):
            began = time.monotonic()
            try:
                mark, said = "[green]holds[/] ", check()
            except CheckFailed as error:
                mark, said, failed = "[red]FAILS[/] ", str(error), failed + 1
            except NotApplicable as error:
                console.print(f"[yellow]skipped[/]  {escape(str(error))}", highlight=False)
                return int(failed > 0)
            console.print(f"  {mark} {title}: {escape(said)}  [dim]({time.monotonic() - began:.0f} s)[/]", highlight=False)
    console.print(
        f"[green]{method.name} keeps the contract.[/]" if not failed else f"[red]{failed} checks failed.[/] See baselines/README.md."
    )
    return int(failed > 0)


def _find(name: str, paths: Paths) -> Method:
    if (Path(name) / "method.toml").exists():
        return load_method(Path(name).resolve(), paths.project)
    broken: dict[str, ConfigError] = {}
    methods = find_methods(paths, broken=broken)
    if name in broken:
        raise broken[name]
    if name not in methods:
        raise ConfigError(f"no method {name!r}.{nearest(name, methods)} A folder with a method.toml works too.")
    return methods[name]


def _default_config(method: Method) -> str:
    return next(iter(method.file.suites.get("smoke", ())), next(iter(method.configs)))


def _checks(method: Method, laboratory: Laboratory, paths: Paths, quick: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """The checks in order; later ones use the first run."""
    first: list[Trial] = []
    before = hash_tree(method.source_folders(paths.project), paths.project)

    def output() -> str:
        first.append(laboratory.run(sim_name(TARGET), FIRST))
        record = first[0].record
        return (
            f"{record.domain.users} users, every list valid, isolation {record.isolation.level}, {sum(record.cost.stages.values()):.1f} s"
        )

    def repeated() -> str:
        _need(first)
        return _compare(first[0], laboratory.run(sim_name(TARGET), SECOND), laboratory.device)

    def stray() -> str:
        if hash_tree(method.source_folders(paths.project), paths.project) != before:
            raise CheckFailed("the method's own folder has changed; write to job.output, job.cache, job.scratch or job.checkpoint")
        return "its folder is as it was"

    yield "imports", lambda: check_imports(method, paths.project)
    yield "output", output
    yield "better than random", lambda: _beats_random(_need(first))
    yield "same seed, same output", repeated
    yield "writes nowhere else", stray
    yield "keeps a small budget", lambda: _keeps_budget(laboratory.run(sim_name(TARGET), HURRIED, SMALL_BUDGET))
    if not quick:
        yield "could be found training on validation items", lambda: _learns(laboratory)
        for protocol in method.file.protocols:
            under = "" if protocol == PROTOCOL else f", {protocol}"
            yield f"does not see the test targets{under}", functools.partial(_canary, laboratory, "canary", protocol)
            yield f"does not train on validation items{under}", functools.partial(_canary, laboratory, "canary_valid", protocol)


def _need(first: list[Trial]) -> Trial:
    if not first:
        raise CheckFailed("needs a run with valid output")
    return first[0]


def check_imports(method: Method, project: Path) -> str:
    """Only ``harness.contract`` and declared ``sources`` of this project may be imported. Raises CheckFailed."""
    declared = {source.removesuffix(".py").replace("/", ".") for source in method.file.sources}
    own = {".".join(method.folder.relative_to(project).parts)} if method.folder.is_relative_to(project) else set()
    rooms = {"harness", "utgrec", "baselines", "tests"}
    for path in (
        p for root in method.source_folders(project) for p in (list_files(root) if root.is_dir() else [root]) if p.suffix == ".py"
    ):
        for line, module in _imports(path):
            inside = any(module == name or module.startswith(f"{name}.") for name in declared | own)
            if module.split(".")[0] in rooms and module != "harness.contract" and not inside:
                mend = (
                    "only harness.contract is for methods"
                    if module.startswith("harness")
                    else f"declare it in method.toml: sources = ['{module.replace('.', '/')}']"
                )
                raise CheckFailed(f"{path.name}:{line} imports {module}; {mend}")
    return "harness.contract" + (f" and {', '.join(sorted(declared))}" if declared else "") + " only"


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "harness" else [node.module]
            yield from ((node.lineno, module) for module in modules)


def _beats_random(trial: Trial) -> str:
    """Hits at 10 against Binomial(users, 10 / items)."""
    metric = trial.record.metrics["recall_at_10"]
    chance = 10 / trial.public.n_items
    z = (metric.mean - chance) / (chance * (1 - chance) / metric.n) ** 0.5
    text = f"recall@10 {metric.mean:.4f}, chance {chance:.4f}, z = {z:.1f}"
    if z < Z_NEEDED:
        raise CheckFailed(f"{text}; needed: {Z_NEEDED:.0f}")
    return text


def _compare(first: Trial, second: Trial, device: str) -> str:
    assert first.items_UK is not None and second.items_UK is not None
    if first.record.training.budget_bound or second.record.training.budget_bound:
        raise CheckFailed(
            f"the budget of {SECONDS:.0f} s ended a run, so equal lists cannot be expected; --config names a smaller configuration"
        )
    equal = float((first.items_UK == second.items_UK).mean())
    if device == "cpu":
        if equal < 1:
            raise CheckFailed(f"{1 - equal:.2%} of the entries differ between two runs with one seed; seed every generator with job.seed")
        return "bit-equal"
    top = float((first.items_UK[:, :10] == second.items_UK[:, :10]).mean())
    if top < GPU_AGREEMENT:
        raise CheckFailed(f"only {top:.2%} of the top 10 are equal in two runs with one seed; {GPU_AGREEMENT:.0%} are asked on a GPU")
    return f"{top:.2%} of the top 10 equal"


def _keeps_budget(trial: Trial) -> str:
    record = trial.record
    spent = record.cost.fit_seconds
    if spent is None:
        return "no training time told (meta.json: timings.fit)"
    if spent > SMALL_BUDGET * 1.5 + 5:
        raise CheckFailed(f"trained {spent:.1f} s with a budget of {SMALL_BUDGET:.0f} s; ask job.remaining (contract.Stopping does)")
    return f"trained {spent:.1f} s of {SMALL_BUDGET:.0f} s, stopped by {record.training.stopped_by}"


def _learns(laboratory: Laboratory) -> str:
    """The control of the check after it: staying below the bound says something of a method that passes it where it may."""
    seen, limit, text = _on_canary(laboratory, "canary_open", PROTOCOL)
    if seen <= limit:
        raise CheckFailed(
            f"{text}: it does not learn what training shows here, so that the check for training on validation items says nothing "
            "of it; --config names a configuration that learns more"
        )
    return text


def _canary(laboratory: Laboratory, kind: str, protocol: str) -> str:
    seen, limit, text = _on_canary(laboratory, kind, protocol)
    if seen > limit:
        raise CheckFailed(f"{text}: more than an honest method can reach")
    return text


def _on_canary(laboratory: Laboratory, kind: str, protocol: str) -> tuple[float, float, str]:
    """Recall@10 of the method, its bound, and both in words."""
    name = laboratory.canary(kind, protocol)
    trial = laboratory.run(name, FIRST)
    limit = bound(laboratory.public(name), kind=kind, k=10)
    seen = trial.record.metrics["recall_at_10"].mean
    return seen, limit.recall, f"recall@10 {seen:.4f}, chance {limit.expected:.4f}, bound {limit.recall:.4f}"
