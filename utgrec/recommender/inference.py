"""A trained T5 made ready for beam search: the same function as ``model.T5``, its work arranged for many beams a user.

In: a ``T5`` and a precision (``Weights.of``). Out: ``Inference``: reads histories once a user (``read``), then advances all
beams by one code a step (``opening``, ``step``).

The matrix products are all but a few percent of the time and cannot be avoided, so what is left is to do nothing else:

- The weight of each RMS norm is folded into the product behind it, the scale of the tied embeddings into the head.
- The encoder's output becomes keys and values once a user and layer; all beams of a user are the queries of one attention.
- T5 adds no positions to its embeddings, so queries, keys and values of a first layer depend on the token alone: a table.
  In the decoder all that comes before the first cross-attention depends on the codes written so far alone, not on the user
  (``opening``): a search over a trie looks it up by node.
- Residuals are summed by the product itself; large results go to buffers that live as long as the search (``Buffers``).

What each gives is in results/performance/decoding.md. The residual stream is fp32 in every precision; bf16 is the precision
of the products, of keys, values and attention.

Legend: B users, S encoder tokens, K beams a user, M = B x K rows (or B x S), T start token and codes written so far,
N prefixes, D width, H heads, E head width, I = H x E, F inner width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utgrec.recommender.model import PAD, T5, RelativePositions, RMSNorm, Shape

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Layer(NamedTuple):
    """Weights [in, out], so that rows of activations are multiplied from the left. Norms are folded in."""

    q_DI: Tensor
    kv_D2I: Tensor
    o_ID: Tensor
    wi_DF: Tensor
    wo_FD: Tensor
    cross_q_DI: Tensor | None = None
    cross_kv_D2I: Tensor | None = None
    cross_o_ID: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """Everything of a model that decoding needs; nothing here changes, so threads may share it."""

    shape: Shape
    dtype: torch.dtype
    tokens_VD: Tensor
    encoder: list[Layer]
    decoder: list[Layer]
    head_DV: Tensor
    first_encoder: tuple[Tensor, Tensor]
    """q [V, I] and kv [V, 2I] of every token in the first encoder layer."""
    first_decoder: tuple[Tensor, Tensor]
    encoder_positions: RelativePositions
    decoder_positions: RelativePositions

    @classmethod
    @torch.no_grad()
    def of(cls, model: T5, precision: str = "fp32") -> Weights:
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        shape, dtype = model.shape, PRECISIONS[precision]

        def ready(weight_OD: Tensor, norm: RMSNorm | None = None) -> Tensor:
            weight_OD = weight_OD.float() if norm is None else weight_OD.float() * norm.weight.float()
            return weight_OD.T.to(dtype).contiguous()

        def layer(part: nn.Module) -> Layer:
            own, inner = part.attention, part.feed_forward
            q, kv = own.qkv.weight.split([shape.inner, 2 * shape.inner])
            wi, wo = ready(inner.wi.weight, inner.norm), ready(inner.wo.weight)
            weights = Layer(ready(q, own.norm), ready(kv, own.norm), ready(own.o.weight), wi, wo)
            if not hasattr(part, "cross"):
                return weights
            q, kv = ready(part.cross.q.weight, part.cross.norm), ready(part.cross.kv.weight, model.encoder_norm)
            return weights._replace(cross_q_DI=q, cross_kv_D2I=kv, cross_o_ID=ready(part.cross.o.weight))

        encoder, decoder = [layer(part) for part in model.encoder], [layer(part) for part in model.decoder]
        tokens_VD = model.tokens.weight.detach().float().clone()
        normed_VD = F.rms_norm(tokens_VD, tokens_VD.shape[-1:], None, shape.epsilon).to(dtype)
        return cls(
            shape=shape,
            dtype=dtype,
            tokens_VD=tokens_VD,
            encoder=encoder,
            decoder=decoder,
            head_DV=ready(model.tokens.weight * shape.d_model**-0.5, model.decoder_norm),
            first_encoder=(normed_VD @ encoder[0].q_DI, normed_VD @ encoder[0].kv_D2I),
            first_decoder=(normed_VD @ decoder[0].q_DI, normed_VD @ decoder[0].kv_D2I),
            encoder_positions=model.encoder_positions,
            decoder_positions=model.decoder_positions,
        )


class Memory(NamedTuple):
    """What the decoder reads of B histories."""

    layers: list[tuple[Tensor, Tensor]]
    """Keys and values [B, S, H, E] of every decoder layer."""
    mask_B11S: Tensor | None
    """0, and -inf at padding; None where nothing is padded."""


class Past:
    """Keys and values of the steps before, and the row of each that a beam of now descends from.

    They stay where they were written; a layer gathers what it needs when it needs it, while the next one still sits in memory.
    """

    def __init__(self, layers: int):
        self.layers: list[list[Tensor]] = [[] for _ in range(layers)]
        """For each layer (but the first, which needs none) and step [M of that step, 2I]."""
        self.rows: list[Tensor | None] = []
        """For each step [M], or None for the first: its single beam is everyone's."""

    def descend(self, rows_M: Tensor) -> None:
        """The beams of the next step come from these rows of this one."""
        self.rows = [*self.rows[:1], *(rows[rows_M] for rows in self.rows[1:]), rows_M] if self.rows else [None]


class Buffers:
    """Named pieces of memory that are taken again and again: fresh megabytes cost more page faults than they save lines."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._held[name] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return held[: rows * columns].view(rows, columns)


class Inference:
    """The model at work on one batch after another. One a thread: its buffers are overwritten by the next call."""

    def __init__(self, weights: Weights):
        self.weights, self.shape, self._buffers = weights, weights.shape, Buffers()
        self._bias: dict[tuple[str, int], Tensor] = {}

    # ------------------------------------------------------------------------------------------------- the encoder

    def read(self, tokens_BS: Tensor, padded: bool = True) -> Memory:
        """Read B histories. ``padded`` says whether any token is padding; where none is, no mask is made."""
        weights, (users, length) = self.weights, tokens_BS.shape
        mask_B11S, bias_BHSS = None, self._encoder_bias(length)
        if padded:
            mask_BS = torch.zeros(tokens_BS.shape, dtype=weights.dtype, device=tokens_BS.device)
            mask_B11S = mask_BS.masked_fill_(tokens_BS == PAD, -torch.inf)[:, None, None]
            bias_BHSS = bias_BHSS + mask_B11S
        tokens_M = tokens_BS.flatten()
        x_MD = weights.tokens_VD.index_select(0, tokens_M)
        for number, layer in enumerate(weights.encoder):
            if number:
                normed_MD = self._normed(x_MD)
                q_MI, kv_M2I = self._product("q", normed_MD, layer.q_DI), self._product("kv", normed_MD, layer.kv_D2I)
            else:
                q_MI, kv_M2I = (self._rows(name, table, tokens_M) for name, table in zip(("q", "kv"), weights.first_encoder, strict=True))
            _add_product(x_MD, self._attend(self._heads(q_MI, users), self._keys_values(kv_M2I, users), bias_BHSS), layer.o_ID)
            self._feed_forward(x_MD, layer)
        normed_MD = self._normed(x_MD)
        products = (self._product(f"memory {n}", normed_MD, layer.cross_kv_D2I) for n, layer in enumerate(weights.decoder))
        return Memory([self._keys_values(kv_M2I, users) for kv_M2I in products], mask_B11S)

    # ------------------------------------------------------------------------------------------------- the decoder

    def opening(self, prefix_NT: Tensor) -> Tensor:
        """x [N, D] after the first self-attention: what the decoder does before it looks at a user.

        ``prefix_NT`` holds the start token and the tokens written so far.
        """
        (q_VI, kv_V2I), last_N = self.weights.first_decoder, prefix_NT[:, -1]
        q_N1HE = self._heads(self._rows("q", q_VI, last_N), len(prefix_NT))
        own = [self._rows(f"past {step}", kv_V2I, tokens_N) for step, tokens_N in enumerate(prefix_NT.unbind(1))]
        x_ND = self.weights.tokens_VD.index_select(0, last_N)
        _add_product(x_ND, self._look_back(q_N1HE, own), self.weights.decoder[0].o_ID)
        return x_ND

    def step(self, x_MD: Tensor, memory: Memory, past: Past) -> Tensor:
        """From the openings of all beams to log-probabilities fp32 [M, V]. Overwrites ``x_MD``, and ``past`` gets this step's part."""
        users, steps = len(memory.layers[0][0]), len(past.rows)
        for number, layer in enumerate(self.weights.decoder):
            if number:
                normed_MD, own = self._normed(x_MD), past.layers[number]
                q_BKHE = self._heads(self._product("q", normed_MD, layer.q_DI), users)
                seen = [
                    kv if rows_M is None else self._rows(f"past {step}", kv, rows_M)
                    for step, (kv, rows_M) in enumerate(zip(own, past.rows, strict=True))
                ]
                own.append(self._product(f"past {number} {steps}", normed_MD, layer.kv_D2I))
                _add_product(x_MD, self._look_back(q_BKHE, [*seen, own[-1]]), layer.o_ID)
            q_BKHE = self._heads(self._product("q", self._normed(x_MD), layer.cross_q_DI), users)
            _add_product(x_MD, self._attend(q_BKHE, memory.layers[number], memory.mask_B11S), layer.cross_o_ID)
            self._feed_forward(x_MD, layer)
        logits_MV = self._product("logits", self._normed(x_MD), self.weights.head_DV).float()
        return torch.log_softmax(logits_MV, -1, out=self._buffers.take("log", *logits_MV.shape, logits_MV))

    # ---------------------------------------------------------------------------------------------------- the parts

    def _normed(self, x_MD: Tensor) -> Tensor:
        return F.rms_norm(x_MD, x_MD.shape[-1:], None, self.shape.epsilon).to(self.weights.dtype)

    def _product(self, name: str, a: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(a, weight, out=self._buffers.take(name, len(a), weight.size(1), weight))

    def _rows(self, name: str, table: Tensor, rows_M: Tensor) -> Tensor:
        return torch.index_select(table, 0, rows_M, out=self._buffers.take(name, len(rows_M), table.size(1), table))

    def _heads(self, x_MI: Tensor, users: int) -> Tensor:
        return x_MI.view(users, -1, self.shape.heads, self.shape.d_kv)

    def _keys_values(self, kv_M2I: Tensor, users: int) -> tuple[Tensor, Tensor]:
        return kv_M2I.view(users, -1, 2, self.shape.heads, self.shape.d_kv).unbind(2)

    def _attend(self, q: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attention over [B, ., H, E] without 1/sqrt(d), as T5 has it. -> [M, I]"""
        q, k, v = (part.transpose(1, 2) for part in (q, *keys_values))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0).transpose(1, 2).reshape(-1, self.shape.inner)

    def _look_back(self, q_BKHE: Tensor, past: list[Tensor]) -> Tensor:
        """Self-attention of each beam on its own few codes: element by element, for no matrix product is this small. -> [M, I]"""
        (users, beams), inner = q_BKHE.shape[:2], self.shape.inner
        keys, values = zip(*(self._keys_values(kv, users) for kv in past), strict=True)
        product_BKHE, out_BKHE = (self._buffers.take(name, users * beams, inner, q_BKHE).view_as(q_BKHE) for name in ("look", "look out"))
        weight_TBKH = torch.stack([torch.mul(q_BKHE, k, out=product_BKHE).sum(-1) for k in keys])
        weight_TBKH = weight_TBKH.add_(self._decoder_bias(len(past))).softmax(0)
        torch.mul(weight_TBKH[0, ..., None], values[0], out=out_BKHE)
        for weight_BKH, v in zip(weight_TBKH[1:], values[1:], strict=True):
            out_BKHE.addcmul_(weight_BKH[..., None], v)
        return out_BKHE.view(-1, inner)

    def _feed_forward(self, x_MD: Tensor, layer: Layer) -> None:
        _add_product(x_MD, self._product("inner", self._normed(x_MD), layer.wi_DF).relu_(), layer.wo_FD)

    def _encoder_bias(self, length: int) -> Tensor:
        """[1, H, S, S]"""
        key = ("encoder", length)
        if key not in self._bias:
            self._bias[key] = self.weights.encoder_positions(length, length).to(self.weights.dtype).contiguous()
        return self._bias[key]

    def _decoder_bias(self, steps: int) -> Tensor:
        """[T, 1, 1, H]: of the last step's query and the key of each step."""
        key = ("decoder", steps)
        if key not in self._bias:
            bias_HT = self.weights.decoder_positions(steps, steps)[0, :, -1].to(self.weights.dtype)
            self._bias[key] = bias_HT.T[:, None, None].contiguous()
        return self._bias[key]


def _add_product(x_MD: Tensor, a: Tensor, weight: Tensor) -> None:
    """x += a @ weight, in place: summed by the product itself where the types allow it."""
    if x_MD.dtype == a.dtype:
        x_MD.addmm_(a, weight)
    else:
        x_MD.add_(a @ weight)
