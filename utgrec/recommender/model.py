"""The T5 encoder-decoder that reads the codes of a history and writes the codes of the next item.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR 2020 (T5 1.0: ReLU,
no biases, RMS norms before each part, relative position buckets shared by all layers, no 1/sqrt(d) in the attention). TIGER
(arXiv 2305.05065, section 3.2) and UTGRec (arXiv 2504.04405) both use it, at small sizes, trained from scratch. The same
weights give the same numbers as Hugging Face's T5ForConditionalGeneration (tests/parity/test_t5.py); ``from_hugging_face``
and ``to_hugging_face`` carry them across.

In: token numbers of a history. Out: the loss of the L codes of the next item, or the logits.

Legend: B batch, S encoder tokens, L codes an item (decoder tokens), V vocabulary, D width, H heads, E head width, F inner width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PAD = 0
"""Padding, and what the decoder starts from, as in T5."""

Layout = tuple[tuple[int, int], ...]
"""How packed rows lie: (rows, tokens of each) group after group."""


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = RMSNorm(shape.d_model, shape.epsilon)
        self.wi = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.wo = nn.Linear(shape.d_ff, shape.d_model, bias=False)
        self.dropout = shape.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.dropout(F.relu(self.wi(self.norm(x))), self.dropout, self.training)
        return x + F.dropout(self.wo(inner), self.dropout, self.training)


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = RMSNorm(shape.d_model, shape.epsilon)
        self.qkv = nn.Linear(shape.d_model, 3 * shape.inner, bias=False)
        self.o = nn.Linear(shape.inner, shape.d_model, bias=False)
        self.shape = shape

    def forward(self, x_BSD: torch.Tensor, bias_BHSS: torch.Tensor) -> torch.Tensor:
        q, k, v = (split(part, self.shape) for part in self.qkv(self.norm(x_BSD)).chunk(3, -1))
        return x_BSD + F.dropout(self.o(attend(q, k, v, bias_BHSS, self)), self.shape.dropout, self.training)


class CrossAttention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = RMSNorm(shape.d_model, shape.epsilon)
        self.q = nn.Linear(shape.d_model, shape.inner, bias=False)
        self.kv = nn.Linear(shape.d_model, 2 * shape.inner, bias=False)
        self.o = nn.Linear(shape.inner, shape.d_model, bias=False)
        self.shape = shape

    def forward(self, x_BLD: torch.Tensor, memory_BSD: torch.Tensor, mask_B11S: torch.Tensor) -> torch.Tensor:
        q = split(self.q(self.norm(x_BLD)), self.shape)
        k, v = (split(part, self.shape) for part in self.kv(memory_BSD).chunk(2, -1))
        return x_BLD + F.dropout(self.o(attend(q, k, v, mask_B11S, self)), self.shape.dropout, self.training)


def split(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[B, S, H * E] -> [B, H, S, E]"""
    return x.unflatten(-1, (shape.heads, shape.d_kv)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, part: SelfAttention | CrossAttention) -> torch.Tensor:
    """Attention without 1/sqrt(d): T5 has that factor in its initial weights."""
    dropout = part.shape.dropout if part.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout, scale=1.0).transpose(1, 2).flatten(-2)


class RelativePositions(nn.Module):
    """A learned number for each head and each bucket of (key position - query position); exact when near, logarithmic when far."""

    def __init__(self, shape: Shape, bidirectional: bool):
        super().__init__()
        self.bias = nn.Embedding(shape.buckets, shape.heads)
        self.shape, self.bidirectional = shape, bidirectional

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
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

    def forward(self, queries: int, keys: int) -> torch.Tensor:
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

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.shape.dropout, self.training)

    def encode(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S, D]. Tokens are padded with ``PAD`` at the right."""
        bias_BHSS = self.encoder_positions(tokens_BS.size(1), tokens_BS.size(1)) + padding_mask(tokens_BS)
        x_BSD = self.dropped(self.tokens(tokens_BS))
        for layer in self.encoder:
            x_BSD = layer.feed_forward(layer.attention(x_BSD, bias_BHSS))
        return self.dropped(self.encoder_norm(x_BSD))

    def logits(self, tokens_BS: torch.Tensor, codes_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V]: of each code of the next item, given the codes before it (teacher forcing)."""
        memory_BSD, mask_B11S = self.encode(tokens_BS), padding_mask(tokens_BS)
        start_B1 = codes_BL.new_full((len(codes_BL), 1), PAD)
        x_BLD = self.dropped(self.tokens(torch.cat([start_B1, codes_BL[:, :-1]], 1)))
        length = codes_BL.size(1)
        future_LL = torch.full((length, length), -torch.inf, device=x_BLD.device).triu(1)
        bias_1HLL = self.decoder_positions(length, length) + future_LL
        for layer in self.decoder:
            x_BLD = layer.feed_forward(layer.cross(layer.attention(x_BLD, bias_1HLL), memory_BSD, mask_B11S))
        x_BLD = self.dropped(self.decoder_norm(x_BLD))
        return F.linear(x_BLD * self.shape.d_model**-0.5, self.tokens.weight)

    def forward(self, tokens: torch.Tensor, codes_BL: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
        """Mean cross-entropy over all codes and the whole vocabulary: a label a code position.

        ``tokens`` are padded [B, S], or packed [N] with their ``layout`` (data.Batch): ``model(*batch)``.
        """
        tokens_BS = tokens if layout is None else padded(tokens, layout)
        return F.cross_entropy(self.logits(tokens_BS, codes_BL).flatten(0, 1).float(), codes_BL.flatten())


def padding_mask(tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, 1, 1, S]: 0, and -inf at padding."""
    mask_BS = torch.zeros(tokens_BS.shape, device=tokens_BS.device)
    return mask_BS.masked_fill_(tokens_BS == PAD, -torch.inf)[:, None, None]


def padded(tokens_N: torch.Tensor, layout: Layout) -> torch.Tensor:
    longest = max(length for _, length in layout)
    groups = tokens_N.split([rows * length for rows, length in layout])
    return torch.cat([F.pad(group.view(shape), (0, longest - shape[1])) for group, shape in zip(groups, layout, strict=True)])


# --------------------------------------------------------------------------------------------- weights of Hugging Face


def to_hugging_face(model: T5) -> dict[str, torch.Tensor]:
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


def from_hugging_face(model: T5, theirs: dict[str, torch.Tensor]) -> None:
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
