"""Carry out a plan: every planned run ends with a record, whatever fails on the way.

In: a ``Plan``, the methods, an executor, slots. Out: records in ``results/local/records`` and events for an ``Observer``.

Runs are taken in plan order by one thread a slot. A stage is locked while it runs; a run whose stage is busy elsewhere
(in another slot, or in another harness on the same results folder) is put off and looked at again. Finished stages and
records are taken as they are; a record with an old score key is scored again from the stage's predictions.

An error of one run (a damaged domain, an environment that cannot be made, a full disk while its folder is cleared) is that
run's record, and costs no other run anything.
"""

from __future__ import annotations

import collections
import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness.contract import Budget, ContractError, DomainRef, Job
from harness.execute.outcome import LOG_TAIL, clean, read_stage_result
from harness.execute.stage import Executor, StageFolder, StageTask
from harness.method import CONTRACT, Method, contract_hash
from harness.paths import Paths
from harness.record import CACHED_STATES, Record, read_record, write_record
from harness.reporting import Reporter, now, unfinished
from harness.runspec import Plan, PlannedRun, PlannedStage, derived_seed, stage_folder_name
from harness.suite import read_domain_info
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
    gpu: int | str | None = None


class Scheduler:
    """``unready``: methods that cannot be started here, and why; their runs fail with that reason."""

    def __init__(
        self,
        plan: Plan,
        paths: Paths,
        methods: dict[str, Method],
        executor: Executor,
        pythons: dict[str, Path],
        command: str = "",
        unready: dict[str, str] | None = None,
    ):
        self.plan, self.paths, self.methods, self.executor = plan, paths, methods, executor
        self._pythons, self._unready = pythons, unready or {}
        self._planned = Inputs(paths, methods, plan)
        self._reporter = Reporter(paths, methods, executor.environment(), command)
        self._activity = Activity()
        self._failed_stages: dict[str, dict[str, Any]] = {}
        self._queue: collections.deque[PlannedRun] = collections.deque()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.errors: list[BaseException] = []
        """Of runs that could not even leave a record."""
        self._complained = False

    def run(self, slots: list[Slot], observer: Observer) -> dict[str, Record]:
        """Bring every planned run to a record. Returns all records of the plan by run id.

        Raises the first error of a run that could not leave a record, when all others have theirs.
        """
        records: dict[str, Record] = {}
        for run in self.plan.runs:
            try:
                record = self.cached(run)
            except Exception:
                record = None  # it comes again when the run's turn has come, and is recorded then
            if record:
                records[run.id] = record
                self._tell(observer.run_finished, run, record, True)
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
        if not record.ok and not record.cost.stages and record.status.reason != run.missing:
            return None  # skipped for a need that is met now, or that the method has no more: needs are not in the fit key
        if record.ok and record.run.score_key != self._reporter.score_key(run):
            return None
        if record.ok and not self._reporter.is_described(run, record) and self._has_predictions(run):
            return None  # only where it costs no training
        return record

    def _has_predictions(self, run: PlannedRun) -> bool:
        return all(finished(stage_folder(self.paths, run.method, stage)) for stage in run.stages)

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
            except Exception as error:
                record = self._broken(run, error)
                if record is None:
                    with self._lock:
                        self._left -= 1
                    continue
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
                self._tell(observer.run_finished, run, record, False)
            elif pause:
                time.sleep(BUSY_WAIT)
                waits = 0

    def _tell(self, event: Callable[..., None], *arguments: Any) -> None:
        """Tell an observer. What it raises (a closed terminal, say) must not cost a run; it is said once."""
        try:
            event(*arguments)
        except Exception:
            if not self._complained:
                self._complained = True
                try:
                    traceback.print_exc(file=sys.stderr)
                except OSError:
                    pass  # that is closed, too

    def _broken(self, run: PlannedRun, error: Exception) -> Record | None:
        """The record of a run that the harness could not carry out; None, and one error more, where not even that can be written."""
        reason = str(error) if isinstance(error, ConfigError | ContractError | OSError) else f"{type(error).__name__}: {error}"
        tail = "".join(traceback.format_exception(error))[-LOG_TAIL:]
        end = {"state": "failed", "reason": clean(f"the harness could not do this run: {reason}", 1000), "log_tail": clean(tail, LOG_TAIL)}
        try:
            if record := self.cached(run):
                return record  # another harness has done it meanwhile
        except Exception:
            pass  # the error that is being recorded, most likely
        try:
            return self._write(self._reporter.record(run, [], end))
        except Exception:
            self.errors.append(error)
            return None

    def _bring_to_record(self, run: PlannedRun, slot: Slot, observer: Observer) -> Record | None:
        """Run the missing stages of a run and write its record; None if one of its stages is busy elsewhere."""
        if record := self.cached(run):  # another harness may have finished it meanwhile
            return record
        if run.missing:
            return self._write(self._reporter.record(run, [], {"state": "skipped", "reason": run.missing}))
        self._tell(observer.run_started, run)
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
            if run.method in self._unready:
                raise ConfigError(self._unready[run.method])
            self._planned.check(run.method, stage.domains)
            folder.clear()
            self._tell(observer.stage_started, run, stage, folder)
            last = stage is run.stages[-1]
            task = self._task(run, stage, folder, slot, lock)
            mark, busy, began, started = self._activity.enter(), other_cpu_seconds(), time.monotonic(), now()
            try:
                outcome = self.executor.run(task)
            finally:
                beside = self._activity.leave(mark)
            wall = time.monotonic() - began
            outcome["beside"] = beside or other_cpu_seconds() - busy - outcome["cpu_seconds"] > max(1.0, 0.25 * wall)
            self._planned.check(run.method, stage.domains)
            result = read_stage_result(outcome, folder, task.job, self.paths, last)
            result |= {"started": started, "environment": self.executor.environment().model_dump(mode="json")}
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
        uses = next(declared.uses for declared in method.config(run.config).stages if declared.name == stage.name)
        # A shared stage gets what its key names and nothing else: the first of several configurations must not decide for the others.
        values = run.configuration if uses is None else {name: value for name, value in run.configuration.items() if name in uses}
        job = Job(
            run_id=run.id if stage is run.stages[-1] else f"{run.method}.{stage.name}.{stage.key[:12]}",
            stage=stage.name,
            method=run.method,
            configuration=values,
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
            protocol=self.plan.protocol,
        )
        return StageTask(folder=folder, job=job, method=method, python=self._pythons[run.method], lock=lock, gpu=slot.gpu)


class Inputs:
    """What the fit keys were made from, as it was when the plan was: files that change while a suite runs would give results
    under a key that names others, and whoever changed them back would find those results finished."""

    def __init__(self, paths: Paths, methods: dict[str, Method], plan: Plan):
        self._paths, self._methods = paths, methods
        self._sources = {name: methods[name].source_hash(paths.project) for name in {run.method for run in plan.runs}}
        self._domains = {name: self._digest(name) for run in plan.runs for stage in run.stages for name in stage.domains}

    def check(self, method: str, domains: tuple[str, ...]) -> None:
        """Raises ConfigError if the method's code, the contract or a domain is not what was planned."""
        changed = [f"baseline or source files of {method}"] if self._source(method) != self._sources[method] else []
        changed += ["harness/contract.py"] if hashlib.sha256(CONTRACT.read_bytes()).hexdigest() != contract_hash() else []
        changed += [f"domain {name}" for name in domains if self._digest(name) != self._domains[name]]
        if changed:
            raise ConfigError(f"{', '.join(changed)} changed since this command was started; run the same command again")

    def _source(self, method: str) -> str | None:
        try:
            return self._methods[method].source_hash(self._paths.project)
        except OSError:
            return None  # a file went while it was read

    def _digest(self, domain: str) -> str | None:
        try:
            return str(read_domain_info(self._paths, domain)["digest"])
        except (ConfigError, KeyError, OSError):
            return None


def stage_folder(paths: Paths, method: str, stage: PlannedStage) -> StageFolder:
    return StageFolder(paths.stages / method / stage_folder_name(stage.name, stage.key))


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


def make_slots(plan: Plan, cpus: int, gpus: Sequence[int | str], jobs: int | None) -> list[Slot]:
    """One slot a GPU, or as many CPU slots as the runs' threads leave room for; ``jobs`` overrides the number."""
    if plan.runs and plan.runs[0].device == "cuda" and gpus:
        return [Slot(gpu=gpus[index % len(gpus)]) for index in range(jobs or len(gpus))]
    threads = max((run.budget.threads for run in plan.runs), default=1)
    return [Slot()] * (jobs or max(1, cpus // threads))
