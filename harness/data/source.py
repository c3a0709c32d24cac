"""The types around a domain, and how users and items get their numbers.

``SourceDomain`` is a domain before it is numbered and split: importers, the preparation and the simulator make it,
``domain.write_domain`` takes it. ``DomainSummary`` is what a written domain says of itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import PROTOCOL, Ragged


class DataError(ValueError):
    """Input or a domain that cannot be used. The message names the file, the line or row, and the mend."""


class DomainExists(DataError):
    """There is a domain of this name with other content."""


@dataclass(frozen=True)
class SourceDomain:
    """A domain before it is numbered and split.

    ``sequences`` holds row numbers into ``item_ids``, one list a user, oldest first; ``times`` is parallel to
    ``sequences.values``. ``columns`` holds the text parts (strings, lists of strings or None) and ``codes_*`` lists,
    one value an item; where ``texts`` is there, they hold clean parts and ``texts`` what these make (cleaning twice is not cleaning once).
    ``private_columns`` (an ASIN, say) go to the private part. ``dropped`` counts what was left out on the way, ``source`` says where
    it came from.
    """

    user_ids: list[str]
    sequences: Ragged
    item_ids: list[str]
    columns: Mapping[str, Any] = field(default_factory=dict)
    texts: Any = None
    times: np.ndarray | None = None
    private_columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    release: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DomainSummary:
    """What ``domain.json`` says. ``created`` is False where an identical domain was there already; ``problem`` is set by
    ``list_domains`` for a folder that cannot be read."""

    name: str
    path: Path
    digest: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    tie_rate: float | None = None
    simulated: bool = False
    release: str | None = None
    created: bool = False
    problem: str | None = None
    protocol: str = PROTOCOL


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    """Lists of numbers as a Ragged."""
    offsets = np.concatenate([[0], np.cumsum([len(entry) for entry in lists], dtype=np.int64)]).astype(np.int64)
    values = np.fromiter((value for entry in lists for value in entry), np.int64, count=int(offsets[-1]))
    return Ragged(values, offsets)


def take(lists: Ragged, rows: np.ndarray) -> tuple[Ragged, np.ndarray]:
    """The lists ``rows`` in this order, and the index of their values in ``lists.values``."""
    lengths = lists.lengths[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    index = np.repeat(lists.offsets[:-1][rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Ragged(lists.values[index], offsets), index


def hash_order(ids: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows in order of sha256(id), and the number (the rank) of every row. Refuses repeated and empty ids."""
    digests: list[bytes] = []
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if not isinstance(name, str) or not name:
            raise DataError(f"{what} {row}: the id {name!r} is not a text of at least one character")
        if name in seen:
            raise DataError(f"{what} {row}: the id {name!r} stands already at {what} {seen[name]}; ids must be unique")
        seen[name] = row
        try:
            digests.append(hashlib.sha256(name.encode()).digest())
        except UnicodeEncodeError:
            raise DataError(f"{what} {row}: the id {name!r} is not valid UTF-8 text") from None
    order = np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return order, rank


def tie_rate(sequences: Ragged, times: np.ndarray | None) -> float | None:
    """Share of the steps from one interaction of a user to the next that take no time: their order is the file's."""
    if times is None:
        return None
    inside = np.ones(len(times), bool)
    inside[sequences.offsets[:-1][sequences.lengths > 0]] = False
    steps = int(inside.sum())
    return float((np.diff(times, prepend=times[:1])[inside] == 0).sum() / steps) if steps else 0.0


def check_source(source: SourceDomain) -> None:
    n_items, values = len(source.item_ids), source.sequences.values
    if not n_items:
        raise DataError("the catalogue is empty: there is no item to recommend")
    if len(source.user_ids) != len(source.sequences):
        raise DataError(f"{len(source.user_ids)} user ids for {len(source.sequences)} lists")
    if len(values) and (values.min() < 0 or values.max() >= n_items):
        raise DataError(f"a list holds the item row {values.min() if values.min() < 0 else values.max()}, right is 0..{n_items - 1}")
    if source.times is not None and len(source.times) != len(values):
        raise DataError(f"{len(source.times)} times for {len(values)} interactions")
    for name, column in {**source.columns, **source.private_columns}.items():
        if len(column) != n_items:
            raise DataError(f"the item column {name!r} has {len(column)} rows, the catalogue {n_items}")
