"""Bring one MLflow run to what a view says, whatever state it is in.

In: a ``RunView``. Out: the same run on the server, found by the tag ``harness.run_id`` and changed only where it differs.
The digest is set after everything else: a run that has the right digest is complete, and one that was published
halfway has none and is completed. A run that cannot be mended in place (MLflow's parameters do not change, its metrics
do not go away) is deleted and made anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from harness.tracking.curves import Point
from harness.tracking.rest import Rest, TrackingError
from harness.tracking.view import OWN_TAGS, RunView

KEY, KIND, DIGEST, PARENT = "harness.run_id", "harness.kind", "harness.record_digest", "mlflow.parentRunId"
MAX_METRICS, MAX_PARAMS = 800, 100
"""Of a ``log-batch`` call: MLflow takes 1000 values, of which 100 parameters and 100 tags."""

Pieces = Callable[[], Iterable[list[Point]]]


class Store:
    """The runs of one experiment, as the harness keeps them. Not for use from several threads at once."""

    def __init__(self, rest: Rest, suite: str, title: str, warn: Callable[[str], None]):
        self.rest = rest
        self._warn = warn
        self._no_artifacts = False
        self.experiment_id = self._experiment(suite, title)
        self._runs: dict[str, dict[str, Any]] = {}
        self._listed = False

    @property
    def url(self) -> str:
        """The experiment's runs; without the last part MLflow opens its pages for language models."""
        return f"{self.rest.uri}/#/experiments/{self.experiment_id}/runs?workflowType=machine_learning"

    def close(self) -> None:
        self.rest.close()

    def load(self) -> None:
        """Read all runs of the experiment. Of two runs with one key, made by two harnesses at once, one stays."""
        self._runs, self._listed = {}, True
        for run in self.rest.search_runs(self.experiment_id):
            key = _tags(run).get(KEY)
            if key is None:
                continue
            if key in self._runs:
                run, spare = sorted((self._runs[key], run), key=_complete_then_oldest)
                self.delete(spare)
            self._runs[key] = run

    def find(self, key: str) -> dict[str, Any] | None:
        if key not in self._runs and not self._listed:
            for run in self.rest.search_runs(self.experiment_id, f"tags.`{KEY}` = '{_quoted(key)}'"):
                self._runs[key] = run
        return self._runs.get(key)

    def delete(self, run: Mapping[str, Any]) -> None:
        self.rest.call("POST", "runs/delete", {"run_id": run["info"]["run_id"]})

    def drop(self, key: str) -> None:
        """Delete the run of this key, if there is one."""
        if run := self.find(key):
            self.delete(run)
            del self._runs[key]

    def restart(self, view: RunView) -> str:
        """A fresh run for an attempt that starts now; an earlier attempt's run goes. Returns its id."""
        self.drop(view.key)
        self.bring(view)
        return str(self._runs[view.key]["info"]["run_id"])

    def bring(self, view: RunView, curves: Pieces | None = None, log: Callable[[], bytes | None] | None = None) -> str:
        """Make the server's run equal to the view: ``created``, ``updated``, ``replaced`` or ``unchanged``."""
        parent = self.find(view.parent) if view.parent else None
        tags = {KEY: view.key, KIND: view.kind, "mlflow.runName": view.name, **view.tags}
        if parent:
            tags[PARENT] = parent["info"]["run_id"]
        run, outcome = self.find(view.key), "updated"
        if run and _is_right(run, view, tags):
            return "unchanged"
        if run and not _mendable(run, view):
            self.delete(run)
            run, outcome = None, "replaced"
        if run is None:
            run, outcome = self._create(view, tags), "created" if outcome == "updated" else outcome
        run_id = run["info"]["run_id"]
        files = dict(view.artifacts)
        if log and (text := log()) is not None:
            files["log.txt"] = text
        self._upload(run, files)
        if view.datasets:
            self.rest.call("POST", "runs/log-inputs", {"run_id": run_id, "datasets": list(view.datasets)})
        self._log(run, view, tags, curves() if curves else ())
        # A live run stays RUNNING; for the others this is last, so that it never looks finished before it is.
        if run["info"]["status"] != view.status:
            end = max(view.end or int(time.time() * 1000), int(run["info"]["start_time"]))
            info = {"run_id": run_id, "status": view.status, "end_time": end}
            run["info"] = self.rest.call("POST", "runs/update", info)["run_info"]
        return outcome

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Points that are there already are left out by the server: key, value, time and step are their identity."""
        for start in range(0, len(points), MAX_METRICS):
            self._batch(run_id, [_metric(point) for point in points[start : start + MAX_METRICS]])

    def _batch(self, run_id: str, metrics: Sequence[Any], params: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        self.rest.call("POST", "runs/log-batch", {"run_id": run_id, "metrics": list(metrics), "params": list(params), "tags": list(tags)})

    def _experiment(self, suite: str, title: str) -> str:
        try:
            experiment = self.rest.call("GET", f"experiments/get-by-name?experiment_name={quote(suite, safe='')}")["experiment"]
        except TrackingError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return self._create_experiment(suite, title)
        experiment_id = str(experiment["experiment_id"])
        if experiment.get("lifecycle_stage") == "deleted":
            self.rest.call("POST", "experiments/restore", {"experiment_id": experiment_id})
        return experiment_id

    def _create_experiment(self, suite: str, title: str) -> str:
        tags = {"mlflow.note.content": title or suite, "mlflow.experimentKind": "custom_model_development"}
        try:
            answer = self.rest.call("POST", "experiments/create", {"name": suite, "tags": _pairs(tags)})
        except TrackingError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._experiment(suite, title)  # another harness was faster
        return str(answer["experiment_id"])

    def _create(self, view: RunView, tags: Mapping[str, str]) -> dict[str, Any]:
        start = view.start or int(time.time() * 1000)
        body = {"experiment_id": self.experiment_id, "run_name": view.name, "start_time": start, "tags": _pairs(tags)}
        run: dict[str, Any] = self.rest.call("POST", "runs/create", body)["run"]
        self._runs[view.key] = run
        return run

    def _upload(self, run: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            if self._no_artifacts:
                return
            try:
                self.rest.put_artifact(run["info"]["artifact_uri"], name, data)
            except TrackingError as error:
                if error.code != "NO_ARTIFACT_PROXY":
                    raise
                self._no_artifacts = True
                self._warn(str(error))

    def _log(self, run: dict[str, Any], view: RunView, tags: Mapping[str, str], curves: Iterable[list[Point]]) -> None:
        """Send what differs, in as few calls as MLflow allows. The digest is the last tag of the last call, and a call's
        tags are written after its values."""
        run_id, old_tags, old_params, old_metrics = run["info"]["run_id"], _tags(run), _params(run), _metrics(run)
        new_tags = {name: value for name, value in tags.items() if old_tags.get(name) != value}
        # Tags do not vanish from one attempt to the next; those that the view no longer has are emptied.
        new_tags |= {name: "" for name, value in old_tags.items() if value and name in OWN_TAGS and name not in tags}
        if view.digest:
            new_tags[DIGEST] = view.digest
        new_metrics = _changed(old_metrics, view)
        new_params = {name: value for name, value in view.params.items() if name not in old_params}
        values, params = list(new_metrics.values()), _pairs(new_params)
        for points in curves:
            values += [_metric(point) for point in points]
            while len(values) > MAX_METRICS:
                self._batch(run_id, values[:MAX_METRICS])
                del values[:MAX_METRICS]
        while len(params) > MAX_PARAMS:
            self._batch(run_id, (), params[:MAX_PARAMS])
            del params[:MAX_PARAMS]
        if values or params or new_tags:
            self._batch(run_id, values, params, _pairs(new_tags))
        known = list({**old_metrics, **new_metrics}.values())
        run["data"] = {"tags": _pairs({**old_tags, **new_tags}), "params": _pairs({**old_params, **new_params}), "metrics": known}


def _metric(point: Point) -> dict[str, Any]:
    return {"key": point.name, "value": point.value, "timestamp": point.time, "step": point.step}


def _changed(old: Mapping[str, Mapping[str, Any]], view: RunView) -> dict[str, dict[str, Any]]:
    """The view's metrics that are new or other than before. A changed one gets a later time than the old value: of two at
    the same step and time MLflow would show the larger."""
    moment = view.end or int(time.time() * 1000)
    out = {}
    for name, value in view.metrics.items():
        before = old.get(name)
        if before is None or before["value"] != value:
            stamp = moment if before is None else max(moment, int(before["timestamp"]) + 1)
            out[name] = {"key": name, "value": value, "timestamp": stamp, "step": 0}
    return out


def _mendable(run: Mapping[str, Any], view: RunView) -> bool:
    params = _params(run)
    if any(view.params.get(name) != value for name, value in params.items()):
        return False
    return all(name in view.metrics for name in _metrics(run) if "/" not in name)


def _is_right(run: Mapping[str, Any], view: RunView, tags: Mapping[str, str]) -> bool:
    there = _tags(run)
    same = there.get(DIGEST) == view.digest and there.get(PARENT) == tags.get(PARENT)
    return bool(view.digest) and same and run["info"]["status"] == view.status


def _complete_then_oldest(run: Mapping[str, Any]) -> tuple[bool, int, str]:
    return DIGEST not in _tags(run), int(run["info"]["start_time"]), run["info"]["run_id"]


def _tags(run: Mapping[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag.get("value", "") for tag in run["data"].get("tags", [])}


def _params(run: Mapping[str, Any]) -> dict[str, str]:
    return {param["key"]: param.get("value", "") for param in run["data"].get("params", [])}


def _metrics(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {metric["key"]: metric for metric in run["data"].get("metrics", [])}


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _quoted(text: str) -> str:
    return text.replace("'", "")
