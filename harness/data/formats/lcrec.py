"""The folder that LC-Rec, LETTER and their kin read: users and items are numbers from 0, everything in JSON.

    NAME.inter.json    {user: [item, ...]}, oldest first, whole histories
    NAME.item.json     {item: {"title": ..., "description": ..., "brand": ..., "categories": ...}}
    NAME.index.json    semantic ids {item: ["<a_12>", "<b_3>", ...]}, the letter is the level; NAME.index_X.json are further ones
    NAME.item2id, NAME.user2id    lines ``id TAB number``: what the numbers stand for (an ASIN, a reviewer)

The last two are optional; with them the source ids are the ids, without them the numbers. ``NAME.index.json`` becomes the column
``codes_index``, ``NAME.index_X.json`` becomes ``codes_X``. The catalogue is the items of ``item.json`` and ``item2id``, of the lists if
there is neither. What it cannot carry: pictures, times.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from harness.data.formats.common import ITEM_TEXT, Format, Whole, code_column, code_name, lines, nearest, only, read_json, write_json
from harness.data.source import DataError, SourceDomain, ragged

LISTS, ITEMS, ALWAYS = ".inter.json", ".item.json", ("title", "description", "brand", "categories")
_INDEX = re.compile(r"\.index(?:_(.+))?\.json")
LEVELS = 26


def read(path: Path, ignore: Collection[str] = ()) -> SourceDomain:
    file = only(path, f"*{LISTS}") if path.is_dir() else path
    stem = file.name.removesuffix(LISTS)
    items_file, item_ids_file, user_ids_file = (file.with_name(stem + end) for end in (ITEMS, ".item2id", ".user2id"))
    lists = _lists(file)
    files = [file.name]
    facts = _facts(items_file, ignore) if items_file.exists() else {}
    names = _names(item_ids_file) if item_ids_file.exists() else {}
    numbers = sorted(facts.keys() | names.keys()) or sorted({item for history in lists.values() for item in history})
    row = {number: place for place, number in enumerate(numbers)}
    for user, history in lists.items():
        if lost := [item for item in history if item not in row]:
            where = " and ".join(known.name for known in (items_file, item_ids_file) if known.exists())
            raise DataError(f"{file}: the user {user!r} has the item {lost[0]}, which {where} lacks; add it there or remove it here")
    columns: dict[str, Any] = {name: [None] * len(numbers) for name in dict.fromkeys(name for texts in facts.values() for name in texts)}
    for number, texts in facts.items():
        for name, value in texts.items():
            columns[name][row[number]] = value
    keys = {str(number): place for number, place in row.items()}
    for index in sorted(file.parent.glob(f"{stem}.index*.json")):
        found = _INDEX.fullmatch(index.name.removeprefix(stem))
        name = code_name(found[1] or "index") if found else ""
        if not found or name in ignore:
            continue
        if name in columns:
            raise DataError(f"{index}: another file gives the column {name!r} already; rename one, or --ignore {name}")
        columns[name] = code_column(read_json(index), keys, index, _codes)
        files.append(index.name)
    files += [other.name for other in (items_file, item_ids_file, user_ids_file) if other.exists()]
    return SourceDomain(
        _named([int(user) for user in lists], user_ids_file, file),
        ragged([[row[item] for item in history] for history in lists.values()]),
        _named(numbers, item_ids_file, items_file),
        columns=columns,
        source={"format": "lcrec", "files": files},
    )


def _lists(path: Path) -> dict[str, list[int]]:
    lists: dict[str, list[int]] = {}
    for user, history in read_json(path).items():
        if _number(user) is None or str(int(user)) != user:
            raise DataError(f"{path}: the user {user!r} is no number; users are numbered from 0")
        numbers = [_number(item) for item in history] if isinstance(history, list) else [None]
        if None in numbers:
            wrong = history[numbers.index(None)] if isinstance(history, list) else history
            raise DataError(f"{path}: the user {user!r} has {wrong!r:.60}; right is a list of item numbers")
        lists[user] = [number for number in numbers if number is not None]
    return lists


def _number(value: Any) -> int | None:
    """An item number, as a number or as its digits."""
    if type(value) is int and value >= 0:
        return value
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16 else None


def _facts(path: Path, ignore: Collection[str]) -> dict[int, dict[str, Any]]:
    """The text parts of every item."""
    facts: dict[int, dict[str, Any]] = {}
    for key, record in read_json(path).items():
        number = _number(key)
        if number is None or str(number) != key or not isinstance(record, dict):
            raise DataError(f"{path}: {key!r}: {type(record).__name__}; right is an item number and an object of its texts")
        for name, value in record.items():
            if name not in ITEM_TEXT and name not in ignore:
                raise DataError(
                    f"{path} item {key!r}: unknown key {name!r}{nearest(name, ITEM_TEXT)}; rename it, or leave it out with --ignore {name}"
                )
            text = value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))
            if not text and name not in ignore:
                raise DataError(f"{path} item {key!r}: {name!r} is {type(value).__name__}; texts are strings or lists of strings")
        facts[number] = {name: value for name, value in record.items() if name not in ignore}
    return facts


def _names(path: Path) -> dict[int, str]:
    """Number -> source id."""
    names: dict[int, str] = {}
    for line, content in lines(path):
        name, tab, value = content.rpartition("\t")
        number = _number(value)
        if not tab or not name or number is None:
            raise DataError(f"{path} line {line}: {content!r:.60}; right is an id, a tab, its number")
        if number in names:
            raise DataError(f"{path} line {line}: the number {number} stands for {names[number]!r} already")
        names[number] = name
    return names


def _named(numbers: list[int], path: Path, owner: Path) -> list[str]:
    if not path.exists():
        return [str(number) for number in numbers]
    names = _names(path)
    if lost := [number for number in numbers if number not in names]:
        raise DataError(
            f"{path}: the number {lost[0]} of {owner.name} is missing; add its line, or take the file away to use numbers as ids"
        )
    return [names[number] for number in numbers]


def _codes(value: Any) -> list[int] | None:
    """tokens like <a_12>, <b_3>, <c_250>, a letter a level"""
    if not isinstance(value, list) or len(value) > LEVELS:
        return None
    codes = []
    for level, token in enumerate(value):
        found = re.fullmatch(r"<([a-z])_([0-9]{1,9})>", token) if isinstance(token, str) else None
        if not found or ord(found[1]) != ord("a") + level:
            return None
        codes.append(int(found[2]))
    return codes


def write(folder: Path, whole: Whole) -> None:
    source, stem = whole.source, whole.name
    write_json(folder / f"{stem}{LISTS}", {user: rows.tolist() for user, rows in enumerate(source.sequences)})
    parts = whole.parts()
    names = [*ALWAYS, *(name for name in parts if name not in ALWAYS)]
    rows = zip(*(parts[name] for name in names), strict=True)
    write_json(
        folder / f"{stem}{ITEMS}", {item: dict(zip(names, [text or "" for text in row], strict=True)) for item, row in enumerate(rows)}
    )
    for what, ids in (("user", source.user_ids), ("item", source.item_ids)):
        with open(folder / f"{stem}.{what}2id", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{name}\t{number}\n" for number, name in enumerate(ids))
    for name, codes in whole.codes().items():
        tokens = {
            item: _tokens(row, f"codes_{name} of item {source.item_ids[item]!r}") for item, row in enumerate(codes) if row is not None
        }
        write_json(folder / f"{stem}.index{'' if name == 'index' else '_' + name}.json", tokens)


def _tokens(codes: list[int], what: str) -> list[str]:
    if len(codes) > LEVELS or any(code < 0 or code >= 10**9 for code in codes):
        raise DataError(f"{what} are {codes!r:.60}; LC-Rec's files hold at most {LEVELS} levels of numbers from 0")
    return [f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(codes)]


def bad_id(name: str) -> str:
    plain = name.strip() == name and not set("\t\r\n\ufeff") & set(name)
    return "" if plain else "begins or ends with white space or holds a tab or a line break, which the id files cannot carry"


FORMAT = Format(
    title="LC-Rec's folder",
    read=read,
    recognises=lambda path: any(path.glob(f"*{LISTS}")) if path.is_dir() else path.name.endswith(LISTS),
    write=write,
    carries=frozenset({"parts", "codes", "catalogue"}),
    bad_id=bad_id,
)
