"""Training curves out of ``progress.jsonl``, which a method writes and nobody can trust.

In: the path of a file that may grow, vanish, be a link, a FIFO, gigabytes or nonsense. Out: ``Point`` values that MLflow
takes. Lines that are not progress are skipped in silence: a curve is a courtesy, and must never end or slow a run.

The points are a function of the file alone (times come from its lines), so reading it live, in pieces, gives the same
points as reading it once afterwards; and since MLflow keeps one of two equal points, sending them again changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE = 8192
MAX_BYTES = 64 << 20
"""Bytes of a file that are looked at. What comes after is not read."""
MAX_CHUNK = 1 << 20
"""Bytes read at a time, so that a flood does not keep the other curves waiting."""
MAX_NAMES = 50
"""Different metrics of a stage."""
DENSE = 2000
"""Lines that are all kept. Of the next 2000 every second one is, of the next 4000 every fourth, and so on."""
MAX_STEP = 1 << 53
MAX_TIME = 4102444800.0  # the year 2100; later ones are made up


@dataclass(frozen=True)
class Point:
    name: str
    value: float
    step: int
    time: int
    """Milliseconds since 1970."""


class Curve:
    """Follows one progress file. ``read`` gives the points that are new since the last call.

    Names get the stage as prefix (``fit/loss``), so that a method's own ``recall_at_10`` never passes for the harness's.
    """

    def __init__(self, path: Path, stage: str):
        self._path = path
        self.stage = _clean(stage) or "stage"
        self._handle: int | None = None
        self._refused = False
        self._offset = 0
        self._rest = b""
        self._skipping = False
        self._lines = 0
        self._time = 1
        self._names: set[str] = set()

    def read(self) -> list[Point]:
        """New points of whole lines; at most MAX_CHUNK bytes are read."""
        points: list[Point] = []
        for line in self._new_lines():
            index, self._lines = self._lines, self._lines + 1
            if _kept(index):
                points.extend(self._points(line))
        return points

    def read_all(self) -> Iterator[list[Point]]:
        """All points that are left, in pieces, for a file that grows no more."""
        while True:
            before = self._offset
            points = self.read()
            if points:
                yield points
            if self._offset == before:
                return

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._refused = True

    def _new_lines(self) -> list[bytes]:
        if not self._open() or self._handle is None:
            return []
        size = min(MAX_CHUNK, MAX_BYTES - self._offset)
        try:
            data = os.pread(self._handle, size, self._offset) if size > 0 else b""
        except OSError:
            self.close()
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines and self._skipping:
            lines.pop(0)
            self._skipping = False
        if len(self._rest) > MAX_LINE:
            # The rest of this line goes too: its middle could look like a line of its own.
            self._rest, self._skipping = b"", True
        return [line for line in lines if 0 < len(line) <= MAX_LINE]

    def _open(self) -> bool:
        """Open the file once it is there. A link, a device or a second name of another file is refused for good."""
        if self._handle is not None or self._refused:
            return not self._refused
        try:
            if self._path.parent.is_symlink():
                self._refused = True
                return False
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            self._refused = True
            return False
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(handle)
            self._refused = True
            return False
        self._handle = handle
        return True

    def _points(self, line: bytes) -> Iterator[Point]:
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(raw, dict) or not isinstance(raw.get("metrics"), dict):
            return
        step, moment = raw.get("step"), _number(raw.get("time"))
        if not isinstance(step, int) or isinstance(step, bool) or abs(step) > MAX_STEP:
            return
        if moment is not None and 0 < moment < MAX_TIME:
            self._time = max(1, int(moment * 1000))
        for name, value in raw["metrics"].items():
            number = _number(value)
            name = _clean(name)
            if number is None or not name:
                continue
            if name not in self._names:
                if len(self._names) >= MAX_NAMES:
                    continue
                self._names.add(name)
            yield Point(f"{self.stage}/{name}", number, step, self._time)


def _kept(index: int) -> bool:
    """Whether line ``index`` is kept: decided without knowing how long the file will be."""
    return index % (1 << (index // DENSE).bit_length()) == 0


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_\-]", "_", name[:100])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
