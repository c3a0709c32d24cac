"""What training the tokenizer needs of memory, before it starts.

In: a model, settings, how many processes. Out: an ``Estimate`` in bytes a device, and an error, with the setting that would fit, where the
device has less. It is an estimate: weights, gradients and moments are counted exactly, activations by the rule below.

Activations of a transformer layer in training, bytes a token: about 34 x width in half precision (Korthikanti et al., arXiv 2205.05198,
without attention scores, which fused attention does not keep), twice that in fp32; with gradient checkpointing one input a layer
and the inside of a single layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from harness.contract import ContractError
from utgrec.recommender.processes import Processes
from utgrec.tokenizer.model import UniversalTokenizer
from utgrec.tokenizer.settings import Settings

GIB = 1 << 30
LAYER = 34
"""Bytes a token and unit of width that a layer keeps for its backward pass, in half precision."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in ("weights", "gradients", "moments", "activations"))
        return f"{self.total / GIB:.2f} GiB a device ({parts})"


def estimate(model: UniversalTokenizer, settings: Settings, processes: Processes, precision: str, tokens: int) -> Estimate:
    """``tokens``: of the longest prompt."""
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    over = processes.world if settings.sharding != "none" else 1
    if settings.sharding == "zero3":
        weights //= over
    bytes_a_number = 2 if precision == "bf16" else 4
    depth, width = model.encoder.layers, model.encoder.width
    rows = settings.tokenizer_micro * (2 if settings.align_weight > 0 else 1)
    inside = LAYER * bytes_a_number // 2 * width
    encoder = rows * tokens * ((depth * width * bytes_a_number + inside) if settings.checkpointing else depth * inside)
    read = settings.tokenizer_micro * (2 if settings.cooccurrence_weight > 0 else 1)
    text = read * (settings.text_tokens + settings.levels) * inside if model.text_decoder else 0
    picture = 0
    if model.picture_decoder:
        latents = read * model.latents.tokens
        denoiser = settings.diffusion_repeats * settings.diffusion_depth * 16 * settings.diffusion_width * bytes_a_number
        picture = latents * (inside + denoiser)
    return Estimate(weights, 4 * numbers // over, 8 * numbers // over, encoder + text + picture)


def check(needed: Estimate, settings: Settings, processes: Processes, budget: int) -> None:
    """Raise ContractError where that is more than there is. ``budget``: bytes of the job's memory, which bounds a CPU."""
    if processes.device.type == "cuda":
        there, what = torch.cuda.mem_get_info(processes.device)[1], torch.cuda.get_device_name(processes.device)
    else:
        there, what = min(budget, psutil.virtual_memory().total), "the budget of memory"
    if needed.total <= there:
        return
    fixed = needed.total - needed.activations
    mends = []
    if fixed < there:
        fits = int(settings.tokenizer_micro * (there - fixed) / needed.activations)
        if fits >= 1:
            mends.append(f"tokenizer_micro = {fits} (the gradient stays that of the whole batch)")
        if not settings.checkpointing:
            mends.append("checkpointing = true")
        mends.append(f"a text_tokens below {settings.text_tokens}")
    else:
        mends.append("sharding = 'zero3' over more GPUs" if settings.sharding != "zero3" else "more GPUs")
        mends.append("a smaller model")
    raise ContractError(f"training the tokenizer needs about {needed}, {what} has {there / GIB:.2f} GiB; use {', or '.join(mends)}")
