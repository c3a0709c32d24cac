"""The peer of our tokenizer training: the formulation of the authors' released code, set up as well as we can.

What is theirs: items and their neighbours go through the stock ``Qwen2VLForConditionalGeneration`` one after the other, padded to the
longest of their sixteen (dynamic padding), with the vocabulary head over the whole sequence (the logits are not read); the text
decoder's logits are those of all tokens [B, T, V], and unselected ones are ignored in the loss; pictures go through the frozen VAE and
the frozen vision tower in every step.

What is better than theirs: one GPU is enough; positions come from the loader; no logits are cast to fp32; the residual stream is bf16
under autocast, weights that are trained are fp32 without a second copy; VAE and tower run without a graph; checkpointing is
non-reentrant and in the language model only; AdamW is fused. LoRA is peft's, as theirs. Quantiser, decoders' layers and diffusion loss
are copies of ours: they are not what is compared.

Legend: B items, S tokens of a prompt, L code tokens, D width, T text tokens, V vocabulary, P latent tokens, C channels.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from utgrec.tokenizer.codebook import prefix_residual
from utgrec.tokenizer.contrast import info_nce
from utgrec.tokenizer.data import Catalogue, Masked, Share
from utgrec.tokenizer.encoder import EncoderBatch, at_codes
from utgrec.tokenizer.model import UniversalTokenizer
from utgrec.tokenizer.pictures import normalised
from utgrec.tokenizer.sharding import groups
from utgrec.tokenizer.vae import VAE

IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """Of items or of neighbours, with a label at every place [B, T]."""

    masked_BT: Tensor
    keep_BT: Tensor
    labels_BT: Tensor


@dataclass(frozen=True)
class Batch:
    """All that a step reads. Items first, neighbours second."""

    prompts: tuple[EncoderBatch, EncoderBatch]
    texts: tuple[Texts, Texts]
    pictures_B3HW: Tensor
    """uint8, flipped by chance: of the items that have one, then of the neighbours that have one."""
    noise_BPC: Tensor
    rows_B: Tensor
    """Whose r each picture is rebuilt from."""
    n_own: int


class ReleasedTokenizer(nn.Module):
    """``model``: the base model that ``ours`` was made from, untouched. All weights become those of ``ours``."""

    def __init__(self, ours: UniversalTokenizer, model: Any, vae: VAE):
        super().__init__()
        settings, encoder = ours.settings, ours.encoder
        self.settings, self.levels, self.padding = settings, encoder.levels, encoder.padding
        language, tower = model.model.language_model, model.model.visual
        adapters = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, target_modules=r".*_proj"
        )
        inject_adapter_in_model(adapters, language)
        for module in language.modules():  # or each of them would make an fp32 copy of its input
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
        language.embed_tokens = nn.Embedding(encoder.vocabulary, encoder.width)
        model.lm_head = nn.Linear(encoder.width, encoder.vocabulary, bias=False)
        for part, its in ((language, encoder.language), (tower, encoder.tower)):
            like = {pefts(name): weight for name, weight in its.named_parameters()}
            for name, weight in part.named_parameters():
                weight.data, weight.requires_grad = like[name].detach().clone(), like[name].requires_grad
        model.lm_head.weight = nn.Parameter(encoder.head_VD.detach().clone())
        if settings.checkpointing:
            language.gradient_checkpointing_enable({"use_reentrant": False})
        language.embed_tokens.register_forward_hook(_half)
        language.config._attn_implementation = encoder.attention
        tower.config._attn_implementation = "flash_attention_2" if encoder.attention == "flash_attention_2" else "sdpa"
        self.model, self.vae = model, vae
        for name in ("mlp", "quantizer", "read", "text_decoder", "picture_decoder", "diffusion"):
            setattr(self, name, copy.deepcopy(getattr(ours, name)))
        self.to(encoder.head_VD.device)

    def train(self, mode: bool = True) -> ReleasedTokenizer:
        super().train(mode)
        self.model.model.visual.eval()
        self.vae.eval()
        return self

    def vectors(self, prompts: EncoderBatch) -> Tensor:
        """h [B, L, D] of the last hidden states; the logits of the whole sequence are computed and dropped."""
        keep_BS = torch.arange(prompts.tokens_BS.size(1), device=prompts.tokens_BS.device) < prompts.lengths_B[:, None]
        seen = {}
        if prompts.patches_PC is not None:
            grids = torch.tensor(prompts.grids, device=prompts.tokens_BS.device)
            seen = {"pixel_values": normalised(prompts.patches_PC), "image_grid_thw": grids}
        out = self.model(
            input_ids=prompts.tokens_BS,
            attention_mask=keep_BS.long(),
            position_ids=prompts.positions_3BS,
            use_cache=False,
            output_hidden_states=True,
            **seen,
        )
        return self.mlp(at_codes(out.hidden_states[-1], prompts.lengths_B, self.levels)).float()

    def loss(self, batch: Batch) -> Tensor:
        """The weighted objective of a step."""
        settings = self.settings
        h_BLD, neighbour_BLD = (self.vectors(prompts) for prompts in batch.prompts)
        _, r_BLD, code = self.quantizer(h_BLD)
        prefix_BLW = self.read(r_BLD)
        own, again = (self.text_loss(prefix_BLW, texts) for texts in batch.texts)
        picture, picture_again = self.picture_losses(prefix_BLW, batch)
        total = own + settings.picture_weight * picture + settings.cooccurrence_weight * (again + settings.picture_weight * picture_again)
        align = info_nce(h_BLD, neighbour_BLD, settings.temperature_align)
        return total + settings.code_weight * code + settings.align_weight * align

    def text_loss(self, prefix_BLW: Tensor, texts: Texts) -> Tensor:
        embedded_BTW = self.model.get_input_embeddings()(texts.masked_BT)
        logits_BTV = self.model.lm_head(self.text_decoder(prefix_BLW, embedded_BTW, texts.keep_BT))
        with torch.autocast(logits_BTV.device.type, enabled=False):
            return F.cross_entropy(logits_BTV.flatten(0, 1), texts.labels_BT.flatten(), ignore_index=IGNORED)

    def picture_losses(self, prefix_BLW: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean_BChw, std_BChw = self.vae.moments(batch.pictures_B3HW.float() / 127.5 - 1)
            mean_BPC, std_BPC = (x.flatten(2).transpose(1, 2).float() for x in (mean_BChw, std_BChw))
            latents_BPC = (mean_BPC + std_BPC * batch.noise_BPC) * self.vae.scale
        z_BPW = self.picture_decoder(prefix_BLW[batch.rows_B])
        found = self.diffusion(z_BPW.flatten(0, 1), latents_BPC.flatten(0, 1))
        of_B = (found.noise_N + found.bound_N).view(len(z_BPW), -1).mean(1)
        return of_B[: batch.n_own].mean(), of_B[batch.n_own :].mean()

    @torch.no_grad()
    def codes(self, prompts: EncoderBatch) -> Tensor:
        """[B, L]"""
        return self.quantizer.codes(prefix_residual(self.vectors(prompts)))


class Trainer:
    """One process, the whole batch at once."""

    def __init__(self, model: ReleasedTokenizer, catalogue: Catalogue, pixels_XHW3: np.ndarray, precision: str):
        """``pixels_XHW3``: every picture at the VAE's size, decoded beforehand; rows without a picture are not read."""
        self.model, self.catalogue, self.pixels_XHW3, self.precision = model.train(), catalogue, pixels_XHW3, precision
        self.device = model.model.lm_head.weight.device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(groups(model, model.settings.tokenizer_weight_decay), lr=0.0, fused=True)

    def step(self, share: Share, seed: int, rate: float) -> Tensor:
        loss = self.gradients(share, seed)
        nn.utils.clip_grad_norm_(self.parameters, self.model.settings.tokenizer_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, share: Share, seed: int) -> Tensor:
        batch = moved(self.collate(share), self.device)
        torch.manual_seed(seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model.loss(batch)
        loss.backward()
        return loss.detach()

    def collate(self, share: Share) -> Batch:
        sides = ((share.items_B, share.pictured), (share.neighbours_B, share.pictured_neighbour))
        prompts = [collated(self.catalogue, rows) for rows, _ in sides]
        texts = [texts_of(masked, self.catalogue.encoder.mask_token) for masked in (share.own, share.neighbour)]
        seen, noise, whose = [], [], []
        for role, (rows, has) in enumerate(sides):
            for place in np.flatnonzero(has):
                rng = np.random.default_rng([self.catalogue.seed, 13, share.step, int(share.places_B[place]), role])
                picture = self.pixels_XHW3[rows[place]]
                seen.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
                noise.append(rng.standard_normal((self.model.vae.latents, self.model.vae.channels), np.float32))
                whose.append(place)
        pictures_B3HW = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)
        noise_BPC = torch.from_numpy(np.stack(noise))
        return Batch(
            (prompts[0], prompts[1]), (texts[0], texts[1]), pictures_B3HW, noise_BPC, torch.tensor(whose), int(share.pictured.sum())
        )


def encode(
    model: ReleasedTokenizer, catalogue: Catalogue, rows_X: np.ndarray, precision: str, *, batch: int = 16, by_length: bool = False
) -> np.ndarray:
    """Codes of rows [X, L], sixteen together as they come; ``by_length`` is what a user could add."""
    model.eval()
    device = model.model.lm_head.weight.device
    order_X = np.argsort([-len(prompt) for prompt in catalogue.prompts(rows_X)], kind="stable") if by_length else np.arange(len(rows_X))
    codes_XL = np.empty((len(rows_X), model.levels), np.int64)
    for places in np.array_split(order_X, -(-len(order_X) // batch)):
        prompts = collated(catalogue, rows_X[places]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            codes_XL[places] = model.codes(prompts).cpu().numpy()
    return codes_XL


def collated(catalogue: Catalogue, rows_B: np.ndarray) -> EncoderBatch:
    """Our batch, but with the pictures in the order of the rows, as the stock forward wants them."""
    prompts = catalogue.prompts(rows_B)
    batch = catalogue.encoder.collate(prompts)
    seen = [prompt for prompt in prompts if prompt.grid]
    if not seen:
        return batch
    patches_PC = torch.from_numpy(np.concatenate([prompt.patches_PC for prompt in seen]))
    return dataclasses.replace(batch, patches_PC=patches_PC, grids=tuple(prompt.grid for prompt in seen))


def texts_of(masked: Sequence[Masked], pad: int) -> Texts:
    longest = max(1, *(len(text.tokens_T) for text in masked))
    tokens_BT = np.full((len(masked), longest), pad, np.int64)
    labels_BT = np.full((len(masked), longest), IGNORED, np.int64)
    for row, text in enumerate(masked):
        tokens_BT[row, : len(text.tokens_T)] = text.tokens_T
        labels_BT[row, text.selected_N] = text.targets_N
    keep_BT = torch.arange(longest) < torch.tensor([len(text.tokens_T) for text in masked])[:, None]
    return Texts(torch.from_numpy(tokens_BT), keep_BT, torch.from_numpy(labels_BT))


def moved(batch: Batch, device: torch.device) -> Batch:
    prompts = tuple(part.to(device) for part in batch.prompts)
    texts = tuple(Texts(*(tensor.to(device, non_blocking=True) for tensor in vars(part).values())) for part in batch.texts)
    rest = (tensor.to(device, non_blocking=True) for tensor in (batch.pictures_B3HW, batch.noise_BPC, batch.rows_B))
    return Batch(prompts, texts, *rest, batch.n_own)  # type: ignore[arg-type]


def pefts(name: str) -> str:
    """Our name of a weight beside or inside a LoRA -> peft's."""
    name = name.replace(".base.", ".base_layer.")
    for ours, theirs in ((".down", ".lora_A.default.weight"), (".up", ".lora_B.default.weight")):
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def their_name(name: str) -> str:
    """Of a weight of ``UniversalTokenizer`` in ``ReleasedTokenizer``."""
    if name == "encoder.head_VD":
        return "model.lm_head.weight"
    if name.startswith("encoder.language."):
        return "model.model.language_model." + pefts(name.removeprefix("encoder.language."))
    return name


def _half(_: nn.Module, __: Any, embedded: Tensor) -> Tensor | None:
    """Else the residual stream would be fp32, because the table is."""
    kind = embedded.device.type
    return embedded.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
