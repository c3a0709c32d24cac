"""Constrained k-means: clusters whose sizes stay between two bounds. LETTER groups the rows of each codebook with it.

In: rows [N, D], the number of clusters K, the bounds, and clusters to start from (or a seed). Out: the cluster of each row.
Lloyd's two steps, where the assignment is the cheapest of all that keep the bounds (Bradley, Bennett and Demiriz 2000). That
is a transport problem, solved here on the K clusters instead of the N rows: start from the nearest centre of each row, which
is the cheapest assignment without bounds, and as long as it pays, move one row each along the cheapest chain of clusters,
where a size out of bounds costs more than any chain. Cheapest chains keep the assignment the cheapest of its sizes (successive
shortest paths), so the result is exact. Few rows are out of place, so few chains are needed: some milliseconds for 256 rows.

Shape legend: N rows, K clusters, D width.
"""

from __future__ import annotations

import itertools

import numpy as np

from harness.contract import ContractError


def constrained_kmeans(
    rows_ND: np.ndarray, k: int, smallest: int, largest: int, *, start_N: np.ndarray | None = None, seed: int = 0, iterations: int = 10
) -> np.ndarray:
    """The cluster [N] of each row, every cluster with ``smallest`` to ``largest`` rows.

    ``start_N``: clusters to go on from, such as those before the last steps of training; else centres are drawn as in
    k-means++ with ``seed``. Ends when nothing changes or after ``iterations``.
    """
    rows_ND = np.asarray(rows_ND, np.float64)
    check_bounds(len(rows_ND), k, smallest, largest)
    centres_KD = _means(rows_ND, start_N, k) if start_N is not None else _spread(rows_ND, k, np.random.default_rng(seed))
    cluster_N = None
    for _ in range(iterations):
        before_N, cluster_N = cluster_N, assign(_distances(rows_ND, centres_KD), smallest, largest)
        if before_N is not None and np.array_equal(before_N, cluster_N):
            break
        centres_KD = _means(rows_ND, cluster_N, k)
    assert cluster_N is not None
    return cluster_N


def check_bounds(n: int, k: int, smallest: int, largest: int) -> None:
    if not 1 <= smallest <= largest or not k * smallest <= n <= k * largest:
        raise ContractError(
            f"{k} clusters of {smallest} to {largest} rows hold {k * smallest} to {k * largest}, but there are {n} rows: "
            "change clusters, cluster_min or cluster_max"
        )


def assign(cost_NK: np.ndarray, smallest: int, largest: int) -> np.ndarray:
    """The cheapest assignment [N] of rows to clusters with all sizes between the bounds."""
    k = cost_NK.shape[1]
    cluster_N = cost_NK.argmin(1)
    size_K = np.bincount(cluster_N, minlength=k)
    # One row out of bounds costs more than any chain can: at most K moves, each at most the spread of the costs.
    penalty = 2.0 * k * (float(cost_NK.max() - cost_NK.min()) or 1.0)
    tolerance = 1e-12 * penalty
    while True:
        leave_K = penalty * ((size_K <= smallest).astype(float) - (size_K > largest))
        enter_K = penalty * ((size_K >= largest).astype(float) - (size_K < smallest))
        step_KK, row_KK = _cheapest_moves(cost_NK, cluster_N)
        chain, gain = _cheapest_chain(leave_K, step_KK, enter_K, tolerance)
        if gain > -tolerance:
            return cluster_N
        for here, there in itertools.pairwise(chain):
            cluster_N[row_KK[here, there]] = there
        size_K[chain[0]] -= 1
        size_K[chain[-1]] += 1


def _cheapest_moves(cost_NK: np.ndarray, cluster_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of clusters what the cheapest move of one row from the first to the second costs [K, K], and which row it is."""
    n, k = cost_NK.shape
    step_KK, row_KK = np.full((k, k), np.inf), np.zeros((k, k), np.int64)
    more_NK = cost_NK - cost_NK[np.arange(n), cluster_N][:, None]
    for here in range(k):
        members = np.flatnonzero(cluster_N == here)
        if len(members):
            best_K = more_NK[members].argmin(0)
            step_KK[here], row_KK[here] = more_NK[members[best_K], np.arange(k)], members[best_K]
    np.fill_diagonal(step_KK, np.inf)
    return step_KK, row_KK


def _cheapest_chain(leave_K: np.ndarray, step_KK: np.ndarray, enter_K: np.ndarray, tolerance: float) -> tuple[list[int], float]:
    """Bellman and Ford: the clusters of the cheapest chain, first to last, and what it costs with both its ends.

    ``tolerance``: chains that differ by rounding alone count as equal, or a chain could run in a circle.
    """
    cost_K, before_K = leave_K.copy(), np.full(len(leave_K), -1)
    while True:
        through_KK = cost_K[:, None] + step_KK
        better_K = through_KK.min(0) < cost_K - tolerance
        if not better_K.any():
            break
        before_K[better_K] = through_KK.argmin(0)[better_K]
        cost_K[better_K] = through_KK.min(0)[better_K]
    total_K = cost_K + enter_K
    chain = [int(total_K.argmin())]
    while before_K[chain[-1]] >= 0:
        chain.append(int(before_K[chain[-1]]))
    return chain[::-1], float(total_K.min())


def _distances(rows_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    return np.square(rows_ND[:, None] - centres_KD).sum(-1)


def _means(rows_ND: np.ndarray, cluster_N: np.ndarray, k: int) -> np.ndarray:
    sums_KD = np.zeros((k, rows_ND.shape[1]))
    np.add.at(sums_KD, cluster_N, rows_ND)
    return sums_KD / np.maximum(np.bincount(cluster_N, minlength=k), 1)[:, None]


def _spread(rows_ND: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each further centre is a row drawn in proportion to its squared distance from the centres so far."""
    chosen = [int(rng.integers(len(rows_ND)))]
    for _ in range(k - 1):
        near_N = _distances(rows_ND, rows_ND[chosen]).min(1)
        total = near_N.sum()
        chosen.append(int(rng.choice(len(rows_ND), p=near_N / total if total > 0 else None)))
    return rows_ND[chosen]
