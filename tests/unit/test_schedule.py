"""The scheduler: what is taken as it is, what is scored again, and that shared stages run once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from harness import score
from harness.execute.stage import StageFolder
from harness.method import find_methods
from harness.paths import Paths
from harness.record import read_records
from harness.schedule import make_slots, stage_folder
from harness.suite import Entry
from tests.faults import lab


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = lab.make_paths(tmp_path, ["slow"])
    lab.make_domain(paths)
    return paths


def slow_plan(paths: Paths, **changes: object) -> lab.Plan:
    return lab.make_fake_plan(paths, [Entry(method="slow", configs=("a", "b"))], seconds=30, grace=30, **changes)


def test_the_second_run_runs_nothing(paths: Paths) -> None:
    first, second = lab.Silent(), lab.Silent()
    records = lab.carry_out(slow_plan(paths), paths, observer=first)
    assert len(first.stages) == 4
    assert lab.carry_out(slow_plan(paths), paths, observer=second) == records
    assert second.stages == []


def test_a_new_metric_definition_scores_again_and_trains_nothing(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lab.carry_out(slow_plan(paths), paths)
    monkeypatch.setattr(score, "_source_hash", lambda: "another definition")
    observer = lab.Silent()
    after = lab.carry_out(slow_plan(paths), paths, observer=observer)
    assert observer.stages == []
    assert after["a"].run.fit_key == before["a"].run.fit_key and after["a"].run.score_key != before["a"].run.score_key
    assert after["a"].metrics == before["a"].metrics


def test_a_lost_record_is_made_again_from_the_predictions(paths: Paths) -> None:
    before = lab.carry_out(slow_plan(paths), paths)
    for path in paths.records.glob("*.json"):
        path.write_text(path.read_text()[:100])
    observer = lab.Silent()
    after = lab.carry_out(slow_plan(paths), paths, observer=observer)
    assert observer.stages == [] and after["b"].metrics == before["b"].metrics


def test_lost_predictions_are_made_again(paths: Paths) -> None:
    plan = slow_plan(paths)
    lab.carry_out(plan, paths)
    run = plan.runs[0]
    out = stage_folder(paths, run.method, run.stages[-1]).out
    out.chmod(0o755)
    (out / "predictions.npz").unlink()
    (paths.records / f"{run.id}.json").unlink()
    observer = lab.Silent()
    assert lab.carry_out(plan, paths, observer=observer)["a"].ok
    assert observer.stages == [run.id]


def test_a_finished_stage_is_read_only_and_its_files_are_listed(paths: Paths) -> None:
    plan = slow_plan(paths)
    records = lab.carry_out(plan, paths)
    folder = stage_folder(paths, "slow", plan.runs[0].stages[-1])
    assert folder.out.stat().st_mode & 0o222 == 0
    assert all(path.stat().st_mode & 0o222 == 0 for path in folder.out.iterdir())
    assert {artefact.path for artefact in records["a"].artefacts} == {"predictions.npz", "valid_predictions.npz", "meta.json"}
    assert not folder.scratch.exists() and not folder.checkpoint.exists()


def test_ranks_are_kept_where_only_the_harness_reads(paths: Paths) -> None:
    records = lab.carry_out(slow_plan(paths), paths)
    folder = paths.secret / "ranks"
    assert folder.stat().st_mode & 0o077 == 0
    ranks = score.read_ranks(folder / f"{records['a'].run.id}.npz")
    assert len(ranks) == 120
    assert np.mean((ranks > 0) & (ranks <= 10)) == pytest.approx(records["a"].metrics["recall_at_10"].mean)


def test_a_need_that_is_not_met_is_a_skipped_record_and_starts_nothing(paths: Paths) -> None:
    file = paths.methods[0] / "slow" / "method.toml"
    file.write_text(file.read_text().replace('letter = "b"', 'letter = "b"\nneeds = ["cuda"]'))
    observer = lab.Silent()
    records = lab.carry_out(slow_plan(paths), paths, observer=observer)
    assert records["b"].status.state == "skipped" and "GPU" in records["b"].status.reason
    assert len(observer.stages) == 2


def test_a_shared_stage_runs_once(paths: Paths) -> None:
    file = paths.methods[0] / "slow" / "method.toml"
    file.write_text(file.read_text().replace('name = "prepare"', 'name = "prepare"\nuses = []'))
    lab.carry_out(slow_plan(paths), paths)
    notes = (paths.caches / "slow" / "notes.txt").read_text().splitlines()
    assert sum(line.startswith("start") and line.endswith("prepare") for line in notes) == 1


def test_the_records_hold_no_answers(paths: Paths) -> None:
    """A record names means and counts, never a user's target or rank."""
    lab.carry_out(slow_plan(paths), paths)
    for path in paths.records.glob("*.json"):
        longest = max((len(value) for value in _lists(json.loads(path.read_text()))), default=0)
        assert longest < 10


def _lists(value: object) -> list[list]:
    if isinstance(value, dict):
        return [found for inner in value.values() for found in _lists(inner)]
    if isinstance(value, list):
        return [value, *(found for inner in value for found in _lists(inner))]
    return []


def test_slots(paths: Paths) -> None:
    plan = slow_plan(paths)
    assert len(make_slots(plan, cpus=8, gpus=0, jobs=None)) == 8
    assert len(make_slots(plan, cpus=8, gpus=0, jobs=3)) == 3
    on_gpu = plan.model_copy(update={"runs": tuple(run.model_copy(update={"device": "cuda"}) for run in plan.runs)})
    assert [slot.gpu for slot in make_slots(on_gpu, cpus=8, gpus=2, jobs=None)] == [0, 1]


def test_every_record_on_disk_is_one_of_the_plan(paths: Paths) -> None:
    plan = slow_plan(paths, seeds=2)
    lab.carry_out(plan, paths)
    assert set(read_records(paths.records)) == {run.id for run in plan.runs}
    assert find_methods(paths)["slow"].name == "slow"


def test_a_resumed_stage_keeps_its_curve_and_a_fresh_one_does_not(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "stage")
    folder.out.mkdir(parents=True)
    (folder.out / "progress.jsonl").write_text("line\n")
    folder.clear()
    assert list(folder.out.iterdir()) == []
    (folder.out / "progress.jsonl").write_text("line\n")
    (folder.out / "half.npz").write_text("x")
    (folder.checkpoint / "weights").write_text("x")
    folder.clear()
    assert [path.name for path in folder.out.iterdir()] == ["progress.jsonl"]
    assert (folder.checkpoint / "weights").exists()
