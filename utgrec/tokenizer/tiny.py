"""The ``tiny`` encoder: Qwen2-VL's own classes at a size that trains on one CPU core, random weights, a vocabulary learnt from the domains.

In: item texts, settings, torch's seed. Out: a ``QwenEncoder``: everything but the size is that of the real one. 230k parameters with 512
tokens; all are trained but the vision tower, or LoRA beside random weights with ``lora_rank`` above 0.

First weights. The stock N(0, 0.02) is made for widths in the thousands. Here linear layers get N(0, 1 / inputs), which keeps the size of
what goes through, the input table N(0, 1), and each number of the patch embedding, beside its random weights, an answer to the patch's
mean colour. The tower stays random, so what it does not pass on is lost. Over three seeds, ours and the stock weights:

    a linear probe reads the colour of simulated pictures from the mean of the tower's tokens     94 to 96 %    84 to 89 %
    the same from all of its tokens                                                               98 to 99 %    92 to 97 %
    share of the states' variance at the code tokens that is between items                          8 to 10 %     5 to 6 %
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.contract import ContractError
from utgrec.tokenizer.qwen import TEXT, QwenEncoder, Wording
from utgrec.tokenizer.settings import Settings

VOCABULARY = 512
"""Tokens without those that steer the model: 256 bytes and as many merges."""
STEERING = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WIDTH, LAYERS, HEADS, KEY_HEADS = 64, 2, 4, 2
TOWER_WIDTH, TOWER_LAYERS = 32, 2
COLOUR = 3.0
"""How strongly, beside its random weights, a number of the patch embedding answers to the mean colour of the patch."""
FILES = "tiny"
"""Folder of a saved model that the vocabulary goes into."""
WORDING = Wording(both=TEXT, text_only="no picture: " + TEXT, picture_only="")
"""Short: in so small a vocabulary each word is several tokens."""
CHAT = (
    "{% for message in messages %}<|im_start|>"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


class TinyEncoder(QwenEncoder):
    """Its base model is nowhere else: all of it is saved, and its vocabulary beside it."""

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu() for name, value in self.named_parameters()}

    def save_files(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / FILES)


def make_tiny(settings: Settings, texts: Iterable[str], *, device: torch.device, precision: str, saved: Path | None = None) -> TinyEncoder:
    """Random weights from torch's seed. ``saved``: the folder of ``save_files``, whose vocabulary is taken. Raises ContractError."""
    tokenizer = read_vocabulary(saved) if saved else learn_vocabulary(texts)
    model = random_model(tokenizer, settings.levels)
    about = {"model": "tiny", "revision": "", "digest": f"tiny, {len(tokenizer)} tokens"}
    return TinyEncoder(model, tokenizer, settings, about=about, wording=WORDING, device=device, precision=precision)


def learn_vocabulary(texts: Iterable[str]) -> Any:
    """A byte-level BPE, cut into words as Qwen2's: the same texts in any order give the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    like = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    learner.train_from_iterator(texts, trainer)
    vocabulary = learner.get_vocab()
    merges = _merges(learner)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, pad_token=STEERING[0], eos_token=STEERING[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [name for name in STEERING if name not in tokenizer.get_vocab()]})
    tokenizer.chat_template = CHAT
    return _checked(tokenizer, "the vocabulary that was just learnt")


def _merges(learner: Any) -> list[tuple[str, str]]:
    import json

    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]


def read_vocabulary(folder: Path) -> Any:
    from transformers import Qwen2Tokenizer

    if not (folder / FILES / "tokenizer.json").exists():
        raise ContractError(f"{folder / FILES}: no vocabulary of a tiny encoder there; save the tokenizer again")
    return _checked(Qwen2Tokenizer.from_pretrained(folder / FILES, local_files_only=True), str(folder / FILES))


def _checked(tokenizer: Any, name: str) -> Any:
    """transformers drops a vocabulary that it is given in another way than expected, and says nothing."""
    if len(tokenizer) < 256 + len(STEERING) or tokenizer.convert_tokens_to_ids("<|image_pad|>") is None:
        raise ContractError(
            f"{name} came back with {len(tokenizer)} tokens: this version of transformers reads it differently; use 5.17 to 5.23"
        )
    return tokenizer


def random_model(tokenizer: Any, levels: int) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    of = {name: tokenizer.convert_tokens_to_ids(name) for name in STEERING}
    text = {
        "vocab_size": len(tokenizer) + levels + 1,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "intermediate_size": 2 * WIDTH,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": of["<|endoftext|>"],
        "eos_token_id": of["<|im_end|>"],
        "pad_token_id": of["<|endoftext|>"],
    }
    tower = {"depth": TOWER_LAYERS, "embed_dim": TOWER_WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=of["<|image_pad|>"],
        video_token_id=of["<|video_pad|>"],
        vision_start_token_id=of["<|vision_start|>"],
        vision_end_token_id=of["<|vision_end|>"],
        attn_implementation="sdpa",
    )
    model = Qwen2VLForConditionalGeneration(config)
    draw_weights(model)
    return model


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.Conv3d):
            outputs, colours, *pixels = module.weight.shape
            module.weight += torch.randn(outputs, colours, 1, 1, 1) * COLOUR / (math.prod(pixels) * math.sqrt(colours))
