"""A trained tokenizer as a folder, and back.

    config.json        settings, what the encoder is (base model, digest), the latents' shape, the domains it was trained on
    model.safetensors  what was trained, and what no base model brings
    encoder files      the vocabulary of the ``tiny`` encoder

In: a model. Out: a folder that loads by path; one of another kind of encoder, another base model or other sizes is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness.contract import ContractError, write_json
from utgrec.tokenizer.encoder import make_encoder
from utgrec.tokenizer.model import Latents, UniversalTokenizer
from utgrec.tokenizer.settings import Settings

SCHEMA = 1
SHAPES = ("encoder", "model", "revision", "levels", "root", "leaf", "tree", "code_width", "mlp_hidden", "book_kind", "lora_rank")
SHAPES += ("text_decoder", "picture_decoder", "diffusion_width", "diffusion_depth", "diffusion_steps")
"""Settings that weights belong to; all others may differ where a saved tokenizer is trained further."""


def save(folder: Path, model: UniversalTokenizer, about: dict[str, Any]) -> None:
    """Write the folder; ``config.json`` comes last, so that a folder without it is not whole."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = {f"encoder.{name}": value for name, value in model.encoder.state().items()}
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    temporary = folder / ".model.tmp"
    save_file({name: value.detach().cpu().contiguous() for name, value in (encoder | rest).items()}, temporary)
    os.replace(temporary, folder / "model.safetensors")
    model.encoder.save_files(folder)
    config = {
        "schema": SCHEMA,
        "settings": dataclasses.asdict(model.settings),
        "encoder": model.encoder.describe(),
        "latents": [model.latents.tokens, model.latents.channels],
        "about": about,
    }
    write_json(folder / "config.json", config)


def load(
    folder: Path, settings: Settings | None = None, *, device: torch.device | str = "cpu", precision: str = "fp32"
) -> UniversalTokenizer:
    """The tokenizer of a folder. ``settings``: train it further with these; they must fit the weights."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        theirs = Settings.of(config["settings"])
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ContractError(f"{folder}: no saved tokenizer (config.json, model.safetensors): {error}") from error
    if config.get("schema") != SCHEMA:
        raise ContractError(f"{path}: schema {config.get('schema')!r}, this program reads {SCHEMA}; train the tokenizer again")
    settings = settings or theirs
    for name in SHAPES:
        if getattr(settings, name) != getattr(theirs, name):
            raise ContractError(f"{path}: its {name} is {getattr(theirs, name)!r}, this configuration's is {getattr(settings, name)!r}")
    encoder = make_encoder(settings, device=device, precision=precision, saved=folder)
    for name in ("model", "digest"):  # of the weights below what was trained
        if encoder.describe().get(name) != config["encoder"].get(name):
            raise ContractError(f"{path}: trained on {name} {config['encoder'].get(name)!r}, here it is {encoder.describe().get(name)!r}")
    model = UniversalTokenizer(settings, encoder, Latents(*config["latents"]))
    own = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    rest = {name: value for name, value in weights.items() if not name.startswith("encoder.")}
    try:
        encoder.load_state(own)
        missing, unexpected = model.load_state_dict(rest, strict=False)
        missing = [name for name in missing if not name.startswith("encoder.")]
        if missing or unexpected:
            raise RuntimeError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    except RuntimeError as error:
        raise ContractError(f"{folder / 'model.safetensors'}: not the weights that config.json describes: {error}") from error
    return model.to(device)
