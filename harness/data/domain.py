"""A domain on disk: what methods see (``public/``) and what only the harness sees (``private/``).

In: a ``SourceDomain`` (users, their item lists, items with their text), as importers, the preparation and the simulator
make it. Out: the folder of a domain, written whole or not at all, and functions that read and check it.

    public/   domain.json  users.parquet  items.parquet  [pictures.bin  pictures.parquet]
    private/  targets.parquet  items.parquet  users.parquet  private.json  [times.parquet  oracle.npz  planted.json]

Item number = rank of sha256(source id as UTF-8 text); user number likewise. Numbers in order of first appearance would
betray the targets: an item that a user was the first to have and that is missing in the public part leaves a gap.
Every row in ``public/`` stands in order of these numbers, pictures included.

The harness imports this module in its parent process: numpy, pyarrow and the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import PROTOCOL, TIME, ContractError, Domain, Ragged, integers, read_columns, write_json
from harness.data import expected
from harness.data.source import DataError, DomainExists, DomainSummary, SourceDomain, hash_order, ragged
from harness.data.split import Cuts, counts_of
from harness.data.write import TIMES, public_digest, set_modes, targets_digest, write_parts, write_pictures
from harness.paths import Paths

__all__ = [
    "DataError",
    "DomainExists",
    "DomainSummary",
    "Private",
    "SourceDomain",
    "data_root",
    "list_domains",
    "ragged",
    "read_private",
    "read_summary",
    "replace_pictures",
    "validate_domain",
    "write_domain",
]

PUBLIC_FILES = {"domain.json", "users.parquet", "items.parquet", "pictures.bin", "pictures.parquet"}
TIME_SUFFIX = "_time"
"""What the name of a ``time-v1`` domain ends in, unless somebody chose another name."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Private:
    """The private part: the test target of each of ``users`` (``loo-v1``: row u = user u), and the source ids."""

    path: Path
    targets: np.ndarray
    times: np.ndarray | None
    info: dict[str, Any]
    users: np.ndarray

    @functools.cached_property
    def user_ids(self) -> list[str]:
        return _column(self.path / "users.parquet", "source_id")

    @functools.cached_property
    def item_ids(self) -> list[str]:
        return _column(self.path / "items.parquet", "source_id")

    @functools.cached_property
    def history_times(self) -> Ragged | None:
        """The times of every user's training, validation and test (``loo-v1``: x_1..x_n), if the source had any."""
        if not (self.path / TIMES).exists():
            return None
        lists = read_columns(self.path / TIMES, ("times",))["times"].combine_chunks()
        offsets = integers(lists.offsets).astype(np.int64)
        return Ragged(integers(lists.flatten()), offsets - offsets[0])

    @functools.cached_property
    def oracle(self) -> np.ndarray | None:
        """Of a simulated domain: the 50 most probable next items of each of ``users`` by the generator, [U, 50], else None."""
        if not (self.path / "oracle.npz").exists():
            return None
        with np.load(self.path / "oracle.npz", allow_pickle=False) as archive:
            return np.asarray(archive["items"][np.argsort(archive["users"])])


def data_root() -> Path:
    """The folder of the domains: the environment variable HARNESS_DATA, else ``data/domains`` of the project."""
    return Paths.default().data


# -------------------------------------------------------------------------------------------------------- writing


def write_domain(
    folder: Path,
    source: SourceDomain,
    *,
    name: str | None = None,
    pictures: Mapping[str, bytes | Path] | None = None,
    simulated: bool = False,
    oracle: np.ndarray | None = None,
    planted: dict[str, Any] | None = None,
    overwrite: bool = False,
    cuts: Cuts | None = None,
) -> DomainSummary:
    """Number, split and write a domain to ``folder`` in one step: a reader sees all of it or nothing.

    The protocol is ``loo-v1``; with ``cuts`` it is ``time-v1``, and users need only one interaction.

    ``name`` defaults to the folder's. Users with fewer than three interactions are left out and counted. ``pictures``:
    source item id -> encoded bytes or a file. ``oracle``: [users of ``source``, 50] rows of ``source.item_ids``, -1 = none.
    ``planted``: what the simulator planted, for ``private/planted.json``.

    What is prepared from the official release must have the counts of its card (``expected.py``); a DataError names the
    difference and its likely cause, and nothing is written. A ``time-v1`` domain NAME_time is held to the card NAME before it is cut.

    An identical domain that is there already stays (``created`` is False); another one raises DomainExists unless
    ``overwrite``. Two processes at once: the second waits for the first and then finds its domain.
    """
    folder = Path(folder)
    name = name or folder.name
    if not _NAME.fullmatch(name):
        raise DataError(f"{name!r} is no name for a domain: use small letters, digits and _, at most 40 characters")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            summary = write_parts(temporary, name, source, pictures, simulated, oracle, planted, cuts)
            if str(source.source.get("format", "")).startswith(expected.OFFICIAL) and not simulated:
                whole = {**summary.counts, "interactions": len(source.sequences.values)} if cuts else summary.counts
                expected.require(name.removesuffix(TIME_SUFFIX) if cuts else name, whole, lambda: _facts(source))
            return _put_in_place(temporary, folder, summary, overwrite)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _facts(source: SourceDomain) -> expected.Facts:
    return expected.facts_of(source.sequences, source.user_ids, source.item_ids, source.dropped)


def replace_pictures(folder: Path, pictures: Mapping[str, bytes | Path], dropped: dict[str, int]) -> DomainSummary:
    """The same domain with these pictures, in one step, and with ``dropped`` as what was left out on the way.

    What comes out is what ``write_domain`` would make of the same source and these pictures. All other files are kept (linked).
    """
    folder = Path(folder)
    written_anew = {"pictures.bin", "pictures.parquet", "domain.json", "private.json"}
    with _locked(folder):
        summary, private = read_summary(folder), read_private(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            for part in ("public", "private"):
                (temporary / part).mkdir(mode=0o700)
                for file in (folder / part).iterdir():
                    if file.name not in written_anew:
                        _link(file, temporary / part / file.name)
            if pictures:
                write_pictures(temporary / "public", private.item_ids, pictures)
            digest = public_digest(temporary / "public")
            head = json.loads((folder / "public" / "domain.json").read_text())
            write_json(temporary / "public" / "domain.json", {**head, "digest": digest})
            write_json(temporary / "private" / "private.json", {**private.info, "public_digest": digest, "dropped": dropped})
            set_modes(temporary)
            return _put_in_place(temporary, folder, replace(summary, digest=digest), overwrite=True)
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror} while its pictures were written; it is as it was") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # a file system without hard links
        shutil.copy2(file, to)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer a domain. Who holds the lock also clears what a killed writer left behind."""
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


def _put_in_place(temporary: Path, folder: Path, summary: DomainSummary, overwrite: bool) -> DomainSummary:
    """Rename the finished folder to its place. ``_locked`` is held."""
    if folder.exists():
        if _same(temporary, folder):
            for name in ("private.json", TIMES):  # where it came from last
                if (temporary / "private" / name).exists():
                    os.replace(temporary / "private" / name, folder / "private" / name)
            return replace(summary, path=folder)
        if not overwrite:
            raise DomainExists(
                f"{folder} holds another domain already. Give the new one another name, or replace the old one (--replace); "
                "records of the old one keep their digest"
            )
        _exchange(temporary, folder)
    else:
        os.rename(temporary, folder)
    return replace(summary, path=folder, created=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders. Linux does it in one step, so that a kill loses neither; elsewhere it takes three renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if hasattr(libc, "renameat2") and libc.renameat2(current, os.fsencode(one), current, os.fsencode(other), exchange) == 0:
        return
    aside = one.with_name(one.name + ".old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def _same(new: Path, old: Path) -> bool:
    """The same name, content and targets. Where it came from may differ."""
    try:
        heads = [json.loads((folder / "public" / "domain.json").read_text()) for folder in (new, old)]
        hidden = [json.loads((folder / "private" / "private.json").read_text()) for folder in (new, old)]
        keys = [(info["digest"], info["ids_digest"]) for info in hidden]
        oracles = [file.read_bytes() if (file := folder / "private" / "oracle.npz").exists() else b"" for folder in (new, old)]
    except (OSError, ValueError, KeyError):
        return False
    return heads[0] == heads[1] and keys[0] == keys[1] and oracles[0] == oracles[1]


# -------------------------------------------------------------------------------------------------------- reading


def read_private(folder: Path) -> Private:
    """The private part of the domain at ``folder``. Raises DataError if it is missing or belongs to other public data."""
    private = Path(folder) / "private"
    try:
        info = json.loads((private / "private.json").read_text())
        table = read_columns(private / "targets.parquet", ("user", "target", "time"))
        head = json.loads((Path(folder) / "public" / "domain.json").read_text())
        digest = head["digest"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{private}: not the private part of a domain ({error}); import or simulate the domain again") from error
    if info.get("public_digest") != digest:
        raise DataError(f"{private / 'private.json'}: these targets belong to other public data; import or simulate the domain again")
    users = integers(table["user"])
    if head.get("protocol") != TIME and not np.array_equal(users, np.arange(table.num_rows)):
        raise DataError(f"{private / 'targets.parquet'}: its users are not 0..{table.num_rows - 1} in order")
    times = None if table["time"].null_count else integers(table["time"])
    return Private(private, integers(table["target"]).astype(np.int32), times, info, users)


def read_summary(folder: Path) -> DomainSummary:
    """``domain.json`` of the domain at ``folder``, without reading its tables."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "public" / "domain.json").read_text())
        counts = {key: int(value) for key, value in info["counts"].items()}
        protocol = str(info.get("protocol", PROTOCOL))
        known = (info["name"], folder, info["digest"], counts, info["tie_rate"], info["simulated"], info["release"])
        return DomainSummary(*known, protocol=protocol)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: not a domain ({type(error).__name__}: {error}); `harness data import` makes one") from error


def list_domains(root: Path | None = None) -> list[DomainSummary]:
    """All domains under ``root`` by name; one that cannot be read comes with its ``problem``."""
    root = Path(root or data_root())
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            found.append(read_summary(folder))
        except DataError as error:
            found.append(DomainSummary(folder.name, folder, problem=str(error)))
    return found


def validate_domain(folder: Path) -> DomainSummary:
    """Check everything that a domain promises: files, order, ranges, digests, modes. Raises DataError naming what is wrong."""
    folder = Path(folder)
    summary = read_summary(folder)
    public, private = folder / "public", folder / "private"

    def require(right: bool, message: str) -> None:
        if not right:
            raise DataError(f"{message}; import or simulate the domain again")

    try:
        domain = Domain.read(public)
    except ContractError as error:
        raise DataError(str(error)) from error
    strange = {file.name for file in public.iterdir()} - PUBLIC_FILES
    require(not strange, f"{public}: {sorted(strange)} do not belong into a public part")
    numbers = integers(domain.items["item"])
    in_order = np.array_equal(numbers, np.arange(domain.n_items))
    require(in_order, f"{public / 'items.parquet'}: its items are not 0..{domain.n_items - 1} in order")
    users, tested = domain.n_users, domain.test_users
    counts = counts_of(domain.protocol, domain.train, domain.window, len(tested), domain.n_items)
    require(summary.counts == counts, f"{public / 'domain.json'}: counts {summary.counts}, the tables hold {counts}")
    if domain.protocol == PROTOCOL:
        require(bool((domain.train.lengths > 0).all()), f"{public / 'users.parquet'}: a user has no training item")
    _check_pictures(public, domain.n_items, require)
    require(public_digest(public) == summary.digest, f"{public}: its content does not have the digest in domain.json")

    hidden = read_private(folder)
    right = np.array_equal(hidden.users, tested)
    require(right, f"{private / 'targets.parquet'}: {len(hidden.targets)} targets for {len(tested)} test users")
    inside = bool(((hidden.targets >= 0) & (hidden.targets < domain.n_items)).all())
    require(inside, f"{private / 'targets.parquet'}: a target out of range")
    require(targets_digest(hidden.targets) == hidden.info.get("digest"), f"{private / 'targets.parquet'}: not the digest in private.json")
    if (times := hidden.history_times) is not None:
        lengths = domain.train.lengths + domain.window.lengths
        lengths[tested] += 1
        whole = np.array_equal(times.lengths, lengths)
        right = whole and hidden.times is not None and np.array_equal(times.values[times.offsets[1:][tested] - 1], hidden.times)
        require(right, f"{private / TIMES}: not the times of these histories")
    for what, ids, count in (("users", hidden.user_ids, users), ("items", hidden.item_ids, domain.n_items)):
        right = len(ids) == count and np.array_equal(hash_order(ids, what[:-1])[0], np.arange(count))
        require(right, f"{private / what}.parquet: its source ids are not in order of their hash")
    mode = private.stat().st_mode & 0o777
    require(mode == 0o700, f"{private} has the mode {mode:o}, not 700")
    return summary


def _check_pictures(public: Path, n_items: int, require: Any) -> None:
    pack_there, index_there = ((public / name).exists() for name in ("pictures.bin", "pictures.parquet"))
    require(pack_there == index_there, f"{public}: of pictures.bin and pictures.parquet one is missing")
    if not index_there:
        return
    index = read_columns(public / "pictures.parquet").to_pydict()
    inside = not index["item"] or (index["item"][0] >= 0 and index["item"][-1] < n_items)
    require(inside, f"{public / 'pictures.parquet'}: an item outside 0..{n_items - 1}")
    offset = 0
    with open(public / "pictures.bin", "rb") as pack:
        for row, item in enumerate(index["item"]):
            in_order = index["offset"][row] == offset and (row == 0 or item > index["item"][row - 1])
            require(in_order, f"{public / 'pictures.parquet'} row {row}: pictures are not packed in order of the item number")
            data = pack.read(index["length"][row])
            intact = hashlib.sha256(data).hexdigest() == index["sha256"][row]
            require(intact, f"{public / 'pictures.bin'}: the picture of item {item} is damaged")
            offset += index["length"][row]
        require(not pack.read(1), f"{public / 'pictures.bin'}: bytes behind the last picture")


def _column(path: Path, name: str) -> list[str]:
    return list(read_columns(path, (name,))[name].to_pylist())
