"""The tokenizer's training step and encoding against the released formulation: at least 1.5 times its items a second, the same results.

Run with ``make bench`` (pytest --benchmark-only); ``tokenizer_training.py`` measures, and says on what. The same script at its smallest
size is what is left of the GPU's measurement where there is none: every branch runs, but on the CPU.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks import tokenizer_training as training
from tests.benchmarks.tokenizer_world import SIZES
from utgrec.tokenizer.vision_cache import tokens

ROUNDS = 3


def test_training_step_and_encoding(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    setting = training.Setting(rounds=ROUNDS)
    found = benchmark.pedantic(lambda: training.measure(setting, tmp_path), rounds=1)
    found["memory"] = {name: training.peak_apart(name, setting) for name in ("released", "ours")}
    benchmark.extra_info |= {"seconds": {kind: found[kind] for kind in ("step", "encode")}, "megabytes": found["memory"]}
    benchmark.extra_info |= {what: round(value, 2) for what, _, value in training.summary(setting, found)}
    assert statistics.median(training.ratios(found["step"], "ours", "cpu")) >= training.TARGETS["cpu"]["step"]
    assert found["memory"]["ours"] < 0.7 * found["memory"]["released"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_results_are_the_same(benchmark: BenchmarkFixture, tmp_path: Path, precision: str) -> None:
    setting = training.Setting(size="tiny", precision=precision)
    found = benchmark.pedantic(lambda: training.agreement(setting, tmp_path), rounds=1)
    benchmark.extra_info |= found
    training.check(found, precision)


def test_every_part_runs_at_the_smallest_size(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    setting = training.Setting(size="tiny", rounds=1)
    found = benchmark.pedantic(lambda: training.measure(setting, tmp_path), rounds=1) | {"memory": dict.fromkeys(training.SIDES, 1.0)}
    text = training.report(setting, found)
    assert all(f"| {name} |" in text for name in training.SIDES if name in found["step"])
    assert text.count("| 1 | 1.00 |") == len(training.SIDES)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: cpu tiny -->\nold\n<!-- end: cpu tiny -->\nafter\n")
    training.write(page, "cpu tiny", text)
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert text in page.read_text() and "old" not in page.read_text()


@pytest.mark.parametrize("name", training.SIDES)
def test_the_counted_products_are_those_of_the_formula(benchmark: BenchmarkFixture, tmp_path: Path, name: str) -> None:
    """At 2B shapes nothing but the formula counts."""
    torch.set_num_threads(1)
    size = SIZES["tiny"]
    step = training.Step(name, training.Setting(size="tiny"), tmp_path)
    catalogue, share = step.ours.catalogue, training.share_of(step.ours, 1)
    prompts = [catalogue.prompts(rows) for rows in (share.items_B, share.neighbours_B)]
    sides = [[len(prompt) for prompt in side] for side in prompts]
    texts = [[len(text.tokens_T) for text in side] for side in (share.own, share.neighbour)]
    patches = [4 * tokens(prompt.grid) for side in prompts for prompt in side if prompt.grid]
    selected = sum(len(text.selected_N) for text in (*share.own, *share.neighbour))
    lengths = training.Lengths((sides[0], sides[1]), (texts[0], texts[1]), selected, patches)
    counted = benchmark.pedantic(lambda: training.counted(lambda: step(1)), rounds=1)
    formula = training.total(training.expected(size, lengths, name, device="cpu"))
    benchmark.extra_info |= {"counted": counted, "formula": formula}
    assert np.isclose(counted, formula, rtol=0.06)
