"""The settings of a generative recommender: the T5, how it is trained, how it decodes.

In: keys of a ``[configs.NAME]`` table. Out: a frozen ``Settings``, checked. The defaults are the lineage's: MTGRec
(arXiv 2504.04400, its paper and its public configuration files), whose T5 the UTGRec paper's authors use for TIGER, LETTER
and their own tokenizers alike. What the TIGER paper (arXiv 2305.05065, section 4) published stands beside it where it differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from harness.contract import ContractError
from utgrec.configuration import Configuration
from utgrec.recommender.model import Shape


@dataclass(frozen=True)
class Settings(Configuration):
    CHOICES: ClassVar = {"schedule": ("cosine", "inverse_square_root", "constant"), "compile": ("auto", "on", "off")}

    # ------------------------------------------------------------------------------------------------------- the T5
    d_model: int = 128
    """Width. The same in TIGER."""
    d_ff: int = 512
    """Inner width of the feed-forward layers. TIGER: 1024."""
    heads: int = 4
    """TIGER: 6."""
    d_kv: int = 64
    """Width of a head. The same in TIGER."""
    encoder_layers: int = 4
    """MTGRec tunes 1 to 8 a data set, encoder and decoder alike. TIGER: 4."""
    decoder_layers: int = 4
    dropout: float = 0.1
    """The same in TIGER."""
    user_tokens: int = 1
    """Tokens that stand for users, user number modulo. 1: one token for all (MTGRec). 0: none. TIGER: 2,000."""

    # ---------------------------------------------------------------------------------------------------- training
    batch: int = 256
    """Training rows in a step, over all processes. The same in TIGER."""
    accumulate: int = 1
    """Parts into which each process cuts its share of a batch to save memory. The gradient is that of the whole batch."""
    epochs: int = 200
    """At most; the rule of the contract usually stops earlier. TIGER: 200,000 steps."""
    learning_rate: float = 1e-3
    """The peak (MTGRec's configuration file; pre-training there 5e-3, fine-tuning 2e-4). TIGER: 1e-2."""
    weight_decay: float = 0.05
    """AdamW's, on every parameter, as in MTGRec's code."""
    clip: float = 1.0
    """Largest norm of a gradient; 0 clips nothing."""
    warmup_steps: int = 0
    """Steps from 0 to the peak (MTGRec: 10,000 in pre-training, else none). With ``inverse_square_root`` steps at the peak
    (TIGER: 10,000)."""
    schedule: str = "cosine"
    """``cosine`` (MTGRec), ``inverse_square_root`` (TIGER: constant, then as 1/sqrt(step)), or ``constant`` after the warm-up."""
    schedule_epochs: int = 0
    """Epochs until the cosine is down; 0 means ``epochs``. A run that ends early, by patience or budget, has not come down:
    give ``epochs`` (or this) what it will reach."""
    learning_rate_end: float = 0.0
    """Where the cosine ends and stays, as a share of the peak."""
    temperature: float = 1.0
    """Several domains: a domain of n rows gets a share of n^(1/temperature). 1: by size (MTGRec). Large: all alike."""
    compile: str = "auto"
    """``torch.compile`` for training: ``on``, ``off``, or ``auto``, which is on with CUDA."""

    # -------------------------------------------------------------------------------------- validation and decoding
    eval_every: int = 1
    """Epochs between two validations. The same in MTGRec."""
    valid_users: int = 0
    """Validate on this many users, drawn once by the seed; 0: all, as the contract wants. The record says which."""
    valid_beams: int = 20
    """Beams in validation. MTGRec: 20."""
    beams: int = 50
    """Beams for the lists that are scored. MTGRec and UTGRec: 50."""
    constrained: bool = True
    """Decode over the trie of real items. False: over all codes, where an illegal tuple is a spent slot (MTGRec)."""
    keep_model: bool = False
    """Leave the best weights in the output folder (``model/``)."""

    def check(self) -> None:
        self._at_least(1, "d_model", "d_ff", "heads", "d_kv", "encoder_layers", "decoder_layers")
        self._at_least(1, "batch", "accumulate", "epochs", "eval_every", "valid_beams", "beams")
        self._at_least(0, "user_tokens", "weight_decay", "clip", "warmup_steps", "schedule_epochs", "valid_users", "learning_rate_end")
        self._above_zero("learning_rate", "temperature")
        self._below_one("dropout")
        if self.valid_beams < 10:
            raise ContractError(f"valid_beams = {self.valid_beams}: NDCG@10 needs lists of 10; use 10 or more")
        if self.schedule == "cosine" and 0 < self.schedule_epochs < self.epochs and self.learning_rate_end == 0:
            rest = self.epochs - self.schedule_epochs
            raise ContractError(
                f"schedule_epochs = {self.schedule_epochs}: the last {rest} of {self.epochs} epochs would have a learning rate of 0; "
                "lower epochs, or give learning_rate_end a share above 0"
            )

    def shape(self, n_codes: int) -> Shape:
        """The T5 for this many code tokens: padding, end, the users' tokens, then the codes."""
        return Shape(
            vocabulary=2 + self.user_tokens + n_codes,
            d_model=self.d_model,
            d_ff=self.d_ff,
            heads=self.heads,
            d_kv=self.d_kv,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            dropout=self.dropout,
        )

    @property
    def schedule_in_words(self) -> str:
        warm = f"{self.warmup_steps} steps {'at the peak first' if self.schedule == 'inverse_square_root' else 'of warm-up'}"
        over = f" over {self.schedule_epochs or self.epochs} epochs to {self.learning_rate_end:g}" if self.schedule == "cosine" else ""
        return f"{self.schedule.replace('_', ' ')}, peak {self.learning_rate:g}{over}, {warm}"

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step 0, 1, 2, ..."""
        warm = self.warmup_steps
        if self.schedule == "inverse_square_root":
            return self.learning_rate * math.sqrt(max(warm, 1) / max(step, warm, 1))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.schedule == "constant":
            return self.learning_rate
        length = (self.schedule_epochs or self.epochs) * steps_per_epoch - warm
        done = min(1.0, (step - warm) / max(1, length))
        return self.learning_rate * (self.learning_rate_end + (1 - self.learning_rate_end) * 0.5 * (1 + math.cos(math.pi * done)))
