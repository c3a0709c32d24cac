"""The two trivial methods, against a slow count and against known numbers on real data, and the template."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness import metrics
from harness.contract import Domain, Ragged
from harness.data.domain import read_private
from harness.data.importers import import_domain
from tests.unit.baselines.running import Runner, SmallDomain, load_configuration, load_program, markov_histories

MakeDomain = Callable[[list[list[int]], int], SmallDomain]


def in_memory(train: list[list[int]], valid: list[int], n_items: int) -> Domain:
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in train])])
    values = np.array([item for history in train for item in history], np.int32)
    return Domain(Path("."), "small", len(train), n_items, Ragged(values, offsets), np.array(valid, np.int32), {})


def slow_successors(train: list[list[int]], last: int, n_items: int, k: int) -> list[int]:
    popularity = Counter(item for history in train for item in history)
    pairs = Counter(b for history in train for a, b in itertools.pairwise(history) if a == last)
    by_pairs = sorted(pairs, key=lambda item: (-pairs[item], -popularity[item], item))
    by_popularity = sorted(range(n_items), key=lambda item: (-popularity[item], item))
    ranked = by_pairs + [item for item in by_popularity if item not in pairs]
    return (ranked + [-1] * k)[:k]


@pytest.mark.parametrize(("n_items", "k"), [(4, 50), (30, 3), (60, 10), (60, 50), (150, 50)])
def test_last_item_equals_a_slow_count(n_items: int, k: int) -> None:
    rng = np.random.default_rng(n_items * k)
    train = [(rng.zipf(1.3, rng.integers(1, 40)) % n_items).tolist() for _ in range(50)]
    domain = in_memory(train, [0] * 50, n_items)
    found = load_program("last_item").successors(domain, k)
    assert found.tolist() == [slow_successors(train, item, n_items, k) for item in range(n_items)]


def test_pairs_do_not_cross_users_and_the_validation_item_is_not_counted() -> None:
    domain = in_memory([[0, 1], [2, 3]], [4, 4], 6)
    items_IK = load_program("last_item").successors(domain, 6)
    assert items_IK[0].tolist() == [1, 0, 2, 3, 4, 5]
    assert items_IK[1].tolist() == [0, 1, 2, 3, 4, 5]  # 1 -> 2 would cross two users; 1 -> 4 is a validation pair
    assert items_IK[2].tolist() == [3, 0, 1, 2, 4, 5]


def test_last_item_starts_from_the_validation_item_at_test(small_domain: SmallDomain) -> None:
    domain = Domain.read(small_domain.path)
    module = load_program("last_item")
    assert module.last_of(domain.test_inputs()).tolist() == domain.valid.tolist()
    assert module.last_of(domain.valid_inputs()).tolist() == [history[-1] for history in domain.train]


@pytest.mark.parametrize("method", ["popularity", "last_item"])
def test_as_a_program(method: str, small_domain: SmallDomain, runner: Runner) -> None:
    outcome = runner.run(method, small_domain, {})
    assert (outcome.items >= 0).all()
    assert outcome.meta.stopped_by == "closed form"
    assert outcome.meta.timings.keys() == {"fit", "predict"}
    domain = Domain.read(small_domain.path)
    recall = (outcome.valid_items[:, :10] == domain.valid[:, None]).any(1).mean()
    assert outcome.meta.best_valid <= recall
    if method == "last_item":  # the planted successor has probability 0.7
        assert small_domain.recall_at_10(outcome.items) > 0.5
    else:
        count = np.bincount(domain.train.values, minlength=domain.n_items)
        assert (outcome.items == outcome.items[0]).all()
        assert (np.diff(count[outcome.items[0]]) <= 0).all()


def test_the_template_works_as_it_is(small_domain: SmallDomain, runner: Runner) -> None:
    outcome = runner.run("_template", small_domain, load_configuration("_template", "default"))
    assert small_domain.recall_at_10(outcome.items) > 0.5
    assert (outcome.items >= 0).all()
    assert outcome.meta.extra["weight"] > 0


@pytest.mark.parametrize("method", ["popularity", "last_item", "_template"])
def test_a_catalogue_smaller_than_the_list_leaves_spent_slots(method: str, runner: Runner, make_domain: MakeDomain) -> None:
    domain = make_domain(markov_histories(users=20, items=12), 12)
    outcome = runner.run(method, domain, load_configuration(method, "default"))
    assert (np.sort(outcome.items, axis=1)[:, -12:] == np.arange(12)).all()
    assert (outcome.items[:, 12:] == -1).all()


def test_beauty2014_to_six_digits(shared_data: Path, runner: Runner, tmp_path: Path) -> None:
    """Imported, run and scored by this project: equal to an independent count on the 22,363 users of Beauty 2014."""
    summary = import_domain(shared_data / "beauty2014", "beauty2014", root=tmp_path)
    assert summary.counts["users"] == 22_363
    targets_U = read_private(tmp_path / "beauty2014").targets
    domain = SmallDomain(tmp_path / "beauty2014" / "public", targets_U, summary.counts["users"], summary.counts["items"])

    def scores(method: str, *names: str) -> list[float]:
        means = metrics.means(metrics.ranks(runner.run(method, domain, {}).items, targets_U))
        return [round(means[name], 6) for name in names]

    assert scores("popularity", "recall_at_10", "ndcg_at_10") == [0.011179, 0.005269]
    assert scores("last_item", "recall_at_5", "recall_at_10", "ndcg_at_10") == [0.050396, 0.065912, 0.042723]
