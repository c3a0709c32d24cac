"""One process, or the many that ``torchrun`` has started: who am I, and the few things the processes tell each other.

In: the environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, as torchrun sets it). Out: ``Processes``; in a single process
every call is the identity. A batch is that of all processes together: each takes its share of the rows, and gradients are
weighted by rows, so that many processes train what one would. The first process (rank 0) alone has a clock, writes and logs.
If one fails, torchrun ends the others.

    torchrun --nproc-per-node 4 baselines/tiger/run.py job.json
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    @contextmanager
    def of(cls, device: str) -> Iterator[Processes]:
        """The processes of this program; ``device`` is the job's. At the end of the block they wait for each other."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = torch.device(device)
        if device == "cuda":
            local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(local)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)  # not before: a group cannot be made twice, a program may come here twice
        try:
            yield cls(local, rank, world)
        except BaseException:
            atexit.unregister(dist.destroy_process_group)  # the others do not know yet: do not wait for them
            raise
        if world > 1:
            dist.barrier()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part: every ``world``-th. No row is in two parts, none is left out."""
        return rows[self.rank :: self.world]

    def agree(self, value: bool) -> bool:
        """What the first process says: clocks differ."""
        if self.world == 1:
            return value
        answer = torch.tensor(value)
        dist.broadcast(answer, 0)
        return bool(answer)

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes, alike in all."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Replace every gradient by its sum over all processes, and return that of the losses: one message for all.

        A process without rows adds nothing.
        """
        if self.world == 1:
            return loss
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        total, *totals = flat.split([1, *(gradient.numel() for gradient in gradients)])
        for gradient, summed in zip(gradients, totals, strict=True):
            gradient.copy_(summed.view_as(gradient))
        return total[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks, alike in all."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: np.ndarray, total: int) -> np.ndarray:
        """Put the rows of all shares (``share``) of ``total`` rows back into their order."""
        whole = np.empty((total, *rows.shape[1:]), rows.dtype)
        for rank, part in enumerate(self.gather(rows)):
            whole[rank :: self.world] = part
        return whole
