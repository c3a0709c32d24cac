"""LoRA (Hu et al., arXiv 2106.09685): a frozen linear layer y = W x, and beside it a trained y += alpha / r * B A dropout(x).

In: a module. Out: the same module, all its weights frozen, every linear layer in it with a trained A (uniform as in ``nn.Linear``) and B
(zeros: nothing is changed at first). These few lines stand in for ``peft``: names of weights stay those of the model with
``.down`` and ``.up`` behind them, nothing wraps the model, and weights in fp32 beside a base in bf16 need no casting
of their own under autocast. peft's numbers are the same (tests/unit/utgrec/test_qwen.py).

Legend: r rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        self.down = nn.Parameter(torch.empty(rank, base.in_features))  # A [r, I]
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))  # B [O, r]
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        small = F.linear(F.dropout(x, self.dropout, self.training), self.down) * self.scale  # r numbers a token are scaled, not O
        wide = self.base(x)
        return torch.addmm(wide.flatten(0, -2), small.flatten(0, -2), self.up.T).view(wide.shape)


def add_lora(module: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Freeze ``module`` and give each linear layer in it a LoRA."""
    module.requires_grad_(False)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for name in linear:
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, last, LoraLinear(getattr(owner, last), rank, alpha, dropout))
