"""Residual quantisation with given codebooks, and how healthy the codes are.

In: vectors and L codebooks. Out: L codes a vector; level l codes what the levels before it have left over (Lee et al., CVPR 2022,
eq. 1-2; TIGER, section 3.1). Both tokenizers end here: k-means and the RQ-VAE differ in where the codebooks come from.

Distances are fp32 whatever the precision around them, and ties go to the lowest index.

Legend: N vectors, D dimensions, K codes of a book, L levels.
"""

from __future__ import annotations

import torch

from utgrec.kmeans import nearest
from utgrec.semantic_ids import usage


def residual_codes(x_ND: torch.Tensor, books_LKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, L] and what is left over after the last level [N, D]."""
    left_ND, codes = x_ND.float(), []
    for book_KD in books_LKD.float():
        codes.append(nearest(left_ND, book_KD)[0])
        left_ND = left_ND - book_KD[codes[-1]]
    return torch.stack(codes, 1), left_ND


def health(codes_NL: torch.Tensor, k: int) -> dict[str, float]:
    """For curves and records: of each level the share of used codes and the perplexity, and how many vectors collide.

    ``collision_rate`` is the share of vectors whose tuple another one has, too.
    """
    found = usage(codes_NL.cpu().numpy(), (k,) * codes_NL.size(1))
    _, count = codes_NL.unique(dim=0, return_counts=True)
    found["collision_rate"] = 1 - float((count == 1).sum()) / len(codes_NL)
    return found
