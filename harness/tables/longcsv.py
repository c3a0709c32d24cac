"""The table as CSV in full precision, one line a method x domain x metric; costs, averages, oracle and published values too.

``kind`` is result, cost, average, oracle or published; ``data`` is real or SIMULATED, and names a protocol other than loo-v1, on
every line. ``mean`` is empty unless all planned seeds are ok; ``seeds`` (``1=0.0659;2=0.0661``) holds those that are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from harness.contract import PROTOCOL
from harness.tables import text
from harness.tables.layout import cost_columns
from harness.tables.values import Cell, Part, Row, Table

COLUMNS = (
    "suite", "data", "kind", "title", "method", "config", "domain", "metric", "state", "ok", "planned",
    "mean", "spread", "seeds", "isolation", "notes",
)  # fmt: skip
COST_NAMES = {
    "fit_seconds": "fit_seconds",
    "users_per_second": "users_per_second",
    "peak_memory": "peak_memory_bytes",
    "peak_device_memory": "peak_device_memory_bytes",
    "parameters": "parameters",
}

Values = dict[str, object]


def to_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for part in table.parts:
        fixed: Values = {"suite": table.suite, "data": _data(part)}
        for values in _part(part):
            values |= fixed
            writer.writerow([_plain(values.get(name)) for name in COLUMNS])
    return out.getvalue()


def _data(part: Part) -> str:
    return ("SIMULATED" if part.simulated else "real") + ("" if part.protocol == PROTOCOL else f", {part.protocol}")


def _plain(value: object) -> object:
    """Full precision for numbers; no text that a spreadsheet takes for a formula."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t")):
        return f"'{value}"
    return "" if value is None else value


def _part(part: Part) -> Iterator[Values]:
    costs = cost_columns(part)
    for row in part.rows:
        named: Values = {"title": row.title, "method": row.method, "config": row.config, "isolation": row.isolation}
        for values in _row(row, part, costs):
            yield named | values
    for domain, known in part.oracle.items():
        for name in part.metrics:
            yield {"kind": "oracle", "title": text.ORACLE_TITLE, "domain": domain, "metric": name, "mean": known.get(name)}
    for entry in part.published:
        notes = "; ".join(filter(None, ["comparable" if entry.comparable else "not comparable", entry.source, entry.note]))
        yield {
            "kind": "published", "title": entry.title, "domain": entry.domain, "metric": entry.metric,
            "mean": entry.published, "notes": notes,
        }  # fmt: skip


def _row(row: Row, part: Part, costs: tuple[str, ...]) -> Iterator[Values]:
    for domain in part.domains:
        block = row.blocks[domain]
        about: Values = {"domain": domain, "state": block.state, "ok": block.ok, "planned": block.planned}
        notes, cost_notes = _notes(part, row.notes + block.notes), _notes(part, block.cost_notes)
        for name in part.metrics:
            yield about | {"kind": "result", "metric": name, "notes": notes} | _numbers(block.cells[name])
        for name in costs:
            yield about | {"kind": "cost", "metric": COST_NAMES[name], "mean": block.cost.get(name), "notes": cost_notes}
    for name, cell in row.average.items():
        yield {"kind": "average", "domain": f"({len(part.domains)} domains)", "metric": name, "state": "ok"} | _numbers(cell)


def _numbers(cell: Cell) -> Values:
    return {"mean": cell.mean, "spread": cell.spread, "seeds": text.seeds_listed(cell.seeds)}


def _notes(part: Part, numbers: Iterable[int]) -> str:
    return "; ".join(part.notes[number - 1] for number in numbers)
