"""A trained T5 made ready for beam search: the same function as ``model.T5``, its work arranged for many beams a user.

In: a ``T5``, a precision. Out: ``Inference``: reads histories once a user, then advances all beams by one code a step.

What is arranged, once, when it is built:

- The weight of each RMS norm is folded into the projection behind it, the scale of the tied embeddings into the head.
- Keys and values of the encoder's output are made once a user and layer; all beams of a user are the queries of one attention.
- T5 adds no positions to its embeddings, so queries, keys and values of a first layer depend on the token alone: they are
  looked up. In the decoder everything before the first cross-attention depends on the codes written so far alone, not on
  the user (``opening``): decoding over a trie can look it up by node.

The residual stream is fp32 in every precision; bf16 is the precision of the products, of keys, values and attention.

Legend: B users, S encoder tokens, K beams a user, M = B x K rows, T codes written so far and the start token, N prefixes,
D width, H heads, E head width, I = H x E, F inner width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utgrec.recommender.model import PAD, T5, RMSNorm

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each [B, S or K, H, E]."""


class EncoderWeights(NamedTuple):
    """[in, out], so that a row of activations is multiplied from the left."""

    qkv_D3I: Tensor
    o_ID: Tensor
    wi_DF: Tensor
    wo_FD: Tensor


class DecoderWeights(NamedTuple):
    qkv_D3I: Tensor
    o_ID: Tensor
    cross_q_DI: Tensor
    cross_o_ID: Tensor
    wi_DF: Tensor
    wo_FD: Tensor


class Memory(NamedTuple):
    """What the decoder reads of B histories: keys and values a layer, and 0 or -inf a token (None where nothing is padded)."""

    layers: list[KeysValues]
    mask_B11S: Tensor | None


class Inference:
    def __init__(self, model: T5, precision: str = "fp32"):
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        self.shape, self.dtype = model.shape, PRECISIONS[precision]
        self.device = model.tokens.weight.device
        with torch.no_grad():
            self._prepare(model)

    def _prepare(self, model: T5) -> None:
        def plain(linear: nn.Linear) -> Tensor:
            return linear.weight.float().T.to(self.dtype).contiguous()

        def folded(norm: RMSNorm, weight_OD: Tensor) -> Tensor:
            return (weight_OD.float() * norm.weight.float()).T.to(self.dtype).contiguous()

        shape = self.shape
        self.tokens_VD = model.tokens.weight.detach().float().clone()
        self.encoder = [
            EncoderWeights(
                folded(layer.attention.norm, layer.attention.qkv.weight),
                plain(layer.attention.o),
                folded(layer.feed_forward.norm, layer.feed_forward.wi.weight),
                plain(layer.feed_forward.wo),
            )
            for layer in model.encoder
        ]
        self.decoder = [
            DecoderWeights(
                folded(layer.attention.norm, layer.attention.qkv.weight),
                plain(layer.attention.o),
                folded(layer.cross.norm, layer.cross.q.weight),
                plain(layer.cross.o),
                folded(layer.feed_forward.norm, layer.feed_forward.wi.weight),
                plain(layer.feed_forward.wo),
            )
            for layer in model.decoder
        ]
        self.cross_kv = [folded(model.encoder_norm, layer.cross.kv.weight) for layer in model.decoder]
        self.head_DV = folded(model.decoder_norm, model.tokens.weight * shape.d_model**-0.5)
        normed_VD = self._norm(self.tokens_VD)
        self.encoder_qkv_V3I = normed_VD @ self.encoder[0].qkv_D3I
        self.decoder_qkv_V3I = normed_VD @ self.decoder[0].qkv_D3I
        self._encoder_positions, self._decoder_positions = model.encoder_positions, model.decoder_positions
        self._encoder_bias: dict[int, Tensor] = {}

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.shape.epsilon).to(self.dtype)

    def _heads(self, x_MI: Tensor, users: int, parts: int = 1) -> tuple[Tensor, ...]:
        """[M, parts x I] -> parts of [B, M / B, H, E]"""
        return x_MI.view(users, -1, parts, self.shape.heads, self.shape.d_kv).unbind(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over [B, ., H, E] without 1/sqrt(d), as T5 has it. -> [M, I]"""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0).transpose(1, 2).reshape(-1, self.shape.inner)

    def _feed_forward(self, x_MD: Tensor, layer: EncoderWeights | DecoderWeights) -> None:
        _add_product(x_MD, (self._norm(x_MD) @ layer.wi_DF).relu_(), layer.wo_FD)

    # ------------------------------------------------------------------------------------------------- the encoder

    def read(self, tokens_BS: Tensor, padded: bool = True) -> Memory:
        """Read B histories. ``padded`` says whether any token is padding; without, no mask is made."""
        users, length = tokens_BS.shape
        mask_B11S, bias_BHSS = None, self._bias_of(length)
        if padded:
            mask_B11S = torch.zeros(tokens_BS.shape, device=self.device).masked_fill_(tokens_BS == PAD, -torch.inf)
            mask_B11S = mask_B11S.to(self.dtype)[:, None, None]
            bias_BHSS = bias_BHSS + mask_B11S
        tokens_M = tokens_BS.flatten()
        x_MD = self.tokens_VD.index_select(0, tokens_M)
        for number, layer in enumerate(self.encoder):
            qkv = self._norm(x_MD) @ layer.qkv_D3I if number else self.encoder_qkv_V3I.index_select(0, tokens_M)
            _add_product(x_MD, self._attend(*self._heads(qkv, users, 3), bias_BHSS), layer.o_ID)
            self._feed_forward(x_MD, layer)
        x_MD = self._norm(x_MD)
        return Memory([self._heads(x_MD @ weight, users, 2) for weight in self.cross_kv], mask_B11S)

    def _bias_of(self, length: int) -> Tensor:
        """[1, H, S, S]; one a length is kept."""
        if length not in self._encoder_bias:
            with torch.no_grad():
                self._encoder_bias[length] = self._encoder_positions(length, length).to(self.dtype).contiguous()
        return self._encoder_bias[length]

    # ------------------------------------------------------------------------------------------------- the decoder

    def opening(self, prefix_NT: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder does before it looks at a user: x [N, D] after the first self-attention, its cross-attention's q [N, I].

        ``prefix_NT`` holds the start token and the tokens written so far.
        """
        q, k, v = self.decoder_qkv_V3I.view(-1, 3, self.shape.heads, self.shape.d_kv).unbind(1)
        past = [(k[tokens_N][None], v[tokens_N][None]) for tokens_N in prefix_NT.unbind(1)]
        x_ND = self.tokens_VD[prefix_NT[:, -1]]
        _add_product(x_ND, self._look_back(q[prefix_NT[:, -1]][None], past), self.decoder[0].o_ID)
        return x_ND, self._norm(x_ND) @ self.decoder[0].cross_q_DI

    def step(self, x_MD: Tensor, q_MI: Tensor, memory: Memory, past: list[list[KeysValues]]) -> Tensor:
        """From the openings of all beams to logits fp32 [M, V].

        ``past`` has a list a layer but the first: keys and values of the steps before, reordered to the beams as they are now
        ([B, K, H, E], or [B, 1, H, E] for what all beams of a user share). This step's are appended. ``x_MD`` is overwritten.
        """
        users = memory.layers[0][0].size(0)
        for number, layer in enumerate(self.decoder):
            if number:
                q, k, v = self._heads(self._norm(x_MD) @ layer.qkv_D3I, users, 3)
                past[number - 1].append((k, v))
                _add_product(x_MD, self._look_back(q, past[number - 1]), layer.o_ID)
                q_MI = self._norm(x_MD) @ layer.cross_q_DI
            (q,) = self._heads(q_MI, users)
            _add_product(x_MD, self._attend(q, *memory.layers[number], memory.mask_B11S), layer.cross_o_ID)
            self._feed_forward(x_MD, layer)
        return (self._norm(x_MD) @ self.head_DV).float()

    def _look_back(self, q_BKHE: Tensor, past: list[KeysValues]) -> Tensor:
        """Self-attention of each beam on its own few codes: element by element, for no matrix product is this small. -> [M, I]"""
        bias_1HT = self._look_back_bias(len(past))
        weight_BKHT = torch.stack([(q_BKHE * k).sum(-1) for k, _ in past], -1).add_(bias_1HT).softmax(-1)
        out = weight_BKHT[..., :1] * past[0][1]
        for place, (_, v) in enumerate(past[1:], 1):
            out.addcmul_(weight_BKHT[..., place, None], v)
        return out.view(-1, self.shape.inner)

    def _look_back_bias(self, steps: int) -> Tensor:
        with torch.no_grad():
            return self._decoder_positions(steps, steps)[0, :, -1].to(self.dtype)


def _add_product(x_MD: Tensor, a: Tensor, weight: Tensor) -> None:
    """x += a @ weight, in place: the product is summed into x where the types allow it."""
    if x_MD.dtype == a.dtype:
        x_MD.addmm_(a, weight)
    else:
        x_MD.add_(a @ weight)
