"""Records -> the comparison table, in the terminal, Markdown, CSV, LaTeX and HTML.

In: a plan and its records. Out: ``build_table`` gives a frozen value, ``to_*`` show it, ``write_tables`` writes all files.
Tables are views: they can be made again from the records at any time, and nothing is read back from them.

>>> table = build_table(plan, read_records(folder, (run.id for run in plan.runs)), oracles={"toy": {"recall_at_10": 0.4}})
>>> console.print(to_rich(table))
>>> write_tables(table, folder)
"""

from __future__ import annotations

import os
from pathlib import Path

from harness.tables.build import build_table
from harness.tables.latex import to_latex
from harness.tables.longcsv import to_csv
from harness.tables.markdown import to_markdown
from harness.tables.terminal import to_rich
from harness.tables.values import Table
from harness.tables.webpage import to_html

__all__ = ["FORMATS", "Table", "build_table", "to_csv", "to_html", "to_latex", "to_markdown", "to_rich", "write_tables"]

FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex, "html": to_html}


def write_tables(table: Table, folder: Path) -> dict[str, Path]:
    """Write ``SUITE.md``, ``.csv``, ``.tex`` and ``.html``, each whole or not at all. Returns the paths by suffix.

    Of a plan that mixes real and simulated domains, the simulated table has files of its own: ``SUITE.simulated.md`` ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, kind in zip(table.split(), ("", "simulated."), strict=False):
        for suffix, render in FORMATS.items():
            path = written[kind + suffix] = folder / f"{table.suite}.{kind}{suffix}"
            _replace(path, render(part))
    for suffix in FORMATS:  # what an earlier, mixed plan of this name left would pass for new
        if f"simulated.{suffix}" not in written:
            (folder / f"{table.suite}.simulated.{suffix}").unlink(missing_ok=True)
    return written


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
