"""A simulated miniature world for the tests of UTGRec: two domains, the real classes of Qwen2-VL with random weights, seconds."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.contract import Budget, Domain, DomainRef, Job
from harness.data.simulate import simulate
from utgrec.recommender.processes import Processes
from utgrec.run import STAGE_KEYS, read_pictures, training_texts
from utgrec.tokenizer.data import Catalogue
from utgrec.tokenizer.encoder import make_encoder
from utgrec.tokenizer.model import UniversalTokenizer
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.train import Phase, Training

TINY: dict[str, Any] = {
    "encoder": "tiny", "model": "", "text_tokens": 16, "pixels_min": 4, "pixels_max": 4, "lora_rank": 0, "checkpointing": False,
    "root": 8, "leaf": 8, "code_width": 8, "mlp_hidden": 32, "diffusion_width": 32, "diffusion_depth": 1, "quantise_after": 2,
    "tokenizer_epochs": 2, "adapt_epochs": 2, "tokenizer_batch": 16, "tokenizer_micro": 16, "tokenizer_learning_rate": 2e-3,
    "mlp_dropout": 0.0, "code_weight": 5.0,
}  # fmt: skip
RECOMMENDER: dict[str, Any] = {
    "d_model": 16, "d_ff": 32, "heads": 2, "d_kv": 8, "encoder_layers": 1, "decoder_layers": 1, "batch": 64, "epochs": 1,
    "pretrain_epochs": 1, "pretrain_warmup_steps": 0,
}  # fmt: skip


@functools.cache
def domains(users: int = 60, items: int = 48) -> tuple[Domain, ...]:
    """Two simulated domains; they live as long as the process."""
    root = Path(tempfile.mkdtemp(prefix="utgrec-test-"))
    summaries = simulate(root, categories=("Video_Games", "Software"), users=users, items=items)
    return tuple(Domain.read(root / summary.name / "public") for summary in summaries)


def job(folder: Path, stage: str, configuration: dict[str, Any], of: tuple[Domain, ...], **changes: Any) -> Job:
    folders = {name: folder / stage / name for name in ("output", "cache", "scratch", "checkpoint")}
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    keys = STAGE_KEYS.get(stage, tuple(configuration))
    values: dict[str, Any] = {
        "run_id": "test", "stage": stage, "method": "utgrec", "domains": tuple(DomainRef(d.name, d.path) for d in of), "inputs": {},
        "configuration": {key: value for key, value in configuration.items() if key in keys}, "seed": 1,
        "budget": Budget(seconds=300, deadline=400, memory=8 << 30, disk=1 << 30, threads=1), **folders,
    }  # fmt: skip
    return Job(**{**values, **changes})


def training(
    folder: Path, processes: Processes | None = None, *, phase: Phase = "pretrain", of: tuple[Domain, ...] | None = None, **changes: Any
) -> Training:
    """A training that is ready to run, every weight of it from seed 1."""
    settings, of = Settings.of(TINY | changes), of or domains()
    task = job(folder, "pretrain_tokenizer", dataclasses.asdict(settings), of)
    torch.manual_seed(1)
    moments, latents = read_pictures(task, settings, of)
    encoder = make_encoder(settings, training_texts(of), seed=1)
    model = UniversalTokenizer(settings, encoder, latents)
    catalogue = Catalogue(of, encoder, settings, seed=1, moments=moments)
    return Training(task, settings, catalogue, model, processes or Processes(torch.device("cpu")), phase=phase)


def weights(of: Training) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in of.model.state_dict().items()}
