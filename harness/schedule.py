"""Carry out a plan: every planned run ends with a record, whatever fails on the way.

In: a ``Plan``, the methods, an executor, slots. Out: records in ``results/local/records`` and events for an ``Observer``.

Runs are taken in plan order by one thread a slot. A stage is locked while it runs; a run whose stage is busy elsewhere
(in another slot, or in another harness on the same results folder) is put off and looked at again. Finished stages and
records are taken as they are; a record with an old score key is scored again from the stage's predictions.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness.contract import Budget, DomainRef, Job
from harness.execute.outcome import read_stage_result
from harness.execute.stage import Executor, StageFolder, StageTask
from harness.method import Method
from harness.paths import Paths
from harness.record import CACHED_STATES, Record, read_record, write_record
from harness.reporting import Reporter, unfinished
from harness.runspec import Plan, PlannedRun, PlannedStage, derived_seed
from harness.values import ConfigError

BUSY_WAIT = 0.2


class Observer(Protocol):
    """Told what happens, from the threads of the scheduler. Must not raise."""

    def run_started(self, run: PlannedRun) -> None: ...
    def stage_started(self, run: PlannedRun, stage: PlannedStage, folder: StageFolder) -> None: ...
    def run_finished(self, run: PlannedRun, record: Record, cached: bool) -> None: ...


@dataclass
class Activity:
    """How many stages run at the same time: timings taken while it was more than one are flagged."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    now: int = 0
    crowded: int = 0
    """Counts up whenever a stage starts beside another."""

    def enter(self) -> int:
        with self.lock:
            self.now += 1
            self.crowded += self.now > 1
            return self.crowded - (self.now > 1)

    def leave(self, mark: int) -> bool:
        """True if anything of this harness ran beside since ``enter`` gave ``mark``."""
        with self.lock:
            self.now -= 1
            return self.crowded > mark


@dataclass(frozen=True)
class Slot:
    gpu: int | None = None


class Scheduler:
    def __init__(
        self, plan: Plan, paths: Paths, methods: dict[str, Method], executor: Executor, pythons: dict[str, Path], command: str = ""
    ):
        self.plan, self.paths, self.methods, self.executor = plan, paths, methods, executor
        self._pythons = pythons
        self._reporter = Reporter(paths, methods, executor.environment(), command)
        self._activity = Activity()
        self._failed_stages: dict[str, dict[str, Any]] = {}
        self._queue: collections.deque[PlannedRun] = collections.deque()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.errors: list[BaseException] = []

    def run(self, slots: list[Slot], observer: Observer) -> dict[str, Record]:
        """Bring every planned run to a record. Returns all records of the plan by run id."""
        records: dict[str, Record] = {}
        for run in self.plan.runs:
            if record := self.cached(run):
                records[run.id] = record
                observer.run_finished(run, record, True)
            else:
                self._queue.append(run)
        self._left = len(self._queue)
        threads = [threading.Thread(target=self._work, args=(slot, observer, records), daemon=True) for slot in slots[: len(self._queue)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return records

    def stop(self) -> None:
        """End what runs now; those runs and the ones not yet started stay to be done."""
        self._stopping.set()
        self.executor.stop()

    def cached(self, run: PlannedRun) -> Record | None:
        """The record of a run that needs nothing more, scored again if only the score key changed."""
        path = self.paths.records / f"{run.id}.json"
        if not path.exists():
            return None
        try:
            record = read_record(path)
        except ConfigError:
            return None  # a torn or old record: the stage's predictions are scored again, or the run is done again
        if record.status.state not in CACHED_STATES or record.run.fit_key != run.fit_key:
            return None
        if record.ok and record.run.score_key != self._reporter.score_key(run):
            return None
        return record

    def _work(self, slot: Slot, observer: Observer, records: dict[str, Record]) -> None:
        waits = 0
        while not self._stopping.is_set():
            with self._lock:
                if not self._queue:
                    if self._left == 0:
                        return
                    run = None
                else:
                    run = self._queue.popleft()
            if run is None:
                time.sleep(BUSY_WAIT)
                continue
            try:
                record = self._bring_to_record(run, slot, observer)
            except BaseException as error:
                self.errors.append(error)
                self.stop()
                return
            with self._lock:
                if record is None:
                    self._queue.append(run)
                    waits += 1
                else:
                    records[run.id] = record
                    self._left -= 1
                    waits = 0
                pause = waits > len(self._queue)
            if record is not None:
                observer.run_finished(run, record, False)
            elif pause:
                time.sleep(BUSY_WAIT)
                waits = 0

    def _bring_to_record(self, run: PlannedRun, slot: Slot, observer: Observer) -> Record | None:
        """Run the missing stages of a run and write its record; None if one of its stages is busy elsewhere."""
        if record := self.cached(run):  # another harness may have finished it meanwhile
            return record
        if run.missing:
            return self._write(self._reporter.record(run, [], {"state": "skipped", "reason": run.missing}))
        observer.run_started(run)
        results: list[dict[str, Any]] = []
        for stage in run.stages:
            result = self._stage(run, stage, results, slot, observer)
            if result is None:
                return None
            results.append(result | {"stage": stage.name})
            if result["state"] != "ok":
                break
        return self._write(self._reporter.record(run, results, results[-1]))

    def score_finished(self, run: PlannedRun) -> bool:
        """Write the record of a run whose stages are all finished and whose record is not up to date. True if it did."""
        if self.cached(run):
            return False
        results = [finished(stage_folder(self.paths, run.method, stage)) for stage in run.stages]
        named = [result | {"stage": stage.name} for result, stage in zip(results, run.stages, strict=True) if result]
        if len(named) < len(run.stages):
            return False
        self._write(self._reporter.record(run, named, named[-1]))
        return True

    def _write(self, record: Record) -> Record:
        write_record(self.paths.records, record)
        return record

    def _stage(
        self, run: PlannedRun, stage: PlannedStage, earlier: list[dict[str, Any]], slot: Slot, observer: Observer
    ) -> dict[str, Any] | None:
        """The result of one stage: taken as it is if finished, else run now; None if it is busy elsewhere."""
        folder = stage_folder(self.paths, run.method, stage)
        if (result := finished(folder)) is not None:
            return result
        if stage.key in self._failed_stages:
            return self._failed_stages[stage.key]
        with folder.locked() as lock:
            if lock is None:
                return None
            if (result := finished(folder)) is not None:
                return result
            folder.clear()
            observer.stage_started(run, stage, folder)
            last = stage is run.stages[-1]
            task = self._task(run, stage, folder, slot, lock)
            mark, busy, began = self._activity.enter(), other_cpu_seconds(), time.monotonic()
            outcome = self.executor.run(task)
            beside = self._activity.leave(mark)
            wall = time.monotonic() - began
            outcome["beside"] = beside or other_cpu_seconds() - busy - outcome["cpu_seconds"] > max(1.0, 0.25 * wall)
            result = read_stage_result(outcome, folder, task.job, self.paths, last)
            if self._stopping.is_set() and result["state"] != "ok":
                result = unfinished(result)
            folder.finish(result)
            if result["state"] not in CACHED_STATES:
                self._failed_stages[stage.key] = result
            return result

    def _task(self, run: PlannedRun, stage: PlannedStage, folder: StageFolder, slot: Slot, lock: int) -> StageTask:
        method = self.methods[run.method]
        before = {
            name: stage_folder(self.paths, run.method, other).out for name in stage.needs for other in run.stages if other.name == name
        }
        job = Job(
            run_id=run.id if stage is run.stages[-1] else f"{run.method}.{stage.name}.{stage.key[:12]}",
            stage=stage.name,
            method=run.method,
            configuration=run.configuration,
            domains=tuple(DomainRef(name, self.paths.public(name)) for name in stage.domains),
            inputs=before,
            output=folder.out,
            cache=self.paths.caches / run.method,
            scratch=folder.scratch,
            checkpoint=folder.checkpoint,
            seed=derived_seed(run.seed, stage.name),
            budget=Budget(**run.budget.model_dump()),
            device=run.device,
            precision=run.precision,
        )
        return StageTask(folder=folder, job=job, method=method, python=self._pythons[run.method], lock=lock, gpu=slot.gpu)


def stage_folder(paths: Paths, method: str, stage: PlannedStage) -> StageFolder:
    return StageFolder(paths.stages / method / f"{stage.name}-{stage.key[:16]}")


def finished(folder: StageFolder) -> dict[str, Any] | None:
    """The result of a stage that is done for good: sealed, and its outputs still as they were when it was sealed."""
    result = folder.result()
    if result is None or result.get("state") not in CACHED_STATES:
        return None
    for output in result.get("outputs", []):
        path = folder.out / output["path"]
        if not path.is_file() or path.stat().st_size != output["bytes"]:
            return None
    return result


def other_cpu_seconds() -> float:
    """CPU seconds that the machine has spent, less those of this process: what ran beside a run is the difference."""
    try:
        with open("/proc/stat") as file:
            fields = [int(value) for value in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    busy = sum(fields) - fields[3] - fields[4]
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def make_slots(plan: Plan, cpus: int, gpus: int, jobs: int | None) -> list[Slot]:
    """One slot a GPU, or as many CPU slots as the runs' threads leave room for; ``jobs`` overrides the number."""
    if plan.runs and plan.runs[0].device == "cuda" and gpus:
        return [Slot(gpu=index % gpus) for index in range(jobs or gpus)]
    threads = max((run.budget.threads for run in plan.runs), default=1)
    return [Slot()] * (jobs or max(1, cpus // threads))
