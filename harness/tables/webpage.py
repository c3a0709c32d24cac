"""The table as one HTML page that needs nothing else: light, dark and on paper. No script, no address to fetch."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from harness.tables import text
from harness.tables.layout import Grid, Group, Line, Shown, Slot, grids
from harness.tables.values import Part, Table

MAX_COLUMNS = 10
STYLE = Path(__file__).with_name("style.css")


def head(title: str, *more: Path) -> str:
    """The beginning of a page that loads nothing: its title, the house's style, then ``more`` style sheets."""
    style = "".join(path.read_text(encoding="utf-8") for path in (STYLE, *more))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>"""


def to_html(table: Table) -> str:
    simulated = " (SIMULATED)" if any(part.simulated for part in table.parts) else ""
    sections = "\n".join("\n".join(_part(part, f"p{number}")) for number, part in enumerate(table.parts, 1))
    return f"""{head(table.title + simulated)}
<body>
{sections}
</body>
</html>
"""


def _part(part: Part, anchor: str) -> Iterable[str]:
    banner = f'<p class="banner">{escape(text.SIMULATED_LINE)}</p>'
    yield "<section>"
    if part.simulated:
        yield banner
    yield f"<h1>{escape(part.title)}</h1>"
    yield f'<p class="soft">{escape(text.counts(part.counts))}.</p>'
    for warning in part.warnings:
        yield f'<p class="banner warning">{escape(warning)}</p>'
    for grid in grids(part, MAX_COLUMNS):
        yield from _grid(grid, anchor)
    if part.published:
        yield from _published(part)
    yield f"<footer><p>{escape(text.LEGEND)}</p>"
    if part.notes:
        items = (f'<li id="{anchor}-{number}">{escape(note)}</li>' for number, note in enumerate(part.notes, 1))
        yield f"<ol>{''.join(items)}</ol>"
    yield "</footer>"
    if part.simulated:
        yield banner
    yield "</section>"


def _grid(grid: Grid, anchor: str) -> Iterable[str]:
    yield '<div class="scroll"><table><thead>'
    groups = "".join(f'<th class="group first" colspan="{len(group.columns)}">{escape(group.heading)}</th>' for group in grid.groups)
    yield f"<tr><th></th><th></th>{groups}</tr>"
    headings = "".join(f"<th{_first(index)}>{escape(name)}</th>" for group in grid.groups for index, name in enumerate(_headings(group)))
    yield f'<tr><th>Method</th><th title="planned seeds">n</th>{headings}</tr></thead><tbody>'
    yield from (f"<tr>{_line(line, grid, anchor)}</tr>" for line in grid.lines)
    if grid.oracle:
        yield f'<tr class="oracle">{_line(grid.oracle, grid, anchor)}</tr>'
    yield "</tbody></table></div>"


def _headings(group: Group) -> list[str]:
    return [group.column_heading(name) for name in group.columns]


def _line(line: Line, grid: Grid, anchor: str) -> str:
    slots = "".join(_slot(slot, len(group.columns), anchor) for group, slot in zip(grid.groups, line.slots, strict=True))
    return f"<th>{escape(line.title)}{_notes(line.notes, anchor)}</th><td>{escape(line.seeds)}</td>{slots}"


def _slot(slot: Slot, columns: int, anchor: str) -> str:
    if not slot.cells:
        quiet = " quiet" if slot.state in ("none", "skipped", "unplanned") else ""
        return f'<td class="first label{quiet}" colspan="{columns}">{escape(slot.label)}{_notes(slot.notes, anchor)}</td>'
    return "".join(f"<td{_first(index)}>{_cell(cell, anchor)}</td>" for index, cell in enumerate(slot.cells))


def _cell(cell: Shown, anchor: str) -> str:
    number = f'<span class="{cell.mark}">{escape(cell.text)}</span>' if cell.mark else escape(cell.text)
    spread = f'<span class="spread">±{escape(cell.spread)}</span>' if cell.spread else ""
    return number + spread + _notes(cell.notes, anchor)


def _first(index: int) -> str:
    return "" if index else ' class="first"'


def _notes(numbers: tuple[int, ...], anchor: str) -> str:
    links = ",".join(f'<a href="#{anchor}-{number}">{number}</a>' for number in numbers)
    return f"<sup>{links}</sup>" if links else ""


def _published(part: Part) -> Iterable[str]:
    headings = "".join(f"<th>{escape(heading)}</th>" for heading in text.PUBLISHED_HEADINGS)
    yield f'<h2>Published values</h2><div class="scroll"><table class="text"><thead><tr>{headings}</tr></thead><tbody>'
    for entry in part.published:
        title, *others = map(escape, text.published_row(entry))
        yield f"<tr><th>{title}</th>{''.join(f'<td>{other}</td>' for other in others)}</tr>"
    yield "</tbody></table></div>"
