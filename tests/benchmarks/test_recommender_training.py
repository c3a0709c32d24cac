"""The training step against Hugging Face's Trainer on two threads: at least 1.5 times its samples a second, the same losses.

Run with ``make bench`` (pytest --benchmark-only); ``recommender_training.py`` measures, and says on what. Where OpenMP's waiting
threads spin beside other work they count as CPU time: on a busy machine set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks import recommender_training as training
from tests.benchmarks.peers.hugging_face_trainer import train as train_theirs

LIMIT = 1.5


@pytest.mark.benchmark(max_time=0.0, warmup=False)
def test_training_step_beside_hugging_face_trainer(benchmark: BenchmarkFixture) -> None:
    measured = benchmark.pedantic(lambda: training.on_cpu(training.Setting()), rounds=1)
    theirs, ours, floor = (measured[name] for name in ("hugging face", "ours", "floor"))
    benchmark.extra_info |= {
        "seconds a step": measured,
        "times by wall": round(theirs["wall"] / ours["wall"], 2),
        "times by cpu": round(theirs["cpu"] / ours["cpu"], 2),
        "share of the floor": round(floor["cpu"] / ours["cpu"], 2),
    }
    assert theirs["wall"] >= LIMIT * ours["wall"]
    assert theirs["cpu"] >= LIMIT * ours["cpu"]


@pytest.mark.benchmark(max_time=0.0, warmup=False)
def test_the_loss_curve_is_that_of_hugging_face(benchmark: BenchmarkFixture) -> None:
    """Without dropout step by step; with dropout, whose masks differ, within what two seeds of one side differ."""
    torch.set_num_threads(2)
    rows = training.histories()
    setting = training.Setting(batch=64, dropout=0.0)
    indices = np.random.default_rng(2).permutation(len(rows))[: 64 * 20]

    def curves(dropout: float) -> tuple[np.ndarray, np.ndarray]:
        # Without weight decay: the Trainer spares norms and everything with "bias" in its name, ours decays all.
        theirs = train_theirs(training.fresh(rows, dropout), training.plain_rows(rows, indices), batch=64, weight_decay=0.0)
        ours = training.train_ours(training.fresh(rows, dropout), rows, indices, setting, weight_decay=0.0)
        return np.array(theirs.losses), np.array(ours.losses)

    theirs, ours = benchmark.pedantic(lambda: curves(0.0), rounds=1)
    difference = np.abs(ours / theirs - 1)
    benchmark.extra_info["largest relative difference of 20 steps"] = float(difference.max())
    assert len(ours) == 20 and ours[-1] < ours[0] - 1
    assert difference.max() < 1e-4
    theirs, ours = curves(0.1)
    benchmark.extra_info["the same with dropout, mean of the last 15"] = float(abs(ours[5:].mean() / theirs[5:].mean() - 1))
    assert np.abs(ours / theirs - 1).max() < 0.03 and abs(ours[5:].mean() / theirs[5:].mean() - 1) < 0.01
