"""InfoNCE: against a written-out formula, and over two processes as over one."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utgrec.tokenizer.contrast import info_nce

TAU = 0.1


def written_out(h: torch.Tensor, positive: torch.Tensor) -> float:
    """Sums of single numbers in double precision."""
    items, levels, _ = h.shape
    total = 0.0
    for level in range(levels):
        for i in range(items):
            a = h[i, level].double()
            cosines = [float(a @ p / (a.norm() * p.norm())) / TAU for p in positive[:, level].double()]
            total -= cosines[i] - math.log(sum(math.exp(cosine) for cosine in cosines))
    return total / (items * levels)


def batch(items: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(items, 3, 5, generator=generator), torch.randn(items, 3, 5, generator=generator)


def test_as_written_out() -> None:
    h, positive = batch()
    assert info_nce(h, positive, TAU).item() == pytest.approx(written_out(h, positive), rel=1e-5)


def test_only_directions_count_and_equal_pairs_are_best() -> None:
    h, positive = batch()
    assert info_nce(3 * h, positive / 7, TAU).item() == pytest.approx(info_nce(h, positive, TAU).item(), rel=1e-5)
    assert info_nce(h, h, TAU) < info_nce(h, positive, TAU)


def test_fp32_under_autocast() -> None:
    h, positive = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(h, positive, TAU).item() == pytest.approx(info_nce(h, positive, TAU).item(), rel=1e-7)
        assert info_nce(h, positive, TAU).dtype == torch.float32


SHARES = [range(0, 4), range(4, 6)]
"""Shares of different sizes."""


def _process(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    h, positive = (part[list(SHARES[rank])].clone().requires_grad_() for part in batch())
    loss = info_nce(h, positive, TAU) * len(h) / 6
    loss.backward()
    torch.save([loss.detach(), h.grad, positive.grad], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    h, positive = (part.requires_grad_() for part in batch())
    whole = info_nce(h, positive, TAU)
    whole.backward()
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert float(sum(loss for loss, *_ in parts)) == pytest.approx(whole.item(), rel=1e-6)
    for place, gradient in ((1, h.grad), (2, positive.grad)):
        assert torch.allclose(torch.cat([part[place] for part in parts]), gradient, atol=1e-7)
