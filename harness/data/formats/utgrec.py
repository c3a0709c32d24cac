"""The folder that UTGRec and MTGRec read: item and user ids as they are (ASINs), everything in JSON.

    all_item_seqs.json        {user: [item, ...]}, oldest first, whole histories
    id_mapping.json           {"user2id": {user: n}, "item2id": {...}, "id2user": ["[PAD]", user, ...], "id2item": [...]}; 0 is padding
    metadata.sentence.json    {item: one sentence of title, features, categories, description}
    Images/ITEM.jpg           where there is one
    NAME.sem_ids              semantic ids {item: [code, ...]}, as the tokenizer wrote them: with its offsets, if it adds some

The catalogue is ``id2item``. What it cannot carry: the parts of the text by themselves, times.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from harness.data.formats.common import Format, Whole, bad_file_name, code_column, code_name, read_json, write_json, write_pictures
from harness.data.source import DataError, SourceDomain, ragged
from harness.data.text import written

SEQUENCES, MAPPING, SENTENCES, CODES = "all_item_seqs.json", "id_mapping.json", "metadata.sentence.json", ".sem_ids"
PAD = "[PAD]"


def read(path: Path, ignore: Collection[str] = ()) -> SourceDomain:
    folder = path if path.is_dir() else path.parent
    for name, what in ((SEQUENCES, "the lists"), (MAPPING, "the catalogue"), (SENTENCES, "the item text; write {} there if there is none")):
        if not (folder / name).exists():
            raise DataError(f"{folder / name} is missing: it holds {what}")
    sequences, mapping = read_json(folder / SEQUENCES), read_json(folder / MAPPING)
    users, items = (_catalogue(mapping, what, folder / MAPPING) for what in ("user", "item"))
    lists = [_rows(user, history, users, items, folder) for user, history in sequences.items()]
    columns: dict[str, Any] = {"text": _sentences(folder / SENTENCES, items)} if "text" not in ignore else {}
    files = [SEQUENCES, MAPPING, SENTENCES]
    for file in sorted(folder.glob(f"*{CODES}")):
        name = code_name(file.name.removesuffix(CODES))
        if name in ignore:
            continue
        if name in columns:
            raise DataError(f"{file}: another file gives the column {name!r} already; rename one, or --ignore {name}")
        columns[name] = code_column(read_json(file), items, file, _codes)
        files.append(file.name)
    return SourceDomain(
        list(sequences),
        ragged(lists),
        list(items),
        columns=columns,
        source={"format": "utgrec", "files": files},
        dropped={"users_without_list": len(users) - len(sequences)},
    )


def _catalogue(mapping: dict[str, Any], what: str, path: Path) -> dict[str, int]:
    """Id -> row, without the padding. Both directions of the mapping must say the same."""
    forth, back = mapping.get(f"{what}2id"), mapping.get(f"id2{what}")
    if not isinstance(forth, dict) or not isinstance(back, list):
        raise DataError(f"{path}: {what}2id must be an object and id2{what} a list; it has {', '.join(mapping)}")
    if not back or back[0] != PAD:
        raise DataError(f"{path}: id2{what}[0] is {(back or [None])[0]!r}; number 0 is kept for padding, {PAD!r}")
    forth = {name: number for name, number in forth.items() if name != PAD}
    for number, name in enumerate(back[1:], 1):
        if not isinstance(name, str) or type(forth.get(name)) is not int or forth[name] != number:
            said = forth.get(name) if isinstance(name, str) else None
            raise DataError(f"{path}: id2{what}[{number}] is {name!r}, but {what}2id gives it {said!r}; the two must agree")
    if len(forth) != len(back) - 1:
        name = next(name for name in forth if name not in set(back))
        raise DataError(f"{path}: {what}2id has {name!r}, which id2{what} lacks; the two must agree")
    return {name: row for row, name in enumerate(back[1:])}


def _rows(user: str, history: Any, users: dict[str, int], items: dict[str, int], folder: Path) -> list[int]:
    if user not in users:
        raise DataError(f"{folder / SEQUENCES}: the user {user!r} is not in user2id of {MAPPING}; the two files must belong together")
    if not isinstance(history, list):
        raise DataError(f"{folder / SEQUENCES}: the user {user!r} has {type(history).__name__}, not a list of items")
    for place, item in enumerate(history):
        if not isinstance(item, str) or item not in items:
            raise DataError(f"{folder / SEQUENCES}: the user {user!r} has at place {place} the item {item!r}, which {MAPPING} lacks")
    return [items[item] for item in history]


def _sentences(path: Path, items: dict[str, int]) -> list[str | None]:
    """Text by row. Sentences of items outside the catalogue do not count."""
    text: list[str | None] = [None] * len(items)
    if path.stat().st_size < 8 and path.read_bytes().split() == [b"{}"]:
        return text
    for item, sentence in read_json(path).items():
        if not isinstance(sentence, str):
            raise DataError(f"{path}: the item {item!r} has {type(sentence).__name__}, not a sentence")
        if item in items:
            text[items[item]] = sentence
    return text


def _codes(value: Any) -> list[int] | None:
    """a list of whole numbers"""
    return value if isinstance(value, list) and all(type(code) is int and abs(code) < 2**31 for code in value) else None


def write(folder: Path, whole: Whole) -> None:
    users, items = whole.source.user_ids, whole.source.item_ids
    write_json(folder / SEQUENCES, dict(whole.lists()))
    mapping: dict[str, Any] = {}
    for what, ids in (("user", users), ("item", items)):
        mapping[f"{what}2id"] = {name: number for number, name in enumerate([PAD, *ids])}
        mapping[f"id2{what}"] = [PAD, *ids]
    write_json(folder / MAPPING, mapping)
    write_json(folder / SENTENCES, {item: written(text or "") for item, text in zip(items, whole.text, strict=True)})
    for name, codes in whole.codes().items():
        write_json(folder / f"{name}{CODES}", {item: row for item, row in zip(items, codes, strict=True) if row is not None})
    write_pictures(folder, whole.pictures)


def bad_id(name: str) -> str:
    return f"is {PAD}, the padding" if name == PAD else bad_file_name(name)


FORMAT = Format(
    title="UTGRec's folder",
    read=read,
    recognises=lambda path: (path / SEQUENCES).exists() if path.is_dir() else path.name == SEQUENCES,
    write=write,
    carries=frozenset({"text", "codes", "pictures", "catalogue"}),
    bad_id=bad_id,
)
