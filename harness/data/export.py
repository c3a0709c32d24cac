"""Export: a domain -> the files that other programs read. Formats: ``harness/data/formats``.

In: the whole domain, test targets too (it reads the private part: this is a user's own act, methods never do it). Out: a new
folder, whole or not at all: written beside its place under another name, then renamed. Besides the format's files it holds
``exported.json``: which domain this is, and what the format could not carry.

Export then import gives the domain's digest where the format carries everything that the domain has; otherwise the digest of
the domain without what is listed there, and that one again and again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import PROTOCOL, Domain, Pictures, Ragged, read_columns
from harness.contract import write_json as write_json_whole
from harness.data import text
from harness.data.domain import read_private, read_summary
from harness.data.formats import FORMATS, Format, Whole
from harness.data.formats.common import ITEM_TEXT, in_order
from harness.data.importers import EXPORTED, known_format
from harness.data.source import DataError, DomainSummary, SourceDomain
from harness.data.write import CODES


@dataclass(frozen=True)
class Exported:
    """``lost``: one line for each thing that the domain has and the format cannot carry."""

    summary: DomainSummary
    path: Path
    files: list[str]
    lost: list[str]


def export_domain(domain: Path, format: str, to: Path) -> Exported:
    """Write the domain at the folder ``domain`` in ``format`` to the new folder ``to``.

    Raises DataError: an unknown format, a folder that has something in it, an id that the format cannot hold, a full disk.
    """
    kind, to = FORMATS[known_format(format)], Path(to).absolute()
    whole, summary = read_whole(domain)
    _check_ids(whole, kind)
    with _beside(to) as temporary:
        kind.write(temporary, whole)
        lost = losses(whole, kind)
        about = {"format": format, "domain": summary.name, "digest": summary.digest, "counts": summary.counts, "release": summary.release}
        write_json_whole(temporary / EXPORTED, {**about, "simulated": summary.simulated, "not_carried": lost})
        files = sorted(file.name for file in temporary.iterdir())
        _to_disk(temporary)
        os.rename(temporary, to)
    return Exported(summary, to, files, lost)


@contextlib.contextmanager
def _beside(to: Path) -> Iterator[Path]:
    """A folder to fill and rename to ``to``, gone if that does not happen. It is locked for as long as it is filled: what a killed
    export left behind is not, and goes first."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        for stale in to.parent.glob(f".{to.name}.*.tmp"):
            with contextlib.suppress(OSError), _flocked(stale):
                shutil.rmtree(stale, ignore_errors=True)
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise DataError(f"{to} is there already; name a new folder (an export never writes into one that holds something)")
        temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".tmp", dir=to.parent))
        try:
            with _flocked(temporary):
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{to}: {error.strerror}; nothing was written") from error


@contextlib.contextmanager
def _flocked(folder: Path) -> Iterator[None]:
    """Hold a folder. Raises BlockingIOError if another process does; a process that ends lets go."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def read_whole(folder: Path) -> tuple[Whole, DomainSummary]:
    """The domain put together again: whole histories, source ids, times if they are kept, text as an importer must read it."""
    summary = read_summary(folder)
    if summary.protocol != PROTOCOL:
        raise DataError(
            f"{folder}: its protocol is {summary.protocol}; these formats hold whole lists, which readers split as {PROTOCOL}. Export the"
            f" {PROTOCOL} domain of the same data (`harness data prepare RAW CATEGORY` makes it)"
        )
    private, domain = read_private(folder), Domain.read(folder / "public")
    histories = domain.train.append(domain.valid).append(private.targets)
    table = domain.items
    texts = table["text"].to_pylist()
    parts = {name: table[name].to_pylist() for name in table.column_names if name not in ("item", "text") and not name.startswith(CODES)}
    if strange := set(parts) - set(ITEM_TEXT):
        raise DataError(f"{folder / 'public' / 'items.parquet'}: no importer knows the column {min(strange)!r}")
    columns: dict[str, Any] = {name: _as_written(values) for name, values in parts.items()}
    joined = (text.join(dict(zip(parts, row, strict=True))) for row in zip(*parts.values(), strict=True))
    own = [value if value != made else None for value, made in zip(texts, joined, strict=True)]
    if any(own):  # the text of an item that has none of the parts
        columns["text"] = _as_written(own)
    columns |= {name: table[name].combine_chunks() for name in table.column_names if name.startswith(CODES)}
    hidden = read_columns(private.path / "items.parquet")
    more = {name: hidden[name].to_pylist() for name in hidden.column_names if name not in ("item", "source_id")}
    times = private.history_times
    source = SourceDomain(
        user_ids=private.user_ids,
        sequences=Ragged(histories.values.astype(np.int64), histories.offsets),
        item_ids=private.item_ids,
        columns=columns,
        times=None if times is None else times.values,
        private_columns=more,
        release=summary.release,
    )
    return Whole(summary.name, source, texts, _ById(domain.pictures, private.item_ids)), summary


def _as_written(values: list[str | None]) -> list[str | None]:
    return [value and text.written(value) for value in values]


class _ById(Mapping[str, bytes]):
    """A domain's pictures by source id, read one at a time."""

    def __init__(self, pictures: Pictures, item_ids: list[str]):
        self._pictures = pictures
        self._number = {item: number for number, item in enumerate(item_ids) if number in pictures}

    def __getitem__(self, item: str) -> bytes:
        data = self._pictures[self._number[item]]
        assert data is not None
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(self._number)

    def __len__(self) -> int:
        return len(self._number)


def _check_ids(whole: Whole, kind: Format) -> None:
    for what, ids in (("user", whole.source.user_ids), ("item", whole.source.item_ids)):
        for name in ids:
            if problem := kind.bad_id(name):
                raise DataError(f"the {what} id {name!r} {problem}; use the format parquet")


def losses(whole: Whole, kind: Format) -> list[str]:
    """What ``kind`` does not carry of this domain."""
    source, parts = whole.source, whole.parts()
    n_text = sum(value is not None for value in whole.text)
    lost = []
    if "parts" not in kind.carries and "text" not in kind.carries:
        if n_text:
            lost.append(f"text of {n_text:,} items")
    elif "parts" not in kind.carries:
        filled = [name for name, values in parts.items() if name != "text" and any(value is not None for value in values)]
        if filled:
            lost.append(f"the parts of the text by themselves ({', '.join(filled)}); the joined text is there")
        changed = sum(value is not None and text.part(text.written(value)) != value for value in whole.text)
        if changed:
            lost.append(f"the letter of {changed:,} joined texts in which two parts together look like an HTML tag")
    if "codes" not in kind.carries and whole.codes():
        lost.append(f"codes ({', '.join(whole.codes())})")
    if "pictures" not in kind.carries and whole.pictures:
        lost.append(f"{len(whole.pictures):,} pictures")
    if source.times is not None:
        if "times" not in kind.carries:
            lost.append("times, so the tie rate")
        elif kind is FORMATS["recbole"] and not in_order(source.times, source.sequences.offsets):
            lost.append("times, so the tie rate: they go backwards in a list, and RecBole would put it in another order")
    if "private" not in kind.carries and source.private_columns:
        lost.append(f"{', '.join(source.private_columns)} of the items (it is in the private part)")
    if "catalogue" not in kind.carries:
        alone = len(source.item_ids) - len(np.unique(source.sequences.values))
        if alone:
            lost.append(f"{alone:,} items that are in no list")
    return lost


def _to_disk(folder: Path) -> None:
    """On the disk before the folder has its name: one sync for thousands of pictures, else file by file."""
    if any(path.is_dir() for path in folder.iterdir()):
        os.sync()
        return
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
