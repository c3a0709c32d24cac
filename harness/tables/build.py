"""A plan and its records -> the comparison table as a value.

The plan says which rows and columns there must be, so a run without a record shows. A block (method x domain) has values
only if every one of its planned seeds is ok: a mean over the seeds that happened to survive is a mean over a hole.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean

from harness import metrics
from harness.contract import PROTOCOL
from harness.record import Environment, Record
from harness.runspec import Plan, PlannedRun
from harness.tables import text
from harness.tables.values import UNPLANNED, Block, Cell, Mark, Part, Published, Row, Table
from harness.values import ConfigError

TRIVIAL = ("popularity", "last_item")
_HUGE = 1e18
_ISOLATION = {
    "container": "in a container",
    "landlock": "kept from the answers by Landlock, not by a container",
    "user": "kept from the answers by the file rights of another user, not by a container",
    "convention": "kept from the answers by convention only: nothing stopped it from reading them",
}

Oracles = Mapping[str, Mapping[str, float]]


class Notes:
    """Footnotes in order of first use; the same text gets the same number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, note: str) -> int:
        return self._numbers.setdefault(note, len(self._numbers) + 1)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._numbers)


def build_table(plan: Plan, records: Mapping[str, Record], oracles: Oracles | None = None, simulated: Collection[str] = ()) -> Table:
    """The table of a plan. ``records`` by run id; ``oracles``: domain -> metric -> upper bound, simulated domains only.

    A domain is simulated if a record says so, if it has an oracle, or if it is named in ``simulated`` (which only
    matters for a domain that has no record at all). Raises ConfigError for a record of another protocol than the plan's.
    """
    oracles = oracles or {}
    for run in plan.runs:
        if (found := records.get(run.id)) and found.protocol.version != plan.protocol:
            raise ConfigError(
                f"the record {run.id} is of the protocol {found.protocol.version}, the suite {plan.suite} of {plan.protocol}: they are"
                " never mixed in a table; take the record away and run the suite again"
            )
    told = {run.domain for run in plan.runs if run.id in records and records[run.id].domain.simulated}
    made_up = told | set(oracles) | set(simulated)
    kinds = ((False, [d for d in plan.domains if d not in made_up]), (True, [d for d in plan.domains if d in made_up]))
    parts = tuple(_part(plan, records, domains, oracles, is_simulated) for is_simulated, domains in kinds if domains)
    return Table(plan.suite, text.clean(plan.title), parts)


def _part(plan: Plan, records: Mapping[str, Record], domains: Sequence[str], oracles: Oracles, simulated: bool) -> Part:
    runs: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in plan.runs:
        if run.domain in domains:
            runs.setdefault((run.title, run.domain), []).append(run)
    planned = [run for group in runs.values() for run in group]
    hardware = {records[run.id].environment.hardware for run in planned if run.id in records and records[run.id].ok}
    notes = Notes()
    rows = []
    for title in dict.fromkeys(run.title for run in planned):
        own = [run for domain in domains for run in runs.get((title, domain), ())]
        row_notes, isolation = _isolation([records[run.id] for run in own if run.id in records], notes)
        blocks = {
            domain: _block(runs.get((title, domain), []), records, plan.metrics, notes, several_machines=len(hardware) > 1)
            for domain in domains
        }
        average = _average([blocks[domain] for domain in domains], plan.metrics)
        label, method, config = (text.clean(name, 80) for name in (title, own[0].method, own[0].config))
        rows.append(Row(label, method, config, blocks, average, row_notes, isolation))
    return Part(
        title=text.clean(plan.title)
        + ("" if plan.protocol == PROTOCOL else f" (protocol {text.clean(plan.protocol)})")
        + (" (SIMULATED)" if simulated else ""),
        simulated=simulated,
        domains=tuple(domains),
        metrics=plan.metrics,
        rows=_marked(rows, domains, plan.metrics),
        oracle={domain: dict(oracles[domain]) for domain in domains if domain in oracles} if simulated else {},
        published=() if simulated else _published(runs, records),
        notes=notes.texts,
        warnings=() if simulated else _warnings(rows),
        counts=dict(Counter(_state(run, records, plan.metrics)[0] for run in planned)),
        protocol=plan.protocol,
    )


# ----------------------------------------------------------------------------------------------------------- blocks


def _state(run: PlannedRun, records: Mapping[str, Record], wanted: Iterable[str] = ()) -> tuple[str, str]:
    """State and reason of a planned run; an ok record that lacks a wanted metric counts as missing."""
    record = records.get(run.id)
    if record is None:
        return ("skipped", run.missing) if run.missing else ("missing", "no record; run the suite again")
    if record.ok and (absent := [name for name in wanted if name not in record.metrics]):
        return "missing", f"its record has no {', '.join(absent)}; score it again"
    return record.status.state, "" if record.ok else _reason(record)


def _reason(record: Record) -> str:
    status = record.status
    last_line = next((line for line in reversed(status.log_tail.splitlines()) if line.strip()), "")
    reason = status.reason or (f"ended by {status.signal}" if status.signal else "") or last_line
    if not reason and status.exit_code is not None:
        reason = f"exit status {status.exit_code}"
    return f"{reason or 'no reason given'}{f' (stage {status.stage})' if status.stage else ''}"


def _block(
    runs: Sequence[PlannedRun], records: Mapping[str, Record], names: Sequence[str], notes: Notes, *, several_machines: bool
) -> Block:
    if not runs:
        return Block(UNPLANNED, "not planned", 0, 0, dict.fromkeys(names, Cell()))
    states = [_state(run, records, names) for run in runs]
    done = [records[run.id] for run, (state, _) in zip(runs, states, strict=True) if state == "ok"]
    cells = {name: aggregate(done, name, len(runs)) for name in names}
    if len(done) < len(runs):
        bad = {state: reason for state, reason in reversed(states) if state != "ok"}  # the first reason of each state
        bad = dict(reversed(bad.items()))
        worst = next((state for state in bad if state != "skipped"), "skipped")
        label = ", ".join(map(text.state_word, bad))
        label = f"{len(done)}/{len(runs)} ok: {label}" if done else label
        own = tuple(notes.add(text.clean(f"{text.state_word(state)}: {reason}")) for state, reason in bad.items())
        return Block(worst, label, len(done), len(runs), cells, notes=own)
    own = ()
    if bound := sum(record.training.budget_bound for record in done):
        seeds = "" if bound == len(done) else f" ({bound} of {len(done)} seeds)"
        own = (notes.add(f"training was still improving when its time budget ended{seeds}"),)
    return Block("ok", "", len(done), len(runs), cells, _costs(done), own, _cost_notes(done, notes, several_machines))


def aggregate(done: Sequence[Record], name: str, planned: int) -> Cell:
    """Mean and sample deviation of a metric over seeds; no mean unless all planned seeds are there."""
    seeds = tuple((record.seed, record.metrics[name].mean) for record in done)
    if not seeds or len(seeds) < planned:
        return Cell(seeds=seeds)
    return _cell(seeds)


def _cell(seeds: tuple[tuple[int, float], ...]) -> Cell:
    mean = fmean(number for _, number in seeds)
    if len(seeds) == 1:
        return Cell(mean, None, seeds)
    squares = math.fsum((number - mean) ** 2 for _, number in seeds)  # statistics.stdev, in fractions, took half of the time
    return Cell(mean, math.sqrt(squares / (len(seeds) - 1)), seeds)


def _costs(done: Sequence[Record]) -> dict[str, float | None]:
    """Means over seeds; None where a record does not say. Numbers come from methods too, hence the ceiling."""
    result: dict[str, float | None] = {}
    for name in text.COST_HEADINGS:
        values = [getattr(record.cost, name) for record in done]
        result[name] = None if None in values else fmean(min(max(value, 0), _HUGE) for value in values)
    return result


def _cost_notes(done: Sequence[Record], notes: Notes, several_machines: bool) -> tuple[int, ...]:
    result = []
    if any(record.cost.beside for record in done):
        result.append(notes.add("timed while something else ran on the machine: not comparable"))
    if shared := sorted({stage for record in done for stage in record.cost.shared_stages}):
        result.append(notes.add(text.clean(f"stages taken from an earlier run: {', '.join(shared)}")))
    if several_machines:
        result += [notes.add(text.clean(machine)) for machine in sorted({_machine(record.environment) for record in done})]
    return tuple(sorted(result))


def _machine(environment: Environment) -> str:
    parts = f"{environment.gpu or environment.cpu}, {environment.cpus} CPUs, {environment.memory / 2**30:.0f} GiB"
    return f"timed on {parts} (hardware {environment.hardware}): timings compare only within the same hardware"


# ------------------------------------------------------------------------------------------------------------- rows


def _isolation(own: Sequence[Record], notes: Notes) -> tuple[tuple[int, ...], str]:
    """Footnotes of a row whose runs were not all in a container without network, and the levels for the CSV."""
    started = [record.isolation for record in own if record.status.state not in ("skipped", "missing")]
    kinds = sorted({(isolation.level, isolation.network) for isolation in started})
    numbers = [
        notes.add(_ISOLATION[level] + ("" if network else "; it could reach a network"))
        for level, network in kinds
        if level != "container" or not network
    ]
    return tuple(numbers), ", ".join(dict.fromkeys(level for level, _ in kinds))


def _average(blocks: Sequence[Block], names: Sequence[str]) -> dict[str, Cell]:
    """Means over several domains, by seed where all domains have the same seeds (else there is no spread to tell)."""
    if len(blocks) < 2 or any(block.state != "ok" for block in blocks):
        return {}
    result = {}
    for name in names:
        by_domain = [dict(block.cells[name].seeds) for block in blocks]
        if all(seeds.keys() == by_domain[0].keys() for seeds in by_domain):
            result[name] = _cell(tuple((seed, fmean(seeds[seed] for seeds in by_domain)) for seed in by_domain[0]))
        else:
            result[name] = Cell(fmean(fmean(seeds.values()) for seeds in by_domain))
    return result


def _marked(rows: Sequence[Row], domains: Sequence[str], names: Sequence[str]) -> tuple[Row, ...]:
    """Rows with the best and second best complete cell of every column marked."""
    columns: dict[tuple[str, str], list[Mark]] = {
        (domain, name): _marks([row.blocks[domain].cells[name].mean for row in rows], name) for domain in domains for name in names
    }
    averages = {name: _marks([row.average[name].mean if row.average else None for row in rows], name) for name in names}
    result = []
    for index, row in enumerate(rows):
        blocks = {}
        for domain, block in row.blocks.items():
            cells = {name: dataclasses.replace(cell, mark=columns[domain, name][index]) for name, cell in block.cells.items()}
            blocks[domain] = dataclasses.replace(block, cells=cells)
        average = {name: dataclasses.replace(cell, mark=averages[name][index]) for name, cell in row.average.items()}
        result.append(dataclasses.replace(row, blocks=blocks, average=average))
    return tuple(result)


def _marks(means: Sequence[float | None], name: str) -> list[Mark]:
    """Equal best values are all best, and then nobody is second. Nothing is marked where nothing differs, nor coverage,
    which describes a method and does not rank it."""
    levels = sorted({mean for mean in means if mean is not None}, reverse=True)
    if len(levels) < 2 or name not in metrics.PER_USER:
        return [""] * len(means)
    second = levels[1] if means.count(levels[0]) == 1 else None
    return ["" if mean is None else "best" if mean == levels[0] else "second" if mean == second else "" for mean in means]


# ------------------------------------------------------------------------------------------- published, warnings


def _published(runs: Mapping[tuple[str, str], Sequence[PlannedRun]], records: Mapping[str, Record]) -> tuple[Published, ...]:
    result = []
    for (title, domain), group in runs.items():
        found = [records[run.id] for run in group if run.id in records]
        reference = next((record.reference for record in found if record.reference), None)
        if reference is None:
            continue
        source, note = text.clean(reference.source), text.clean(reference.note)
        for name, number in reference.metrics.items():
            done = [record for record in found if record.ok and name in record.metrics]
            ours = aggregate(done, name, len(group))
            result.append(Published(text.clean(title, 80), domain, text.clean(name, 40), number, ours, reference.comparable, source, note))
    return tuple(result)


def _warnings(rows: Sequence[Row]) -> tuple[str, ...]:
    absent = [name for name in TRIVIAL if name not in {row.method for row in rows}]
    if not absent:
        return ()
    return (f"No row for {' and '.join(absent)}: on some data sets counting beats published models, so a table without it misleads.",)
