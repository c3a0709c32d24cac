"""What survives a kill, and what outlives a run: the checkpoint of a training, and the folder of a saved model.

A checkpoint is one file, ``last.pt``, whole or absent, and it belongs to one configuration: another's is refused, with the key
that differs. Row order and dropout follow from (seed, epoch) and (seed, step), so that there is no state of a generator in it.

A saved model is a folder: ``config.json`` (the T5's shape and what its tokens mean) and ``model.safetensors``. It loads by
path; a model of another shape or vocabulary is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness.contract import ContractError, write_json
from utgrec.recommender.model import T5, Shape
from utgrec.semantic_ids import SemanticIds

SHARE = 0.05
"""Checkpoints take at most about this share of the time; a kill loses at most 1 / SHARE times what one takes."""


class Checkpoint:
    """The file, and when to write it next. ``identity``: what makes a training the same training, key by key."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path, self.identity = folder / "last.pt", identity
        self._next = 0.0

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None if there is none. Raises ContractError for another configuration's or a damaged one."""
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            theirs, state = saved["identity"], saved["state"]
        except Exception as error:  # torch.load raises many kinds for a file that is none of its own
            raise ContractError(f"{self.path}: not a checkpoint ({type(error).__name__}); delete it to start anew") from error
        self.refuse_another(theirs)
        return state

    def refuse_another(self, theirs: dict[str, Any]) -> None:
        """Raise ContractError, with the key that differs, unless this is the identity of the same training."""
        for key in sorted(set(theirs) | set(self.identity)):
            if theirs.get(key) != self.identity.get(key):
                raise ContractError(
                    f"{self.path}: this checkpoint is of another configuration: {key} is {theirs.get(key)!r} there and "
                    f"{self.identity.get(key)!r} here; delete it to start anew, or go back to the configuration that made it"
                )

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next

    def save(self, state: dict[str, Any]) -> None:
        start = time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        torch.save({"identity": self.identity, "state": state}, temporary)
        os.replace(temporary, self.path)
        self.saved(time.monotonic() - start)

    def saved(self, seconds: float) -> None:
        """It took so long: the next one is due when that is a small share of the time."""
        self._next = time.monotonic() + seconds / SHARE


# -------------------------------------------------------------------------------------------------------- saved models


def describe(model: T5, ids: SemanticIds, user_tokens: int) -> dict[str, Any]:
    """What weights must agree on to be of use: the sizes, and which token means what."""
    tokens = {"user_tokens": user_tokens, "widths": list(ids.widths), "books": list(ids.books)}
    return dataclasses.asdict(model.shape) | tokens


def save_model(folder: Path, model: T5, description: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    temporary = folder / ".model.tmp"
    save_file(weights, temporary)
    os.replace(temporary, folder / "model.safetensors")
    write_json(folder / "config.json", description)


def open_model(folder: Path, ids: SemanticIds) -> tuple[T5, int]:
    """The saved model for these ids, and its number of user tokens. Raises ContractError where its tokens mean something else."""
    try:
        theirs = json.loads((folder / "config.json").read_text())
        shape = Shape(**{field.name: theirs[field.name] for field in dataclasses.fields(Shape)})
        user_tokens = int(theirs["user_tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{folder}: no saved model (config.json, model.safetensors): {error}") from error
    model = T5(shape)
    load_model(folder, model, describe(model, ids, user_tokens))
    return model, user_tokens


def load_model(folder: Path, model: T5, description: dict[str, Any]) -> None:
    """Put saved weights into ``model``. Raises ContractError where folder, shape or tokens do not fit."""
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ContractError(f"{folder}: no saved model (config.json, model.safetensors): {error}") from error
    for key, here in description.items():
        if key != "dropout" and theirs.get(key) != here:  # dropout may change: it has no weights
            raise ContractError(f"{path}: its {key} is {theirs.get(key)}, this model's is {here}; use weights and ids that fit together")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ContractError(f"{folder / 'model.safetensors'}: not the weights that config.json describes: {error}") from error
