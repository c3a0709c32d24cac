"""LETTER's two regularisers on top of TIGER's RQ-VAE. Wang et al., CIKM 2024, arXiv 2405.07314, section 3.

In: item embeddings, and a collaborative vector for every item seen in training. Out: as of an RQ-VAE, L codes an item. The loss is

    L_RQVAE + alpha L_CF + beta L_Div.

Collaborative alignment (L_CF). In a batch of B items the quantised latent z^_i is to have its largest product with the item's own
collaborative vector h_i, one direction, no temperature and no normalisation:

    L_CF = - 1/B sum_i log( exp(z^_i . h_i) / sum_j exp(z^_i . h_j) ),

which goes through the choice of codes straight into the encoder. An item that does not occur in training has no h: it is left out,
as a row and as a negative.

Diversity (L_Div), for each level, mean over levels. The rows e_k of a codebook are grouped by constrained k-means (clusters.py). The
row c that an item was given is to be nearer to a row of its own group than to any other row:

    L_Div = - 1/B sum_i  1/|G(c_i)|  sum_{j in G(c_i)} log( exp(e_{c_i} . e_j) / sum_{k != c_i} exp(e_{c_i} . e_k) ),

G(c) being the others of c's group. The authors draw one j; this is the mean over the draw, without noise and for a K x K product
instead of a B x K one. Its gradient reaches the codebooks alone: they must learn by gradient, not as running means.

Legend: B batch, D input width, Z latent width, L levels, K codes of a book, I items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

FAR = -1e30
"""A product that leaves no share in a softmax, and no NaN where all of a row is left out."""


def alignment_loss(quantised_BZ: torch.Tensor, collaborative_BZ: torch.Tensor, known_B: torch.Tensor) -> torch.Tensor:
    """L_CF over the items of a batch that have a collaborative vector; 0 where fewer than two have one."""
    products_BB = (quantised_BZ @ collaborative_BZ.t()).masked_fill(~known_B, FAR)
    own_B = torch.arange(len(products_BB), device=products_BB.device).masked_fill(~known_B, -100)
    return F.cross_entropy(products_BB, own_B, ignore_index=-100, reduction="sum") / known_B.sum().clamp_min(1)


def diversity_loss(book_KZ: torch.Tensor, codes_B: torch.Tensor, cluster_K: torch.Tensor) -> torch.Tensor:
    """L_Div of one level."""
    k = len(book_KZ)
    itself_KK = torch.eye(k, dtype=torch.bool, device=book_KZ.device)
    log_share_KK = (book_KZ @ book_KZ.t()).masked_fill(itself_KK, -torch.inf).log_softmax(1).masked_fill(itself_KK, 0.0)
    mates_KK = (cluster_K[:, None] == cluster_K) & ~itself_KK
    loss_K = -(log_share_KK * mates_KK).sum(1) / mates_KK.sum(1)
    return (loss_K * torch.bincount(codes_B, minlength=k)).sum() / len(codes_B)
