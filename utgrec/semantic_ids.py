"""Semantic ids: an item is a tuple of L codes. From raw codes to ids that name one item each, stored with a digest.

In: the codes a quantiser gives the items of a domain, or a ``codes_*`` column of ``items.parquet``.
Out: ``SemanticIds``, what the recommender, its trie and its vocabulary are made from.

Two items with equal codes collide: a recommender that writes codes cannot tell them apart. What is done about it differs
between methods and changes length and vocabulary, so each way is a strategy with the same face, ``repair(raw) -> ids``:

- ``ExtraDigit`` (TIGER, section 3.1): one position more, the number of the item among those with its tuple;
- ``NearestLast`` (UTGRec, arXiv 2504.04405): another code in the last position, the nearest that is free;
- ``Keep``: none; items share a tuple, and decoding orders them by a seeded hash.

The report says how many items collided before and after, and how many each rule moved. It belongs into ``Meta.extra``.

One file, longer than most: ids and their repair are one source that every generative method names in its method.toml.

Shapes: I items, L codes an item, W codes of a position, D dimensions, P prefixes, Q items looked at together.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.contract import Domain, integers

SCHEMA = 1
CELLS = 1 << 22
"""Distances that ``NearestLast`` looks at together: about 100 MB (more only where one prefix has more items than that)."""


class IdsError(ValueError):
    """Semantic ids that cannot be: read, repaired or stored. The message names what is wrong and the mend."""


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The codes of every item of a domain; row i is item i. Equal ``digest``, equal ids."""

    codes_IL: np.ndarray
    """int32 [I, L], 0 <= code < width of the position; read-only."""
    widths: tuple[int, ...]
    """Codes of each position."""
    books: tuple[int, ...]
    """The codebook of each position, 0, 1, ...; positions with one book share its tokens (UTGRec: 0, 1, 1)."""
    report: dict[str, float | int | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        codes_IL = np.asarray(self.codes_IL)
        if codes_IL.ndim != 2 or not np.issubdtype(codes_IL.dtype, np.integer):
            raise IdsError(f"codes must be whole numbers [items, length]; these are {codes_IL.dtype} {list(codes_IL.shape)}")
        if 0 in codes_IL.shape:
            raise IdsError(f"no codes: {codes_IL.shape[0]} items of {codes_IL.shape[1]} codes; a domain without items has no ids")
        widths, books = tuple(map(int, self.widths)), tuple(map(int, self.books))
        if not len(widths) == len(books) == codes_IL.shape[1]:
            raise IdsError(f"{codes_IL.shape[1]} codes an item, but {len(widths)} widths and {len(books)} books; give one a position")
        if list(dict.fromkeys(books)) != list(range(len(set(books)))):
            raise IdsError(f"books {books} must be numbered 0, 1, ... in the order of the positions")
        for book in set(books):
            if len(shared := {width for width, of in zip(widths, books, strict=True) if of == book}) > 1:
                raise IdsError(f"book {book} is shared by positions of different widths {sorted(shared)}; give them one width")
        if sum(widths) > np.iinfo(np.int32).max:
            raise IdsError(f"{sum(widths):,} codes do not fit into int32 tokens; use narrower positions")
        lowest_L, highest_L = codes_IL.min(0), codes_IL.max(0)
        for position, (low, high, width) in enumerate(zip(lowest_L, highest_L, widths, strict=True)):
            if low < 0 or high >= width:
                wrong = int(low if low < 0 else high)
                item = int(np.flatnonzero(codes_IL[:, position] == wrong)[0])
                raise IdsError(f"item {item} has code {wrong} in position {position + 1}, whose codes are 0..{width - 1}")
        codes_IL = np.array(codes_IL, dtype=np.int32, order="C")
        codes_IL.flags.writeable = False
        for name, value in (("codes_IL", codes_IL), ("widths", widths), ("books", books)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, codes_IL: Any, widths: Sequence[int] | None = None, books: Sequence[int] | None = None) -> SemanticIds:
        """Ids from codes as they are. Without ``widths`` as wide as the codes need; without ``books`` one a position."""
        codes_IL = np.asarray(codes_IL)
        if widths is None:
            widths = (codes_IL.max(0) + 1).tolist() if codes_IL.ndim == 2 and len(codes_IL) else []
        return cls(codes_IL, tuple(widths), tuple(range(len(widths)) if books is None else books))

    # ------------------------------------------------------------------------------------------------ what they are

    @property
    def n_items(self) -> int:
        return self.codes_IL.shape[0]

    @property
    def length(self) -> int:
        return self.codes_IL.shape[1]

    @property
    def book_widths(self) -> tuple[int, ...]:
        """Codes of each book, in the order of their tokens."""
        return tuple(dict(zip(self.books, self.widths, strict=True)).values())

    @property
    def n_codes(self) -> int:
        """Code tokens in all: shared books count once."""
        return sum(self.book_widths)

    @property
    def capacity(self) -> int:
        """How many different tuples there can be."""
        return math.prod(self.widths)

    @property
    def offset_L(self) -> np.ndarray:
        """The first token of each position's book, counted from the first code token."""
        first = np.cumsum((0, *self.book_widths))
        return first[list(self.books)].astype(np.int32)

    @property
    def tokens_IL(self) -> np.ndarray:
        """Code tokens int32 [I, L], counted from the first code token. UTGRec: (5, 0, 255) -> (5, 256, 511)."""
        return self.codes_IL + self.offset_L

    @functools.cached_property
    def collisions(self) -> Collisions:
        return Collisions.of(self)

    @property
    def unique(self) -> bool:
        """Every tuple names one item: items <-> ids is a bijection."""
        return self.collisions.items == 0

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the codes, widths and books; not of the report."""
        head = json.dumps([SCHEMA, self.codes_IL.shape, self.widths, self.books])
        return hashlib.sha256(head.encode() + self.codes_IL.astype("<i4").tobytes()).hexdigest()

    # ------------------------------------------------------------------------------------------------ files, columns

    def save(self, path: Path | str) -> None:
        """Write the ids, whole or not at all: into a file beside it, flushed, then renamed."""
        path = Path(path)
        head = {"schema": SCHEMA, "digest": self.digest, "widths": self.widths, "books": self.books, "report": self.report}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, codes=self.codes_IL, head=np.frombuffer(json.dumps(head).encode(), np.uint8))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> SemanticIds:
        """Read what ``save`` wrote; raises IdsError for a file that is missing, damaged, of another schema or digest."""
        mend = "delete it and make the ids again"
        try:
            with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as archive:
                head, codes_IL = json.loads(archive["head"].tobytes()), archive["codes"]
        except FileNotFoundError:
            raise IdsError(f"{path}: there are no semantic ids; run the stage that makes them") from None
        except Exception as error:  # a damaged archive raises many kinds
            raise IdsError(f"{path}: not a whole file of semantic ids ({type(error).__name__}: {error}); {mend}") from error
        if not isinstance(head, dict) or head.get("schema") != SCHEMA:
            found = head.get("schema") if isinstance(head, dict) else None
            raise IdsError(f"{path}: semantic ids of schema {found!r}, this program reads {SCHEMA}; {mend}")
        try:
            ids = cls(codes_IL, tuple(head["widths"]), tuple(head["books"]), head["report"])
        except (KeyError, TypeError, IdsError) as error:
            raise IdsError(f"{path}: damaged semantic ids ({error}); {mend}") from error
        if ids.digest != head.get("digest"):
            raise IdsError(f"{path}: its codes have digest {ids.digest[:12]}, its head says {str(head.get('digest'))[:12]}; {mend}")
        return ids

    @classmethod
    def imported(cls, domain: Domain, column: str, *, repair: Repair | None = None) -> SemanticIds:
        """The ids that a domain brings along: a ``codes_*`` column of its ``items.parquet``.

        Positions are as wide as their largest code. ``repair`` is applied where items collide (default: an extra digit).
        """
        raw = cls.of(_read_codes(domain, column))
        strategy = repair or (Keep() if raw.unique else ExtraDigit())
        ids = strategy.repair(raw)
        return replace(ids, report={"ids": f"given: {column}", **ids.report})


@dataclass(frozen=True)
class Collisions:
    """How many items share their tuple with another item, in how many groups, and how large the largest is."""

    items: int
    rate: float
    """Share of all items."""
    groups: int
    largest: int
    """Items with the most frequent tuple: 1 if none collide."""

    @classmethod
    def of(cls, ids: SemanticIds) -> Collisions:
        size_G = np.unique(packed(ids.codes_IL, ids.widths), return_counts=True)[1]
        shared_G = size_G[size_G > 1]
        return cls(int(shared_G.sum()), float(shared_G.sum() / ids.n_items), len(shared_G), int(size_G.max()))


def usage(codes_IL: np.ndarray, widths: Sequence[int]) -> dict[str, float]:
    """How healthy codes are, for curves and records: of each position the share of its codes that are used, and their perplexity.

    The perplexity is exp of the entropy: the width if all codes are equally frequent, 1 if one is used alone.
    """
    found: dict[str, float] = {}
    for position, width in enumerate(widths):
        share_W = np.bincount(codes_IL[:, position], minlength=width) / max(1, len(codes_IL))
        used_W = share_W[share_W > 0]
        found[f"usage_{position + 1}"] = len(used_W) / width
        found[f"perplexity_{position + 1}"] = float(np.exp(-(used_W * np.log(used_W)).sum()))
    return found


# ------------------------------------------------------------------------------------------------ collision repair


class Repair(Protocol):
    """What a strategy is: from ids that may collide to ids for the recommender, with a report of what it did."""

    def repair(self, raw: SemanticIds) -> SemanticIds: ...


@dataclass(frozen=True)
class Keep:
    """No repair: items may share a tuple (``unique`` is False then), and share a leaf of the trie."""

    def repair(self, raw: SemanticIds) -> SemanticIds:
        return replace(raw, report=_report("none", raw, raw))


@dataclass(frozen=True)
class ExtraDigit:
    """TIGER, section 3.1: one position more. The items of a tuple are numbered 0, 1, ... by item number.

    The new position has a book of its own, as wide as the largest group, at least ``at_least`` (the paper: 256). Ids of
    which more than ``at_most`` items share one are refused: they say next to nothing of an item.
    """

    at_least: int = 1
    at_most: int = 4096

    def repair(self, raw: SemanticIds) -> SemanticIds:
        if (largest := raw.collisions.largest) > self.at_most:
            raise IdsError(
                f"ids that collide beyond repair: {largest:,} of {raw.n_items:,} items share one tuple, an extra digit of at most "
                f"{self.at_most:,} cannot tell them apart; the quantiser has collapsed, train it longer or give it more codes"
            )
        key_I = packed(raw.codes_IL, raw.widths)
        order_I = np.argsort(key_I, kind="stable")
        digit_I = np.empty(raw.n_items, np.int32)
        digit_I[order_I] = _place_in_run(key_I[order_I])
        width = max(self.at_least, largest)
        codes_IL = np.column_stack([raw.codes_IL, digit_I])
        ids = SemanticIds(codes_IL, (*raw.widths, width), (*raw.books, max(raw.books) + 1))
        moved = {"items_moved": int((digit_I > 0).sum()), "extra_digit_width": width}
        return _bijection(replace(ids, report=_report("extra digit", raw, ids) | moved))


@dataclass(frozen=True)
class NearestLast:
    """UTGRec: an item whose tuple is taken gets its k-th nearest last code; the length stays.

    In round k every item without a place asks for its k-th nearest code (k = 1: its own), and of those that ask for a
    free tuple the nearest gets it, the smaller item number on ties. This is the released procedure in closed form,
    over all rows of the book. An item finds nothing only if its prefix is full. Then the same rounds go over the code
    before the last, then the one before that, up to the root: the k-th nearest code below which tuples are free, for
    the nearest items if there are more than fit, and below it again the nearest codes. So every item finds a place
    unless there are fewer tuples than items.

    ``distances(items_Q, position)`` gives the (squared) distances [Q, W] of these items to the rows of the position's
    book. It is asked for colliding items only, and for positions before the last only where a prefix is full.
    """

    distances: Callable[[np.ndarray, int], np.ndarray]

    @classmethod
    def of(cls, vectors: Sequence[np.ndarray], books: Sequence[np.ndarray]) -> NearestLast:
        """From what was quantised: the vectors t_l [I, D] and the rows [W, D] of the book, one of each a position.

        Distances are summed in float64 and rounded to float32: items with equal vectors tie, whatever the machine.
        """

        def distances(items_Q: np.ndarray, position: int) -> np.ndarray:
            t_QD = np.asarray(vectors[position][items_Q], np.float64)
            c_WD = np.asarray(books[position], np.float64)
            return ((t_QD**2).sum(1)[:, None] - 2 * t_QD @ c_WD.T + (c_WD**2).sum(1)).astype(np.float32)

        return cls(distances)

    def repair(self, raw: SemanticIds) -> SemanticIds:
        if raw.n_items > raw.capacity:
            raise IdsError(f"{raw.n_items:,} items but only {raw.capacity:,} ids of widths {raw.widths}; make them longer or wider")
        codes_IL = raw.codes_IL.copy()
        group_I, size_G = np.unique(packed(codes_IL, raw.widths), return_inverse=True, return_counts=True)[1:]
        placed_I = size_G[group_I] == 1
        moved: dict[str, int] = {}
        for position in reversed(range(raw.length)):
            items_Q = self._rounds(codes_IL, raw.widths, placed_I, np.flatnonzero(~placed_I), position)
            for below in range(position + 1, raw.length):
                self._rounds(codes_IL, raw.widths, placed_I, items_Q, below)
            placed_I[items_Q] = True
            moved[_moved_by(position, raw.length)] = int((codes_IL[items_Q] != raw.codes_IL[items_Q]).any(1).sum())
        ids = replace(raw, codes_IL=codes_IL)
        return _bijection(replace(ids, report=_report("nearest last code", raw, ids) | {"items_moved": sum(moved.values())} | moved))

    def _rounds(
        self, codes_IL: np.ndarray, widths: tuple[int, ...], placed_I: np.ndarray, items_Q: np.ndarray, position: int
    ) -> np.ndarray:
        """Give the items codes of this position where tuples are free below; writes ``codes_IL``, returns who got one.

        What happens below one prefix does not touch another: so the items go in chunks of whole prefixes.
        """
        if not len(items_Q):
            return items_Q
        width, room = widths[position], min(math.prod(widths[position + 1 :]), len(codes_IL))
        key_I = packed(codes_IL[:, :position], widths[:position])
        prefixes_P, prefix_Q = np.unique(key_I[items_Q], return_inverse=True)
        order_Q = np.argsort(prefix_Q, kind="stable")
        items_Q, prefix_Q = items_Q[order_Q], prefix_Q[order_Q]
        # The slots that placed items take, sorted. A slot is a prefix and a code, numbered prefix x width + code.
        near_I = np.searchsorted(prefixes_P, key_I).clip(max=len(prefixes_P) - 1)
        taken_I = placed_I & (prefixes_P[near_I] == key_I)
        taken = np.sort(near_I[taken_I] * width + codes_IL[taken_I, position])
        code_Q = np.empty(len(items_Q), np.int64)
        for start, end in _chunks(prefix_Q, max(CELLS // width, 1)):
            first, last = prefix_Q[start], prefix_Q[end - 1] + 1
            inside = slice(*np.searchsorted(taken, [first * width, last * width]))
            free_S = room - np.bincount(taken[inside] - first * width, minlength=(last - first) * width)
            own_Q = codes_IL[items_Q[start:end], position]
            distance_QW = self._distances(items_Q[start:end], position, width)
            code_Q[start:end] = _ask(distance_QW, own_Q, prefix_Q[start:end] - first, free_S.reshape(-1, width))
        got_Q = code_Q >= 0
        codes_IL[items_Q[got_Q], position] = code_Q[got_Q]
        return items_Q[got_Q]

    def _distances(self, items_Q: np.ndarray, position: int, width: int) -> np.ndarray:
        distance_QW = np.asarray(self.distances(items_Q, position))
        if distance_QW.shape != (len(items_Q), width) or not np.isfinite(distance_QW).all():
            raise IdsError(
                f"position {position + 1}: distances {list(distance_QW.shape)} for {len(items_Q)} items and {width} codes, "
                f"{int((~np.isfinite(distance_QW)).sum())} of them not finite; is the quantiser trained?"
            )
        return distance_QW


def _ask(distance_QW: np.ndarray, own_Q: np.ndarray, prefix_Q: np.ndarray, free_PW: np.ndarray) -> np.ndarray:
    """Round after round: the code that each item gets below its prefix, or -1. ``free_PW`` counts free tuples, down to 0."""
    rank_QW = np.empty(distance_QW.shape, np.int32)
    rank_QW[:, 0] = own_Q
    free_P, code_Q, asking = free_PW.sum(1), np.full(len(own_Q), -1), np.arange(len(own_Q))
    for k in range(free_PW.shape[1]):
        asking = asking[free_P[prefix_Q[asking]] > 0]
        if not len(asking):
            break
        if k == 1:  # only now: whoever got its own code needs no order of the others
            rank_QW[asking] = _ranks(distance_QW[asking], own_Q[asking])
        open_Q = free_PW[prefix_Q[asking], rank_QW[asking, k]] > 0
        item = asking[open_Q]  # those whose wish has room; of the others nobody can win
        prefix, wish = prefix_Q[item], rank_QW[item, k]
        order = np.lexsort((distance_QW[item, wish], wish, prefix))  # stable: ties stay in the order of the items
        item, prefix, wish = item[order], prefix[order], wish[order]
        wins = _place_in_run(prefix * free_PW.shape[1] + wish) < free_PW[prefix, wish]
        code_Q[item[wins]] = wish[wins]
        np.subtract.at(free_PW, (prefix[wins], wish[wins]), 1)
        np.subtract.at(free_P, prefix[wins], 1)
        asking = asking[code_Q[asking] < 0]
    return code_Q


# -------------------------------------------------------------------------------------------------------- small parts


def packed(codes_IL: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """One int64 a tuple, in the lexicographic order of the tuples: equal numbers, equal tuples."""
    key_I, size = np.zeros(len(codes_IL), np.int64), 1
    for position, width in enumerate(widths):
        if size * width > np.iinfo(np.int64).max:  # too long for one number: go on with the ranks of the prefixes
            key_I = np.unique(key_I, return_inverse=True)[1]
            size = len(codes_IL)
        key_I = key_I * width + codes_IL[:, position]
        size *= width
    return key_I


def _place_in_run(sorted_N: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(sorted_N))
    starts = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]]) if len(sorted_N) else index
    return index - np.repeat(starts, np.diff(np.r_[starts, len(sorted_N)]))


def _chunks(sorted_N: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Cut a sorted array into pieces of about ``size`` without cutting a run of equal values."""
    ends = np.flatnonzero(np.r_[sorted_N[1:] != sorted_N[:-1], True]) + 1
    chunks, start = [], 0
    while start < len(sorted_N):
        after = np.searchsorted(ends, start, side="right")  # the end of the next run, which may be longer than size
        end = int(ends[max(after, np.searchsorted(ends, start + size, side="right") - 1)])
        chunks.append((start, end))
        start = end
    return chunks


def _ranks(distance_QW: np.ndarray, own_Q: np.ndarray) -> np.ndarray:
    """Codes by distance, the lower code on ties; the item's own code first, whatever rounding says."""
    keyed = distance_QW.copy()
    keyed[np.arange(len(own_Q)), own_Q] = -np.inf
    return np.argsort(keyed, axis=1, kind="stable").astype(np.int32)


def _moved_by(position: int, length: int) -> str:
    if position == length - 1:
        return "moved_last"
    return "moved_root" if position == 0 else f"moved_code_{position + 1}"


def _report(name: str, raw: SemanticIds, ids: SemanticIds) -> dict[str, float | int | str]:
    before, after = raw.collisions, ids.collisions
    return {
        "repair": name,
        "collision_rate_before": before.rate,
        "collision_groups_before": before.groups,
        "collision_largest_before": before.largest,
        "collision_rate": after.rate,
        "items_moved": 0,
    }


def _bijection(ids: SemanticIds) -> SemanticIds:
    if not ids.unique:
        raise AssertionError(f"{ids.collisions.items} items still share an id after repair {ids.report.get('repair')!r}: a defect of it")
    return ids


def _read_codes(domain: Domain, column: str) -> np.ndarray:
    """A list column of ``items.parquet`` as an array [I, L], with an error for all that is not one tuple an item."""
    path, table = domain.path / "items.parquet", domain.items
    if column not in table.column_names:
        there = [name for name in table.column_names if name.startswith("codes_")]
        near = difflib.get_close_matches(column, there, 1)
        raise IdsError(
            f"{path} has no column {column!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + (f"columns with ids: {', '.join(there)}" if there else "it brings no ids (no codes_* column): make them with a tokenizer")
        )
    lists = table[column].combine_chunks()
    if not isinstance(lists, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray) or not pa.types.is_integer(lists.type.value_type):
        raise IdsError(f"{path}: column {column!r} is {lists.type}; ids are lists of whole numbers")
    if len(lists) != domain.n_items or not len(lists):
        raise IdsError(f"{path}: {len(lists)} rows for {domain.n_items} items; without items there are no ids, else prepare it again")
    length_I = integers(pc.fill_null(pc.list_value_length(lists), -1))
    common = int(np.bincount(length_I[length_I > 0]).argmax()) if (length_I > 0).any() else 0
    odd = np.flatnonzero(length_I != common) if common else np.arange(1)
    if len(odd):
        item = int(odd[0])
        has = "no codes" if length_I[item] <= 0 else f"{length_I[item]} codes"
        raise IdsError(f"{path}: column {column!r}: item {item} has {has}, most have {common}; all need as many ({len(odd)} differ)")
    values = lists.flatten()
    if values.null_count:
        raise IdsError(f"{path}: column {column!r}: {values.null_count} codes are null; every item needs all {common}")
    codes_IL = integers(values.cast(pa.int64())).reshape(-1, common)
    if codes_IL.min() < 0:
        item = int(np.flatnonzero((codes_IL < 0).any(1))[0])
        raise IdsError(f"{path}: column {column!r}: item {item} has the codes {codes_IL[item].tolist()}; codes count from 0")
    return codes_IL
