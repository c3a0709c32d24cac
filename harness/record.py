"""The record: the JSON that every planned run leaves, above all the failed one.

Records are the truth of the benchmark. MLflow, tables and the report are views that can be rebuilt from them.
In: a folder of ``RUN_ID.json``. Out: ``Record`` values. A record is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from harness.contract import PROTOCOL, TIME, write_json
from harness.values import ConfigError, Frozen, build

SCHEMA = 1

State = Literal["ok", "skipped", "failed", "timeout", "oom", "invalid_output", "interrupted", "missing"]
CACHED_STATES = ("ok", "skipped")
"""States that a later run of the same plan takes as they are; all others are tried again."""


class Run(Frozen):
    """Which run this is. ``id`` is the file name: method, configuration, domain, seed and the start of the fit key."""

    id: str
    fit_key: str
    score_key: str | None = None
    stage_keys: dict[str, str] = {}


class Method(Frozen):
    name: str
    config: str
    title: str
    """The row label in tables."""
    lineage: str
    paper: str = ""
    source_hash: str
    configuration: dict[str, Any]
    """The resolved hyper-parameters, defaults included."""


class DomainCard(Frozen):
    name: str
    digest: str
    users: int
    items: int
    interactions: int
    train_interactions: int
    tie_rate: float | None = None
    """Share of neighbouring interactions with equal time; None where the source gives no times."""
    simulated: bool = False
    release: str | None = None


class Protocol(Frozen):
    version: str = PROTOCOL
    split: str = "leave-one-out: last = test, second last = validation"
    order: str = "timestamp, then original row order"
    history: int = 20
    history_mask: bool = False
    candidates: Literal["all"] = "all"
    k: int = 50


PROTOCOLS = {
    PROTOCOL: Protocol(),
    TIME: Protocol(
        version=TIME,
        split="two global cuts: the first event of a user after the test cut = test, the first between the cuts = validation",
    ),
}
"""What a record says of each protocol. A record that names none was made under ``loo-v1``."""


class BudgetUsed(Frozen):
    """What the run was allowed: training seconds, memory in bytes, threads."""

    seconds: float
    memory: int
    threads: int


class Status(Frozen):
    state: State
    reason: str = ""
    exit_code: int | None = None
    signal: str | None = None
    stage: str | None = None
    """The stage that ended the run."""
    log_tail: str = ""


class Metric(Frozen):
    """A mean over users with its 95 % interval, mean ± 1.96 s/√n. Coverage has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int


class Slice(Frozen):
    """Users of one slice: how many, and the means of the metrics over them."""

    n: int
    metrics: dict[str, float] = {}


class Training(Frozen):
    """What the method says of its training (``meta.json``); the harness passes it on, it does not vouch for it."""

    best_valid: float | None = None
    stopped_by: str | None = None
    budget_bound: bool = False
    steps: int | None = None
    epochs: int | None = None


class Cost(Frozen):
    """``stages``: wall seconds by stage as the supervisor measured them; ``shared_stages``: those taken from an earlier run."""

    stages: dict[str, float] = {}
    shared_stages: tuple[str, ...] = ()
    fit_seconds: float | None = None
    predict_seconds: float | None = None
    users_per_second: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    peak_device_memory: int | None = None
    parameters: int | None = None
    beside: bool = False
    """True if anything else ran at the same time: the timings are flagged."""


class Environment(Frozen):
    """``hardware``: timings compare only between records with the same value."""

    hardware: str
    cpu: str
    cpus: int
    memory: int
    gpu: str | None = None
    driver: str | None = None
    os: str = ""
    python: str = ""
    image: str | None = None
    lock: str | None = None
    packages: dict[str, str] = {}


class Provenance(Frozen):
    git_sha: str | None = None
    dirty: bool | None = None
    command: str = ""
    started: str = ""
    finished: str = ""


class Artefact(Frozen):
    path: str
    sha256: str
    bytes: int


class Reference(Frozen):
    """A published value beside ours. ``verdict`` is derived, never typed: it stays None where not comparable."""

    metrics: dict[str, float]
    source: str
    comparable: bool = False
    note: str = ""
    verdict: str | None = None


class Isolation(Frozen):
    """By which means the method was kept from the answers: ``container``, ``landlock``, ``user`` or ``convention``."""

    level: Literal["container", "landlock", "user", "convention"]
    network: bool = True
    """True if the method could not reach a network."""
    details: str = ""


class Precision(Frozen):
    dtype: str = "fp32"
    tf32: bool = False
    attention: str | None = None


class Record(Frozen):
    version: int = SCHEMA
    run: Run
    method: Method
    domain: DomainCard
    protocol: Protocol = Protocol()
    seed: int
    budget: BudgetUsed
    status: Status
    metrics: dict[str, Metric] = {}
    valid_metrics: dict[str, float] = {}
    slices: dict[str, dict[str, Slice]] = {}
    behaviour: dict[str, float | int | str | bool | None] = {}
    """Invalid slots, coverage, and what the method says of itself (collision rate, beam width, ...)."""
    training: Training = Training()
    cost: Cost = Cost()
    environment: Environment
    provenance: Provenance = Provenance()
    artefacts: tuple[Artefact, ...] = ()
    reference: Reference | None = None
    isolation: Isolation
    precision: Precision = Precision()

    @property
    def ok(self) -> bool:
        return self.status.state == "ok"


def write_record(folder: Path, record: Record) -> Path:
    """Write ``folder/RUN_ID.json`` atomically and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.run.id}.json"
    write_json(path, record.model_dump(mode="json"))
    return path


def read_record(path: Path) -> Record:
    """Raises ConfigError naming the file when it is not a record of this version."""
    try:
        data = path.read_bytes()
        with contextlib.suppress(ValidationError):  # the fast way in; what it refuses is explained by `build` below
            return Record.model_validate_json(data)
        raw = json.loads(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a record ({error}); delete it and run again") from error
    return build(Record, raw, path)


def read_records(folder: Path, run_ids: Iterable[str] | None = None, *, broken: dict[str, ConfigError] | None = None) -> dict[str, Record]:
    """Records by run id: all in the folder, or those named (absent ones are left out).

    A file that is no record raises, or lands in ``broken`` when that is given: one torn file must not cost the table.
    """
    if run_ids is None:
        paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    else:
        paths = [path for run_id in run_ids if (path := folder / f"{run_id}.json").exists()]
    with _out_of_the_collectors_sight(many=len(paths) >= MANY):
        records = {}
        for path in paths:
            try:
                records[path.stem] = read_record(path)
            except ConfigError as error:
                if broken is None:
                    raise
                broken[path.stem] = error
        return records


MANY = 1000


@contextlib.contextmanager
def _out_of_the_collectors_sight(many: bool) -> Iterator[None]:
    """Pause the cyclic collector while records are read, and spare it many of them afterwards (``gc.freeze``).

    Records hold no cycles. Walking over those read so far again and again took four fifths of the time of reading
    10,000, and walking over all of them took another second in what came next.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if many:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
