"""The settings of the universal item tokenizer: encoder, codebooks, decoders, losses, training.

In: keys of a ``[configs.NAME]`` table. Out: a frozen ``Settings``, checked. The defaults are the paper's (arXiv 2504.04405) and, where
that is silent, those of its authors' released tokenizer training. An ablation of the paper is one or two keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.contract import ContractError

CHOICES = {
    "encoder": ("qwen2-vl", "tiny", "text"),
    "attention": ("auto", "sdpa", "flash_attention_2", "eager"),
    "book_kind": ("simvq", "vq", "ema"),
    "adapt": ("w", "all", "none"),
    "sharding": ("none", "zero2", "zero3"),
}


@dataclass(frozen=True)
class Settings:
    # ----------------------------------------------------------------------------------------- the encoder, section 3.1
    encoder: str = "qwen2-vl"
    """``qwen2-vl``; ``tiny``: its classes with random weights; ``text``: a sentence encoder."""
    model: str = "Qwen/Qwen2-VL-2B-Instruct"
    """Hub id, folder, or the name of a packaged model."""
    revision: str = ""
    """Commit, tag or branch of a hub model."""
    text_tokens: int = 1024
    """Item texts are cut there, in the prompt and as the target of the text decoder."""
    pixels_min: int = 128
    """Smallest picture, in patches of 28 x 28 pixels: smaller ones are enlarged."""
    pixels_max: int = 1024
    """Largest picture, in patches of 28 x 28 pixels."""
    use_text: bool = True
    """False: the encoder reads pictures alone (ablation)."""
    use_pictures: bool = True
    """False: the encoder reads texts alone (ablation)."""
    lora_rank: int = 8
    """Of LoRA on every linear layer of the language model; 0: no LoRA, all weights of the language model are trained."""
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    frozen_layers: int = 0
    """Sentence encoders: the lowest layers that are not trained."""
    attention: str = "auto"
    """``auto``: flash attention where it is installed and the device has it, else ``sdpa``."""
    checkpointing: bool = True
    """Gradient checkpointing in the encoder: less memory, a second forward pass."""
    cache_pictures: bool = False
    """Compute the frozen vision tower once an item and keep its outputs in a file."""

    # ---------------------------------------------------------------------------------------- the codebooks, section 3.2
    levels: int = 3
    """L: codes an item."""
    root: int = 256
    """Codes of the first position."""
    leaf: int = 512
    """Codes of the book that all other positions share; without ``tree`` of each of their books."""
    tree: bool = True
    """False: each position has a book of its own (ablation)."""
    code_width: int = 128
    """Width of what is quantised."""
    mlp_hidden: int = 768
    """Inner width of the MLP between hidden state and codebook."""
    dropout: float = 0.1
    """In that MLP."""
    book_kind: str = "simvq"
    """``simvq``: C = E W; ``vq``: plain gradient; ``ema``: running means."""
    book_decay: float = 0.99
    """Of the running means."""
    beta: float = 0.25
    """Weight of the commitment term inside the code loss."""

    # ------------------------------------------------------------------------------------------ the decoders, section 3.3
    text_decoder: bool = True
    """False: no reconstruction of text (ablation)."""
    picture_decoder: bool = True
    """False: no reconstruction of pictures (ablation)."""
    mask_tokens: int = 512
    """Most tokens of a text that are selected for masking."""
    vae: str = "stand-in"
    """Weights of MAR's KL-16 VAE (``kl16.ckpt``), by path; ``stand-in``: a small fixed encoder, for tests and miniatures."""
    vae_digest: str = ""
    """SHA-256 of that file; empty: taken as it is, the record says it."""
    diffusion_width: int = 1024
    diffusion_depth: int = 3
    diffusion_steps: int = 1000
    diffusion_repeats: int = 4
    """Each latent is noised so many times a step."""

    # --------------------------------------------------------------------------------- the objective, sections 3.3 and 3.4
    picture_weight: float = 5.0
    """alpha: of the picture's reconstruction beside the text's."""
    code_weight: float = 200.0
    """lambda: of the code loss."""
    align_weight: float = 0.01
    """mu: of the alignment of co-occurring items; 0: none (ablation)."""
    cooccurrence_weight: float = 0.03
    """eta: of the reconstruction of a co-occurring item; 0: none (ablation)."""
    temperature_align: float = 0.1
    """tau of InfoNCE."""

    # ----------------------------------------------------------------------------------------------------------- training
    tokenizer_epochs: int = 3
    """Pre-training, over the items of all domains together."""
    tokenizer_learning_rate: float = 3e-4
    quantise_after: int = 300
    """Steps of pre-training before the codebooks enter."""
    adapt_epochs: int = 40
    """Adaptation to the target domain."""
    adapt_learning_rate: float = 1e-4
    adapt: str = "w"
    """Of the codebooks in adaptation: ``w`` trains W and freezes E; ``all`` trains both (ablation); ``none``: no adaptation at all."""
    tokenizer_batch: int = 256
    """Items in a step, over all processes: also the number of candidates in InfoNCE."""
    tokenizer_micro: int = 16
    """Items that go through the model together on one device, at most; the gradient is that of the whole batch."""
    tokenizer_weight_decay: float = 0.01
    tokenizer_clip: float = 1.0
    tokenizer_warmup: float = 0.03
    """Share of the steps in which the learning rate rises; then it falls linearly to 0."""
    tokenizer_share: float = 0.5
    """Share of a stage's seconds that training the tokenizer may take."""
    sharding: str = "none"
    """DeepSpeed's ZeRO stage with several GPUs."""
    workers: int = 0
    """Processes that read and decode pictures beside the training; 0: none."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, field.type)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ContractError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(map(repr, known))}")
        ones = ("text_tokens", "pixels_min", "levels", "root", "leaf", "code_width", "mlp_hidden", "mask_tokens", "diffusion_width")
        ones += ("diffusion_depth", "diffusion_steps", "diffusion_repeats", "tokenizer_epochs", "adapt_epochs", "tokenizer_batch")
        at_least = {**dict.fromkeys((*ones, "tokenizer_micro"), 1), "pixels_max": self.pixels_min}
        weights = ("picture_weight", "code_weight", "align_weight", "cooccurrence_weight", "beta", "tokenizer_weight_decay")
        at_least |= dict.fromkeys(
            (*weights, "lora_rank", "frozen_layers", "quantise_after", "tokenizer_clip", "workers", "tokenizer_warmup"), 0
        )
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ContractError(f"{name} = {getattr(self, name)}: use {least} or more")
        for name in ("tokenizer_learning_rate", "adapt_learning_rate", "temperature_align", "lora_alpha", "tokenizer_share"):
            if getattr(self, name) <= 0:
                raise ContractError(f"{name} = {getattr(self, name)}: use a number above 0")
        for name in ("dropout", "lora_dropout", "book_decay", "tokenizer_warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ContractError(f"{name} = {getattr(self, name)}: use a share from 0 up to below 1")
        if not (self.use_text or self.use_pictures):
            raise ContractError("use_text and use_pictures are both false: the encoder would read nothing; leave one of them on")
        if self.encoder == "text" and not self.use_text:
            raise ContractError("use_text = false with encoder = 'text', which reads nothing else; use 'qwen2-vl' or 'tiny'")

    def _check_type(self, name: str, kind: Any) -> None:
        """TOML knows 1 and 1.0 apart, Python's True is a 1: be exact about both, and take a whole number for a float."""
        value = getattr(self, name)
        if kind == "float" and type(value) is int:
            object.__setattr__(self, name, value := float(value))
        if type(value).__name__ != kind or (kind == "float" and not math.isfinite(value)):
            raise ContractError(f"{name} = {value!r}: this key takes {'a finite number' if kind == 'float' else kind}")

    @classmethod
    def take(cls, configuration: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """The settings in a method's configuration, and the keys that are left, which are not the tokenizer's."""
        mine = {name: value for name, value in configuration.items() if name in KEYS}
        return cls(**mine), {name: value for name, value in configuration.items() if name not in KEYS}

    @classmethod
    def of(cls, configuration: Mapping[str, Any]) -> Settings:
        """The settings, of a configuration that has no other keys. Raises ContractError with the nearest name."""
        settings, rest = cls.take(configuration)
        if rest:
            near = difflib.get_close_matches(next(iter(rest)), KEYS, 1)
            raise ContractError(f"configuration keys {sorted(rest)} are unknown{f'; did you mean {near[0]!r}?' if near else ''}")
        return settings

    @property
    def books(self) -> tuple[int, ...]:
        """The codebook of each position: 0, 1, 1 for a tree of three levels, else 0, 1, 2."""
        return tuple(min(level, 1) if self.tree else level for level in range(self.levels))

    @property
    def widths(self) -> tuple[int, ...]:
        """Codes of each position."""
        return (self.root, *(self.leaf,) * (self.levels - 1))


KEYS = tuple(field.name for field in dataclasses.fields(Settings))
