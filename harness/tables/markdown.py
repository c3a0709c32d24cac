"""The table as GitHub-flavoured Markdown: best bold, second underlined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.tables import text
from harness.tables.layout import Grid, Line, Shown, Slot, grids
from harness.tables.values import Part, Table

MAX_COLUMNS = 16


def to_markdown(table: Table) -> str:
    return "\n".join("\n".join(_part(part)) + "\n" for part in table.parts)


def escape(string: str) -> str:
    """Text that Markdown takes literally: no emphasis, link, HTML, table border or formula."""
    string = re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", string)
    return re.sub(r"(?i)(https?|ftp|mailto|www)([:.])", r"\1\\\2", string)  # nor an address that becomes a link by itself


def _part(part: Part) -> Iterable[str]:
    banner = f"**{text.SIMULATED_LINE}**"
    if part.simulated:
        yield from (banner, "")
    yield from (f"## {escape(part.title)}", "", f"{text.counts(part.counts)}.", "")
    for grid in grids(part, MAX_COLUMNS):
        yield from (*_grid(grid), "")
    if part.published:
        yield from ("### Published values", "")
        rows = [list(map(escape, text.published_row(entry))) for entry in part.published]
        yield from (*_rows(text.PUBLISHED_HEADINGS, rows, left=len(text.PUBLISHED_HEADINGS)), "")
    yield from (text.LEGEND, "")
    if part.notes:
        yield from (*(f"{text.superscript((number,))} {escape(note)}  " for number, note in enumerate(part.notes, 1)), "")
    for warning in part.warnings:
        yield from (f"**Warning.** {escape(warning)}", "")
    if part.simulated:
        yield banner


def _grid(grid: Grid) -> Iterable[str]:
    """Markdown has one row of headings: the group's name stands in each, or above the table where there is only one."""
    headings = ["Method", "n"]
    for group in grid.groups:
        prefix = f"{escape(group.heading)}<br>" if len(grid.groups) > 1 else ""
        headings += [prefix + group.column_heading(name) for name in group.columns]
    if len(grid.groups) == 1:
        yield from (f"**{escape(grid.groups[0].heading)}**", "")
    lines = [*grid.lines, *([grid.oracle] if grid.oracle else [])]
    yield from _rows(headings, [_line(line, grid) for line in lines], left=1)


def _line(line: Line, grid: Grid) -> list[str]:
    title = escape(line.title) + text.superscript(line.notes)
    cells = [cell for group, slot in zip(grid.groups, line.slots, strict=True) for cell in _slot(slot, len(group.columns))]
    return [title if line.seeds else f"*{title}*", line.seeds, *cells]


def _slot(slot: Slot, columns: int) -> list[str]:
    """A label is repeated in every column: Markdown has no cell that spans several."""
    if not slot.cells:
        return [escape(slot.label) + text.superscript(slot.notes)] * columns
    return [_cell(cell) for cell in slot.cells]


def _cell(cell: Shown) -> str:
    number = {"best": f"**{cell.text}**", "second": f"<u>{cell.text}</u>"}.get(cell.mark, escape(cell.text))
    return number + (f" ±{cell.spread}" if cell.spread else "") + text.superscript(cell.notes)


def _rows(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> Iterable[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'|'.join(':---' if index < left else '---:' for index in range(len(headings)))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
