"""Small encoders for tests: items of the simulator's kind, the real classes."""

from __future__ import annotations

import dataclasses

import numpy as np

from harness.data.simulate import COLOURS, product_picture
from utgrec.tokenizer.encoder import Encoder, make_encoder
from utgrec.tokenizer.settings import Settings

TINY = Settings(encoder="tiny", lora_rank=0, checkpointing=False, pixels_min=1, pixels_max=16, text_tokens=40)
TEXTS = [
    f"{name} soap of {name}land, {number} bars in a box" for number, name in enumerate(("rose", "olive", "lemon", "pine", "cedar", "mint"))
]


def picture(colour: int = 0, side: int = 64, seed: int = 0) -> bytes:
    return product_picture(COLOURS[colour], np.random.default_rng([seed, colour]), side)


PICTURES = [picture(0), None, picture(1, side=100), picture(2), picture(3, side=150), None]
"""Of three sizes, and none."""


def tiny(seed: int = 1, **changes: object) -> Encoder:
    return make_encoder(dataclasses.replace(TINY, **changes), TEXTS, seed=seed)
