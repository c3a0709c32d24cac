"""Residual quantisation with given codebooks, and how healthy the codes are.

In: vectors and L codebooks. Out: L codes a vector; level l codes what the levels before it have left over (Lee et al., CVPR 2022,
eq. 1-2; TIGER, section 3.1). Both tokenizers end here: k-means and the RQ-VAE differ in where the codebooks come from.

Distances are fp32 whatever the precision around them, and ties go to the lowest index.

Legend: N vectors, D dimensions, K codes of a book, L levels.
"""

from __future__ import annotations

import torch

CELLS = 1 << 20
"""Distances looked at together on a CPU, which keeps them in its cache; on a GPU 64 times as many."""


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


def residual_codes(x_ND: torch.Tensor, books_LKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, L] and what is left over after the last level [N, D]."""
    left_ND, codes = x_ND.float(), []
    for book_KD in books_LKD.float():
        codes.append(nearest(left_ND, book_KD)[0])
        left_ND = left_ND - book_KD[codes[-1]]
    return torch.stack(codes, 1), left_ND


def health(codes_NL: torch.Tensor, k: int) -> dict[str, float]:
    """For curves and records: of each level the share of used codes and the perplexity, and how many vectors collide.

    ``perplexity_l`` is exp of the entropy of level l's codes: K if all are equally frequent, 1 if one is used alone.
    ``collision_rate`` is the share of vectors whose tuple another one has, too.
    """
    found: dict[str, float] = {}
    for level, codes_N in enumerate(codes_NL.t(), start=1):
        share_K = torch.bincount(codes_N, minlength=k).double() / len(codes_N)
        found[f"usage_{level}"] = float((share_K > 0).double().mean())
        found[f"perplexity_{level}"] = float(torch.special.entr(share_K).sum().exp())
    _, count = codes_NL.unique(dim=0, return_counts=True)
    found["collision_rate"] = 1 - float((count == 1).sum()) / len(codes_NL)
    return found
