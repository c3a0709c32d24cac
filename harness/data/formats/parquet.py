"""The parquet pair, which carries all that a domain has: a folder, or its two files.

sequences.parquet    user_id, item_ids (a list, oldest first), [timestamps]
items.parquet        item_id, text columns, codes_* (lists), [asin]
Images/ITEM_ID.jpg   where there is one
dataset.json         optional: {"amazon_release": 2023}
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.contract import Ragged
from harness.data.formats.common import ITEM_TEXT, Format, Whole, bad_file_name, check_columns, refuse_repeats, write_json, write_pictures
from harness.data.source import DataError, SourceDomain
from harness.data.write import CODES


def read(path: Path, ignore: Collection[str] = (), *, items: Path | None = None) -> SourceDomain:
    """Read ``sequences.parquet`` and ``items.parquet`` of a folder, or the two files ``path`` and ``items``.

    Where the ids of the items are exactly 0..N-1 they are an index, and a list that points outside is an error. Lists
    over other ids may name items that the items file lacks. ``dataset.json`` beside them gives the release.
    """
    sequences_file = path / "sequences.parquet" if path.is_dir() else path
    items_file = items or sequences_file.with_name("items.parquet")
    sequences, catalogue = _read_parquet(sequences_file), _read_parquet(items_file)
    check_columns(sequences_file, sequences.column_names, ("user_id", "item_ids"), ("timestamps", "subset"), ignore)
    codes = [name for name in catalogue.column_names if name.startswith(CODES)]
    check_columns(items_file, catalogue.column_names, ("item_id",), ("asin", *ITEM_TEXT, *codes), ignore)

    users = _ids(sequences["user_id"], sequences_file, "user_id")
    item_ids = _ids(catalogue["item_id"], items_file, "item_id")
    refuse_repeats(users, sequences_file, "user_id")
    refuse_repeats(item_ids, items_file, "item_id")
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


def write(folder: Path, whole: Whole) -> None:
    source = whole.source
    offsets = pa.array(source.sequences.offsets, pa.int32())
    items = pa.array(source.item_ids, pa.string())
    lists = {
        "user_id": pa.array(source.user_ids, pa.string()),
        "item_ids": pa.ListArray.from_arrays(offsets, items.take(pa.array(source.sequences.values))),
    }
    if source.times is not None:
        lists["timestamps"] = pa.ListArray.from_arrays(offsets, pa.array(source.times))
    pq.write_table(pa.table(lists), folder / "sequences.parquet", compression="zstd")
    columns = {"item_id": items}
    columns |= {name: pa.array(list(values), pa.string()) for name, values in source.private_columns.items() if name == "asin"}
    columns |= {name: pa.array(values, pa.string()) for name, values in whole.parts().items()}
    columns |= {name: column for name, column in source.columns.items() if name.startswith(CODES)}
    pq.write_table(pa.table(columns), folder / "items.parquet", compression="zstd")
    if source.release and source.release.isdigit():
        write_json(folder / "dataset.json", {"amazon_release": int(source.release)})
    write_pictures(folder, whole.pictures)


FORMAT = Format(
    title="parquet pair",
    read=read,
    recognises=lambda path: (path / "sequences.parquet").exists() if path.is_dir() else path.name == "sequences.parquet",
    write=write,
    carries=frozenset({"parts", "text", "codes", "times", "pictures", "private", "catalogue"}),
    bad_id=bad_file_name,
)
