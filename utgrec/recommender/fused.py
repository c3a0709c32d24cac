"""The parts of the T5 for CPUs: the mathematics of model.py with forward and backward written out.

In: the packed tokens of a batch, x [N, D], and the weights of a part. Out: x plus what the part adds, and all gradients.

Why: a step of plain torch on packed rows takes 2.5 s of one core (batch 256 of office2014, AMD EPYC 9004), a step of this 1.8 s,
its matrix products alone 1.5 s. What it avoids:

- Random numbers. ``F.dropout`` takes 7.3 ns an element, more than the product that made it; ``kept`` takes 1.1 ns (0.25 s).
  The scales 1/(1-p) of two dropouts in a row become one factor of the sum that follows.
- Passes over memory. A part walks over its tokens in pieces of about ``PIECE``, adds and multiplies in place, keeps for backward
  only what it must, and finds the rest in the cache; one comparison undoes ReLU and dropout together (0.4 s, and half of the
  memory: 0.7 GB for a batch where plain torch takes 1.45).
- Padding. Rows lie one after the other in groups of equal length (``Layout``), so that attention sees none (model.py).

Legend: N tokens of a batch, R rows of a piece, S tokens of a row, D width, H heads, E head width, F inner width, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

Layout = tuple[tuple[int, int], ...]
"""How packed rows lie: (rows, tokens of each), group after group."""
PIECE = 1024
"""Tokens that are worked on together."""


class How(NamedTuple):
    """What a part needs to know besides tensors."""

    dropout: float
    epsilon: float
    dtype: torch.dtype
    """Of the matrix products; sums, norms and softmax are in fp32."""
    keep: bool
    """Whether there will be a backward."""


def pieces(layout: Layout) -> Iterator[tuple[slice, slice, int, int]]:
    """(its tokens, its rows, rows R, length S) of every piece."""
    token = row = 0
    for rows, length in layout:
        most = max(1, PIECE // length)
        for done in range(0, rows, most):
            count = min(most, rows - done)
            yield slice(token, token + count * length), slice(row, row + count), count, length
            token, row = token + count * length, row + count


def kept(like: Tensor, p: float) -> Tensor:
    """1 where dropout keeps an element, else 0: 16 random bits an element, so that p is met to 1/65536.

    The bits come from torch's generator: the same seed gives the same masks.
    """
    bits = torch.empty(like.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return bits[: like.numel()].view(like.shape).float().ge_(round(65536 * p) - 32768).to(like.dtype)


def scale(p: float) -> float:
    """What the elements that dropout keeps are multiplied by."""
    return 1.0 / (1.0 - round(65536 * p) / 65536)


class Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = kept(x, p).mul_(scale(p))
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy * ctx.saved_tensors[0], None


def normed(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight, and 1 / rms(x)."""
    inverse = x.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (x * inverse).mul_(weight_D), inverse


def normed_backward(dn: Tensor, x: Tensor, inverse: Tensor, weight_D: Tensor, d_weight_D: Tensor) -> Tensor:
    """The gradient of x; that of the weight is added to ``d_weight_D``. Overwrites ``dn``."""
    unit = x * inverse
    d_weight_D += (dn * unit).sum(0)
    dn.mul_(weight_D)
    return dn.sub_(unit.mul_((dn * unit).mean(-1, keepdim=True))).mul_(inverse)


def by(size: int, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """What was saved for backward, a tuple a piece."""
    return zip(*[iter(tensors)] * size, strict=True)


def wide(x: Tensor) -> Tensor:
    """In fp32 if it was in half of that."""
    return x.float() if x.itemsize == 2 else x


def add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a' b; the sum stays in fp32 whatever a and b are."""
    if a.dtype == sum_.dtype:
        sum_.addmm_(a.t(), b)
    else:
        sum_ += a.t() @ b


class FeedForward(Function):
    """x + dropout(wo(dropout(relu(wi(norm(x))))))"""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, norm_D: Tensor, wi: Tensor, wo: Tensor, how: How) -> Tensor:
        p, epsilon, dtype, keep = how
        wi, wo = wi.to(dtype), wo.to(dtype)
        out_ND, saved, factor = torch.empty_like(x_ND), [], scale(p) ** 2
        for x, out in zip(x_ND.split(PIECE), out_ND.split(PIECE), strict=True):
            n, inverse = normed(x, norm_D, epsilon)
            inner = (n.to(dtype) @ wi.t()).relu_()
            if p:
                inner.mul_(kept(inner, p))
            h, mask = wide(inner @ wo.t()), None
            if p:
                h.mul_(mask := kept(h, p))
            torch.add(x, h, alpha=factor, out=out)
            if keep:
                saved += inverse, inner, mask
        ctx.save_for_backward(x_ND, norm_D, wi, wo, *saved)
        ctx.factor = factor
        return out_ND

    @staticmethod
    def backward(ctx: Any, dout_ND: Tensor) -> Any:
        x_ND, norm_D, wi, wo, *saved = ctx.saved_tensors
        dx_ND, d_norm, d_wi, d_wo = (torch.zeros_like(part, dtype=x_ND.dtype) for part in (x_ND, norm_D, wi, wo))
        parts = (whole.split(PIECE) for whole in (x_ND, dx_ND, dout_ND))
        for x, dx, dout, (inverse, inner, mask) in zip(*parts, by(3, saved), strict=True):
            dh = dout * ctx.factor
            if mask is not None:
                dh.mul_(mask)
            dh = dh.to(wo.dtype)
            add_product(d_wo, dh, inner)
            # One comparison undoes ReLU and dropout: what either has set to 0 is 0 in ``inner``.
            d_inner = torch.ops.aten.threshold_backward(dh @ wo, inner, 0.0)
            unit = x * inverse
            add_product(d_wi, d_inner, (unit * norm_D).to(wi.dtype))
            torch.add(dout, normed_backward(wide(d_inner @ wi), x, inverse, norm_D, d_norm), out=dx)
        return dx_ND, d_norm, d_wi, d_wo, None


class SelfAttention(Function):
    """x + dropout(o(dropout(softmax(q k' + bias)) v)) with q, k, v = qkv(norm(x)), each row by itself"""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, norm_D: Tensor, w_qkv: Tensor, w_o: Tensor, bias_HSS: Tensor, layout: Layout, how: How) -> Tensor:
        p, epsilon, dtype, keep = how
        w_qkv, w_o, H = w_qkv.to(dtype), w_o.to(dtype), len(bias_HSS)
        out_ND, saved, factor = torch.empty_like(x_ND), [], scale(p) ** 2
        for part, _, R, S in pieces(layout):
            x = x_ND[part]
            n, inverse = normed(x, norm_D, epsilon)
            qkv = (n.to(dtype) @ w_qkv.t()).view(R, S, 3, H, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)  # [3, R*H, S, E]
            q, k, v = qkv.contiguous()
            scores = wide(torch.bmm(q, k.transpose(1, 2)))
            scores.view(R, H, S, S).add_(bias_HSS[:, :S, :S])
            weights = dropped = torch.softmax(scores, -1)
            if p:
                dropped = weights * kept(weights, p)
            heads = torch.bmm(dropped.to(dtype), v).view(R, H, S, -1).transpose(1, 2).reshape(R * S, -1)
            h, mask = wide(heads @ w_o.t()), None
            if p:
                h.mul_(mask := kept(h, p))
            torch.add(x, h, alpha=factor, out=out_ND[part])
            if keep:
                saved += inverse, q, k, v, weights, dropped, heads, mask
        ctx.save_for_backward(x_ND, norm_D, w_qkv, w_o, bias_HSS, *saved)
        ctx.layout, ctx.factor = layout, factor
        return out_ND

    @staticmethod
    def backward(ctx: Any, dout_ND: Tensor) -> Any:
        x_ND, norm_D, w_qkv, w_o, bias_HSS, *saved = ctx.saved_tensors
        H, dtype = len(bias_HSS), w_o.dtype
        grads = dx_ND, d_norm, d_qkv, d_o, d_bias = [
            torch.zeros_like(part, dtype=x_ND.dtype) for part in (x_ND, norm_D, w_qkv, w_o, bias_HSS)
        ]
        for (part, _, R, S), (inverse, q, k, v, weights, dropped, heads, mask) in zip(pieces(ctx.layout), by(8, saved), strict=True):
            x, dout = x_ND[part], dout_ND[part]
            dh = dout * ctx.factor
            if mask is not None:
                dh.mul_(mask)
            dh = dh.to(dtype)
            add_product(d_o, dh, heads)
            d_heads = (dh @ w_o).view(R, S, H, -1).transpose(1, 2).reshape(R * H, S, -1)
            # The gradient of softmax under dropout: dropped * d - weights * sum(dropped * d).
            d_scores = wide(torch.bmm(d_heads, v.transpose(1, 2))).mul_(dropped)
            d_scores.addcmul_(weights, d_scores.sum(-1, keepdim=True), value=-1)
            d_bias[:, :S, :S] += d_scores.view(R, H, S, S).sum(0)
            d_scores = d_scores.to(dtype)
            d_qkv_piece = torch.empty(R, S, 3, H, q.size(-1), dtype=dtype)
            dq, dk, dv = d_qkv_piece.permute(2, 0, 3, 1, 4)
            dq.copy_(torch.bmm(d_scores, k).view(dq.shape))
            dk.copy_(torch.bmm(d_scores.transpose(1, 2), q).view(dq.shape))
            dv.copy_(torch.bmm(dropped.to(dtype).transpose(1, 2), d_heads).view(dq.shape))
            d_out = d_qkv_piece.view(R * S, -1)
            add_product(d_qkv, d_out, (x * inverse).mul_(norm_D).to(dtype))
            torch.add(dout, normed_backward(wide(d_out @ w_qkv), x, inverse, norm_D, d_norm), out=dx_ND[part])
        return *grads, None, None


class AttendMemory(Function):
    """dropout(softmax(q memory')) memory for the Q queries [B, Q, D] of every row: what cross-attention needs (model.py)."""

    @staticmethod
    def forward(ctx: Any, q_BQD: Tensor, memory_ND: Tensor, layout: Layout, how: How) -> Tensor:
        p, out_BQD, saved = how.dropout, torch.empty_like(q_BQD), []
        for part, rows, R, S in pieces(layout):
            memory = memory_ND[part].view(R, S, -1)
            weights = dropped = torch.softmax(wide(torch.bmm(q_BQD[rows], memory.transpose(1, 2))), -1)
            if p:
                dropped = weights * kept(weights, p)
            torch.bmm(dropped.to(memory.dtype), memory, out=out_BQD[rows])
            if how.keep:
                saved += weights, dropped
        ctx.save_for_backward(q_BQD, memory_ND, *saved)
        ctx.layout, ctx.scale = layout, scale(p)
        return out_BQD.mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, dout_BQD: Tensor) -> Any:
        q_BQD, memory_ND, *saved = ctx.saved_tensors
        dq_BQD, d_memory_ND, dout_BQD = torch.empty_like(q_BQD), torch.empty_like(memory_ND), dout_BQD * ctx.scale
        for (part, rows, R, S), (weights, dropped) in zip(pieces(ctx.layout), by(2, saved), strict=True):
            memory, q, dout = memory_ND[part].view(R, S, -1), q_BQD[rows], dout_BQD[rows]
            d_scores = wide(torch.bmm(dout, memory.transpose(1, 2))).mul_(dropped)
            d_scores.addcmul_(weights, d_scores.sum(-1, keepdim=True), value=-1)
            d_scores = d_scores.to(q.dtype)
            torch.bmm(d_scores, memory, out=dq_BQD[rows])
            d_memory = torch.bmm(d_scores.transpose(1, 2), q)
            torch.baddbmm(d_memory, dropped.to(q.dtype).transpose(1, 2), dout, out=d_memory_ND[part].view(R, S, -1))
        return dq_BQD, d_memory_ND, None, None
