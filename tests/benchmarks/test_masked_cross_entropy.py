"""Masked-token cross-entropy in chunks beside full logits: time of loss and gradients, and the peak of memory.

Sizes: 2,048 selected tokens; the vocabulary of BERT with its small width (CPU), that of Qwen2-VL with its width (GPU).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from tests.benchmarks.peers.full_logits import full_logits
from utgrec.tokenizer.cross_entropy import masked_cross_entropy

LOSSES = {"ours": masked_cross_entropy, "full_logits": full_logits}
CPU, GPU = (2048, 30522, 384), (8192, 151661, 1536)


def problem(sizes: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    N, V, D = sizes
    hidden_ND = torch.randn(N, D, device=device, requires_grad=True)
    head_VD = torch.nn.Parameter(torch.randn(V, D, device=device) * 0.02)
    return hidden_ND, head_VD, torch.randint(V, (N,), device=device)


def step(name: str, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    hidden_ND.grad = head_VD.grad = None
    with torch.autocast("cuda", torch.bfloat16, enabled=hidden_ND.is_cuda):
        loss = LOSSES[name](hidden_ND, head_VD, targets_N)
    (loss / len(targets_N)).backward()
    return loss.detach()


def seconds(name: str, given: tuple[Tensor, Tensor, Tensor]) -> float:
    begin = time.perf_counter()
    step(name, *given)
    if given[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def times(sizes: tuple[int, int, int], device: str, rounds: int = 5) -> dict[str, float]:
    """Medians, in turns."""
    given = problem(sizes, device)
    for name in LOSSES:
        seconds(name, given)
    taken = [{name: seconds(name, given) for name in LOSSES} for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in taken) for name in LOSSES}


def peak_apart(name: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.test_masked_cross_entropy", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(name: str) -> float:
    """MB of a step above what tensors and their gradients take themselves. In a process of its own."""
    given = problem(CPU, "cpu")
    step(name, *problem((8, *CPU[1:]), "cpu"))  # libraries, threads, thread pools
    gradients = [torch.zeros_like(tensor) for tensor in given[:2]]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    del gradients
    step(name, *given)
    return resident("VmHWM") - before


def resident(mark: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(mark))
    return int(line.split()[1]) / 1024


def test_on_cpu(benchmark: BenchmarkFixture) -> None:
    found = benchmark.pedantic(times, args=(CPU, "cpu"), rounds=1)
    memory = {name: peak_apart(name) for name in LOSSES}
    benchmark.extra_info.update(seconds=found, megabytes=memory)
    assert found["ours"] < 1.05 * found["full_logits"]
    assert memory["ours"] < 0.5 * memory["full_logits"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(benchmark: BenchmarkFixture) -> None:
    found = benchmark.pedantic(times, args=(GPU, "cuda"), rounds=1)
    memory = {}
    for name in LOSSES:
        given = problem(GPU, "cuda")
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step(name, *given)
        memory[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
    benchmark.extra_info.update(seconds=found, megabytes=memory)
    assert found["ours"] < found["full_logits"]
    assert memory["ours"] < 0.5 * memory["full_logits"]


if __name__ == "__main__":
    print(peak(sys.argv[1]))
