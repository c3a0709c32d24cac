"""The files of a domain: what ``domain.write_domain`` puts into its temporary folder.

In: a ``SourceDomain``, its pictures, and for ``time-v1`` the cuts. Out: ``public/`` and ``private/`` in an empty folder, and the
digests over them. The two protocols differ in one table: ``users.parquet`` holds the item ``valid`` under ``loo-v1``, and the list
``valid`` (what lies between the cuts) and the flag ``test`` under ``time-v1``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.contract import PROTOCOL, SCHEMA, TIME, Ragged, integers, read_columns, write_json
from harness.data import text
from harness.data.source import DataError, DomainSummary, SourceDomain, check_source, hash_order, take, tie_rate
from harness.data.split import MIN_HISTORY, Cuts, Split, leave_one_out, split_by_time

TIMES = "times.parquet"
"""In the private part: the times of every user's training, validation and target, for cards and exports. Absent where there are none."""

CODES = "codes_"
"""Columns with this prefix hold lists of code numbers of an item and are kept as they are."""


def write_parts(
    folder: Path,
    name: str,
    source: SourceDomain,
    pictures: Mapping[str, bytes | Path] | None,
    simulated: bool,
    oracle: np.ndarray | None,
    planted: dict[str, Any] | None,
    cuts: Cuts | None = None,
) -> DomainSummary:
    check_source(source)
    item_order, item_number = hash_order(source.item_ids, "item")
    shortest = MIN_HISTORY[PROTOCOL if cuts is None else TIME]
    kept = np.flatnonzero(source.sequences.lengths >= shortest)
    if not len(kept):
        raise DataError(f"no user has {shortest} interactions or more: there is nothing to split into training, validation and test")
    user_rows = kept[hash_order([source.user_ids[row] for row in kept], "user")[0]]
    histories, index = take(source.sequences, user_rows)
    histories = Ragged(item_number[histories.values].astype(np.int32), histories.offsets)
    times = None if source.times is None else np.asarray(source.times, np.int64)[index]
    split = leave_one_out(histories) if cuts is None else split_by_time(histories, times, cuts)

    summary = _write_public(folder / "public", name, source, split, tie_rate(histories, times), item_order, pictures, simulated)
    dropped = {f"users_below_{shortest}": len(source.user_ids) - len(user_rows), **source.dropped, **split.dropped}
    info = {"schema": SCHEMA, "public_digest": summary.digest, "source": source.source, "dropped": dropped}
    _write_private(folder / "private", source, split, times, user_rows, item_order, info)
    if oracle is not None:
        rows = oracle[user_rows[split.tested]]
        lists = np.where(rows >= 0, item_number[rows], -1).astype(np.int32)
        np.savez_compressed(folder / "private" / "oracle.npz", users=split.tested.astype(np.int32), items=lists)
    if planted is not None:
        write_json(folder / "private" / "planted.json", planted)
    set_modes(folder)
    return replace(summary, path=folder)


def _write_public(
    public: Path,
    name: str,
    source: SourceDomain,
    split: Split,
    ties: float | None,
    item_order: np.ndarray,
    pictures: Mapping[str, bytes | Path] | None,
    simulated: bool,
) -> DomainSummary:
    public.mkdir()
    n_users = len(split.train)
    columns = {"user": pa.array(np.arange(n_users), pa.int32()), "train": _list_column(split.train)}
    if split.protocol == PROTOCOL:
        columns["valid"] = pa.array(split.window.values)
    else:
        tested = np.zeros(n_users, np.int8)
        tested[split.tested] = 1
        columns |= {"valid": _list_column(split.window), "test": pa.array(tested)}
    _parquet(public / "users.parquet", columns)
    _parquet(public / "items.parquet", _item_table(source, item_order))
    if pictures:
        write_pictures(public, [source.item_ids[row] for row in item_order], pictures)
    counts = split.counts(len(item_order))
    summary = DomainSummary(name, public, public_digest(public), counts, ties, simulated, source.release, protocol=split.protocol)
    head = {"schema": SCHEMA, "name": name, "counts": counts, "digest": summary.digest, "protocol": split.protocol}
    if split.cuts is not None:
        head["cuts"] = {"valid": split.cuts.valid, "test": split.cuts.test}
    write_json(public / "domain.json", {**head, "simulated": simulated, "release": source.release, "tie_rate": ties})
    return summary


def _write_private(
    private: Path,
    source: SourceDomain,
    split: Split,
    times: np.ndarray | None,
    user_rows: np.ndarray,
    item_order: np.ndarray,
    info: dict[str, Any],
) -> None:
    private.mkdir(mode=0o700)
    users, items = pa.array(np.arange(len(split.train)), pa.int32()), pa.array(np.arange(len(item_order)), pa.int32())
    tested = pa.array(split.tested, pa.int32())
    target_times = pa.nulls(len(tested), pa.int64()) if times is None else pa.array(times[split.target_rows])
    _parquet(private / "targets.parquet", {"user": tested, "target": pa.array(split.targets), "time": target_times})
    if times is not None:
        lists = pa.ListArray.from_arrays(pa.array(split.kept_offsets, pa.int32()), pa.array(times[split.kept]))
        _parquet(private / TIMES, {"user": users, "times": lists})
    user_ids = pa.array([source.user_ids[row] for row in user_rows], pa.string())
    _parquet(private / "users.parquet", {"user": users, "source_id": user_ids})
    item_ids = pa.array([source.item_ids[row] for row in item_order], pa.string())
    more = {key: pa.array([column[row] for row in item_order]) for key, column in source.private_columns.items()}
    _parquet(private / "items.parquet", {"item": items, "source_id": item_ids, **more})
    ids = hashlib.sha256("\n".join((*user_ids.to_pylist(), "", *item_ids.to_pylist())).encode()).hexdigest()
    write_json(private / "private.json", {**info, "digest": targets_digest(split.targets), "ids_digest": ids})


def _list_column(lists: Ragged) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(lists.offsets, pa.int32()), pa.array(lists.values, pa.int32()))


def _item_table(source: SourceDomain, order: np.ndarray) -> dict[str, pa.Array]:
    """``item``, ``text``, the five standard parts (null where the source has none), then the source's other columns."""
    rows = pa.array(order)
    codes = {name: column for name, column in source.columns.items() if name.startswith(CODES)}
    parts = {name: column for name, column in source.columns.items() if name not in codes}
    if source.texts is None:
        cleaned = {name: [text.part(value) for value in _values(column)] for name, column in parts.items()}
        texts = [text.join(dict(zip(cleaned, row, strict=True))) for row in zip(*cleaned.values(), strict=True)]
        parts = {name: pa.array(column, pa.string()) for name, column in cleaned.items()}
        joined = pa.array(texts, pa.string()) if parts else pa.nulls(len(order), pa.string())
    else:
        joined = source.texts
    table = {"item": pa.array(np.arange(len(order)), pa.int32()), "text": joined.take(rows)}
    extra = sorted(set(parts) - set(text.PARTS) - {"text"})
    for name in (*text.PARTS, *extra):
        table[name] = parts[name].take(rows) if name in parts else pa.nulls(len(order), pa.string())
    for name in sorted(codes):
        column = codes[name] if isinstance(codes[name], pa.Array) else pa.array(codes[name])
        table[name] = column.take(rows)
    return table


def _values(column: Any) -> Sequence[Any]:
    return column.to_pylist() if isinstance(column, pa.Array) else column


def write_pictures(public: Path, item_ids: list[str], pictures: Mapping[str, bytes | Path]) -> None:
    """The picture pack, in order of the item numbers (never in the order in which pictures were found)."""
    rows: list[tuple[int, int, int, str]] = []
    offset = 0
    with open(public / "pictures.bin", "wb") as pack:
        for item, source_id in enumerate(item_ids):
            if source_id not in pictures:
                continue
            picture = pictures[source_id]
            data = picture.read_bytes() if isinstance(picture, Path) else picture
            pack.write(data)
            rows.append((item, offset, len(data), hashlib.sha256(data).hexdigest()))
            offset += len(data)
    types = {"item": pa.int32(), "offset": pa.int64(), "length": pa.int64(), "sha256": pa.string()}
    _parquet(public / "pictures.parquet", {key: pa.array([row[i] for row in rows], kind) for i, (key, kind) in enumerate(types.items())})


def set_modes(folder: Path) -> None:
    """Public for everyone (methods may run as another user), private for the owner only, whatever the umask says."""
    os.chmod(folder, 0o755)
    for part, directory, mode in (("public", 0o755, 0o644), ("private", 0o700, 0o600)):
        os.chmod(folder / part, directory)
        for file in (folder / part).iterdir():
            os.chmod(file, mode)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _parquet(path: Path, columns: dict[str, pa.Array]) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd")


def public_digest(public: Path) -> str:
    """sha256 of what a public part says, however its files are encoded. The name does not enter, the protocol does."""
    users = read_columns(public / "users.parquet")
    by_time = "test" in users.column_names
    digest = hashlib.sha256(f"{SCHEMA} {TIME if by_time else PROTOCOL}\n".encode())
    columns = [*_list_parts(users["train"]), *(_list_parts(users["valid"]) if by_time else [(users["valid"], "<i4")])]
    for array, kind in (*columns, *([(users["test"], "<i1")] if by_time else [])):
        digest.update(f"{len(array)}\n".encode() + integers(array).astype(kind).tobytes())
    items = pq.ParquetFile(public / "items.parquet")
    for name in sorted(set(items.schema_arrow.names) - {"item"}):
        digest.update(f"{name} {items.metadata.num_rows}\n".encode())
        for batch in items.iter_batches(batch_size=8192, columns=[name]):
            digest.update(as_json_lines(batch.column(0)))
    if (public / "pictures.parquet").exists():
        index = read_columns(public / "pictures.parquet", ("item", "sha256")).to_pydict()
        digest.update("".join(f"{item} {sha}\n" for item, sha in zip(index["item"], index["sha256"], strict=True)).encode())
    return digest.hexdigest()


def as_json_lines(column: pa.Array) -> bytes:
    """The values as JSON, a line each; of texts both libraries make the same, of lists not."""
    if pa.types.is_string(column.type):
        return msgspec.json.Encoder().encode_lines(column.to_pylist())
    return "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in column.to_pylist()).encode()


def _list_parts(column: Any) -> list[tuple[Any, str]]:
    lists = column.combine_chunks()
    return [(lists.value_lengths(), "<i8"), (lists.flatten(), "<i4")]


def targets_digest(targets_U: np.ndarray) -> str:
    """sha256 of the test targets in order of the user number."""
    return hashlib.sha256(np.asarray(targets_U).astype("<i4").tobytes()).hexdigest()
