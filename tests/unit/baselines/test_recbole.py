"""RecBole's models as programs under the contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.baselines.conftest import load_configuration

CHANCE = 10 / 120  # recall@10 of a random list on the small domain


def small(name: str, **changes: Any) -> dict[str, Any]:
    """A configuration shrunk for the small domain."""
    values = load_configuration("recbole", name)
    values |= {"epochs": 12, "train_batch_size": 64, "learning_rate": 0.005}
    for key in ("hidden_size", "embedding_size", "inner_size"):
        if key in values:
            values[key] = 32
    return {**values, **changes}


def test_sasrec_learns_and_repeats_itself(small_domain: Any, runner: Any) -> None:
    configuration = small("sasrec_ce", hidden_dropout_prob=0.1, attn_dropout_prob=0.1)
    first = runner.run("recbole", small_domain, configuration)
    second = runner.run("recbole", small_domain, configuration)
    assert np.array_equal(first.items, second.items)
    assert np.array_equal(first.valid_items, second.valid_items)
    assert small_domain.recall_at_10(first.items) > 3 * CHANCE
    assert first.meta.best_valid > 0.1
    assert first.meta.stopped_by in ("epochs", "patience")
    assert (first.output / "progress.jsonl").read_text().count("valid_ndcg_at_10") == first.meta.epochs
    assert sorted(p.name for p in first.output.iterdir()) == ["meta.json", "predictions.npz", "progress.jsonl", "valid_predictions.npz"]
