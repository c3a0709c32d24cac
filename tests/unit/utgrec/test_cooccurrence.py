"""Neighbours: the specification's example, a plain loop, draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from harness.contract import Ragged
from utgrec.tokenizer.cooccurrence import Neighbours


def ragged(lists: list[list[int]]) -> Ragged:
    values = np.array([value for one in lists for value in one], np.int32)
    return Ragged(values, np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64))


def plain(lists: list[list[int]], n_items: int) -> list[list[int]]:
    found: list[set[int]] = [set() for _ in range(n_items)]
    for one in lists:
        for a, b in itertools.pairwise(one):
            if a != b:
                found[a].add(b)
                found[b].add(a)
    return [sorted(of) for of in found]


def test_v7() -> None:
    """u1: a b c d e, u2: c a f b, u3: b c g h a; the last two of each user are no training interactions."""
    a, b, c, d, e, f, g, h = range(8)
    neighbours = Neighbours.of_training(ragged([[a, b, c], [c, a], [b, c, g]]), 8)
    assert [of.tolist() for of in neighbours.of] == [[b, c], [a, c], [a, b, g], [], [], [], [c], []]
    alone = np.array([d, e, f, h])
    assert neighbours.draw(alone, np.random.default_rng(0)).tolist() == alone.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_as_a_plain_loop_finds_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 30, rng.integers(0, 8)).tolist() for _ in range(60)]  # empty lists, repeats, items without anyone
    assert [of.tolist() for of in Neighbours.of_training(ragged(lists), 33).of] == plain(lists, 33)


@pytest.mark.parametrize("lists", [[], [[]], [[3]], [[], [1, 2], []]])
def test_short_lists(lists: list[list[int]]) -> None:
    assert [of.tolist() for of in Neighbours.of_training(ragged(lists), 4).of] == plain(lists, 4)


def test_draws_are_uniform_over_the_set_however_often_two_met() -> None:
    neighbours = Neighbours.of_training(ragged([[0, 1]] * 50 + [[0, 2], [3, 0]]), 4)
    drawn = neighbours.draw(np.zeros(30_000, np.int64), np.random.default_rng(1))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.015)


def test_the_same_generator_draws_the_same() -> None:
    neighbours = Neighbours.of_training(ragged([[0, 1, 2, 3, 0, 2]]), 4)
    items = np.arange(4).repeat(10)
    draws = [neighbours.draw(items, np.random.default_rng(7)) for _ in range(2)]
    assert np.array_equal(*draws)
