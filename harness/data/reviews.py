"""The raw files of Amazon Reviews 2023: reviews -> (user, item, time) in order of the file; metadata -> text parts of given items.

In: RAW/review_categories/CATEGORY.jsonl[.gz] and RAW/meta_categories/meta_CATEGORY.jsonl[.gz]. Out: ``Reviews``, which can be
twenty million rows: ids stay in Arrow's buffers (about 60 bytes a review), and ``strong_rows`` throws out what no core can
keep before any id becomes a number. Legend: R reviews.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.data import jsonl
from harness.data.source import DataError

FIELDS = pa.schema([("user_id", pa.string()), ("parent_asin", pa.string()), ("timestamp", pa.int64())])
LATEST = 2**62
PARTS = {"title": "title", "brand": "store", "features": "features", "categories": "categories", "description": "description"}
"""Text part -> field of the metadata."""

Rows = tuple[pa.Array, pa.Array, np.ndarray]


@dataclass(frozen=True)
class Reviews:
    """Reviews that have a user, an item and a time, in order of the file. ``skipped``: how many had not."""

    users_R: pa.ChunkedArray
    items_R: pa.ChunkedArray
    times_R: np.ndarray
    skipped: int

    def __len__(self) -> int:
        return len(self.times_R)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
        """Numbers and names of the users and of the items of ``rows`` (ascending): users, user ids, items, item ids."""
        mask = np.zeros(len(self), bool)
        mask[rows] = True
        return (*_numbered(self.users_R.filter(pa.array(mask))), *_numbered(self.items_R.filter(pa.array(mask))))


def _numbered(names: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    encoded = names.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # Arrow's answer where there is no chunk at all
        return np.empty(0, np.int64), []
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def read_reviews(path: Path) -> Reviews:
    """All reviews of a file. One without a user, an item or a time is skipped and counted; a line that is not JSON is an error."""
    users, items, times = [], [], [np.empty(0, np.int64)]
    skipped = 0
    for line, block, columns in jsonl.decoded(path, jsonl.columns(FIELDS)):
        (user, item, time), count = _complete(*columns) if columns is not None else _one_by_one(path, line, block)
        users.append(user)
        items.append(item)
        times.append(time)
        skipped += count
    times_R = np.concatenate(times)
    if not len(times_R):
        raise DataError(f"{path} holds no review with user_id, parent_asin and timestamp; is it a review file of the 2023 release?")
    return Reviews(pa.chunked_array(users, pa.string()), pa.chunked_array(items, pa.string()), times_R, skipped)


def _complete(user: pa.Array, item: pa.Array, time: pa.Array) -> tuple[Rows, int]:
    """The rows that have all three fields, and how many have not."""
    good = pc.and_kleene(pc.greater(pc.binary_length(user), 0), pc.greater(pc.binary_length(item), 0))
    good = pc.and_kleene(good, pc.and_kleene(pc.less(time, LATEST), pc.greater(time, -LATEST)))
    kept = pc.sum(good, min_count=0).as_py()
    if kept < len(user):
        user, item, time = (column.filter(good) for column in (user, item, time))  # null: not kept
    return (user, item, time.to_numpy(zero_copy_only=False).astype(np.int64)), len(good) - kept


def _one_by_one(path: Path, line: int, block: memoryview) -> tuple[Rows, int]:
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
    user_column, item_column, time_column = zip(*rows, strict=True) if rows else ((), (), ())
    return (pa.array(user_column, pa.string()), pa.array(item_column, pa.string()), np.array(time_column, np.int64)), skipped


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


# ------------------------------------------------------------------------------------------- before ids become numbers


def strong_rows(reviews: Reviews, k: int) -> tuple[np.ndarray, int]:
    """Rows [R'] that hold every row of the k-core (and few others), and how many reviews repeat their user's item.

    Numbering all ids costs as much as reading them, and most users have one review. So rows are counted by hashes of their ids first:
    ids that share a hash make a count too large, never too small. The number of repeats is exact: rows whose pair shares its
    hash with another are compared by their ids.
    """
    user_R, item_R = _hashes(reviews.users_R), _hashes(reviews.items_R)
    repeats = _repeats(reviews, user_R * np.uint64(0x9E3779B97F4A7C15) ^ item_R)
    user_R, item_R = _buckets(user_R), _buckets(item_R)
    rows = _strong(user_R, item_R, k)
    return rows[_strong(user_R[rows], item_R[rows], k)], repeats  # a third round finds little more, and costs less once ids are numbers


def _strong(user_R: np.ndarray, item_R: np.ndarray, k: int) -> np.ndarray:
    return np.flatnonzero((np.bincount(user_R)[user_R] >= k) & (np.bincount(item_R)[item_R] >= k))


def _buckets(hash_R: np.ndarray) -> np.ndarray:
    """The leading bits of a hash: one to two buckets a row, at most 2^26."""
    bits = min(max(len(hash_R).bit_length(), 8), 26)
    return (hash_R >> np.uint64(64 - bits)).astype(np.int64)


def _hashes(names: pa.ChunkedArray) -> np.ndarray:
    import polars

    step = 256  # chunks at a time: polars makes 16 bytes a name of them
    parts = [polars.Series(pa.chunked_array(names.chunks[at : at + step])).hash().to_numpy() for at in range(0, names.num_chunks, step)]
    return np.concatenate(parts)


def _repeats(reviews: Reviews, pair_R: np.ndarray) -> int:
    """How many rows have a user and an item that an earlier row has."""
    hashes = np.sort(pair_R)
    shared = hashes[1:][hashes[1:] == hashes[:-1]]
    marked = np.zeros(1 << 24, bool)  # small enough for a cache; sorts out nineteen rows of twenty before the exact search
    marked[shared >> np.uint64(40)] = True
    rows = np.flatnonzero(marked[pair_R >> np.uint64(40)])
    rows = rows[np.isin(pair_R[rows], shared)]
    user, _, item, item_ids = reviews.take(rows)
    return len(rows) - len(np.unique(user * max(len(item_ids), 1) + item))


# ------------------------------------------------------------------------------------------------------------ metadata


def read_metadata(path: Path, item_ids: list[str]) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """The text parts of ``item_ids``, and counts of what was wrong. The first record of an item counts."""
    row_of = {item: row for row, item in enumerate(item_ids)}
    columns: dict[str, list[Any]] = {name: [None] * len(item_ids) for name in PARTS}
    seen: set[str] = set()
    repeated = wrong = 0
    for line, block, found in jsonl.decoded(path, _records_of(row_of)):
        for record in (record for _, record in jsonl.records(path, line, block)) if found is None else found:
            item = record.get("parent_asin")
            if not isinstance(item, str) or item not in row_of:
                continue
            if item in seen:
                repeated += 1
                continue
            seen.add(item)
            for name, key in PARTS.items():
                value = record.get(key)
                if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                    columns[name][row_of[item]] = value
                else:
                    wrong += 1
    counts = {"items_without_metadata": len(item_ids) - len(seen), "repeated_metadata": repeated, "metadata_fields_of_wrong_type": wrong}
    return columns, counts


def _records_of(items: Collection[str]) -> Callable[[memoryview, np.ndarray], list[dict[str, Any]]]:
    """A decoder that makes dictionaries of the records of these items only: a category lists ten times as many as a core keeps."""
    identify = jsonl.columns(pa.schema([("parent_asin", pa.string())]))
    load = jsonl.loader(("parent_asin", *PARTS.values()))

    def decode(block: memoryview, ends: np.ndarray) -> list[dict[str, Any]]:
        (names,) = identify(block, ends)
        rows = [row for row, name in enumerate(names.to_pylist()) if name in items]
        starts = np.concatenate([[0], ends[:-1] + 1])
        return [load(block[start:end]) for start, end in zip(starts[rows].tolist(), ends[rows].tolist(), strict=True)]

    return decode
