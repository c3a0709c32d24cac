"""The scheduler: what is taken as it is, what is scored again, and that shared stages run once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import provenance, score
from harness.environments import pythons
from harness.execute.local import LocalExecutor
from harness.execute.stage import StageFolder
from harness.method import find_methods
from harness.paths import Paths
from harness.record import read_records
from harness.schedule import Scheduler, Slot, make_slots, stage_folder
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


# --------------------------------------------------------------------------- what goes wrong in one run costs no other


@pytest.fixture
def instant(tmp_path: Path) -> Paths:
    paths = lab.make_paths(tmp_path, ["instant"])
    for name in ("small", "other"):
        lab.make_domain(paths, name)
    return paths


def instant_plan(paths: Paths, *domains: str) -> lab.Plan:
    plans = [lab.make_fake_plan(paths, [Entry(method="instant", configs=("default",))], domain=domain) for domain in domains]
    return plans[0].model_copy(update={"runs": tuple(run for plan in plans for run in plan.runs)})


def scheduler_of(plan: lab.Plan, paths: Paths, **more: Any) -> Scheduler:
    methods = find_methods(paths)
    return Scheduler(plan, paths, methods, LocalExecutor(paths), pythons(methods.values(), paths, print), **more)


@pytest.mark.parametrize("part", ["public/users.parquet", "private/targets.parquet"])
def test_a_damaged_domain_fails_its_own_runs_only(instant: Paths, part: str) -> None:
    plan = instant_plan(instant, "small", "other")
    instant.domain("small").joinpath(part).write_bytes(b"nonsense")
    records = scheduler_of(plan, instant).run([Slot()], lab.Silent())
    states = {record.domain.name: record.status for record in records.values()}
    assert states["other"].state == "ok"
    assert states["small"].state == "failed" and str(instant.domain("small")) in states["small"].reason
    assert set(read_records(instant.records)) == {run.id for run in plan.runs}


def test_an_observer_that_raises_costs_no_run(instant: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    class Closed(lab.Silent):
        def run_finished(self, *_: object) -> None:
            raise BrokenPipeError("the terminal is closed")

    plan = instant_plan(instant, "small", "other")
    records = scheduler_of(plan, instant).run([Slot()], Closed())
    assert [record.status.state for record in records.values()] == ["ok", "ok"]
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_method_without_its_environment_fails_with_that_reason(instant: Paths) -> None:
    records = scheduler_of(instant_plan(instant, "small"), instant, unready={"instant": "pip said no"}).run([Slot()], lab.Silent())
    status = next(iter(records.values())).status
    assert status.state == "failed" and "pip said no" in status.reason


@pytest.mark.parametrize("what", ["method", "domain"])
def test_what_changes_after_the_plan_was_made_gets_no_result_under_the_old_key(instant: Paths, what: str) -> None:
    plan = instant_plan(instant, "small")
    scheduler = scheduler_of(plan, instant)
    if what == "method":
        program = instant.methods[0] / "instant" / "run.py"
        program.write_text(program.read_text() + "\n# edited\n")
    else:
        shutil.rmtree(instant.domain("small"))
        lab.make_domain(instant, "small", seed=2)
    status = scheduler.run([Slot()], lab.Silent())[plan.runs[0].id].status
    assert status.state == "failed" and "changed since this command was started" in status.reason
    assert not stage_folder(instant, "instant", plan.runs[0].stages[-1]).result_path.exists()


def test_a_need_that_is_taken_back_is_no_reason_to_skip_for_ever(paths: Paths) -> None:
    """Needs are not in the fit key, so the skipped record has the same name as the run that can be done now."""
    file = paths.methods[0] / "slow" / "method.toml"
    content = file.read_text()
    file.write_text(content.replace('letter = "b"', 'letter = "b"\nneeds = ["cuda"]'))
    assert lab.carry_out(slow_plan(paths), paths)["b"].status.state == "skipped"
    file.write_text(content)
    assert lab.carry_out(slow_plan(paths), paths)["b"].ok


def test_scoring_again_elsewhere_keeps_the_machine_of_the_training(instant: Paths) -> None:
    plan = instant_plan(instant, "small")
    before = scheduler_of(plan, instant).run([Slot()], lab.Silent())[plan.runs[0].id]
    (instant.records / f"{plan.runs[0].id}.json").unlink()
    elsewhere = scheduler_of(plan, instant)
    elsewhere._reporter._environment = before.environment.model_copy(update={"hardware": "another", "cpu": "another"})
    assert elsewhere.score_finished(plan.runs[0])
    after = read_records(instant.records)[plan.runs[0].id]
    assert after.environment == before.environment and after.provenance.started == before.provenance.started


def _lists(value: object) -> list[list]:
    if isinstance(value, dict):
        return [found for inner in value.values() for found in _lists(inner)]
    if isinstance(value, list):
        return [value, *(found for inner in value for found in _lists(inner))]
    return []


def test_slots(paths: Paths) -> None:
    plan = slow_plan(paths)
    assert len(make_slots(plan, cpus=8, gpus=[], jobs=None)) == 8
    assert len(make_slots(plan, cpus=8, gpus=[], jobs=3)) == 3
    on_gpu = plan.model_copy(update={"runs": tuple(run.model_copy(update={"device": "cuda"}) for run in plan.runs)})
    assert [slot.gpu for slot in make_slots(on_gpu, cpus=8, gpus=[0, 1], jobs=None)] == [0, 1]
    assert [slot.gpu for slot in make_slots(on_gpu, cpus=8, gpus=["2", "3"], jobs=3)] == ["2", "3", "2"]


@pytest.mark.parametrize(
    ("value", "ids"), [(None, None), ("", []), ("-1", []), ("2,3", ["2", "3"]), ("1,-1,2", ["1"]), ("GPU-ab", ["GPU-ab"])]
)
def test_the_callers_choice_of_gpus_is_kept(monkeypatch: pytest.MonkeyPatch, value: str | None, ids: list[str] | None) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert provenance.visible_gpus() == ids


def test_a_stage_gets_the_values_that_its_key_names(paths: Paths) -> None:
    file = paths.methods[0] / "slow" / "method.toml"
    file.write_text(file.read_text().replace('name = "prepare"', 'name = "prepare"\nuses = []'))
    plan = slow_plan(paths)
    lab.carry_out(plan, paths)
    jobs = [json.loads((stage_folder(paths, "slow", stage).path / "job.json").read_text()) for stage in plan.runs[0].stages]
    assert [job["configuration"] for job in jobs] == [{}, {"letter": "a"}]


def test_a_published_value_added_later_stands_beside_the_old_result(instant: Paths) -> None:
    """Nothing is trained for it: what a record says of the paper is no part of a key."""
    before = lab.carry_out(instant_plan(instant, "small"), instant)["default"]
    file = instant.methods[0] / "instant" / "method.toml"
    file.write_text(file.read_text() + '\n[reference.small]\nmetrics = {recall_at_10 = 0.9}\nsource = "a paper"\ncomparable = true\n')
    observer = lab.Silent()
    after = lab.carry_out(instant_plan(instant, "small"), instant, observer=observer)["default"]
    assert observer.stages == [] and after.metrics == before.metrics
    assert before.reference is None and after.reference is not None and after.reference.verdict == "below: recall_at_10"
    assert lab.carry_out(instant_plan(instant, "small"), instant)["default"] == after
    file.write_text(file.read_text().replace("a paper", "another paper"))
    shutil.rmtree(instant.stages)  # with nothing to score, the record stands as it is
    assert lab.carry_out(instant_plan(instant, "small"), instant, observer=observer)["default"] == after and observer.stages == []


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
