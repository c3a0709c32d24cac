"""`harness run`: carry out a suite, publish it, print the table.

In: the options of the command line. Out: records, MLflow, tables, and the exit status: 0 only if all planned runs are ok
or skipped. The table is made in every case, also after Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from types import FrameType
from typing import Any

from rich.console import Console

from harness import environments, provenance
from harness.commands.display import Display, Observers
from harness.commands.prepare import Selection, Session, log_of, open_session
from harness.commands.views import all_fine, make_tables, records_of, say_where
from harness.execute.stage import Executor, StageFolder
from harness.record import Record
from harness.runspec import PlannedRun, PlannedStage
from harness.schedule import Scheduler, make_slots
from harness.values import ConfigError


class Publish:
    """Observer that hands events to the MLflow tracker; does nothing until a run needs publishing."""

    def __init__(self, session: Session, tracker: Any):
        self._session, self._tracker = session, tracker

    def run_started(self, run: PlannedRun) -> None:
        self._tracker.run_started(run)

    def stage_started(self, run: PlannedRun, stage: PlannedStage, folder: StageFolder) -> None:
        self._tracker.follow(run, folder.out / "progress.jsonl")

    def run_finished(self, run: PlannedRun, record: Record, cached: bool) -> None:
        if not cached:
            self._tracker.run_finished(record, log_of(self._session, run.id))


def run_suite(suite: str, executor_name: str, device: str, jobs: int | None, selection: Selection, mlflow: bool, console: Console) -> int:
    """Returns the exit status of the command."""
    session, executor = open_session(suite, executor_name, device, selection, console.print)
    for name, error in session.broken.items():
        console.print(f"[yellow]method {name} is left out:[/] {error}", highlight=False)
    plan = session.plan
    if not plan.runs:
        raise ConfigError(f"suite {plan.suite}: nothing to run with this selection")
    announce(session, executor, console)
    used = {run.method: session.methods[run.method] for run in plan.runs}
    without: dict[str, ConfigError] = {}
    pythons = environments.pythons(used.values(), session.paths, console.print, missing=executor_name != "docker", broken=without)
    command = "harness " + shlex.join(sys.argv[1:])
    unready = {name: str(error) for name, error in without.items()}
    scheduler = Scheduler(plan, session.paths, session.methods, executor, pythons, command, unready)
    tracker = start_tracker(session) if mlflow else None
    slots = make_slots(plan, executor.environment().cpus, gpu_ids(executor, executor_name), jobs)
    stopped = stop_on_signals(scheduler, console)
    lost: Exception | None = None
    try:
        with Display(plan, console) as display:
            scheduler.run(slots, Observers(display, Publish(session, tracker) if tracker else None))
    except Exception as error:
        lost = error  # the table of what is there comes first
    records = records_of(session, console)
    files = make_tables(session, records, console)
    if tracker:
        url = tracker.finish(files)
        tracker.close()
        if url:
            url = seen_from_outside(url)
            console.print(f"MLflow: {url}   (look at it any time with `harness ui`)", highlight=False)
    say_where(files, console)
    if lost:
        raise lost
    return 130 if stopped.is_set() else 0 if all_fine(plan, records) else 1


def announce(session: Session, executor: Executor, console: Console) -> None:
    plan, environment = session.plan, executor.environment()
    device = plan.runs[0].device
    where = environment.gpu if device == "cuda" else f"CPU: {environment.cpu}, {environment.cpus} cores"
    console.print(
        f"[bold]{plan.title}[/]: {len(plan.runs)} runs, {len(plan.titles)} methods, {len(plan.domains)} domains on {where}", highlight=False
    )
    if device == "cpu":
        console.print(
            "[bold yellow]NO GPU IS USED: everything runs on the CPU.[/] Neural methods are slow there; "
            "`harness doctor` says how to switch one on."
        )
    if executor.level != "container":
        console.print(f"Isolation of methods: {executor.level}.", highlight=False)


def seen_from_outside(url: str) -> str:
    """The address as a browser on the host reaches it: in a container the harness knows the server by another name."""
    server, view = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/"), os.environ.get("HARNESS_MLFLOW_VIEW", "").rstrip("/")
    return view + url.removeprefix(server) if server and view and url.startswith(server) else url


def start_tracker(session: Session) -> Any:
    from harness.tracking import Tracker

    tracker = Tracker(session.plan, session.paths.results)
    tracker.start()
    return tracker


def gpu_ids(executor: Executor, executor_name: str) -> list[int | str]:
    """The GPUs for runs, as ``CUDA_VISIBLE_DEVICES`` and Docker call them. A worker counts its own from 0."""
    gpu = executor.environment().gpu
    count = int(gpu.split(" x ")[0]) if gpu else 0
    visible = provenance.visible_gpus() if executor_name != "worker" else None
    ids: list[int | str] = [*visible] if visible else [*range(count)]
    return ids[:count]


def stop_on_signals(scheduler: Scheduler, console: Console) -> threading.Event:
    """Ctrl-C and SIGTERM end the running stages, keep their checkpoints, and let the table be made."""
    stopped = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if stopped.is_set():
            signal.signal(number, signal.SIG_DFL)
            return
        stopped.set()
        console.print("[yellow]stopping; what is finished is kept. The same command goes on from here.[/]")
        threading.Thread(target=scheduler.stop, daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped
