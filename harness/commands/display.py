"""What `harness run` shows while it works: a live table on a terminal; elsewhere (a log, `docker compose up`) plain lines, every half
minute one for each run at work.

In: the scheduler's events. Out: text. Progress is read from the methods' own ``progress.jsonl``.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harness.execute.outcome import clean
from harness.execute.stage import StageFolder
from harness.record import Record
from harness.runspec import Plan, PlannedRun, PlannedStage

STYLES = {"ok": "green", "skipped": "yellow", "interrupted": "yellow"}
TAIL = 4096
HEARTBEAT = 30.0
"""Seconds between lines about running runs where there is no terminal."""


@dataclass
class Running:
    run: PlannedRun
    stage: str = ""
    folder: StageFolder | None = None
    since: float = field(default_factory=time.monotonic)

    def latest(self) -> str:
        """The last line of the method's progress in words."""
        if self.folder is None:
            return ""
        try:
            # A FIFO must not be waited for, and a link not be followed: the method can put there what it likes.
            handle = os.open(self.folder.out / "progress.jsonl", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(handle, "rb"):
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    return ""
                line = os.pread(handle, TAIL, max(0, status.st_size - TAIL)).splitlines()[-1]
            value: dict[str, Any] = json.loads(line)
            metrics = ", ".join(f"{name} {number:.4f}" for name, number in list(value["metrics"].items())[:3])
            step = f"{value['step']}/{value['of']}" if value.get("of") else f"{value['step']}"
            return clean(f"step {step}  {metrics}", 100)
        except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return ""


class Display:
    """Observer of the scheduler that draws; use as a context manager."""

    def __init__(self, plan: Plan, console: Console):
        self._plan, self._console = plan, console
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._done = 0
        self._cached = 0
        self._states: dict[str, int] = {}
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        else:
            threading.Thread(target=self._tell_now_and_then, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._live:
            self._live.stop()
        if self._cached:
            self._console.print(f"{self._cached} of {len(self._plan.runs)} runs were finished before and are taken as they are.")

    def run_started(self, run: PlannedRun) -> None:
        with self._lock:
            self._running.setdefault(run.id, Running(run))

    def stage_started(self, run: PlannedRun, stage: PlannedStage, folder: StageFolder) -> None:
        with self._lock:
            entry = self._running.setdefault(run.id, Running(run))
            entry.stage, entry.folder, entry.since = stage.name, folder, time.monotonic()

    def run_finished(self, run: PlannedRun, record: Record, cached: bool) -> None:
        with self._lock:
            self._running.pop(run.id, None)
            self._done += 1
            self._cached += cached
            state = record.status.state
            self._states[state] = self._states.get(state, 0) + 1
        if not cached:
            self._console.print(self._line(run, record), highlight=False)

    def _line(self, run: PlannedRun, record: Record) -> str:
        state = record.status.state
        head = f"[{STYLES.get(state, 'red')}]{state:>11}[/]  {escape(run.title)} · {escape(run.domain)} · seed {run.seed}"
        if record.ok:
            value = record.metrics["ndcg_at_10"].mean
            return f"{head}  NDCG@10 {value:.4f}  {sum(record.cost.stages.values()):.1f} s"
        return f"{head}  {escape(record.status.reason[:200])}"

    def _tell_now_and_then(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with self._lock:
                running = list(self._running.values())
                done = self._done
            for entry in running:
                seconds, latest = time.monotonic() - entry.since, entry.latest()
                what = f"{entry.run.title} · {entry.run.domain} · seed {entry.run.seed}  {entry.stage} {seconds:.0f} s  {latest}"
                self._console.print(
                    f"[dim]{'running':>11}[/]  {escape(what)}  [dim]({done} of {len(self._plan.runs)} done)[/]", highlight=False
                )

    def _draw(self) -> Group:
        with self._lock:
            running = list(self._running.values())
            states = ", ".join(f"{count} {state}" for state, count in sorted(self._states.items()))
            done = self._done
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("running", "domain", "seed", "stage", "time", "progress"):
            table.add_column(name)
        for entry in running:
            seconds = f"{time.monotonic() - entry.since:.0f} s"
            table.add_row(
                Text(entry.run.title), Text(entry.run.domain), str(entry.run.seed), entry.stage or "waiting", seconds, Text(entry.latest())
            )
        total = len(self._plan.runs)
        elapsed = time.monotonic() - self._began
        head = Text(f"{self._plan.title}: {done} of {total} runs done ({states or 'none yet'}), {elapsed:.0f} s", style="bold")
        return Group(head, table)


class Observers:
    """Passes every event on to several observers."""

    def __init__(self, *observers: Any):
        self._observers = [observer for observer in observers if observer is not None]

    def run_started(self, run: PlannedRun) -> None:
        for observer in self._observers:
            observer.run_started(run)

    def stage_started(self, run: PlannedRun, stage: PlannedStage, folder: StageFolder) -> None:
        for observer in self._observers:
            observer.stage_started(run, stage, folder)

    def run_finished(self, run: PlannedRun, record: Record, cached: bool) -> None:
        for observer in self._observers:
            observer.run_finished(run, record, cached)
