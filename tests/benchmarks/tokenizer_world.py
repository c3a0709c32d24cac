"""What the measurement of the tokenizer runs on: made-up items whose lengths are like those of a shop, models of Qwen2-VL's classes.

In: a ``Size``. Out: a ``World``: a catalogue of items with texts and pictures, ours and the released formulation with the same weights.

    2b       the shapes of Qwen2-VL-2B and of UTGRec, random weights
    eighth   widths and lengths an eighth of it, a quarter of the layers; the vocabulary, 151,661 / 32, keeps the share of the head:
             V D / (layers x weights of a layer) is 0.178 in both
    tiny     runs in a second: for the test of this script
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from harness.contract import Budget, Job, Pictures, Ragged
from tests.benchmarks.peers.released_tokenizer import ReleasedTokenizer, Trainer
from utgrec.recommender.processes import Processes
from utgrec.tokenizer.data import Catalogue
from utgrec.tokenizer.lora import LoraLinear
from utgrec.tokenizer.model import Latents, UniversalTokenizer
from utgrec.tokenizer.qwen import QwenEncoder
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.tiny import STEERING, WORDING, draw_weights, learn_vocabulary
from utgrec.tokenizer.train import Training
from utgrec.tokenizer.vae import KL16, VAE, Moments, _Encoder, pixels

SIGMA = 0.8
"""Of the logarithm of a text's tokens."""
TOKENS_A_WORD = 2.1
"""Of the made-up words, with the vocabulary that is learnt from them."""
WITHOUT_PICTURE = 0.05


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    kv_heads: int
    ff: int
    sections: tuple[int, int, int]
    vocabulary: int
    tower_width: int
    tower_layers: int
    tower_heads: int
    median_text: int
    """Tokens; a log-normal distribution, cut at ``text_tokens``."""
    text_tokens: int
    picture: int
    """Pixels of the longer side: half of the pictures are square, the others down to half as wide."""
    pixels_min: int
    pixels_max: int
    vae: tuple[int, tuple[int, ...], int, int]
    """Width, its multiples by level, residual blocks a level, pixels a side."""
    diffusion_width: int
    diffusion_depth: int
    mlp_hidden: int
    code_width: int
    batch: int = 16
    """Items a step: what one of the paper's sixteen GPUs does."""
    items: int = 64
    encoded: int = 64


SIZES = {
    "2b": Size(
        1536, 28, 12, 2, 8960, (16, 24, 24), 151_661, 1280, 32, 16, 200, 1024, 500, 128, 1024,
        (128, (1, 1, 2, 2, 4), 2, 256), 1024, 3, 768, 128, items=512, encoded=512,
    ),
    "eighth": Size(
        192, 7, 6, 1, 1120, (4, 6, 6), 151_661 // 32, 160, 8, 4, 25, 128, 125, 16, 128,
        (32, (1, 1, 2, 2), 1, 32), 128, 1, 96, 16,
    ),
    "tiny": Size(
        64, 2, 4, 2, 128, (2, 3, 3), 600, 32, 2, 4, 8, 32, 112, 8, 16, (32, (1, 1), 1, 16), 32, 1, 32, 8, batch=6, items=16, encoded=16,
    ),
}  # fmt: skip


class SmallVAE(KL16):
    """KL-16's layers, fewer of them."""

    def __init__(self, shape: tuple[int, tuple[int, ...], int, int]):
        VAE.__init__(self)
        width, multiples, blocks, self.side = shape
        self.latents = (self.side >> (len(multiples) - 1)) ** 2
        self.encoder = _Encoder(width, multiples, 2 * self.channels, blocks)
        self.quant_conv = torch.nn.Conv2d(2 * self.channels, 2 * self.channels, 1)
        self.freeze()


class World:
    """Items, and everything that both sides are made from."""

    def __init__(self, size: Size, folder: Path, *, device: str = "cpu", precision: str = "fp32", **changes: Any):
        """``changes``: of the settings."""
        self.size, self.folder, self.device, self.precision = size, folder, torch.device(device), precision
        self.settings = Settings(
            encoder="qwen2-vl", text_tokens=size.text_tokens, pixels_min=size.pixels_min, pixels_max=size.pixels_max,
            code_width=size.code_width, mlp_hidden=size.mlp_hidden, diffusion_width=size.diffusion_width,
            diffusion_depth=size.diffusion_depth, tokenizer_batch=size.batch, tokenizer_micro=size.batch, quantise_after=0,
            tokenizer_epochs=1000, **changes,
        )  # fmt: skip
        self.domain = make_domain(size, folder / "domain")
        self.tokenizer = vocabulary_of(size, self.domain.texts)
        torch.manual_seed(1)
        self.vae = SmallVAE(size.vae).to(self.device)
        self.moments = Moments.of(self.domain, self.vae, folder)  # type: ignore[arg-type]

    def base_model(self) -> Any:
        torch.manual_seed(0)
        return qwen2_vl(self.size, self.tokenizer, self.device)

    def ours(self, *, cached: bool = False) -> Training:
        model = self.base_model()
        about = {"model": "random", "revision": "", "digest": ""}
        encoder = QwenEncoder(
            model, self.tokenizer, self.settings, about=about, wording=WORDING, device=self.device, precision=self.precision
        )
        torch.manual_seed(2)
        tokenizer = UniversalTokenizer(self.settings, encoder, Latents(self.vae.latents, self.vae.channels)).to(self.device)
        for module in tokenizer.modules():  # LoRA's zeros would hide half of its gradients
            if isinstance(module, LoraLinear):
                torch.nn.init.normal_(module.up, std=0.02)
        if cached:
            encoder.cache_pictures((self.domain.pictures[item] for item in range(self.size.items)), self.folder / "vision")
        catalogue = Catalogue([self.domain], encoder, self.settings, seed=1, moments=[self.moments])  # type: ignore[list-item]
        catalogue.prompts(np.arange(self.size.items))  # texts are cut into tokens and pictures decoded once, for either side
        return Training(self.job(), self.settings, catalogue, tokenizer, Processes(self.device), phase="pretrain", fresh=False)

    def theirs(self, like: Training) -> Trainer:
        """The released formulation with the weights of ``like``, on its items (whose prompts must have patches)."""
        side = self.vae.side
        decoded = [pixels(data, side) if (data := self.domain.pictures[item]) else None for item in range(self.size.items)]
        pixels_XHW3 = np.stack([np.zeros((side, side, 3), np.uint8) if one is None else one for one in decoded])
        return Trainer(ReleasedTokenizer(like.model, self.base_model(), self.vae), like.catalogue, pixels_XHW3, self.precision)

    def job(self) -> Job:
        folders = {name: self.folder / "job" / name for name in ("output", "cache", "scratch", "checkpoint")}
        for path in folders.values():
            path.mkdir(parents=True, exist_ok=True)
        return Job(
            run_id="benchmark", stage="pretrain_tokenizer", method="utgrec", configuration=dataclasses.asdict(self.settings), domains=(),
            inputs={}, seed=1, budget=Budget(seconds=10**6, deadline=10**6, memory=1 << 40, disk=1 << 40, threads=1),
            device=self.device.type, precision=self.precision, **folders,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- items


def make_domain(size: Size, folder: Path) -> SimpleNamespace:
    """What the tokenizer reads of a domain. The same for the same size; pictures lie in a pack, as always."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlucmfwypvbgk"), rng.integers(2, 9))) for _ in range(300)]
    counts = np.minimum(rng.lognormal(np.log(size.median_text), SIGMA, size.items).astype(int) + 1, size.text_tokens)
    texts = [" ".join(rng.choice(words, max(1, round(count / TOKENS_A_WORD)))) for count in counts]
    folder.mkdir(parents=True, exist_ok=True)
    rows, packed = [], b""
    for item in range(size.items):
        if rng.random() >= WITHOUT_PICTURE:
            data = picture(size.picture, rng)
            rows.append((item, len(packed), len(data), f"{item:064x}"))
            packed += data
    (folder / "pictures.bin").write_bytes(packed)
    columns = dict(zip(("item", "offset", "length", "sha256"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "pictures.parquet")
    histories = [rng.integers(0, size.items, 5) for _ in range(4 * size.items)] + [np.arange(size.items)]
    train = Ragged(np.concatenate(histories), np.concatenate([[0], np.cumsum([len(one) for one in histories])]))
    return SimpleNamespace(
        name="made-up", path=folder, info={"digest": "made-up"}, n_items=size.items, texts=texts, train=train, pictures=Pictures(folder)
    )


def picture(longest: int, rng: np.random.Generator) -> bytes:
    """A JPEG of soft colours."""
    other = longest if rng.random() < 0.5 else int(longest * rng.uniform(0.5, 1))
    sides = (longest, other) if rng.random() < 0.5 else (other, longest)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize(sides, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- models


def vocabulary_of(size: Size, texts: Sequence[str]) -> Any:
    """A tokenizer with ``size.vocabulary`` tokens less those of the codes: what it has learnt, and strings that never occur."""
    from transformers import Qwen2Tokenizer

    learnt = learn_vocabulary(texts)
    about = json.loads(learnt.backend_tokenizer.to_str())["model"]
    vocabulary, merges = dict(about["vocab"]), [tuple(pair) for pair in about["merges"]]
    wanted = size.vocabulary - Settings.levels - 1 - len([name for name in STEERING if name not in vocabulary])
    vocabulary |= {f"\N{REPLACEMENT CHARACTER}{number}": number for number in range(len(vocabulary), wanted)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, pad_token=STEERING[0], eos_token=STEERING[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [name for name in STEERING if name not in tokenizer.get_vocab()]})
    tokenizer.chat_template = learnt.chat_template
    return tokenizer


def qwen2_vl(size: Size, tokenizer: Any, device: torch.device) -> Any:
    """Random weights, drawn on the device."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    of = {name: tokenizer.convert_tokens_to_ids(name) for name in STEERING}
    text = {
        "vocab_size": size.vocabulary, "hidden_size": size.width, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "intermediate_size": size.ff, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(size.sections)},
        "bos_token_id": of["<|endoftext|>"], "eos_token_id": of["<|im_end|>"], "pad_token_id": of["<|endoftext|>"],
    }  # fmt: skip
    tower = {
        "depth": size.tower_layers, "embed_dim": size.tower_width, "hidden_size": size.width, "num_heads": size.tower_heads, "mlp_ratio": 4,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=tower, image_token_id=of["<|image_pad|>"], video_token_id=of["<|video_pad|>"],
        vision_start_token_id=of["<|vision_start|>"], vision_end_token_id=of["<|vision_end|>"], attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        model = Qwen2VLForConditionalGeneration(config)
    draw_weights(model)
    return model
