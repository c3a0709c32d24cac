"""The table as LaTeX (booktabs): best bold, second underlined, footnotes below. Needs the packages booktabs and graphicx.

The text is plain ASCII, so that it compiles with any engine and any input encoding.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from harness.tables import text
from harness.tables.layout import Grid, Group, Line, Shown, Slot, grids
from harness.tables.values import Part, Table

ROOM = 40
"""What stands side by side: 5 for a metric with its spread, 3 for a cost. A tabular that is still too wide is scaled down."""
MAX_LINES = 48
"""Lines of one float, headings included: what fits on a page."""
_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "{''}", "`": r"\`{}", "-": "{-}", "'": r"{'}", "?": "{?}", "!": "{!}", ",": "{,}",
    "±": r"$\pm$", "×": r"$\times$", "–": "--", "—": "---", "…": r"\ldots{}", "§": r"\S{}",
}  # fmt: skip


def to_latex(table: Table) -> str:
    return "\n".join("\n".join(_part(part, table.suite)) + "\n" for part in table.parts)


def escape(string: str) -> str:
    """Text that LaTeX prints as it stands: ASCII only, no command, no ligature; unknown letters lose their accents or become ``?``."""
    return "".join(_escape(character) for character in string)


def _escape(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isascii():
        return character
    ascii_part = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(_ESCAPES.get(c, c) for c in ascii_part) or "{?}"


def _part(part: Part, suite: str) -> Iterable[str]:
    banner = [f"% {text.SIMULATED_LINE}"] if part.simulated else []
    label = "".join(c for c in suite if c.isascii() and (c.isalnum() or c in "-_")) + ("-simulated" if part.simulated else "")
    floats = _floats([list(_grid(grid)) for grid in grids(part, ROOM, _width)] + [list(_published(part))] * bool(part.published))
    yield from (*banner, r"% needs \usepackage{booktabs,graphicx}")
    for number, tabulars in enumerate(floats):
        yield from (r"\begin{table*}[tp]", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}")
        if number:
            yield rf"\caption{{{escape(part.title)} (continued).}}"
        else:
            yield rf"\caption{{{escape(part.title)}. {escape(text.LEGEND)} {escape(text.counts(part.counts))}.}}"
            yield rf"\label{{tab:{label}}}"
        for tabular in tabulars:
            yield from (r"\par\medskip\sbox0{%", *tabular, r"}\ifdim\wd0>\textwidth\resizebox{\textwidth}{!}{\usebox0}\else\usebox0\fi")
        if number == len(floats) - 1:
            yield from _notes(part)
        yield r"\end{table*}"
    yield from banner


def _width(group: Group) -> int:
    return len(group.columns) * (3 if group.kind == "cost" else 5)


def _floats(tabulars: list[list[str]]) -> list[list[list[str]]]:
    """Tabulars that go into one float: as many as fit on a page, at least one."""
    floats: list[list[list[str]]] = []
    room = 0
    for tabular in tabulars:
        if floats and len(tabular) <= room:
            floats[-1].append(tabular)
        else:
            floats.append([tabular])
            room = MAX_LINES
        room -= len(tabular)
    return floats


def _notes(part: Part) -> Iterable[str]:
    yield r"\par\medskip\begin{minipage}{\textwidth}\scriptsize\raggedright"
    yield from (rf"{_superscript((number,))}~{escape(note)}\par" for number, note in enumerate(part.notes, 1))
    yield from (rf"\textbf{{Warning.}} {escape(warning)}\par" for warning in part.warnings)
    if part.simulated:
        yield rf"\textbf{{{escape(text.SIMULATED_LINE)}}}\par"
    yield r"\end{minipage}"


def _grid(grid: Grid) -> Iterable[str]:
    yield rf"\begin{{tabular}}{{lr{'r' * grid.columns}}}"
    yield r"\toprule"
    spans, rules, column = [], [], 3
    for group in grid.groups:
        spans.append(rf"\multicolumn{{{len(group.columns)}}}{{c}}{{{escape(group.heading)}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + len(group.columns) - 1}}}")
        column += len(group.columns)
    yield rf"& & {' & '.join(spans)} \\"
    yield "".join(rules)
    headings = [escape(group.column_heading(name, short=True)) for group in grid.groups for name in group.columns]
    yield rf"Method & $n$ & {' & '.join(headings)} \\"
    yield r"\midrule"
    yield from (_line(line, grid) for line in grid.lines)
    if grid.oracle:
        yield r"\midrule"
        yield _line(grid.oracle, grid)
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _line(line: Line, grid: Grid) -> str:
    title = escape(line.title) if line.seeds else rf"\textit{{{escape(line.title)}}}"
    cells = [_slot(slot, len(group.columns)) for group, slot in zip(grid.groups, line.slots, strict=True)]
    return rf"{title}{_superscript(line.notes)} & {line.seeds.replace('-', '--')} & {' & '.join(cells)} \\"


def _slot(slot: Slot, columns: int) -> str:
    if not slot.cells:
        return rf"\multicolumn{{{columns}}}{{c}}{{{escape(slot.label)}{_superscript(slot.notes)}}}"
    return " & ".join(_cell(cell) for cell in slot.cells)


def _cell(cell: Shown) -> str:
    number = {"best": rf"\textbf{{{cell.text}}}", "second": rf"\underline{{{cell.text}}}"}.get(cell.mark, escape(cell.text))
    spread = rf"\,{{\tiny$\pm${escape(cell.spread)}}}" if cell.spread else ""
    return number + spread + _superscript(cell.notes)


def _published(part: Part) -> Iterable[str]:
    yield r"\begin{tabular}{lllrrlp{0.3\textwidth}}"
    yield r"\toprule"
    yield rf"{' & '.join(text.PUBLISHED_HEADINGS)} \\"
    yield r"\midrule"
    yield from (rf"{' & '.join(map(escape, text.published_row(entry)))} \\" for entry in part.published)
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _superscript(numbers: tuple[int, ...]) -> str:
    return rf"$^{{{','.join(map(str, numbers))}}}$" if numbers else ""
