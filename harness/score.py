"""Blind scoring: a method's predictions and the private targets in, metrics and per-user ranks out.

Only the harness comes here. A method's files are read as hostile input (``contract.read_predictions``): what does not
follow the contract raises ``contract.InvalidOutput``, nothing is mended. Per-user ranks are the answers in another
form, so ``write_ranks`` keeps them unreadable to anyone but the harness's own user.

All users that the protocol tests are scored (``Domain.test_users``: under ``loo-v1`` everybody); every slice says how many users it
holds, and one without users holds no metric. Legend: U tested users.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import contract, metrics
from harness.record import Metric, Slice
from harness.values import digest

TARGETS = "targets.parquet"
ORACLE = "oracle.npz"
POPULARITY_BINS = ((0, 20), (20, 40), (40, 60), (60, 80), (80, 100), (100, None))
"""Training interactions of the target, from, to (exclusive): the bins of the papers' long-tail figures."""
HISTORY_BINS = ((2, 5), (6, 10), (11, 20), (21, None))
"""Items of the test input before it is cut to 20, from, to (inclusive). Under ``loo-v1`` a history has at least three, so an input two."""
SHORT_BINS = ((0, 0), (1, 1))
"""The bins below them, under ``time-v1`` only: users who were not there before the test cut, or once."""
SHARES = (("head", 50), ("mid", 80), ("tail", 100))
"""Percent of training interactions at which each group of items ends, most popular item first."""

Slices = dict[str, dict[str, Slice]]


@dataclass(frozen=True)
class Scored:
    """What scoring adds to a record (the first four fields have the record's names), and the ranks [U] behind it."""

    metrics: dict[str, Metric]
    valid_metrics: dict[str, float]
    slices: Slices
    behaviour: dict[str, float]
    ranks: np.ndarray


def score(predictions: Path, valid_predictions: Path | None, public: contract.Domain, private: Path) -> Scored:
    """Score one run. Raises InvalidOutput for what the method wrote, ContractError for a broken domain."""
    targets_U = read_targets(private, public)
    items_UK = contract.read_predictions(predictions, public.test_users, public.n_items)
    valid_metrics = {}
    if valid_predictions is not None:
        valid_UK = contract.read_predictions(valid_predictions, public.valid_users, public.n_items)
        valid_metrics = metrics.means(metrics.ranks(valid_UK, public.valid))
    ranks_U = metrics.ranks(items_UK, targets_U)
    coverage = metrics.coverage(items_UK, public.n_items)
    behaviour = {
        "invalid_slots": float((items_UK < 0).mean()),
        "empty_lists": float((items_UK < 0).all(1).mean()),
        metrics.COVERAGE: coverage.mean,
    }
    summary = {**metrics.summarise(ranks_U), metrics.COVERAGE: coverage}
    return Scored(summary, valid_metrics, slices(ranks_U, targets_U, public), behaviour, ranks_U)


def oracle_metrics(public: contract.Domain, private: Path) -> dict[str, float] | None:
    """The means that the generator's own ranking reaches on a simulated domain: an upper bound. None where there is none."""
    path = private / ORACLE
    if not path.exists():
        return None
    return {name: metric.mean for name, metric in score(path, None, public, private).metrics.items()}


# ---------------------------------------------------------------------------------------------------------- targets


def read_targets(private: Path, public: contract.Domain) -> np.ndarray:
    """The test target of every tested user [U] int32. Raises ContractError unless each of them has exactly one, and nobody else has."""
    path = private / TARGETS
    _check_pair(private / "private.json", public)
    try:
        table = contract.read_columns(path, ("user", "target"))
        users_U, targets_U = (contract.integers(table[name]).astype(np.int64) for name in ("user", "target"))
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from ValueError and KeyError
        raise contract.ContractError(f"{path}: cannot be read: {error}; prepare the domain again") from error
    if not np.array_equal(np.sort(users_U), public.test_users):
        everybody = len(public.test_users) == public.n_users
        whom = f"user of 0..{public.n_users - 1}" if everybody else f"of the {len(public.test_users):,} test users"
        raise contract.ContractError(
            f"{path}: {len(np.unique(users_U)):,} users in {len(users_U):,} rows, but it must hold each {whom} once;"
            " prepare the domain again"
        )
    if ((targets_U < 0) | (targets_U >= public.n_items)).any():
        raise contract.ContractError(f"{path}: targets outside 0..{public.n_items - 1}; prepare the domain again")
    return targets_U[np.argsort(users_U)].astype(np.int32)


def _check_pair(path: Path, public: contract.Domain) -> None:
    """Public and private part must come from one preparation: half of a new one would score without an error, and wrongly."""
    if not path.exists():
        return
    try:
        expected = json.loads(path.read_text()).get("public_digest")
    except (OSError, ValueError, AttributeError) as error:
        raise contract.ContractError(f"{path}: cannot be read: {error}; prepare the domain again") from error
    if expected != public.info.get("digest"):
        raise contract.ContractError(f"{path}: belongs to another public part than {public.path}; prepare the domain again")


def targets_digest(targets_U: np.ndarray) -> str:
    """SHA-256 of the targets in order of the user number."""
    return hashlib.sha256(np.ascontiguousarray(targets_U, "<i4").tobytes()).hexdigest()


@functools.cache
def _source_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def score_key(fit_key: str, targets: str, protocol: str = contract.PROTOCOL) -> str:
    """What forces scoring again, which costs no training: the run, the definitions of metrics and slices, the targets' digest."""
    source = {"metrics": metrics.source_hash(), "score": _source_hash()}
    return digest({"fit": fit_key, "source": source, "protocol": protocol, "targets": targets})


# ----------------------------------------------------------------------------------------------------------- slices


def slices(ranks_U: np.ndarray, targets_U: np.ndarray, public: contract.Domain) -> Slices:
    """Metrics by popularity of the target (two ways), warm and cold targets, and length of the test input.

    Popularity counts training interactions only: what a method could have seen of the target.
    """
    counts_I = np.bincount(public.train.values, minlength=public.n_items)
    popularity_U = counts_I[targets_U]
    inputs_U = (public.train.lengths + public.window.lengths)[public.test_users]
    bins: Sequence[tuple[int, int | None]] = HISTORY_BINS if public.protocol == contract.PROTOCOL else (*SHORT_BINS, *HISTORY_BINS)
    if len(inputs_U) and inputs_U.min() < bins[0][0]:
        raise contract.ContractError(f"{public.path}: a user with fewer than three interactions; prepare the domain again")
    share_U = popularity_share(counts_I)[targets_U]
    members = {
        "target_popularity": {
            f"[{low},{'inf' if high is None else high})": _between(popularity_U, low, high) for low, high in POPULARITY_BINS
        },
        "popularity_share": {name: share_U == group for group, (name, _) in enumerate(SHARES)},
        "warm_cold": {"warm": popularity_U > 0, "cold": popularity_U == 0},
        "history_length": {_bin_name(low, high): _between(inputs_U, low, None if high is None else high + 1) for low, high in bins},
    }
    values = metrics.per_user(ranks_U)
    return {kind: {name: _slice(values, mask_U) for name, mask_U in masks.items()} for kind, masks in members.items()}


def popularity_share(counts_I: np.ndarray) -> np.ndarray:
    """The group of every item [I], as an index into SHARES.

    Items are taken by falling count (equal counts: smaller number first) until a group's share of all interactions is
    reached; the item that crosses the border still belongs to the group that it began in. Cold items are tail.
    """
    order = np.argsort(-counts_I, kind="stable")
    before = np.cumsum(counts_I[order]) - counts_I[order]
    ends: Sequence[int] = [percent for _, percent in SHARES[:-1]]
    groups = np.empty(len(counts_I), np.int8)
    groups[order] = np.searchsorted(np.array(ends) * counts_I.sum(), before * 100, side="right")
    return groups


def _bin_name(low: int, high: int | None) -> str:
    return f">{low - 1}" if high is None else f"{low}" if low == high else f"{low}-{high}"


def _between(values: np.ndarray, low: int, high: int | None) -> np.ndarray:
    return (values >= low) if high is None else (values >= low) & (values < high)


def _slice(values: dict[str, np.ndarray], mask_U: np.ndarray) -> Slice:
    n = int(mask_U.sum())
    return Slice(n=n, metrics={name: float(value[mask_U].mean()) for name, value in values.items()} if n else {})


# ------------------------------------------------------------------------------------------------------------ ranks


def write_ranks(path: Path, ranks_U: np.ndarray) -> None:
    """Write ranks as npz, whole or not at all: file mode 0600, its folder 0700."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        np.savez_compressed(file, ranks=np.asarray(ranks_U, np.int16))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_ranks(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive["ranks"], np.int32)
