"""The metric definitions against hand-made values and against the properties that any right definition has."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from harness import metrics

RANKS = arrays(np.int32, st.integers(1, 40), elements=st.integers(0, 50))


def test_ranks_count_from_one_in_the_given_order() -> None:
    items = np.array([[7, 3, 9], [7, 3, 9], [7, 3, 9], [7, 3, 9]])
    assert metrics.ranks(items, np.array([7, 3, 9, 4])).tolist() == [1, 2, 3, 0]


def test_a_spent_slot_keeps_its_place_and_never_matches() -> None:
    items = np.array([[-1, 5, -1], [-1, -1, -1]])
    assert metrics.ranks(items, np.array([5, -1])).tolist() == [2, 0]


def test_ranks_refuse_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match="must be"):
        metrics.ranks(np.zeros((3, 5), int), np.zeros(1, int))
    with pytest.raises(ValueError, match="must be"):
        metrics.ranks(np.zeros((3, 5), int), np.zeros((3, 5), int))


def test_values_by_hand() -> None:
    values = metrics.per_user(np.array([1, 2, 10, 11, 50, 0]))
    assert values["recall_at_1"].tolist() == [1, 0, 0, 0, 0, 0]
    assert values["recall_at_10"].tolist() == [1, 1, 1, 0, 0, 0]
    assert values["recall_at_50"].tolist() == [1, 1, 1, 1, 1, 0]
    assert values["ndcg_at_10"].tolist() == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(11), 0, 0, 0], abs=0)
    assert values["ndcg_at_50"][4] == 1 / math.log2(51)
    assert values["mrr_at_50"].tolist() == [1, 1 / 2, 1 / 10, 1 / 11, 1 / 50, 0]


def test_names_are_those_of_records_and_mlflow() -> None:
    assert set(metrics.per_user(np.array([1]))) == set(metrics.PER_USER)
    assert set(metrics.METRICS) == {
        *(f"{name}_at_{k}" for name in ("recall", "ndcg") for k in (1, 5, 10, 20, 50)), "mrr_at_50", "coverage_at_10",
    }  # fmt: skip


def test_interval_by_hand() -> None:
    # recall@1 of four users, one hit: mean 1/4, sample variance (3/4 * 1/4) * 4/3 = 1/4
    metric = metrics.summarise(np.array([1, 0, 0, 0]))["recall_at_1"]
    assert (metric.mean, metric.n) == (0.25, 4)
    assert metric.low == pytest.approx(0.25 - 1.96 * 0.5 / 2, rel=1e-15)
    assert metric.high == pytest.approx(0.25 + 1.96 * 0.5 / 2, rel=1e-15)


def test_one_user_has_no_interval_and_none_is_an_error() -> None:
    metric = metrics.summarise(np.array([3]))["recall_at_5"]
    assert (metric.mean, metric.low, metric.high, metric.n) == (1.0, None, None, 1)
    with pytest.raises(ValueError, match="nobody"):
        metrics.summarise(np.array([], int))


def test_negative_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        metrics.per_user(np.array([1, -1]))


def test_coverage_counts_distinct_items_of_the_first_ten_slots() -> None:
    items = np.full((2, 50), -1)
    items[0, :3], items[1, :3] = [0, 1, 2], [2, 3, -1]
    items[1, 10:15] = [10, 11, 12, 13, 14]
    assert metrics.coverage(items, 20).mean == 4 / 20


def test_source_hash_is_of_the_file_with_the_definitions() -> None:
    with open(metrics.__file__, "rb") as file:
        assert metrics.source_hash() == hashlib.sha256(file.read()).hexdigest()


@given(RANKS)
def test_bounds_and_order(ranks: np.ndarray) -> None:
    values = metrics.per_user(ranks)
    for name, value in values.items():
        assert ((value >= 0) & (value <= 1)).all(), name
    for small, large in zip(metrics.CUTOFFS, metrics.CUTOFFS[1:], strict=False):
        assert (values[f"recall_at_{small}"] <= values[f"recall_at_{large}"]).all()
        assert (values[f"ndcg_at_{small}"] <= values[f"ndcg_at_{large}"]).all()
    for k in metrics.CUTOFFS:
        assert (values[f"ndcg_at_{k}"] <= values[f"recall_at_{k}"]).all()
    assert (values["mrr_at_50"] <= values["ndcg_at_50"]).all()
    assert np.array_equal(values["recall_at_1"], values["ndcg_at_1"])


@given(RANKS, st.randoms(use_true_random=False))
def test_the_order_of_users_does_not_matter(ranks: np.ndarray, random: object) -> None:
    order = np.array(random.sample(range(len(ranks)), len(ranks)))  # type: ignore[attr-defined]
    one, other = metrics.summarise(ranks), metrics.summarise(ranks[order])
    for name in metrics.PER_USER:
        assert one[name].mean == pytest.approx(other[name].mean, rel=1e-12, abs=1e-15)


@given(RANKS)
def test_a_better_rank_is_never_worse(ranks: np.ndarray) -> None:
    better = np.where(ranks > 1, ranks - 1, ranks)
    before, after = metrics.means(ranks), metrics.means(better)
    assert all(after[name] >= before[name] for name in metrics.PER_USER)


@given(
    st.integers(1, 20).flatmap(lambda users: st.tuples(
        st.lists(st.permutations(range(12)), min_size=users, max_size=users),
        st.lists(st.integers(0, 15), min_size=users, max_size=users))),
)  # fmt: skip
def test_ranks_agree_with_a_plain_loop(case: tuple[list[list[int]], list[int]]) -> None:
    lists, targets = case
    expected = [row.index(target) + 1 if target in row else 0 for row, target in zip(lists, targets, strict=True)]
    assert metrics.ranks(np.array(lists), np.array(targets)).tolist() == expected
