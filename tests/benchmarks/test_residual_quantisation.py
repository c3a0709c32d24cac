"""Residual quantisation of 100,000 items x 768 dimensions into 3 x 256 codes: seconds beside scikit-learn and the plain loop.

Run with ``make bench``. ``RQ_ITEMS`` and ``RQ_REPEATS`` make it smaller, ``RQ_THREADS`` (2) sets the threads of all: on a busy machine
take 1, because threads of scikit-learn's BLAS that wait for each other spin. Rivals take turns with ours; figures are medians over
the repeats; ``cpu`` is the time of all threads of the process; fp32. The floor is the matrix products alone, made in the same run:
for k-means the distances of every step in all dimensions, for the RQ-VAE the products of its layers, forward and backward, and its
distances.

The vectors are made up: clusters of clusters, strong and weak dimensions and noise, unit length, as sentence embeddings are. What a
start draws decides 1 % of the objective, so objectives are means over the repeats. On a CPU the RQ-VAE's loop is nearly all matrix
products, in the peer too: there is little to gain but not to lose it again.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from baselines.tiger import rqvae
from tests.benchmarks.peers.rqvae_loop import PlainRQVAE
from tests.benchmarks.peers.rqvae_loop import train as train_plainly
from utgrec.kmeans import kmeans

ITEMS = int(os.environ.get("RQ_ITEMS", 100_000))
REPEATS = int(os.environ.get("RQ_REPEATS", 5))
THREADS = int(os.environ.get("RQ_THREADS", 2))
WIDTH, LEVELS, BOOK, STEPS = 768, 3, 256, 20
BATCH, BATCHES = 1024, 24
"""Of the RQ-VAE: an epoch of 24 batches is timed, and the figure for all items follows from it."""
KMEANS_LIMIT, LOOP_LIMIT = 2.0, 0.95


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS):
        yield


@pytest.fixture(scope="module")
def x_ID() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    strength_D = torch.arange(1, WIDTH + 1) ** -0.4
    outer, inner = torch.randn(200, WIDTH, generator=generator), torch.randn(200, 40, WIDTH, generator=generator)
    group, part = torch.randint(200, (ITEMS,), generator=generator), torch.randint(40, (ITEMS,), generator=generator)
    x_ID = strength_D * (outer[group] + 0.7 * inner[group, part] + 0.6 * torch.randn(ITEMS, WIDTH, generator=generator) + 0.5)
    return x_ID / x_ID.norm(dim=1, keepdim=True)


@dataclass
class Cost:
    wall: float
    cpu: float
    result: Any = None


def timed(run: Callable[[], Any]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, result)


def median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(cost.wall for cost in costs), statistics.median(cost.cpu for cost in costs))


# ------------------------------------------------------------------------------------------------------- RK-means


@dataclass
class Levels:
    """What a rival made of all levels: the mean squared error at the end, and the steps in all dimensions."""

    error: float
    steps: int


def ours(x_ID: torch.Tensor, seed: int) -> Levels:
    left_ID, steps = x_ID, 0
    for level in range(LEVELS):
        found = kmeans(left_ID, BOOK, seed=seed + level, steps=STEPS)
        left_ID, steps = left_ID - found.centres_KD[found.codes_N], steps + found.steps
    return Levels(float(left_ID.square().sum(1).mean()), steps)


def scikit_learn(x_ID: torch.Tensor, seed: int, make: Callable[[int], Any]) -> Levels:
    left_ID, steps = x_ID.numpy(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, says the one that may take as many steps as ours
        for level in range(LEVELS):
            found = make(seed + level).fit(left_ID)
            left_ID, steps = left_ID - found.cluster_centers_[found.labels_], steps + found.n_iter_
    return Levels(float((left_ID**2).sum(1).mean()), steps)


@pytest.mark.timeout(7200)
def test_residual_kmeans_beside_scikit_learn(benchmark: BenchmarkFixture, x_ID: torch.Tensor) -> None:
    rivals: dict[str, Callable[[int], Levels]] = {
        "ours": lambda seed: ours(x_ID, seed),
        "scikit-learn, as many steps": lambda seed: scikit_learn(
            x_ID, seed, lambda s: KMeans(BOOK, n_init=1, max_iter=STEPS, random_state=s)
        ),
        "scikit-learn, mini-batches of 4096": lambda seed: scikit_learn(
            x_ID, seed, lambda s: MiniBatchKMeans(BOOK, n_init=1, batch_size=4096, random_state=s)
        ),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in rivals}

    def measure() -> None:
        for repeat in range(REPEATS):
            for name, run in rivals.items():
                costs[name].append(timed(lambda run=run, repeat=repeat: run(100 * repeat)))
        default = "scikit-learn, its defaults (once)"
        costs[default] = [timed(lambda: scikit_learn(x_ID, 0, lambda s: KMeans(BOOK, n_init=1, random_state=s)))]

    benchmark.pedantic(measure, rounds=1)
    steps = statistics.median(cost.result.steps for cost in costs["ours"])
    centres_DK = x_ID[:BOOK].t().contiguous()
    step = median([timed(lambda: [part @ centres_DK for part in x_ID.split(4096)]) for _ in range(REPEATS)])
    found = {name: median(runs) for name, runs in costs.items()}
    error = {name: statistics.mean(cost.result.error for cost in runs) for name, runs in costs.items()}
    benchmark.extra_info |= {
        "items": len(x_ID),
        "floor of our steps": {"wall": round(steps * step.wall, 2), "cpu": round(steps * step.cpu, 2)},
        **{
            name: {
                "wall": round(cost.wall, 2),
                "cpu": round(cost.cpu, 2),
                "error": round(error[name], 5),
                "steps": statistics.median(run.result.steps for run in costs[name]),
                "times ours by cpu": round(cost.cpu / found["ours"].cpu, 2),
                "times ours by wall": round(cost.wall / found["ours"].wall, 2),
            }
            for name, cost in found.items()
        },
    }
    peer = "scikit-learn, as many steps"
    assert error["ours"] <= 1.01 * error[peer]
    assert found[peer].cpu >= KMEANS_LIMIT * found["ours"].cpu
    assert found[peer].wall >= KMEANS_LIMIT * found["ours"].wall


# --------------------------------------------------------------------------------------------------------- RQ-VAE


def matrix_products(settings: rqvae.Settings) -> None:
    """The products of one step: layers forward and backward (no gradient of the input), and the distances."""
    sizes = (WIDTH, *settings.hidden, settings.latent, *settings.hidden[::-1], WIDTH)
    for number, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        x_BI, w_IO, g_BO = (FLOOR[shape] for shape in ((BATCH, inner), (inner, outer), (BATCH, outer)))
        x_BI @ w_IO
        x_BI.t() @ g_BO
        if number:
            g_BO @ w_IO.t()
    for _ in range(settings.levels):
        FLOOR[BATCH, settings.latent] @ FLOOR[settings.latent, settings.book]


class _Matrices(dict[tuple[int, int], torch.Tensor]):
    def __missing__(self, shape: tuple[int, int]) -> torch.Tensor:
        self[shape] = torch.randn(shape)
        return self[shape]


FLOOR = _Matrices()


@pytest.mark.timeout(3600)
def test_rqvae_beside_the_plain_loop(benchmark: BenchmarkFixture, x_ID: torch.Tensor, tmp_path: Path) -> None:
    settings = rqvae.Settings(optimiser="adamw", learning_rate=1e-3, batch=BATCH, epochs=REPEATS + 2, revive_every=0)
    x_TD = x_ID[: BATCH * BATCHES]
    x_TD = (x_TD - x_TD.mean(0)) / x_TD.std(0)
    batches = -(-len(x_TD) // BATCH)
    torch.manual_seed(0)
    model = rqvae.RQVAE(WIDTH, settings)
    model.start(x_TD, seed=0)
    peer = PlainRQVAE(rqvae.mlp((WIDTH, *settings.hidden, settings.latent)), rqvae.mlp((settings.latent, *settings.hidden[::-1], WIDTH)),
                      model.books_LKZ.detach(), settings.beta)  # fmt: skip
    peer.encoder.load_state_dict(model.encoder.state_dict())
    peer.decoder.load_state_dict(model.decoder.state_dict())
    training = rqvae.Training(model, x_TD, seed=0, checkpoint=tmp_path, seconds=1e9, told=lambda *_: None)
    training._began = time.monotonic()
    rate = settings.learning_rate
    runs: dict[str, Callable[[], float]] = {
        "ours": lambda: float(training._epoch()["reconstruction"]),
        "plain loop": lambda: train_plainly(peer, x_TD, batch=BATCH, epochs=1, learning_rate=rate)[0],
        "floor": lambda: [matrix_products(settings) for _ in range(batches)] and 0.0,
    }
    costs: dict[str, list[Cost]] = {name: [] for name in runs}

    def measure() -> None:
        for _ in range(REPEATS + 1):
            for name, run in runs.items():
                costs[name].append(timed(run))

    benchmark.pedantic(measure, rounds=1)
    found = {name: median(taken[1:]) for name, taken in costs.items()}  # the first warms up
    full = ITEMS / len(x_TD)
    curves = {name: [round(cost.result, 4) for cost in costs[name]] for name in ("ours", "plain loop")}
    benchmark.extra_info |= {
        "items": ITEMS,
        "epochs a second": {name: round(1 / (full * cost.wall), 3) for name, cost in found.items()},
        "cpu seconds an epoch": {name: round(full * cost.cpu, 2) for name, cost in found.items()},
        "times ours by cpu": round(found["plain loop"].cpu / found["ours"].cpu, 2),
        "times ours by wall": round(found["plain loop"].wall / found["ours"].wall, 2),
        "share of the floor by cpu": round(found["floor"].cpu / found["ours"].cpu, 2),
        "reconstruction": curves,
    }
    # The orders of items differ, and the peer's optimiser starts anew each epoch: the curves agree roughly.
    assert curves["ours"][-1] < curves["ours"][0] and abs(curves["ours"][-1] / curves["plain loop"][-1] - 1) < 0.1
    assert found["plain loop"].cpu >= LOOP_LIMIT * found["ours"].cpu
    assert found["plain loop"].wall >= LOOP_LIMIT * found["ours"].wall
