"""The raw files of Amazon Reviews 2023: reviews -> (user, item, time) in order of the file; metadata -> text parts of given items.

In: RAW/review_categories/CATEGORY.jsonl[.gz] and RAW/meta_categories/meta_CATEGORY.jsonl[.gz]. Out: ``Reviews``, which can be
twenty million rows: ids stay in Arrow's buffers (about 75 bytes a review, with its hashes), and ``strong_rows`` throws out what no core can
keep before any id becomes a number. Legend: R reviews.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.data import jsonl, text
from harness.data.source import DataError

FIELDS = pa.schema([("user_id", pa.string()), ("parent_asin", pa.string()), ("timestamp", pa.int64())])
LATEST = 2**62
PARTS = {"title": "title", "brand": "store", "features": "features", "categories": "categories", "description": "description"}
"""Text part -> field of the metadata."""



@dataclass(frozen=True)
class Reviews:
    """Reviews that have a user, an item and a time, in order of the file. ``skipped``: how many had not.

    The hashes are those of the ids: the same text has the same, within one version of the library that makes them.
    """

    users_R: pa.ChunkedArray
    items_R: pa.ChunkedArray
    times_R: np.ndarray
    user_hashes_R: np.ndarray
    item_hashes_R: np.ndarray
    skipped: int

    def __len__(self) -> int:
        return len(self.times_R)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
        """Numbers and names of the users and of the items of ``rows`` (ascending): users, user ids, items, item ids."""
        mask = np.zeros(len(self), bool)
        mask[rows] = True
        keep = pa.array(mask)
        with ThreadPoolExecutor(1) as pool:
            users = pool.submit(_numbered, self.users_R, keep)
            items = _numbered(self.items_R, keep)
            return (*users.result(), *items)


def _numbered(names: pa.ChunkedArray, keep: pa.Array) -> tuple[np.ndarray, list[str]]:
    encoded = names.filter(keep).dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # Arrow's answer where there is no chunk at all
        return np.empty(0, np.int64), []
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def read_reviews(path: Path) -> Reviews:
    """All reviews of a file. One without a user, an item or a time is skipped and counted; a line that is not JSON is an error."""
    parts: list[Rows] = []
    for line, block, rows in jsonl.decoded(path, _rows_of):
        parts.append(rows or _one_by_one(path, line, block))
    users, items, *numbers, skipped = zip(*parts, strict=True)
    times_R, users_R, items_R = (np.concatenate(part) for part in numbers)
    if not len(times_R):
        raise DataError(f"{path} holds no review with user_id, parent_asin and timestamp; is it a review file of the 2023 release?")
    return Reviews(pa.chunked_array(users, pa.string()), pa.chunked_array(items, pa.string()), times_R, users_R, items_R, sum(skipped))


Rows = tuple[pa.Array, pa.Array, np.ndarray, np.ndarray, np.ndarray, int]
"""Users, items, times, hashes of the users and of the items; how many lines have been skipped."""


def _rows_of() -> Callable[[memoryview, np.ndarray], Rows]:
    import polars  # noqa: F401  # now, and not with the first block

    decode = jsonl.columns(FIELDS)
    return lambda block, ends: _complete(*decode(block, ends))


def _complete(user: pa.Array, item: pa.Array, time: pa.Array) -> Rows:
    """The rows that have all three fields."""
    good = pc.and_kleene(pc.greater(pc.binary_length(user), 0), pc.greater(pc.binary_length(item), 0))
    good = pc.and_kleene(good, pc.and_kleene(pc.less(time, LATEST), pc.greater(time, -LATEST)))
    kept = pc.sum(good, min_count=0).as_py()
    if kept < len(user):
        user, item, time = (column.filter(good) for column in (user, item, time))  # null: not kept
    return user, item, time.to_numpy(zero_copy_only=False).astype(np.int64), _hashes(user), _hashes(item), len(good) - kept


def _one_by_one(path: Path, line: int, block: memoryview) -> Rows:
    """The same, by the standard library: this says what a review is."""
    rows: list[tuple[str, str, int]] = []
    skipped = 0
    for number, review in jsonl.records(path, line, block):
        user, item, time = (review.get(name) for name in FIELDS.names)
        if not (isinstance(user, str) and user and isinstance(item, str) and item and type(time) is int and abs(time) < LATEST):
            skipped += 1
            continue
        if not (_is_text(user) and _is_text(item)):
            raise DataError(f"{path} line {number}: user_id or parent_asin holds half a surrogate pair, which is no text")
        rows.append((user, item, time))
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return *_complete(*(pa.array(column, kind) for column, kind in zip(columns, FIELDS.types, strict=True)))[:5], skipped


def _hashes(names: pa.Array) -> np.ndarray:
    import polars

    return polars.Series(names).hash().to_numpy()


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


# ------------------------------------------------------------------------------------------- before ids become numbers


def strong_rows(reviews: Reviews, k: int) -> tuple[np.ndarray, int]:
    """Rows [R'] that hold every row of the k-core (and few others), and how many reviews repeat their user's item.

    Numbering all ids costs as much as reading them, and most users have one review. So rows are counted by hashes of their ids first:
    ids that share a hash make a count too large, never too small. The number of repeats is exact: rows whose pair shares its
    hash with another are compared by their ids.
    """
    with ThreadPoolExecutor(1) as pool:
        repeats = pool.submit(_repeats, reviews)  # sorting and searching leave the interpreter to others
        user_R, item_R = _buckets(reviews.user_hashes_R), _buckets(reviews.item_hashes_R)
        rows = _strong(user_R, item_R, k)
        rows = rows[_strong(user_R[rows], item_R[rows], k)]  # a third round finds little more, and costs less once ids are numbers
        return rows, repeats.result()


def _strong(user_R: np.ndarray, item_R: np.ndarray, k: int) -> np.ndarray:
    return np.flatnonzero((np.bincount(user_R)[user_R] >= k) & (np.bincount(item_R)[item_R] >= k))


def _buckets(hash_R: np.ndarray) -> np.ndarray:
    """The leading bits of a hash: one to two buckets a row, at most 2^26."""
    bits = min(max(len(hash_R).bit_length(), 8), 26)
    return (hash_R >> np.uint64(64 - bits)).astype(np.int64)


def _repeats(reviews: Reviews) -> int:
    """How many rows have a user and an item that an earlier row has."""
    pair_R = reviews.user_hashes_R * np.uint64(0x9E3779B97F4A7C15) ^ reviews.item_hashes_R
    hashes = np.sort(pair_R)
    shared = hashes[1:][hashes[1:] == hashes[:-1]]
    marked = np.zeros(1 << 24, bool)  # small enough for a cache; sorts out nineteen rows of twenty before the exact search
    marked[shared >> np.uint64(40)] = True
    rows = np.flatnonzero(marked[pair_R >> np.uint64(40)])
    rows = rows[np.isin(pair_R[rows], shared)]
    user, _, item, item_ids = reviews.take(rows)
    return len(rows) - len(np.unique(user * max(len(item_ids), 1) + item))


# ------------------------------------------------------------------------------------------------------------ metadata


@dataclass(frozen=True)
class Texts:
    """Text parts, cleaned, and the texts that they make together (``text.join``): a row an item, null where it has none."""

    parts: dict[str, pa.Array]
    texts: pa.Array


def read_metadata(path: Path, item_ids: list[str]) -> tuple[Texts, dict[str, int]]:
    """The texts of ``item_ids``, and counts of what was wrong. The first record of an item counts."""
    items = frozenset(item_ids)
    blocks = [found or _one_by_one_texts(path, line, block, items) for line, block, found in jsonl.decoded(path, _texts_of, items)]
    names, wrong, *columns = (pa.chunked_array(parts) for parts in zip(*blocks, strict=True))
    row_of_record = pc.index_in(names, pa.array(item_ids, pa.string())).to_numpy()
    rows, records = np.unique(row_of_record, return_index=True)  # of each item the first record
    record_of_row = np.full(len(item_ids), -1)
    record_of_row[rows] = records
    indices = pa.array(record_of_row, mask=record_of_row < 0)
    *parts, texts = (column.take(indices).combine_chunks() for column in columns)
    counts = {
        "items_without_metadata": len(item_ids) - len(rows),
        "repeated_metadata": len(names) - len(rows),
        "metadata_fields_of_wrong_type": int(wrong.to_numpy()[records].sum()),
    }
    return Texts(dict(zip(PARTS, parts, strict=True)), texts), counts


def _texts_of(items: frozenset[str]) -> Callable[[memoryview, np.ndarray], tuple[pa.Array, ...]]:
    """A decoder that looks at the records of these items only: a category lists ten times as many as a core keeps."""
    identify = jsonl.columns(pa.schema([("parent_asin", pa.string())]))
    load = jsonl.loader(("parent_asin", *PARTS.values()))

    def decode(block: memoryview, ends: np.ndarray) -> tuple[pa.Array, ...]:
        (names,) = identify(block, ends)
        rows = [row for row, name in enumerate(names.to_pylist()) if name in items]
        starts = np.concatenate([[0], ends[:-1] + 1])
        return _columns([load(block[start:end]) for start, end in zip(starts[rows].tolist(), ends[rows].tolist(), strict=True)])

    return decode


def _one_by_one_texts(path: Path, line: int, block: memoryview, items: frozenset[str]) -> tuple[pa.Array, ...]:
    records = (record for _, record in jsonl.records(path, line, block))
    return _columns([record for record in records if isinstance(item := record.get("parent_asin"), str) and item in items])


def _columns(records: list[dict[str, Any]]) -> tuple[pa.Array, ...]:
    """Items, how many fields of each have the wrong type, its parts in order of ``PARTS``, its text."""
    rows, wrong = [], []
    for record in records:
        values = [record.get(key) for key in PARTS.values()]
        right = [v is None or isinstance(v, str) or (isinstance(v, list) and all(isinstance(one, str) for one in v)) for v in values]
        parts = [text.part(value) if fits else None for value, fits in zip(values, right, strict=True)]
        rows.append((record["parent_asin"], *parts, text.join(dict(zip(PARTS, parts, strict=True)))))
        wrong.append(right.count(False))
    names, *columns = zip(*rows, strict=True) if rows else [()] * (len(PARTS) + 2)
    return pa.array(names, pa.string()), pa.array(wrong, pa.int64()), *(pa.array(column, pa.string()) for column in columns)
