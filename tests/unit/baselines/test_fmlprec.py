"""FMLP-Rec: its layers against the formulas, its ranking, and the program under the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.contract import ContractError
from tests.unit.baselines.running import Outcome, Runner, SmallDomain, load_configuration, load_program

SMALL = load_configuration("fmlprec", "small") | {"batch": 64, "epochs": 12}


@pytest.fixture(scope="module")
def program():
    return load_program("fmlprec")


@pytest.fixture(scope="module")
def whole(small_domain: SmallDomain, runner: Runner) -> Outcome:
    return runner.run("fmlprec", small_domain, SMALL)


def test_a_filter_is_a_circular_convolution(program) -> None:
    """The paper's claim about its layer: a product of spectra is a sum over time, around the corner."""
    torch.manual_seed(0)
    layer = program.FMLPRec(program.Shape(10, 6, 3, 1, 0.0)).blocks[0][0]
    x_BLD = torch.randn(2, 6, 3)
    kernel_LD = torch.fft.irfft(torch.view_as_complex(layer.weight), n=6, dim=0)
    shifted = torch.stack([x_BLD.roll(shift, dims=1) for shift in range(6)])  # [shift, B, L, D]
    convolved_BLD = (shifted * kernel_LD[:, None, None]).sum(0)
    torch.testing.assert_close(layer(x_BLD), layer.norm(x_BLD + convolved_BLD), rtol=1e-4, atol=1e-5)


def test_every_item_of_the_history_counts_and_scores_skip_padding(program) -> None:
    torch.manual_seed(0)
    model = program.FMLPRec(program.Shape(30, 20, 8, 2, 0.0)).eval()
    history_BL = torch.zeros(1, 20, dtype=torch.long)
    history_BL[0, -3:] = torch.tensor([4, 5, 6])
    base = model(history_BL)
    for place in (-1, -2, -3):
        other = history_BL.clone()
        other[0, place] = 9
        assert not torch.allclose(model(other), base, atol=1e-4)
    assert model.scores(base).shape == (1, 30)
    torch.testing.assert_close(model.scores(base), base @ model.items.weight[1:].T)  # item 0's row is 1: row 0 is padding


def test_parameter_count(program) -> None:
    count = sum(p.numel() for p in program.FMLPRec(program.Shape(n_items=100, history=20, width=64, blocks=2, dropout=0.5)).parameters())
    block = 11 * 64 * 2 + 2 * 64 + (64 * 256 + 256 + 256 * 64 + 64) + 2 * 64
    assert count == 101 * 64 + 20 * 64 + 2 * 64 + 2 * block


def test_histories_end_at_the_right(program) -> None:
    inputs = program.Ragged(np.array([7, 8, 9, 1]), np.array([0, 3, 4]))
    assert program.ids(inputs)[:, -4:].tolist() == [[0, 8, 9, 10], [0, 0, 0, 2]]


@pytest.mark.parametrize(("n_items", "k"), [(40, 10), (7, 10), (10, 10), (300, 50)])
def test_ranking_breaks_ties_by_the_smaller_number(program, n_items: int, k: int) -> None:
    scores_BI = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (200, n_items)).astype(np.float32))
    right = np.argsort(-scores_BI.numpy(), axis=1, kind="stable")[:, :k]
    right = np.pad(right, ((0, 0), (0, k - right.shape[1])), constant_values=-1)
    assert np.array_equal(program.top_k(scores_BI, k).numpy(), right)


def test_an_unknown_key_is_named(program, small_domain: SmallDomain, runner: Runner) -> None:
    job, _ = runner.job("fmlprec", small_domain.path, {"widht": 3})
    with pytest.raises(ContractError, match="widht"):
        program.Settings.of(job)
    job, _ = runner.job("fmlprec", small_domain.path, {"loss": "hinge"})
    with pytest.raises(ContractError, match="use 'ce' or 'bpr'"):
        program.Settings.of(job)


def test_learns_and_says_how(whole: Outcome, small_domain: SmallDomain) -> None:
    assert small_domain.recall_at_10(whole.items) > 3 * 10 / 120
    assert whole.meta.stopped_by in ("epochs", "patience")
    assert whole.meta.best_valid is not None
    assert whole.meta.best_valid > 0.1
    assert (whole.output / "progress.jsonl").read_text().count("valid_ndcg_at_10") == whole.meta.epochs
    assert sorted(p.name for p in whole.output.iterdir()) == ["meta.json", "predictions.npz", "progress.jsonl", "valid_predictions.npz"]


def test_killed_and_started_again_it_ends_with_the_same_lists(whole: Outcome, small_domain: SmallDomain, runner: Runner) -> None:
    job, job_file = runner.job("fmlprec", small_domain.path, SMALL)
    cut = runner.cut(job, job_file, small_domain)
    assert np.array_equal(whole.items, cut.items)
    assert np.array_equal(whole.valid_items, cut.valid_items)
    assert (whole.meta.best_valid, whole.meta.epochs, whole.meta.steps) == (cut.meta.best_valid, cut.meta.epochs, cut.meta.steps)


@pytest.mark.slow
def test_same_seed_same_lists_other_seed_other_lists(small_domain: SmallDomain, runner: Runner) -> None:
    settings = SMALL | {"loss": "bpr", "epochs": 3}  # draws items, too
    first, second, other = (runner.run("fmlprec", small_domain, settings, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.items, second.items)
    assert not np.array_equal(first.items, other.items)


@pytest.mark.slow
def test_the_budget_ends_training(small_domain: SmallDomain, runner: Runner) -> None:
    endless = SMALL | {"epochs": 10**6, "learning_rate": 1e-7, "eval_every": 50}
    outcome = runner.run("fmlprec", small_domain, endless, budget=runner.budget(seconds=6))
    assert outcome.meta.stopped_by == "budget"
    assert outcome.meta.budget_bound
    assert outcome.meta.timings["fit"] < 9
