"""The seeds of one method x configuration x domain, taken together.

In: a plan, its records. Out: ``Group`` values in the plan's order, the source of parent runs and of the chart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.record import Record
from harness.runspec import Plan, PlannedRun


@dataclass(frozen=True)
class Spread:
    """A mean over seeds. ``sd`` is the sample standard deviation (None for one seed); ``low`` and ``high`` are the
    means of the seeds' 95 % intervals over users."""

    mean: float
    sd: float | None
    n: int
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Group:
    """``metrics`` is empty unless every planned seed is ok: nothing is averaged over a hole."""

    method: str
    config: str
    title: str
    domain: str
    simulated: bool
    runs: tuple[PlannedRun, ...]
    state: str
    reason: str
    metrics: Mapping[str, Spread]
    started: str
    finished: str
    """When the first of its runs started and the last one ended; empty while there is none."""

    @property
    def key(self) -> str:
        return group_key(self.runs[0])


def group_key(run: PlannedRun) -> str:
    return f"{run.method}.{run.config}.{run.domain}"


def groups(plan: Plan, records: Mapping[str, Record]) -> list[Group]:
    by_key: dict[str, list[PlannedRun]] = {}
    for run in plan.runs:
        by_key.setdefault(group_key(run), []).append(run)
    return [_group(runs, records) for runs in by_key.values()]


def _group(runs: Sequence[PlannedRun], records: Mapping[str, Record]) -> Group:
    first = runs[0]
    found = [records[run.id] for run in runs if run.id in records]
    states: list[tuple[str, str]] = []
    for run in runs:
        record = records.get(run.id)
        absent = ("skipped", run.missing) if run.missing else ("missing", "")
        states.append((record.status.state, record.status.reason) if record else absent)
    state = _worst([name for name, _ in states])
    reason, metrics = "", {}
    if state == "ok":
        metrics = {name: spread for name in found[0].metrics if (spread := _spread(name, found))}
    else:
        reasons = sorted({why for name, why in states if name == state and why})
        count = sum(name == state for name, _ in states)
        reason = f"{count} of {len(runs)} seeds {state}" + (f": {'; '.join(reasons)}" if reasons else "")
    simulated = any(record.domain.simulated for record in found)
    return Group(
        method=first.method,
        config=first.config,
        title=first.title,
        domain=first.domain,
        simulated=simulated,
        runs=tuple(runs),
        state=state,
        reason=reason,
        metrics=metrics,
        started=min((record.provenance.started for record in found), default=""),
        finished=max((record.provenance.finished for record in found), default=""),
    )


def _worst(states: Sequence[str]) -> str:
    """A failed seed outweighs a skipped one, and any of the two outweighs the good ones."""
    bad = [state for state in states if state != "ok"]
    return next((state for state in bad if state != "skipped"), bad[0] if bad else "ok")


def _spread(name: str, records: Sequence[Record]) -> Spread | None:
    values = [record.metrics[name] for record in records if name in record.metrics]
    if len(values) != len(records) or not all(math.isfinite(value.mean) for value in values):
        return None
    means = [value.mean for value in values]
    lows = [value.low for value in values if value.low is not None]
    highs = [value.high for value in values if value.high is not None]
    whole = len(lows) == len(highs) == len(values)
    return Spread(
        mean=statistics.fmean(means),
        sd=statistics.stdev(means) if len(means) > 1 else None,
        n=len(means),
        low=statistics.fmean(lows) if whole else None,
        high=statistics.fmean(highs) if whole else None,
    )
