"""Cross-entropy of masked tokens over a large vocabulary, without the logits of all tokens at once.

In: hidden states of the selected tokens alone, the output table, what they should be. Out: the sum of the losses. With 151,661
tokens in the vocabulary the logits of 4,096 selected tokens and their gradient take 5 GB in fp32; here never more than a chunk of
them exists: while its probabilities are there, they become the gradients of hidden states and table, which backward only scales.

    loss = sum_n  logsumexp(h_n W') - h_n W'[y_n]        d loss / d logits_n = softmax(h_n W') - onehot(y_n)

Products run in the precision around them (autocast, or that of the tensors), everything between them and the table's gradient in fp32.

Legend: N selected tokens, K of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits of a chunk by device: 16 MB in fp32, which stay near the cores, or 512 MB, 885 tokens of Qwen2-VL's vocabulary."""
LEAST = 128
"""Tokens of a chunk, so that going through the table's gradient once a chunk does not outweigh the products."""


def masked_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, chunk: int | None = None) -> Tensor:
    """The sum over tokens, a scalar in fp32 (float64 for float64). Zero, with zero gradients, for no token.

    ``chunk``: tokens whose logits exist at a time.
    """
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    chunk = chunk or max(LEAST, LOGITS.get(kind, LOGITS["cuda"]) // len(head_VD))
    return _CrossEntropy.apply(hidden_ND, head_VD, targets_N, dtype, chunk, torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, chunk: int, learning: bool) -> Tensor:
        for_hidden, for_head = (learning and needed for needed in ctx.needs_input_grad[:2])
        wide = torch.promote_types(dtype, torch.float32)
        d_hidden_ND = torch.empty_like(hidden_ND) if for_hidden else None
        d_head_VD = torch.zeros_like(head_VD, dtype=wide) if for_head else None
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            table_VD = head_VD.to(dtype)
            for first in range(0, len(hidden_ND), chunk):
                part = slice(first, first + chunk)
                h_KD, target_K1 = hidden_ND[part].to(dtype), targets_N[part, None]
                logits_KV = (h_KD @ table_VD.T).to(wide)
                right_K1 = logits_KV.gather(1, target_K1)
                total_K1 = logits_KV.logsumexp(1, keepdim=True)
                loss += (total_K1 - right_K1).sum()
                if not (for_hidden or for_head):
                    continue
                d_logits_KV = logits_KV.sub_(total_K1).exp_()
                d_logits_KV.scatter_add_(1, target_K1, torch.full_like(right_K1, -1.0))
                d_logits_KV = d_logits_KV.to(dtype)
                if d_hidden_ND is not None:
                    d_hidden_ND[part] = d_logits_KV @ table_VD
                if d_head_VD is not None:
                    add_product(d_head_VD, d_logits_KV.T, h_KD)
        ctx.save_for_backward(d_hidden_ND, d_head_VD)
        ctx.dtype = head_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_head_VD = ctx.saved_tensors
        if d_hidden_ND is not None:
            d_hidden_ND = (d_hidden_ND * d_loss).to(d_hidden_ND.dtype)
        if d_head_VD is not None:
            d_head_VD = (d_head_VD * d_loss).to(ctx.dtype)
        return d_hidden_ND, d_head_VD, None, None, None, None


def add_product(sum_VD: Tensor, a_VK: Tensor, b_KD: Tensor) -> None:
    """sum += a b, added up in the precision of the sum."""
    if a_VK.dtype == sum_VD.dtype:
        sum_VD.addmm_(a_VK, b_KD)
    else:
        sum_VD += a_VK @ b_KD
