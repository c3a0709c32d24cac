"""Preparation: raw reviews and metadata -> interactions -> ``SourceDomain``.

In: Amazon-Reviews-2023 files of one category (JSON lines, plain or gzipped):

    RAW/review_categories/CATEGORY.jsonl[.gz]      user_id, parent_asin, timestamp, ...
    RAW/meta_categories/meta_CATEGORY.jsonl[.gz]   parent_asin, title, features, categories, description, store, ...
    RAW/pictures/CATEGORY/                         optional: what `harness data pictures` fetched, or files PARENT_ASIN.jpg

Rules: item = ``parent_asin``; interactions of a user in order of time, equal times in order of the file; of a repeated
item the earliest counts; then users and items with fewer than five interactions are removed until none is left.
The catalogue is the items that remain. A review without a user, an item or a time is skipped and counted; a line that is
not JSON is an error, because a file with one is not the file that was published.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from harness.contract import Ragged
from harness.data.domain import data_root, write_domain
from harness.data.pictures import find_pictures
from harness.data.source import DataError, DomainSummary, SourceDomain

CORE = 5


@dataclass(frozen=True)
class Interactions:
    """Rows (user, item, time) in order of the file; users and items are rows of the id lists."""

    user_ids: list[str]
    item_ids: list[str]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    skipped: int


def prepare_raw(raw: Path, category: str, name: str, *, root: Path | None = None, overwrite: bool = False) -> DomainSummary:
    """Prepare one category of ``raw`` as the domain ``name``, with the pictures found in ``raw/pictures/CATEGORY``."""
    source, pictures = read_raw(raw, category)
    return write_domain((root or data_root()) / name, source, pictures=pictures, overwrite=overwrite)


def read_raw(raw: Path, category: str) -> tuple[SourceDomain, Mapping[str, bytes]]:
    """The prepared source domain of one category, and the pictures of its items."""
    reviews = _find(raw / "review_categories", category)
    metadata = _find(raw / "meta_categories", f"meta_{category}")
    interactions = read_reviews(reviews)
    rows = earliest(interactions.user, interactions.item, interactions.time)
    repeats = len(interactions.user) - len(rows)
    kept = rows[core(interactions.user[rows], interactions.item[rows])]
    if not len(kept):
        raise DataError(f"{reviews}: no user and no item is left by the {CORE}-core; the file is too small or not the whole category")
    sequences, users, items = _lists(interactions.user[kept], interactions.item[kept])
    item_ids = [interactions.item_ids[row] for row in items]
    columns, counts = read_metadata(metadata, item_ids)
    pictures, without_picture = find_pictures(raw, category, item_ids)
    dropped = {
        "reviews_without_fields": interactions.skipped,
        "repeated_items": repeats,
        f"interactions_by_{CORE}_core": len(rows) - len(kept),
        **counts,
        **without_picture,
    }
    source = SourceDomain(
        user_ids=[interactions.user_ids[row] for row in users],
        sequences=sequences,
        item_ids=item_ids,
        columns=columns,
        times=interactions.time[kept],
        release="2023",
        source={"format": "amazon-reviews-2023", "category": category, "files": [reviews.name, metadata.name]},
        dropped=dropped,
    )
    return source, pictures


def prepare_source(source: SourceDomain) -> SourceDomain:
    """The same rules for lists that an importer read: earliest of repeats, iterative 5-core, catalogue = what remains."""
    user = np.repeat(np.arange(len(source.sequences)), source.sequences.lengths)
    item = source.sequences.values
    position = np.arange(len(item))
    rows = earliest(user, item, position if source.times is None else source.times)
    kept = rows[core(user[rows], item[rows])]
    if not len(kept):
        raise DataError(f"no user and no item is left by the {CORE}-core; import without --prepare")
    sequences, users, items = _lists(user[kept], item[kept])
    return replace(
        source,
        user_ids=[source.user_ids[row] for row in users],
        sequences=sequences,
        item_ids=[source.item_ids[row] for row in items],
        columns={name: _pick(column, items) for name, column in source.columns.items()},
        private_columns={name: _pick(column, items) for name, column in source.private_columns.items()},
        times=None if source.times is None else source.times[kept],
        source={**source.source, "prepared": f"earliest of repeats, {CORE}-core"},
        dropped={**source.dropped, "repeated_items": len(item) - len(rows), f"interactions_by_{CORE}_core": len(rows) - len(kept)},
    )


def _pick(column: Any, rows: np.ndarray) -> Any:
    return column.take(pa.array(rows)) if isinstance(column, pa.Array) else [column[row] for row in rows]


def earliest(user: np.ndarray, item: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Rows by user, then time, then place in the file; of a repeated (user, item) only the first."""
    order = np.lexsort((time, user))  # stable: equal times keep the order of the file
    pair = user[order].astype(np.int64) * (int(item.max(initial=0)) + 1) + item[order]
    return order[np.sort(np.unique(pair, return_index=True)[1])]


def core(user: np.ndarray, item: np.ndarray, k: int = CORE) -> np.ndarray:
    """Which rows remain when users and items with fewer than ``k`` rows are removed until there is none."""
    alive = np.ones(len(user), bool)
    while True:
        users = np.bincount(user[alive], minlength=user.max(initial=0) + 1)
        items = np.bincount(item[alive], minlength=item.max(initial=0) + 1)
        weak = alive & ((users[user] < k) | (items[item] < k))
        if not weak.any():
            return np.flatnonzero(alive)
        alive &= ~weak


def _lists(user: np.ndarray, item: np.ndarray) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """Lists of rows that are sorted by user, and which users and items they hold; values are places in the latter."""
    users, counts = np.unique(user, return_counts=True)
    items, values = np.unique(item, return_inverse=True)
    return Ragged(values.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)), users, items


# ---------------------------------------------------------------------------------------------------------- raw files


def read_reviews(path: Path) -> Interactions:
    """All interactions of a review file, in order of the file."""
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []
    skipped = 0
    for _, review in json_lines(path):
        user, item, time = review.get("user_id"), review.get("parent_asin"), review.get("timestamp")
        if not (isinstance(user, str) and user and isinstance(item, str) and item and type(time) is int and abs(time) < 2**62):
            skipped += 1
            continue
        rows.append((users.setdefault(user, len(users)), items.setdefault(item, len(items)), time))
    if not rows:
        raise DataError(f"{path} holds no review with user_id, parent_asin and timestamp; is it a review file of the 2023 release?")
    table = np.array(rows, np.int64)
    return Interactions(list(users), list(items), table[:, 0], table[:, 1], table[:, 2], skipped)


def read_metadata(path: Path, item_ids: list[str]) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """The text parts of ``item_ids``, and counts of what was wrong. The first record of an item counts."""
    row_of = {item: row for row, item in enumerate(item_ids)}
    fields = {"title": "title", "brand": "store", "features": "features", "categories": "categories", "description": "description"}
    columns: dict[str, list[Any]] = {name: [None] * len(item_ids) for name in fields}
    seen: set[str] = set()
    repeated = wrong = 0
    for _, record in json_lines(path):
        item = record.get("parent_asin")
        if not isinstance(item, str) or item not in row_of:
            continue
        if item in seen:
            repeated += 1
            continue
        seen.add(item)
        for name, key in fields.items():
            value = record.get(key)
            if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                columns[name][row_of[item]] = value
            else:
                wrong += 1
    counts = {"items_without_metadata": len(item_ids) - len(seen), "repeated_metadata": repeated, "metadata_fields_of_wrong_type": wrong}
    return columns, counts


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON objects of a file, gzipped or plain. A broken line, other bytes and a truncated gzip name their line."""
    line = 0
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                record = json.loads(raw)
                if not isinstance(record, dict):
                    raise DataError(f"{path} line {line}: not a JSON object")
                yield line, record
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {line}: not UTF-8 ({error.reason}); fetch the file again") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {line}: broken JSON ({error.msg}); fetch the file again") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} after line {line}: the gzip file is truncated or damaged ({error}); fetch it again") from None
    if not line:
        raise DataError(f"{path} is empty; fetch it again")


def _find(folder: Path, stem: str) -> Path:
    for suffix in (".jsonl", ".jsonl.gz"):
        if (folder / (stem + suffix)).exists():
            return folder / (stem + suffix)
    raise DataError(f"{folder / stem}.jsonl (or .jsonl.gz) is missing")
