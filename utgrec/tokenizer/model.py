"""The universal item tokenizer (UTGRec section 3): an item's text and picture become L codes, from coarse to fine.

    item -> encoder -> MLP -> h_1..h_L -> tree codebooks -> codes c_1..c_L, and r_1..r_L
                              |                              |
                  InfoNCE with the h of an item      text decoder, picture decoder: rebuild the item,
                  that occurs next to it             and the item that occurs next to it

In: an ``Encoder`` and settings. ``forward`` takes a ``Micro``, some items that go through the model together, and gives the sums of
the loss terms over them, so that whoever calls it divides by the counts of the whole batch (train.py); ``codes`` gives codes and what
collision repair needs. The objective:

    L = L_Raw + lambda L_Code + mu L_Ali + eta L_Re        L_Raw, L_Re = text + alpha picture, of the item and of its neighbour

Legend: B items, L positions, D width of codes, W width of the encoder's states, R rows of a decoder (items, then their neighbours),
T text tokens, N selected tokens, P latent tokens of a picture, C channels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utgrec.tokenizer.codebook import TreeQuantizer, prefix_residual
from utgrec.tokenizer.cross_entropy import masked_cross_entropy
from utgrec.tokenizer.decoders import PictureDecoder, TextDecoder
from utgrec.tokenizer.diffusion import DiffusionLoss
from utgrec.tokenizer.encoder import Encoder, EncoderBatch
from utgrec.tokenizer.settings import Settings


@dataclass(frozen=True)
class TextTargets:
    """Texts to rebuild, a row each: of items, then of neighbours."""

    items_R: Tensor
    """Whose r is read: rows of the micro batch."""
    masked_RT: Tensor
    keep_RT: Tensor
    """False at padding."""
    selected_N: Tensor
    """Places in the flat [R x T] that are to be predicted, ascending."""
    targets_N: Tensor
    n_own: int
    """How many of them are in the items' own texts."""


@dataclass(frozen=True)
class PictureTargets:
    """Pictures to rebuild: latents of the items that have one, then of the neighbours that have one."""

    items_R: Tensor
    latents_RPC: Tensor
    n_own: int
    """How many of the rows are the items' own pictures."""


@dataclass(frozen=True)
class Micro:
    """Items that go through the model together."""

    prompts: EncoderBatch
    """Of B items, and of their B neighbours where these are encoded, too."""
    n_items: int
    texts: TextTargets | None
    pictures: PictureTargets | None

    def to(self, device: torch.device) -> Micro:
        return Micro(self.prompts.to(device), self.n_items, *(part and _moved(part, device) for part in (self.texts, self.pictures)))


def _moved(part: Any, device: torch.device) -> Any:
    tensors = {name: value.to(device, non_blocking=True) for name, value in vars(part).items() if isinstance(value, Tensor)}
    return dataclasses.replace(part, **tensors)


FIRST_STD = 0.02
"""Of first weights at the paper's widths; at others so that what goes through keeps its size."""
TERMS = ("code", "text", "text_neighbour", "noise", "noise_neighbour", "bound", "bound_neighbour")
"""``noise`` and ``bound`` are the two parts of the picture's loss (diffusion.py)."""


class Terms(NamedTuple):
    """What a micro batch gives. Sums over its items, over selected tokens, over pictures; the caller weights and divides them.

    A tuple, and not a dataclass, because DeepSpeed must find the tensors in what a module returns.
    """

    h_BLD: Tensor
    sums: dict[str, Tensor]
    codes_BL: Tensor | None = None


class Latents:
    """The shape of a picture's latent tokens."""

    def __init__(self, tokens: int, channels: int):
        self.tokens, self.channels = tokens, channels


class UniversalTokenizer(nn.Module):
    def __init__(self, settings: Settings, encoder: Encoder, latents: Latents):
        super().__init__()
        self.settings, self.encoder, self.latents = settings, encoder, latents
        width, hidden = encoder.width, settings.mlp_hidden
        self.mlp = nn.Sequential(
            nn.Dropout(settings.mlp_dropout),
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Dropout(settings.mlp_dropout),
            nn.Linear(hidden, settings.code_width),
        )
        self.quantizer = TreeQuantizer(settings)
        self.read = nn.Linear(settings.code_width, width)  # c2l: what both decoders read of a code vector
        self.text_decoder = TextDecoder(encoder.block) if settings.text_decoder else None
        self.picture_decoder = self.diffusion = None
        if settings.picture_decoder:
            self.picture_decoder = PictureDecoder(encoder.block, latents.tokens)
            self.diffusion = DiffusionLoss(
                width,
                channels=latents.channels,
                width=settings.diffusion_width,
                depth=settings.diffusion_depth,
                steps=settings.diffusion_steps,
                repeats=settings.diffusion_repeats,
            )
        for layer, inputs in ((self.mlp[1], 1536), (self.mlp[4], 768), (self.read, 128)):
            nn.init.normal_(layer.weight, std=FIRST_STD * (inputs / layer.in_features) ** 0.5)
            nn.init.zeros_(layer.bias)

    def vectors(self, prompts: EncoderBatch) -> Tensor:
        """h [B, L, D], fp32."""
        return self.mlp(self.encoder(prompts)).float()

    def forward(self, micro: Micro, *, quantise: bool, vectors_only: bool = False) -> Any:
        """h of all prompts, and with it (unless ``vectors_only``) the ``Terms`` of this part of the batch.

        One entry for both passes: wrappers of the module (DeepSpeed) see nothing else.
        """
        h_BLD = self.vectors(micro.prompts)
        if vectors_only:
            return h_BLD
        own_BLD = h_BLD[: micro.n_items]
        sums = {name: h_BLD.new_zeros(()) for name in TERMS}
        codes_BL, r_BLD = None, own_BLD
        if quantise:  # before the codebooks enter, the decoders read h itself: the sum of all prefix residuals
            codes_BL, r_BLD, code = self.quantizer(own_BLD)
            sums["code"] = code * micro.n_items
        prefix_BLW = self.read(r_BLD)
        sharded = self.settings.sharding != "none"
        if micro.texts:
            sums |= self.rebuild_texts(prefix_BLW, micro.texts)
        elif self.text_decoder and sharded:
            sums |= self.rebuild_texts(prefix_BLW, self.no_text(prefix_BLW.device))
        if micro.pictures:
            sums |= self.rebuild_pictures(prefix_BLW, micro.pictures)
        elif self.picture_decoder and sharded:
            pictures = self.rebuild_pictures(prefix_BLW, self.no_picture(prefix_BLW.device))
            sums |= {name: 0.0 * of for name, of in pictures.items()}
        return Terms(h_BLD, sums, codes_BL)

    def no_text(self, device: torch.device) -> TextTargets:
        """One without a selected token. Sharded weights must be used by all processes or by none: those that have nothing take this."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        one = torch.zeros(1, dtype=torch.int64, device=device)
        return TextTargets(one, one[:, None], one[:, None].bool(), none, none, 0)

    def no_picture(self, device: torch.device) -> PictureTargets:
        """As ``no_text``; what it gives must not be counted."""
        latents_RPC = torch.zeros(1, self.latents.tokens, self.latents.channels, device=device)
        return PictureTargets(torch.zeros(1, dtype=torch.int64, device=device), latents_RPC, 1)

    def rebuild_texts(self, prefix_BLW: Tensor, texts: TextTargets) -> dict[str, Tensor]:
        """Cross-entropy of the selected tokens."""
        assert self.text_decoder is not None
        hidden_RTW = self.text_decoder(prefix_BLW[texts.items_R], self.encoder.embed(texts.masked_RT), texts.keep_RT)
        hidden_NW = hidden_RTW.flatten(0, 1)[texts.selected_N]
        parts = (slice(None, texts.n_own), slice(texts.n_own, None))
        sums = (masked_cross_entropy(hidden_NW[part], self.encoder.head_VD, texts.targets_N[part]) for part in parts)
        return dict(zip(("text", "text_neighbour"), sums, strict=True))

    def rebuild_pictures(self, prefix_BLW: Tensor, pictures: PictureTargets) -> dict[str, Tensor]:
        """Squared error of the noise and variational bound: means over a picture's latents."""
        assert self.picture_decoder is not None
        assert self.diffusion is not None
        z_RPW = self.picture_decoder(prefix_BLW[pictures.items_R])
        found = {}
        for name, of_N in zip(("noise", "bound"), self.diffusion(z_RPW.flatten(0, 1), pictures.latents_RPC.flatten(0, 1)), strict=True):
            of_R = of_N.view(len(z_RPW), -1).mean(1)
            found |= {name: of_R[: pictures.n_own].sum(), f"{name}_neighbour": of_R[pictures.n_own :].sum()}
        return found

    @torch.no_grad()
    def codes(self, prompts: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Codes [B, L] and prefix residuals t [B, L, D], fp32."""
        t_BLD = prefix_residual(self.vectors(prompts))
        return self.quantizer.codes(t_BLD), t_BLD

    def freeze_for_adaptation(self) -> None:
        """The target domain trains W and everything else, but not E (section 3.5)."""
        self.quantizer.freeze(self.settings.adapt)
