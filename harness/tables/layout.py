"""A part of a table cut into grids that fit: what stands in which cell, still without a format.

A group of columns is the metrics of one domain, the average, or the costs of one domain. Groups are packed side by side
as long as there is room; the rest goes into further grids below. A slot is what one row shows in one group: cells, or one
label over the whole group (``timeout``, ``n/a``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from harness.tables import text
from harness.tables.values import UNPLANNED, Block, Cell, Mark, Part, Row

Kind = Literal["metrics", "average", "cost"]


@dataclass(frozen=True)
class Shown:
    """One cell: text, what follows a ± (empty: nothing does), mark, footnotes."""

    text: str
    spread: str = ""
    mark: Mark = ""
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slot:
    """``label`` stands over all columns of the group instead of ``cells``; ``state`` says why."""

    cells: tuple[Shown, ...] = ()
    label: str = ""
    state: str = "ok"
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Group:
    """``columns`` are metric or cost names."""

    kind: Kind
    domain: str
    columns: tuple[str, ...]

    @property
    def heading(self) -> str:
        return text.AVERAGE if self.kind == "average" else f"{self.domain}: cost" if self.kind == "cost" else self.domain

    def column_heading(self, name: str, *, short: bool = False) -> str:
        return text.COST_HEADINGS[name] if self.kind == "cost" else text.metric_heading(name, short=short)


@dataclass(frozen=True)
class Line:
    """One row of a grid. ``seeds`` is empty for the oracle."""

    title: str
    seeds: str
    notes: tuple[int, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Grid:
    groups: tuple[Group, ...]
    lines: tuple[Line, ...]
    oracle: Line | None

    @property
    def columns(self) -> int:
        return sum(len(group.columns) for group in self.groups)


def _column_count(group: Group) -> int:
    return len(group.columns)


def grids(part: Part, limit: int, width: Callable[[Group], int] = _column_count, *, paired: bool = False) -> list[Grid]:
    """The grids of a part. ``limit`` is the room for groups, in the unit of ``width`` (by default columns).

    All in one grid if it fits. Otherwise all metrics first and the costs below them; or, with ``paired``, one grid a
    domain with its costs at its side, if those fit.
    """
    quality = [Group("metrics", domain, part.metrics) for domain in part.domains]
    if len(part.domains) > 1:
        quality.append(Group("average", "", part.metrics))
    costs = [Group("cost", domain, cost_columns(part)) for domain in part.domains]
    pairs = [(group, *(cost for cost in costs if cost.domain == group.domain)) for group in quality]
    if sum(map(width, [*quality, *costs])) <= limit:
        chosen = [(*quality, *costs)]
    elif paired and all(sum(map(width, pair)) <= limit for pair in pairs):
        chosen = pairs
    else:
        chosen = [*_packed(quality, limit, width), *_packed(costs, limit, width)]
    return [Grid(groups, _lines(part, groups), _oracle(part, groups)) for groups in chosen]


def cost_columns(part: Part) -> tuple[str, ...]:
    """All costs; GPU memory only where some run has used any."""
    has_gpu = any(block.cost.get("peak_device_memory") for row in part.rows for block in row.blocks.values())
    return tuple(name for name in text.COST_HEADINGS if has_gpu or name != "peak_device_memory")


def _pieces(group: Group, limit: int, width: Callable[[Group], int]) -> Iterable[Group]:
    """A group that is too wide by itself, cut into pieces of columns."""
    start = 0
    while start < len(group.columns):
        end = len(group.columns)
        while end > start + 1 and width(Group(group.kind, group.domain, group.columns[start:end])) > limit:
            end -= 1
        yield Group(group.kind, group.domain, group.columns[start:end])
        start = end


def _packed(groups: Iterable[Group], limit: int, width: Callable[[Group], int]) -> list[tuple[Group, ...]]:
    packed: list[tuple[Group, ...]] = []
    room = 0
    for piece in (piece for group in groups for piece in _pieces(group, limit, width)):
        if packed and width(piece) <= room:
            packed[-1] += (piece,)
        else:
            packed.append((piece,))
            room = limit
        room -= width(piece)
    return packed


# ------------------------------------------------------------------------------------------------------------ slots


def _lines(part: Part, groups: tuple[Group, ...]) -> tuple[Line, ...]:
    return tuple(Line(row.title, row.seeds, row.notes, tuple(slot(row, group) for group in groups)) for row in part.rows)


def slot(row: Row, group: Group) -> Slot:
    """What a row shows in a group."""
    if group.kind == "average":
        if not row.average:
            return Slot(label=text.DASH, state="none")
        return Slot(tuple(_shown(row.average[name]) for name in group.columns))
    block = row.blocks[group.domain]
    if group.kind == "cost":
        return _cost_slot(block, group.columns)
    if block.state != "ok":
        return Slot(label=block.label, state=block.state, notes=block.notes)
    first, *others = (_shown(block.cells[name]) for name in group.columns)
    return Slot((Shown(first.text, first.spread, first.mark, block.notes), *others))


def _cost_slot(block: Block, columns: tuple[str, ...]) -> Slot:
    if block.state != "ok":
        return Slot(label="" if block.state == UNPLANNED else text.DASH, state="none")
    first, *others = (Shown(text.cost(name, block.cost.get(name))) for name in columns)
    return Slot((Shown(first.text, notes=block.cost_notes), *others))


def _shown(cell: Cell) -> Shown:
    if cell.mean is None:
        return Shown(text.DASH)
    return Shown(text.value(cell.mean), text.spread(cell.spread), cell.mark)


def _oracle(part: Part, groups: tuple[Group, ...]) -> Line | None:
    """The oracle's row, only in grids where it has a value."""
    if not any(group.kind == "metrics" and group.domain in part.oracle for group in groups):
        return None
    slots = []
    for group in groups:
        known = part.oracle.get(group.domain, {}) if group.kind == "metrics" else {}
        cells = tuple(Shown(text.value(known[name]) if name in known else "") for name in group.columns)
        slots.append(Slot(cells) if known else Slot(state="none"))
    return Line(text.ORACLE_TITLE, "", (), tuple(slots))
