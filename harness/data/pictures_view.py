"""What a download of pictures looks like: a bar with rate and time left, lines in a log, and what came of it.

In: the events of ``pictures.Download``. Out: text.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from harness.data.fetch import in_words
from harness.data.picture_store import Outcome, reasons
from harness.data.pictures import Plan, Show

if TYPE_CHECKING:
    from harness.data.picture_fetch import Result

EVERY = 30.0


def plan_table(plans: Mapping[str, Plan], console: Console) -> None:
    """One row a category: what a run would fetch."""
    table = Table(title="Pictures", title_justify="left")
    table.add_column("category", no_wrap=True)
    for heading in ("items", "here", "failed or without URL", "to fetch", "about"):
        table.add_column(heading, justify="right")
    for category, plan in plans.items():
        without = len(plan.items) - plan.there - len(plan.jobs)
        counts = (f"{count:,}" for count in (len(plan.items), plan.there, without, len(plan.jobs)))
        table.add_row(category, *counts, in_words(plan.needed))
    console.print(table)


def coverage(outcomes: Mapping[str, Outcome], items: Sequence[str]) -> str:
    """How many of ``items`` have a picture, and why the others have none."""
    missing = reasons(outcomes, items)
    kept = len(items) - sum(missing.values())
    why = "".join(f", {count:,} {reason.replace('_', ' ')}" for reason, count in missing.items())
    return f"{kept:,} of {len(items):,} items have a picture ({100 * kept / max(1, len(items)):.2f} %){why}"


class View(Show):
    """A bar on a terminal, a line every half minute in a log. A context manager."""

    def __init__(self, console: Console):
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self.progress = Progress(
            *columns, TimeRemainingColumn(elapsed_when_finished=True), console=console, disable=not console.is_terminal
        )
        self.seen: Counter[str] = Counter()
        self.arrived = self.to_fetch = 0
        self.begun = self.told = time.monotonic()

    def __enter__(self) -> View:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        self.console.print(f"[cyan]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def planned(self, category: str, plan: Plan) -> None:
        self.to_fetch, self.begun = len(plan.jobs), time.monotonic()
        self.console.print(
            f"{escape(category)}: {len(plan.items):,} items, {plan.there:,} pictures here, {len(plan.jobs):,} to fetch"
            f" (about {in_words(plan.needed)})",
            highlight=False,
        )
        self.task = self.progress.add_task(escape(category), total=len(plan.jobs), rate="", visible=bool(plan.jobs))

    def results(self, results: Sequence[Result]) -> None:
        self.seen.update("kept" if result.data is not None else "failed" for result in results)
        self.arrived += sum(len(result.sent or b"") for result in results)
        done, now = self.seen.total(), time.monotonic()
        seconds = max(1e-3, now - self.begun)
        rate = f"{done / seconds:,.0f}/s, {in_words(int(self.arrived / seconds))}/s, {self.seen['failed']:,} failed"
        self.progress.update(self.task, completed=done, rate=rate)
        if not self.console.is_terminal and now - self.told > EVERY:
            self.told = now
            left = (self.to_fetch - done) / done * seconds / 60
            self.note(f"{done:,} of {self.to_fetch:,} pictures ({rate}), about {left:.0f} min left")
