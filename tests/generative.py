"""A small world for the tests and benchmarks of decoding: random ids, a random T5, random histories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from harness.contract import Ragged
from utgrec.recommender.data import FIRST_USER, Histories
from utgrec.recommender.model import T5, Shape
from utgrec.recommender.trie import Trie
from utgrec.semantic_ids import SemanticIds


@dataclass
class World:
    ids: SemanticIds
    model: T5
    histories: Histories
    trie: Trie

    @property
    def first_code(self) -> int:
        return FIRST_USER + self.histories.user_tokens


def world(
    *,
    items: int,
    users: int,
    widths: tuple[int, ...] = (6, 5, 4),
    books: tuple[int, ...] | None = None,
    unique: bool = True,
    longest: int = 20,
    shortest: int = 1,
    seed: int = 0,
    **shape: int,
) -> World:
    """``items`` random tuples (all different if ``unique``); every user has ``shortest`` to ``longest`` random items."""
    rng = np.random.default_rng(seed)
    numbers_I = rng.choice(np.prod(widths, dtype=np.int64), items, replace=not unique)
    ids = SemanticIds.of(np.stack(np.unravel_index(numbers_I, widths), 1), widths, books)
    counts_U = rng.integers(shortest, longest + 1, users)
    offsets = np.concatenate([[0], np.cumsum(counts_U)]).astype(np.int64)
    histories = Histories(Ragged(rng.integers(0, items, offsets[-1]).astype(np.int32), offsets), ids, np.arange(users))
    torch.manual_seed(seed)
    model = T5(Shape(vocabulary=histories.vocabulary, **shape)).eval()
    with torch.no_grad():  # norms that are not all 1, as after training
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.7, 1.4)
    return World(ids, model, histories, Trie.of(ids))


TINY = dict(d_model=24, d_ff=40, heads=3, d_kv=8, encoder_layers=2, decoder_layers=3)
"""The shape of a T5 for tests."""
