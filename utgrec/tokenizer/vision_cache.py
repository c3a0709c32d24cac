"""What the frozen vision tower says of each picture, computed once and kept in a file.

In: pictures as bytes, and whatever turns a batch of them into features. Out: features [N, D] by the digest of the picture, as views of
a memory-mapped file: no pixels, no tower any more.

    vision-KEY-WRITER.features   rows of all pictures, one after the other, in the tower's own precision: nothing is rounded
    vision-KEY-WRITER.index      a line a picture: its digest and grid; the rows lie in the order of the lines

KEY is of all that decides a feature: the tower's weights, the limits of a picture's size. New pictures are appended, rows before
lines, so a killed run loses a batch at most and the next one goes on behind the last whole picture. One writer a file: processes
that share the work have a file each, and read all.

When it pays: a feature costs ``width`` numbers a token for as long as the file is kept, and saves the tower (for Qwen2-VL-2B 675M
weights a patch, four patches a token) in every epoch and in encoding. ``cache_bytes`` says the size: pictures of 500 x 500
pixels are 324 tokens of 1,536 numbers, 1.0 MB each in bf16, so 344,000 items are 342 GB; with ``pixels_max = 64`` they are 68 GB.

Legend: N picture tokens, D width of the language model.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

Grid = tuple[int, int, int]
Features = Callable[[list[bytes]], list[tuple[np.ndarray, Grid] | None]]
"""Pictures -> features [N, D] and grid of each; None for one that cannot be decoded."""
NAME = 16
"""Bytes of a picture's digest."""


def cache_bytes(items: int, tokens: float, width: int = 1536, number: int = 2) -> int:
    """Size of the file for so many pictures of so many tokens on average. ``number``: bytes of one, 2 in bf16."""
    return round(items * tokens * width * number)


class VisionCache:
    def __init__(self, folder: Path, key: str, width: int, kind: np.dtype):
        self.folder, self.key, self.width, self.kind = folder, key, width, np.dtype(kind)
        self._found: dict[bytes, tuple[int, int, Grid | None]] = {}  # file, first row, grid
        self._files: list[np.ndarray] = []
        self.open()

    def open(self) -> None:
        """Read what there is, by all writers."""
        self._found, self._files = {}, []
        for index in sorted(self.folder.glob(f"vision-{self.key}-*.index")):
            rows = index.with_suffix(".features")
            lines, count = _lines(index, rows, self._row)
            if lines:
                array = np.memmap(rows, self.kind, "r", shape=(count, self.width)) if count else np.empty((0, self.width), self.kind)
                self._files.append(array)
            for digest, first, grid in lines:
                self._found[digest] = (len(self._files) - 1, first, grid)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, picture: bytes) -> bool:
        return _digest(picture) in self._found

    def get(self, picture: bytes) -> tuple[np.ndarray, Grid] | None:
        """None: not there, or not to be decoded; ``in`` tells these apart."""
        file, first, grid = self._found.get(_digest(picture), (0, 0, None))
        return (self._files[file][first : first + tokens(grid)], grid) if grid else None

    def add(
        self,
        pictures: Iterable[bytes | None],
        features: Features,
        *,
        writer: str = "0",
        batch: int = 64,
        told: Callable[[int], None] | None = None,
    ) -> None:
        """Compute what is missing. Two processes with one ``writer`` wait for each other, and the second finds all done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / f"vision-{self.key}-{writer}.index"
        with open(index, "ab") as lines, open(index.with_suffix(".features"), "ab") as rows:
            fcntl.flock(lines, fcntl.LOCK_EX)
            self.open()
            whole, count = _lines(index, index.with_suffix(".features"), self._row)
            os.ftruncate(lines.fileno(), len(whole) * LINE)  # half a line, and rows that no line names
            os.ftruncate(rows.fileno(), count * self._row)
            seen, waiting, done = set(self._found), [], 0
            for picture in pictures:
                done += 1
                if picture is not None and (digest := _digest(picture)) not in seen:
                    seen.add(digest)
                    waiting.append(picture)
                if len(waiting) == batch:
                    _append(lines, rows, waiting, features(waiting))
                    waiting = []
                    if told:
                        told(done)
            if waiting:
                _append(lines, rows, waiting, features(waiting))
            if told:
                told(done)
        self.open()

    @property
    def _row(self) -> int:
        return self.width * self.kind.itemsize


LINE = 2 * NAME + 1 + 3 * 6 + 1
"""Bytes of a line: digest in hexadecimal, then frames, rows and columns in 6 digits each; all 0: cannot be decoded."""


def tokens(grid: Grid | None) -> int:
    return grid[0] * grid[1] * grid[2] // 4 if grid else 0


def _digest(picture: bytes) -> bytes:
    return hashlib.sha256(picture).digest()[:NAME]


def _append(lines: object, rows: object, pictures: list[bytes], found: list[tuple[np.ndarray, Grid] | None]) -> None:
    for one in found:
        if one:
            rows.write(np.ascontiguousarray(one[0]))  # type: ignore[attr-defined]
    _flush(rows)
    for picture, one in zip(pictures, found, strict=True):
        grid = one[1] if one else (0, 0, 0)
        lines.write(f"{_digest(picture).hex()} {''.join(f'{side:06d}' for side in grid)}\n".encode())  # type: ignore[attr-defined]
    _flush(lines)


def _flush(file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]


def _lines(index: Path, features: Path, row: int) -> tuple[list[tuple[bytes, int, Grid | None]], int]:
    """Digest, first row and grid of each whole picture, and how many rows these have."""
    there = features.stat().st_size // row if features.exists() else 0
    data = index.read_bytes()
    found, first = [], 0
    for start in range(0, len(data) - LINE + 1, LINE):
        line = data[start : start + LINE]
        try:
            digest, sides = bytes.fromhex(line[: 2 * NAME].decode()), [int(line[at : at + 6]) for at in range(2 * NAME + 1, LINE - 1, 6)]
        except ValueError:
            break
        grid = (sides[0], sides[1], sides[2]) if any(sides) else None
        if first + tokens(grid) > there:
            break
        found.append((digest, first, grid))
        first += tokens(grid)
    return found, first
