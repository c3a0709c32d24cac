"""LETTER: constrained clusters, both regularisers against their formulas, train-only collaborative vectors, and the program."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from baselines.letter import letter, run, sasrec
from baselines.letter.clusters import assign, constrained_kmeans
from baselines.tiger import rqvae, tokenizer
from baselines.tiger.embed import Embeddings
from harness.contract import ContractError, Domain, Job, Meta, Ragged
from tests.unit.baselines.running import BASELINES, Runner, SmallDomain, load_configuration
from utgrec.semantic_ids import SemanticIds

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


def test_alignment_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    quantised_BZ = torch.randn(7, 4, generator=generator, dtype=torch.double, requires_grad=True)
    collaborative_BZ = torch.randn(7, 4, generator=generator, dtype=torch.double)
    loss = letter.alignment_loss(quantised_BZ, collaborative_BZ)
    z, h = quantised_BZ.detach().numpy(), collaborative_BZ.numpy()
    terms = [-math.log(math.exp(z[i] @ h[i]) / sum(math.exp(z[i] @ h[j]) for j in range(7))) for i in range(7)]
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert torch.autograd.gradcheck(lambda q: letter.alignment_loss(q, collaborative_BZ), (quantised_BZ,))
    moved = letter.alignment_loss(quantised_BZ, collaborative_BZ + torch.randn(4, generator=generator))
    assert moved.item() == pytest.approx(loss.item(), rel=1e-12)  # so centring the vectors changes nothing


def test_vectors_get_one_scale_and_keep_their_proportions() -> None:
    vectors_TZ = 3 + 0.01 * torch.randn(50, 8) * torch.rand(50, 1)
    scaled_TZ = letter.unit_variance(vectors_TZ)
    assert scaled_TZ.square().mean().item() == pytest.approx(1, rel=1e-5)
    centred_TZ = vectors_TZ - vectors_TZ.mean(0)
    torch.testing.assert_close(scaled_TZ / scaled_TZ.norm(), centred_TZ / centred_TZ.norm(), atol=1e-5, rtol=1e-3)
    assert torch.isfinite(letter.unit_variance(torch.ones(4, 3))).all()


def test_diversity_is_the_mean_of_the_papers_formula_over_its_draw() -> None:
    generator = torch.Generator().manual_seed(1)
    books_LKZ = torch.randn(2, 9, 4, generator=generator, dtype=torch.double, requires_grad=True)
    codes_BL = torch.tensor([[0, 3, 3, 8, 5, 0, 1], [7, 7, 7, 2, 1, 0, 4]]).t()
    clusters_LK = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2], [2, 2, 2, 1, 1, 1, 0, 0, 0]])
    loss = letter.diversity_loss(books_LKZ, codes_BL, clusters_LK)
    total = 0.0
    for e, cluster, codes in zip(books_LKZ.detach().numpy(), clusters_LK.tolist(), codes_BL.t().tolist(), strict=True):
        for code in codes:
            others = [j for j in range(9) if j != code]
            mates = [j for j in others if cluster[j] == cluster[code]]
            norm = sum(math.exp(e[code] @ e[j]) for j in others)
            total += np.mean([-math.log(math.exp(e[code] @ e[j]) / norm) for j in mates])
    assert loss.item() == pytest.approx(total / len(codes_BL), rel=1e-12)
    assert torch.autograd.gradcheck(lambda books: letter.diversity_loss(books, codes_BL, clusters_LK), (books_LKZ,))


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
        letter.diversity_loss(book_KZ[None], torch.arange(12)[:, None], cluster_K[None]).backward()
        optimiser.step()
    assert separation() > before + 0.5


# ------------------------------------------------------------------------------------------------------------- model

VAE = rqvae.Settings(hidden=(32,), latent=8, levels=2, book=16, optimiser="adamw", learning_rate=3e-3, batch=100, epochs=60)
REGULARISERS = letter.Settings(alignment=0.05, diversity=0.01, clusters=4, cluster_min=2, cluster_max=8, cluster_every=2)


def items(n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts mostly say which of 6 groups an item is in, and a little of the 5 groups of its collaborative vector."""
    generator = torch.Generator().manual_seed(0)
    text, bought = torch.randint(6, (n,), generator=generator), torch.randint(5, (n,), generator=generator)
    x_TD = torch.randn(6, 24, generator=generator)[text] + 0.6 * torch.randn(5, 24, generator=generator)[bought]
    h_TZ = 2 * torch.randn(5, 8, generator=generator)[bought]
    return x_TD + 0.1 * torch.randn(n, 24, generator=generator), h_TZ + 0.3 * torch.randn(n, 8, generator=generator)


def model(settings: letter.Settings = REGULARISERS, vae: rqvae.Settings = VAE, n: int = 300) -> letter.LETTER:
    torch.manual_seed(0)
    made = letter.LETTER(24, vae, settings, items(n)[1], seed=1)
    made.start(items(n)[0], 1)
    made.before_epoch(0)
    return made


def test_both_terms_are_added_to_the_rqvaes_loss() -> None:
    made, (x_TD, h_TZ), rows_B = model(), items(), torch.tensor([5, 9, 40, 250, 7])
    loss, parts, quantised = made.loss(x_TD[rows_B], rows_B)
    plain, plain_parts, _ = rqvae.RQVAE.loss(made, x_TD[rows_B], rows_B)
    alignment = letter.alignment_loss(quantised.sum_BZ, letter.unit_variance(h_TZ)[rows_B])
    diversity = letter.diversity_loss(made.books_LKZ, quantised.codes_BL, made.clusters_LK)
    torch.testing.assert_close(loss, plain + 0.05 * alignment + 0.01 * diversity)
    torch.testing.assert_close(parts, plain_parts | {"alignment": alignment, "diversity": diversity})


def test_alignment_moves_the_encoder_and_diversity_the_codebooks() -> None:
    made, (x_TD, _), rows_B = model(), items(), torch.arange(100)
    for part, moves_encoder, moves_books in (("alignment", True, False), ("diversity", False, True)):
        made.zero_grad()
        made.loss(x_TD[rows_B], rows_B)[1][part].backward()
        for module, moves in ((made.encoder, moves_encoder), (made.decoder, False)):
            assert all((p.grad is not None and bool(p.grad.any())) == moves for p in module.parameters())
        assert (made.books_LKZ.grad is not None and bool(made.books_LKZ.grad.any())) == moves_books


def test_without_both_it_is_tigers_model() -> None:
    off = letter.Settings(alignment=0.0, diversity=0.0)
    torch.manual_seed(0)
    made = letter.LETTER(24, VAE, off, None, seed=1)
    torch.manual_seed(0)
    plain, rows_B = rqvae.RQVAE(24, VAE), torch.arange(50)
    assert plain.state_dict().keys() == made.state_dict().keys()
    x_TD = items()[0]
    for each in (made, plain):
        each.start(x_TD, 1)
    assert torch.equal(made.loss(x_TD[rows_B], rows_B)[0], plain.loss(x_TD[rows_B], rows_B)[0])


def test_codebooks_are_grouped_every_few_epochs_from_the_groups_there_are() -> None:
    made = model()
    first_LK = made.clusters_LK.clone()
    for level_K in first_LK:
        assert 2 <= torch.bincount(level_K, minlength=4).min() <= torch.bincount(level_K, minlength=4).max() <= 8
    with torch.no_grad():
        made.books_LKZ.copy_(made.books_LKZ.roll(3, dims=1))
    made.before_epoch(1)
    assert torch.equal(made.clusters_LK, first_LK)
    made.before_epoch(2)
    assert not torch.equal(made.clusters_LK, first_LK)
    settled = model()
    settled.clusters_LK.copy_(3 - settled.clusters_LK)  # other numbers for the same groups: a new start would not find these
    settled.before_epoch(2)
    assert torch.equal(settled.clusters_LK, 3 - model().clusters_LK)


def test_alignment_makes_items_bought_together_share_codes(tmp_path: Path) -> None:
    x_TD, h_TZ = items()
    found = {}
    for name, alignment in (("with", 0.5), ("without", 0.0)):
        torch.manual_seed(0)
        settings = dataclasses.replace(REGULARISERS, alignment=alignment)
        made = letter.LETTER(24, VAE, settings, h_TZ, seed=1)
        (tmp_path / name).mkdir()
        trained = rqvae.Training(made, x_TD, seed=1, checkpoint=tmp_path / name, seconds=100, told=lambda *_: None).run()
        assert all(math.isfinite(value) for value in trained.metrics.values())
        found[name] = letter.collaborative_similarity(made.codes(x_TD).numpy(), h_TZ.numpy())
    assert found["with"]["collaborative_similarity_1"] > found["without"]["collaborative_similarity_1"] + 0.3
    assert abs(found["with"]["collaborative_similarity_any"]) < 0.02


def test_similarity_is_the_mean_over_pairs() -> None:
    rng = np.random.default_rng(0)
    codes_IL, vectors_ID = rng.integers(0, 3, (20, 2)), rng.normal(size=(20, 4)).astype(np.float32)
    centred = vectors_ID - vectors_ID.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for length, name in enumerate(("any", "1", "2")):
        same = [(i, j) for i, j in itertools.permutations(range(20), 2) if (codes_IL[i, :length] == codes_IL[j, :length]).all()]
        found = letter.collaborative_similarity(codes_IL, vectors_ID)[f"collaborative_similarity_{name}"]
        assert found == pytest.approx(np.mean([unit[i] @ unit[j] for i, j in same]), abs=1e-6)
    assert list(letter.collaborative_similarity(np.arange(4)[:, None], np.eye(4, dtype=np.float32))) == ["collaborative_similarity_any"]


@pytest.mark.parametrize("cut", [1, 6, 15])
def test_a_killed_tokenizer_training_ends_with_the_same_codes(cut: int, tmp_path: Path) -> None:
    """The groups of the codebooks start at those before: they have to be in the checkpoint, too."""
    vae = dataclasses.replace(VAE, epochs=20, revive_every=4)

    class Cut(Exception):
        pass

    class CutLETTER(letter.LETTER):
        def before_epoch(self, epoch: int) -> None:
            if epoch == cut:
                raise Cut
            super().before_epoch(epoch)

    def train(kind: type[letter.LETTER], folder: Path) -> letter.LETTER:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        made = kind(24, vae, dataclasses.replace(REGULARISERS, diversity=0.5), items()[1], seed=1)
        training = rqvae.Training(made, items()[0], seed=1, checkpoint=folder, seconds=100, told=lambda *_: None)
        save = training._save

        def save_always() -> None:
            training._save_after = 0.0
            save()

        training._save = save_always  # type: ignore[method-assign]
        training.run()
        return made

    with pytest.raises(Cut):
        train(CutLETTER, tmp_path / "cut")
    whole, resumed = train(letter.LETTER, tmp_path / "whole"), train(letter.LETTER, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "vae", "said"),
    [
        ({}, {"books": "ema"}, "learn by gradient"),
        ({}, {"latent": 6}, "vae_latent = 6"),
        ({"clusters": 9}, {}, "cluster_min"),
        ({"cluster_min": 1}, {}, "use 2 or more"),
        ({"alignment": -1.0}, {}, "use 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, float], vae: dict[str, object], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        model(dataclasses.replace(REGULARISERS, **settings), dataclasses.replace(VAE, **vae))


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
    torch.testing.assert_close(model.scores(state_BLD[0, :1])[0, 7], state_BLD[0, 0] @ model.items.weight[8], rtol=1e-6, atol=1e-7)


def test_parts_of_the_scores_give_the_gradient_of_the_whole(collaborate_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = collaborate_job()
    gradients = []
    for logits in (sasrec.LOGITS, 0):  # all scores at once; 32 rows at a time
        monkeypatch.setattr(sasrec, "LOGITS", logits)
        torch.manual_seed(0)
        training = sasrec.Training(job, dataclasses.replace(TINY_SASREC, dropout=0.0), job.domain)
        loss = training.backward(training.inputs_WL[:20], training.targets_WL[:20])
        gradients.append([parameter.grad for parameter in training.model.parameters()])
        there_BL = training.targets_WL[:20] > 0
        training.model.zero_grad()
        scores_TI = training.model.scores(training.model(training.inputs_WL[:20])[there_BL])
        right = torch.nn.functional.cross_entropy(scores_TI, training.targets_WL[:20][there_BL] - 1)
        right.backward()
        gradients.append([parameter.grad for parameter in training.model.parameters()])
        torch.testing.assert_close(loss, right.detach())
    assert there_BL.sum() > 64
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other)


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


# ------------------------------------------------------------------------------------------------------------ stages

CONFIGURATIONS = tomllib.loads((BASELINES / "letter" / "method.toml").read_text())
TINY = load_configuration("letter", "tiny") | {"book": 16, "vae_epochs": 15, "clusters": 2, "sasrec_epochs": 2, "epochs": 1}


@pytest.mark.parametrize("name", list(CONFIGURATIONS["configs"]))
def test_configurations_have_keys_that_somebody_reads(name: str, small_domain: SmallDomain, runner: Runner) -> None:
    settings, rest = run.Settings.take(load_configuration("letter", name))
    run.RecommenderSettings.of(rest)
    letter.check_bounds(settings.tokenizer.book, settings.letter.clusters, settings.letter.cluster_min, settings.letter.cluster_max)
    parents, config = [], CONFIGURATIONS["configs"][name]
    while "stages" not in config and "extends" in config:
        parents.append(config := CONFIGURATIONS["configs"][config["extends"]])
    assert ("collaborate" in config.get("stages", ["collaborate"])) == bool(settings.letter.alignment)


@pytest.mark.parametrize("name", ["lineage", "lineage_minilm", "small", "tiny"])
def test_what_is_not_letters_is_tigers(name: str) -> None:
    """So that TIGER's row beside LETTER's shows what the regularisers do."""
    ours, tigers = load_configuration("letter", name), load_configuration("tiger", name)
    ours = {key: value for key, value in ours.items() if key not in (*run.OWN_KEYS, *run.LETTER_KEYS, *run.SASREC_KEYS)}
    assert ours == {key: value for key, value in tigers.items() if key != "quantiser"}
    assert ours["inputs"] == "standard"  # the weights of the regularisers presuppose it


def test_a_stage_uses_what_decides_its_outcome() -> None:
    """Configurations that are equal in a stage's keys share it, so the list must be whole, and no longer than needed."""
    for stage in CONFIGURATIONS["stages"][:-1]:
        assert sorted(stage["uses"]) == sorted(run.STAGE_KEYS[stage["name"]])
    assert sorted({*run.STAGE_KEYS["collaborate"], *run.STAGE_KEYS["tokenize"]}) == sorted(
        {*run.OWN_KEYS, *run.LETTER_KEYS, *run.SASREC_KEYS, *tokenizer.KEYS}
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"alignement": 0.1}, "did you mean 'alignment'"),
        ({"alignment": "much"}, "this key takes float"),
        ({"sasrec_heads": 3}, "must divide"),
        ({"sasrec_epochs": 0}, "sasrec_epochs = 0"),
        ({"repair": "none"}, "use 'digit' or 'nearest'"),
        ({"quantiser": "rkmeans"}, "use 'rqvae'"),
        ({"collaborate_share": 2.0}, "use a share"),
    ],
)
def test_wrong_keys_are_named(wrong: dict[str, object], said: str, small_domain: SmallDomain, runner: Runner) -> None:
    job, _ = runner.job("letter", small_domain.path, TINY | wrong)
    with pytest.raises(ContractError, match=said):
        run.fit(job)


@pytest.fixture
def stage(small_domain: SmallDomain, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Run a stage with the keys that it uses; item texts are random vectors."""

    def embed(texts: list[str], encoder: str, **how: object) -> Embeddings:
        return Embeddings(np.random.default_rng(0).normal(size=(len(texts), 12)).astype(np.float32), {"encoder": encoder})

    monkeypatch.setattr(tokenizer, "embed", embed)

    def start(name: str, inputs: dict[str, Path], path: Path = small_domain.path, **changes: object) -> Job:
        configuration = {key: value for key, value in (TINY | changes).items() if key in run.STAGE_KEYS[name]}
        job, _ = runner.job("letter", path, configuration, stage=name, inputs=inputs)
        getattr(run, name)(job)
        return job

    return start


@pytest.mark.parametrize(("repair", "length"), [("digit", 4), ("nearest", 3)])
def test_from_interactions_to_ids(repair: str, length: int, stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    collaborated = stage("collaborate", {})
    job = stage("tokenize", {"collaborate": collaborated.output}, repair=repair)
    ids = SemanticIds.load(job.output / run.IDS)
    meta = json.loads((job.output / "meta.json").read_text())
    assert ids.unique
    assert ids.codes_IL.shape == (120, length)
    assert ids.report == meta["extra"]
    unseen = 120 - len(np.unique(job.domain.train.values))
    assert ids.report["items_without_collaborative_vector"] == unseen > 0
    assert ids.report["items_trained_on"] == 120 - unseen
    assert {"collaborative_similarity_1", "perplexity_3", "sasrec_best_valid"} <= ids.report.keys()
    curve = (job.output / "progress.jsonl").read_text()
    assert "alignment" in curve
    assert "diversity" in curve
    again = stage("tokenize", {"collaborate": collaborated.output}, repair=repair)
    assert SemanticIds.load(again.output / run.IDS).digest == ids.digest

    # The budget is the run's: the recommender gets what both stages have left.
    taken: list[float] = []
    monkeypatch.setattr(run, "recommend_with", lambda job, ids, settings: taken.append(job.budget.seconds) or Meta())
    job = dataclasses.replace(job, stage="fit", configuration=TINY | {"repair": repair}, inputs={"tokenize": job.output})
    run.fit(job)
    sasrec_seconds = json.loads((collaborated.output / "meta.json").read_text())["timings"]["fit"]
    assert taken == [pytest.approx(job.budget.seconds - sasrec_seconds - meta["timings"]["fit"])]


def test_colliding_ids_are_told_apart_by_distance() -> None:
    rng = np.random.default_rng(0)
    quantised_IZ, books_LKZ = torch.from_numpy(rng.normal(size=(60, 3))), torch.from_numpy(rng.normal(size=(2, 64, 3)))
    quantised_IZ[30:] = quantised_IZ[:30]  # every item has a double
    raw = SemanticIds.of(rqvae.residual_codes(quantised_IZ, books_LKZ)[0].numpy(), widths=(64, 64))
    ids = run.nearest_last(raw, quantised_IZ, books_LKZ)
    assert ids.unique
    assert np.array_equal(ids.codes_IL[:, 0], raw.codes_IL[:, 0])
    alone = [item for item in range(30) if (raw.codes_IL[:, 0] == raw.codes_IL[item, 0]).sum() == 2]
    assert len(alone) > 10
    for item in alone:  # of a pair the first keeps its code, and the second gets the second nearest row of the last book
        left_Z = quantised_IZ[item] - books_LKZ[0, raw.codes_IL[item, 0]]
        nearest = (left_Z - books_LKZ[1]).square().sum(1).argsort()
        assert ids.codes_IL[[item, item + 30], 1].tolist() == nearest[:2].tolist()


def test_ablations_need_no_collaborative_vectors(stage: Callable[..., Job]) -> None:
    ids = SemanticIds.load(stage("tokenize", {}, alignment=0.0).output / run.IDS)
    assert ids.report["alignment"] == 0
    assert "sasrec_seconds" not in ids.report
    with pytest.raises(ContractError, match="needs the stage 'collaborate'"):
        stage("tokenize", {})


def test_without_both_terms_the_ids_are_tigers(stage: Callable[..., Job], small_domain: SmallDomain, runner: Runner) -> None:
    ours = SemanticIds.load(stage("tokenize", {}, alignment=0.0, diversity=0.0).output / run.IDS)
    configuration = {key: value for key, value in TINY.items() if key in tokenizer.KEYS}
    job, _ = runner.job("tiger", small_domain.path, configuration, stage="tokenize")
    assert tokenizer.tokenise(job, tokenizer.Settings.take(configuration)[0])[0].digest == ours.digest
    assert SemanticIds.load(stage("tokenize", {}, alignment=0.0, diversity=0.5).output / run.IDS).digest != ours.digest


def test_a_domain_without_training_rows_is_skipped(stage: Callable[..., Job], make_domain: Callable[..., SmallDomain]) -> None:
    with pytest.raises(SystemExit):
        stage("collaborate", {}, path=make_domain([[0, 1, 2], [3, 4, 5]], 6).path)
