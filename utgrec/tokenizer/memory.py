"""What training the tokenizer needs of memory, before it starts.

In: a model, settings, how many processes. Out: an ``Estimate`` in bytes a device, and an error, with the setting that would fit, where the
device has less. It is an estimate: weights, gradients and moments are counted exactly, activations by the rule below. What was measured
on a CPU lies within a factor of 1.35 of it (tests/unit/utgrec/test_memory.py).

Activations of a transformer layer in training, bytes a token: about 34 x width in half precision (Korthikanti et al., arXiv 2205.05198,
without attention scores, which fused attention does not keep), twice that in fp32; with gradient checkpointing one input a layer
and the inside of a single layer.

Tables of a large vocabulary cost more than their gradient: the text decoder's cross-entropy (cross_entropy.py) makes one fp32 gradient of
the output table for the items' own texts and one for their neighbours', and scales each into a third; with Qwen2-VL-2B 0.93 GB each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import psutil
import torch

from harness.contract import ContractError
from utgrec.recommender.processes import Processes
from utgrec.tokenizer.cross_entropy import LEAST, LOGITS
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
    tables: int
    """What the cross-entropy over the vocabulary holds beside gradients and activations."""
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in dataclasses.asdict(self).items())
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
    tables = of_vocabulary(model, settings, processes, precision) if model.text_decoder else 0
    return Estimate(weights, 4 * numbers // over, 8 * numbers // over, tables, encoder + text + picture)


def of_vocabulary(model: UniversalTokenizer, settings: Settings, processes: Processes, precision: str) -> int:
    """Gradients of the output table on their way, the table and a chunk's part of its gradient in half precision, logits of a chunk."""
    vocabulary = model.encoder.vocabulary
    table = vocabulary * model.encoder.width
    gradients = 4 * table * (3 if settings.cooccurrence_weight > 0 else 2)
    half = 2 * 2 * table if precision == "bf16" else 0
    logits = 8 * max(LEAST * vocabulary, LOGITS[processes.device.type])
    return gradients + half + logits


def check(needed: Estimate, settings: Settings, processes: Processes, budget: int) -> None:
    """Raise ContractError where that is more than there is. ``budget``: bytes of the job's memory, which bounds a CPU."""
    if processes.device.type == "cuda":
        there, what = torch.cuda.mem_get_info(processes.device)[1], torch.cuda.get_device_name(processes.device)
    else:
        there, what = min(budget, psutil.virtual_memory().total), "the budget of memory"
    if why := refusal(needed, settings, there, what):
        raise ContractError(why)


def refusal(needed: Estimate, settings: Settings, there: int, what: str) -> str:
    """Why ``there`` bytes of ``what`` do not do, and what would; empty where they do."""
    if needed.total <= there:
        return ""
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
    return f"training the tokenizer needs about {needed}, {what} has {there / GIB:.2f} GiB; use {', or '.join(mends)}"
