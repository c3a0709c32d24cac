"""The table for the terminal, as a rich renderable that is readable at 100 to 120 columns.

Every group of columns is one rich column whose cells are padded here, so that a label (``timeout``) can stand over the
whole group. All text enters as ``Text``, never as markup.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.tables import text
from harness.tables.layout import Grid, Group, Line, Shown, Slot, grids, slot
from harness.tables.values import Part, Published, Table

if TYPE_CHECKING:
    from rich import table as rich_table
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

TITLE_WIDTH = 26
_STYLES = {"best": "bold", "second": "underline"}
Widths = tuple[tuple[int, int], ...]
"""Of every column of a group: width of the number, width of the footnote marks behind it."""
_STATE_STYLES = {"skipped": "dim", "unplanned": "dim", "none": "dim"}


@dataclass(frozen=True)
class Fitted:
    """A table that lays itself out for the width of the console that prints it."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for number, part in enumerate(self.table.parts):
            if number:
                yield Text("")
            yield from _part(part, options.max_width)


def to_rich(table: Table) -> Fitted:
    """What ``console.print`` takes."""
    return Fitted(table)


def _part(part: Part, width: int) -> list[RenderableType]:
    from rich.text import Text

    banner = [Text(text.SIMULATED_LINE, style="bold yellow")] if part.simulated else []
    measure = _measure(part)
    titles = [len(row.title + text.superscript(row.notes)) for row in part.rows] + [len(text.ORACLE_TITLE) if part.oracle else 0]
    room = width - min(max(titles), TITLE_WIDTH) - 6  # less method, seeds, and the space around both
    pieces: list[RenderableType] = [*banner, Text(part.title, style="bold"), Text(text.counts(part.counts), style="dim"), Text("")]
    packed = grids(part, room, lambda group: _total(measure(group)) + 2, paired=True)
    pieces += [_grid(grid, measure) for grid in packed]
    pieces += [_published(part.published)] if part.published else []
    pieces.append(Text(text.LEGEND, style="dim"))
    pieces += [Text(f"{text.superscript((number,))} {note}", style="dim") for number, note in enumerate(part.notes, 1)]
    pieces += [Text(f"Warning: {warning}", style="yellow") for warning in part.warnings]
    return [*pieces, *banner]


def _measure(part: Part) -> Callable[[Group], Widths]:
    """The widths of the columns of a group; the last column makes room for the group's heading and labels."""

    @functools.cache
    def measure(group: Group) -> Widths:
        numbers = [len(group.column_heading(name, short=True)) for name in group.columns]
        notes = [0] * len(numbers)
        label = len(group.heading)
        for shown in (slot(row, group) for row in part.rows):
            label = max(label, len(shown.label + text.superscript(shown.notes)))
            for index, cell in enumerate(shown.cells):
                numbers[index] = max(numbers[index], len(_number(cell)))
                notes[index] = max(notes[index], len(text.superscript(cell.notes)))
        if group.kind == "metrics" and group.domain in part.oracle:
            numbers = [max(width, len(text.value(0.0))) for width in numbers]
        numbers[-1] += max(0, label - _total(tuple(zip(numbers, notes, strict=True))))
        return tuple(zip(numbers, notes, strict=True))

    return measure


def _total(widths: Widths) -> int:
    return sum(number + note for number, note in widths) + len(widths) - 1


def _grid(grid: Grid, measure: Callable[[Group], Widths]) -> rich_table.Table:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    result = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column(Text("\nMethod"), max_width=TITLE_WIDTH, overflow="fold")
    result.add_column(Text("\nn"), justify="right")
    for group in grid.groups:
        widths = measure(group)
        names = (group.column_heading(name, short=True) for name in group.columns)
        headings = " ".join(name.rjust(number) + " " * note for name, (number, note) in zip(names, widths, strict=True))
        result.add_column(Text(f"{group.heading.center(len(headings))}\n{headings}", style="bold"), no_wrap=True)
    for line in grid.lines:
        result.add_row(*_line(line, grid, measure))
    if grid.oracle:
        result.add_section()
        result.add_row(*_line(grid.oracle, grid, measure), style="dim")
    return result


def _line(line: Line, grid: Grid, measure: Callable[[Group], Widths]) -> list[Text]:
    from rich.text import Text

    title = Text(line.title + text.superscript(line.notes))
    return [title, Text(line.seeds), *(_slot(shown, measure(group)) for group, shown in zip(grid.groups, line.slots, strict=True))]


def _slot(shown: Slot, widths: Widths) -> Text:
    from rich.text import Text

    if not shown.cells:
        label = shown.label + text.superscript(shown.notes)
        return Text(label.center(_total(widths)), style=_STATE_STYLES.get(shown.state, "red"))
    result = Text()
    for index, (cell, (number, note)) in enumerate(zip(shown.cells, widths, strict=True)):
        plain = _number(cell)
        result.append(" " * (number - len(plain) + bool(index)))
        result.append(cell.text, style=_STYLES.get(cell.mark, ""))
        result.append(plain[len(cell.text) :] + text.superscript(cell.notes).ljust(note))
    return result


def _number(cell: Shown) -> str:
    return cell.text + (f"±{cell.spread}" if cell.spread else "")


def _published(published: tuple[Published, ...]) -> rich_table.Table:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    result = RichTable(title=Text("Published values"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in text.PUBLISHED_HEADINGS:
        result.add_column(Text(heading), overflow="fold")
    for entry in published:
        result.add_row(*map(Text, text.published_row(entry)))
    return result
