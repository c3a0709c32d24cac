"""Publishing to a real MLflow server: what is there after all that can go wrong on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness import mlflow_server
from harness.record import Record
from harness.runspec import Plan
from harness.tracking import pending, publish
from harness.tracking.rest import Rest, TrackingDown, TrackingError
from tests.unit.tracking import examples as ex
from tests.unit.tracking.examples import Local, example, no_logs, nowhere, table_files


def test_layout(server: Local, suite: str, tmp_path: Path) -> None:
    """Read back with the real client: parents, children, the comparison, metrics, parameters, tags, inputs, artifacts."""
    plan, records = example(suite, tmp_path)
    summary = publish(plan, records, no_logs, tmp_path, table_files(tmp_path))
    assert (summary.created, summary.updated, summary.replaced, summary.unchanged) == (7, 0, 0, 0)
    held = server.held(suite)
    assert len(held) == 7
    first, second = plan.runs[0], plan.runs[1]
    child = held[first.id]
    assert child["status"] == "FINISHED"
    assert child["tags"]["mlflow.parentRunId"] == "popularity.paper.toys"
    assert child["history"]["recall_at_10"] == [(0, 1767323105000, pytest.approx(0.12, abs=1e-12))]
    assert child["history"]["valid_ndcg_at_10"][0][2] == pytest.approx(0.15)
    assert child["history"]["cost_fit_seconds"][0][2] == 12.0
    assert child["history"]["behaviour_beam width"][0][2] == 50
    assert [point[0] for point in child["history"]["fit/loss"]] == [0, 1, 2, 3, 4]
    assert child["params"]["optimizer.betas"] == "[0.9, 0.98]"
    assert child["params"]["dropout_1"] == "null"
    wanted_tags = {"state": "ok", "isolation": "landlock", "hardware": "cpu-2", "domain_digest": "sha256:" + "d" * 64, "simulated": "false"}
    wanted_tags |= {"git_sha": "a" * 40, "fit_key": first.fit_key, "seed": "1", "harness.run_id": first.id}
    assert wanted_tags.items() <= child["tags"].items()
    assert child["inputs"][0][:2] == ("toys", "d" * 36)
    assert json.loads(child["artifacts"]["record.json"]) == records[first.id].model_dump(mode="json")
    assert child["artifacts"]["log.txt"] == f"log of {first.id}\n".encode()
    parent = held["popularity.paper.toys"]
    means = [records[run.id].metrics["ndcg_at_10"].mean for run in (first, second)]
    assert parent["history"]["ndcg_at_10"][0][2] == pytest.approx(sum(means) / 2)
    assert parent["history"]["ndcg_at_10_sd"][0][2] == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))


def test_a_failed_run_has_its_status_and_no_metric(server: Local, suite: str, tmp_path: Path) -> None:
    """And its parent has no mean: nothing is averaged over a hole."""
    plan, records = example(suite, tmp_path)
    publish(plan, records, no_logs, tmp_path, {})
    held = server.held(suite)
    failed, parent = held[plan.runs[-1].id], held["sasrec.paper.toys"]
    assert failed["status"] == parent["status"] == "FAILED"
    assert failed["tags"]["state"] == "timeout"
    assert failed["tags"]["reason"] == "the deadline of 120 s passed"
    assert parent["tags"]["reason"] == "1 of 2 seeds timeout: the deadline of 120 s passed"
    assert [name for name in failed["history"] if "/" not in name] == []
    assert parent["history"] == {}
    assert held[f"comparison.{suite}"]["status"] == "FAILED"
    assert "fit/loss" in failed["history"], "the curve of a failed run tells why it failed"


def test_a_run_without_a_record_shows(server: Local, suite: str, tmp_path: Path) -> None:
    plan, records = example(suite, tmp_path)
    absent = plan.runs[0].id
    del records[absent]
    publish(plan, records, no_logs, tmp_path, {})
    held = server.held(suite)
    assert held[absent]["status"] == "FAILED"
    assert held[absent]["tags"]["state"] == "missing"
    publish(plan, {**records, absent: ex.record_of(plan.runs[0])}, no_logs, tmp_path, {})
    found = server.held(suite)[absent]
    assert found["status"] == "FINISHED"
    assert found["tags"]["state"] == "ok"
    assert found["tags"]["reason"] == ""
    assert "recall_at_10" in found["history"]


def test_the_comparison_is_a_real_mlflow_table(server: Local, suite: str, tmp_path: Path) -> None:
    import mlflow

    plan, records = example(suite, tmp_path)
    rows = [
        {"method": "POPULARITY", "recall_at_10": 0.1, "state": "ok"},
        {"method": "SASREC", "recall_at_10": float("nan"), "state": "timeout"},
    ]
    publish(plan, records, no_logs, tmp_path, table_files(tmp_path), rows)
    mlflow.set_tracking_uri(server.uri)
    found = mlflow.search_runs(experiment_names=[suite], filter_string="tags.`harness.kind` = 'comparison'")
    mlflow.set_experiment(suite)
    table = mlflow.load_table("comparison.json", run_ids=list(found["run_id"]))
    assert list(table.columns) == ["method", "recall_at_10", "state"]
    assert table["recall_at_10"][0] == 0.1
    assert table["recall_at_10"].isna()[1]
    child = found_by_key(suite, plan.runs[0].id)
    history = mlflow.MlflowClient(server.uri).get_metric_history(child, "fit/valid_ndcg_at_10")
    assert [(point.step, point.value) for point in history] == [(step, step / 100) for step in range(5)]
    assert mlflow.artifacts.load_dict(f"runs:/{child}/record.json")["seed"] == 1
    by_metric = mlflow.search_runs(experiment_names=[suite], filter_string="metrics.`recall_at_10` > 0.13 and tags.`harness.kind` = 'seed'")
    assert sorted(by_metric["tags.harness.run_id"]) == sorted(run.id for run in plan.runs[1:3])
    held = server.held(suite)[f"comparison.{suite}"]["artifacts"]
    assert set(held) == {"comparison.json", "comparison.png", "comparison.svg", "table.md", "table.html", "table.csv", "table.tex"}
    assert held["comparison.png"].startswith(b"\x89PNG")
    assert b"<svg" in held["comparison.svg"]


def found_by_key(suite: str, key: str) -> str:
    import mlflow

    return str(mlflow.search_runs(experiment_names=[suite], filter_string=f"tags.`harness.run_id` = '{key}'")["run_id"][0])


def test_publishing_twice_changes_nothing(server: Local, suite: str, tmp_path: Path) -> None:
    plan, records = example(suite, tmp_path)
    files = table_files(tmp_path)
    publish(plan, records, no_logs, tmp_path, files)
    before = server.held(suite)
    (tmp_path / "mlflow" / "published.json").unlink()  # the server itself is asked, not the note
    summary = publish(plan, records, no_logs, tmp_path, files)
    assert (summary.created, summary.updated, summary.replaced, summary.unchanged) == (0, 0, 0, 7)
    assert server.held(suite) == before


def test_a_rescored_record_updates_its_run(server: Local, suite: str, tmp_path: Path) -> None:
    """In place, to a lower value: MLflow by itself would go on showing the higher one of two at the same step."""
    plan, records = example(suite, tmp_path)
    publish(plan, records, no_logs, tmp_path, {})
    run = plan.runs[0]
    before = server.held(suite)[run.id]
    lower = ex.record_of(run, value=0.05)
    summary = publish(plan, {**records, run.id: lower}, no_logs, tmp_path, {})
    assert (summary.created, summary.updated, summary.replaced, summary.unchanged) == (0, 3, 0, 4)
    after = server.held(suite)[run.id]
    assert after["id"] == before["id"]
    assert {name: after["shown"][name] for name in ex.METRICS} == {name: metric.mean for name, metric in lower.metrics.items()}
    assert after["history"]["fit/loss"] == before["history"]["fit/loss"]
    assert json.loads(after["artifacts"]["record.json"])["metrics"]["recall_at_10"]["mean"] == pytest.approx(0.07)


def test_metrics_that_no_longer_hold_go_away(server: Local, suite: str, tmp_path: Path) -> None:
    plan, records = example(suite, tmp_path)
    publish(plan, records, no_logs, tmp_path, {})
    run = plan.runs[0]
    invalid = ex.record_of(run, "invalid_output", reason="item 7 stands twice in the list of user 3")
    summary = publish(plan, {**records, run.id: invalid}, no_logs, tmp_path, {})
    assert summary.replaced == 2, "the seed, and its parent whose mean is gone"
    held = server.held(suite)
    assert [name for name in held[run.id]["history"] if "/" not in name] == []
    assert held["popularity.paper.toys"]["history"] == {}
    siblings = [key for key, value in held.items() if value["tags"]["mlflow.parentRunId"] == "popularity.paper.toys"]
    assert sorted(siblings) == sorted(r.id for r in plan.runs[:2]), "the other seed has moved to the new parent"


class Killed(BaseException):
    """Ends a publish as a signal would: no handler of ours may run on."""


@pytest.mark.parametrize(
    ("calls", "answer_lost"),
    [(1, False), (2, True), (4, True), *((n, False) for n in range(5, 18)), (7, True), (11, True), (13, True), (18, False)],
)
def test_killed_halfway_then_published_again(
    server: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any], calls: int, answer_lost: bool
) -> None:
    """Killed at any request, before it is sent or after it is done: the second publish ends with the very same contents."""
    suite = f"killed-{calls}-{answer_lost}"
    plan, records = small_example(suite, tmp_path)
    send, count = Rest._send, 0

    def dying(self: Rest, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            if answer_lost:
                send(self, *args)
            raise Killed
        return send(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Rest, "_send", dying)
        with pytest.raises(Killed):
            publish(plan, records, no_logs, tmp_path, {})
    publish(plan, records, no_logs, tmp_path, {})
    found = server.held(suite, ids=False)
    comparison = found.pop(f"comparison.{suite}")
    assert found == {key: held for key, held in whole.items() if not key.startswith("comparison.")}
    assert set(comparison["artifacts"]) == {"comparison.json", "comparison.png", "comparison.svg"}


def small_example(suite: str, results: Path) -> tuple[Plan, dict[str, Record]]:
    plan = ex.plan_of(suite, ("sasrec",), seeds=1)
    ex.write_stage(results, plan.runs[0])
    return plan, {plan.runs[0].id: ex.record_of(plan.runs[0])}


@pytest.fixture(scope="module")
def whole(running: Local, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the server holds after a publish that nothing disturbed."""
    results = tmp_path_factory.mktemp("whole")
    plan, records = small_example("undisturbed", results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", running.uri)
        publish(plan, records, no_logs, results, {})
    return running.held("undisturbed", ids=False)


def test_pending_needs_no_server(server: Local, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, records = example(suite, tmp_path)
    files = table_files(tmp_path)
    assert len(pending(plan, records, tmp_path, files)) == 7
    publish(plan, records, no_logs, tmp_path, files)
    monkeypatch.setattr(Rest, "_send", None)
    monkeypatch.setattr(mlflow_server, "ensure", None)
    assert pending(plan, records, tmp_path, files) == []
    run = plan.runs[0]
    changed = {**records, run.id: ex.record_of(run, value=0.3)}
    assert set(pending(plan, changed, tmp_path, files)) == {run.id, "popularity.paper.toys", f"comparison.{suite}"}
    files["html"].write_text("<table><tr></tr></table>")
    assert pending(plan, records, tmp_path, files) == [f"comparison.{suite}"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert len(pending(plan, records, tmp_path, files)) == 7, "another server has nothing of it"


def test_two_runs_for_one_id_become_one(server: Local, suite: str, tmp_path: Path) -> None:
    """Two harnesses can create a run at the same moment; the next publish leaves one, the complete one."""
    plan, records = example(suite, tmp_path)
    publish(plan, records, no_logs, tmp_path, {})
    before = server.held(suite)
    experiment = server.call("GET", f"experiments/get-by-name?experiment_name={suite}")["experiment"]["experiment_id"]
    tags = [{"key": "harness.run_id", "value": plan.runs[0].id}]
    server.call("POST", "runs/create", {"experiment_id": experiment, "start_time": 1, "tags": tags})
    publish(plan, records, no_logs, tmp_path, {})
    assert server.held(suite) == before


def test_a_deleted_experiment_comes_back(server: Local, suite: str, tmp_path: Path) -> None:
    plan, records = example(suite, tmp_path)
    publish(plan, records, no_logs, tmp_path, {})
    experiment = server.call("GET", f"experiments/get-by-name?experiment_name={suite}")["experiment"]["experiment_id"]
    server.call("POST", "experiments/delete", {"experiment_id": experiment})
    publish(plan, records, no_logs, tmp_path, {})
    assert len(server.held(suite)) == 7


def test_a_reader_s_tags_stay(server: Local, suite: str, tmp_path: Path) -> None:
    plan, records = example(suite, tmp_path)
    publish(plan, records, no_logs, tmp_path, {})
    run = plan.runs[0]
    run_id = server.held(suite)[run.id]["id"]
    server.call("POST", "runs/set-tag", {"run_id": run_id, "key": "my note", "value": "odd"})
    publish(plan, {**records, run.id: ex.record_of(run, value=0.4)}, no_logs, tmp_path, {})
    assert server.held(suite)[run.id]["tags"]["my note"] == "odd"


def test_large_configurations_and_texts_fit(server: Local, suite: str, tmp_path: Path) -> None:
    """More parameters than a call takes, values longer than MLflow keeps, names that it refuses."""
    plan = ex.plan_of(suite, ("sasrec",), seeds=1)
    configuration = {f"p{i}": i for i in range(250)} | {"long": "x" * 20000, "a@b/../c": 1, "n": {"e": {"s": {"t": [1, {"x": 2}]}}}}
    run = plan.runs[0].model_copy(update={"configuration": configuration})
    plan = plan.model_copy(update={"runs": (run,)})
    record = ex.record_of(run, "failed", reason="y" * 20000)
    for _ in range(2):
        publish(plan, {run.id: record}, no_logs, tmp_path, {})
    held = server.held(suite)[run.id]
    assert len(held["params"]) == 253
    assert held["params"]["a_b_.._c"] == "1"
    assert held["params"]["n.e.s.t"] == '[1, {"x": 2}]'
    assert len(held["params"]["long"]) == 6000
    assert held["tags"]["reason"].startswith("yyy")


def test_the_log_is_cut_at_its_head(server: Local, suite: str, tmp_path: Path) -> None:
    plan = ex.plan_of(suite, ("sasrec",), seeds=1)
    run = plan.runs[0]
    log = tmp_path / "log.txt"
    log.write_bytes(b"first\n" + b"x" * (1 << 20) + b"\nlast\n")
    publish(plan, {run.id: ex.record_of(run)}, {run.id: log}.get, tmp_path, {})
    text = server.held(suite)[run.id]["artifacts"]["log.txt"]
    assert text.startswith(b"[...]\n")
    assert text.endswith(b"\nlast\n")
    assert len(text) == (1 << 20) + 6


def test_refusals_name_the_mend() -> None:
    with pytest.raises(TrackingDown, match="does not answer"):
        Rest(nowhere()).call("GET", "experiments/search")


def test_a_server_without_artifact_proxy_is_named(server: Local) -> None:
    with pytest.raises(TrackingError, match="--artifacts-destination"):
        Rest(server.uri).put_artifact("s3://bucket/1/abc/artifacts", "x", b"")


def test_a_password_is_never_shown() -> None:
    rest = Rest("http://me:secret@127.0.0.1:1/base/")
    assert rest.uri == "http://127.0.0.1:1/base"
    with pytest.raises(TrackingDown) as caught:
        rest.call("GET", "experiments/search")
    assert "secret" not in str(caught.value)
