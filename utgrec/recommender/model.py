"""The T5 encoder-decoder that reads the codes of a history and writes the codes of the next item.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR 2020 (T5 1.0: ReLU,
no biases, RMS norms before each part, relative position buckets shared by all layers, no 1/sqrt(d) in the attention). TIGER
(arXiv 2305.05065, section 3.2) and UTGRec (arXiv 2504.04405) both use it, at small sizes, trained from scratch. The same
weights give the same numbers as Hugging Face's T5ForConditionalGeneration (tests/parity/test_t5.py); ``from_hugging_face``
and ``to_hugging_face`` carry them across.

In: token numbers of a history. Out: the loss of the L codes of the next item, or the logits.

The rows of a batch lie packed, one after the other, in groups of equal length (``Layout``): on real histories more than half
of a padded batch is padding (a step on one core takes 6.9 s padded, 2.5 s packed). Each part says below what it computes in
plain torch, which GPUs and ``torch.compile`` use; on CPU fused.py computes the same in 1.8 s.

Legend: B batch, S encoder tokens, N tokens of all rows, L codes an item (decoder tokens), Q = L * H, V vocabulary, D width,
H heads, E head width, F inner width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utgrec.recommender import fused
from utgrec.recommender.fused import Layout

PAD = 0
"""Padding, and what the decoder starts from, as in T5."""
IGNORED = -100
"""A code that is no label: rows of a batch that only fill it up."""


@dataclass(frozen=True)
class Shape:
    """The size of a T5. The defaults are those of the TIGER paper (section 4, implementation details)."""

    vocabulary: int
    d_model: int = 128
    d_ff: int = 1024
    heads: int = 6
    d_kv: int = 64
    encoder_layers: int = 4
    decoder_layers: int = 4
    dropout: float = 0.1
    buckets: int = 32
    """Relative positions are told apart in this many buckets ..."""
    max_distance: int = 128
    """... of which the last holds everything from this distance on."""
    epsilon: float = 1e-6

    @property
    def inner(self) -> int:
        return self.heads * self.d_kv


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 whatever the precision around it."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon).to(x.dtype)


def written_out(x: Tensor) -> bool:
    """Whether fused.py does the work."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Part(nn.Module):
    """What the parts of a layer have in common: x + dropout(something of norm(x))."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.norm = shape, RMSNorm(shape.d_model, shape.epsilon)

    @property
    def dropout(self) -> float:
        return self.shape.dropout if self.training else 0.0

    def dropped(self, x: Tensor) -> Tensor:
        return dropped(x, self.dropout)

    def how(self, x: Tensor) -> fused.How:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return fused.How(self.dropout, self.shape.epsilon, dtype, torch.is_grad_enabled())


def dropped(x: Tensor, p: float) -> Tensor:
    return fused.Dropout.apply(x, p) if p and written_out(x) else F.dropout(x, p)


class FeedForward(Part):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.wi = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.wo = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        if written_out(x_ND):
            return fused.FeedForward.apply(x_ND, self.norm.weight, self.wi.weight, self.wo.weight, self.how(x_ND))
        return x_ND + self.dropped(self.wo(self.dropped(F.relu(self.wi(self.norm(x_ND))))))


class SelfAttention(Part):
    """T5 divides by no sqrt(E): it has that factor in its initial weights."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.qkv = nn.Linear(shape.d_model, 3 * shape.inner, bias=False)
        self.o = nn.Linear(shape.inner, shape.d_model, bias=False)

    def forward(self, x_ND: Tensor, bias_HSS: Tensor, rows: Rows) -> Tensor:
        if written_out(x_ND):
            weights = self.norm.weight, self.qkv.weight, self.o.weight
            return fused.SelfAttention.apply(x_ND, *weights, bias_HSS, rows.layout, self.how(x_ND))
        heads = []
        for qkv, mask_R11S, (_, S) in zip(rows.groups(self.qkv(self.norm(x_ND))), rows.masks, rows.layout, strict=True):
            q, k, v = qkv.unflatten(-1, (3, self.shape.heads, -1)).permute(2, 0, 3, 1, 4)  # [R, H, S, E]
            bias = (bias_HSS[:, :S, :S] + mask_R11S).to(q.dtype)
            heads.append(F.scaled_dot_product_attention(q, k, v, bias, self.dropout, scale=1.0).transpose(1, 2).flatten(-2).flatten(0, 1))
        return x_ND + self.dropped(self.o(torch.cat(heads)))


class CrossAttention(Part):
    """The L queries of a row look at its memory.

    With so few queries, keys and values of every token are not worth making: q (W m)' = (q W) m', so the queries go through
    the keys' weights, and the weighted sum of the memory through the values'. Same numbers, a sixth of all products and 14 % of
    a step's time less.
    """

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.q = nn.Linear(shape.d_model, shape.inner, bias=False)
        self.kv = nn.Linear(shape.d_model, 2 * shape.inner, bias=False)
        self.o = nn.Linear(shape.inner, shape.d_model, bias=False)

    def forward(self, x_BLD: Tensor, memory_ND: Tensor, rows: Rows) -> Tensor:
        H, L = self.shape.heads, x_BLD.size(1)
        keys_HED, values_HED = self.kv.weight.unflatten(0, (2, H, -1))
        q_BLHE = self.q(self.norm(x_BLD)).unflatten(-1, (H, -1))
        q_BQD = torch.einsum("blhe,hed->blhd", q_BLHE, keys_HED).flatten(1, 2)
        if written_out(x_BLD):
            how = self.how(x_BLD)
            out_BQD = fused.AttendMemory.apply(q_BQD, memory_ND.to(how.dtype), rows.layout, how)
        else:
            out = []
            for q, memory, mask_R11S in zip(q_BQD.split(rows.counts), rows.groups(memory_ND), rows.masks, strict=True):
                q, memory = q[:, None], memory[:, None].to(q.dtype)  # one head as wide as the model
                out.append(F.scaled_dot_product_attention(q, memory, memory, mask_R11S.to(q.dtype), self.dropout, scale=1.0)[:, 0])
            out_BQD = torch.cat(out)
        heads_BLHE = torch.einsum("blhd,hed->blhe", out_BQD.unflatten(1, (L, H)), values_HED)
        return x_BLD + self.dropped(self.o(heads_BLHE.flatten(-2)))


@dataclass
class Rows:
    """How the rows of a batch lie, and where they are padded."""

    layout: Layout
    tokens_N: Tensor

    def __post_init__(self) -> None:
        self.counts = [count for count, _ in self.layout]
        self.masks: list[Tensor] = []
        if not written_out(self.tokens_N):
            self.masks = [padding_mask(tokens_RS) for tokens_RS in self.groups(self.tokens_N)]
        elif (self.tokens_N == PAD).any():
            raise ValueError("packed rows with padding: on CPU every group must be as long as its rows (Histories.batch)")

    def groups(self, x_N: Tensor) -> list[Tensor]:
        """[N, ...] as one [R, S, ...] a group."""
        parts = x_N.split([count * length for count, length in self.layout])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.layout, strict=True)]

    @classmethod
    def of(cls, tokens_BS: Tensor) -> tuple[Rows, Tensor]:
        """Padded rows and the order they are taken in: by length where they can be packed."""
        if not written_out(tokens_BS):
            return cls((tuple(tokens_BS.shape),), tokens_BS.flatten()), torch.arange(len(tokens_BS), device=tokens_BS.device)
        length_B = (tokens_BS != PAD).sum(1)
        order_B = length_B.argsort(stable=True)
        lengths, counts = length_B.unique(return_counts=True)
        tokens_BS = tokens_BS[order_B]
        return cls(tuple(zip(counts.tolist(), lengths.tolist(), strict=True)), tokens_BS[tokens_BS != PAD]), order_B


class RelativePositions(nn.Module):
    """A learned number for each head and each bucket of (key position - query position); exact when near, logarithmic when far."""

    def __init__(self, shape: Shape, bidirectional: bool):
        super().__init__()
        self.bias = nn.Embedding(shape.buckets, shape.heads)
        self.shape, self.bidirectional = shape, bidirectional

    def bucket(self, distance: Tensor) -> Tensor:
        """``distance`` = key position - query position."""
        buckets, offset = self.shape.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset, distance = buckets * (distance > 0), distance.abs()
        else:
            distance = -distance.clamp(max=0)
        exact = buckets // 2
        scale = (buckets - exact) / math.log(self.shape.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def forward(self, queries: int, keys: int) -> Tensor:
        """[1, H, queries, keys]"""
        device = self.bias.weight.device
        distance = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None]
        return self.bias(self.bucket(distance)).permute(2, 0, 1)[None]


class EncoderLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention, self.feed_forward = SelfAttention(shape), FeedForward(shape)


class DecoderLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention, self.cross, self.feed_forward = SelfAttention(shape), CrossAttention(shape), FeedForward(shape)


class T5(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.d_model)
        self.encoder_positions = RelativePositions(shape, bidirectional=True)
        self.decoder_positions = RelativePositions(shape, bidirectional=False)
        self.encoder = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.decoder_layers))
        self.encoder_norm = RMSNorm(shape.d_model, shape.epsilon)
        self.decoder_norm = RMSNorm(shape.d_model, shape.epsilon)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's initial weights: normal, with the deviations that stand in for 1/sqrt(d) in the attention."""
        shape, narrow = self.shape, self.shape.d_model**-0.5
        nn.init.normal_(self.tokens.weight)
        for positions in (self.encoder_positions, self.decoder_positions):
            nn.init.normal_(positions.bias.weight, std=narrow)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                query, rest = module.qkv.weight.split([shape.inner, 2 * shape.inner])
                nn.init.normal_(query, std=(shape.d_model * shape.d_kv) ** -0.5)
                nn.init.normal_(rest, std=narrow)
            elif isinstance(module, CrossAttention):
                nn.init.normal_(module.q.weight, std=(shape.d_model * shape.d_kv) ** -0.5)
                nn.init.normal_(module.kv.weight, std=narrow)
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.wi.weight, std=narrow)
                nn.init.normal_(module.wo.weight, std=shape.d_ff**-0.5)
            if isinstance(module, SelfAttention | CrossAttention):
                nn.init.normal_(module.o.weight, std=shape.inner**-0.5)

    def dropped(self, x: Tensor) -> Tensor:
        return dropped(x, self.shape.dropout if self.training else 0.0)

    def encode(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, D]. Tokens are padded with ``PAD`` at the right; there the result means nothing."""
        rows, order_B = Rows.of(tokens_BS)
        memory_ND = self.encode_rows(rows)
        if len(memory_ND) == tokens_BS.numel():
            return memory_ND.view(*tokens_BS.shape, -1)[order_B.argsort()]
        memory_BSD = memory_ND.new_zeros(*tokens_BS.shape, self.shape.d_model)
        memory_BSD[tokens_BS[order_B] != PAD] = memory_ND
        return memory_BSD[order_B.argsort()]

    def encode_rows(self, rows: Rows) -> Tensor:
        """[N, D]"""
        longest = max(length for _, length in rows.layout)
        bias_HSS = self.encoder_positions(longest, longest)[0].contiguous()
        x_ND = self.dropped(self.tokens(rows.tokens_N))
        for layer in self.encoder:
            x_ND = layer.feed_forward(layer.attention(x_ND, bias_HSS, rows))
        return self.dropped(self.encoder_norm(x_ND))

    def decode_rows(self, memory_ND: Tensor, rows: Rows, codes_BL: Tensor) -> Tensor:
        """[B, L, V]"""
        B, L = codes_BL.shape
        start_B1 = codes_BL.new_full((B, 1), PAD)
        x_BLD = self.dropped(self.tokens(torch.cat([start_B1, codes_BL[:, :-1].clamp(min=PAD)], 1)))
        future_LL = torch.full((L, L), -torch.inf, device=x_BLD.device).triu(1)
        bias_HLL = self.decoder_positions(L, L)[0] + future_LL
        ours = Rows(((B, L),), torch.ones_like(codes_BL).flatten())  # no padding here
        for layer in self.decoder:
            x_BLD = layer.attention(x_BLD.flatten(0, 1), bias_HLL, ours).view(B, L, -1)
            x_BLD = layer.cross(x_BLD, memory_ND, rows)
            x_BLD = layer.feed_forward(x_BLD.flatten(0, 1)).view(B, L, -1)
        x_BLD = self.dropped(self.decoder_norm(x_BLD))
        return F.linear(x_BLD * self.shape.d_model**-0.5, self.tokens.weight)

    def logits(self, tokens_BS: Tensor, codes_BL: Tensor) -> Tensor:
        """[B, L, V]: of each code of the next item, given the codes before it (teacher forcing)."""
        rows, order_B = Rows.of(tokens_BS)
        return self.decode_rows(self.encode_rows(rows), rows, codes_BL[order_B])[order_B.argsort()]

    def forward(self, tokens: Tensor, codes_BL: Tensor, layout: Layout | None = None) -> Tensor:
        """Mean cross-entropy over all codes and the whole vocabulary: a label a code position.

        ``tokens`` are padded [B, S], or packed [N] with their ``layout`` (``model(*batch)``, data.py).
        """
        if layout is None:
            rows, order_B = Rows.of(tokens)
            codes_BL = codes_BL[order_B]
        else:
            rows = Rows(layout, tokens)
        logits_BLV = self.decode_rows(self.encode_rows(rows), rows, codes_BL)
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), codes_BL.flatten(), ignore_index=IGNORED)


def padding_mask(tokens_BS: Tensor) -> Tensor:
    """[B, 1, 1, S]: 0, and -inf at padding."""
    return torch.where(tokens_BS == PAD, -torch.inf, 0.0)[:, None, None]


# --------------------------------------------------------------------------------------------- weights of Hugging Face


def to_hugging_face(model: T5) -> dict[str, Tensor]:
    """The weights under the names of Hugging Face's T5ForConditionalGeneration (T5 1.0, tied embeddings)."""
    ours, theirs = model.state_dict(), {}
    tokens = ours["tokens.weight"]
    theirs |= dict.fromkeys(("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), tokens)
    for side in ("encoder", "decoder"):
        theirs[f"{side}.final_layer_norm.weight"] = ours[f"{side}_norm.weight"]
        theirs[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = ours[f"{side}_positions.bias.weight"]
        for i in range(len(getattr(model, side))):
            layer, block = f"{side}.{i}", f"{side}.block.{i}.layer"
            for name, part in zip("qkv", ours[f"{layer}.attention.qkv.weight"].chunk(3), strict=True):
                theirs[f"{block}.0.SelfAttention.{name}.weight"] = part
            theirs[f"{block}.0.SelfAttention.o.weight"] = ours[f"{layer}.attention.o.weight"]
            theirs[f"{block}.0.layer_norm.weight"] = ours[f"{layer}.attention.norm.weight"]
            if side == "decoder":
                theirs[f"{block}.1.EncDecAttention.q.weight"] = ours[f"{layer}.cross.q.weight"]
                for name, part in zip("kv", ours[f"{layer}.cross.kv.weight"].chunk(2), strict=True):
                    theirs[f"{block}.1.EncDecAttention.{name}.weight"] = part
                theirs[f"{block}.1.EncDecAttention.o.weight"] = ours[f"{layer}.cross.o.weight"]
                theirs[f"{block}.1.layer_norm.weight"] = ours[f"{layer}.cross.norm.weight"]
            last = f"{block}.{2 if side == 'decoder' else 1}"
            theirs[f"{last}.DenseReluDense.wi.weight"] = ours[f"{layer}.feed_forward.wi.weight"]
            theirs[f"{last}.DenseReluDense.wo.weight"] = ours[f"{layer}.feed_forward.wo.weight"]
            theirs[f"{last}.layer_norm.weight"] = ours[f"{layer}.feed_forward.norm.weight"]
    return theirs


def from_hugging_face(model: T5, theirs: dict[str, Tensor]) -> None:
    """Load the weights of a T5ForConditionalGeneration of the same shape.

    Raises KeyError or RuntimeError where one does not fit.
    """
    views = to_hugging_face(model)  # parts of the model's own tensors: writing to them writes the model
    if missing := sorted(set(views) - set(theirs)):
        raise KeyError(f"{missing[0]} is missing among the weights given ({len(missing)} in all)")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(theirs[name])


def hugging_face_config(shape: Shape) -> dict[str, object]:
    """The keyword arguments of the T5Config that describes this shape."""
    return {
        "vocab_size": shape.vocabulary,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "num_heads": shape.heads,
        "d_kv": shape.d_kv,
        "num_layers": shape.encoder_layers,
        "num_decoder_layers": shape.decoder_layers,
        "dropout_rate": shape.dropout,
        "relative_attention_num_buckets": shape.buckets,
        "relative_attention_max_distance": shape.max_distance,
        "layer_norm_epsilon": shape.epsilon,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "eos_token_id": 1,
    }
