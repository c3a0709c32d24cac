"""S3-Rec's text: one line a user, ``user item item ...`` separated by spaces, oldest first. There is no item text.

What it cannot carry: text, codes, pictures, times, items that are in no list.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from harness.data.formats.common import Format, Whole, lines, only
from harness.data.source import DataError, SourceDomain, ragged


def read(path: Path, ignore: Collection[str] = ()) -> SourceDomain:
    path = only(path, "*.txt") if path.is_dir() else path
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    lists: list[list[int]] = []
    for line, content in lines(path):
        user, *history = content.split()
        if user in users:
            raise DataError(f"{path} line {line}: the user {user!r} stands already in line {users[user]}; write one line a user")
        if not history:
            raise DataError(f"{path} line {line}: the user {user!r} without items; the line must be `user item item ...`")
        users[user] = line
        lists.append([items.setdefault(item, len(items)) for item in history])
    return SourceDomain(list(users), ragged(lists), list(items), source={"format": "s3rec", "files": [path.name]})


def write(folder: Path, whole: Whole) -> None:
    with open(folder / f"{whole.name}.txt", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{user} {' '.join(items)}\n" for user, items in whole.lists())


def bad_id(name: str) -> str:
    return "" if name.split() == [name] and name[0] != "\ufeff" else "holds white space, which separates the ids in S3-Rec's text"


FORMAT = Format(
    title="S3-Rec text",
    read=read,
    recognises=lambda path: any(path.glob("*.txt")) if path.is_dir() else path.suffix == ".txt",
    write=write,
    carries=frozenset(),
    bad_id=bad_id,
)
