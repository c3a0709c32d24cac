"""What the formats share: reading lines and JSON with their place, checks of columns and ids, pictures in a folder, codes.

``Format`` is one format: how to recognise, read and write it. ``Whole`` is a domain put together again, for the writers.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.images import MAX_BYTES, SUFFIXES, Refused, kept_bytes
from harness.data.source import DataError, SourceDomain
from harness.data.text import FALLBACKS, PARTS

ITEM_TEXT = (*PARTS, *FALLBACKS, "image_caption", "image_caption_supplement")
"""Text columns of an items file that enter the public part. Numbers (price, rank) never do: they may count test clicks."""

IMAGES = "Images"
"""The folder of pictures beside the files, one a item: ``ITEM_ID.jpg``."""

NO_PICTURE = "no_picture_"


@dataclass(frozen=True)
class Whole:
    """A domain as writers take it. ``source`` has whole histories (test targets too), and its text columns stand as they must be
    written (``text.written``); ``text`` is the joined text as it is; ``pictures`` are by source id. Rows are item and user numbers."""

    name: str
    source: SourceDomain
    text: Sequence[str | None]
    pictures: Mapping[str, bytes]

    def codes(self) -> dict[str, list[list[int] | None]]:
        """The columns ``codes_*`` by what stands behind the prefix."""
        columns = {name: column for name, column in self.source.columns.items() if name.startswith("codes_")}
        return {name.removeprefix("codes_"): column.to_pylist() for name, column in columns.items()}

    def parts(self) -> dict[str, list[str | None]]:
        """The text columns by name: the five parts always, then what else the domain has."""
        return {name: list(column) for name, column in self.source.columns.items() if not name.startswith("codes_")}

    def lists(self) -> Iterator[tuple[str, list[str]]]:
        """User and whole history, oldest first, in source ids."""
        items = self.source.item_ids
        for user, rows in zip(self.source.user_ids, self.source.sequences, strict=True):
            yield user, [items[row] for row in rows.tolist()]


@dataclass(frozen=True)
class Format:
    """One format.

    ``carries``: what survives besides the lists, of parts, text, codes, times, pictures, private (an ASIN), catalogue (items
    that are in no list). ``bad_id``: what is wrong with a source id for this format, or "". ``images``: pictures lie in Images/.
    """

    title: str
    read: Callable[[Path, Collection[str]], SourceDomain]
    recognises: Callable[[Path], bool]
    write: Callable[[Path, Whole], None]
    carries: frozenset[str]
    bad_id: Callable[[str], str] = lambda name: ""

    @property
    def images(self) -> bool:
        return "pictures" in self.carries


# ------------------------------------------------------------------------------------------------------------- reading


def lines(path: Path) -> Iterator[tuple[int, str]]:
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


class _Repeated(ValueError):
    pass


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at least one key. Names the line of broken JSON and of other bytes, and a key that stands there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise _Repeated(next(name for name in names if names.count(name) > 1))
        return found

    def number(name: str) -> Any:
        raise _Repeated(name)

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if not data.strip():
        raise DataError(f"{path} is empty")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=number)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line}: not UTF-8 ({error.reason}); convert the file first") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} column {error.colno}: broken JSON ({error.msg}); is the file whole?") from None
    except _Repeated as error:
        wrong = "is no number of JSON" if str(error) in ("NaN", "Infinity", "-Infinity") else "stands there twice as a key of one object"
        raise DataError(f"{path}: {str(error)!r} {wrong}; mend the file") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be data of this kind") from None
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path} must hold a JSON object with at least one key")
    return value


def check_columns(path: Path, names: Iterable[str], required: tuple[str, ...], optional: tuple[str, ...], ignore: Collection[str]) -> None:
    names = list(names)
    known = (*required, *optional)
    if missing := [name for name in required if name not in names]:
        raise DataError(f"{path}: the column {missing[0]!r} is missing; it has {', '.join(names)}")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: the column {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    if unknown := [name for name in names if name not in known and name not in ignore]:
        mend = f"; rename it, or leave it out with --ignore {unknown[0]}. Known are {', '.join(known)}"
        raise DataError(f"{path}: unknown column {unknown[0]!r}{nearest(unknown[0], known)}{mend}")


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def refuse_repeats(ids: list[str], path: Path, name: str) -> None:
    seen: dict[str, int] = {}
    for row, value in enumerate(ids):
        if value in seen:
            raise DataError(f"{path} row {row}: {name} {value!r} stands already in row {seen[value]}; ids must be unique")
        seen[value] = row


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder} has {len(found)} files {pattern}; name the one to import")
    return found[0]


def parse_time(value: str, path: Path, line: int) -> float | int:
    try:
        time: float | int = int(value)
    except ValueError:
        try:
            time = float(value)
        except ValueError:
            time = math.nan
    if not math.isfinite(time) or abs(time) > 2**62:
        raise DataError(f"{path} line {line}: the timestamp {value!r} is not a number; give seconds or milliseconds since 1970")
    return time


# ---------------------------------------------------------------------------------------------------------------- codes


def code_name(text: str) -> str:
    """A column ``codes_...`` of this name: other characters than letters, digits and _ become _."""
    return "codes_" + re.sub(r"\W+", "_", text, flags=re.ASCII)


def code_column(codes: Mapping[str, Any], rows: Mapping[str, int], path: Path, read: Callable[[Any], list[int] | None]) -> list[Any]:
    """One list of code numbers an item, None where the file has none. ``read`` gives None for what is no list of codes."""
    column: list[list[int] | None] = [None] * len(rows)
    for item, value in codes.items():
        if item not in rows:
            raise DataError(f"{path}: the item {item!r} is not in the catalogue; remove it, or are these the codes of another data set?")
        numbers = read(value)
        if numbers is None:
            raise DataError(f"{path}: the codes of item {item!r} are {str(value)[:60]!r}; they must be {read.__doc__}")
        column[rows[item]] = numbers
    return column


# ------------------------------------------------------------------------------------------------------------- pictures


class PictureFolder(Mapping[str, "bytes | Path"]):
    """The pictures of ``items`` in a folder, looked at once and read when they are asked for: never all of them in memory.

    ``refused`` counts why items have none: not_found, truncated, not_a_picture, ...
    """

    def __init__(self, folder: Path, items: Sequence[str]):
        self.refused: dict[str, int] = {}
        self._files: dict[str, tuple[Path, bool]] = {}
        wanted = set(items)
        reasons: dict[str, str] = dict.fromkeys(items, "not_found")
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() not in SUFFIXES or file.stem not in wanted or file.stem in self._files:
                continue
            try:
                data = read_picture(file)
                self._files[file.stem] = file, kept_bytes(data) is data
                reasons.pop(file.stem, None)
            except Refused as error:
                reasons[file.stem] = error.reason
        for reason in sorted(reasons.values()):
            self.refused[NO_PICTURE + reason] = self.refused.get(NO_PICTURE + reason, 0) + 1

    def __getitem__(self, item: str) -> bytes:
        file, as_it_is = self._files[item]
        data = read_picture(file)
        return data if as_it_is else kept_bytes(data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_picture(file: Path) -> bytes:
    with open(file, "rb") as handle:
        return handle.read(MAX_BYTES + 1)


def write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """One file a picture, its bytes unchanged. All are named .jpg: that is the name that others look for, and readers go by content."""
    if pictures:
        (folder / IMAGES).mkdir()
    for item, data in pictures.items():
        (folder / IMAGES / f"{item}.jpg").write_bytes(data)


def bad_file_name(name: str) -> str:
    """Ids become names of picture files."""
    if "/" in name or "\x00" in name or name.startswith(".") or len(name.encode()) > 250:
        return "is no name of a file, and pictures are files named by their item"
    return ""


# -------------------------------------------------------------------------------------------------------------- writing


def write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.write("\n")


def in_order(times: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether no user's times go backwards."""
    steps = np.diff(times)
    inside = np.ones(len(steps), bool)
    borders = offsets[1:-1] - 1
    inside[borders[(borders >= 0) & (borders < len(steps))]] = False
    return not bool((steps[inside] < 0).any())
