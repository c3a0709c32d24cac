"""Importers: files that people have -> ``SourceDomain`` -> a domain.

Formats (``FORMATS``; adding one is one ``read`` function and one line there):

=========  ==============================================================================================================
parquet    a folder with ``sequences.parquet`` (user_id, item_ids oldest first, [timestamps]) and ``items.parquet``
           (item_id, text columns, ``codes_*`` lists); or the two files
recbole    RecBole atomic files: a folder or a ``.inter`` file, with the ``.item`` file beside it if there is one
s3rec      S3-Rec text: one line a user, ``user item item ...``, oldest first
=========  ==============================================================================================================

Lists are taken as given: nothing is de-duplicated or filtered unless ``prepare`` (earliest of repeats, iterative 5-core).
Users with fewer than three interactions are dropped and counted. Every item of the items file is a candidate even if no
one has it; an item that occurs in lists only gets a row without text. The source id of an item or a user is its id as
text; an ``asin`` column goes to the private part.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.contract import Ragged
from harness.data.domain import data_root, write_domain
from harness.data.source import DataError, DomainSummary, SourceDomain, ragged
from harness.data.text import FALLBACKS, PARTS
from harness.data.write import CODES

ITEM_TEXT = (*PARTS, *FALLBACKS, "image_caption", "image_caption_supplement")
"""Text columns of an items file that enter the public part. Numbers (price, rank) never do: they may count test clicks."""


@dataclass(frozen=True)
class Format:
    """One input format: how to read it, and how ``auto`` recognises it."""

    read: Callable[[Path, Collection[str]], SourceDomain]
    recognises: Callable[[Path], bool]


def import_domain(
    path: Path | str,
    name: str,
    *,
    root: Path | None = None,
    format: str = "auto",
    prepare: bool = False,
    ignore: Collection[str] = (),
    overwrite: bool = False,
) -> DomainSummary:
    """Import ``path`` as the domain ``name`` under ``root`` (default: the data root).

    ``prepare`` keeps the earliest of repeated items and applies the iterative 5-core. ``ignore`` names columns of the
    source to leave out; any other unknown column is an error, so that a misspelt ``titel`` does not lose the text.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    source = FORMATS[_recognise(path) if format == "auto" else _known(format)].read(path, ignore)
    if prepare:
        from harness.data.prepare import prepare_source

        source = prepare_source(source)
    return write_domain((root or data_root()) / name, source, overwrite=overwrite)


def _known(format: str) -> str:
    if format in FORMATS:
        return format
    raise DataError(f"unknown format {format!r}{_nearest(format, FORMATS)}; known are auto, {', '.join(FORMATS)}")


def _recognise(path: Path) -> str:
    found = [name for name, kind in FORMATS.items() if kind.recognises(path)]
    if len(found) == 1:
        return found[0]
    what = f"looks like {' and '.join(found)}" if found else "holds no format that is known"
    raise DataError(f"{path} {what}; say which with --format ({', '.join(FORMATS)})")


# ------------------------------------------------------------------------------------------------------ parquet pair


def import_parquet_pair(path: Path, ignore: Collection[str] = (), *, items: Path | None = None) -> SourceDomain:
    """Read ``sequences.parquet`` and ``items.parquet`` of a folder, or the two files ``path`` and ``items``.

    Where the ids of the items are exactly 0..N-1 they are an index, and a list that points outside is an error. Lists
    over other ids may name items that the items file lacks. ``dataset.json`` beside them gives the release.
    """
    sequences_file = path / "sequences.parquet" if path.is_dir() else path
    items_file = items or sequences_file.with_name("items.parquet")
    sequences, catalogue = _read_parquet(sequences_file), _read_parquet(items_file)
    _check_columns(sequences_file, sequences.column_names, ("user_id", "item_ids"), ("timestamps", "subset"), ignore)
    codes = [name for name in catalogue.column_names if name.startswith(CODES)]
    _check_columns(items_file, catalogue.column_names, ("item_id",), ("asin", *ITEM_TEXT, *codes), ignore)

    users = _ids(sequences["user_id"], sequences_file, "user_id")
    item_ids = _ids(catalogue["item_id"], items_file, "item_id")
    _refuse_repeats(users, sequences_file, "user_id")
    _refuse_repeats(item_ids, items_file, "item_id")
    lists = _lists(sequences["item_ids"], sequences_file, "item_ids")
    rows, extra = _rows_of(lists, catalogue["item_id"], sequences_file, items_file)
    public = [name for name in (*ITEM_TEXT, *codes) if _has(catalogue, name, ignore)]
    columns = {name: _text_or_codes(catalogue[name], items_file, name, len(extra)) for name in public}
    private = {"asin": catalogue["asin"].to_pylist() + [None] * len(extra)} if "asin" in catalogue.column_names else {}
    times = _times(sequences, sequences_file, lists) if _has(sequences, "timestamps", ignore) else None
    about = sequences_file.with_name("dataset.json")
    release = json.loads(about.read_text()).get("amazon_release") if about.exists() else None
    return SourceDomain(
        user_ids=users,
        sequences=Ragged(rows, _offsets(lists)),
        item_ids=item_ids + extra,
        columns=columns,
        times=times,
        private_columns=private,
        release=str(release) if isinstance(release, int) else None,
        source={"format": "parquet", "files": [sequences_file.name, items_file.name]},
        dropped={},
    )


def _read_parquet(path: Path) -> pa.Table:
    if not path.exists():
        raise DataError(f"{path} is missing; the parquet layout needs sequences.parquet and items.parquet side by side")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from error
    if not table.num_rows:
        raise DataError(f"{path} has no rows")
    return table


def _ids(column: pa.ChunkedArray, path: Path, name: str) -> list[str]:
    """An id column (integers or strings) as text."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: the column {name!r} has the type {kind}; ids are integers or strings")
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise DataError(f"{path} row {row}: {name!r} is null; give every row an id")
    return [str(value) for value in column.to_pylist()]


def _lists(column: pa.ChunkedArray, path: Path, name: str) -> pa.ListArray:
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{path}: the column {name!r} has the type {column.type}; it must hold a list a user")
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    if lists.null_count:
        raise DataError(f"{path} row {lists.is_null().index(True).as_py()}: {name!r} is null; drop the user or give an empty list")
    values = lists.flatten()
    if values.null_count:
        place = values.is_null().index(True).as_py()
        row = int(np.searchsorted(_offsets(lists), place, side="right")) - 1
        raise DataError(f"{path} row {row}: {name!r} holds a null; leave it out")
    return lists


def _offsets(lists: pa.ListArray) -> np.ndarray:
    offsets: np.ndarray = np.asarray(lists.offsets, np.int64)
    return np.asarray(offsets - offsets[0])


def _rows_of(lists: pa.ListArray, known: pa.ChunkedArray, path: Path, items_file: Path) -> tuple[np.ndarray, list[str]]:
    """The row in the catalogue of every list entry, and the ids that only lists have (their rows follow the catalogue)."""
    values = lists.flatten()
    text = pa.types.is_string(known.type) or pa.types.is_large_string(known.type)
    if text != (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) or not (text or pa.types.is_integer(values.type)):
        raise DataError(f"{path}: 'item_ids' holds {values.type}, {items_file.name} has item_id as {known.type}; use one type for both")
    kind = pa.large_string() if text else pa.int64()
    values, known = values.cast(kind), known.combine_chunks().cast(kind)
    found = pc.index_in(values, value_set=known)
    lost = np.asarray(found.is_null())
    if not lost.any():
        return np.asarray(found, np.int64), []
    n = len(known)
    if not text and set(known.to_pylist()) == set(range(n)):
        place = int(np.flatnonzero(lost)[0])
        row = int(np.searchsorted(_offsets(lists), place, side="right")) - 1
        item = values[place].as_py()
        raise DataError(f"{path} row {row}: item {item} is outside 0..{n - 1}, the items of {items_file.name}; add it there or remove it")
    extra = pc.unique(values.filter(pa.array(lost)))
    rows = np.asarray(found.fill_null(0), np.int64)
    rows[lost] = n + np.asarray(pc.index_in(values.filter(pa.array(lost)), value_set=extra), np.int64)
    return rows, [str(value) for value in extra.to_pylist()]


def _text_or_codes(column: pa.ChunkedArray, path: Path, name: str, missing: int) -> pa.Array:
    kind = column.type
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    right = pa.types.is_integer(inner) and inner is not kind if name.startswith(CODES) else _is_text(inner)
    if not right and not pa.types.is_null(inner):
        wanted = "lists of integers" if name.startswith(CODES) else "strings or lists of strings"
        raise DataError(f"{path}: the column {name!r} has the type {kind}; it must hold {wanted}")
    return pa.concat_arrays([*column.chunks, pa.nulls(missing, kind)])


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _times(table: pa.Table, path: Path, items: pa.ListArray) -> np.ndarray:
    times = _lists(table["timestamps"], path, "timestamps")
    if not pa.types.is_integer(times.type.value_type):
        raise DataError(f"{path}: 'timestamps' holds {times.type.value_type}; times are integers")
    wrong = np.flatnonzero(np.diff(_offsets(times)) != np.diff(_offsets(items)))
    if len(wrong):
        raise DataError(f"{path} row {wrong[0]}: 'timestamps' and 'item_ids' differ in length")
    return np.asarray(times.flatten(), np.int64)


def _has(table: pa.Table, name: str, ignore: Collection[str]) -> bool:
    return name in table.column_names and name not in ignore


# ---------------------------------------------------------------------------------------------------- RecBole atomic


def import_recbole_atomic(path: Path, ignore: Collection[str] = ()) -> SourceDomain:
    """Read RecBole's atomic files: ``.inter`` (user_id:token, item_id:token, [rating:float], [timestamp:float]) and, if it
    is there, ``.item`` (item_id:token and text columns) of the same name.

    A user's interactions are ordered by time, equal times by their line; without timestamps by their line.
    """
    inter = _only(path, "*.inter") if path.is_dir() else path
    item = inter.with_suffix(".item")
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    columns: dict[str, list[str | None]] = {}
    if item.exists():
        rows = _atomic_rows(item, ("item_id",), ITEM_TEXT, ignore)
        names = next(rows)[1]
        columns = {name: [] for name in names if name in ITEM_TEXT}
        for line, values in rows:
            record = dict(zip(names, values, strict=True))
            if record["item_id"] in items:
                raise DataError(f"{item} line {line}: the item {record['item_id']!r} stands there twice; keep one line an item")
            items[record["item_id"]] = len(items)
            for name, column in columns.items():
                column.append(record[name])
    user_rows: list[int] = []
    item_rows: list[int] = []
    times: list[float] = []
    rows = _atomic_rows(inter, ("user_id", "item_id"), ("rating", "timestamp"), ignore)
    names = next(rows)[1]
    user_at, item_at = names.index("user_id"), names.index("item_id")
    time_at = names.index("timestamp") if "timestamp" in names and "timestamp" not in ignore else None
    for line, values in rows:
        if not values[user_at] or not values[item_at]:
            raise DataError(f"{inter} line {line}: an empty user_id or item_id; every interaction needs both")
        user_rows.append(users.setdefault(values[user_at], len(users)))
        item_rows.append(items.setdefault(values[item_at], len(items)))
        if time_at is not None:
            times.append(_time(values[time_at], inter, line))
    for column in columns.values():
        column.extend([None] * (len(items) - len(column)))
    user, time = np.array(user_rows, np.int64), np.array(times) if time_at is not None else None
    order = np.argsort(user, kind="stable") if time is None else np.lexsort((time, user))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(users)))]).astype(np.int64)
    return SourceDomain(
        user_ids=list(users),
        sequences=Ragged(np.array(item_rows, np.int64)[order], offsets),
        item_ids=list(items),
        columns=columns,
        times=None if time is None else np.rint(time[order]).astype(np.int64),
        source={"format": "recbole", "files": [inter.name] + [item.name] * item.exists()},
    )


_TYPES = ("token", "token_seq", "float", "float_seq")


def _atomic_rows(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...], ignore: Collection[str]
) -> Iterator[tuple[int, list[str]]]:
    """First (1, the column names), then (line number, values) of every line of an atomic file."""
    lines = _lines(path)
    header = next(lines)[1].split("\t")
    names = []
    for entry in header:
        name, colon, kind = entry.partition(":")
        if not colon or kind not in _TYPES:
            raise DataError(f"{path} line 1: {entry!r} is no column of an atomic file; write NAME:TYPE, TYPE one of {', '.join(_TYPES)}")
        names.append(name)
    _check_columns(path, names, required, optional, ignore)
    yield 1, names
    empty = True
    for line, content in lines:
        values = content.split("\t")
        if len(values) != len(names):
            raise DataError(f"{path} line {line}: {len(values)} fields, the header has {len(names)}; fields are separated by one tab")
        empty = False
        yield line, values
    if empty:
        raise DataError(f"{path} has a header and nothing else")


def _time(value: str, path: Path, line: int) -> float:
    try:
        time = float(value)
    except ValueError:
        time = math.nan
    if not math.isfinite(time) or abs(time) > 2**62:
        raise DataError(f"{path} line {line}: the timestamp {value!r} is not a number; give seconds or milliseconds since 1970")
    return time


# ------------------------------------------------------------------------------------------------------- S3-Rec text


def import_s3rec(path: Path, ignore: Collection[str] = ()) -> SourceDomain:
    """Read S3-Rec's text: one line a user, ``user item item ...`` separated by spaces, oldest first. There is no item text."""
    path = _only(path, "*.txt") if path.is_dir() else path
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    lists: list[list[int]] = []
    for line, content in _lines(path):
        user, *history = content.split()
        if user in users:
            raise DataError(f"{path} line {line}: the user {user!r} stands already in line {users[user]}; write one line a user")
        if not history:
            raise DataError(f"{path} line {line}: the user {user!r} without items; the line must be `user item item ...`")
        users[user] = line
        lists.append([items.setdefault(item, len(items)) for item in history])
    return SourceDomain(list(users), ragged(lists), list(items), source={"format": "s3rec", "files": [path.name]})


# ------------------------------------------------------------------------------------------------------------ common


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file. An empty file, an empty line and bytes that are not UTF-8 are errors."""
    if not path.exists():
        raise DataError(f"{path} does not exist")
    line = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                content = raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} line {line}: not UTF-8 ({error.reason} at byte {error.start}); convert the file first") from None
            if not content.strip():
                raise DataError(f"{path} line {line} is empty; remove it")
            yield line, content
    if not line:
        raise DataError(f"{path} is empty")


def _check_columns(path: Path, names: Iterable[str], required: tuple[str, ...], optional: tuple[str, ...], ignore: Collection[str]) -> None:
    names = list(names)
    known = (*required, *optional)
    if missing := [name for name in required if name not in names]:
        raise DataError(f"{path}: the column {missing[0]!r} is missing; it has {', '.join(names)}")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: the column {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    if unknown := [name for name in names if name not in known and name not in ignore]:
        mend = f"; rename it, or leave it out with --ignore {unknown[0]}. Known are {', '.join(known)}"
        raise DataError(f"{path}: unknown column {unknown[0]!r}{_nearest(unknown[0], known)}{mend}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _refuse_repeats(ids: list[str], path: Path, name: str) -> None:
    seen: dict[str, int] = {}
    for row, value in enumerate(ids):
        if value in seen:
            raise DataError(f"{path} row {row}: {name} {value!r} stands already in row {seen[value]}; ids must be unique")
        seen[value] = row


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder} has {len(found)} files {pattern}; name the one to import")
    return found[0]


FORMATS: dict[str, Format] = {
    "parquet": Format(
        import_parquet_pair,
        lambda path: (path / "sequences.parquet").exists() if path.is_dir() else path.name == "sequences.parquet",
    ),
    "recbole": Format(import_recbole_atomic, lambda path: any(path.glob("*.inter")) if path.is_dir() else path.suffix == ".inter"),
    "s3rec": Format(import_s3rec, lambda path: any(path.glob("*.txt")) if path.is_dir() else path.suffix == ".txt"),
}
