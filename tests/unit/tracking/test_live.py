"""While runs run: live curves, a server that is not there, another harness beside us."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import mlflow_server
from harness.tracking import Tracker, live, pending, publish, publishing
from harness.tracking.rest import Rest, TrackingError
from tests.unit.tracking import examples as ex
from tests.unit.tracking.examples import Local, example, no_logs, nowhere, table_files


def test_live_and_afterwards_are_the_same(server: Local, tmp_path: Path) -> None:
    """Curves show while the run runs, and in the end the server holds what a publish from the records would give."""
    name, later = "live", "later"
    plan = ex.plan_of(name, ("sasrec",), seeds=1)
    run, record = plan.runs[0], ex.record_of(plan.runs[0])
    tracker = Tracker(plan, tmp_path)
    tracker.start()
    tracker.run_started(run)
    path = ex.stage_folder(tmp_path, run) / "out" / "progress.jsonl"
    tracker.follow(run, path)
    with open(path, "w") as file:
        for step in range(8):
            file.write(ex.progress_line(step, loss=1.0 / (step + 1)))
        file.write('{"time": 1, "st')  # a line that is being written
        file.flush()
        held = wait_for(lambda: shown(server, name, run.id, "fit/loss"))
        assert held["status"] == "RUNNING"
        assert held["tags"]["state"] == "running"
        assert len(held["history"]["fit/loss"]) == 8
        file.write('ep": 8}\n' + ex.progress_line(9, loss=0.05))
    ex.write_records(tmp_path, {run.id: record})
    tracker.run_finished(record)
    url = tracker.finish(table_files(tmp_path))
    tracker.close()
    assert tracker.warnings == []
    assert url == tracker.summary.url
    publish(plan.model_copy(update={"suite": later, "title": plan.title}), {run.id: record}, no_logs, tmp_path, table_files(tmp_path))
    live_contents, later_contents = server.held(name, ids=False), server.held(later, ids=False)
    for key in (run.id, "sasrec.paper.toys"):
        assert live_contents[key] == later_contents[key]
    assert [point[0] for point in live_contents[run.id]["history"]["fit/loss"]] == [*range(8), 9]
    assert live_contents[f"comparison.{name}"]["artifacts"] == later_contents[f"comparison.{later}"]["artifacts"]


def shown(server: Local, suite: str, key: str, metric: str) -> dict[str, Any] | None:
    held = server.held(suite).get(key)
    return held if held and metric in held["history"] else None


def wait_for(look: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.3)
    raise AssertionError("it never came")


def test_a_new_attempt_starts_afresh(server: Local, suite: str, tmp_path: Path) -> None:
    """The curve of an attempt that failed does not run on in the curve of the next one."""
    plan = ex.plan_of(suite, ("sasrec",), seeds=1)
    run = plan.runs[0]
    path = ex.write_stage(tmp_path, run, steps=30)
    publish(plan, {run.id: ex.record_of(run, "oom", reason="killed")}, no_logs, tmp_path, {})
    assert len(server.held(suite)[run.id]["history"]["fit/loss"]) == 30
    path.write_text(ex.progress_line(0, time=ex.SECOND + 999, loss=2.0))
    record = ex.record_of(run)
    ex.write_records(tmp_path, {run.id: record})
    tracker = Tracker(plan, tmp_path)
    tracker.start()
    tracker.run_started(run)
    tracker.follow(run, path)
    tracker.run_finished(record)
    tracker.finish({})
    tracker.close()
    held = server.held(suite)[run.id]
    assert held["history"]["fit/loss"] == [(0, (ex.SECOND + 999) * 1000, 2.0)]
    assert held["tags"]["state"] == "ok"


def test_without_a_server_runs_go_on_and_nothing_is_lost(server: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere())
    monkeypatch.setattr(mlflow_server, "REACH_TIMEOUT", 0.2)
    plan, records = example("down", tmp_path)
    said: list[str] = []
    tracker = Tracker(plan, tmp_path, warn=said.append)
    tracker.start()
    for run in plan.runs:
        tracker.run_started(run)
        tracker.follow(run, tmp_path / "nothing.jsonl")
        tracker.run_finished(records[run.id])
    assert tracker.finish(table_files(tmp_path)) is None
    tracker.close()
    assert len(said) == 1
    assert "does not answer" in said[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    summary = publish(plan, records, no_logs, tmp_path, table_files(tmp_path))
    assert summary.created == 7
    held = server.held("down")
    assert all(len(held[run.id]["history"]["fit/loss"]) == 5 for run in plan.runs)


def test_a_server_that_goes_away_is_made_good_at_the_end(
    server: Local, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, records = example(suite, tmp_path)
    send, gone = Rest._send, False

    def sometimes(self: Rest, *args: Any) -> Any:
        if gone:
            raise ConnectionRefusedError("gone")
        return send(self, *args)

    monkeypatch.setattr(Rest, "_send", sometimes)
    tracker = Tracker(plan, tmp_path)
    tracker.start()
    tracker.run_started(plan.runs[0])
    wait_for(lambda: plan.runs[0].id in server.held(suite))
    gone = True
    for run in plan.runs:
        tracker.run_finished(records[run.id])
    wait_for(lambda: tracker.warnings)
    gone = False
    assert tracker.finish({}) is not None
    tracker.close()
    assert len(tracker.warnings) == 1
    held = server.held(suite)
    assert {run.id: held[run.id]["tags"]["state"] for run in plan.runs} == {key: record.status.state for key, record in records.items()}
    assert pending(plan, records, tmp_path) == []


def test_curves_go_on_when_the_server_is_back(server: Local, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a long run, without any other event; what came in between is there when the run has ended."""
    monkeypatch.setattr(live, "RETRY_SECONDS", 0.2)
    plan = ex.plan_of(suite, ("sasrec",), seeds=1)
    run = plan.runs[0]
    send, gone = Rest._send, False

    def sometimes(self: Rest, *args: Any) -> Any:
        if gone and threading.current_thread().name == "mlflow":
            raise ConnectionRefusedError("gone")
        return send(self, *args)

    monkeypatch.setattr(Rest, "_send", sometimes)
    path = ex.write_stage(tmp_path, run, steps=0)
    tracker = Tracker(plan, tmp_path)
    tracker.start()
    tracker.run_started(run)
    tracker.follow(run, path)
    with open(path, "a", buffering=1) as file:
        file.write(ex.progress_line(1, loss=1))
        wait_for(lambda: steps(server, suite, run.id) == [1])
        gone = True
        file.write(ex.progress_line(2, loss=1))
        wait_for(lambda: tracker.warnings)
        gone = False
        file.write(ex.progress_line(3, loss=1))
        wait_for(lambda: steps(server, suite, run.id) == [1, 3])
    ex.write_records(tmp_path, {run.id: ex.record_of(run)})
    tracker.run_finished(ex.record_of(run))
    tracker.finish({})
    tracker.close()
    assert steps(server, suite, run.id) == [1, 2, 3]
    assert len(tracker.warnings) == 1


def steps(server: Local, suite: str, key: str) -> list[int]:
    return [point[0] for point in server.held(suite).get(key, {}).get("history", {}).get("fit/loss", [])]


def test_a_run_of_another_harness_is_left_alone(server: Local, suite: str, tmp_path: Path) -> None:
    """Without a record it is either running elsewhere, which its session tells, or it was killed."""
    plan = ex.plan_of(suite, ("sasrec",), seeds=2)
    tracker = Tracker(plan, tmp_path)
    tracker.start()
    for run in plan.runs:
        tracker.run_started(run)
    wait_for(lambda: all(shown_status(server, suite, run.id) == "RUNNING" for run in plan.runs))
    tracker.close()
    held = server.held(suite)
    sessions = {plan.runs[0].id: f"{socket.gethostname()}:{os.getppid()}", plan.runs[1].id: f"{socket.gethostname()}:{dead_process()}"}
    for key, session in sessions.items():
        server.call("POST", "runs/set-tag", {"run_id": held[key]["id"], "key": publishing.SESSION, "value": session})
    publish(plan, {}, no_logs, tmp_path, {})
    assert shown_status(server, suite, plan.runs[0].id) == "RUNNING"
    assert shown_status(server, suite, plan.runs[1].id) == "FAILED"


def shown_status(server: Local, suite: str, key: str) -> str | None:
    held = server.held(suite).get(key)
    return held["status"] if held else None


def dead_process() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_two_harnesses_on_one_suite(server: Local, suite: str, tmp_path: Path) -> None:
    """Each runs a half, both show their runs at the same time, and the last one to end leaves the whole in order."""
    plan, records = example(suite, tmp_path)
    for record in records.values():
        (tmp_path / "records" / f"{record.run.id}.json").unlink()
    trackers = [Tracker(plan, tmp_path), Tracker(plan, tmp_path)]
    for number, run in ((1, plan.runs[3]), (0, plan.runs[0]), (1, plan.runs[1])):
        trackers[number].start()
        trackers[number].run_started(run)
        wait_for(lambda key=run.id: key in started(server, suite))
    parent = plan.runs[0].id.partition(".s1")[0]
    assert started(server, suite).count(parent) == 2, "the case in question: neither knew of the other's parent run"
    for number, run in enumerate(plan.runs):
        ex.write_records(tmp_path, {run.id: records[run.id]})
        trackers[number % 2].run_finished(records[run.id])
    for tracker in trackers:
        assert tracker.finish(table_files(tmp_path)) is not None
        tracker.close()
    held = server.held(suite)
    assert len(held) == 7
    for run in plan.runs:
        assert held[run.id]["tags"]["state"] == records[run.id].status.state
        assert held[run.id]["tags"]["mlflow.parentRunId"] == f"{run.method}.paper.toys"
    assert pending(plan, records, tmp_path, table_files(tmp_path)) == []


def started(server: Local, suite: str) -> list[str]:
    """The runs of a suite as the server lists them, twins included."""
    try:
        experiment = server.call("GET", f"experiments/get-by-name?experiment_name={suite}")["experiment"]["experiment_id"]
    except TrackingError:
        return []
    found = server.call("POST", "runs/search", {"experiment_ids": [experiment]}).get("runs", [])
    return [tag["value"] for run in found for tag in run["data"]["tags"] if tag["key"] == "harness.run_id"]


def test_a_local_server_that_cannot_start_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, records = example("hopeless", tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tries = []

    def broken(*_: object, **__: object) -> mlflow_server.Server:
        tries.append(1)
        raise mlflow_server.ServerError("the MLflow server did not start")

    monkeypatch.setattr(mlflow_server, "ensure", broken)
    tracker = Tracker(plan, tmp_path, warn=lambda _: None)
    tracker.start()
    tracker.run_started(plan.runs[0])
    tracker.run_finished(records[plan.runs[0].id])
    assert tracker.finish({}) is None
    tracker.close()
    assert len(tries) == len(tracker.warnings) == 1
    assert len(pending(plan, records, tmp_path, {})) == 7


def test_with_nothing_new_no_server_is_asked_for(server: Local, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, records = example(suite, tmp_path)
    files = table_files(tmp_path)
    publish(plan, records, no_logs, tmp_path, files)
    monkeypatch.setattr(mlflow_server, "ensure", None)
    tracker = Tracker(plan, tmp_path)
    tracker.start()
    assert tracker.finish(files) is None
    tracker.close()
    assert tracker.warnings == []
