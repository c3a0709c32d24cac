"""LETTER's tokenizer: TIGER's RQ-VAE with two regularisers. Wang et al., CIKM 2024, arXiv 2405.07314, section 3.

In: item embeddings, and a collaborative vector for every item of the training part. Out: as of the RQ-VAE, L codes an item. The loss is

    L_RQVAE  +  alpha L_CF  +  beta L_Div.

Collaborative alignment (L_CF): among the collaborative vectors h of a batch, the quantised latent z^_i is to have its largest product
with the item's own; one direction, no temperature, nothing normalised:

    L_CF = - 1/B sum_i log( exp(z^_i . h_i) / sum_j exp(z^_i . h_j) ).

It goes past the choice of codes straight into the encoder. The size of h decides what alpha means, and the paper does not give it:
here one number for all vectors makes the mean square of their elements 1, as it is for the inputs (``inputs = "standard"``).

Diversity (L_Div): the rows e_k of each codebook are grouped by constrained k-means (clusters.py), anew before an epoch. The row c of an
item is to be nearer to a row of its group than to the others:

    L_Div = - 1/B sum_i  1/|G(c_i)|  sum_{j in G(c_i)} log( exp(e_{c_i} . e_j) / sum_{k != c_i} exp(e_{c_i} . e_k) ),

summed over levels, where G(c) are the others of c's group. The authors draw one j of G; this is the mean over the draw: no noise, and a
K x K product instead of a B x K one. Its gradient reaches the codebooks alone, so they must learn by gradient.

Legend: B batch, D input width, Z latent width, L levels, K codes of a book, T items of the training part, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from baselines.letter.clusters import check_bounds, constrained_kmeans
from baselines.tiger import rqvae
from harness.contract import ContractError


@dataclass(frozen=True)
class Settings:
    """The defaults are the paper's best on its Instruments (its hyper-parameter study) and its code's."""

    alignment: float = 0.02
    """alpha, the weight of L_CF; 0: none."""
    diversity: float = 0.0001
    """beta, the weight of L_Div; 0: none."""
    clusters: int = 10
    """Groups of a codebook's rows."""
    cluster_min: int = 10
    """Rows of a group, at least and at most."""
    cluster_max: int = 60
    cluster_every: int = 1
    """Epochs between two groupings."""

    def __post_init__(self) -> None:
        for name in ("alignment", "diversity"):
            if getattr(self, name) < 0:
                raise ContractError(f"{name} = {getattr(self, name)}: use 0 or more")
        for name, least in (("clusters", 1), ("cluster_min", 2), ("cluster_every", 1)):
            if getattr(self, name) < least:
                raise ContractError(f"{name} = {getattr(self, name)}: use {least} or more")


class LETTER(rqvae.RQVAE):
    """``collaborative_TZ``: the vectors of the training items, in the order of the inputs; None without alignment."""

    def __init__(self, width: int, vae: rqvae.Settings, settings: Settings, collaborative_TZ: torch.Tensor | None, seed: int):
        super().__init__(width, vae)
        self.regularisers, self.seed = settings, seed
        if settings.alignment:
            assert collaborative_TZ is not None
            if collaborative_TZ.size(1) != vae.latent:
                raise ContractError(
                    f"collaborative vectors of width {collaborative_TZ.size(1)}, but vae_latent = {vae.latent}: make them equal"
                )
            self.collaborative_TZ: torch.Tensor
            self.register_buffer("collaborative_TZ", unit_variance(collaborative_TZ), persistent=False)
        if settings.diversity:
            if vae.books != "gradient":
                raise ContractError(f"vae_books = {vae.books!r}: diversity needs codebooks that learn by gradient; use 'gradient'")
            check_bounds(vae.book, settings.clusters, settings.cluster_min, settings.cluster_max)
            self.clusters_LK: torch.Tensor
            self.register_buffer("clusters_LK", torch.full((vae.levels, vae.book), -1))  # -1: not yet grouped

    def before_epoch(self, epoch: int) -> None:
        """Group the rows of the codebooks, from the second time on starting at the groups there are."""
        settings = self.regularisers
        if not settings.diversity or epoch % settings.cluster_every:
            return
        books_LKZ, before_LK = self.books_LKZ.detach().cpu().numpy(), self.clusters_LK.cpu().numpy()
        found_LK = [
            constrained_kmeans(
                book_KZ,
                settings.clusters,
                settings.cluster_min,
                settings.cluster_max,
                start_N=before_K if before_K.min() >= 0 else None,
                seed=self.seed + level,
            )
            for level, (book_KZ, before_K) in enumerate(zip(books_LKZ, before_LK, strict=True))
        ]
        self.clusters_LK.copy_(torch.from_numpy(np.stack(found_LK)))

    def loss(self, x_BD: torch.Tensor, rows_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], rqvae.Quantised]:
        loss, parts, quantised = super().loss(x_BD, rows_B)
        if self.regularisers.alignment:
            parts["alignment"] = alignment_loss(quantised.sum_BZ, self.collaborative_TZ[rows_B])
            loss = loss + self.regularisers.alignment * parts["alignment"]
        if self.regularisers.diversity:
            parts["diversity"] = diversity_loss(self.books_LKZ, quantised.codes_BL, self.clusters_LK)
            loss = loss + self.regularisers.diversity * parts["diversity"]
        return loss, parts, quantised


def unit_variance(collaborative_TZ: torch.Tensor) -> torch.Tensor:
    """Centred, which no softmax over items sees, and divided by one number, so that the mean square of an element is 1."""
    centred_TZ = collaborative_TZ.double() - collaborative_TZ.double().mean(0)
    return (centred_TZ / centred_TZ.square().mean().sqrt().clamp_min(1e-12)).float()


def alignment_loss(quantised_BZ: torch.Tensor, collaborative_BZ: torch.Tensor) -> torch.Tensor:
    """L_CF."""
    products_BB = quantised_BZ @ collaborative_BZ.t()
    return F.cross_entropy(products_BB, torch.arange(len(products_BB), device=products_BB.device))


def diversity_loss(books_LKZ: torch.Tensor, codes_BL: torch.Tensor, clusters_LK: torch.Tensor) -> torch.Tensor:
    """L_Div. Its value depends on an item through its codes alone: one value a code, weighted by how often it was chosen."""
    k = books_LKZ.size(1)
    itself_KK = torch.eye(k, dtype=torch.bool, device=books_LKZ.device)
    log_share_LKK = (books_LKZ @ books_LKZ.mT).masked_fill(itself_KK, -torch.inf).log_softmax(2).masked_fill(itself_KK, 0.0)
    mates_LKK = (clusters_LK[:, :, None] == clusters_LK[:, None]) & ~itself_KK
    loss_LK = -(log_share_LKK * mates_LKK).sum(2) / mates_LKK.sum(2)
    chosen_LK = torch.zeros_like(loss_LK).scatter_add_(1, codes_BL.t(), torch.ones_like(codes_BL.t(), dtype=loss_LK.dtype))
    return (loss_LK * chosen_LK).sum() / len(codes_BL)


def collaborative_similarity(codes_IL: np.ndarray, vectors_ID: np.ndarray) -> dict[str, float]:
    """The mean cosine of two items' vectors if they share the first l codes, for each l, and of any two: what alignment is for.

    NaN-free: a prefix length that no two items share has no entry.
    """
    centred_ID = vectors_ID.astype(np.float64) - vectors_ID.mean(0)
    unit_ID = centred_ID / np.maximum(np.linalg.norm(centred_ID, axis=1, keepdims=True), 1e-12)
    found: dict[str, float] = {}
    for length in range(codes_IL.shape[1] + 1):
        _, group_I = np.unique(codes_IL[:, :length], axis=0, return_inverse=True)
        count_G = np.bincount(group_I)
        sum_GD = np.zeros((len(count_G), unit_ID.shape[1]))
        np.add.at(sum_GD, group_I, unit_ID)
        pairs = (count_G * (count_G - 1)).sum()
        if pairs:
            name = f"collaborative_similarity_{length}" if length else "collaborative_similarity_any"
            found[name] = float((np.square(sum_GD).sum() - np.square(unit_ID).sum()) / pairs)
    return found
