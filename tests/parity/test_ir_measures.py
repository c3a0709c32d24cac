"""Our metrics against ir-measures, an independent library: equal user by user, and in the mean over all users.

Lists have spent slots, users without any prediction, and tied scores that the method has broken; ir-measures gets the
order as scores that fall by one a slot.
"""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from harness import metrics

MEASURES = {
    **{f"recall_at_{k}": R @ k for k in metrics.CUTOFFS},
    **{f"ndcg_at_{k}": nDCG @ k for k in metrics.CUTOFFS},
    f"mrr_at_{metrics.MRR_CUTOFF}": RR @ metrics.MRR_CUTOFF,
}


def predictions(rng: np.random.Generator, users: int, items: int) -> np.ndarray:
    """Top 50 by scores of few distinct values, ties by the smaller number; then spent slots anywhere, and empty lists."""
    scores_UI = rng.integers(0, 4, (users, items))
    items_UK = np.argsort(-scores_UI, axis=1, kind="stable")[:, :50]
    items_UK = np.where(rng.random(items_UK.shape) < 0.2, -1, items_UK)
    items_UK[rng.random(users) < 0.1] = -1
    return items_UK


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_ir_measures(seed: int) -> None:
    rng = np.random.default_rng(seed)
    users, items = 300, 80
    items_UK, targets_U = predictions(rng, users, items), rng.integers(0, items, users)
    ranks_U = metrics.ranks(items_UK, targets_U)
    assert (ranks_U == 0).sum() > 20
    assert (ranks_U > 0).sum() > 100
    ours = metrics.per_user(ranks_U)

    qrels = [ir_measures.Qrel(str(user), str(target), 1) for user, target in enumerate(targets_U)]
    run = [
        ir_measures.ScoredDoc(str(user), str(item) if item >= 0 else f"spent {slot}", float(-slot))
        for user, row in enumerate(items_UK)
        for slot, item in enumerate(row)
        if (row >= 0).any()  # a user without a prediction is absent from the run, and must still count as 0
    ]
    assert set(MEASURES) == set(metrics.PER_USER)
    theirs = {name: np.full(users, np.nan) for name in MEASURES}
    by_measure = {measure: name for name, measure in MEASURES.items()}
    for value in ir_measures.iter_calc(list(MEASURES.values()), qrels, run):
        theirs[by_measure[value.measure]][int(value.query_id)] = value.value
    aggregate = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)

    summary = metrics.summarise(ranks_U)
    for name, measure in MEASURES.items():
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12, atol=0, err_msg=name)
        assert summary[name].mean == pytest.approx(aggregate[measure], rel=1e-12), name
