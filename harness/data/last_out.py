"""The authors' 5-core last-out files as histories, and what they are compared with.

In: RAW/benchmark/5core/last_out/CATEGORY.{train,valid,test}.csv[.gz], lines ``user_id,parent_asin,rating,timestamp`` with or without
a line of these names: in test the last interaction of a user, in valid the one before it, in train all earlier ones, oldest first.
Out: ``Histories``, the whole list of every user. Nothing is repaired: files that do not keep the rules are not the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from harness.contract import Ragged
from harness.data import jsonl
from harness.data.source import DataError, take

SPLITS = ("train", "valid", "test")
FIELDS = {"user_id": pa.string(), "parent_asin": pa.string(), "rating": pa.float64(), "timestamp": pa.int64()}
CORE = 5
AGAIN = "fetch it again (`harness data fetch amazon2023 --verify`)"


@dataclass(frozen=True)
class Histories:
    """What a route found: histories in rows of ``item_ids``, oldest first, the time of every interaction, and where it is from."""

    user_ids: list[str]
    sequences: Ragged
    item_ids: list[str]
    times: np.ndarray
    route: str
    files: tuple[Path, ...]
    dropped: Mapping[str, int]


def find_last_out(raw: Path, category: str, *, required: bool = False) -> tuple[Path, ...] | None:
    """The three files, or None where there is none of them. Some but not all are an error, none only if they are ``required``."""
    folder = raw / "benchmark" / "5core" / "last_out"
    found, missing = [], []
    for split in SPLITS:
        names = [folder / f"{category}.{split}.csv{suffix}" for suffix in ("", ".gz")]
        there = next((name for name in names if name.exists()), None)
        found += [there] if there else []
        missing += [] if there else [names[0]]
    if not missing:
        return tuple(found)
    if found or required:
        raise DataError(
            f"{', '.join(map(str, missing))} (or .gz) is missing: `harness data fetch amazon2023 {category} --part 5core` brings it,"
            " --route raw does without"
        )
    return None


def read_last_out(files: tuple[Path, ...]) -> Histories:
    """The histories in the three files (train, valid, test). Raises DataError where they are not a 5-core that was split in this way."""
    tables = [_read(file) for file in files]
    table = pa.concat_tables(tables)
    user, item = (table[name].combine_chunks().dictionary_encode() for name in ("user_id", "parent_asin"))
    users_R, items_R = (column.indices.to_numpy().astype(np.int64) for column in (user, item))
    user_ids, item_ids = user.dictionary.to_pylist(), item.dictionary.to_pylist()
    times_R = table["timestamp"].to_numpy()

    in_train = len(tables[0])
    for file, at, size in zip(files[1:], (in_train, in_train + len(tables[1])), map(len, tables[1:]), strict=True):
        rows = np.bincount(users_R[at : at + size], minlength=len(user_ids))
        if (rows != 1).any():
            row = int(np.flatnonzero(rows != 1)[0])
            raise DataError(f"{file}: the user {user_ids[row]!r} has {rows[row]} lines, right is one; {AGAIN}")
    order = np.argsort(users_R, kind="stable")  # train, valid, test, as the files stand
    user, item, time = users_R[order], items_R[order], times_R[order]
    back = np.flatnonzero((np.diff(user) == 0) & (np.diff(time) < 0))
    if len(back):
        name = user_ids[user[back[0]]]
        raise DataError(f"{files[0].parent}: the times of the user {name!r} run backwards from one line to the next; {AGAIN}")
    pairs, first = np.unique(user * len(item_ids) + item, return_index=True)
    if len(pairs) < len(user):
        row = np.setdiff1d(np.arange(len(user)), first)[0]
        raise DataError(f"{files[0].parent}: the user {user_ids[user[row]]!r} has the item {item_ids[item[row]]!r} twice; {AGAIN}")
    for what, names, counts in (("user", user_ids, np.bincount(user)), ("item", item_ids, np.bincount(item))):
        if counts.min() < CORE:
            row = int(counts.argmin())
            raise DataError(
                f"{files[0].parent}: the {what} {names[row]!r} has {counts[row]} interactions, in a {CORE}-core at least {CORE}; {AGAIN}"
            )
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64)
    return Histories(user_ids, Ragged(item, offsets), item_ids, time, "last-out", files, {})


def _read(file: Path) -> pa.Table:
    try:
        data = b"".join(jsonl.blocks(file))
    except jsonl.Damaged as error:
        raise DataError(f"{file}: {error}; {AGAIN}") from None
    if not data:
        raise DataError(f"{file} is empty; {AGAIN}")
    first = data.split(b"\n", 1)[0].strip().split(b",")
    named = b"user_id" in first
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=pa.csv.ReadOptions(use_threads=False, column_names=None if named else list(FIELDS)),
            parse_options=pa.csv.ParseOptions(quote_char=False),
            convert_options=pa.csv.ConvertOptions(column_types=FIELDS, include_columns=list(FIELDS), strings_can_be_null=False),
        )
    except (pa.ArrowException, KeyError) as error:
        raise DataError(f"{file}: {error}; {AGAIN}") from None
    for name in ("user_id", "parent_asin", "timestamp"):
        column = table[name]
        wrong = column.is_null() if name == "timestamp" else pa.compute.equal(column, "")
        if (row := pa.compute.index(wrong, True).as_py()) >= 0:
            raise DataError(f"{file} line {row + 1 + named}: {name} is empty; {AGAIN}")
    return table


# ---------------------------------------------------------------------------------------------------------- comparison


def difference(recomputed: Histories, published: Histories) -> str | None:
    """In what two routes differ and what is the likely cause; None where they are the same histories with the same times."""
    other = "the review file and the 5-core files are not of one revision, or one is not whole: `harness data fetch amazon2023 --verify`"
    for what, one, two in (
        ("user", recomputed.user_ids, published.user_ids),
        ("item", recomputed.item_ids, published.item_ids),
    ):
        missing, more = set(two) - set(one), set(one) - set(two)
        if missing or more:
            example = min(missing or more)
            return (
                f"{len(more):,} {what}s only in what is recomputed from the reviews, {len(missing):,} only in the 5-core files"
                f" (such as {example!r}). Likely: {other}"
            )
    ours, times = _by_id(recomputed, published.user_ids, published.item_ids)
    theirs, their_times = published.sequences, published.times
    if not np.array_equal(ours.lengths, theirs.lengths):
        row = int(np.flatnonzero(ours.lengths != theirs.lengths)[0])
        counts = f"{ours.lengths[row]} interactions recomputed, {theirs.lengths[row]} in the 5-core files"
        return f"the user {published.user_ids[row]!r} has {counts}. Likely: {other}"
    user = np.repeat(np.arange(len(theirs)), theirs.lengths)
    if np.array_equal(ours.values, theirs.values) and np.array_equal(times, their_times):
        return None
    wrong = np.unique(user[(ours.values != theirs.values) | (times != their_times)])
    say = f"{len(wrong):,} users have another history (the first: {published.user_ids[wrong[0]]!r})"
    pair, their_pair = user * len(published.item_ids) + ours.values, user * len(published.item_ids) + theirs.values
    place, their_place = np.argsort(pair), np.argsort(their_pair)
    if not np.array_equal(pair[place], their_pair[their_place]):
        return f"{say}, with other items. Likely: {other}"
    if not np.array_equal(times[place], their_times[their_place]):
        return f"{say}: the same items at other times. Likely: of a repeated item another review than the earliest was kept"
    return (
        f"{say}: the same items at the same times, those of equal time in another order. Likely: the lines of the review file stand in"
        " another order than in the file of which the 5-core files were made"
    )


def _by_id(found: Histories, user_ids: list[str], item_ids: list[str]) -> tuple[Ragged, np.ndarray]:
    """The same histories, users and items in the order of these ids."""
    row_of = {name: row for row, name in enumerate(found.user_ids)}
    number_of = {name: row for row, name in enumerate(item_ids)}
    numbers = np.array([number_of[name] for name in found.item_ids])
    sequences, index = take(found.sequences, np.array([row_of[name] for name in user_ids]))
    return Ragged(numbers[sequences.values], sequences.offsets), found.times[index]
