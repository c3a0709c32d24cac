"""RecBole's atomic files: ``.inter`` (user_id:token, item_id:token, [rating:float], [timestamp:float]) and, if it is there,
``.item`` (item_id:token, text columns, ``codes_*:token_seq``) of the same name.

A user's interactions are ordered by time, equal times by their line; without timestamps by their line. What they cannot carry:
pictures. RecBole reads ``DATA_PATH/NAME/NAME.inter``: export to a folder of the domain's name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import Ragged
from harness.data.formats.common import ITEM_TEXT, Format, Whole, check_columns, in_order, lines, only, parse_time
from harness.data.source import DataError, SourceDomain
from harness.data.write import CODES

TYPES = ("token", "token_seq", "float", "float_seq")


def read(path: Path, ignore: Collection[str] = ()) -> SourceDomain:
    inter = only(path, "*.inter") if path.is_dir() else path
    item = inter.with_suffix(".item")
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    columns: dict[str, list[Any]] = _read_items(item, items, ignore) if item.exists() else {}
    user_rows: list[int] = []
    item_rows: list[int] = []
    times: list[float | int] = []
    rows = atomic_rows(inter, ("user_id", "item_id"), ("rating", "timestamp"), ignore)
    names = next(rows)[1]
    user_at, item_at = names.index("user_id"), names.index("item_id")
    time_at = names.index("timestamp") if "timestamp" in names and "timestamp" not in ignore else None
    for line, values in rows:
        if not values[user_at] or not values[item_at]:
            raise DataError(f"{inter} line {line}: an empty user_id or item_id; every interaction needs both")
        user_rows.append(users.setdefault(values[user_at], len(users)))
        item_rows.append(items.setdefault(values[item_at], len(items)))
        if time_at is not None:
            times.append(parse_time(values[time_at], inter, line))
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
        times=None if time is None else (time if time.dtype.kind == "i" else np.rint(time))[order].astype(np.int64),
        source={"format": "recbole", "files": [inter.name] + [item.name] * item.exists()},
    )


def _read_items(path: Path, items: dict[str, int], ignore: Collection[str]) -> dict[str, list[Any]]:
    """The columns of the item file; fills ``items`` with the rows of its ids."""
    rows = atomic_rows(path, ("item_id",), ITEM_TEXT, ignore)
    names = next(rows)[1]
    wanted = [(place, name) for place, name in enumerate(names) if name not in ignore and (name in ITEM_TEXT or name.startswith(CODES))]
    columns: dict[str, list[Any]] = {name: [] for _, name in wanted}
    id_at = names.index("item_id")
    for line, values in rows:
        item = values[id_at]
        if not item:
            raise DataError(f"{path} line {line}: an empty item_id; every item needs one")
        if item in items:
            raise DataError(f"{path} line {line}: the item {item!r} stands there twice; keep one line an item")
        items[item] = len(items)
        for place, name in wanted:
            columns[name].append(_codes(values[place], path, line, name) if name.startswith(CODES) else values[place])
    return columns


def _codes(value: str, path: Path, line: int, name: str) -> list[int] | None:
    try:
        return [int(code) for code in value.split(" ")] if value else None
    except ValueError:
        raise DataError(f"{path} line {line}: {name!r} is {value!r:.60}; codes are whole numbers separated by one space") from None


def atomic_rows(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...], ignore: Collection[str]
) -> Iterator[tuple[int, list[str]]]:
    """First (1, the column names), then (line number, values) of every line of an atomic file."""
    numbered = lines(path)
    header = next(numbered)[1].split("\t")
    names = []
    for entry in header:
        name, colon, kind = entry.partition(":")
        if not colon or kind not in TYPES:
            raise DataError(f"{path} line 1: {entry!r} is no column of an atomic file; write NAME:TYPE, TYPE one of {', '.join(TYPES)}")
        names.append(name)
    codes = tuple(name for name in names if name.startswith(CODES) and path.suffix == ".item")
    check_columns(path, names, required, (*optional, *dict.fromkeys(codes)), ignore)
    yield 1, names
    empty = True
    for line, content in numbered:
        values = content.split("\t")
        if len(values) != len(names):
            raise DataError(f"{path} line {line}: {len(values)} fields, the header has {len(names)}; fields are separated by one tab")
        empty = False
        yield line, values
    if empty:
        raise DataError(f"{path} has a header and nothing else")


def write(folder: Path, whole: Whole) -> None:
    source = whole.source
    times = source.times
    if times is not None and not in_order(times, source.sequences.offsets):
        times = None  # RecBole would put the lists in another order
    with open(folder / f"{whole.name}.inter", "w", encoding="utf-8", newline="\n") as file:
        file.write("user_id:token\titem_id:token" + ("\ttimestamp:float\n" if times is not None else "\n"))
        place = 0
        for user, items in whole.lists():
            ends = ["\n"] * len(items) if times is None else [f"\t{time}\n" for time in times[place : place + len(items)].tolist()]
            file.writelines(f"{user}\t{item}{end}" for item, end in zip(items, ends, strict=True))
            place += len(items)
    columns = {f"{name}:token_seq": values for name, values in whole.parts().items()}
    for name, codes in whole.codes().items():
        columns[f"{CODES}{name}:token_seq"] = [None if row is None else " ".join(map(str, row)) for row in codes]
        if [] in codes:
            item = source.item_ids[codes.index([])]
            raise DataError(f"the item {item!r} has an empty list as {CODES}{name}; RecBole's files cannot tell it from none")
    with open(folder / f"{whole.name}.item", "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(["item_id:token", *columns]) + "\n")
        for item, *values in zip(source.item_ids, *columns.values(), strict=True):
            file.write("\t".join([item, *(value or "" for value in values)]) + "\n")


def bad_id(name: str) -> str:
    plain = name.strip() == name and not set("\t\r\n\ufeff") & set(name)
    return "" if plain else "begins or ends with white space or holds a tab or a line break, which atomic files cannot carry"


FORMAT = Format(
    title="RecBole atomic files",
    read=read,
    recognises=lambda path: any(path.glob("*.inter")) and not any(path.glob("*.inter.json")) if path.is_dir() else path.suffix == ".inter",
    write=write,
    carries=frozenset({"parts", "codes", "times", "catalogue"}),
    bad_id=bad_id,
)
