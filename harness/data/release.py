"""Amazon Reviews 2023 as it is published: which files there are, where, and how their first lines look.

The official release is the Hugging Face data set McAuley-Lab/Amazon-Reviews-2023, pinned here; the mirror is the server of the
authors' laboratory, with the same paths and gzipped files. HARNESS_AMAZON2023_HUB (else HF_ENDPOINT) and HARNESS_AMAZON2023_MIRROR
name other servers of the same layout (a company's, a test's); ``none`` leaves one out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.data.source import DataError
from harness.data.transfer import HEAD, SourceFailed
from harness.paths import PROJECT
from harness.values import nearest

DATASET = "McAuley-Lab/Amazon-Reviews-2023"
REVISION = "2b6d039ed471f2ba5fd2acb718bf33b0a7e5598e"
HUB = "https://huggingface.co"
MIRROR = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023"
LOCK = Path(os.environ.get("HARNESS_AMAZON2023_LOCK") or Path(__file__).with_name("amazon2023.lock.json"))
"""Digests under version control. The environment names another file where the servers have another release: a test's."""

TARGETS = ("Musical_Instruments", "Industrial_and_Scientific", "Video_Games", "Office_Products")
PRETRAINING = ("Arts_Crafts_and_Sewing", "Baby_Products", "CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Software")
GROUPS = {"paper": TARGETS + PRETRAINING, "targets": TARGETS, "pretraining": PRETRAINING}
PARTS = {
    "5core": tuple(f"benchmark/5core/last_out/{{}}.{split}.csv" for split in ("train", "valid", "test")),
    "reviews": ("raw/review_categories/{}.jsonl",),
    "meta": ("raw/meta_categories/meta_{}.jsonl",),
}


@dataclass(frozen=True)
class Wanted:
    """One file. ``path``: its name in the release; ``local``: in the folder, before a ``.gz``."""

    path: str

    @property
    def local(self) -> str:
        return self.path.removeprefix("raw/")


@dataclass
class Source:
    """A server. ``down``: why it is not asked any more."""

    name: str
    base: str
    suffix: str = ""
    down: str = ""

    def url(self, wanted: Wanted) -> str:
        return f"{self.base}/{wanted.path}{self.suffix}"

    def part(self, folder: Path, wanted: Wanted) -> Path:
        return folder / f"{wanted.local}{self.suffix}.part"

    def failed(self, failure: SourceFailed) -> str:
        if failure.unreachable and not self.down:
            self.down = str(failure)
        return f"{self.name}: {failure}"


def choose(categories: Sequence[str] = (), parts: Sequence[str] = ()) -> list[Wanted]:
    """The files of these categories (names, or paper, targets, pretraining; none: paper) and parts (none: all)."""
    names: dict[str, None] = {}
    for category in categories or ("paper",):
        if category not in GROUPS and category not in GROUPS["paper"]:
            raise DataError(f"{category!r} is none of the nine categories.{nearest(category, [*GROUPS['paper'], *GROUPS])}")
        names |= dict.fromkeys(GROUPS.get(category, (category,)))
    for part in parts:
        if part not in PARTS:
            raise DataError(f"{part!r} is no part of the release.{nearest(part, PARTS)}")
    return [Wanted(path.format(name)) for name in names for part, paths in PARTS.items() if not parts or part in parts for path in paths]


def sources(hub: str | None = None, mirror: str | None = None) -> list[Source]:
    """The servers to ask, in this order; an address given here, else by the environment, else the official one."""
    hub = hub or os.environ.get("HARNESS_AMAZON2023_HUB") or os.environ.get("HF_ENDPOINT") or HUB
    mirror = mirror or os.environ.get("HARNESS_AMAZON2023_MIRROR") or MIRROR
    for address in (hub, mirror):
        if address != "none" and not address.startswith(("http://", "https://")):
            raise DataError(f"{address!r} is no address of a server: http://... or https://..., or none to leave it out")
    known = [Source("hub", f"{hub.rstrip('/')}/datasets/{DATASET}/resolve/{REVISION}"), Source("mirror", mirror.rstrip("/"), ".gz")]
    return [source for source, address in zip(known, (hub, mirror), strict=True) if address != "none"]


def raw_root() -> Path:
    """``HARNESS_RAW``, else data/raw of the project: where `harness data prepare data/raw` finds the files."""
    return Path(os.environ.get("HARNESS_RAW") or PROJECT / "data" / "raw").absolute()


def first_line_problem(wanted: Wanted, head: bytes) -> str:
    """What is wrong with the first line, if anything."""
    line = head.split(b"\n", 1)[0]
    if not head:
        return "it is empty"
    if wanted.path.endswith(".csv"):
        fields = line.strip().split(b",")  # the hub's files have a line of names, files that the official script writes have none
        good = {b"user_id", b"parent_asin"} <= set(fields) or (len(fields) == 4 and fields[3].isdigit())
    else:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        cut = len(line) == len(head) and len(head) >= HEAD and line.startswith(b"{")  # a line longer than what we look at
        good = cut or (isinstance(record, dict) and "parent_asin" in record)
    if good:
        return ""
    return f"its first line is not that of such a file ({line[:60].decode(errors='replace')!r}): is a login page or a proxy in between?"
