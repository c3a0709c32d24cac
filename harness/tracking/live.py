"""MLflow while runs run: ``Tracker``.

In: events from the runner's threads (a run started, its progress file, its record). Out: live curves and finished runs on
the server. Everything happens in one background thread, and nothing of it ever reaches the runs: without a server they go
on, one warning is given, and ``finish`` (or a later ``publish``) brings in what is missing from the records and the
progress files.

    tracker = Tracker(plan, results)
    tracker.start()
    tracker.run_started(run); tracker.follow(run, stage_folder / "out" / "progress.jsonl"); tracker.run_finished(record, log)
    url = tracker.finish({"html": path, ...}, rows)      # publishes what is new, comparison included
    tracker.close()                                       # the local server ends with its last user
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import mlflow_server
from harness.record import Record, read_records
from harness.runspec import Plan, PlannedRun
from harness.tracking import publishing, view
from harness.tracking.curves import Curve
from harness.tracking.groups import group_key
from harness.tracking.publishing import PublishSummary, Warn
from harness.tracking.rest import TrackingDown, TrackingError
from harness.tracking.store import Store

POLL_SECONDS = 2.0
RETRY_SECONDS = 30.0


@dataclass(frozen=True)
class _Started:
    run: PlannedRun


@dataclass(frozen=True)
class _Follow:
    run: PlannedRun
    path: Path


@dataclass(frozen=True)
class _Finished:
    record: Record
    log: Path | None


@dataclass(frozen=True)
class _Finish:
    files: Mapping[str, Path]
    table: Any


class Tracker:
    """Live publishing for one execution of a plan. All methods may be called from any thread; none raises."""

    def __init__(self, plan: Plan, results: Path, *, warn: Warn = publishing.warn):
        self._plan = plan
        self._results = results
        self._say = warn
        self._runs = {run.id: run for run in plan.runs}
        self._events: queue.SimpleQueue[_Started | _Follow | _Finished | _Finish | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._cancelled = threading.Event()
        self._server: mlflow_server.Server | None = None
        self._store: Store | None = None
        self._retry_at = 0.0
        self._hopeless = False
        self._live: dict[str, str] = {}
        self._curves: dict[str, list[tuple[Curve, str, Path]]] = {}
        self._logs: dict[str, Path] = {}
        self._done: set[str] = set()
        self._said: set[str] = set()
        self.warnings: list[str] = []
        self.summary: PublishSummary | None = None

    # ------------------------------------------------------------------------------------------- what the runner calls

    def start(self) -> None:
        """Start the background thread. The server is started with the first run: where none runs, none is needed."""
        if self._thread.ident is None:
            self._thread.start()

    def run_started(self, run: PlannedRun) -> None:
        self._events.put(_Started(run))

    def follow(self, run: PlannedRun, progress_path: Path) -> None:
        """Follow the progress file of a stage that is about to start; the file need not be there yet."""
        self._events.put(_Follow(run, progress_path))

    def run_finished(self, record: Record, log_path: Path | None = None) -> None:
        self._done.add(record.run.id)
        self._events.put(_Finished(record, log_path))

    def finish(self, tables: Mapping[str, Path], table: Any = None) -> str | None:
        """Publish what is new, comparison included, and return the experiment's address; None if nothing was, or it failed.

        ``tables`` are the files of the comparison, ``table`` its rows (mappings) or columns for ``mlflow.load_table``.
        """
        self.start()
        self._events.put(_Finish(dict(tables), table))
        try:
            self._thread.join()
        except BaseException:
            self._cancelled.set()
            raise
        return self.summary.url if self.summary else None

    def close(self) -> None:
        """Let go of the server, and end the thread if ``finish`` was never called."""
        self._cancelled.set()
        self._events.put(None)
        if self._thread.ident is not None:
            self._thread.join(10.0)
        for followed in self._curves.values():
            for curve, _, _ in followed:
                curve.close()
        self._disconnect()

    # ---------------------------------------------------------------------------------------------- the thread's work

    def _work(self) -> None:
        next_poll = 0.0
        while not self._cancelled.is_set():
            try:
                event = self._events.get(timeout=POLL_SECONDS / 2)
            except queue.Empty:
                event = None
            if isinstance(event, _Finish):
                self._guarded(functools.partial(self._finish, event))
                return
            if event is not None:
                self._guarded(functools.partial(self._handle, event))
            if time.monotonic() >= next_poll:
                self._guarded(self._send_curves)
                next_poll = time.monotonic() + POLL_SECONDS

    def _guarded(self, work: Callable[[], None]) -> None:
        """Nothing that goes wrong here may end the thread: a lost event is made good by ``finish``."""
        try:
            work()
        except TrackingDown as error:
            self._warn("down", f"MLflow: {error}; runs go on, and what is missing is published at the end or by `harness publish`")
            self._disconnect()
        except (TrackingError, mlflow_server.ServerError) as error:
            self._warn("refused", f"MLflow: {error}; runs go on, `harness publish` publishes later")
        except Exception as error:
            self._warn("bug", f"MLflow: {type(error).__name__}: {error}; runs go on, `harness publish` publishes later")

    def _warn(self, kind: str, message: str) -> None:
        """One warning of a kind: a server that is down is said once, not once a run."""
        if kind not in self._said:
            self._said.add(kind)
            self.warnings.append(message)
            self._say(message)

    def _connect(self) -> Store | None:
        """The store, or None while there is no server. A failed start is not repeated before ``finish``."""
        if self._store is None and not self._hopeless and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            try:
                self._server = mlflow_server.ensure(self._results, cancelled=self._cancelled.is_set, polite=True)
            except mlflow_server.ServerError:
                self._hopeless = mlflow_server.configured() is None  # our own did not start: no use to try again
                raise
            try:
                self._store = publishing.open_store(self._server, self._plan, lambda message: self._warn("artifacts", f"MLflow: {message}"))
                self._store.load()
            except BaseException:
                self._disconnect()
                raise
        return self._store

    def _disconnect(self) -> None:
        if self._store:
            self._store.close()
        if self._server:
            self._server.close()
        self._server = self._store = None
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _handle(self, event: _Started | _Follow | _Finished) -> None:
        if isinstance(event, _Follow):
            curve = Curve(event.path, publishing.stage_of(event.run, event.path))
            self._curves.setdefault(event.run.id, []).append((curve, curve.stage, event.path))
            return
        if isinstance(event, _Finished) and event.log:
            self._logs[event.record.run.id] = event.log
        store = self._connect()
        if store is None:
            return
        if isinstance(event, _Started):
            self._begin(store, event.run)
        elif run := self._runs.get(event.record.run.id):
            self._end(store, run, event.record)

    def _begin(self, store: Store, run: PlannedRun) -> None:
        if run.id in self._done:
            store.drop(run.id)  # over before it could be shown; an earlier attempt's curves must not stay
            return
        if store.find(group_key(run)) is None:
            store.bring(view.running_group_view(run))
        planned = view.planned_view(run)
        planned = replace(planned, tags={**planned.tags, publishing.SESSION: publishing.session()})
        self._live[run.id] = store.restart(planned)

    def _end(self, store: Store, run: PlannedRun, record: Record) -> None:
        followed = self._curves.pop(run.id, [])
        for curve, _, _ in followed:
            curve.close()
        self._live.pop(run.id, None)
        if store.find(group_key(run)) is None:
            store.bring(view.running_group_view(run))
        paths = {stage: path for _, stage, path in followed}
        publishing.publish_run(store, run, record, self._logs.get(run.id), self._results, paths)

    def _send_curves(self) -> None:
        store = self._connect() if self._live else None
        if store is None:
            return
        for run_id, target in self._live.items():
            for curve, _, _ in self._curves.get(run_id, ()):
                if points := curve.read():
                    store.log_points(target, points)

    def _finish(self, event: _Finish) -> None:
        records = read_records(self._results / "records", self._runs, broken={})
        if self._store is None:
            if not publishing.pending(self._plan, records, self._results, event.files, event.table):
                return
            self._retry_at = 0.0
        try:
            self._publish_all(records, event)
        except TrackingDown:
            # A server that went away in the meantime is looked for, or started, once more.
            self._disconnect()
            self._retry_at = 0.0
            self._publish_all(records, event)

    def _publish_all(self, records: Mapping[str, Record], event: _Finish) -> None:
        store = self._connect()
        if store is None or self._server is None:
            return
        args = (self._plan, records, self._logs.get, self._results, event.files, event.table)
        self.summary = publishing.publish_to(self._server, *args, store=store)
