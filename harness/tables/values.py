"""A comparison table as a frozen value, independent of any format: what ``build`` makes and the renderers show.

``Table`` -> ``Part`` (real or simulated domains, never both) -> ``Row`` (a method in one configuration) -> ``Block`` (one
domain) -> ``Cell`` (one metric). Texts in it are cleaned (``text.clean``) but not escaped: that belongs to each format.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from harness.contract import PROTOCOL

Mark = Literal["", "best", "second"]
UNPLANNED = "unplanned"
"""State of a block that the suite does not ask for."""


@dataclass(frozen=True)
class Cell:
    """``mean`` over seeds, ``spread`` = sample deviation over them (None for one seed), ``seeds`` = the values behind it.

    In an incomplete block ``mean`` is None and ``seeds`` holds what there is.
    """

    mean: float | None = None
    spread: float | None = None
    seeds: tuple[tuple[int, float], ...] = ()
    mark: Mark = ""


@dataclass(frozen=True)
class Block:
    """One method on one domain. ``label`` names what is wrong (``n/a``, ``timeout``, ``2/3 ok: timeout``), empty if all is ok.

    ``state`` is the worst state of its runs. ``notes`` and ``cost_notes`` are numbers of the part's footnotes.
    """

    state: str
    label: str
    ok: int
    planned: int
    cells: dict[str, Cell]
    cost: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[int, ...] = ()
    cost_notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """``average``: means over the domains; empty unless every block is ok."""

    title: str
    method: str
    config: str
    blocks: dict[str, Block]
    average: dict[str, Cell] = field(default_factory=dict)
    notes: tuple[int, ...] = ()
    isolation: str = ""

    @property
    def seeds(self) -> str:
        """How many seeds were planned: ``3``, or ``1-3`` where domains differ."""
        counts = sorted({block.planned for block in self.blocks.values() if block.planned})
        return "-".join(map(str, counts if len(counts) < 3 else (counts[0], counts[-1])))


@dataclass(frozen=True)
class Published:
    """A published value beside ours. ``ours`` is None where our runs are not complete."""

    title: str
    domain: str
    metric: str
    published: float
    ours: Cell
    comparable: bool
    source: str
    note: str = ""


@dataclass(frozen=True)
class Part:
    """One table: all its domains are real, or all are simulated.

    ``oracle`` is domain -> metric -> upper bound. ``notes`` are the footnotes, number i at index i - 1. ``warnings`` say
    what misleads. ``counts`` is state -> number of planned runs.
    """

    title: str
    simulated: bool
    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    oracle: dict[str, dict[str, float]]
    published: tuple[Published, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    counts: dict[str, int]
    protocol: str = PROTOCOL


@dataclass(frozen=True)
class Table:
    """A plan that mixes real and simulated domains has two parts, the real one first; each is a table of its own."""

    suite: str
    title: str
    parts: tuple[Part, ...]

    def split(self) -> tuple[Table, ...]:
        return tuple(dataclasses.replace(self, parts=(part,)) for part in self.parts)
