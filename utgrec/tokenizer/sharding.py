"""How gradients become steps: in one process, in many that each hold the model, or sharded by DeepSpeed's ZeRO.

In: a model and settings. Out: an ``Optimizing``: ``backward`` for each part of a step, then ``step``. Losses are the process's part of a
mean over the whole batch, so gradients are *summed* over processes. Weights, moments and counters can be saved and loaded.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.contract import ContractError
from utgrec.recommender.checkpoint import Checkpoint
from utgrec.recommender.processes import Processes
from utgrec.tokenizer.settings import Settings


class Optimizing(Protocol):
    model: nn.Module
    """What to call: the model, or what wraps it."""
    collective: bool
    """All processes must save together."""
    digest: str
    """Of the trainable weights at the start."""

    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self, rate: float, clip: float) -> None: ...
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None: ...
    def save(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None: ...
    def load(self, checkpoint: Checkpoint) -> dict[str, Any] | None: ...


def make_optimizing(model: nn.Module, settings: Settings, processes: Processes, parts: int, precision: str) -> Optimizing:
    if settings.sharding == "none":
        return Whole(model, settings, processes)
    return Sharded(model, settings, processes, parts, precision)


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """AdamW's weight decay is for matrices: biases, norms and single vectors are spared."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spared = [parameter for parameter in trained if parameter.ndim < 2]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": decay},
        *([{"params": spared, "weight_decay": 0.0}] if spared else []),
    ]


def digest(model: nn.Module) -> str:
    weights = hashlib.sha256()
    for name, value in trained(model):
        weights.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return weights.hexdigest()[:16]


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training changes: parameters that get gradients, and buffers (running means of codebooks)."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point() and name.startswith("quantizer"))


class Whole:
    """Every process holds the model; gradients are summed over processes."""

    collective = False

    def __init__(self, model: nn.Module, settings: Settings, processes: Processes):
        self.model, self.processes, self.digest = model, processes, digest(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = processes.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups(model, settings.tokenizer_weight_decay), lr=0.0, fused=fused)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, rate: float, clip: float) -> None:
        self.processes.sum_gradients(self.parameters, torch.zeros((), device=self.processes.device))
        if clip:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value)

    def save(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        checkpoint.save(state | {"model": dict(trained(self.model)), "optimizer": self.optimizer.state_dict()})

    def load(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        saved = checkpoint.load()
        if saved is not None:
            self.model.load_state_dict(saved.pop("model"), strict=False)
            self.optimizer.load_state_dict(saved.pop("optimizer"))
        return saved


class Sharded:
    """DeepSpeed's ZeRO, through accelerate: moments and gradients (stage 2) and weights, too (stage 3), are spread over the processes."""

    collective = True

    def __init__(self, model: nn.Module, settings: Settings, processes: Processes, parts: int, precision: str):
        try:
            import deepspeed  # noqa: F401
        except ImportError:
            raise ContractError(
                f"sharding = {settings.sharding!r} needs DeepSpeed, which is not installed: make venv DEVICE=cuda, or sharding = 'none'"
            ) from None
        from accelerate import Accelerator, DeepSpeedPlugin

        self.digest, self.processes = digest(model), processes
        plugin = DeepSpeedPlugin(hf_ds_config=configuration(settings, processes, parts, precision))
        self.accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no")  # weights stay fp32, products are autocast
        optimizer = torch.optim.AdamW(groups(model, settings.tokenizer_weight_decay), lr=0.0)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over processes and over the parts of a step; ours are parts of one mean already."""
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.processes.world, scale_wrt_gas=False)

    def step(self, rate: float, clip: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.step()

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)

    def save(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        begin, folder = time.monotonic(), str(checkpoint.path.parent)
        self.model.save_checkpoint(folder, tag="sharded", client_state={"identity": checkpoint.identity, "state": state})
        checkpoint.saved(time.monotonic() - begin)

    def load(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        if not (checkpoint.path.parent / "latest").exists():
            return None
        _, client = self.model.load_checkpoint(str(checkpoint.path.parent), tag="sharded")
        checkpoint.refuse_another(client["identity"])
        return client["state"]


def configuration(settings: Settings, processes: Processes, parts: int, precision: str) -> dict[str, Any]:
    """What DeepSpeed is told. ``train_batch_size`` counts items, of which each process takes its share in so many parts."""
    stage = {"zero2": 2, "zero3": 3}[settings.sharding]
    return {
        "train_micro_batch_size_per_gpu": settings.tokenizer_micro,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": settings.tokenizer_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": processes.device.type == "cuda", "contiguous_gradients": True},
    }
