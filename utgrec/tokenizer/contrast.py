"""Alignment of co-occurring items (UTGRec section 3.4): InfoNCE over the items of the whole batch.

In: h [B, L, D] of items, h+ [B, L, D] of one co-occurring item each. Out: the loss, averaged over the L positions:

    L_Ali = - mean over l, i of  log softmax_j( cos(h_l(i), h+_l(j)) / tau )[i]

Every h+ of the batch is a candidate, those of other processes too (``gathered``: its gradient goes back to where the rows came from).
That two items of a batch may share a true neighbour, or be each other's, is left as it is in the paper.

Legend: B items of this process, G of all processes, L positions, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(h_BLD: Tensor, positive_BLD: Tensor, temperature: float) -> Tensor:
    """The mean over the items of this process. fp32 whatever the precision."""
    with torch.autocast(h_BLD.device.type, enabled=False):
        h_LBD, positive_LBD = (F.normalize(h.float(), dim=-1).transpose(0, 1) for h in (h_BLD, positive_BLD))
        all_LGD, first = gathered(positive_LBD)
        logits_LBG = h_LBD @ all_LGD.transpose(1, 2) / temperature
        target_B = torch.arange(first, first + len(h_BLD), device=h_BLD.device)
        return F.cross_entropy(logits_LBG.flatten(0, 1), target_B.repeat(len(logits_LBG)))


def gathered(x_LBD: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, in the order of their ranks, and the place of this process's first. Shares may differ in size."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x_LBD, 0
    size = torch.tensor([x_LBD.size(1)], device=x_LBD.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(n) for n in sizes]
    return _Gather.apply(x_LBD, counts), sum(counts[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum of what all processes say of it."""

    @staticmethod
    def forward(ctx, x_LBD: Tensor, counts: list[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.counts = counts
        most = max(counts)
        padded_LMD = F.pad(x_LBD, (0, 0, 0, most - x_LBD.size(1))).contiguous()
        parts = [torch.empty_like(padded_LMD) for _ in counts]
        dist.all_gather(parts, padded_LMD)
        return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)

    @staticmethod
    def backward(ctx, gradient_LGD: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        total_LGD = gradient_LGD.contiguous()
        dist.all_reduce(total_LGD)
        return total_LGD.split(ctx.counts, 1)[dist.get_rank()], None
