"""LETTER: constrained clusters, both regularisers against their formulas, train-only collaborative vectors, and the program."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from baselines.letter import sasrec
from baselines.letter.clusters import assign, constrained_kmeans
from baselines.letter.letter import alignment_loss, diversity_loss
from harness.contract import ContractError, Domain, Job, Ragged
from tests.unit.baselines.running import Runner, SmallDomain

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Progress is open for the life of a process

TINY_SASREC = sasrec.Settings(width=8, layers=1, heads=1, dropout=0.2, learning_rate=0.01, batch=16, epochs=6)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- clusters


def cheapest(cost_NK: np.ndarray, smallest: int, largest: int) -> float:
    """The cost of the best assignment by the Hungarian method: a column for each place in a cluster, the first ones a must."""
    k = cost_NK.shape[1]
    cluster, must = np.repeat(np.arange(k), largest), np.tile(np.arange(largest) < smallest, k)
    rows, columns = linear_sum_assignment(cost_NK[:, cluster] - 1e6 * must)
    return float(cost_NK[rows, cluster[columns]].sum())


def test_the_assignment_keeps_its_bounds_and_nothing_is_cheaper() -> None:
    rng = np.random.default_rng(0)
    for trial in range(300):
        k, smallest = int(rng.integers(1, 7)), int(rng.integers(1, 4))
        largest = int(rng.integers(smallest, smallest + 5))
        n = int(rng.integers(k * smallest, k * largest + 1))
        cost_NK = rng.random((n, k)) * rng.random(k) * 3
        if trial % 3 == 0:
            cost_NK = cost_NK.round(1)  # ties
        cluster_N = assign(cost_NK, smallest, largest)
        size_K = np.bincount(cluster_N, minlength=k)
        assert smallest <= size_K.min()
        assert size_K.max() <= largest
        assert cost_NK[np.arange(n), cluster_N].sum() == pytest.approx(cheapest(cost_NK, smallest, largest), abs=1e-9)


def test_clusters_are_balanced_where_plain_kmeans_would_not_be() -> None:
    rng = np.random.default_rng(1)
    rows_ND = rng.normal(size=(256, 8))
    rows_ND[:200] *= 0.01  # nearly all rows in one place
    cluster_N = constrained_kmeans(rows_ND, 10, 10, 60)
    size_K = np.bincount(cluster_N, minlength=10)
    assert size_K.min() == 10
    assert size_K.max() == 60
    assert np.array_equal(cluster_N, constrained_kmeans(rows_ND, 10, 10, 60))


def test_iterations_improve_the_objective_and_separated_groups_are_found() -> None:
    rng = np.random.default_rng(2)
    truth_N = np.repeat(np.arange(4), 8)
    rows_ND = 10 * np.eye(4)[truth_N] + rng.normal(size=(32, 4))
    found_N = constrained_kmeans(rows_ND, 4, 2, 20, seed=3, iterations=50)
    for group in range(4):
        assert len(set(found_N[truth_N == group])) == 1

    def objective(cluster_N: np.ndarray) -> float:
        return sum(np.square(rows - rows.mean(0)).sum() for rows in (rows_ND[cluster_N == c] for c in range(4)))

    random_N = rng.permutation(truth_N)
    values = [objective(constrained_kmeans(rows_ND, 4, 2, 20, start_N=random_N, iterations=i)) for i in (1, 2, 3, 10)]
    assert objective(random_N) > values[0]
    assert values == sorted(values, reverse=True)
    settled_N = constrained_kmeans(rows_ND, 4, 2, 20, start_N=found_N)
    assert np.array_equal(settled_N, found_N)


def test_bounds_that_cannot_be_kept_are_named() -> None:
    for k, smallest, largest in ((10, 10, 20), (10, 30, 60), (3, 5, 4), (3, 0, 100)):
        with pytest.raises(ContractError, match="cluster_min"):
            constrained_kmeans(np.zeros((256, 2)), k, smallest, largest)


def test_equal_rows_are_clustered_too() -> None:
    assert np.bincount(constrained_kmeans(np.ones((20, 3)), 4, 2, 6)).tolist() == [6, 6, 6, 2]


# ------------------------------------------------------------------------------------------------------------ losses


def test_alignment_is_the_papers_formula_over_the_known_items() -> None:
    generator = torch.Generator().manual_seed(0)
    quantised_BZ = torch.randn(7, 4, generator=generator, dtype=torch.double, requires_grad=True)
    collaborative_BZ = torch.randn(7, 4, generator=generator, dtype=torch.double)
    known_B = torch.tensor([True, True, False, True, False, True, True])
    loss = alignment_loss(quantised_BZ, collaborative_BZ, known_B)
    z, h, rows = quantised_BZ.detach().numpy(), collaborative_BZ.numpy(), np.flatnonzero(known_B)
    terms = [-math.log(math.exp(z[i] @ h[i]) / sum(math.exp(z[i] @ h[j]) for j in rows)) for i in rows]
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert torch.autograd.gradcheck(lambda q: alignment_loss(q, collaborative_BZ, known_B), (quantised_BZ,))
    loss.backward()
    assert quantised_BZ.grad is not None
    assert not quantised_BZ.grad[~known_B].any()
    assert quantised_BZ.grad[known_B].abs().sum(1).min() > 0


@pytest.mark.parametrize("known", [[], [2]])
def test_alignment_without_pairs_is_nothing(known: list[int]) -> None:
    quantised_BZ = torch.randn(5, 3, requires_grad=True)
    known_B = torch.tensor([i in known for i in range(5)])
    loss = alignment_loss(quantised_BZ, torch.randn(5, 3), known_B)
    loss.backward()
    assert loss.item() == 0
    assert quantised_BZ.grad is not None
    assert not quantised_BZ.grad.any()


def test_diversity_is_the_mean_of_the_papers_formula_over_its_draw() -> None:
    generator = torch.Generator().manual_seed(1)
    book_KZ = torch.randn(9, 4, generator=generator, dtype=torch.double, requires_grad=True)
    codes_B, cluster_K = torch.tensor([0, 3, 3, 8, 5, 0, 1]), torch.tensor([0, 1, 2, 0, 1, 0, 0, 1, 2])
    loss = diversity_loss(book_KZ, codes_B, cluster_K)
    e, total = book_KZ.detach().numpy(), 0.0
    for code in codes_B.tolist():
        others = [j for j in range(9) if j != code]
        mates = [j for j in others if cluster_K[j] == cluster_K[code]]
        norm = sum(math.exp(e[code] @ e[j]) for j in others)
        total += np.mean([-math.log(math.exp(e[code] @ e[j]) / norm) for j in mates])
    assert loss.item() == pytest.approx(total / len(codes_B), rel=1e-12)
    assert torch.autograd.gradcheck(lambda b: diversity_loss(b, codes_B, cluster_K), (book_KZ,))


def test_diversity_pulls_groups_together_and_pushes_them_apart() -> None:
    generator = torch.Generator().manual_seed(2)
    book_KZ = torch.randn(12, 6, generator=generator, requires_grad=True)
    cluster_K = torch.arange(12) % 3

    def separation() -> float:
        unit = torch.nn.functional.normalize(book_KZ.detach(), dim=1)
        same = (cluster_K[:, None] == cluster_K) & ~torch.eye(12, dtype=torch.bool)
        similarity = unit @ unit.t()
        return float(similarity[same].mean() - similarity[cluster_K[:, None] != cluster_K].mean())

    before, optimiser = separation(), torch.optim.Adam([book_KZ], lr=0.05)
    for _ in range(50):
        optimiser.zero_grad()
        diversity_loss(book_KZ, torch.arange(12), cluster_K).backward()
        optimiser.step()
    assert separation() > before + 0.5


# ------------------------------------------------------------------------------------------------------------ SASRec


def test_windows_hold_every_training_row_once() -> None:
    rng = np.random.default_rng(0)
    lengths = [1, 0, 2, 21, 20, 22, 41, 63]
    lists = [rng.integers(0, 500, n) for n in lengths]
    train = Ragged(np.concatenate(lists).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    inputs_WL, targets_WL = sasrec.windows(train)
    assert inputs_WL.shape == targets_WL.shape == (sum(-(-max(n - 1, 0) // 20) for n in lengths), 20)
    pairs = [(i - 1, t - 1) for i, t in zip(inputs_WL[inputs_WL > 0], targets_WL[inputs_WL > 0], strict=True)]
    assert pairs == [(int(a), int(b)) for row in lists for a, b in itertools.pairwise(row)]
    assert ((inputs_WL > 0) == (targets_WL > 0)).all()
    # A window that is not a user's first is full, and its inputs follow each other in the user's list.
    assert [int((row > 0).sum()) for row in inputs_WL] == [1, 20, 19, 1, 20, 20, 20, 2, 20, 20, 20]


def test_states_depend_on_the_past_alone_and_padding_on_nothing() -> None:
    torch.manual_seed(0)
    model = sasrec.SASRec(30, dataclasses.replace(TINY_SASREC, heads=2)).eval()
    items_BL = torch.tensor([[3, 4, 5, 6, 0, 0]])
    state_BLD = model(items_BL)
    torch.testing.assert_close(model(items_BL[:, :4]), state_BLD[:, :4])
    other = model(torch.tensor([[3, 4, 9, 6, 0, 0]]))
    torch.testing.assert_close(other[:, :2], state_BLD[:, :2])
    assert (other[:, 2:4] - state_BLD[:, 2:4]).abs().amax(2).min() > 1e-4
    assert torch.equal(model.scores(state_BLD[0, :1])[0, 7], state_BLD[0, 0] @ model.items.weight[8])


def test_parts_of_a_batch_give_the_gradient_of_the_whole(collaborate_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = collaborate_job()
    gradients = []
    for logits in (sasrec.LOGITS, 120 * 20 * 3):
        monkeypatch.setattr(sasrec, "LOGITS", logits)
        torch.manual_seed(0)
        training = sasrec.Training(job, dataclasses.replace(TINY_SASREC, dropout=0.0), job.domain)
        training.backward(training.inputs_WL[:10], training.targets_WL[:10])
        gradients.append(training.model.items.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.fixture
def collaborate_job(small_domain: SmallDomain, runner: Runner) -> Callable[..., Job]:
    return lambda path=small_domain.path, **changes: runner.job("letter", path, {}, stage="collaborate", **changes)[0]


def test_vectors_are_learned_repeated_and_the_same_after_a_cut(collaborate_job: Callable[..., Job]) -> None:
    vectors_ID, seen_I, meta = sasrec.item_vectors(collaborate_job(), TINY_SASREC)
    assert vectors_ID.shape == (120, 8)
    assert vectors_ID.dtype == np.float32
    assert meta.best_valid is not None
    assert meta.best_valid > 0.08  # chance: 0.038
    assert seen_I.sum() == len(np.unique(collaborate_job().domain.train.values))

    job, epochs = collaborate_job(), 0

    class Cut(Exception):
        pass

    class CutTraining(sasrec.Training):
        def save(self, *of: object) -> None:
            nonlocal epochs
            self._save_after = 0.0
            super().save(*of)  # type: ignore[arg-type]
            epochs += 1
            if epochs == 2:
                raise Cut

    torch.manual_seed(job.seed)
    with pytest.raises(Cut):
        CutTraining(job, TINY_SASREC, job.domain).run()
    again_ID, _, meta_again = sasrec.item_vectors(job, TINY_SASREC)
    assert np.array_equal(vectors_ID, again_ID)
    assert (meta_again.epochs, meta_again.steps, meta_again.best_valid) == (meta.epochs, meta.steps, meta.best_valid)
    assert not np.array_equal(vectors_ID, sasrec.item_vectors(collaborate_job(seed=2), TINY_SASREC)[0])


def test_validation_and_test_items_leave_no_trace_in_the_vectors(
    make_domain: Callable[[list[list[int]], int], SmallDomain], collaborate_job: Callable[..., Job]
) -> None:
    """Two domains with one training part: the vectors of one epoch are equal to the last bit, whatever follows in the histories."""
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 30, 6).tolist() for _ in range(40)]
    found = []
    for _ in range(2):
        histories = [row + rng.integers(0, 40, 2).tolist() for row in train]
        vectors_ID, seen_I, _ = sasrec.item_vectors(
            collaborate_job(make_domain(histories, 40).path), dataclasses.replace(TINY_SASREC, epochs=1)
        )
        found.append(vectors_ID)
        assert np.flatnonzero(~seen_I).tolist() == list(range(30, 40))
    assert np.array_equal(found[0], found[1])


def test_unseen_items_are_told_from_seen_ones_by_the_training_part(small_domain: SmallDomain, collaborate_job: Callable[..., Job]) -> None:
    domain = Domain.read(Path(small_domain.path))
    _, seen_I, _ = sasrec.item_vectors(collaborate_job(), dataclasses.replace(TINY_SASREC, epochs=1))
    assert np.array_equal(np.flatnonzero(seen_I), np.unique(domain.train.values))
