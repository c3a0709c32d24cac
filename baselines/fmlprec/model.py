"""FMLP-Rec: attention replaced by a learnable filter in the frequency domain.

Zhou, Yu, Zhao and Wen, "Filter-enhanced MLP is All You Need for Sequential Recommendation", WWW 2022, arXiv 2202.13556.

In: histories of item ids, 0 = padding at the left. Out: a vector for the user after the last item; its products with
the item embeddings are the scores. A product in the frequency domain is a circular convolution over time, in which every
position sees every other: only the last position may be trained, and every prefix of a history is a training row of its
own. (Attention with a causal mask, as in SASRec, trains all positions of a history at once.)

Shape legend: B batch, L history length, F = L // 2 + 1 frequencies, D embedding width, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """``n_items`` without padding; ``history`` positions; ``width`` of embeddings; ``blocks``; ``dropout`` everywhere."""

    n_items: int
    history: int
    width: int
    blocks: int
    dropout: float


class Filter(nn.Module):
    """The filter layer: transform along time, multiply each frequency of each channel by a learned number, transform back."""

    def __init__(self, shape: Shape):
        super().__init__()
        # Real input has a mirrored spectrum, so half of it is enough. Stored as pairs (real, imaginary) for the optimizer.
        self.weight = nn.Parameter(torch.randn(shape.history // 2 + 1, shape.width, 2) * 0.02)
        self.dropout = nn.Dropout(shape.dropout)
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        length = x_BLD.size(1)
        spectrum_BFD = torch.fft.rfft(x_BLD.float(), dim=1, norm="ortho")  # float: there is no transform in bf16
        filtered_BLD = torch.fft.irfft(spectrum_BFD * torch.view_as_complex(self.weight), n=length, dim=1, norm="ortho")
        return self.norm(x_BLD + self.dropout(filtered_BLD))


class FeedForward(nn.Module):
    """The feed-forward layer after the filter: the only place where channels meet."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(shape.width, 4 * shape.width), nn.ReLU(), nn.Linear(4 * shape.width, shape.width))
        self.dropout = nn.Dropout(shape.dropout)
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return self.norm(x_BLD + self.dropout(self.layers(x_BLD)))


class FMLPRec(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.items = nn.Embedding(shape.n_items + 1, shape.width, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(shape.history, shape.width))
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.Sequential(*(nn.Sequential(Filter(shape), FeedForward(shape)) for _ in range(shape.blocks)))
        self.apply(self._start)
        nn.init.normal_(self.positions, std=0.02)

    @staticmethod
    def _start(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            with torch.no_grad():
                module.weight[0] = 0

    def forward(self, history_BL: torch.Tensor) -> torch.Tensor:
        """The user's vector [B, D]: the last position after all blocks (histories end at the right)."""
        x_BLD = self.dropout(self.norm(self.items(history_BL) + self.positions))
        return self.blocks(x_BLD)[:, -1]

    def scores(self, user_BD: torch.Tensor) -> torch.Tensor:
        """Scores [B, I] of all items, column n = item number n."""
        return user_BD @ self.items.weight[1:].T
