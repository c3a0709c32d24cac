"""Make the record of a run from the results of its stages, and score it.

In: a planned run, the results of its stages. Out: a ``Record``. This is where predictions and private targets meet.
"""

from __future__ import annotations

import datetime
import functools
from typing import Any

from harness import provenance, score
from harness import record as records
from harness.contract import PREDICTIONS, PROTOCOL, VALID_PREDICTIONS, ContractError, Domain, InvalidOutput
from harness.execute.stage import StageFolder
from harness.method import Method
from harness.paths import Paths
from harness.record import Record
from harness.runspec import PlannedRun, stage_folder_name
from harness.suite import read_domain_info
from harness.values import build


class Reporter:
    """Scores runs and writes their records; reads every domain once."""

    def __init__(self, paths: Paths, methods: dict[str, Method], environment: records.Environment, command: str = ""):
        self._paths, self._methods, self._environment, self._command = paths, methods, environment, command
        self._started = now()
        self._domain = functools.cache(self._read_domain)
        self._sources = functools.cache(lambda name: methods[name].source_hash(paths.project))

    def _read_domain(self, name: str) -> tuple[Domain, str]:
        """The public part, and the digest of the private targets."""
        public = Domain.read(self._paths.public(name))
        return public, score.targets_digest(score.read_targets(self._paths.private(name), public))

    def score_key(self, run: PlannedRun) -> str:
        public, targets = self._domain(run.domain)
        return score.score_key(run.fit_key, targets, public.protocol)

    def record(self, run: PlannedRun, results: list[dict[str, Any]], end: dict[str, Any]) -> Record:
        """The record of a run whose last stage came to ``end``. Scores it if all stages are ok.

        Raises ContractError for a damaged domain if there is something to score; a failure is recorded all the same.
        """
        state, reason, scored = end["state"], end.get("reason", ""), None
        info = read_domain_info(self._paths, run.domain)
        score_key = self._score_key_or_none(run) if state != "ok" else self.score_key(run)
        folder = StageFolder(self._paths.stages / run.method / stage_folder_name(run.stages[-1].name, run.stages[-1].key))
        if state == "ok":
            try:
                public, _ = self._domain(run.domain)
                scored = score.score(folder.out / PREDICTIONS, folder.out / VALID_PREDICTIONS, public, self._paths.private(run.domain))
            except InvalidOutput as error:
                state, reason = "invalid_output", str(error)
        if scored:
            score.write_ranks(self._paths.secret / "ranks" / f"{run.id}.npz", scored.ranks)
        meta = end.get("meta") or {}
        return Record(
            run=records.Run(id=run.id, fit_key=run.fit_key, score_key=score_key, stage_keys={s.name: s.key for s in run.stages}),
            method=self._method(run),
            domain=_card(info),
            protocol=records.PROTOCOLS[info.get("protocol", PROTOCOL)],
            seed=run.seed,
            budget=records.BudgetUsed(seconds=run.budget.seconds, memory=run.budget.memory, threads=run.budget.threads),
            status=records.Status(
                state=state,
                reason=reason,
                exit_code=end.get("exit_code"),
                signal=end.get("signal"),
                stage=end.get("stage"),
                log_tail=end.get("log_tail", ""),
            ),
            metrics=scored.metrics if scored else {},
            valid_metrics=scored.valid_metrics if scored else {},
            slices=scored.slices if scored else {},
            behaviour=(meta.get("extra") or {}) | (scored.behaviour if scored else {}),
            training=records.Training(**{name: meta[name] for name in records.Training.model_fields if name in meta}),
            cost=_cost(run, results, int(info["counts"].get("test_users", info["counts"]["users"]))),
            environment=self._where(results),
            provenance=self._provenance(results),
            artefacts=tuple(records.Artefact(**output) for output in end.get("outputs", [])),
            reference=self._reference(run, scored.metrics if scored else {}, bool(info.get("simulated"))),
            isolation=_isolation(results),
            precision=records.Precision(dtype=meta.get("precision") or run.precision, attention=meta.get("attention")),
        )

    def _method(self, run: PlannedRun) -> records.Method:
        file = self._methods[run.method].file
        return records.Method(
            name=run.method,
            config=run.config,
            title=run.title,
            lineage=file.lineage,
            paper=self._methods[run.method].config(run.config).paper,
            source_hash=self._sources(run.method),
            configuration=run.configuration,
        )

    def _where(self, results: list[dict[str, Any]]) -> records.Environment:
        """The machine and packages of the run's last stage: a record that is only scored again must not say that it ran here."""
        told = results[-1].get("environment") if results else None
        return build(records.Environment, told, "the stage's result") if told else self._environment

    def _provenance(self, results: list[dict[str, Any]]) -> records.Provenance:
        """Code and command that made the record, and when: from the start of the run's first stage."""
        sha, dirty = provenance.git_state()
        started = min((result["started"] for result in results if result.get("started")), default=self._started)
        return records.Provenance(git_sha=sha, dirty=dirty, command=self._command, started=started, finished=now())

    def _score_key_or_none(self, run: PlannedRun) -> str | None:
        try:
            return self.score_key(run)
        except (ContractError, OSError):
            return None

    def is_described(self, run: PlannedRun, record: Record) -> bool:
        """Whether a record says what ``method.toml`` says now of title, paper, lineage and published value, none of which is in a key."""
        method = self._method(run)
        same = (method.title, method.lineage, method.paper) == (record.method.title, record.method.lineage, record.method.paper)
        return same and record.reference == self._reference(run, record.metrics, record.domain.simulated)

    def _reference(self, run: PlannedRun, metrics: dict[str, records.Metric], simulated: bool) -> records.Reference | None:
        """The published value of this cell. Only a comparable one gets a verdict: does our interval reach it?"""
        published = self._methods[run.method].reference(run.domain, run.config)
        if published is None or simulated:
            return None
        verdict = None
        if published.comparable and metrics:
            low = [name for name, value in published.metrics.items() if name in metrics and (metrics[name].high or 0) < value]
            verdict = f"below: {', '.join(low)}" if low else "reached"
        return records.Reference(
            metrics=published.metrics, source=published.source, comparable=published.comparable, note=published.note, verdict=verdict
        )


def unfinished(result: dict[str, Any]) -> dict[str, Any]:
    """The result of a stage that was ended because the harness was stopped."""
    return result | {"state": "interrupted", "reason": "the harness was stopped; run the same command again to go on"}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _card(info: dict[str, Any]) -> records.DomainCard:
    counts = {name: int(info["counts"][name]) for name in ("users", "items", "interactions", "train_interactions")}
    return records.DomainCard(
        name=info["name"],
        digest=info["digest"],
        tie_rate=info.get("tie_rate"),
        simulated=bool(info.get("simulated")),
        release=info.get("release"),
        **counts,
    )


def _cost(run: PlannedRun, results: list[dict[str, Any]], users: int) -> records.Cost:
    if not results:
        return records.Cost()
    stages = {result["stage"]: result["seconds"] for result in results}
    metas = [result["meta"] for result in results]
    predict = metas[-1]["timings"].get("predict")
    fit = [meta["timings"].get("fit") for meta in metas]
    device = [meta["peak_device_bytes"] for meta in metas if meta["peak_device_bytes"] is not None]
    return records.Cost(
        stages=stages,
        shared_stages=tuple(stage.name for stage in run.stages if stage.domains != (run.domain,) and stage.name in stages),
        fit_seconds=sum(seconds or 0.0 for seconds in fit) if any(seconds is not None for seconds in fit) else None,
        predict_seconds=predict,
        users_per_second=users / predict if predict else None,
        cpu_seconds=sum(result["cpu_seconds"] for result in results),
        peak_memory=max(result["peak_memory"] for result in results),
        peak_device_memory=max(device) if device else None,
        parameters=metas[-1]["parameters"],
        beside=any(result["beside"] for result in results),
    )


def _isolation(results: list[dict[str, Any]]) -> records.Isolation:
    """The weakest level that any stage of the run had."""
    order = ("convention", "user", "landlock", "container")
    seen = [result["isolation"] for result in results if result.get("isolation")]
    if not seen:
        return records.Isolation(level="convention", network=False, details="nothing was started")
    weakest = min(seen, key=lambda isolation: order.index(isolation["level"]))
    return records.Isolation(**weakest)
