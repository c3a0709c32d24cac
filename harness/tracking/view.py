"""What MLflow should hold for a plan and its records: pure functions, no server in sight.

In: a plan, its records. Out: a ``RunView`` for every planned run (a child run), for every method x configuration x
domain (its parent, with mean and spread over seeds) and for the comparison. A view has a digest over all that it says,
so that "is it published already?" is one comparison. Only means go out: per-user ranks and predictions never do.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.contract import PROTOCOL
from harness.record import Record
from harness.runspec import Plan, PlannedRun
from harness.tracking.groups import Group, group_key
from harness.values import digest

VERSION = 1
"""Raise it when a view of the same record changes: everything is then brought up to date at the next publish."""

MAX_TAG = 5000
MAX_PARAM = 6000
MAX_KEY = 250
TABLE = "comparison.json"
"""The artifact that ``mlflow.load_table`` reads."""

OWN_TAGS = frozenset(
    {
        "state",
        "reason",
        "method",
        "config",
        "title",
        "domain",
        "seed",
        "seeds",
        "device",
        "fit_key",
        "score_key",
        "git_sha",
        "dirty",
        "isolation",
        "hardware",
        "ran_beside_others",
        "domain_digest",
        "simulated",
        "protocol",
        "lineage",
        "precision",
        "stopped_by",
        "budget_bound",
    }
)
"""The tags that views set. What a reader adds in the UI is none of our business."""

COST_FIELDS = ("fit_seconds", "predict_seconds", "users_per_second", "cpu_seconds", "peak_memory", "peak_device_memory", "parameters")


@dataclass(frozen=True)
class RunView:
    """One MLflow run as it should be. ``key`` identifies it for good; ``parent`` is the key of the run above it."""

    key: str
    kind: str
    name: str
    status: str
    digest: str
    parent: str | None = None
    start: int | None = None
    end: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    datasets: Sequence[Mapping[str, Any]] = ()
    artifacts: Mapping[str, bytes] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ a seed


def planned_view(run: PlannedRun) -> RunView:
    """A run that has just started: it shows as RUNNING while its curves come in."""
    tags = {"state": "running", **_axis_tags(run)}
    return RunView(run.id, "seed", _seed_name(run, False), "RUNNING", "", group_key(run), tags=tags, params=parameters(run.configuration))


def missing_view(run: PlannedRun) -> RunView:
    """A planned run without a record: it must show, or the suite would look complete."""
    state, reason = ("skipped", run.missing) if run.missing else ("missing", "no record: it never ran, or was killed")
    tags = {"state": state, "reason": reason, **_axis_tags(run)}
    name, known = _seed_name(run, False), digest([VERSION, "no record", run.id, state, reason])
    return RunView(run.id, "seed", name, _mlflow_status(state), known, group_key(run), tags=tags)


def seed_view(run: PlannedRun, record: Record) -> RunView:
    """A finished run. A run that is not ok has its status and reason, and no metric."""
    raw = record.model_dump(mode="json")
    simulated = record.domain.simulated
    tags = {
        **_axis_tags(run),
        "state": record.status.state,
        "reason": record.status.reason,
        "git_sha": record.provenance.git_sha or "",
        "dirty": "" if record.provenance.dirty is None else _word(record.provenance.dirty),
        "isolation": record.isolation.level + ("" if record.isolation.network else ", network reachable"),
        "hardware": record.environment.hardware,
        "ran_beside_others": _word(record.cost.beside),
        "domain_digest": record.domain.digest,
        "score_key": record.run.score_key or "",
        "simulated": _word(simulated),
        "protocol": "" if record.protocol.version == PROTOCOL else record.protocol.version,
        "lineage": record.method.lineage,
        "precision": record.precision.dtype,
        "stopped_by": record.training.stopped_by or "",
        "budget_bound": _word(record.training.budget_bound),
        "mlflow.source.name": record.provenance.command,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": record.provenance.git_sha or "",
    }
    return RunView(
        key=record.run.id,
        kind="seed",
        name=_seed_name(run, simulated),
        status=_mlflow_status(record.status.state),
        digest=digest([VERSION, run.title, raw]),
        parent=group_key(run),
        start=milliseconds(record.provenance.started),
        end=milliseconds(record.provenance.finished),
        tags={name: value for name, value in tags.items() if value},
        params=parameters(record.method.configuration),
        metrics=_metrics(record) if record.ok else {},
        datasets=(_dataset(record),),
        artifacts={"record.json": (json.dumps(raw, indent=1, allow_nan=False) + "\n").encode()},
    )


def _metrics(record: Record) -> dict[str, float]:
    out: dict[str, Any] = {name: metric.mean for name, metric in record.metrics.items()}
    out |= {name if name.startswith("valid_") else f"valid_{name}": value for name, value in record.valid_metrics.items()}
    out |= {f"cost_{name}": getattr(record.cost, name) for name in COST_FIELDS}
    out |= {f"cost_stage_{name}_seconds": value for name, value in record.cost.stages.items()}
    out |= {f"training_{name}": getattr(record.training, name) for name in ("best_valid", "steps", "epochs")}
    out |= {f"behaviour_{name}": value for name, value in record.behaviour.items() if not isinstance(value, str | bool)}
    return dict(_finite(out))


def _dataset(record: Record) -> dict[str, Any]:
    """The domain as an MLflow input. The digest has at most 36 characters there; the whole one is a tag."""
    card = record.domain
    counts = {"users": card.users, "items": card.items, "interactions": card.interactions, "train_interactions": card.train_interactions}
    columns = [("user", "integer"), ("train", "string"), ("valid", "integer")]
    return {
        "dataset": {
            "name": card.name,
            "digest": card.digest.removeprefix("sha256:")[:36],
            "source_type": "local",
            "source": json.dumps({"uri": f"data/domains/{card.name}/public"}),
            "schema": json.dumps({"mlflow_colspec": [{"name": name, "type": kind, "required": True} for name, kind in columns]}),
            "profile": json.dumps({**counts, "simulated": card.simulated, "release": card.release}),
        },
        "tags": [{"key": "mlflow.data.context", "value": "evaluation"}],
    }


def _axis_tags(run: PlannedRun) -> dict[str, str]:
    return {
        "method": run.method,
        "config": run.config,
        "title": run.title,
        "domain": run.domain,
        "seed": str(run.seed),
        "device": run.device,
        "fit_key": run.fit_key,
    }


def _seed_name(run: PlannedRun, simulated: bool) -> str:
    return f"{run.title} · {run.domain} · seed {run.seed}" + _simulated(simulated)


def _mlflow_status(state: str) -> str:
    return {"ok": "FINISHED", "skipped": "FINISHED", "interrupted": "KILLED"}.get(state, "FAILED")


# ------------------------------------------------------------------------------------------- groups and comparison


def running_group_view(run: PlannedRun) -> RunView:
    """The parent of a run that has just started."""
    name = f"{run.title} · {run.domain}"
    return RunView(group_key(run), "group", name, "RUNNING", "", tags={"state": "running", "title": run.title, "domain": run.domain})


def group_view(group: Group) -> RunView:
    """The parent run of a group's seeds: mean, ``_sd`` (two seeds or more) and ``_n``."""
    first = group.runs[0]
    metrics: dict[str, float] = {}
    for name, spread in group.metrics.items():
        metrics[name] = spread.mean
        if spread.sd is not None:
            metrics[f"{name}_sd"] = spread.sd
    if metrics:
        metrics["seeds"] = float(len(group.runs))
    tags = {
        "state": group.state,
        "reason": group.reason,
        "method": group.method,
        "config": group.config,
        "title": group.title,
        "domain": group.domain,
        "seeds": ", ".join(str(run.seed) for run in group.runs),
        "simulated": _word(group.simulated),
    }
    view = RunView(
        key=group.key,
        kind="group",
        name=f"{group.title} · {group.domain}" + _simulated(group.simulated),
        status=_mlflow_status(group.state),
        digest="",
        start=milliseconds(group.started),
        end=milliseconds(group.finished),
        tags={name: value for name, value in tags.items() if value},
        params=parameters(first.configuration),
        metrics=dict(_finite(metrics)),
    )
    return _with_digest(view)


def comparison_view(plan: Plan, all_groups: Sequence[Group], files: Mapping[str, Path], table: Any = None) -> RunView:
    """The comparison: the table (for ``load_table``) and its files. The chart is drawn when it is published.

    ``table`` is rows (mappings) or columns (a mapping of lists); without one, the rows are made from the groups.
    """
    simulated = any(group.simulated for group in all_groups)
    artifacts = {path.name: path.read_bytes() for path in files.values() if path.is_file()}
    artifacts[TABLE] = _split_table(table if table is not None else _rows(plan, all_groups))
    complete = all(group.state in ("ok", "skipped") for group in all_groups)
    tags = {
        "state": "ok" if complete else "incomplete",
        "title": plan.title,
        "simulated": _word(simulated),
        "mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}]),
        "mlflow.note.content": _note(plan, artifacts, simulated),
    }
    name = f"comparison: {plan.title or plan.suite}" + _simulated(simulated)
    status = "FINISHED" if complete else "FAILED"
    start = min((moment for group in all_groups if (moment := milliseconds(group.started))), default=None)
    end = max((moment for group in all_groups if (moment := milliseconds(group.finished))), default=None)
    view = RunView(f"comparison.{plan.suite}", "comparison", name, status, "", start=start, end=end, tags=tags, artifacts=artifacts)
    return _with_digest(view, [chart_values(all_groups, plan.metrics)])


def chart_values(all_groups: Iterable[Group], names: Sequence[str]) -> list[Any]:
    """All that a chart of these groups depends on."""
    return [[g.title, g.domain, g.simulated, {n: vars(g.metrics[n]) for n in names if n in g.metrics}] for g in all_groups]


def _rows(plan: Plan, all_groups: Iterable[Group]) -> list[dict[str, Any]]:
    rows = []
    for group in all_groups:
        row: dict[str, Any] = {"method": group.title, "domain": group.domain, "seeds": len(group.runs)}
        row |= {"state": group.state, "reason": group.reason}
        for name in plan.metrics:
            spread = group.metrics.get(name)
            row[name] = spread.mean if spread else None
            row[f"{name}_sd"] = spread.sd if spread else None
        rows.append(row)
    return rows


def _split_table(table: Any) -> bytes:
    """The form in which ``mlflow.log_table`` writes JSON: ``columns`` and ``data``, row by row."""
    if isinstance(table, Mapping):
        columns = list(table)
        data = [list(row) for row in zip(*(table[column] for column in columns), strict=True)]
    else:
        columns = list(dict.fromkeys(name for row in table for name in row))
        data = [[row.get(column) for column in columns] for row in table]
    data = [[None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in data]
    return json.dumps({"columns": columns, "data": data}, ensure_ascii=False, allow_nan=False).encode()


def _note(plan: Plan, artifacts: Mapping[str, bytes], simulated: bool) -> str:
    """The description at the head of the run's page: the Markdown table itself, where it fits."""
    for name, data in artifacts.items():
        if name.endswith(".md") and len(data) <= MAX_TAG:
            return data.decode(errors="replace")
    head = "**SIMULATED DATA: these numbers say nothing about real shops.**\n\n" if simulated else ""
    return head + f"Comparison of the suite {plan.suite}: see the artifacts."


# ----------------------------------------------------------------------------------------------------------- details


def parameters(configuration: Mapping[str, Any]) -> dict[str, str]:
    """A configuration as flat MLflow parameters: ``optimizer.lr``; lists as JSON."""
    out: dict[str, str] = {}
    for name, value in _flat(configuration, ""):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        out[clean_name(name)] = text[:MAX_PARAM]
    return out


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def clean_name(name: str) -> str:
    """A name that MLflow takes: it refuses ``@`` and all but letters, digits and ``_ - . : space /``, and odd paths."""
    return re.sub(r"[^A-Za-z0-9_\-. :]", "_", name)[:MAX_KEY].strip(". ") or "_"


def milliseconds(time: str) -> int | None:
    """Milliseconds since 1970 of an ISO time; None where it is none."""
    try:
        moment = datetime.datetime.fromisoformat(time)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(1, int(moment.timestamp() * 1000))


def _finite(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            yield clean_name(name), float(value)


def _with_digest(view: RunView, more: Any = None) -> RunView:
    files = {name: hashlib.sha256(data).hexdigest() for name, data in view.artifacts.items()}
    parts = [VERSION, view.name, view.status, dict(view.tags), dict(view.params), dict(view.metrics), files, more]
    return RunView(**{**vars(view), "digest": digest(parts)})


def _word(value: bool) -> str:
    return "true" if value else "false"


def _simulated(value: bool) -> str:
    return " · SIMULATED" if value else ""
