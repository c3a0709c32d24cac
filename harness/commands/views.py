"""`harness table`, `score`, `publish`, `keep`, `plan`: views of a plan and its records.

In: a session. Out: tables, MLflow, kept records, a dry run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from harness.commands.prepare import Session, log_of
from harness.contract import ContractError, Domain, InvalidOutput
from harness.execute.stage import Executor
from harness.paths import PROJECT
from harness.record import CACHED_STATES, Record, read_record, read_records
from harness.runspec import Plan
from harness.schedule import Scheduler, finished, stage_folder
from harness.score import oracle_metrics
from harness.values import ConfigError

PLANNED_STATES = {"cached": "dim", "score again": "cyan", "run": "bold"}


def oracles(session: Session, console: Console) -> dict[str, dict[str, float]]:
    """The oracle row: what the generator's own ranking reaches on each simulated domain. A damaged domain is named and has none."""
    found = {}
    for name in session.plan.domains:
        try:
            values = oracle_metrics(Domain.read(session.paths.public(name)), session.paths.private(name))
        except (ContractError, InvalidOutput) as error:
            console.print(f"[yellow]{escape(str(error))}[/]", highlight=False)
        else:
            if values:
                found[name] = values
    return found


def records_of(session: Session, console: Console) -> dict[str, Record]:
    """The records of a plan; one that cannot be read is named and counts as missing."""
    broken: dict[str, ConfigError] = {}
    records = read_records(session.paths.records, [run.id for run in session.plan.runs], broken=broken)
    for error in broken.values():
        console.print(f"[yellow]{escape(str(error))}[/]", highlight=False)
    return records


def make_tables(session: Session, records: dict[str, Record], console: Console) -> dict[str, Path]:
    """Build, print and write the comparison table. Returns the files by format."""
    from harness.table import build_table, to_rich, write_tables

    table = build_table(session.plan, records, oracles(session, console))
    console.print(to_rich(table))
    return write_tables(table, session.paths.tables / session.plan.suite)


def say_where(files: dict[str, Path], console: Console) -> None:
    """Where the table files lie, relative to the project where possible: true on the host and in a container."""
    folder = next(iter(files.values())).parent
    console.print(f"Tables: {folder.relative_to(PROJECT) if folder.is_relative_to(PROJECT) else folder}", highlight=False)


def all_fine(plan: Plan, records: dict[str, Record]) -> bool:
    """True if every planned run has a record that says ok or skipped."""
    return all(run.id in records and records[run.id].status.state in CACHED_STATES for run in plan.runs)


def show_table(session: Session, console: Console) -> int:
    records = records_of(session, console)
    files = make_tables(session, records, console)
    say_where(files, console)
    return 0 if all_fine(session.plan, records) else 1


def show_plan(session: Session, executor: Executor, console: Console) -> int:
    """A dry run: what would run, what is cached and why, and what it will roughly cost."""
    scheduler = Scheduler(session.plan, session.paths, session.methods, executor, {})
    seconds = known_seconds(session)
    table = RichTable(title=f"Plan of suite {session.plan.suite}")
    for name in ("method", "domain", "seed", "would", "why", "at most", "before"):
        table.add_column(name, justify="right" if name in ("seed", "at most", "before") else "left")
    total = 0.0
    for run in session.plan.runs:
        what, why = _intention(session, scheduler, run)
        before = seconds.get((run.method, run.config, run.domain))
        if what == "run":
            total += before if before is not None else run.budget.seconds
        cells = (
            run.title,
            run.domain,
            str(run.seed),
            what,
            why,
            f"{run.budget.seconds:,.0f} s",
            "" if before is None else f"{before:,.1f} s",
        )
        table.add_row(*map(Text, cells), style=PLANNED_STATES[what])
    console.print(table)
    unknown = sum(1 for run in session.plan.runs if (run.method, run.config, run.domain) not in seconds)
    hours = f"{total / 3600:.1f} h" if total >= 3600 else f"{total / 60:.1f} min"
    kind = "GPU time" if session.plan.runs and session.plan.runs[0].device == "cuda" else "time"
    console.print(
        f"At most about {hours} of {kind} in one slot ({unknown} of {len(session.plan.runs)} runs are estimated by their budget).",
        highlight=False,
    )
    return 0


def _intention(session: Session, scheduler: Scheduler, run: Any) -> tuple[str, str]:
    """(what would happen, why) for one planned run."""
    if record := scheduler.cached(run):
        return "cached", record.status.state
    if run.missing:
        return "run", f"would be skipped: {run.missing}"
    done = [stage.name for stage in run.stages if finished(stage_folder(session.paths, run.method, stage)) is not None]
    if len(done) == len(run.stages):
        return "score again", "the predictions are there; the metric or the record is not up to date"
    if done:
        return "run", f"stages done: {', '.join(done)}"
    path = session.paths.records / f"{run.id}.json"
    if path.exists():
        try:
            state: str = read_record(path).status.state
        except ConfigError:
            state = "unreadable"
        return "run", f"the last try: {state}"
    prefix = run.id.rsplit(".", 1)[0]
    older = any(session.paths.records.glob(f"{prefix}.*.json"))
    return "run", "code, data, configuration, budget or packages changed since" if older else "never run"


def score_again(session: Session, executor: Executor, console: Console) -> int:
    """Bring the records of all runs whose predictions are finished up to date; trains nothing."""
    scheduler = Scheduler(session.plan, session.paths, session.methods, executor, {})
    changed, failed = 0, dict[str, str]()
    for run in session.plan.runs:
        try:
            changed += scheduler.score_finished(run)
        except ContractError as error:  # one damaged domain must not keep the others from being scored
            failed[run.domain] = str(error)
    for reason in failed.values():
        console.print(f"[red]{escape(reason)}[/]", highlight=False)
    console.print(f"{changed} of {len(session.plan.runs)} runs were scored again", highlight=False)
    return int(bool(failed))


def known_seconds(session: Session) -> dict[tuple[str, str, str], float]:
    """What runs of the same method, configuration and domain have cost before (the last record seen)."""
    seconds = {}
    for record in read_records(session.paths.records, broken={}).values():
        if record.ok:
            seconds[(record.method.name, record.method.config, record.domain.name)] = sum(record.cost.stages.values())
    return seconds


def publish(session: Session, console: Console) -> int:
    """Rebuild the MLflow view from the records."""
    from harness.table import build_table, write_tables
    from harness.tracking import publish as publish_records

    records = records_of(session, console)
    table = build_table(session.plan, records, oracles(session, console))
    files = write_tables(table, session.paths.tables / session.plan.suite)
    summary = publish_records(session.plan, records, lambda run_id: log_of(session, run_id), session.paths.results, files)
    console.print(str(summary), highlight=False)
    return 0


def keep(session: Session, console: Console) -> int:
    """Copy records and tables that are worth keeping to ``results/records`` and ``results/tables``."""
    target = session.paths.project / "results"
    kept, found = 0, records_of(session, console)
    for run in session.plan.runs:
        path = session.paths.records / f"{run.id}.json"
        if run.id in found and found[run.id].ok:
            (target / "records" / session.plan.suite).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / "records" / session.plan.suite / path.name)
            kept += 1
    tables = session.paths.tables / session.plan.suite
    if tables.exists():
        shutil.copytree(tables, target / "tables" / session.plan.suite, dirs_exist_ok=True)
    console.print(f"kept {kept} of {len(session.plan.runs)} records in {target / 'records' / session.plan.suite}", highlight=False)
    return 0
