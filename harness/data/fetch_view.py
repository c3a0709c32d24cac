"""What a fetch looks like on the terminal: the plain table of ``--dry-run``, progress bars, and lines for a log.

In: the plan and the events of ``fetch.Fetch``. Out: text. Where the output is no terminal there are no bars: a line for every
file that is done, and one every half minute with the rate and the time left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from harness.data.fetch import Fetched, Planned, Show, free_space, in_words
from harness.data.release import Wanted

EVERY = 30.0
STATES = {"there": "there", "at hand": "at hand, to link", "half": "to go on", "missing": "to fetch"}


def plan_table(plan: Sequence[Planned], folder: Path, console: Console) -> None:
    """One row a file, then what it comes to."""
    table = Table(title=f"Amazon Reviews 2023 in {escape(str(folder))}", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("here", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for entry in plan:
        here = entry.size if entry.state in ("there", "at hand") else entry.done
        size = in_words(entry.size) + (" gz" if entry.source == "mirror" else "")
        origin = entry.source or (escape(str(entry.path.parent)) if entry.state == "at hand" and entry.path else "")
        table.add_row(entry.wanted.local, STATES[entry.state], size, in_words(here) if here else "-", origin or "-")
    console.print(table)
    for problem in sorted({entry.problem for entry in plan if entry.problem}):
        count = sum(entry.problem == problem for entry in plan)
        console.print(f"[yellow]{count} file{'s' * (count > 1)}[/]: {escape(problem)}", highlight=False)
    console.print(summary(plan, folder), highlight=False)


def summary(plan: Sequence[Planned], folder: Path) -> str:
    todo = [entry for entry in plan if entry.state in ("half", "missing")]
    known = [entry for entry in todo if entry.size is not None]
    left = in_words(sum((entry.size or 0) - entry.done for entry in known)) if known or not todo else "an unknown amount"
    unknown = f" and {len(todo) - len(known)} of unknown size" if known and len(known) < len(todo) else ""
    return f"{len(plan)} files: {len(plan) - len(todo)} here, {len(todo)} to fetch ({left}{unknown}); {in_words(free_space(folder))} free"


class View(Show):
    """Bars on a terminal, lines in a log. A context manager."""

    def __init__(self, console: Console, folder: Path) -> None:
        self.console = console
        self.folder = folder
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[Wanted, tuple[TaskID, str]] = {}
        self.here: dict[Wanted, int] = {}
        self.todo = 0
        self.files = 0
        self.ended = 0
        self.begun = self.told = time.monotonic()
        self.arrived = 0
        self.lock = threading.RLock()
        self.all = self.progress.add_task("all files", total=None, visible=False)

    def __enter__(self) -> View:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        self._line(f"[cyan]{escape(text)}[/]")

    def planned(self, plan: Sequence[Planned]) -> None:
        with self.lock:
            todo = [entry for entry in plan if entry.state in ("half", "missing")]
            self.todo = sum(entry.size or 0 for entry in todo)
            self.here = {entry.wanted: entry.done for entry in todo}
            self.files, self.begun = len(plan), time.monotonic()
            self._line(escape(summary(plan, self.folder)))
            if todo:
                self.progress.update(self.all, total=self.todo or None, completed=sum(self.here.values()), visible=True)

    def moved(self, wanted: Wanted, what: str, now: int, total: int | None) -> None:
        with self.lock:
            known = self.tasks.get(wanted)
            if known is None or known[1] != what:
                if known is not None:
                    self.progress.remove_task(known[0])
                known = (self.progress.add_task(f"{wanted.local} [dim]{what}[/]", total=total, completed=now), what)
                self.tasks[wanted] = known
            self.progress.update(known[0], completed=now, total=total)
            if what == "checking":
                return
            before = self.here.get(wanted, now)
            self.here[wanted] = now
            self.arrived += max(0, now - before)
            self.progress.update(self.all, completed=sum(self.here.values()))
            if not self.console.is_terminal and time.monotonic() - self.told > EVERY:
                self._tell()

    def waits(self, wanted: Wanted, seconds: float, reason: str) -> None:
        pause = f"; trying again in {seconds:.0f} s" if seconds else ""
        self._line(f"[yellow]{wanted.local}[/]: {escape(reason)}{pause}")

    def done(self, fetched: Fetched) -> None:
        how = {"there": "checked", "fetched": "fetched", "linked": "linked"}[fetched.how] if fetched.checked else "there"
        self._end(fetched.wanted)
        origin = f" from the {fetched.source}" if fetched.source else ""
        self._line(f"[green]{how:>7}[/] {escape(str(fetched.path.relative_to(self.folder)))}  {in_words(fetched.size)}{origin}")

    def failed(self, wanted: Wanted, reason: str) -> None:
        self._end(wanted)
        self._line(f"[red] failed[/] {wanted.local}")

    def _end(self, wanted: Wanted) -> None:
        with self.lock:
            self.ended += 1
            if known := self.tasks.pop(wanted, None):
                self.progress.remove_task(known[0])

    def _tell(self) -> None:
        self.told = time.monotonic()
        rate = self.arrived / (self.told - self.begun)
        now = sum(self.here.values())
        left = f", about {(self.todo - now) / rate / 60:.0f} min left" if rate and self.todo > now else ""
        self._line(f"{self.ended} of {self.files} files, {in_words(now)} of {in_words(self.todo)}, {in_words(int(rate))}/s{left}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
