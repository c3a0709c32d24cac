"""Training of the tokenizer: who learns, parts of a batch, processes, interruptions, and the weights of the objective."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from sklearn.cluster import KMeans

from harness.contract import ContractError
from tests.unit.utgrec.small import domains, training, weights
from utgrec.recommender.processes import Processes
from utgrec.tokenizer.train import Training


def largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(value.astype(float) - other[name]).max()) for name, value in one.items() if value.size)


def test_every_part_learns_and_the_vision_tower_does_not(tmp_path: Path) -> None:
    tokenizer = training(tmp_path, quantise_after=0)
    before = weights(tokenizer)
    for _ in range(5):  # output and modulation of the denoiser start at zero: what lies behind them learns some steps later
        tokenizer.train_step()
    trained = {name for name, parameter in tokenizer.model.named_parameters() if parameter.requires_grad}
    changed = {name for name, value in weights(tokenizer).items() if not np.array_equal(value, before[name])}
    assert changed == trained
    for part in ("mlp", "quantizer.books.0.E_KD", "quantizer.books.1.W_DD", "read", "text_decoder", "picture_decoder", "diffusion"):
        assert any(name.startswith(part) for name in changed), part
    assert any(name.startswith("encoder") for name in changed)
    assert not any("visual" in name for name in changed)


def test_before_the_codebooks_enter_they_get_no_gradient(tmp_path: Path) -> None:
    tokenizer = training(tmp_path, quantise_after=100)
    before = weights(tokenizer)
    tokenizer.train_step()
    after = weights(tokenizer)
    assert all(np.array_equal(before[name], after[name]) for name in before if name.startswith("quantizer"))


def test_codebooks_start_as_good_as_k_means(tmp_path: Path) -> None:
    """Root and leaves code what they are to code nearly as well as scikit-learn's centres do; random rows do not."""
    tokenizer = training(tmp_path)
    t_XLD = tokenizer.residuals_of_sample()

    def error(number: int, t_ND: torch.Tensor) -> float:
        return float(torch.cdist(t_ND, tokenizer.model.quantizer.books[number].rows_KD.detach()).min(1).values.square().sum())

    parts = [t_XLD[:, 0], t_XLD[:, 1:].flatten(0, 1)]
    random = [error(number, part) for number, part in enumerate(parts)]
    tokenizer.start_books()
    for number, part in enumerate(parts):
        best = KMeans(8, n_init=4, random_state=0).fit(part.numpy()).inertia_
        assert error(number, part) < 1.2 * best < 0.5 * random[number]


@pytest.mark.parametrize(("adapt", "moves"), [("w", {"W_DD"}), ("all", {"E_KD", "W_DD"})])
def test_adaptation_leaves_e_as_it_is(tmp_path: Path, adapt: str, moves: set[str]) -> None:
    tokenizer = training(tmp_path, phase="adapt", of=domains()[:1], adapt=adapt, quantise_after=0)
    tokenizer.model.freeze_for_adaptation()
    before = weights(tokenizer)
    tokenizer.fresh = False
    tokenizer.train_step()
    changed = {
        name.split(".")[-1] for name, value in weights(tokenizer).items() if name.startswith("quantizer") and (value != before[name]).any()
    }
    assert changed == moves


def first_gradient(tokenizer: Training) -> dict[str, np.ndarray]:
    """What the first step hands to the optimizer: summed over parts and processes, before clipping."""
    found: dict[str, np.ndarray] = {}

    def take(parameters: list[torch.nn.Parameter], _: float) -> None:
        found.update({name: p.grad.numpy().copy() for name, p in tokenizer.model.named_parameters() if p.grad is not None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", take)
        tokenizer.train_step()
    return found


def assert_equal_gradients(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert np.abs(gradient - other[name]).max() <= 1e-4 * np.abs(gradient).max() + 1e-8, name


WITHOUT_PICTURES = {"picture_decoder": False, "quantise_after": 0, "align_weight": 0.5}
"""The noise of pictures is drawn by part."""


@pytest.mark.parametrize("micro", [5, 8])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path: Path, micro: int) -> None:
    """InfoNCE over the whole batch, means over the whole batch."""
    whole, parts = (training(tmp_path / str(size), tokenizer_micro=size, **WITHOUT_PICTURES) for size in (16, micro))
    assert_equal_gradients(first_gradient(whole), first_gradient(parts))
    for name in ("loss", "align", "text", "text_neighbour", "code"):
        assert float(parts.sums[name]) == pytest.approx(float(whole.sums[name]), rel=1e-4), name


def test_the_last_step_of_an_epoch_has_an_item_for_every_part(tmp_path: Path) -> None:
    """One item is left for four parts."""
    items = len(training(tmp_path / "count").catalogue.train_X)
    batch = next(size for size in range(13, items) if items % size == 1)
    tokenizer = training(tmp_path / "parts", tokenizer_batch=batch, tokenizer_micro=-(-batch // 4))
    for _ in range(tokenizer.per_epoch):
        tokenizer.train_step()
    order = tokenizer.catalogue.epoch(0)
    assert tokenizer.catalogue.step(tokenizer.per_epoch - 1, batch, 4).tolist() == [order[-1], *order[:3]]
    assert np.isfinite(float(tokenizer.sums["loss"]))


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["TEST_PORT"]}
    with Processes.of("cpu") as processes:
        tokenizer = training(Path(folder) / str(rank), processes, tokenizer_batch=15, **WITHOUT_PICTURES)
        np.savez(Path(folder) / f"{rank}.npz", **first_gradient(tokenizer))


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 15 items: shares of different sizes."""
    one = first_gradient(training(tmp_path / "one", tokenizer_batch=15, **WITHOUT_PICTURES))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TEST_PORT", str(free.getsockname()[1]))
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as theirs:
            assert_equal_gradients(one, dict(theirs))


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = training(tmp_path / "undisturbed")
    undisturbed.run()
    cut = training(tmp_path / "cut")
    steps = iter(range(5))
    monkeypatch.setattr(type(cut.checkpoint), "due", property(lambda _: True))
    once = cut.train_step
    monkeypatch.setattr(cut, "train_step", lambda: once() if next(steps, None) is not None else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = training(tmp_path / "cut")
    assert again.step == 5
    again.run()
    assert largest_difference(weights(undisturbed), weights(again)) == 0.0


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    first = training(tmp_path)
    first.train_step()
    first.optimizing.save(first.checkpoint, first.state())
    with pytest.raises(ContractError, match=r"code_weight is 5\.0 there and 7\.0 here"):
        training(tmp_path, code_weight=7.0)


def test_the_same_seed_gives_the_same_weights_and_the_curve_is_told(tmp_path: Path) -> None:
    runs = [training(tmp_path / name) for name in "ab"]
    metas = [one.run() for one in runs]
    assert largest_difference(*(weights(one) for one in runs)) == 0.0
    assert metas[0].steps == runs[0].total
    assert metas[0].stopped_by == "epochs"
    lines = [json.loads(line) for line in (runs[0].job.output / "progress.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == lines[-1]["of"] == runs[0].total
    assert {"loss", "text", "text_neighbour", "noise", "bound", "code", "align", "usage_1", "perplexity_3"} <= lines[-1]["metrics"].keys()


def test_the_budget_ends_a_training_after_a_step_at_least(tmp_path: Path) -> None:
    tokenizer = training(tmp_path, tokenizer_epochs=1000)
    tokenizer.seconds = 0.0
    meta = tokenizer.run()
    assert (meta.steps, meta.stopped_by, meta.budget_bound) == (1, "budget", True)


@pytest.mark.parametrize(
    ("off", "gone"),
    [
        ({"align_weight": 0.0}, {"align"}),
        ({"cooccurrence_weight": 0.0}, {"text_neighbour", "noise_neighbour", "bound_neighbour"}),
        ({"text_decoder": False}, {"text", "text_neighbour"}),
        ({"picture_decoder": False}, {"noise", "noise_neighbour", "bound", "bound_neighbour"}),
    ],
)
def test_each_term_can_be_switched_off(tmp_path: Path, off: dict[str, object], gone: set[str]) -> None:
    tokenizer = training(tmp_path, quantise_after=0, **off)
    tokenizer.train_step()
    every = {"align", "code", "text", "text_neighbour", "noise", "noise_neighbour", "bound", "bound_neighbour"}
    assert {name for name in every if float(tokenizer.sums.get(name, 0.0))} == every - gone
    assert np.isfinite(float(tokenizer.sums["loss"]))


def test_the_objective_is_the_weighted_sum_of_its_terms(tmp_path: Path) -> None:
    tokenizer = training(tmp_path, quantise_after=0, picture_weight=5.0, code_weight=7.0, cooccurrence_weight=0.03, align_weight=0.0)
    tokenizer.train_step()
    of = {name: float(value) for name, value in tokenizer.sums.items()}
    again = of["text_neighbour"] + 5 * (of["noise_neighbour"] + of["bound_neighbour"])
    expected = of["text"] + 5 * (of["noise"] + of["bound"]) + 0.03 * again + 7 * of["code"]
    assert of["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_diverged_training_says_so(tmp_path: Path) -> None:
    tokenizer = training(tmp_path)
    with torch.no_grad():
        tokenizer.model.read.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        tokenizer.run()


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    tokenizer = training(tmp_path, tokenizer_epochs=20, tokenizer_warmup=0.1)
    rates = [tokenizer.rate(step) for step in range(tokenizer.total)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(2e-3)
    assert peak == pytest.approx(0.1 * tokenizer.total, abs=2)
    assert all(np.diff(rates[:peak]) > 0) and all(np.diff(rates[peak + 1 :]) < 0)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("changes", [{"quantise_after": 10_000}, {"quantise_after": 10_000, "tokenizer_epochs": 1000}])
def test_codebooks_enter_however_short_the_training(tmp_path: Path, changes: dict[str, int]) -> None:
    """They get half of the steps at least; ended by its budget before that, a training still leaves codes that tell items apart."""
    tokenizer = training(tmp_path, **changes)
    tokenizer.seconds = 0.0 if "tokenizer_epochs" in changes else 100.0
    tokenizer.run()
    codes_XL = tokenizer.model.quantizer.codes(tokenizer.residuals_of_sample())
    assert min(len(codes.unique()) for codes in codes_XL.T) >= 3
