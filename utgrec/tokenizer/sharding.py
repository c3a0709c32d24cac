"""How gradients become steps: in one process, in many that each hold the model, or sharded by DeepSpeed's ZeRO.

In: a model and settings. Out: an ``Optimizing``: ``backward`` for each part of a step, then ``step``. Losses are the process's part of a
mean over the whole batch, so gradients are *summed* over processes. Weights, moments and counters can be saved and loaded.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.contract import ContractError, write_json
from utgrec.recommender.checkpoint import Checkpoint
from utgrec.recommender.processes import Processes
from utgrec.tokenizer.settings import Settings

TAGS = ("one", "other")
"""Names of the two sharded checkpoints, of which one is the last."""


class Optimizing(Protocol):
    model: nn.Module
    """What to call: the model, or what wraps it."""
    collective: bool
    """All processes must save together."""
    digest: str
    """Of the trainable weights at the start."""

    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self, rate: float, clip: float) -> None: ...
    def changing(self, part: nn.Module) -> AbstractContextManager[None]:
        """Inside, ``part`` has its whole weights, and they may be given new values, the same in all processes."""
        ...

    def release(self) -> None:
        """Training is over: every process gets the whole model back, as it was before."""
        ...

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

    @contextmanager
    def changing(self, part: nn.Module) -> Iterator[None]:
        yield
        for weight in part.parameters():
            self.optimizer.state.pop(weight, None)  # moments of other values: a process of many has summed up zeros

    def release(self) -> None:
        pass

    def save(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        checkpoint.save(state | {"model": dict(trained(self.model)), "optimizer": self.optimizer.state_dict()})

    def load(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        saved = checkpoint.load()
        if saved is not None:
            self.model.load_state_dict(saved.pop("model"), strict=False)
            self.optimizer.load_state_dict(saved.pop("optimizer"))
        return saved


class Sharded:
    """DeepSpeed's ZeRO: moments and gradients (stage 2) and weights, too (stage 3), are spread over the processes.

    AdamW's steps are counted for all weights together: codebooks that enter late have their first steps a little smaller than in ``Whole``.
    In stage 3 a module's weights are whole only while its own forward runs, or inside ``changing``. Not through accelerate, which would
    leave transformers in a state in which every later model of the process is sharded, too.
    """

    collective = True

    def __init__(self, model: nn.Module, settings: Settings, processes: Processes, parts: int, precision: str):
        try:
            import deepspeed
        except ImportError:
            raise ContractError(
                f"sharding = {settings.sharding!r} needs DeepSpeed, which is not installed: make venv DEVICE=cuda, or sharding = 'none'"
            ) from None
        if processes.world == 1 and not dist.is_initialized():  # DeepSpeed wants a group even for one
            store = dist.HashStore()
            dist.init_process_group("cpu:gloo,cuda:nccl" if processes.device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
            atexit.register(dist.destroy_process_group)
            os.environ.setdefault("LOCAL_RANK", "0")
        self.digest, self.processes, self.whole = digest(model), processes, model
        optimizer = torch.optim.AdamW(groups(model, settings.tokenizer_weight_decay), lr=0.0)
        config = configuration(settings, parts, precision, processes.device)
        self.model, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over processes and over the parts of a step; ours are parts of one mean already."""
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.processes.world, scale_wrt_gas=False)

    def step(self, rate: float, clip: float) -> None:
        """``clip`` stands in DeepSpeed's configuration."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.step()

    @contextmanager
    def changing(self, part: nn.Module) -> Iterator[None]:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        weights = list(part.parameters())
        with deepspeed.zero.GatheredParameters(weights, modifier_rank=0):
            yield
            values = [weight.detach().clone() for weight in weights]
        for weight, value in zip(weights, values, strict=True):
            safe_set_full_fp32_param(weight, value)  # what AdamW steps from: its own copy

    def release(self) -> None:
        import deepspeed

        found: dict[int, nn.Parameter] = {}
        for module in self.whole.modules():
            own = dict(module._parameters)
            with deepspeed.zero.GatheredParameters([weight for weight in own.values() if weight is not None]):
                for weight in own.values():
                    if weight is not None and id(weight) not in found:
                        found[id(weight)] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            module._parameters = {name: weight if weight is None else found[id(weight)] for name, weight in own.items()}
        self.model.destroy()
        self.model = self.whole

    def save(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Beside the last one, which counts until the new one is whole."""
        begin, folder = time.monotonic(), checkpoint.path.parent
        tag = TAGS[self._last(folder) == TAGS[0]]
        if self.processes.first:
            write_json(folder / f"{tag}.json", checkpoint.identity)
        self.model.save_checkpoint(str(folder), tag=tag, client_state=state, exclude_frozen_parameters=True)
        checkpoint.saved(time.monotonic() - begin)

    def load(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        folder = checkpoint.path.parent
        tag = self._last(folder)
        if tag is None:
            return None
        # Whose it is comes first: weights of another shape would fail in DeepSpeed's words.
        checkpoint.refuse_another(json.loads((folder / f"{tag}.json").read_text()))
        _, client = self.model.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        return client

    @staticmethod
    def _last(folder: Path) -> str | None:
        """The name of the last whole checkpoint."""
        path = folder / "latest"  # DeepSpeed's, written behind all processes' parts
        return path.read_text().strip() if path.exists() else None


def configuration(settings: Settings, parts: int, precision: str, device: torch.device) -> dict[str, Any]:
    """What DeepSpeed is told."""
    stage = {"zero2": 2, "zero3": 3}[settings.sharding]
    return {
        "train_micro_batch_size_per_gpu": settings.tokenizer_micro,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": settings.tokenizer_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": device.type == "cuda", "contiguous_gradients": True},
        # DeepSpeed turns off the autocast it finds around it. No weight and no gradient is sent in half precision.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
