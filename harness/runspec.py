"""A run as one frozen value, and a plan as a tuple of them.

``PlannedRun`` names everything that decides a result: method, configuration, domain, seed, budget, device, and the keys
derived from them. Views (tables, MLflow) take a ``Plan`` and the records, so that a planned run without a record shows.
"""

from __future__ import annotations

import hashlib
from typing import Any

from harness.contract import PROTOCOL
from harness.values import Frozen


class Budget(Frozen):
    """``seconds`` of training, hard end at ``deadline`` seconds, memory and disk in bytes, CPU threads."""

    seconds: float
    deadline: float
    memory: int
    disk: int
    threads: int


class PlannedStage(Frozen):
    """One stage of a run. Runs whose stages have the same key share the stage."""

    name: str
    key: str
    domains: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Names of the earlier stages of the same run whose output it reads."""


class PlannedRun(Frozen):
    """One method x configuration x domain x seed."""

    id: str
    method: str
    config: str
    title: str
    """Row label in tables; two runs with the same title and domain differ by the seed only."""
    domain: str
    seed: int
    fit_key: str
    stages: tuple[PlannedStage, ...]
    configuration: dict[str, Any]
    budget: Budget
    device: str = "cpu"
    precision: str = "fp32"
    missing: str = ""
    """Why it cannot run (a need the domain does not meet): it becomes a skipped record without starting anything."""


class Plan(Frozen):
    """All runs of a suite, in the order of the suite file: methods are rows, domains column groups."""

    suite: str
    title: str
    runs: tuple[PlannedRun, ...]
    metrics: tuple[str, ...] = ("recall_at_5", "recall_at_10", "ndcg_at_5", "ndcg_at_10")
    """The metrics that its tables show; records hold all."""
    protocol: str = PROTOCOL

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.domain for run in self.runs))

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.title for run in self.runs))


def run_id(method: str, config: str, domain: str, seed: int, fit_key: str) -> str:
    return f"{method}.{config}.{domain}.s{seed}.{fit_key[:12]}"


def stage_folder_name(stage: str, key: str) -> str:
    """The name of a stage's folder below ``stages/METHOD/``."""
    return f"{stage}-{key[:16]}"


def derived_seed(*parts: object) -> int:
    """A 31-bit seed from any parts, the same on every machine: seeds come from hashed axes, never from hyper-parameters."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF
