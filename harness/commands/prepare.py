"""From a suite's name to a plan: what `run`, `plan`, `table`, `publish` and `score` have in common.

In: the options of the command line. Out: a ``Session``: suite, methods, plan, paths, executor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import provenance
from harness.execute.stage import Executor
from harness.method import Method, find_methods
from harness.paths import Paths
from harness.runspec import Plan
from harness.suite import Suite, load_suite, make_plan
from harness.values import ConfigError, nearest

AMAZON = ("musical_instruments", "industrial_and_scientific", "video_games", "office_products")
HOW_TO_AMAZON = {
    "": ("harness data prepare data/raw paper", "harness run --suite amazon2023"),
    "conductor": ("docker compose run --rm data prepare data/raw paper", "SUITE=amazon2023 docker compose up benchmark"),
}
"""The two commands, outside and inside the containers, once the raw files lie in ``data/raw`` (README, "The paper's benchmark")."""


@dataclass(frozen=True)
class Selection:
    """Parts of a suite: only these methods (``NAME`` or ``NAME/CONFIG``) and domains; empty means all."""

    methods: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    seeds: int | None = None
    """Only the first so many seeds."""


@dataclass(frozen=True)
class Session:
    suite: Suite
    paths: Paths
    methods: dict[str, Method]
    plan: Plan
    broken: dict[str, ConfigError]
    """Method folders that could not be loaded; they cost the others nothing."""


def choose_suite(name: str, paths: Paths, say: Callable[[str], None]) -> Suite:
    """A suite by name; ``auto`` is ``amazon2023`` where its domains are prepared, else ``smoke``, and says so."""
    if name != "auto":
        return load_suite(name)
    missing = [domain for domain in AMAZON if not (paths.public(domain) / "domain.json").exists()]
    if not missing:
        return load_suite("amazon2023")
    say(
        "The Amazon domains are not prepared, so this is the smoke suite on SIMULATED data. The real benchmark, with the raw files\n"
        "in data/raw (README, section The paper's benchmark):\n"
        + "\n".join(f"    {command}" for command in HOW_TO_AMAZON.get(os.environ.get("HARNESS_CONTAINER", ""), HOW_TO_AMAZON[""]))
    )
    return load_suite("smoke")


def ensure_simulated(suite: Suite, paths: Paths, say: Callable[[str], None]) -> None:
    """Make the simulated domains that a suite asks for; those of the same recipe that are there already stay."""
    if suite.simulate is None:
        return
    from harness.data.simulate import simulate

    if not all((paths.public(name) / "domain.json").exists() for name in (*suite.domains, *suite.pretrain)):
        say("simulating the domains (once) ...")
    recipe = suite.simulate
    simulate(paths.data, seed=recipe.seed, users=recipe.users, items=recipe.items, protocol=suite.protocol)


def open_session(
    suite_name: str, executor_name: str, device: str, selection: Selection, say: Callable[[str], None]
) -> tuple[Session, Executor]:
    """Everything that a verb needs. Raises ConfigError with what to do."""
    paths = Paths.default()
    broken: dict[str, ConfigError] = {}
    methods = find_methods(paths, broken=broken)
    suite = choose_suite(suite_name, paths, say)
    ensure_simulated(suite, paths, say)
    executor = make_executor(executor_name, paths)
    chosen = choose_device(device, executor)
    environment = provenance.environment_digests(tuple(methods.values()), executor.environment())
    for entry in suite.run:
        if entry.method in broken:
            raise broken[entry.method]
    plan = select(make_plan(suite, paths, methods, environment, chosen), selection)
    return Session(suite, paths, methods, plan, broken), executor


def make_executor(name: str, paths: Paths) -> Executor:
    if name == "local":
        from harness.execute.local import LocalExecutor

        return LocalExecutor(paths)
    if name == "worker":
        from harness.execute.worker import WorkerExecutor

        return WorkerExecutor(paths)
    if name == "docker":
        from harness.execute.docker import DockerExecutor

        return DockerExecutor(paths)
    raise ConfigError(f"--executor {name!r}.{nearest(name, ['local', 'worker', 'docker'])}")


def choose_device(wanted: str, executor: Executor) -> str:
    """``cpu`` or ``cuda``; ``auto`` is ``cuda`` where the executor's machine has a GPU and a torch built for it."""
    environment = executor.environment()
    has_gpu = environment.gpu is not None
    cuda_build = "+cpu" not in environment.packages.get("torch", "+cpu")
    if wanted == "auto":
        return "cuda" if has_gpu and cuda_build else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise ConfigError(f"--device {wanted!r}.{nearest(wanted, ['auto', 'cpu', 'cuda'])}")
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("--device cuda, but no GPU was found (`nvidia-smi`); `harness doctor` says more")
    return wanted


def select(plan: Plan, selection: Selection) -> Plan:
    """The part of a plan that was asked for. Raises ConfigError for a name that the plan does not have."""
    names = {run.method for run in plan.runs} | {f"{run.method}/{run.config}" for run in plan.runs}
    for kind, wanted, known in (("--method", selection.methods, names), ("--domain", selection.domains, set(plan.domains))):
        for word in wanted:
            if word not in known:
                raise ConfigError(f"{kind} {word!r} is not in suite {plan.suite}.{nearest(word, known)}")
    runs = tuple(
        run
        for run in plan.runs
        if (not selection.methods or {run.method, f"{run.method}/{run.config}"} & set(selection.methods))
        and (not selection.domains or run.domain in selection.domains)
        and (selection.seeds is None or run.seed <= selection.seeds)
    )
    return plan.model_copy(update={"runs": runs})


def log_of(session: Session, run_id: str) -> Path | None:
    """The log of a run's last stage that has one."""
    from harness.schedule import stage_folder

    for run in session.plan.runs:
        if run.id == run_id:
            logs = [stage_folder(session.paths, run.method, stage).log for stage in run.stages]
            return next((path for path in reversed(logs) if path.exists()), None)
    return None
