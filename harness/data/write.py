"""The files of a domain: what ``domain.write_domain`` puts into its temporary folder.

In: a ``SourceDomain`` and its pictures. Out: ``public/`` and ``private/`` in an empty folder, and the digests over them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.contract import PROTOCOL, SCHEMA, Ragged, integers, read_columns, write_json
from harness.data import text
from harness.data.source import DataError, DomainSummary, SourceDomain, check_source, hash_order, take, tie_rate

MIN_HISTORY = 3
"""Shortest history that leave-one-out can split: one training item, one for validation, one for the test."""

TIMES = "times.parquet"
"""In the private part: the times of every user's whole history, for cards and exports. Absent where the source has none."""

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
) -> DomainSummary:
    check_source(source)
    item_order, item_number = hash_order(source.item_ids, "item")
    kept = np.flatnonzero(source.sequences.lengths >= MIN_HISTORY)
    if not len(kept):
        raise DataError(f"no user has {MIN_HISTORY} interactions or more: there is nothing to split into training, validation and test")
    user_rows = kept[hash_order([source.user_ids[row] for row in kept], "user")[0]]
    histories, index = take(source.sequences, user_rows)
    histories = Ragged(item_number[histories.values].astype(np.int32), histories.offsets)
    times = None if source.times is None else np.asarray(source.times, np.int64)[index]

    summary = _write_public(folder / "public", name, source, histories, tie_rate(histories, times), item_order, pictures, simulated)
    dropped = {"users_below_3": len(source.user_ids) - len(user_rows), **source.dropped}
    info = {"schema": SCHEMA, "public_digest": summary.digest, "source": source.source, "dropped": dropped}
    _write_private(folder / "private", source, histories, times, user_rows, item_order, info)
    if oracle is not None:
        rows = oracle[user_rows]
        lists = np.where(rows >= 0, item_number[rows], -1).astype(np.int32)
        np.savez_compressed(folder / "private" / "oracle.npz", users=np.arange(len(user_rows), dtype=np.int32), items=lists)
    if planted is not None:
        write_json(folder / "private" / "planted.json", planted)
    set_modes(folder)
    return replace(summary, path=folder)


def _write_public(
    public: Path,
    name: str,
    source: SourceDomain,
    histories: Ragged,
    ties: float | None,
    item_order: np.ndarray,
    pictures: Mapping[str, bytes | Path] | None,
    simulated: bool,
) -> DomainSummary:
    public.mkdir()
    last = histories.offsets[1:] - 1
    in_train = np.ones(len(histories.values), bool)
    in_train[last] = in_train[last - 1] = False
    offsets = histories.offsets - 2 * np.arange(len(histories.offsets))
    train = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(histories.values[in_train], pa.int32()))
    numbers = pa.array(np.arange(len(last)), pa.int32())
    _parquet(public / "users.parquet", {"user": numbers, "train": train, "valid": pa.array(histories.values[last - 1])})
    _parquet(public / "items.parquet", _item_table(source.columns, item_order))
    if pictures:
        write_pictures(public, [source.item_ids[row] for row in item_order], pictures)
    n_train = int(in_train.sum())
    counts = {"users": len(last), "items": len(item_order), "interactions": len(in_train), "train_interactions": n_train}
    summary = DomainSummary(name, public, public_digest(public), counts, ties, simulated, source.release)
    head = {"schema": SCHEMA, "name": name, "counts": counts, "digest": summary.digest, "protocol": PROTOCOL}
    write_json(public / "domain.json", {**head, "simulated": simulated, "release": source.release, "tie_rate": ties})
    return summary


def _write_private(
    private: Path,
    source: SourceDomain,
    histories: Ragged,
    times: np.ndarray | None,
    user_rows: np.ndarray,
    item_order: np.ndarray,
    info: dict[str, Any],
) -> None:
    private.mkdir(mode=0o700)
    last = histories.offsets[1:] - 1
    targets = histories.values[last]
    users, items = pa.array(np.arange(len(last)), pa.int32()), pa.array(np.arange(len(item_order)), pa.int32())
    target_times = pa.nulls(len(last), pa.int64()) if times is None else pa.array(times[last])
    _parquet(private / "targets.parquet", {"user": users, "target": pa.array(targets), "time": target_times})
    if times is not None:
        lists = pa.ListArray.from_arrays(pa.array(histories.offsets, pa.int32()), pa.array(times))
        _parquet(private / TIMES, {"user": users, "times": lists})
    user_ids = pa.array([source.user_ids[row] for row in user_rows], pa.string())
    _parquet(private / "users.parquet", {"user": users, "source_id": user_ids})
    item_ids = pa.array([source.item_ids[row] for row in item_order], pa.string())
    more = {key: pa.array([column[row] for row in item_order]) for key, column in source.private_columns.items()}
    _parquet(private / "items.parquet", {"item": items, "source_id": item_ids, **more})
    ids = hashlib.sha256("\n".join((*user_ids.to_pylist(), "", *item_ids.to_pylist())).encode()).hexdigest()
    write_json(private / "private.json", {**info, "digest": targets_digest(targets), "ids_digest": ids})


def _item_table(columns: Mapping[str, Any], order: np.ndarray) -> dict[str, pa.Array]:
    """``item``, ``text``, the five standard parts (null where the source has none), then the source's other columns."""
    codes = {name: column for name, column in columns.items() if name.startswith(CODES)}
    cleaned: dict[str, list[str | None]] = {name: [None] * len(order) for name in text.PARTS}
    for name, column in columns.items():
        if name not in codes:
            values = column.to_pylist() if isinstance(column, pa.Array) else column
            cleaned[name] = [text.part(values[row]) for row in order]
    names = list(cleaned)
    texts = [text.join(dict(zip(names, row, strict=True))) for row in zip(*cleaned.values(), strict=True)]
    table = {"item": pa.array(np.arange(len(order)), pa.int32()), "text": pa.array(texts, pa.string())}
    extra = sorted(set(names) - set(text.PARTS) - {"text"})
    table |= {name: pa.array(cleaned[name], pa.string()) for name in (*text.PARTS, *extra)}
    for name in sorted(codes):
        column = codes[name] if isinstance(codes[name], pa.Array) else pa.array(codes[name])
        table[name] = column.take(pa.array(order))
    return table


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
    """sha256 of what a public part says, however its files are encoded. The name does not enter."""
    digest = hashlib.sha256(f"{SCHEMA} {PROTOCOL}\n".encode())
    users = read_columns(public / "users.parquet", ("train", "valid"))
    lists = users["train"].combine_chunks()
    for array, kind in ((lists.value_lengths(), "<i8"), (lists.flatten(), "<i4"), (users["valid"], "<i4")):
        digest.update(f"{len(array)}\n".encode() + integers(array).astype(kind).tobytes())
    items = pq.ParquetFile(public / "items.parquet")
    encode = json.JSONEncoder(ensure_ascii=False).encode
    for name in sorted(set(items.schema_arrow.names) - {"item"}):
        digest.update(f"{name} {items.metadata.num_rows}\n".encode())
        for batch in items.iter_batches(batch_size=8192, columns=[name]):
            digest.update("".join(f"{encode(value)}\n" for value in batch.column(0).to_pylist()).encode())
    if (public / "pictures.parquet").exists():
        index = read_columns(public / "pictures.parquet", ("item", "sha256")).to_pydict()
        digest.update("".join(f"{item} {sha}\n" for item, sha in zip(index["item"], index["sha256"], strict=True)).encode())
    return digest.hexdigest()


def targets_digest(targets_U: np.ndarray) -> str:
    """sha256 of the test targets in order of the user number."""
    return hashlib.sha256(np.asarray(targets_U).astype("<i4").tobytes()).hexdigest()
