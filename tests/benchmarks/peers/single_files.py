"""What a picture pack and a concurrent download are measured against: one file a picture, one request after the other.

``SingleFiles`` reads ``FOLDER/ITEM.jpg`` as data loaders do, without a buffer in between: the quickest of the plain ways (measured
against ``open(path, "rb").read()`` and ``Path.read_bytes()``). ``download`` is the usual loop, in its good form: one connection that
stays open, every picture checked in the same way, one file each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import httpx2

from harness.data.images import kept_bytes


class SingleFiles:
    def __init__(self, folder: Path):
        self._folder = str(folder)

    def __getitem__(self, item: int) -> bytes:
        with open(f"{self._folder}/{item}.jpg", "rb", buffering=0) as file:
            return file.read()

    def many(self, items: list[int]) -> list[bytes]:
        """A batch: the disk gets all requests at once."""
        files = [open(f"{self._folder}/{item}.jpg", "rb", buffering=0) for item in items]  # noqa: SIM115
        for file in files:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        read = [file.read() for file in files]
        for file in files:
            file.close()
        return read


def download(urls: Iterable[str], folder: Path) -> None:
    with httpx2.Client() as client:
        for number, url in enumerate(urls):
            answer = client.get(url)
            answer.raise_for_status()
            (folder / f"{number}.jpg").write_bytes(kept_bytes(answer.content))
