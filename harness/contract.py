"""The contract between the harness and a method: files in, files out.

A method is a program. The harness starts it as ``python PROGRAM job.json``; it reads the job and the public part of
the domains named there, and writes ``predictions.npz``, ``valid_predictions.npz`` and ``meta.json`` into the job's
output folder. It never sees a test target, and it never scores itself: only the harness does.

This is the one module of the harness that a method can import. It needs numpy, pyarrow and the standard library, and
it reads what methods write as hostile input (``read_predictions``, ``read_meta``).

Two protocols say what is learned from and what is predicted. Each stands here once, so that no method has to write it again
(``Domain.training_rows``, ``valid_inputs``, ``test_inputs``).

``loo-v1``, leave one out, for a user's history x_1..x_n:

=============  =======================  =========  ==========================================================
part           input                    target     use
=============  =======================  =========  ==========================================================
training rows  x_1..x_(i-1)             x_i        2 <= i <= n-2: every fit, count, tokenizer and gradient
validation     x_1..x_(n-2)             x_(n-1)    stopping and selection only; no refit on it
test           x_1..x_(n-1)             hidden     the predictions
=============  =======================  =========  ==========================================================

``time-v1``, one split for all by two moments, valid cut < test cut; an event at a cut's very moment lies after it:

=============  ==========================================  ======================================  =======================
part           input                                       target                                  users
=============  ==========================================  ======================================  =======================
training rows  the user's events before the target         each event before the valid cut but     all with two such events
                                                           the user's first
validation     all of the user's events before the         the user's first event at or after it   ``valid_users``
               valid cut                                   and before the test cut
test           all of the user's events before the test    hidden: the user's first event at or    ``test_users``
               cut, so those between the cuts as well      after the test cut
=============  ==========================================  ======================================  =======================

What use is allowed of each part is the same. Under ``time-v1`` an input may be empty (a user who was not there before), and the
items include some that nobody had before a cut.

Inputs are cut to the last 20 items (``HISTORY``).

Shape legend: U users, V rows of validation or test, I items, R training rows, L history length, K list length. Under ``loo-v1``
all users are validated and tested: V = U, row u = user u.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import stat
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

SCHEMA = 1
PROTOCOL = "loo-v1"
"""The protocol of whatever does not name one."""
TIME = "time-v1"
PROTOCOLS = (PROTOCOL, TIME)
K = 50
HISTORY = 20
EXIT_SKIPPED = 77
"""Exit status of a method whose needs the job does not meet (the number that automake and others use for "skipped")."""

PREDICTIONS = "predictions.npz"
VALID_PREDICTIONS = "valid_predictions.npz"
META = "meta.json"
PROGRESS = "progress.jsonl"
SKIPPED = "skipped.txt"
MAX_META_BYTES = 1 << 20
MAX_REASON_BYTES = 4096

STOPPED_BY = ("patience", "budget", "epochs", "closed form", "not trained")


class ContractError(ValueError):
    """A job or a domain that does not follow the contract. The message names the file and the mend."""


class InvalidOutput(ValueError):
    """A method's output that does not follow the contract. Never mended: the run gets the status ``invalid_output``."""


# ---------------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class Budget:
    """What a run may use: training seconds, memory in bytes, disk in bytes, CPU threads.

    ``seconds`` is for the method to keep (``Job.remaining``); the harness ends the process at ``deadline`` seconds.
    """

    seconds: float
    deadline: float
    memory: int
    disk: int
    threads: int


@dataclass(frozen=True)
class DomainRef:
    """A domain of a job: its name and the folder of its public part."""

    name: str
    path: Path


@dataclass(frozen=True)
class Job:
    """One stage of one run, as the harness hands it to the method (``job.json``).

    ``configuration`` holds the resolved hyper-parameters. ``inputs`` maps earlier stages to their finished, read-only
    output folders. ``output`` is where results go, ``cache`` is shared by all runs of this method, ``scratch`` is
    emptied before every start, ``checkpoint`` survives an interrupted start of this stage and is deleted when it ends.
    ``device`` is ``cpu`` or ``cuda``; ``precision`` is ``fp32`` or ``bf16``.
    """

    run_id: str
    stage: str
    method: str
    configuration: dict[str, Any]
    domains: tuple[DomainRef, ...]
    inputs: dict[str, Path]
    output: Path
    cache: Path
    scratch: Path
    checkpoint: Path
    seed: int
    budget: Budget
    device: str = "cpu"
    precision: str = "fp32"
    k: int = K
    protocol: str = PROTOCOL
    schema: int = SCHEMA
    started: float = field(default_factory=time.monotonic, compare=False)

    @property
    def domain(self) -> Domain:
        """The only domain of the job; pre-training stages, which have several, use ``domains``."""
        if len(self.domains) != 1:
            names = ", ".join(d.name for d in self.domains)
            raise ContractError(f"stage {self.stage!r} has {len(self.domains)} domains ({names}); loop over job.domains instead")
        return Domain.read(self.domains[0].path)

    @property
    def remaining(self) -> float:
        """Seconds of the training budget that are left (negative when it is spent)."""
        return self.budget.seconds - (time.monotonic() - self.started)

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "started"}
        out["domains"] = [{"name": d.name, "path": str(d.path)} for d in self.domains]
        out["inputs"] = {name: str(path) for name, path in self.inputs.items()}
        out["budget"] = dataclasses.asdict(self.budget)
        return {key: str(value) if isinstance(value, Path) else value for key, value in out.items()}

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path | str) -> Job:
        """Read a ``job.json``. Raises ContractError with the file and the key that is wrong."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ContractError(f"{path}: cannot read the job: {error}") from error
        if raw.get("schema") != SCHEMA:
            raise ContractError(f"{path}: schema {raw.get('schema')!r}, but this contract is version {SCHEMA}")
        known = {f.name for f in dataclasses.fields(cls)} - {"started"}
        if unknown := set(raw) - known:
            raise ContractError(f"{path}: unknown keys {sorted(unknown)}; known are {sorted(known)}")
        if (protocol := raw.get("protocol", PROTOCOL)) not in PROTOCOLS:
            raise ContractError(f"{path}: protocol {protocol!r}, this contract knows {', '.join(PROTOCOLS)}")
        try:
            raw["domains"] = tuple(DomainRef(d["name"], Path(d["path"])) for d in raw["domains"])
            raw["inputs"] = {name: Path(p) for name, p in raw["inputs"].items()}
            raw["budget"] = Budget(**raw["budget"])
            for key in ("output", "cache", "scratch", "checkpoint"):
                raw[key] = Path(raw[key])
            return cls(**raw)
        except (KeyError, TypeError) as error:
            raise ContractError(f"{path}: {error}") from error


def main(fit: Callable[[Job], None]) -> None:
    """The entry of a method's program: ``if __name__ == "__main__": main(fit)``.

    Reads the job named on the command line and calls ``fit(job)``. An exception ends the process with its traceback
    in the log and exit status 1, which the harness records as a failed run.
    """
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} JOB_JSON   (harness run and harness check start methods)")
    fit(Job.read(sys.argv[1]))


def skip(job: Job, reason: str) -> None:
    """End the run as *skipped*: a need of the method that the job does not meet (a picture, a GPU, item text)."""
    (job.output / SKIPPED).write_text(reason[:MAX_REASON_BYTES])
    sys.exit(EXIT_SKIPPED)


# ------------------------------------------------------------------------------------------------------- the domain


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths in two arrays: list i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def last(self, length: int) -> Ragged:
        """The last ``length`` values of every list."""
        kept = np.minimum(self.lengths, length)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        starts = self.offsets[1:] - kept
        index = np.repeat(starts - offsets[:-1], kept) + np.arange(offsets[-1])
        return Ragged(self.values[index], offsets)

    def append(self, column: np.ndarray) -> Ragged:
        """One value more at the end of every list."""
        offsets = self.offsets + np.arange(len(self.offsets))
        values = np.empty(offsets[-1], self.values.dtype)
        ends = offsets[1:] - 1
        mask = np.ones(len(values), bool)
        mask[ends] = False
        values[mask], values[ends] = self.values, column
        return Ragged(values, offsets)

    def join(self, other: Ragged) -> Ragged:
        """Every list with the list of ``other`` behind it."""
        offsets = self.offsets + other.offsets
        values = np.empty(offsets[-1], self.values.dtype)
        first = np.zeros(len(values), bool)
        first[np.repeat(other.offsets[:-1], self.lengths) + np.arange(len(self.values))] = True
        values[first], values[~first] = self.values, other.values
        return Ragged(values, offsets)

    def filled(self) -> Ragged:
        """The lists that are not empty, in their order."""
        return self.take(np.flatnonzero(self.lengths))

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists ``rows``, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[index], offsets)

    def padded(self, length: int = HISTORY, *, pad: int = -1, left: bool = False) -> np.ndarray:
        """The last ``length`` values of every list as a matrix [lists, length], filled with ``pad`` at one side."""
        cut = self.last(length)
        matrix = np.full((len(self), length), pad, self.values.dtype)
        rows = np.repeat(np.arange(len(self)), cut.lengths)
        columns = np.arange(len(cut.values)) - np.repeat(cut.offsets[:-1], cut.lengths)
        if left:
            columns += np.repeat(length - cut.lengths, cut.lengths)
        matrix[rows, columns] = cut.values
        return matrix


def read_columns(path: Path, columns: tuple[str, ...] = ()) -> Any:
    """Columns of a parquet file (all without ``columns``) as a pyarrow table. Raises KeyError where one is missing.

    Not ``pq.read_table``: that imports pandas if it is installed, which is most of the start of a small method.
    """
    with pq.ParquetFile(path) as file:
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise KeyError(f"{path.name} has no column {missing[0]!r}")
        return file.read(columns=list(columns) or None)


def integers(column: Any) -> np.ndarray:
    """A pyarrow column of whole numbers without nulls as an array. pyarrow's own conversions import pandas, too."""
    if column.null_count or not str(column.type).startswith("int"):
        raise ContractError(f"a column of {column.type} with {column.null_count} nulls where whole numbers without nulls belong")
    chunks = getattr(column, "chunks", [column])
    types = [np.dtype(f"i{chunk.type.bit_width // 8}") for chunk in chunks]
    parts = [
        np.frombuffer(chunk.buffers()[1], kind, len(chunk), chunk.offset * kind.itemsize)
        for chunk, kind in zip(chunks, types, strict=True)
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _lists(column: Any) -> Ragged:
    """A pyarrow column of lists of item numbers."""
    try:
        lists = column.combine_chunks()
        offsets = integers(lists.offsets).astype(np.int64)
    except AttributeError:
        raise ContractError(f"a column of {column.type} where lists belong; prepare the domain again") from None
    return Ragged(integers(lists.flatten()).astype(np.int32), offsets - offsets[0])


@dataclass(frozen=True)
class Domain:
    """The public part of a domain: all that a method may know.

    ``train`` holds the training part of every user [U lists] (``loo-v1``: x_1..x_(n-2)), ``valid`` the validation target of each of
    ``valid_users`` [V] (``loo-v1``: x_(n-1) of every user). Users and items are numbered by a hash of their source ids, so that a
    number says nothing about when something first appeared. ``_window`` and ``_tested`` are None under ``loo-v1``.
    """

    path: Path
    name: str
    n_users: int
    n_items: int
    train: Ragged
    valid: np.ndarray
    info: dict[str, Any]
    _window: Ragged | None = None
    _tested: np.ndarray | None = None

    @classmethod
    def read(cls, path: Path | str) -> Domain:
        """Read ``domain.json`` and ``users.parquet``. Raises ContractError with the file and what is wrong in it."""
        path = Path(path)
        try:
            info = json.loads((path / "domain.json").read_text())
            table = read_columns(path / "users.parquet", ("user", "train", "valid"))
            tested = read_columns(path / "users.parquet", ("test",)) if info.get("protocol") == TIME else None
        except (OSError, ValueError, KeyError) as error:
            raise ContractError(f"{path}: not the public part of a domain: {error}") from error
        if info.get("protocol") not in PROTOCOLS:
            raise ContractError(f"{path / 'domain.json'}: protocol {info.get('protocol')!r}, this contract knows {', '.join(PROTOCOLS)}")
        train, window, tested_U = _lists(table["train"]), None, None
        if tested is None:
            valid = integers(table["valid"]).astype(np.int32)
            in_step = len(valid) == int(info["counts"]["users"])
        else:
            window, tested_U = _lists(table["valid"]), integers(tested["test"]).astype(bool)
            valid = window.values[window.offsets[:-1][window.lengths > 0]]
            in_step = len(window) == int(info["counts"]["users"])
        n_users, n_items = int(info["counts"]["users"]), int(info["counts"]["items"])
        if not in_step or not np.array_equal(integers(table["user"]), np.arange(n_users)):
            raise ContractError(f"{path / 'users.parquet'}: its users are not 0..{n_users - 1} in order; prepare the domain again")
        for values in (train.values, valid if window is None else window.values):
            if len(values) and (values.min() < 0 or values.max() >= n_items):
                raise ContractError(f"{path / 'users.parquet'}: item numbers outside 0..{n_items - 1}; prepare the domain again")
        return cls(path, info["name"], n_users, n_items, train, valid, info, window, tested_U)

    @property
    def protocol(self) -> str:
        return str(self.info.get("protocol", PROTOCOL))

    @functools.cached_property
    def window(self) -> Ragged:
        """What lies between training and test [U lists]: events of validation, and part of the test inputs. The first is the target."""
        return Ragged(self.valid, np.arange(self.n_users + 1)) if self._window is None else self._window

    @functools.cached_property
    def valid_users(self) -> np.ndarray:
        """The numbers of the users that are validated, ascending [V]: one row each in ``valid``, ``valid_inputs`` and their lists."""
        return np.flatnonzero(self.window.lengths)

    @functools.cached_property
    def test_users(self) -> np.ndarray:
        """The numbers of the users to predict for, ascending [V]: one row each in ``test_inputs`` and the lists."""
        return np.arange(self.n_users) if self._tested is None else np.flatnonzero(self._tested)

    @functools.cached_property
    def items(self) -> Any:
        """``items.parquet`` as a pyarrow table, row i = item i: ``item``, ``text`` and the parts of the text."""
        return read_columns(self.path / "items.parquet")

    @property
    def texts(self) -> list[str]:
        """The text of every item; an empty string where the source has none."""
        return [text or "" for text in self.items["text"].to_pylist()]

    @functools.cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.path)

    def training_rows(self, history: int = HISTORY) -> tuple[Ragged, np.ndarray]:
        """Every item of a training part but the first, from its prefix: inputs (R lists, cut to ``history``) and targets [R].

        Rows are ordered by user, then by i.
        """
        lengths = self.train.lengths
        rows_per_user = np.maximum(lengths - 1, 0)
        first = np.repeat(self.train.offsets[:-1], rows_per_user)
        before = np.concatenate([[0], np.cumsum(rows_per_user)])[:-1]
        position = np.arange(rows_per_user.sum()) - np.repeat(before, rows_per_user) + 1
        kept = np.minimum(position, history)
        offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        index = np.repeat(first + position - kept - offsets[:-1], kept) + np.arange(offsets[-1])
        return Ragged(self.train.values[index], offsets), self.train.values[first + position]

    def valid_inputs(self, history: int = HISTORY) -> Ragged:
        """The training part of each of ``valid_users``, cut to the last ``history`` items. The target is ``valid``."""
        inputs = self.train.last(history)
        return inputs if self._window is None else inputs.take(self.valid_users)

    def test_inputs(self, history: int = HISTORY) -> Ragged:
        """All that each of ``test_users`` did before the test, cut to the last ``history`` items. The target is hidden."""
        if self._window is None:
            return self.train.append(self.valid).last(history)
        return self.train.join(self._window).last(history).take(self.test_users)

    def lists(self, inputs: Ragged, k: int, rank: Callable[[], np.ndarray]) -> np.ndarray:
        """Lists for all ``inputs`` [V, K] of a method that needs an item to start from: what ``rank`` gives for those that are not empty
        [N, K], in their order, and ``popular`` for the others (``time-v1`` has such, and ``rank`` is not called if there is nothing else).
        """
        there = np.flatnonzero(inputs.lengths)
        items_VK = np.tile(self.popular(k), (len(inputs), 1))
        if len(there):
            items_VK[there] = rank()
        return items_VK

    @functools.cached_property
    def by_popularity(self) -> np.ndarray:
        """All items, those with the most training interactions first [I], ties to the smaller number."""
        return np.argsort(-np.bincount(self.train.values, minlength=self.n_items), kind="stable")

    def popular(self, k: int) -> np.ndarray:
        """The first ``k`` by popularity [K], -1 where there are fewer items.

        What a method that needs an input gives to users who have none (``time-v1``).
        """
        list_K = np.full(k, -1, np.int32)
        list_K[: min(k, self.n_items)] = self.by_popularity[:k]
        return list_K


class Pictures:
    """The product pictures of a domain: ``pictures.bin`` and its index ``pictures.parquet`` (item, offset, length, sha256).

    ``pictures[item]`` gives the encoded bytes (JPEG, PNG, ...) or None for an item without picture; ``pictures.many(items)`` gives
    those of a batch, and a cold disk gets all of its requests at once.

    The file stays open, and reading never moves a position in it: threads and forked workers share it, and a pickled copy (workers
    that are spawned) opens it again. The index is two arrays, 12 bytes an item: 6 MB for 500,000. Raises ContractError for a
    pack that is missing or shorter than its index says.
    """

    _file = -1

    def __init__(self, public: Path):
        self._public = Path(public)
        self._offset_I = np.empty(0, np.int64)
        self._length_I = np.empty(0, np.int32)
        """-1: no picture."""
        self._count = 0
        index_path, pack_path = self._public / "pictures.parquet", self._public / "pictures.bin"
        if not index_path.exists():
            return
        try:
            index = read_columns(index_path, ("item", "offset", "length"))
            self._file = os.open(pack_path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError, KeyError) as error:
            raise ContractError(f"{self._public}: its pictures cannot be read ({error}); prepare the domain again") from error
        item_N, offset_N, length_N = (integers(index[name]) for name in ("item", "offset", "length"))
        if len(item_N) == 0:
            return
        size = os.fstat(self._file).st_size
        if item_N.min() < 0 or offset_N.min() < 0 or length_N.min() < 0 or (offset_N + length_N).max() > size:
            raise ContractError(f"{pack_path} has {size:,} bytes and lacks some that its index names; fetch the pictures again")
        if hasattr(os, "posix_fadvise"):  # no reading ahead: the next picture is somewhere else
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._offset_I = np.zeros(int(item_N.max()) + 1, np.int64)
        self._length_I = np.full(len(self._offset_I), -1, np.int32)
        self._offset_I[item_N], self._length_I[item_N] = offset_N, length_N
        self._count = int((self._length_I >= 0).sum())

    def __reduce__(self) -> tuple[type[Pictures], tuple[Path]]:
        return Pictures, (self._public,)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, item: int) -> bool:
        return 0 <= item < len(self._length_I) and self._length_I.item(item) >= 0

    def __getitem__(self, item: int) -> bytes | None:
        if not 0 <= item < len(self._length_I) or (length := self._length_I.item(item)) < 0:
            return None
        data = os.pread(self._file, length, self._offset_I.item(item))
        if len(data) != length:
            raise ContractError(f"{self._public / 'pictures.bin'} ends within the picture of item {item}; fetch the pictures again")
        return data

    def many(self, items: Iterable[int]) -> list[bytes | None]:
        """The pictures of ``items``, in their order. They are announced to the kernel and read in the order of the file."""
        wanted = list(items)
        there = [item for item in dict.fromkeys(wanted) if item in self]
        there.sort(key=self._offset_I.item)
        if hasattr(os, "posix_fadvise"):
            for item in there:
                os.posix_fadvise(self._file, self._offset_I.item(item), self._length_I.item(item), os.POSIX_FADV_WILLNEED)
        read = {item: self[item] for item in there}
        return [read.get(item) for item in wanted]


# ------------------------------------------------------------------------------------------------------ the results


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent: a temporary file beside it, flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_predictions(job: Job, items_VK: np.ndarray, *, valid: bool = False) -> None:
    """Write the ranked lists, best first: row v is for the v-th of ``test_users`` (``loo-v1``: user v).

    ``items_VK`` is [V, K] int; -1 is a spent slot (an invalid beam, say) and may stand anywhere. ``valid=True`` writes
    the lists for the validation targets, row v for the v-th of ``valid_users``.
    """
    items_VK = np.ascontiguousarray(items_VK, dtype=np.int32)
    users_V = np.arange(len(items_VK), dtype=np.int32)
    if job.protocol != PROTOCOL:
        domain = job.domain
        users_V = (domain.valid_users if valid else domain.test_users).astype(np.int32)
        if len(users_V) != len(items_VK):
            whose = "domain.valid_users" if valid else "domain.test_users"
            raise ContractError(f"{len(items_VK)} lists for {len(users_V)} users; write one for each of {whose}, in order")
    path = job.output / (VALID_PREDICTIONS if valid else PREDICTIONS)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, users=users_V, items=items_VK)
    os.replace(temporary, path)


@dataclass
class Meta:
    """What a method says of its own run (``meta.json``); all fields may stay empty.

    ``timings``: seconds by part (``fit`` and ``predict`` feed the cost columns). ``parameters``: trained numbers.
    ``best_valid``: best validation NDCG@10. ``stopped_by``: one of STOPPED_BY. ``budget_bound``: training was still
    improving when the budget ended it. ``peak_device_bytes``: peak GPU memory. ``extra``: what is particular to the
    method (collision rate, invalid rate, beam width, encoder, ...); values are numbers, strings, booleans or null.
    """

    timings: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None
    steps: int | None = None
    epochs: int | None = None
    best_valid: float | None = None
    stopped_by: str | None = None
    budget_bound: bool = False
    peak_device_bytes: int | None = None
    precision: str | None = None
    attention: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, job: Job) -> None:
        write_json(job.output / META, dataclasses.asdict(self))


class Progress:
    """Live curves: appends lines ``{"time", "stage", "step", "of", "metrics"}`` to ``progress.jsonl``.

    >>> progress = Progress(job)
    >>> progress.log(step, of=steps, loss=loss, valid_ndcg_at_10=value)
    """

    def __init__(self, job: Job):
        self._stage = job.stage
        self._file = open(job.output / PROGRESS, "a", buffering=1)  # noqa: SIM115 (open for the life of the process)

    def log(self, step: int, of: int | None = None, **metrics: float) -> None:
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}
        line = {"time": round(time.time(), 3), "stage": self._stage, "step": int(step), "of": of, "metrics": finite}
        self._file.write(json.dumps(line) + "\n")


class Stopping:
    """The stopping rule of all methods: validation NDCG@10, patience 10 evaluations, best checkpoint kept.

    >>> stopping = Stopping(job)
    >>> for epoch in range(epochs):
    ...     train_one_epoch()
    ...     if stopping.improved(ndcg_at_10(rank_validation(), domain.valid)):
    ...         best = copy_of_weights()
    ...     if stopping.stop:
    ...         break
    """

    def __init__(self, job: Job, patience: int = 10):
        self._job, self._patience = job, patience
        self.best = -math.inf
        self.evaluations = 0
        self.best_evaluation = 0
        self.reason: str | None = None

    def improved(self, value: float) -> bool:
        """Take one validation value. True if it is the best so far: keep these weights."""
        self.evaluations += 1
        better = value > self.best
        if better:
            self.best, self.best_evaluation = value, self.evaluations
        return better

    @property
    def stop(self) -> bool:
        if self.evaluations - self.best_evaluation >= self._patience:
            self.reason = "patience"
        elif self._job.remaining <= 0:
            self.reason = "budget"
        return self.reason is not None

    @property
    def meta(self) -> dict[str, Any]:
        """The fields of Meta that follow from the rule; ``epochs`` when the loop ended by itself."""
        reason = self.reason or "epochs"
        best = self.best if math.isfinite(self.best) else None
        return {"best_valid": best, "stopped_by": reason, "budget_bound": reason == "budget"}


def ndcg_at_10(items_UK: np.ndarray, targets_U: np.ndarray) -> float:
    """Mean NDCG@10 of ranked lists against one target a user, for stopping. The result is scored by the harness."""
    hit_UK = np.asarray(items_UK)[:, :10] == np.asarray(targets_U)[:, None]
    discount_K = 1.0 / np.log2(np.arange(2, 2 + hit_UK.shape[1]))
    return float((hit_UK * discount_K).sum(1).mean()) if len(hit_UK) else 0.0


# ------------------------------------------------------------------------------------- reading what a method wrote


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes. Links, devices, FIFOs and longer files are refused."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InvalidOutput(f"{path.name} is missing") from None
    except OSError as error:
        raise InvalidOutput(f"{path.name} is not a regular file ({error.strerror})") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InvalidOutput(f"{path.name} is not a regular file")
        if status.st_nlink > 1:
            raise InvalidOutput(f"{path.name} is a hard link to another file")
        if status.st_size > limit:
            raise InvalidOutput(f"{path.name} has {status.st_size:,} bytes; at most {limit:,} are read")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InvalidOutput(f"{path.name} grew past {limit:,} bytes while it was read")
    return data


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], file: str) -> np.ndarray:
    """One integer array of a known shape out of an npz; the header is checked before anything is allocated."""
    try:
        info = archive.getinfo(name + ".npy")
    except KeyError:
        raise InvalidOutput(f"{file} has no array {name!r}") from None
    expected = math.prod(shape) * 8 + 4096
    if info.file_size > expected:
        raise InvalidOutput(f"{file}: {name!r} has {info.file_size:,} bytes, at most {expected:,} are right for shape {list(shape)}")
    try:
        data = archive.read(info)
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise InvalidOutput(f"{file}: {name!r} cannot be read as a plain array ({type(error).__name__}: {error})") from error
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise InvalidOutput(f"{file}: {name!r} has shape {list(getattr(array, 'shape', []))}, right is {list(shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidOutput(f"{file}: {name!r} has type {array.dtype}, right is an integer type")
    return array


def read_predictions(path: Path, users: int | np.ndarray, n_items: int, k: int = K) -> np.ndarray:
    """Read and check a method's predictions. Returns items [V, K] int32 in order of the user number.

    ``users``: for whom there must be a list, by their numbers, ascending; a count is users 0..count - 1.

    Raises InvalidOutput: a file that is not regular, too large, not an npz of two integer arrays; a user missing or
    repeated; a wrong shape; an item out of range or twice in one list. Nothing is mended.
    """
    name = path.name
    wanted_V = np.arange(users) if isinstance(users, int) else users
    n_rows = len(wanted_V)
    data = read_regular(path, n_rows * (k + 1) * 8 + (1 << 16))
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # zipfile raises many kinds for damaged headers
        raise InvalidOutput(f"{name} is not an npz archive ({error})") from error
    with archive:
        users_U = _read_array(archive, "users", (n_rows,), name)
        items_UK = _read_array(archive, "items", (n_rows, k), name)
    if not np.array_equal(np.sort(users_U), wanted_V):
        every = f"every user 0..{n_rows - 1}" if isinstance(users, int) else f"each of the {n_rows} users of this part"
        raise InvalidOutput(f"{name}: 'users' must hold {every} once")
    outside = (items_UK < -1) | (items_UK >= n_items)
    if outside.any():
        user, slot = np.argwhere(outside)[0]
        raise InvalidOutput(f"{name}: item {items_UK[user, slot]} (user {users_U[user]}, rank {slot + 1}) is outside -1..{n_items - 1}")
    ordered = np.sort(items_UK, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        user = int(np.argwhere(twice)[0, 0])
        raise InvalidOutput(f"{name}: item {ordered[user, 1:][twice[user]][0]} stands twice in the list of user {users_U[user]}")
    return np.ascontiguousarray(items_UK[np.argsort(users_U, kind="stable")], dtype=np.int32)


def read_meta(path: Path) -> Meta:
    """Read and check a method's ``meta.json``. Raises InvalidOutput."""
    try:
        raw = json.loads(read_regular(path, MAX_META_BYTES), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidOutput):
            raise
        raise InvalidOutput(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise InvalidOutput(f"{path.name} must hold an object")
    known = {f.name for f in dataclasses.fields(Meta)}
    if unknown := set(raw) - known:
        raise InvalidOutput(f"{path.name}: unknown keys {sorted(unknown)}; what is particular to the method goes into 'extra'")
    meta = Meta(**raw)
    checks: list[tuple[str, bool]] = [
        ("timings", isinstance(meta.timings, dict) and all(_is_number(v) and v >= 0 for v in meta.timings.values())),
        *(
            (name, getattr(meta, name) is None or _is_count(getattr(meta, name)))
            for name in ("parameters", "steps", "epochs", "peak_device_bytes")
        ),
        ("best_valid", meta.best_valid is None or _is_number(meta.best_valid)),
        ("stopped_by", meta.stopped_by is None or meta.stopped_by in STOPPED_BY),
        ("budget_bound", isinstance(meta.budget_bound, bool)),
        *((name, getattr(meta, name) is None or isinstance(getattr(meta, name), str)) for name in ("precision", "attention")),
        ("extra", isinstance(meta.extra, dict) and all(v is None or isinstance(v, str | bool | int | float) for v in meta.extra.values())),
    ]
    for name, right in checks:
        if not right:
            raise InvalidOutput(f"{path.name}: {name!r} has the wrong value {getattr(meta, name)!r:.200}")
    return meta


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_constant(name: str) -> Any:
    raise InvalidOutput(f"{META}: {name} is not a number")
