"""K-means, and residual k-means (RK-means): codebooks without a network, and where learnt codebooks start.

In: vectors [N, D]. Out: ``kmeans`` gives K centres and the nearest one of every vector; ``residual_kmeans`` gives L codebooks:
level l clusters what the levels before it have left over.

Lloyd's step costs N x K x D multiplications, and on a CPU a step here is little more than that matrix product. Time is saved by
taking fewer of them: seeds and first steps are made in the leading 64 principal dimensions, where the clusters are, at a twelfth
of the cost for D = 768; only the last steps use all dimensions. Seeding is greedy k-means++ (Arthur and Vassilvitskii, SODA
2007): of a few draws, the one that helps most. (A random projection instead is as good on embeddings and 4 % worse on clear clusters.)

Distances are fp32 and ties go to the lowest index; on a CPU one seed gives one result.

Legend: N vectors, D dimensions, K centres, P projected dimensions, T trials, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CELLS = 1 << 20
"""Distances looked at together on a CPU, which keeps them in its cache; on a GPU 64 times as many."""
PROJECTED = 64
PROJECTED_ROWS = 1 << 14
"""Vectors that the principal dimensions are estimated from."""
SEED_ROWS = 512
"""Seeds are drawn among at most this many vectors for each centre."""
NEAR = 1e-6
"""A vector that is nearer to its centre than this (relative to the mean squared length) needs no centre of its own."""


def nearest(x_ND: torch.Tensor, book_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code of every vector and the squared distance to it, [N] each."""
    x_ND, book_KD = x_ND.float(), book_KD.float()
    half_K = book_KD.square().sum(1) / 2
    rows = max(1, CELLS * (64 if x_ND.is_cuda else 1) // len(book_KD))
    codes, scores = [], []
    for part_BD in x_ND.split(rows):
        score_BK = torch.addmm(half_K, part_BD, book_KD.t(), alpha=-1)  # (|x - c|^2 - |x|^2) / 2
        codes.append(score_BK.argmin(1))
        scores.append(score_BK.gather(1, codes[-1][:, None])[:, 0])
    return torch.cat(codes), (2 * torch.cat(scores) + x_ND.square().sum(1)).clamp_min(0)


@dataclass(frozen=True)
class Clusters:
    centres_KD: torch.Tensor
    codes_N: torch.Tensor
    objective: float
    """Sum of squared distances to the nearest centre."""
    steps: int
    """Lloyd steps in all dimensions."""


def kmeans(x_ND: torch.Tensor, k: int, *, seed: int, steps: int = 20, tolerance: float = 1e-4, restarts: int = 1) -> Clusters:
    """Cluster vectors; of some restarts the best.

    ``steps``: at most, in all dimensions; it ends once a step improves the objective by no more than ``tolerance`` of it.
    With fewer different vectors than centres, the centres left over are copies that no vector uses.
    """
    if not len(x_ND):
        raise ValueError("k-means needs at least one vector")
    generator = torch.Generator().manual_seed(seed)
    return min((_run(x_ND.float(), k, generator, steps, tolerance) for _ in range(restarts)), key=lambda run: run.objective)


def _run(x_ND: torch.Tensor, k: int, generator: torch.Generator, steps: int, tolerance: float) -> Clusters:
    if x_ND.size(1) <= PROJECTED:
        return lloyd(x_ND, seeds(x_ND, k, generator), steps, tolerance)
    x_NP = x_ND @ principal(x_ND, generator)
    rough = lloyd(x_NP, seeds(x_NP, k, generator), steps, 10 * tolerance)
    return lloyd(x_ND, means(x_ND, rough.codes_N, x_ND[:1].expand(k, -1)), steps, tolerance)


def principal(x_ND: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Leading principal dimensions [D, P], roughly: two rounds of subspace iteration from a random start (Halko et al., 2011)."""
    rows = torch.randperm(len(x_ND), generator=generator)[:PROJECTED_ROWS].to(x_ND.device)
    x_ND = x_ND[rows] - x_ND[rows].mean(0)
    axes_DP = torch.randn(x_ND.size(1), PROJECTED, generator=generator).to(x_ND.device)
    for _ in range(2):
        axes_DP = torch.linalg.qr(x_ND.t() @ (x_ND @ axes_DP)).Q
    return axes_DP


def lloyd(x_ND: torch.Tensor, centres_KD: torch.Tensor, steps: int, tolerance: float) -> Clusters:
    """Lloyd's algorithm from given centres."""
    codes_N, distance_N = nearest(x_ND, centres_KD)
    objective, step = float(distance_N.double().sum()), 0
    near = NEAR * float(x_ND.square().sum()) / len(x_ND)
    while step < steps:
        step += 1
        centres_KD = revived(means(x_ND, codes_N, centres_KD), x_ND, codes_N, distance_N, near)
        codes_N, distance_N = nearest(x_ND, centres_KD)
        before, objective = objective, float(distance_N.double().sum())
        if before - objective <= tolerance * before:
            break
    return Clusters(centres_KD, codes_N, objective, step)


def means(x_ND: torch.Tensor, codes_N: torch.Tensor, otherwise_KD: torch.Tensor) -> torch.Tensor:
    """The mean of each cluster's vectors; of an empty one its row in ``otherwise``.

    As bags of sorted rows: as fast as ``index_add`` on a CPU, and on a GPU always in the same order.
    """
    count_K = torch.bincount(codes_N, minlength=len(otherwise_KD))
    ends_K1 = F.pad(count_K.cumsum(0), (1, 0))
    sum_KD = F.embedding_bag(codes_N.argsort(stable=True), x_ND, ends_K1, mode="sum", include_last_offset=True)
    return torch.where(count_K[:, None] > 0, sum_KD / count_K.clamp_min(1)[:, None], otherwise_KD)


def revived(centres_KD: torch.Tensor, x_ND: torch.Tensor, codes_N: torch.Tensor, distance_N: torch.Tensor, near: float) -> torch.Tensor:
    """Put the centres of empty clusters onto the vectors that are farthest from theirs."""
    empty = (torch.bincount(codes_N, minlength=len(centres_KD)) == 0).nonzero()[:, 0]
    if len(empty):
        far = distance_N.argsort(descending=True, stable=True)[: len(empty)]
        far = far[distance_N[far] > near]
        centres_KD[empty[: len(far)]] = x_ND[far]
    return centres_KD


def seeds(x_ND: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """K of the vectors by greedy k-means++: drawn by their squared distance to the nearest seed so far, best of T draws."""
    if len(x_ND) > SEED_ROWS * k:
        x_ND = x_ND[torch.randperm(len(x_ND), generator=generator)[: SEED_ROWS * k].to(x_ND.device)]
    trials = 2 + int(math.log(k))
    first = torch.randint(len(x_ND), (1,), generator=generator).to(x_ND.device)
    draws_KT = torch.rand(k, trials, generator=generator, dtype=torch.float64).to(x_ND.device)
    length_N = x_ND.square().sum(1)
    chosen, distance_N = [first[0]], _distances(x_ND, length_N, first)[:, 0]
    for draws_T in draws_KT[1:]:
        weight_N = distance_N.double().cumsum(0)
        drawn_T = torch.searchsorted(weight_N, draws_T * weight_N[-1], right=True).clamp_max(len(x_ND) - 1)
        distance_NT = torch.minimum(_distances(x_ND, length_N, drawn_T), distance_N[:, None])
        best = distance_NT.sum(0).argmin()
        distance_N = distance_NT[:, best]
        chosen.append(drawn_T[best])
    return x_ND[torch.stack(chosen)]


def _distances(x_ND: torch.Tensor, length_N: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
    return (length_N[:, None] + length_N[rows_T] - 2 * (x_ND @ x_ND[rows_T].t())).clamp_min(0)


@dataclass(frozen=True)
class Books:
    """Codebooks of all levels [L, K, D] and, for curves, the mean squared error after each level."""

    books_LKD: torch.Tensor
    error_L: tuple[float, ...]


def residual_kmeans(
    x_ND: torch.Tensor, levels: int, k: int, *, seed: int, told: Callable[[int, float], None] | None = None, **how: float
) -> Books:
    """Cluster level after level. ``how``: of ``kmeans``. ``told`` hears every level and its mean squared error."""
    left_ND, books, errors = x_ND.float(), [], []
    for level in range(levels):
        found = kmeans(left_ND, k, seed=seed + level, **how)  # type: ignore[arg-type]
        left_ND = left_ND - found.centres_KD[found.codes_N]
        books.append(found.centres_KD)
        errors.append(found.objective / len(x_ND))
        if told:
            told(level + 1, errors[-1])
    return Books(torch.stack(books), tuple(errors))
