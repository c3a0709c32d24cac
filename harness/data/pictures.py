"""The product pictures of prepared domains: which URL is asked, which items have a picture, and why others have none.

In: domains prepared from raw files of Amazon Reviews 2023, and the metadata that lists the URLs. Out: a store of pictures by source
id under RAW/pictures/CATEGORY (picture_store.py), filled over the network (picture_fetch.py), and in each domain the pack
that methods read, by item number.

    "images": [{"thumb": URL, "large": URL, "hi_res": URL or null, "variant": "MAIN"}, ...]       a record of the release
    "images": {"thumb": [URL, ...], "large": [...], "hi_res": [...], "variant": [...]}             the same out of the hub's loader

The picture is the variant MAIN, else the first; its size is large, else hi_res (next to it, and made smaller if need be), else
thumb; what is not an http or https URL does not count. An item without one is in the ledger as well, so that coverage and its
reasons can be told without reading the metadata again.

A later preparation, with other rules or another numbering, takes from the store what is there and downloads nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harness.contract import read_columns
from harness.data.domain import list_domains, read_private, read_summary, replace_pictures
from harness.data.images import kept_bytes, local_pictures
from harness.data.picture_store import DAMAGED, Outcome, PicturePack, open_store, read_ledger, reasons
from harness.data.source import DataError, DomainSummary

if TYPE_CHECKING:
    from harness.data.picture_fetch import Job, Manners, Result

SIZES = ("large", "hi_res", "thumb")
USUAL_BYTES = 45_000
"""What a picture of this size takes, until the store knows better."""
NO_PICTURE = "no_picture_"
"""Counts of items without picture stand under this and the reason among what the preparation left out."""
SERVER = "HARNESS_AMAZON2023_PICTURES"
"""Environment variable: another server with the same paths, in place of every host that the metadata names."""


# ---------------------------------------------------------------------------------------------------------------- URLs


def picture_url(images: Any) -> str | None:
    """The URL of an item's picture out of the field ``images`` of its record, or None."""
    if isinstance(images, dict):
        columns = {name: values for name, values in images.items() if isinstance(values, list)}
        length = max(map(len, columns.values()), default=0)
        images = [{name: values[row] for name, values in columns.items() if row < len(values)} for row in range(length)]
    rows = [row for row in images if isinstance(row, dict)] if isinstance(images, list) else []
    main_first = sorted(rows, key=lambda row: row.get("variant") != "MAIN")
    return next((row[size] for row in main_first for size in SIZES if is_url(row.get(size))), None)


def is_url(value: Any) -> bool:
    if not isinstance(value, str) or re.search(r"[\s\x00-\x1f\x7f]", value):
        return False
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def read_urls(metadata: Path, items: Collection[str] | None = None) -> dict[str, str | None]:
    """The picture URL of ``items`` (all without them) that have a record. The first record of an item counts."""
    from harness.data.prepare import json_lines

    wanted = None if items is None else set(items)
    urls: dict[str, str | None] = {}
    for _, record in json_lines(metadata):
        item = record.get("parent_asin")
        if isinstance(item, str) and item not in urls and (wanted is None or item in wanted):
            urls[item] = picture_url(record.get("images"))
    return urls


def served_by(url: str, server: str | None) -> str:
    """The same path at another server; the URL itself without one."""
    if not server:
        return url
    parts = urlsplit(url)
    return server.rstrip("/") + parts.path + (f"?{parts.query}" if parts.query else "")


# ------------------------------------------------------------------------------------------------------------ download


@dataclass(frozen=True)
class Plan:
    """What a download will do: ``jobs`` over the network; ``silent`` outcomes that are known without asking anybody."""

    items: list[str]
    urls: dict[str, str | None]
    jobs: list[Job]
    silent: list[Outcome]
    there: int
    needed: int
    """Bytes that the jobs will take, roughly."""


class Show:
    """What happens, for whoever wants to see it."""

    def note(self, text: str) -> None: ...
    def planned(self, category: str, plan: Plan) -> None: ...
    def results(self, results: Sequence[Result]) -> None: ...


@dataclass
class Download:
    """One category: its items, their URLs, its store.

    ``server`` is asked in place of the hosts in the metadata. ``retry_failed``: also what failed before; a plain run goes on where
    the last one stopped, and asks again only where the URL is another one or the picture was damaged on the disk.
    """

    raw: Path
    category: str
    items: Sequence[str] | None = None
    manners: Manners | None = None
    server: str | None = None
    retry_failed: bool = False
    show: Show = field(default_factory=Show)

    def plan(self, outcomes: Mapping[str, Outcome] | None = None) -> Plan:
        """What there is to do, from ``outcomes`` or the ledger as it stands. Asks nobody, writes nothing."""
        from harness.data.picture_fetch import Job

        server = self.server or os.environ.get(SERVER)
        if server and not is_url(server):
            raise DataError(f"{server!r} is no address of a server: http://... or https://...")
        outcomes = read_ledger(store_folder(self.raw, self.category)) if outcomes is None else outcomes
        urls = read_urls(metadata_file(self.raw, self.category), self.items)
        items = list(urls) if self.items is None else list(dict.fromkeys(self.items))
        jobs, silent = [], []
        for item in items:
            before, url = outcomes.get(item), urls.get(item)
            if url is None:
                reason = "no_url" if item in urls else "no_metadata"
                if before is None or (before.reason and before.reason != reason):
                    silent.append(Outcome(item, None, reason=reason))
            elif before is None or before.url != url or before.reason == DAMAGED or (self.retry_failed and not before.kept):
                jobs.append(Job(item, served_by(url, server)))
        lengths = [outcome.length for outcome in outcomes.values() if outcome.kept]
        each = sum(lengths) / len(lengths) if len(lengths) >= 200 else USUAL_BYTES
        there = sum(item in outcomes and outcomes[item].kept for item in items)
        return Plan(items, urls, jobs, silent, there, int(len(jobs) * each))

    def run(self) -> dict[str, Outcome]:
        """Fetch what is missing. The last outcome of every item of the store. Raises DataError; what has arrived stays."""
        from harness.data.picture_fetch import fetch

        metadata_file(self.raw, self.category)  # before a folder is made
        with open_store(store_folder(self.raw, self.category), self._waits) as store:
            plan = self.plan(store.outcomes)
            self.show.planned(self.category, plan)
            free = shutil.disk_usage(store.folder).free
            if plan.needed > free:
                raise DataError(
                    f"{store.folder} has {free / 2**30:,.1f} GiB free, but {len(plan.jobs):,} pictures need about"
                    f" {plan.needed / 2**30:,.1f}: free some space, or name another folder with --raw. Nothing was fetched"
                )
            store.commit([(outcome, None) for outcome in plan.silent])

            def keep(results: Sequence[Result]) -> None:
                store.commit([(_outcome(result, plan.urls[result.job.item]), result.data) for result in results])
                self.show.results(results)

            fetch(plan.jobs, kept_bytes, keep, self.manners)
            return store.outcomes

    def verify(self) -> list[str]:
        """Read every picture of the store again. Those that are damaged, which ``run`` then fetches."""
        with open_store(store_folder(self.raw, self.category), self._waits) as store:
            return store.verify()

    def _waits(self) -> None:
        self.show.note(f"another process is fetching pictures of {self.category}: waiting for it")


def _outcome(result: Result, url: str | None) -> Outcome:
    if result.data is None:
        return Outcome(result.job.item, url, result.tries, result.reason, result.detail[:200])
    changed = result.sent is not None and result.sent is not result.data
    return Outcome(result.job.item, url, result.tries, source_sha256=hashlib.sha256(result.sent or b"").hexdigest() if changed else "")


def store_folder(raw: Path, category: str) -> Path:
    return raw / "pictures" / category


def metadata_file(raw: Path, category: str) -> Path:
    for suffix in (".jsonl", ".jsonl.gz"):
        if (path := raw / "meta_categories" / f"meta_{category}{suffix}").exists():
            return path
    raise DataError(
        f"{path} (or .jsonl) is missing: it names the pictures' URLs; `harness data fetch amazon2023 {category} --part meta` brings it"
    )


# ----------------------------------------------------------------------------------------------- from the store to a domain


class Found(Mapping[str, bytes]):
    """The pictures of some items: out of the store, else a file of their name beside it."""

    def __init__(self, pack: PicturePack, local: dict[str, bytes], items: Sequence[str]):
        self._pack, self._local = pack, local
        self._items = [item for item in items if item in pack or item in local]

    def __getitem__(self, item: str) -> bytes:
        return self._pack[item] if item in self._pack else self._local[item]

    def digest(self, item: str) -> str:
        return self._pack.outcomes[item].sha256 if item in self._pack else hashlib.sha256(self._local[item]).hexdigest()

    def __contains__(self, item: object) -> bool:
        return item in self._pack or item in self._local

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def find_pictures(raw: Path, category: str, items: Sequence[str]) -> tuple[Found, dict[str, int]]:
    """The pictures that are there for ``items``, one read at a time, and how many have none, by reason."""
    folder = store_folder(raw, category)
    pack = PicturePack(folder)
    local, refused = local_pictures(folder, [item for item in items if item not in pack])
    missing = [item for item in items if item not in pack and item not in local]
    counts = Counter(reasons(pack.outcomes, [item for item in missing if item not in refused]))
    counts.update(refused[item] for item in missing if item in refused)
    return Found(pack, local, items), {NO_PICTURE + reason: counts[reason] for reason in sorted(counts)}


def put_into_domain(raw: Path, folder: Path) -> DomainSummary:
    """Give a prepared domain the pictures that are there now: what its preparation would give it if it ran again."""
    private = read_private(folder)
    pictures, counts = find_pictures(raw, str(private.info["source"]["category"]), private.item_ids)
    before = private.info.get("dropped", {})
    dropped = {key: count for key, count in before.items() if not key.startswith(NO_PICTURE)} | counts
    wanted = {number: pictures.digest(item) for number, item in enumerate(private.item_ids) if item in pictures}
    if dropped == before and wanted == _digests(folder / "public" / "pictures.parquet"):
        return read_summary(folder)
    return replace_pictures(folder, pictures, dropped)


def _digests(index: Path) -> dict[int, str]:
    if not index.exists():
        return {}
    columns = read_columns(index, ("item", "sha256"))
    return dict(zip(columns["item"].to_pylist(), columns["sha256"].to_pylist(), strict=True))


# ---------------------------------------------------------------------------------------------------- what the user names


def resolve(names: Sequence[str], root: Path) -> dict[str, list[Path]]:
    """The categories that ``names`` mean (domains, categories, groups of them), with the folders of their domains."""
    from harness.data.release import GROUPS
    from harness.values import nearest

    domains = {summary.name: (summary, _category(summary.path)) for summary in list_domains(root) if not summary.problem}
    found: dict[str, list[Path]] = {}
    for name in dict.fromkeys(each for word in names for each in GROUPS.get(word, (word,))):
        if name in domains:
            summary, category = domains[name]
            if not category:
                raise DataError(f"{summary.path} was not prepared from raw files, so nothing says where its pictures are")
            folders = [summary.path]
        else:
            category = name
            folders = [summary.path for summary, source in domains.values() if source == name and not summary.simulated]
            if not folders and name not in GROUPS["paper"]:
                raise DataError(
                    f"{name!r} is neither a domain in {root} nor a category.{nearest(name, [*domains, *GROUPS['paper'], *GROUPS])}"
                )
        known = found.setdefault(category, [])
        known += [folder for folder in folders if folder not in known]
    return found


def _category(folder: Path) -> str | None:
    """The category of the raw files that a domain was prepared from."""
    try:
        return read_private(folder).info["source"].get("category")
    except (DataError, KeyError, AttributeError):
        return None


def items_of(category: str, folders: Sequence[Path]) -> list[str]:
    """The items of all domains of a category."""
    if not folders:
        raise DataError(
            f"no domain is prepared from {category} yet, so nobody knows which of its items matter: run `harness data prepare data/raw"
            f" {category}` first (it needs no pictures, and this command puts them in), or name --all to fetch every item's picture"
        )
    return list(dict.fromkeys(item for folder in folders for item in read_private(folder).item_ids))
