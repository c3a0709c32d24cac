"""The lock file: which bytes each file of a release holds, so that what arrives today is what arrived last year.

Two files of one format. ``harness/data/amazon2023.lock.json`` is under version control: digests that the hub publishes for the
pinned revision. ``amazon2023.lock.json`` beside the data takes what was seen first for all other files; whoever trusts it copies
it over the first one and commits it. A download never writes into the project: the code may be read-only (it is in the
containers), and a run must not make the checkout dirty.

Digests are of the content without compression. Where the two files, or a file and a server, disagree, nothing is taken.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.data.source import DataError
from harness.data.transfer import write_whole, writing

SCHEMA = 1
FIRST_SEEN = "first seen"


@dataclass(frozen=True)
class Pin:
    """``seen``: who says so ("the hub", "first seen at the mirror", ...)."""

    sha256: str
    size: int | None
    seen: str


class Pins:
    """The digests that are known, and the file that takes new ones. Several threads may use it; one process at a time may learn."""

    def __init__(self, dataset: str, revision: str, committed: Path, beside: Path) -> None:
        self.head = {"schema": SCHEMA, "dataset": dataset, "revision": revision}
        self.beside = beside
        self._lock = threading.Lock()
        self._committed = self._read(committed) if committed.exists() else {}
        self._seen = self._read(beside) if beside.exists() else {}
        for path in self._committed.keys() & self._seen.keys():
            ours, theirs = self._committed[path], self._seen[path]
            if ours.sha256 != theirs.sha256:
                raise DataError(
                    f"{beside}: {path} has the sha256 {theirs.sha256[:12]}... ({theirs.seen}), but {committed.name} of the project says"
                    f" {ours.sha256[:12]}...; what lies in this folder is not the published file: move {beside.name} and the file away"
                )

    def __getitem__(self, path: str) -> Pin | None:
        with self._lock:
            return self._seen.get(path) or self._committed.get(path)  # equal digests; what was seen here has the size

    def learn(self, path: str, pin: Pin) -> None:
        """Keep what was seen, unless the project knows it already."""
        with self._lock:
            known = self._committed.get(path)
            if path in self._seen or (known is not None and known.size is not None):
                return
            self._seen[path] = pin
            files = {name: asdict(entry) for name, entry in sorted(self._seen.items())}
            with writing(self.beside):
                write_whole(self.beside, json.dumps({**self.head, "files": files}, indent=1) + "\n")

    def _read(self, path: Path) -> dict[str, Pin]:
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            head = {key: raw[key] for key in self.head}
            pins = {name: Pin(**entry) for name, entry in raw["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is not a lock file of {self.head['dataset']} ({error}); move it away") from None
        for key, value in self.head.items():
            if head[key] != value:
                raise DataError(f"{path} is for {key} {head[key]}, this program for {value}; move the file and its data away")
        return pins
