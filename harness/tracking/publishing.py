"""Publish records to MLflow: all of a plan, any number of times, with the same outcome.

In: a plan, its records, the logs and progress files that were kept, the files of the table. Out: ``PublishSummary``.
The server is asked what it has, and gets what is missing; ``Ledger`` notes it, so that the next run of the same plan
knows without a server that nothing is new.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import mlflow_server
from harness.contract import PROGRESS
from harness.record import Record
from harness.runspec import Plan, PlannedRun, stage_folder_name
from harness.tracking import view
from harness.tracking.curves import Curve, Point
from harness.tracking.groups import groups
from harness.tracking.ledger import Ledger
from harness.tracking.rest import Rest
from harness.tracking.store import Store

MAX_LOG = 1 << 20
SESSION = "harness.session"
"""Tag of a live run: the process that is running it."""

Logs = Callable[[str], Path | None]
Warn = Callable[[str], None]


def warn(message: str) -> None:
    logging.getLogger("harness.tracking").warning(message)


@dataclass
class PublishSummary:
    """How many MLflow runs (seeds, their parents, the comparison) were made, changed, made anew, or right already."""

    url: str
    created: int = 0
    updated: int = 0
    replaced: int = 0
    unchanged: int = 0
    local: bool = False
    """The server was a local one of ours; ``harness ui`` shows it again."""
    warnings: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> None:
        setattr(self, outcome, getattr(self, outcome) + 1)

    def __str__(self) -> str:
        counts = [f"{getattr(self, name)} {name}" for name in ("created", "updated", "replaced", "unchanged") if getattr(self, name)]
        where = f"{self.url}   (look at it any time with `harness ui`)" if self.local else self.url
        return "\n".join([f"MLflow runs: {', '.join(counts) or 'none'}. {where}", *self.warnings])


def pending(
    plan: Plan, records: Mapping[str, Record], results: Path, files: Mapping[str, Path] | None = None, table: Any = None
) -> list[str]:
    """The keys of what is new since the last publish, found without a server. ``files`` None leaves the comparison out."""
    noted = Ledger(results, mlflow_server.configured()).read(plan.suite)
    views = _views(plan, records, files, table)
    return [v.key for v in views if noted.get(v.key) != v.digest]


def publish(
    plan: Plan,
    records: Mapping[str, Record],
    logs: Logs,
    results: Path,
    files: Mapping[str, Path] | None = None,
    table: Any = None,
    *,
    progress: Callable[[PlannedRun, Record], Mapping[str, Path]] | None = None,
    timeout: float | None = None,
) -> PublishSummary:
    """Bring the server up to date with the records. Raises ServerError or TrackingError.

    ``logs`` gives a run's log; where it gives None, the log that its last stage kept is taken. ``files`` are the files
    of the comparison, ``table`` its rows (or columns), made from the records where there is none. ``progress`` gives the
    kept progress files by stage; by default they are looked for under ``results/stages``.
    """
    server = mlflow_server.ensure(results, timeout)
    try:
        return publish_to(server, plan, records, logs, results, files, table, progress=progress)
    finally:
        server.close()


def publish_to(
    server: mlflow_server.Server,
    plan: Plan,
    records: Mapping[str, Record],
    logs: Logs,
    results: Path,
    files: Mapping[str, Path] | None = None,
    table: Any = None,
    *,
    progress: Callable[[PlannedRun, Record], Mapping[str, Path]] | None = None,
    store: Store | None = None,
) -> PublishSummary:
    """``publish`` to a server that is in use already."""
    ledger = Ledger(results, None if server.local else server.uri)
    warnings: list[str] = []
    if store is None:
        with contextlib.closing(open_store(server, plan, warnings.append)) as store:
            summary = publish_to(server, plan, records, logs, results, files, table, progress=progress, store=store)
        summary.warnings += warnings
        return summary
    summary = PublishSummary(store.url, local=server.local, warnings=warnings)
    runs = {run.id: run for run in plan.runs}
    digests: dict[str, str] = {}
    with ledger.lock("publish.lock"):
        store.load()
        try:
            for wanted in sorted(_views(plan, records, files or {}, table), key=lambda v: v.kind != "group"):
                run, record = runs.get(wanted.key), records.get(wanted.key)
                if run is not None and record is None and _runs_elsewhere(store, wanted.key):
                    continue
                if wanted.kind == "comparison":
                    wanted = _with_chart(wanted, plan, records, warnings.append)
                curves = log = None
                if run is not None and record is not None:
                    curves = _curves(run, record, results, progress)
                    log = _log_reader(logs(run.id) or kept_log(results, run, record))
                summary.count(store.bring(wanted, curves, log))
                digests[wanted.key] = wanted.digest
        finally:
            ledger.note(plan.suite, digests)
    return summary


def open_store(server: mlflow_server.Server, plan: Plan, say: Warn) -> Store:
    rest = Rest(server.uri)
    try:
        return Store(rest, plan.suite, plan.title, say)
    except BaseException:
        rest.close()
        raise


def publish_run(store: Store, run: PlannedRun, record: Record, log: Path | None, results: Path, followed: Mapping[str, Path]) -> None:
    """One finished run, as soon as it has ended. ``followed``: the progress files that were followed live, by stage."""

    def progress(run: PlannedRun, record: Record) -> Mapping[str, Path]:
        return {**kept_progress(results, run, record), **followed}

    store.bring(view.seed_view(run, record), _curves(run, record, results, progress), _log_reader(log or kept_log(results, run, record)))


def _views(plan: Plan, records: Mapping[str, Record], files: Mapping[str, Path] | None, table: Any) -> list[view.RunView]:
    all_groups = groups(plan, records)
    out = [view.group_view(group) for group in all_groups]
    for run in plan.runs:
        record = records.get(run.id)
        out.append(view.seed_view(run, record) if record else view.missing_view(run))
    if files is not None:
        out.append(view.comparison_view(plan, all_groups, files, table))
    return out


def _with_chart(wanted: view.RunView, plan: Plan, records: Mapping[str, Record], say: Warn) -> view.RunView:
    from harness import charts

    try:
        drawn = charts.comparison_charts(plan, groups(plan, records))
    except Exception as error:  # a chart is not worth a table
        say(f"the chart could not be drawn: {error}")
        drawn = {}
    return replace(wanted, artifacts={**wanted.artifacts, **drawn})


# --------------------------------------------------------------------------------------------- curves, logs, sessions


def kept_progress(results: Path, run: PlannedRun, record: Record) -> dict[str, Path]:
    """The progress files of the stages that this run trained itself. A shared stage's curve is the run's that trained it."""
    folder = results / "stages" / run.method
    own = {name: key for name, key in record.run.stage_keys.items() if name not in record.cost.shared_stages}
    return {name: folder / stage_folder_name(name, key) / "out" / PROGRESS for name, key in own.items()}


def stage_of(run: PlannedRun, path: Path) -> str:
    """The stage that a progress file belongs to, by its folder (``stages/METHOD/STAGE-KEY/out/progress.jsonl``)."""
    folder = path.parent.parent.name
    for stage in run.stages:
        if folder == stage_folder_name(stage.name, stage.key):
            return stage.name
    return run.stages[0].name if len(run.stages) == 1 else folder


def _curves(
    run: PlannedRun, record: Record, results: Path, progress: Callable[[PlannedRun, Record], Mapping[str, Path]] | None
) -> Callable[[], Iterable[list[Point]]]:
    def pieces() -> Iterable[list[Point]]:
        paths = progress(run, record) if progress else kept_progress(results, run, record)
        for stage, path in paths.items():
            curve = Curve(path, stage)
            try:
                yield from curve.read_all()
            finally:
                curve.close()

    return pieces


def kept_log(results: Path, run: PlannedRun, record: Record) -> Path:
    """The log of the stage that ended the run, or of its last one."""
    stage = record.status.stage if record.status.stage in record.run.stage_keys else run.stages[-1].name
    return results / "stages" / run.method / stage_folder_name(stage, record.run.stage_keys.get(stage, "")) / "log.txt"


def _log_reader(path: Path) -> Callable[[], bytes | None]:
    return lambda: read_log(path)


def read_log(path: Path) -> bytes | None:
    """The last MAX_LOG bytes of a log, or None where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        try:
            size = os.fstat(handle).st_size
            file.seek(max(0, size - MAX_LOG))
            data = file.read(MAX_LOG)
        except OSError:
            return None
    return (b"[...]\n" if size > MAX_LOG else b"") + data


def session() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _runs_elsewhere(store: Store, key: str) -> bool:
    """Whether another process of this machine is running it now: then there is no record yet, and nothing is missing."""
    run = store.find(key)
    if run is None or run["info"]["status"] != "RUNNING":
        return False
    tags = {tag["key"]: tag.get("value", "") for tag in run["data"].get("tags", [])}
    match = re.fullmatch(r"(.*):(\d+)", tags.get(SESSION, ""))
    if match is None or int(match[2]) == os.getpid():
        return False
    if match[1] != socket.gethostname():
        return True
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
