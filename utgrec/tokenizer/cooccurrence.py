"""Which items occur next to each other (UTGRec section 3.4): the positives of alignment and of co-occurrence reconstruction.

In: the training part x_1..x_(n-2) of every user. Out: for each item the set of its direct neighbours, before or after it, in anyone's
list, and draws from that set: uniform over the set, however often two items met.

Legend: I items, E edges, B items that are drawn for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.contract import Ragged


@dataclass(frozen=True)
class Neighbours:
    """``of[i]``: the neighbours of item i, ascending; an empty list for an item without."""

    of: Ragged
    """I lists of item numbers."""

    @classmethod
    def of_training(cls, train: Ragged, n_items: int) -> Neighbours:
        """From lists of items, oldest first."""
        follows = np.ones(max(len(train.values) - 1, 0), bool)
        ends = train.offsets[1:-1] - 1  # the last item of a list has no next one
        follows[ends[(ends >= 0) & (ends < len(follows))]] = False
        a_E, b_E = (side[follows].astype(np.int64) for side in (train.values[:-1], train.values[1:]))
        different = a_E != b_E
        a_E, b_E = a_E[different], b_E[different]
        pairs_E = np.unique(np.concatenate([a_E * n_items + b_E, b_E * n_items + a_E]))
        counts_I = np.bincount(pairs_E // n_items, minlength=n_items)
        return cls(Ragged((pairs_E % n_items).astype(np.int32), np.concatenate([[0], np.cumsum(counts_I)])))

    def draw(self, items_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One neighbour of each item; an item without neighbour gets itself. [B]"""
        count_B, first_B = self.of.lengths[items_B], self.of.offsets[items_B]
        place_B = first_B + (rng.random(len(items_B)) * count_B).astype(np.int64)
        drawn_B = np.append(self.of.values, 0)[np.where(count_B > 0, place_B, len(self.of.values))]
        return np.where(count_B > 0, drawn_B, items_B).astype(np.int32)
