"""One transformer layer of Qwen2-VL's kind, bidirectional: what both decoders of UTGRec consist of (section 3.3).

    x + o(attention(norm(x)))          q, k, v with bias, o without; groups of heads share keys and values; rotary positions 0..S-1
    x + down(silu(gate(norm(x))) * up(norm(x)))

Every position sees every other; padding is masked as a key only. The same weights give the same numbers as Hugging Face's
Qwen2VLTextModel with an additive 4-D mask (tests/parity/test_block.py; a 2-D mask would make that one causal).

In: x [B, S, D], and which positions are no padding [B, S] (None: all). Out: [B, S, D].

Legend: B rows, S positions, D width, H heads, G heads of keys and values, E head width, F inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockShape:
    """The size of a layer. The paper's: 1536 wide, 12 heads of 128, 2 of keys and values, 4 x 1536 inside."""

    width: int
    heads: int
    kv_heads: int
    ff: int
    theta: float = 1e6
    """Base of the rotary positions' wave lengths."""
    eps: float = 1e-6
    """Of the norms."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.head_width % 2 or self.heads % self.kv_heads:
            raise ValueError(f"{self}: heads must divide width into even parts, and kv_heads must divide heads")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 at least."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: BlockShape):
        super().__init__()
        self.shape = shape
        self.attention_norm, self.ff_norm = RMSNorm(shape.width, shape.eps), RMSNorm(shape.width, shape.eps)
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * shape.head_width)
        self.o = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.ff, bias=False)
        self.down = nn.Linear(shape.ff, shape.width, bias=False)
        for layer in (self.qkv, self.o, self.gate_up, self.down):
            nn.init.normal_(layer.weight, std=0.02 * (1536 / shape.width) ** 0.5)  # N(0, 0.02) at the width of the paper
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x_BSD: Tensor, keep_BS: Tensor | None = None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), keep_BS)
        gate_BSF, up_BSF = self.gate_up(self.ff_norm(x_BSD)).chunk(2, -1)
        return x_BSD + self.down(F.silu(gate_BSF) * up_BSF)

    def attention(self, x_BSD: Tensor, keep_BS: Tensor | None) -> Tensor:
        shape = self.shape
        heads_BHSE = self.qkv(x_BSD).unflatten(-1, (-1, shape.head_width)).transpose(1, 2)
        q_BHSE, k_BGSE, v_BGSE = heads_BHSE.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        turn = rotary(x_BSD.size(1), shape, q_BHSE)
        q_BHSE, k_BGSE = turned(q_BHSE, *turn), turned(k_BGSE, *turn)
        # Keys are repeated for their group rather than left to `enable_gqa`: with a mask that falls back to the slow path on GPUs.
        k_BHSE, v_BHSE = (part.repeat_interleave(shape.heads // shape.kv_heads, 1) for part in (k_BGSE, v_BGSE))
        mask_B11S = None if keep_BS is None else keep_BS[:, None, None]
        read_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, mask_B11S)
        return self.o(read_BHSE.transpose(1, 2).flatten(2))


def rotary(positions: int, shape: BlockShape, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, E] of positions 0..S-1; both halves of a head's width have the same angles. Made in fp32."""
    rate_E = shape.theta ** (-torch.arange(0, shape.head_width, 2, device=like.device).float() / shape.head_width)
    angle_SE = torch.outer(torch.arange(positions, device=like.device).float(), rate_E).repeat(1, 2)
    return angle_SE.cos().to(like.dtype), angle_SE.sin().to(like.dtype)


def turned(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Each pair (i, i + E/2) turned by its angle."""
    first, second = x_BHSE.chunk(2, -1)
    return x_BHSE * cos_SE + torch.cat([-second, first], -1) * sin_SE
