"""Preparation: the published files -> interactions -> ``SourceDomain``.

In: Amazon-Reviews-2023 files of one category, plain or gzipped:

    RAW/review_categories/CATEGORY.jsonl[.gz]      user_id, parent_asin, timestamp, ...
    RAW/benchmark/5core/last_out/CATEGORY.{train,valid,test}.csv[.gz]     what the authors made of them
    RAW/meta_categories/meta_CATEGORY.jsonl[.gz]   parent_asin, title, features, categories, description, store, ...
    RAW/pictures/CATEGORY/                         optional: what `harness data pictures` fetched, or files PARENT_ASIN.jpg

Two routes lead to the same domain: ``raw`` applies the rules to the reviews, ``last-out`` takes the lists of the authors' 5-core files.

Rules: item = ``parent_asin``; interactions of a user in order of time, equal times in order of the file; of a repeated
item the earliest counts; then users and items with fewer than five interactions are removed until none is left.
The catalogue is the items that remain. A review without a user, an item or a time is skipped and counted; a line that is
not JSON is an error, because a file with one is not the file that was published. Both protocols split these same histories:
``time-v1`` cuts after the 5-core and keeps the catalogue, as the authors' timestamp split of their 5-core files does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from harness.contract import PROTOCOL, PROTOCOLS, TIME, Ragged
from harness.data.domain import TIME_SUFFIX, data_root, write_domain
from harness.data.jsonl import json_lines
from harness.data.last_out import Histories, difference, find_last_out, read_last_out
from harness.data.pictures import find_pictures
from harness.data.reviews import read_metadata, read_reviews, strong_rows
from harness.data.source import DataError, DomainSummary, SourceDomain
from harness.data.split import AMAZON2023_CUTS, Cuts
from harness.values import nearest

__all__ = ["CORE", "ROUTES", "core", "default_name", "earliest", "json_lines", "prepare_raw", "prepare_source", "read_raw"]

CORE = 5
ROUTES = ("auto", "raw", "last-out", "both")


def prepare_raw(
    raw: Path,
    category: str,
    name: str,
    *,
    root: Path | None = None,
    overwrite: bool = False,
    route: str = "raw",
    protocol: str = PROTOCOL,
) -> DomainSummary:
    """Prepare one category of ``raw`` as the domain ``name``, with the pictures found in ``raw/pictures/CATEGORY``."""
    cuts = cuts_of(protocol)
    source, pictures = read_raw(raw, category, route)
    return write_domain((root or data_root()) / name, source, pictures=pictures, overwrite=overwrite, cuts=cuts)


def cuts_of(protocol: str) -> Cuts | None:
    """Where a protocol cuts time; None where it does not. Raises DataError for a protocol that does not exist."""
    if protocol not in PROTOCOLS:
        raise DataError(f"{protocol!r} is no protocol.{nearest(protocol, PROTOCOLS)}")
    return AMAZON2023_CUTS if protocol == TIME else None


def default_name(category: str, protocol: str = PROTOCOL) -> str:
    """The name of a category's domain: small letters, and under ``time-v1`` a suffix, so that the two stand beside each other."""
    return category.lower() + (TIME_SUFFIX if protocol == TIME else "")


def read_raw(raw: Path, category: str, route: str = "raw") -> tuple[SourceDomain, Mapping[str, bytes]]:
    """The prepared source domain of one category, and the pictures of its items.

    ``route``: raw, last-out, both (they must agree; else a DataError says in what they differ), or auto: last-out where its three
    files are, else raw.
    """
    metadata = _find(raw / "meta_categories", f"meta_{category}")
    found = _histories(raw, category, route)
    texts, counts = read_metadata(metadata, found.item_ids)
    pictures, without_picture = find_pictures(raw, category, found.item_ids)
    source = SourceDomain(
        user_ids=found.user_ids,
        sequences=found.sequences,
        item_ids=found.item_ids,
        columns=texts.parts,
        texts=texts.texts,
        times=found.times,
        release="2023",
        source={
            "format": "amazon-reviews-2023",
            "category": category,
            "route": found.route,
            "files": [*(file.name for file in found.files), metadata.name],
        },
        dropped={**found.dropped, **counts, **without_picture},
    )
    return source, pictures


def _histories(raw: Path, category: str, route: str) -> Histories:
    if route not in ROUTES:
        raise DataError(f"{route!r} is no route.{nearest(route, ROUTES)}")
    last_out = find_last_out(raw, category, required=route in ("last-out", "both")) if route != "raw" else None
    if last_out is None:
        return recompute(_find(raw / "review_categories", category))
    if route != "both":
        return read_last_out(last_out)
    ours, theirs = recompute(_find(raw / "review_categories", category)), read_last_out(last_out)
    if problem := difference(ours, theirs):
        raise DataError(f"{category}: the two routes disagree: {problem}")
    return replace(ours, route="both", files=(*ours.files, *theirs.files))


def recompute(path: Path) -> Histories:
    """The rules, applied to a file of reviews."""
    reviews = read_reviews(path)
    rows, repeats = strong_rows(reviews, CORE)
    user, user_ids, item, item_ids = reviews.take(rows)
    time = reviews.times_R[rows]
    total, skipped = len(reviews), reviews.skipped
    del reviews
    some = core(user, item)  # repeats still count: this keeps too much, and what is sorted next is a tenth of the file
    some = some[earliest(user[some], item[some], time[some])]
    kept = some[core(user[some], item[some])]
    if not len(kept):
        raise DataError(f"{path}: no user and no item is left by the {CORE}-core; the file is too small or not the whole category")
    sequences, users, items = _lists(user[kept], item[kept])
    return Histories(
        user_ids=[user_ids[row] for row in users],
        sequences=sequences,
        item_ids=[item_ids[row] for row in items],
        times=time[kept],
        route="raw",
        files=(path,),
        dropped={
            "reviews_without_fields": skipped,
            "repeated_items": repeats,
            f"interactions_by_{CORE}_core": total - repeats - len(kept),
        },
    )


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
        texts=None if source.texts is None else _pick(source.texts, items),
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
    rows = np.arange(len(user))
    while True:
        users, items = user[rows], item[rows]
        strong = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if strong.all():
            return rows
        rows = rows[strong]


def _lists(user: np.ndarray, item: np.ndarray) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """Lists of rows that are sorted by user, and which users and items they hold; values are places in the latter."""
    users, counts = np.unique(user, return_counts=True)
    items, values = np.unique(item, return_inverse=True)
    return Ragged(values.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)), users, items


def _find(folder: Path, stem: str) -> Path:
    for suffix in (".jsonl", ".jsonl.gz"):
        if (folder / (stem + suffix)).exists():
            return folder / (stem + suffix)
    raise DataError(f"{folder / stem}.jsonl (or .jsonl.gz) is missing")
