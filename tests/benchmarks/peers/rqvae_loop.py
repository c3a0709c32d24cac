"""An RQ-VAE as public code trains it: a DataLoader over items, distances by ``cdist``, a loss that is read after every step.

The same network, losses and optimiser as ``baselines/tiger/rqvae.py`` (gradient books), so that only the loop differs. What costs
nothing to do better is done better: a fused optimiser, no worker processes (they lose on two cores), gradients set to None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class VectorQuantiser(nn.Module):
    def __init__(self, book_KZ: torch.Tensor, beta: float):
        super().__init__()
        self.book = nn.Embedding.from_pretrained(book_KZ.clone(), freeze=False)
        self.beta = beta

    def forward(self, residual_BZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes_B = torch.cdist(residual_BZ, self.book.weight).argmin(dim=-1)
        chosen_BZ = self.book(codes_B)
        loss = F.mse_loss(chosen_BZ, residual_BZ.detach()) + self.beta * F.mse_loss(residual_BZ, chosen_BZ.detach())
        return chosen_BZ.detach(), loss, codes_B


class PlainRQVAE(nn.Module):
    def __init__(self, encoder: nn.Module, decoder: nn.Module, books_LKZ: torch.Tensor, beta: float):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.levels = nn.ModuleList(VectorQuantiser(book_KZ, beta) for book_KZ in books_LKZ)

    def forward(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z_BZ = self.encoder(x_BD)
        left_BZ, total_BZ, loss = z_BZ, torch.zeros_like(z_BZ), torch.zeros(())
        for level in self.levels:
            chosen_BZ, part, _ = level(left_BZ)
            left_BZ, total_BZ, loss = left_BZ - chosen_BZ, total_BZ + chosen_BZ, loss + part
        return self.decoder(z_BZ + (total_BZ - z_BZ).detach()), loss


def train(model: PlainRQVAE, x_ID: torch.Tensor, *, batch: int, epochs: int, learning_rate: float) -> list[float]:
    """Mean reconstruction error of each epoch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    loader = DataLoader(TensorDataset(x_ID), batch_size=batch, shuffle=True)
    means = []
    for _ in range(epochs):
        total = 0.0
        for (x_BD,) in loader:
            restored_BD, quantisation = model(x_BD)
            reconstruction = F.mse_loss(restored_BD, x_BD)
            optimiser.zero_grad(set_to_none=True)
            (reconstruction + quantisation).backward()
            optimiser.step()
            total += reconstruction.item()
        means.append(total / len(loader))
    return means
