"""The harness's metrics equal RecBole's own on the same predictions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import metrics

SCRIPT = Path(__file__).with_name("recbole_evaluation.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of 300 users over 400 items by RecBole and by the harness; half of the targets score high."""
    folder = tmp_path_factory.mktemp("parity")
    rng = np.random.default_rng(5)
    scores_UI = rng.normal(size=(300, 400)).astype(np.float32)
    targets_U = rng.integers(400, size=300)
    scores_UI[np.arange(0, 300, 2), targets_U[::2]] += 3
    np.savez(folder / "in.npz", scores=scores_UI, targets=targets_U)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder / "in.npz"), str(folder / "out.npz")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "out.npz") as out:
        items_UK = out["items"]
        theirs = {name: float(out[name]) for name in out.files if name != "items"}
    ours = {name: value.mean for name, value in metrics.summarise(metrics.ranks(items_UK, targets_U)).items()}
    ours[metrics.COVERAGE] = metrics.coverage(items_UK, 400).mean
    return theirs, ours


@pytest.mark.parametrize("k", [1, 5, 10, 20, 50])
@pytest.mark.parametrize("name", ["recall", "ndcg"])
def test_recall_and_ndcg(both: tuple[dict[str, float], dict[str, float]], name: str, k: int) -> None:
    theirs, ours = both
    assert 0 < theirs[f"{name}@{k}"] < 1
    assert ours[f"{name}_at_{k}"] == pytest.approx(theirs[f"{name}@{k}"], abs=1e-6)


def test_mrr_and_coverage(both: tuple[dict[str, float], dict[str, float]]) -> None:
    theirs, ours = both
    assert ours["mrr_at_50"] == pytest.approx(theirs["mrr@50"], abs=1e-6)
    # RecBole counts its padding item as a part of the catalogue.
    assert ours["coverage_at_10"] * 400 == pytest.approx(theirs["itemcoverage@10"] * 401, abs=1e-6)
