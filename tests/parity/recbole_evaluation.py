"""RecBole's own evaluation of given scores, in a process of its own (RecBole changes numpy for its whole process).

Usage: python recbole_evaluation.py IN.npz OUT.npz. In: ``scores`` [U, I], ``targets`` [U]. Out: ``items`` [U, 50], the
lists that the RecBole adapter makes of these scores, and one number for each metric of RecBole.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def evaluate(scores_UI: np.ndarray, targets_U: np.ndarray) -> dict[str, float]:
    import torch
    from recbole.config import Config
    from recbole.evaluator import Collector, Evaluator

    settings = {"metrics": ["Recall", "NDCG", "MRR", "ItemCoverage"], "topk": [1, 5, 10, 20, 50], "metric_decimal_place": 10, "gpu_id": ""}
    config = Config(model="BPR", dataset="none", config_dict=settings)
    collector = Collector(config)
    # Column 0 is RecBole's padding item.
    scores = torch.nn.functional.pad(torch.from_numpy(scores_UI), (1, 0), value=-torch.inf)
    for start in range(0, len(scores), 64):
        batch = scores[start : start + 64]
        positive = torch.from_numpy(targets_U[start : start + 64].astype(np.int64)) + 1
        collector.eval_batch_collect(batch, None, torch.arange(len(batch)), positive)
    collected = collector.get_data_struct()
    collected.set("data.num_items", scores.shape[1])
    return dict(Evaluator(config).evaluate(collected))


def main(source: str, target: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "baselines" / "recbole"))
    import library  # noqa: F401  (mends numpy for RecBole)
    import torch
    from train import top_k

    with np.load(source) as given:
        scores_UI, targets_U = given["scores"], given["targets"]
    values = {name: np.float64(value) for name, value in evaluate(scores_UI, targets_U).items()}
    np.savez(target, items=top_k(torch.from_numpy(scores_UI), 50).numpy(), **values)


if __name__ == "__main__":
    main(*sys.argv[1:])
