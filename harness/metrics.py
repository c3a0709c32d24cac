"""The only definition of recall, ndcg, mrr and coverage in this project.

One relevant item a user, its rank r counted from 1 in the order that the method gave (ties are the method's to break),
r = 0 when it is not among the K = 50 predicted items. For every user

    recall@k = [1 <= r <= k]      ndcg@k = [1 <= r <= k] / log2(r + 1)      mrr@50 = [1 <= r <= 50] / r

and a metric is the mean over **all** users: one without a hit counts 0. Coverage@10 is the share of the catalogue that
stands in at least one top-10 list.

In: predicted items and targets as integer arrays. Out: ranks, values by user, ``record.Metric`` values.
Shape legend: U users, K list length.
"""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path

import numpy as np

from harness.record import Metric

CUTOFFS = (1, 5, 10, 20, 50)
MRR_CUTOFF = 50
COVERAGE_CUTOFF = 10
COVERAGE = f"coverage_at_{COVERAGE_CUTOFF}"

PER_USER = (*(f"recall_at_{k}" for k in CUTOFFS), *(f"ndcg_at_{k}" for k in CUTOFFS), f"mrr_at_{MRR_CUTOFF}")
"""Metrics that are means over users."""
METRICS = (*PER_USER, COVERAGE)
"""All metric names, in the order of records and tables."""


def ranks(items_UK: np.ndarray, targets_U: np.ndarray) -> np.ndarray:
    """The place of each target in its list, from 1; 0 if it is not there. A spent slot (-1) keeps its place and never matches."""
    items_UK, targets_U = np.asarray(items_UK), np.asarray(targets_U)
    if items_UK.ndim != 2 or targets_U.shape != items_UK.shape[:1]:
        raise ValueError(f"items {list(items_UK.shape)} and targets {list(targets_U.shape)} must be [users, k] and [users]")
    if not items_UK.size:
        return np.zeros(len(items_UK), np.int32)
    hit_UK = (items_UK == targets_U[:, None]) & (items_UK >= 0)
    first_U = hit_UK.argmax(1)
    return np.where(hit_UK[np.arange(len(hit_UK)), first_U], first_U + 1, 0).astype(np.int32)


def per_user(ranks_U: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of ``PER_USER`` as a float array [U]."""
    ranks_U = np.asarray(ranks_U, np.int64)
    if (ranks_U < 0).any():
        raise ValueError("ranks count from 1, and 0 means not in the list; a negative rank means nothing")
    safe_U = np.maximum(ranks_U, 1)
    gain_U = 1.0 / np.log2(safe_U + 1.0)
    within = {k: (ranks_U >= 1) & (ranks_U <= k) for k in {*CUTOFFS, MRR_CUTOFF}}
    values = {f"recall_at_{k}": within[k].astype(np.float64) for k in CUTOFFS}
    values |= {f"ndcg_at_{k}": np.where(within[k], gain_U, 0.0) for k in CUTOFFS}
    values[f"mrr_at_{MRR_CUTOFF}"] = np.where(within[MRR_CUTOFF], 1.0 / safe_U, 0.0)
    return values


def means(ranks_U: np.ndarray) -> dict[str, float]:
    """The mean of every metric over the given users, of which there must be at least one."""
    return {name: float(values.mean()) for name, values in per_user(ranks_U).items()}


def summarise(ranks_U: np.ndarray) -> dict[str, Metric]:
    """Mean and 95 % interval, mean ± 1.96 s/√n with the sample deviation s. One user alone has no interval."""
    n = len(ranks_U)
    if not n:
        raise ValueError("no users: a mean over nobody is not a number")
    result = {}
    for name, values in per_user(ranks_U).items():
        mean = float(values.mean())
        if n == 1:
            result[name] = Metric(mean=mean, n=1)
        else:
            half = 1.96 * float(values.std(ddof=1)) / math.sqrt(n)
            result[name] = Metric(mean=mean, low=mean - half, high=mean + half, n=n)
    return result


def coverage(items_UK: np.ndarray, n_items: int) -> Metric:
    """Coverage@10: distinct items over all top-10 lists / catalogue size. It has no interval; ``n`` counts the lists."""
    top = np.unique(np.asarray(items_UK)[:, :COVERAGE_CUTOFF])
    return Metric(mean=float((top >= 0).sum() / n_items), n=len(items_UK))


@functools.cache
def source_hash() -> str:
    """SHA-256 of this file. It stands in the score key: a changed definition makes old scores expire, not old training."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
