"""Where downloaded pictures lie: one pack and one ledger a category.

    RAW/pictures/CATEGORY/pictures.bin    the encoded pictures, one behind the other, in order of arrival; only appended to
    RAW/pictures/CATEGORY/ledger.jsonl    one line for every outcome, the kept picture and the failure; an item's last line counts

Items are source ids (``parent_asin``) here: one store serves every domain that is prepared from the category, and numbering a domain
anew downloads nothing. ``prepare`` writes the domain's own pack from it, by item number.

A line of the ledger is written only when its picture is on the disk (data, sync, line, sync). So after a stop at any moment
the ledger names nothing that is not there: a half line at its end, and bytes of the pack that no line names, are cut at the
next start. One process writes (``open_store`` waits for another); any number may read meanwhile.

The sha256 of a line is that of the kept bytes, which were decoded whole before it was written. It guards them from then on: every
reader checks it, so a picture damaged on the disk never gets into a domain, whose own digest would make the damage look right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data.source import DataError

PACK = "pictures.bin"
LEDGER = "ledger.jsonl"
SCHEMA = {"ledger": "pictures", "schema": 1}
DAMAGED = "damaged"
NOT_FETCHED = "not_fetched"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one item. Kept: ``reason`` is empty, and the picture lies at ``offset``. ``source_sha256`` is set where the
    picture was re-encoded: the digest of what the host sent. ``url`` is the metadata's, None where it has none."""

    item: str
    url: str | None
    tries: int = 0
    reason: str = ""
    detail: str = ""
    at: str = ""
    offset: int = -1
    length: int = 0
    sha256: str = ""
    source_sha256: str = ""

    @property
    def kept(self) -> bool:
        return not self.reason

    def line(self) -> bytes:
        """Fields at their default are left out."""
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return json.dumps({name: value for name, value, default in fields if value != default}, ensure_ascii=False).encode() + b"\n"


def read_ledger(folder: Path) -> dict[str, Outcome]:
    """The last outcome of every item; empty where nothing was ever fetched."""
    return _parse(folder)[0]


def _parse(folder: Path) -> tuple[dict[str, Outcome], int]:
    """The outcomes, and how many bytes of the ledger are whole lines."""
    path, outcomes, whole = folder / LEDGER, {}, 0
    if not path.exists():
        return {}, 0
    size = (folder / PACK).stat().st_size if (folder / PACK).exists() else 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # the writer was stopped here
            try:
                entry = json.loads(line)
                if number > 1:
                    outcome = Outcome(**entry)
                    if outcome.kept and outcome.offset + outcome.length > size:
                        outcome = Outcome(outcome.item, outcome.url, reason=DAMAGED, detail="the pack ends before it")
                    outcomes[outcome.item] = outcome
                elif entry != SCHEMA:
                    raise ValueError("not a ledger of pictures that this version knows")
            except (ValueError, TypeError) as error:
                raise DataError(f"{path} line {number}: {error}; move the folder away and fetch the pictures again") from None
            whole += len(line)
    return outcomes, whole


def reasons(outcomes: Mapping[str, Outcome], items: Iterable[str]) -> dict[str, int]:
    """How many of ``items`` have no picture, by reason."""
    found = (outcomes[item].reason if item in outcomes else NOT_FETCHED for item in items)
    return dict(sorted(Counter(reason for reason in found if reason).items()))


class PicturePack(Mapping[str, bytes]):
    """The kept pictures by source id, read and checked one at a time. ``outcomes``: also what failed, and why."""

    def __init__(self, folder: Path):
        self.path = folder / PACK
        self.outcomes = read_ledger(folder)
        self._kept = {item: outcome for item, outcome in self.outcomes.items() if outcome.kept}
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __contains__(self, item: object) -> bool:
        return item in self._kept

    def __getitem__(self, item: str) -> bytes:
        outcome = self._kept[item]
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._file, outcome.length, outcome.offset)
        if hashlib.sha256(data).hexdigest() != outcome.sha256:
            raise DataError(f"{self.path}: the picture of {item} is damaged; `harness data pictures --verify` finds and fetches such")
        return data

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)  # type: ignore[arg-type]


@contextlib.contextmanager
def open_store(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[PictureStore]:
    """The store of ``folder`` for one writer. Another writer is waited for, after a call of ``waiting``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        store = PictureStore(folder)
        try:
            yield store
        finally:
            store.close()


class PictureStore:
    """The writer. Made by ``open_store``, which holds the lock."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.outcomes, self._ledger_end = _parse(folder)
        self._pack_end = max((outcome.offset + outcome.length for outcome in self.outcomes.values() if outcome.kept), default=0)
        self._pack = os.open(folder / PACK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._ledger = os.open(folder / LEDGER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._cut()
        lost = [outcome for outcome in self.outcomes.values() if outcome.reason == DAMAGED]
        if self._ledger_end == 0:
            self._append(b"", json.dumps(SCHEMA).encode() + b"\n")
        if lost:  # write it down: bytes that come now would lie where these lay
            self.commit([(outcome, None) for outcome in lost])

    def close(self) -> None:
        os.close(self._pack)
        os.close(self._ledger)

    def commit(self, batch: Sequence[tuple[Outcome, bytes | None]]) -> None:
        """Keep the pictures and note the outcomes: all of the batch, or on an error nothing of it."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        noted, offset = [], self._pack_end
        for outcome, data in batch:
            if data is not None:
                digest = hashlib.sha256(data).hexdigest()
                outcome = dataclasses.replace(outcome, offset=offset, length=len(data), sha256=digest)
                offset += len(data)
            noted.append(dataclasses.replace(outcome, at=outcome.at or now))
        self._append(b"".join(data for _, data in batch if data), b"".join(outcome.line() for outcome in noted))
        self.outcomes.update((outcome.item, outcome) for outcome in noted)

    def verify(self) -> list[str]:
        """Read every kept picture and compare its digest. What is damaged is noted as such, so that the next download fetches it."""
        damaged = []
        for outcome in sorted((o for o in self.outcomes.values() if o.kept), key=lambda o: o.offset):
            if hashlib.sha256(os.pread(self._pack, outcome.length, outcome.offset)).hexdigest() != outcome.sha256:
                damaged.append(Outcome(outcome.item, outcome.url, reason=DAMAGED, detail="its bytes do not have their digest"))
        if damaged:
            self.commit([(outcome, None) for outcome in damaged])
        return [outcome.item for outcome in damaged]

    def _append(self, pictures: bytes, lines: bytes) -> None:
        sync: Any = getattr(os, "fdatasync", os.fsync)
        try:
            _write(self._pack, pictures, self._pack_end)
            if pictures:
                sync(self._pack)
            _write(self._ledger, lines, self._ledger_end)
            sync(self._ledger)
        except OSError as error:  # a full disk, most of all
            self._cut()
            kept = sum(outcome.kept for outcome in self.outcomes.values())
            raise DataError(
                f"{self.folder}: {error.strerror}. The {kept:,} pictures that are there are safe: make room and run the command again"
            ) from error
        self._pack_end += len(pictures)
        self._ledger_end += len(lines)

    def _cut(self) -> None:
        """Take off what stands behind the last whole outcome."""
        os.ftruncate(self._ledger, self._ledger_end)
        os.ftruncate(self._pack, self._pack_end)


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
