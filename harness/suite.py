"""Suites and plans: which methods, configurations, domains, seeds and budget, and the keys that follow.

In: a suite (TOML), the methods found, the domains present. Out: a ``Plan`` of frozen runs. Two keys decide what is done
again: the *fit key* (everything that forces retraining) and the *score key* (fit key + metric source + protocol).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from harness.contract import PROTOCOL, TIME
from harness.method import Config, Method, contract_hash
from harness.paths import Paths
from harness.runspec import Budget, Plan, PlannedRun, PlannedStage, derived_seed, run_id
from harness.values import ConfigError, Frozen, build, digest, nearest, read_toml

SUITES = Path(__file__).parent / "suites"
GIB = 1 << 30


class BudgetFile(Frozen):
    """``seconds``: training time a run. A run is ended at ``seconds`` + ``grace``."""

    seconds: float = Field(gt=0)
    grace: float = Field(600, ge=0)
    memory_gib: float = Field(16, gt=0)
    disk_gib: float = Field(20, gt=0)
    threads: int = Field(1, ge=1)


class Entry(Frozen):
    """``[[run]]``: configurations of a method, by default on all domains, seeds and the budget of the suite."""

    method: str
    configs: tuple[str, ...]
    domains: tuple[str, ...] | None = None
    seeds: int | None = Field(None, ge=1)
    budget: BudgetFile | None = None


class Simulate(Frozen):
    """``[simulate]``: make these domains first if they are not there (``harness data simulate``)."""

    users: int
    items: int
    seed: int = 1


class Suite(Frozen):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str
    description: str = ""
    domains: tuple[str, ...] = Field(min_length=1)
    pretrain: tuple[str, ...] = ()
    seeds: int = Field(ge=1)
    """How many: seeds 1..n, the same for all methods."""
    budget: BudgetFile
    metrics: tuple[str, ...] = Field(("recall_at_5", "recall_at_10", "ndcg_at_5", "ndcg_at_10"), min_length=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    protocol: Literal["loo-v1", "time-v1"] = "loo-v1"
    """Of all its domains: results under different protocols never stand in one table."""
    simulate: Simulate | None = None
    run: tuple[Entry, ...] = Field(min_length=1)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from harness.metrics import METRICS

        for name in value:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}.{nearest(name, METRICS)}")
        return value


def suite_path(name: str) -> Path:
    """A suite by name (``harness/suites/NAME.toml``) or by path."""
    path = Path(name)
    if path.suffix == ".toml":
        return path
    known = [p.stem for p in SUITES.glob("*.toml")]
    if name not in known:
        raise ConfigError(f"no suite {name!r}.{nearest(name, known)} A path to a .toml file works too.")
    return SUITES / f"{name}.toml"


def load_suite(name: str) -> Suite:
    path = suite_path(name)
    return build(Suite, read_toml(path), path)


def read_domain_info(paths: Paths, name: str) -> dict[str, Any]:
    """``domain.json`` of a prepared domain. Raises ConfigError with what to do when it is not there."""
    path = paths.public(name) / "domain.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        known = sorted(p.parent.parent.name for p in paths.data.glob("*/public/domain.json"))
        raise ConfigError(
            f"domain {name!r} is not prepared ({path} is missing).{nearest(name, known)} "
            "Make it with `harness data import` or `harness data simulate` (see --help)."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); prepare the domain again") from error


class KeyMaker:
    """Fit keys of stages. Holds what all runs of a plan share: contract, environment, device class."""

    def __init__(
        self,
        paths: Paths,
        methods: dict[str, Method],
        environment: dict[str, str],
        device: str,
        precision: str,
        protocol: str = PROTOCOL,
    ):
        self._paths, self._protocol = paths, protocol
        self._shared = {"contract": contract_hash(), "device": device, "precision": precision, "protocol": protocol}
        self._environment = environment
        self._sources = {name: method.source_hash(paths.project) for name, method in methods.items()}
        self._infos: dict[str, dict[str, Any]] = {}

    def source_hash(self, method: str) -> str:
        return self._sources[method]

    def info(self, domain: str) -> dict[str, Any]:
        if domain not in self._infos:
            info = read_domain_info(self._paths, domain)
            if (found := info.get("protocol", PROTOCOL)) != self._protocol:
                raise ConfigError(_other_protocol(domain, found, self._protocol))
            self._infos[domain] = info
        return self._infos[domain]

    def stages(
        self, method: Method, config: Config, domain: str, pretrain: tuple[str, ...], seed: int, budget: Budget
    ) -> tuple[PlannedStage, ...]:
        """The stages of one run with their keys; every stage's key covers the keys of the stages that it reads."""
        planned: list[PlannedStage] = []
        for stage in config.stages:
            domains = pretrain if stage.scope == "pretrain" else (domain,)
            values = config.values if stage.uses is None else {k: v for k, v in config.values.items() if k in stage.uses}
            inputs = {earlier.name: earlier.key for earlier in planned if stage.inputs is None or earlier.name in stage.inputs}
            key = digest(
                self._shared
                | {
                    "method": method.name,
                    "source": self._sources[method.name],
                    "environment": self._environment.get(method.name, self._environment[""]),
                    "program": method.file.program,
                    "stage": [stage.name, stage.scope],
                    "configuration": values,
                    "domains": {name: self.info(name)["digest"] for name in domains},
                    "seed": derived_seed(seed, stage.name),
                    "budget": budget.model_dump(),
                    "inputs": inputs,
                }
            )
            planned.append(PlannedStage(name=stage.name, key=key, domains=domains, needs=tuple(inputs)))
        return tuple(planned)


def _other_protocol(domain: str, found: str, wanted: str) -> str:
    by_time = " (`harness data prepare RAW CATEGORY --protocol time-v1` makes them, named CATEGORY_time)" if wanted == TIME else ""
    return (
        f"domain {domain!r} was prepared under the protocol {found}, and the suite's is {wanted}: results of both in one table would be"
        f" compared. Name domains of {wanted}{by_time}, or put the others into a suite of their own with protocol = {found!r}"
    )


def make_plan(suite: Suite, paths: Paths, methods: dict[str, Method], environment: dict[str, str], device: str) -> Plan:
    """All runs of a suite. Raises ConfigError for a method, configuration or domain that does not exist."""
    keys = KeyMaker(paths, methods, environment, device, suite.precision, suite.protocol)
    runs: list[PlannedRun] = []
    for entry in (*suite.run, *_joining(suite, methods)):
        if entry.method not in methods:
            raise ConfigError(f"suite {suite.name}: no method {entry.method!r}.{nearest(entry.method, methods)}")
        method = methods[entry.method]
        for name in entry.configs:
            config = method.config(name)
            for domain in entry.domains or suite.domains:
                if domain not in suite.domains:
                    raise ConfigError(f"suite {suite.name}: run {entry.method}: domain {domain!r}.{nearest(domain, suite.domains)}")
                for seed in range(1, (entry.seeds or suite.seeds) + 1):
                    runs.append(_plan_run(suite, entry, method, config, domain, seed, keys, device))
    ids = [run.id for run in runs]
    if repeated := {i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else set():
        raise ConfigError(f"suite {suite.name}: planned twice: {', '.join(sorted(repeated))}; take one of the entries out")
    return Plan(suite=suite.name, title=suite.title, runs=tuple(runs), metrics=suite.metrics, protocol=suite.protocol)


def _joining(suite: Suite, methods: dict[str, Method]) -> list[Entry]:
    """Configurations whose ``method.toml`` says that they belong to this suite, without those that the suite names itself."""
    named = {(entry.method, config) for entry in suite.run for config in entry.configs}
    entries = []
    for method in methods.values():
        configs = tuple(c for c in method.file.suites.get(suite.name, ()) if (method.name, c) not in named)
        if configs:
            entries.append(Entry(method=method.name, configs=configs))
    return entries


def _plan_run(
    suite: Suite, entry: Entry, method: Method, config: Config, domain: str, seed: int, keys: KeyMaker, device: str
) -> PlannedRun:
    limits = entry.budget or suite.budget
    budget = Budget(
        seconds=limits.seconds,
        deadline=limits.seconds + limits.grace,
        memory=int(limits.memory_gib * GIB),
        disk=int(limits.disk_gib * GIB),
        threads=limits.threads,
    )
    stages = keys.stages(method, config, domain, suite.pretrain, seed, budget)
    fit_key = stages[-1].key
    return PlannedRun(
        id=run_id(method.name, config.name, domain, seed, fit_key),
        method=method.name,
        config=config.name,
        title=config.title,
        domain=domain,
        seed=seed,
        fit_key=fit_key,
        stages=stages,
        configuration=config.values,
        budget=budget,
        device=device,
        precision=suite.precision,
        missing=_missing_need(method, config, keys.info(domain), suite, device),
    )


def _missing_need(method: Method, config: Config, info: dict[str, Any], suite: Suite, device: str) -> str:
    """Why a run cannot start here, or an empty string."""
    has = info.get("has", {})
    if suite.protocol not in method.file.protocols:
        return f"cannot be run under {suite.protocol}; its method.toml says protocols = {list(method.file.protocols)}"
    if "text" in config.needs and has.get("text", 1) == 0:
        return f"needs item text; {info['name']} has none"
    if "pictures" in config.needs and has.get("pictures", 1) == 0:
        return f"needs item pictures; {info['name']} has none"
    if "cuda" in config.needs and device != "cuda":
        return "needs a CUDA GPU; none was found"
    if config.pretrains and not suite.pretrain:
        return f"needs pre-training domains; suite {suite.name} names none (key 'pretrain')"
    return ""
