"""Qwen2-VL as an item encoder (UTGRec section 3.1). All that depends on transformers' classes of it is here (tested with 5.23).

In: a Qwen2VLForConditionalGeneration and its tokenizer. Out: an ``Encoder``. The vision tower is frozen; the language model has LoRA on
every linear layer, or is trained as a whole with ``lora_rank = 0``; the input table and an untied copy of it as output table are trained.

A prompt is a chat: one user turn with the picture, what is known of the item and the request, the start of the answer, and behind
that L code tokens, whose states are the result. Code tokens and mask token take the spare rows behind the vocabulary, as in the
released code; no text can contain them, because texts never become the tokens that steer the model.

What the stock forward does that is not needed here: no vocabulary head (151,661 numbers a token), no cache of keys, no mask (with
padding at the right, causal attention never looks at it), no positions computed on the device, no wait for the device between.

Legend: B items, S tokens, L code tokens, D width, V vocabulary, P patches, N picture tokens, E head width of the vision tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.contract import ContractError
from utgrec.base_model import find_model
from utgrec.tokenizer.block import BlockShape
from utgrec.tokenizer.encoder import (
    Encoder,
    EncoderBatch,
    Prompt,
    at_codes,
    content_tokens,
    groups_of_like_length,
    longest_tokens,
)
from utgrec.tokenizer.lora import add_lora
from utgrec.tokenizer.pictures import PATCH, normalised, picture_grid, read_picture
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.vision_cache import VisionCache, tokens

GROUPED = "utgrec_grouped"
"""Name under which ``grouped_attention`` is known to transformers."""
LAUNCH = 1e-3
"""Seconds that a layer takes however little it has to do."""
RATE = {"cpu": 9e10, "cuda": 4e14}
"""FLOP a second of a layer's products, in order of magnitude."""
TEXT = "\x00"
"""Where an item's text goes in a wording."""


@dataclass(frozen=True)
class Wording:
    """What the user says, {levels} and the item's text filled in. One with picture and one without, as in the paper's prompts."""

    both: str
    text_only: str
    picture_only: str


WORDING = Wording(
    both="The picture shows a product. This is what its description says:\n" + TEXT + "\n"
    "Summarise picture and description in {levels} tokens, ordered from coarse to fine.",
    text_only="Of this product there is no picture. This is what its description says:\n" + TEXT + "\n"
    "Summarise the description in {levels} tokens, ordered from coarse to fine.",
    picture_only="The picture shows a product. Summarise it in {levels} tokens, ordered from coarse to fine.",
)


def load_qwen(settings: Settings, *, device: torch.device, precision: str) -> QwenEncoder:
    """The model of ``settings.model``: hub id (must lie in the cache) or folder. Raises ContractError."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

    folder, identity = find_model(settings.model, settings.revision)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ContractError(f"model = {settings.model!r}: {folder} has no configuration that transformers reads: {error}") from error
    if config.model_type != "qwen2_vl":
        raise ContractError(
            f"model = {settings.model!r} is a {config.model_type!r}, not a 'qwen2_vl'; sentence encoders go with encoder = 'text'"
        )
    half = _frozen_dtype(device, precision)
    dtype = half if settings.lora_rank else torch.float32
    try:
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=dtype, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ContractError(f"model = {settings.model!r}: {folder} is not whole: {error}") from error
    about = {"model": settings.model, "revision": settings.revision, "digest": identity}
    return QwenEncoder(model, tokenizer, settings, about=about, device=device, precision=precision)


def _frozen_dtype(device: torch.device, precision: str) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and precision == "bf16" else torch.float32


def group_fee(weights: int, device: str) -> float:
    """What a group of prompts more costs, in tokens that go through a layer of so many weights: 4,300 for Qwen2-VL-2B on a GPU."""
    return LAUNCH * RATE.get(device, RATE["cuda"]) / (2 * weights)


class QwenEncoder(Encoder):
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Settings,
        *,
        about: dict[str, Any],
        wording: Wording = WORDING,
        device: torch.device = torch.device("cpu"),
        precision: str = "fp32",
    ):
        super().__init__()
        self.settings, self.tokenizer, self.about = settings, tokenizer, about
        config = model.config.get_text_config()
        self.levels, self.width, self.layers = settings.levels, config.hidden_size, config.num_hidden_layers
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 1e6)
        self.block = BlockShape(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            4 * config.hidden_size,
            float(theta),
            config.rms_norm_eps,
        )
        self._number_tokens(model)
        self.tower, self.language = model.model.visual, model.model.language_model
        self.group_fee = group_fee(sum(weight.numel() for weight in self.language.layers[0].parameters()), device.type)
        self._freeze(model, device, precision)
        self.attention = choose_attention(settings.attention, device, precision)
        self.language.config._attn_implementation = self.attention
        self.tower.config._attn_implementation = GROUPED
        if settings.checkpointing:
            # the newer name first: the older one warns
            enable = getattr(self.language, "activation_checkpointing_enable", None) or self.language.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._parts = {name: self._wrapped(text, picture=name != "text_only") for name, text in vars(wording).items()}
        self.cache: VisionCache | None = None

    def _number_tokens(self, model: Any) -> None:
        added = sorted(self.tokenizer.added_tokens_decoder)
        base = len(self.tokenizer)
        self.picture_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        rows = model.get_input_embeddings().weight.size(0)
        self.vocabulary, self.mask_token = base + self.levels + 1, base + self.levels
        name = self.about["model"]
        if self.picture_token != model.config.image_token_id:
            raise ContractError(
                f"model = {name!r}: its tokenizer gives <|image_pad|> number {self.picture_token}, its configuration "
                f"{model.config.image_token_id}: vocabulary and weights do not belong together; fetch the model again"
            )
        if rows < self.vocabulary:
            raise ContractError(
                f"model = {name!r}: its table has {rows:,} rows, {self.vocabulary:,} are needed for {base:,} tokens, {self.levels} code "
                "tokens and the mask token; use a model with spare rows"
            )
        self.code_tokens = np.arange(base, base + self.levels, dtype=np.int32)
        self.special_tokens = np.array([*added, *self.code_tokens, self.mask_token], np.int64)
        self.ordinary_tokens = np.setdiff1d(np.arange(base), added)
        self.padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def _freeze(self, model: Any, device: torch.device, precision: str) -> None:
        """Say what is trained, in fp32; the rest is kept as small as the device computes it."""
        settings = self.settings
        inputs_VD, outputs_VD = (
            table.weight.detach()[: self.vocabulary].float() for table in (model.get_input_embeddings(), model.lm_head)
        )
        self.tower.requires_grad_(False).eval()
        if settings.lora_rank:
            add_lora(self.language, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
        else:
            self.language.requires_grad_(True)
        self.language.embed_tokens = nn.Embedding(self.vocabulary, self.width, _weight=inputs_VD.clone())
        self.head_VD = nn.Parameter(outputs_VD.clone())
        self.frozen_dtype = _frozen_dtype(device, precision)
        for weight in self.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data.to(self.frozen_dtype)

    def train(self, mode: bool = True) -> QwenEncoder:
        super().train(mode)
        self.tower.eval()
        return self

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.settings.encoder,
            **self.about,
            "attention": self.attention,
            "frozen_weights": str(self.frozen_dtype).removeprefix("torch."),
            "lora_rank": self.settings.lora_rank,
            "reads": "texts and pictures",
        }

    # ---------------------------------------------------------------------------------------------------- of single items

    def text_tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        return content_tokens(self.tokenizer, texts, self.settings.text_tokens)

    def _wrapped(self, wording: str, *, picture: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens before the picture, between it and the text, behind the text (with the code tokens)."""
        content: list[dict[str, str]] = [{"type": "image"}] if picture else []
        content.append({"type": "text", "text": wording.format(levels=self.levels)})
        try:
            chat = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        except ValueError as error:
            raise ContractError(f"model = {self.about['model']!r}: its tokenizer has no chat template; take the -Instruct model") from error
        before, _, behind = chat.partition(TEXT)
        first, last = (np.array(self.tokenizer(part, add_special_tokens=False)["input_ids"], np.int32) for part in (before, behind))
        place = np.flatnonzero(first == self.picture_token)
        if len(place) != picture:
            raise ContractError(
                f"model = {self.about['model']!r}: its chat template gives {len(place)} places for one picture; take the -Instruct model's"
            )
        cut = int(place[0]) if picture else 0
        return first[:cut], first[cut + picture :], np.concatenate([last, self.code_tokens])

    def prompt(self, tokens_T: np.ndarray, picture: bytes | None) -> Prompt:
        seen = self._see(picture) if picture is not None else Prompt(tokens_T)
        before, between, behind = self._around(tokens_T, seen.grid)
        places_N = np.full(tokens(seen.grid), self.picture_token, np.int32)
        return Prompt(np.concatenate([before, places_N, between, tokens_T, behind]), seen.patches_PC, seen.grid, seen.features_ND)

    def length(self, tokens_T: np.ndarray, picture: bytes | None) -> int:
        grid = None
        if picture is not None and self.cache is not None and picture in self.cache:
            grid = (self.cache.get(picture) or (None, None))[1]
        elif picture is not None:
            grid = picture_grid(picture, self.settings.pixels_min, self.settings.pixels_max)
        return sum(map(len, self._around(tokens_T, grid))) + len(tokens_T) + tokens(grid)

    def _around(self, tokens_T: np.ndarray, grid: tuple[int, int, int] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if grid is None:
            return self._parts["text_only"]
        return self._parts["both" if len(tokens_T) else "picture_only"]

    def _see(self, picture: bytes) -> Prompt:
        """A prompt of the picture alone, from the cache if it is there; without grid if it cannot be decoded."""
        nothing = np.empty(0, np.int32)
        if self.cache is not None and picture in self.cache:
            known = self.cache.get(picture)
            return Prompt(nothing, None, known[1], known[0]) if known else Prompt(nothing)
        patches = read_picture(picture, self.settings.pixels_min, self.settings.pixels_max)
        return Prompt(nothing, *patches) if patches else Prompt(nothing)

    # ------------------------------------------------------------------------------------------------------- of a batch

    def collate(self, prompts: Sequence[Prompt]) -> EncoderBatch:
        tokens_BS, lengths_B = longest_tokens(prompts, self.padding)
        positions_3BS = np.zeros((3, *tokens_BS.shape), np.int64)
        seen, known = [], []  # pictures: grid, row, first place; those with known features
        for row, prompt in enumerate(prompts):
            start = int(np.argmax(prompt.tokens_S == self.picture_token)) if prompt.grid else 0
            positions_3BS[:, row, : len(prompt)] = rope_positions(len(prompt), start, prompt.grid)
            if prompt.grid:
                (seen if prompt.features_ND is None else known).append((prompt.grid, row, row * tokens_BS.size(1) + start))
        seen.sort()  # of equal size side by side: they go through the tower's attention together
        parts: dict[str, Any] = {}
        if seen:
            parts["patches_PC"] = torch.from_numpy(np.concatenate([prompts[row].patches_PC for _, row, _ in seen]))
            parts["grids"], parts["places_N"] = tuple(grid for grid, *_ in seen), _places(seen)
        if known:
            rows_ND = torch.from_numpy(np.concatenate([prompts[row].features_ND for _, row, _ in known]))
            parts["features_ND"] = rows_ND.view(torch.bfloat16) if rows_ND.dtype == torch.uint16 else rows_ND
            parts["feature_places_N"] = _places(known)
        # In ZeRO's stage 3 all processes must call the layers equally often.
        fee = np.inf if self.settings.sharding == "zero3" else self.group_fee
        order_B, parts["groups"] = groups_of_like_length(lengths_B.numpy(), fee)
        return EncoderBatch(tokens_BS, lengths_B, torch.from_numpy(positions_3BS), order_B=torch.from_numpy(order_B), **parts)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.language.embed_tokens(tokens)

    def forward(self, batch: EncoderBatch) -> Tensor:
        x_ND = self.embed(batch.tokens_BS).flatten(0, 1)
        if batch.patches_PC is not None:
            x_ND = x_ND.index_copy(0, batch.places_N, self.features(batch.patches_PC, batch.grids).to(x_ND.dtype))
        elif self.settings.sharding == "zero3" and self.settings.use_pictures and self.cache is None:
            # sharded weights must be used by all processes or by none
            self.features(torch.zeros(4, 3 * PATCH**2, dtype=torch.uint8, device=x_ND.device), ((1, 2, 2),))
        if batch.features_ND is not None:
            x_ND = x_ND.index_copy(0, batch.feature_places_N, batch.features_ND.to(x_ND.dtype))
        kind = x_ND.device.type
        if torch.is_autocast_enabled(kind):  # the table is fp32, and what is added up layer by layer would be, too
            x_ND = x_ND.to(torch.get_autocast_dtype(kind))
        x_BSD = x_ND.view(*batch.tokens_BS.shape, -1)
        states = []
        for first, end, length in batch.groups:
            rows = batch.order_B[first:end]
            positions_3BS = batch.positions_3BS[:, rows, :length]
            part_BSD = x_BSD[:, :length].index_select(0, rows)
            hidden_BSD = self.language(inputs_embeds=part_BSD, position_ids=positions_3BS, use_cache=False).last_hidden_state
            states.append(at_codes(hidden_BSD, batch.lengths_B[rows], self.levels))
        return torch.cat(states)[batch.order_B.argsort()]

    # -------------------------------------------------------------------------------------------------- the vision tower

    @torch.no_grad()
    def features(self, patches_PC: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """What the tower says of pictures [N, D]. Those of equal size must lie side by side to be taken together."""
        tower = self.tower
        with torch.autocast(patches_PC.device.type, enabled=False):
            x_PE = tower.patch_embed(normalised(patches_PC, self.frozen_dtype))
            heads = tower.blocks[0].attn.num_heads
            positions = tower_positions(grids, x_PE.size(1) // heads, patches_PC.device)
            lengths = tuple(frames * rows * columns for frames, rows, columns in grids)
            whole = torch.tensor([0, len(x_PE)], dtype=torch.int32)  # on the CPU: the stock attention reads it there
            for block in tower.blocks:
                x_PE = block(x_PE, cu_seqlens=whole, position_embeddings=positions, utgrec_lengths=lengths)
            return tower.merger(x_PE)

    def cache_pictures(
        self,
        pictures: Iterable[bytes | None],
        folder: Path,
        *,
        batch: int = 64,
        writer: str = "0",
        told: Callable[[int], None] | None = None,
    ) -> None:
        if self.cache is None or self.cache.folder != folder:
            kind = np.uint16 if self.frozen_dtype == torch.bfloat16 else np.float32
            self.cache = VisionCache(folder, self._tower_key(), self.width, np.dtype(kind))
        self.cache.add(pictures, self._features_of, writer=writer, batch=batch, told=told)

    def _features_of(self, pictures: list[bytes]) -> list[tuple[np.ndarray, tuple[int, int, int]] | None]:
        read = [read_picture(picture, self.settings.pixels_min, self.settings.pixels_max) for picture in pictures]
        order = sorted((one[1], row) for row, one in enumerate(read) if one)
        found: list[tuple[np.ndarray, tuple[int, int, int]] | None] = [None] * len(pictures)
        if order:
            patches_PC = torch.from_numpy(np.concatenate([read[row][0] for _, row in order]))  # type: ignore[index]
            grids = [grid for grid, _ in order]
            rows_ND = self.features(patches_PC.to(self.head_VD.device), grids).cpu()
            rows_ND = rows_ND.view(torch.uint16) if rows_ND.dtype == torch.bfloat16 else rows_ND
            for (grid, row), part_ND in zip(order, rows_ND.split([tokens(grid) for grid in grids]), strict=True):
                found[row] = (part_ND.numpy(), grid)
        return found

    def _tower_key(self) -> str:
        total = hashlib.sha256(f"1 {self.settings.pixels_min} {self.settings.pixels_max} {self.frozen_dtype}".encode())
        for name, weight in sorted(self.tower.state_dict().items()):
            total.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()[:16]


def _places(pictures: list[tuple[tuple[int, int, int], int, int]]) -> Tensor:
    return torch.from_numpy(np.concatenate([first + np.arange(tokens(grid)) for grid, _, first in pictures]))


def rope_positions(length: int, start: int, grid: tuple[int, int, int] | None) -> np.ndarray:
    """Frame, row and column of each token [3, length]: of a picture at ``start`` its own, else all three count on.

    The text behind a picture goes on behind the largest number in it.
    """
    if grid is None:
        return np.broadcast_to(np.arange(length), (3, length))
    frames, rows, columns = grid[0], grid[1] // 2, grid[2] // 2
    count = frames * rows * columns
    inside = np.stack(np.unravel_index(np.arange(count), (frames, rows, columns))) + start
    behind = np.arange(length - start - count) + start + max(frames, rows, columns)
    return np.concatenate([np.broadcast_to(np.arange(start), (3, start)), inside, np.broadcast_to(behind, (3, len(behind)))], 1)


def tower_positions(grids: Sequence[tuple[int, int, int]], head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [P, E] of the tower's rotary positions: half of a head turns with the row, half with the column."""
    places = []
    for frames, rows, columns in grids:
        row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        # the four patches of a square side by side, as in the patches themselves
        both = [of.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).reshape(-1) for of in (row, column)]
        places.append(np.tile(np.stack(both, 1), (frames, 1)))
    places_P2 = torch.from_numpy(np.concatenate(places)).to(device, non_blocking=True)
    speeds = 1e4 ** -(torch.arange(0, head // 2, 2, device=device, dtype=torch.float32) / (head // 2))
    angles_PE = (places_P2[:, :, None].float() * speeds).flatten(1).repeat(1, 2)
    return angles_PE.cos(), angles_PE.sin()


# ----------------------------------------------------------------------------------------------------------- attention


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, utgrec_lengths: tuple[int, ...], **_: Any
) -> tuple[Tensor, None]:
    """Attention within each picture of [1, H, P, E]; those of equal size that lie side by side in one call.

    The stock one calls once a picture and waits for the device before.
    """
    out, start = [], 0
    while start < len(utgrec_lengths):
        end = start
        while end < len(utgrec_lengths) and utgrec_lengths[end] == utgrec_lengths[start]:
            end += 1
        first, length = sum(utgrec_lengths[:start]), utgrec_lengths[start]
        parts = (
            x[0, :, first : first + (end - start) * length].unflatten(1, (end - start, length)).transpose(0, 1) for x in (query, key, value)
        )
        out.append(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1))  # [pictures x length, H, E]
        start = end
    return torch.cat(out)[None], None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)


_register()


def choose_attention(wanted: str, device: torch.device, precision: str) -> str:
    """What the language model's attention runs on. Raises ContractError where the wanted one cannot run."""
    from transformers.utils import is_flash_attn_2_available

    half = device.type == "cuda" and precision == "bf16"
    if wanted == "flash_attention_2" and not (half and is_flash_attn_2_available()):
        why = "flash-attn is not installed" if half else f"it needs a GPU and bf16, this run has {device.type} and {precision}"
        raise ContractError(f"attention = 'flash_attention_2': {why}; use 'auto' or 'sdpa'")
    if wanted == "auto":
        return "flash_attention_2" if half and is_flash_attn_2_available() else "sdpa"
    return wanted
