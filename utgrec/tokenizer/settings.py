"""The settings of the universal item tokenizer: encoder, codebooks, decoders, losses, training.

In: keys of a ``[configs.NAME]`` table. Out: a frozen ``Settings``, checked. The defaults are the paper's (arXiv 2504.04405) and, where
that is silent, those of its authors' released tokenizer training. An ablation of the paper is one or two keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.contract import ContractError
from utgrec.configuration import Configuration


@dataclass(frozen=True)
class Settings(Configuration):
    CHOICES: ClassVar = {
        "encoder": ("qwen2-vl", "tiny", "text"),
        "attention": ("auto", "sdpa", "flash_attention_2", "eager"),
        "book_kind": ("simvq", "vq", "ema"),
        "adapt": ("w", "all", "none"),
        "sharding": ("none", "zero2", "zero3"),
    }

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
    mlp_dropout: float = 0.1
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
    """Threads that make the batches of the next step (texts masked, pictures read and decoded) beside the training; 0: none."""

    def check(self) -> None:
        self._at_least(1, "text_tokens", "pixels_min", "levels", "root", "leaf", "code_width", "mlp_hidden", "mask_tokens")
        self._at_least(1, "diffusion_width", "diffusion_depth", "diffusion_steps", "diffusion_repeats")
        self._at_least(1, "tokenizer_epochs", "adapt_epochs", "tokenizer_batch", "tokenizer_micro")
        self._at_least(0, "picture_weight", "code_weight", "align_weight", "cooccurrence_weight", "beta", "tokenizer_weight_decay")
        self._at_least(0, "lora_rank", "frozen_layers", "quantise_after", "tokenizer_clip", "workers")
        self._above_zero("tokenizer_learning_rate", "adapt_learning_rate", "temperature_align", "lora_alpha", "tokenizer_share")
        self._below_one("mlp_dropout", "lora_dropout", "book_decay", "tokenizer_warmup")
        if self.pixels_max < self.pixels_min:
            raise ContractError(f"pixels_max = {self.pixels_max}: use pixels_min ({self.pixels_min}) or more")
        if not (self.use_text or self.use_pictures):
            raise ContractError("use_text and use_pictures are both false: the encoder would read nothing; leave one of them on")
        if self.encoder == "text" and not self.use_text:
            raise ContractError("use_text = false with encoder = 'text', which reads nothing else; use 'qwen2-vl' or 'tiny'")

    @property
    def books(self) -> tuple[int, ...]:
        """The codebook of each position: 0, 1, 1 for a tree of three levels, else 0, 1, 2."""
        return tuple(min(level, 1) if self.tree else level for level in range(self.levels))

    @property
    def widths(self) -> tuple[int, ...]:
        """Codes of each position."""
        return (self.root, *(self.leaf,) * (self.levels - 1))
