"""The comparison table: what it says, and that it never says more than the records do."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev

import pytest
from rich.console import Console

from harness import record
from harness.table import FORMATS, Table, build_table, to_csv, to_html, to_latex, to_markdown, to_rich, write_tables
from harness.tables import latex, markdown, text
from harness.tables.layout import grids
from harness.tables.values import Cell, Part
from harness.values import ConfigError
from tests.unit.table_examples import plan, planned, recorded, status, table_inputs, trivial

R10 = "recall_at_10"


def only_part(table: Table) -> Part:
    (part,) = table.parts
    return part


def cell(table: Table, title: str, domain: str = "office", metric: str = R10) -> Cell:
    return next(row for row in only_part(table).rows if row.title == title).blocks[domain].cells[metric]


def printed(table: Table, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(to_rich(table))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def every_format(table: Table) -> dict[str, str]:
    return {"rich": printed(table)} | {suffix: render(table) for suffix, render in FORMATS.items()}


# ------------------------------------------------------------------------------------------------------------ values


def test_protocols_are_named_and_never_mixed() -> None:
    run = planned("A", "office")
    assert only_part(build_table(plan(run), {run.id: recorded(run)})).title == "A toy suite"
    timed = plan(run).model_copy(update={"protocol": "time-v1"})
    by_time = recorded(run, protocol=record.PROTOCOLS["time-v1"])
    table = build_table(timed, {run.id: by_time})
    for name, out in every_format(table).items():
        assert "time-v1" in out.replace("{-}", "-"), name
    for wrong, found in ((timed, recorded(run)), (plan(run), by_time)):
        with pytest.raises(ConfigError, match=r"of the protocol .* never mixed in a table"):
            build_table(wrong, {run.id: found})


def test_mean_and_sample_deviation_over_seeds() -> None:
    table = build_table(*table_inputs({("A", "office"): [0.1, 0.2, 0.4], ("B", "office"): [0.3]}))
    assert cell(table, "A").mean == pytest.approx(0.7 / 3, rel=1e-15)
    assert cell(table, "A").spread == pytest.approx(stdev([0.1, 0.2, 0.4]), rel=1e-14)
    assert cell(table, "A").seeds == ((1, 0.1), (2, 0.2), (3, 0.4))
    assert cell(table, "B").spread is None
    out = every_format(table)
    assert "0.2333±.1528" in out["rich"]
    assert "0.3000±–" in out["rich"]
    assert "0.2333 ±.1528" in out["md"].replace("<u>", "").replace("</u>", "")
    assert [row.seeds for row in only_part(table).rows] == ["3", "1"]


def test_one_failed_seed_of_three_names_the_cell_and_takes_it_out_of_everything() -> None:
    runs = [planned("A", seed=seed) for seed in (1, 2, 3)] + [planned("B", seed=seed) for seed in (1, 2, 3)] + [planned("C")]
    records = {run.id: recorded(run, 0.9 if run.title == "A" else 0.2) for run in runs[:-1]}
    records[runs[-1].id] = recorded(runs[-1], 0.1)
    records[runs[1].id] = recorded(runs[1], status=status("timeout", "no end after 60 s", stage="fit"))
    table = build_table(plan(*runs), records)
    block = only_part(table).rows[0].blocks["office"]
    assert (block.state, block.label, block.ok, block.planned) == ("timeout", "2/3 ok: timeout", 2, 3)
    assert block.cost == {}
    assert cell(table, "A").mean is None
    assert cell(table, "A").mark == ""
    assert cell(table, "B").mark == "best"
    assert cell(table, "C").mark == "second"
    for name, out in every_format(table).items():
        assert "0.9000" not in out, name
        if name != "csv":  # which has columns for state, ok and planned instead
            assert "2/3 ok: timeout" in out, name
        assert "no end after 60 s (stage fit)" in out, name


@pytest.mark.parametrize("state", ["failed", "timeout", "oom", "invalid_output", "interrupted", "missing"])
def test_every_bad_state_is_named_with_its_reason(state: record.State) -> None:
    run, other = planned("A"), planned("B")
    records = {run.id: recorded(run, status=status(state, "because of that")), other.id: recorded(other)}
    for name, out in every_format(build_table(plan(run, other), records)).items():
        assert text.state_word(state) in out or state in out, name
        assert "because of that" in out, name


def test_a_planned_run_without_record_is_missing() -> None:
    run, other = planned("A"), planned("B")
    table = build_table(plan(run, other), {other.id: recorded(other)})
    assert only_part(table).rows[0].blocks["office"].state == "missing"
    assert only_part(table).counts == {"missing": 1, "ok": 1}
    assert "no record" in to_markdown(table)


def test_skipped_is_not_a_failure() -> None:
    run, never = planned("A"), planned("B", missing="the domain has no pictures")
    table = build_table(plan(run, never, planned("C")), {run.id: recorded(run, status=status("skipped", "needs item text"))})
    labels = [row.blocks["office"].label for row in only_part(table).rows]
    assert labels == ["n/a", "n/a", "missing"]
    for name, out in every_format(table).items():
        assert "needs item text" in out, name
        assert "the domain has no pictures" in out, name


def test_different_states_of_one_cell_are_all_named() -> None:
    runs = [planned("A", seed=seed) for seed in (1, 2, 3)]
    states = {1: status("skipped", "x"), 2: status("oom", "y"), 3: status("failed", "z")}
    block = only_part(build_table(plan(*runs), {run.id: recorded(run, status=states[run.seed]) for run in runs})).rows[0].blocks["office"]
    assert block.label == "n/a, oom, failed"
    assert block.state == "oom"
    assert len(block.notes) == 3


def test_an_ok_record_without_the_metric_is_not_taken_for_a_zero() -> None:
    run = planned("A")
    table = build_table(plan(run), {run.id: recorded(run, metrics={"recall_at_5": record.Metric(mean=0.5, n=1)})})
    assert only_part(table).rows[0].blocks["office"].state == "missing"
    assert only_part(table).counts == {"missing": 1}
    assert "score it again" in to_markdown(table)


def test_a_failure_without_reason_shows_what_is_known() -> None:
    runs = [planned(title) for title in "ABCD"]
    known = [
        status("failed", log_tail="Traceback\nValueError: the last line\n\n"),
        status("failed", signal="SIGSEGV", log_tail="noise"),
        status("failed", exit_code=3),
        status("failed"),
    ]
    notes = only_part(build_table(plan(*runs), {run.id: recorded(run, status=s) for run, s in zip(runs, known, strict=True)})).notes
    assert notes == ("failed: ValueError: the last line", "failed: ended by SIGSEGV", "failed: exit status 3", "failed: no reason given")


# ----------------------------------------------------------------------------------------------- marks and averages


def test_best_and_second() -> None:
    table = build_table(*table_inputs({("A", "office"): [0.3], ("B", "office"): [0.2], ("C", "office"): [0.1]}))
    assert [cell(table, title).mark for title in "ABC"] == ["best", "second", ""]
    assert "**0.3000**" in to_markdown(table)
    assert "<u>0.2000</u>" in to_markdown(table)
    assert r"\textbf{0.3000}" in to_latex(table)
    assert r"\underline{0.2000}" in to_latex(table)
    assert '<span class="best">0.3000</span>' in to_html(table)
    assert '<span class="second">0.2000</span>' in to_html(table)
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(to_rich(table))
    assert "\x1b[1m0.3000\x1b[0m" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[4m0.2000\x1b[0m" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([0.3, 0.3, 0.1], ["best", "best", ""]),
        ([0.3, 0.2, 0.2], ["best", "second", "second"]),
        ([0.2, 0.2], ["", ""]),
        ([0.2], [""]),
        ([0.30001, 0.30002], ["second", "best"]),  # equal as printed, not as measured
    ],
)
def test_ties(values: list[float], marks: list[str]) -> None:
    titles = [f"T{number}" for number in range(len(values))]
    table = build_table(*table_inputs({(title, "office"): [value] for title, value in zip(titles, values, strict=True)}))
    assert [cell(table, title).mark for title in titles] == marks


def test_coverage_is_never_marked() -> None:
    runs, records = table_inputs({("A", "office"): [0.3], ("B", "office"): [0.2]})
    table = build_table(runs.model_copy(update={"metrics": (R10, "coverage_at_10")}), records)
    assert [cell(table, title, metric="coverage_at_10").mark for title in "AB"] == ["", ""]


def test_average_only_over_complete_rows() -> None:
    runs, records = table_inputs(
        {
            ("A", "office"): [0.1, 0.3],
            ("A", "beauty"): [0.3, 0.7],
            ("B", "office"): [0.9, 0.9],
            ("B", "beauty"): [0.9, 0.9],
            ("C", "office"): [0.2, 0.2],
        }
    )
    failed = next(run for run in runs.runs if run.title == "B" and run.seed == 2)
    records[failed.id] = recorded(failed, status=status("oom"))
    a, b, c = only_part(build_table(runs, records)).rows
    assert a.average[R10].mean == pytest.approx(0.35)
    assert a.average[R10].spread == pytest.approx(stdev([0.2, 0.5]))  # over the averages of each seed
    assert b.average == {}  # a seed failed
    assert c.average == {}  # not planned on beauty
    assert c.blocks["beauty"].label == "not planned"


def test_average_without_common_seeds_has_no_spread() -> None:
    runs, records = table_inputs({("A", "office"): [0.1, 0.3], ("A", "beauty"): [0.4]})
    row = only_part(build_table(runs, records)).rows[0]
    assert row.average[R10].mean == pytest.approx(0.3)
    assert row.average[R10].spread is None
    assert row.seeds == "1-2"


def test_one_domain_has_no_average() -> None:
    assert "Average" not in to_markdown(build_table(*table_inputs({("A", "office"): [0.1]})))


# -------------------------------------------------------------------------------- simulated, oracle, published values


def test_simulated_and_real_domains_are_two_tables(tmp_path: Path) -> None:
    runs, records = table_inputs({("A", "office"): [0.1], ("A", "sim"): [0.2]}, simulated=("sim",))
    records = {
        run_id: r.model_copy(update={"reference": record.Reference(metrics={R10: 0.5}, source="A paper", comparable=True)})
        for run_id, r in records.items()
    }
    table = build_table(runs, records, {"sim": {R10: 0.6, "ndcg_at_10": 0.7}})
    real, simulated = table.parts
    assert (real.domains, simulated.domains) == (("office",), ("sim",))
    assert (len(real.published), len(simulated.published)) == (1, 0)
    assert "(SIMULATED)" in simulated.title
    files = write_tables(table, tmp_path)
    assert set(files) == {*FORMATS, *(f"simulated.{suffix}" for suffix in FORMATS)}
    for suffix in FORMATS:
        assert "SIMULATED" not in files[suffix].read_text(), suffix
        assert "A paper" in files[suffix].read_text(), suffix
        content = files[f"simulated.{suffix}"].read_text()
        assert "A paper" not in content, suffix
        assert "0.6" in content, suffix


def test_simulated_is_said_in_title_first_and_last_line() -> None:
    table = build_table(*table_inputs({("A", "sim"): [0.2]}, simulated=("sim",)))
    out = every_format(table)
    for name in ("rich", "md", "tex"):
        lines = out[name].strip().splitlines()
        assert "SIMULATED" in lines[0], name
        assert "SIMULATED" in lines[-1], name
        assert any("A toy suite (SIMULATED)" in line for line in lines), name
    body = out["html"].split("<body>")[1]
    assert "<title>A toy suite (SIMULATED)</title>" in out["html"]
    assert "SIMULATED" in body.strip().splitlines()[1]
    assert "SIMULATED" in body.strip().splitlines()[-4]  # before </section></body></html>
    assert {row["data"] for row in csv.DictReader(io.StringIO(out["csv"]))} == {"SIMULATED"}


def test_simulated_without_any_record_is_known_by_its_oracle_or_by_name() -> None:
    assert only_part(build_table(plan(planned("A", "sim")), {}, {"sim": {R10: 0.5}})).simulated
    assert only_part(build_table(plan(planned("A", "sim")), {}, simulated=["sim"])).simulated


def test_oracle_is_the_last_row_and_never_best() -> None:
    runs, records = table_inputs(
        {("A", "sim"): [0.2], ("B", "sim"): [0.1], ("A", "sim2"): [0.2], ("B", "sim2"): [0.1]}, simulated=("sim", "sim2")
    )
    table = build_table(runs, records, {"sim": {R10: 0.9, "ndcg_at_10": 0.8}})
    rows = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    last = next(index for index, line in enumerate(rows) if "Oracle" in line)
    assert rows[last - 1].startswith("| B")
    assert "**0.9000**" not in rows[last]
    assert "0.9000" in rows[last]
    assert [row.average[R10].mean for row in only_part(table).rows] == [pytest.approx(0.2), pytest.approx(0.1)]
    assert "**0.2000**" in to_markdown(table)


def test_an_oracle_of_a_real_domain_is_not_shown() -> None:
    """Only a simulated domain has one; naming it makes the domain simulated rather than the table a lie."""
    table = build_table(*table_inputs({("A", "office"): [0.2]}), {"office": {R10: 0.9}})
    assert only_part(table).simulated


def test_published_values_stand_beside_ours() -> None:
    runs = [*trivial(), planned("A", seed=1), planned("A", seed=2), planned("B")]
    a = record.Reference(metrics={R10: 0.0605}, source="Some et al.", comparable=True)
    b = record.Reference(metrics={"recall_at_5": 0.05}, source="Others", comparable=False, note="sampled candidates")
    records = {run.id: recorded(run, 0.06, reference={"A": a, "B": b}.get(run.title)) for run in runs}
    records[runs[-1].id] = recorded(runs[-1], status=status("oom"), reference=b)
    markdown_text = to_markdown(build_table(plan(*runs), records))
    assert "| A | office | Recall@10 | 0.0605 | 0.0600 ±.0000 | yes | Some et al. |" in markdown_text
    assert "| B | office | Recall@5 | 0.0500 | – | no | Others (sampled candidates) |" in markdown_text


def test_a_real_table_without_trivial_rows_warns() -> None:
    runs = [*trivial(), planned("A")]
    records = {run.id: recorded(run) for run in runs}
    assert only_part(build_table(plan(*runs), records)).warnings == ()
    table = build_table(plan(runs[0], runs[2]), records)
    assert only_part(table).warnings[0].startswith("No row for last_item:")
    for name, out in every_format(table).items():
        assert name == "csv" or "misleads" in out.replace("\n", " "), name
    simulated = build_table(*table_inputs({("A", "sim"): [0.2]}, simulated=("sim",)))
    assert only_part(simulated).warnings == ()


# ------------------------------------------------------------------------------------------- costs and other footnotes


def test_costs_are_means_over_seeds_and_empty_where_unknown() -> None:
    runs = [planned("A", seed=1), planned("A", seed=2)]
    costs = [record.Cost(fit_seconds=10, peak_memory=1 << 30), record.Cost(fit_seconds=20, peak_memory=3 << 30, parameters=5)]
    table = build_table(plan(*runs), {run.id: recorded(run, cost=c) for run, c in zip(runs, costs, strict=True)})
    cost = only_part(table).rows[0].blocks["office"].cost
    assert cost["fit_seconds"] == 15
    assert cost["peak_memory"] == 2 << 30
    assert cost["parameters"] is None
    assert "15.0" in printed(table)
    assert "GPU" not in printed(table)


def test_gpu_memory_has_a_column_where_it_was_used() -> None:
    run = planned("A")
    table = build_table(plan(run), {run.id: recorded(run, cost=record.Cost(peak_device_memory=5 << 29))})
    assert "GPU GiB" in printed(table)
    assert "2.50" in printed(table)


def test_timings_are_flagged_if_something_ran_beside_or_hardware_differs() -> None:
    runs = [planned("A"), planned("B")]
    alone = {run.id: recorded(run) for run in runs}
    assert only_part(build_table(plan(*runs), alone)).notes == ()
    beside = alone | {runs[0].id: recorded(runs[0], cost=record.Cost(fit_seconds=1, beside=True, shared_stages=("pretrain",)))}
    notes = only_part(build_table(plan(*runs), beside)).notes
    assert notes == ("timed while something else ran on the machine: not comparable", "stages taken from an earlier run: pretrain")
    other = alone | {runs[0].id: recorded(runs[0], hardware="other")}
    part = only_part(build_table(plan(*runs), other))
    assert ["hardware other" in part.notes[0], "hardware hw" in part.notes[1]] == [True, True]
    assert [row.blocks["office"].cost_notes for row in part.rows] == [(1,), (2,)]


def test_isolation_below_container_carries_a_footnote() -> None:
    runs = [planned(title) for title in "ABCD"]
    levels = [("container", True), ("landlock", True), ("convention", False), ("container", False)]
    records = {
        run.id: recorded(run, isolation=record.Isolation(level=level, network=network))  # type: ignore[arg-type]
        for run, (level, network) in zip(runs, levels, strict=True)
    }
    part = only_part(build_table(plan(*runs), records))
    assert [row.notes for row in part.rows] == [(), (1,), (2,), (3,)]
    assert "Landlock" in part.notes[0]
    assert "convention only" in part.notes[1]
    assert all("could reach a network" in note for note in part.notes[1:])
    assert "B¹" in printed(build_table(plan(*runs), records))


def test_a_run_that_never_started_says_nothing_about_isolation() -> None:
    run = planned("A")
    records = {run.id: recorded(run, status=status("skipped", "x"), isolation=record.Isolation(level="convention"))}
    assert only_part(build_table(plan(run), records)).notes == ("n/a: x",)


def test_budget_bound_training_carries_a_footnote() -> None:
    runs = [planned("A", seed=1), planned("A", seed=2)]
    records = {run.id: recorded(run, training=record.Training(budget_bound=run.seed == 1)) for run in runs}
    assert only_part(build_table(plan(*runs), records)).notes == ("training was still improving when its time budget ended (1 of 2 seeds)",)


# --------------------------------------------------------------------------------------------------- hostile text

HOSTILE = (
    "\x1b[2J\x1b]0;t\x07<script>alert(1)</script> | [x](http://e.com) **b** $\\input{/etc/passwd}$"
    " [red]r[/red] \u202e\x00\r\n=1+1 `c` &lt; ~~"
)


def hostile_table() -> Table:
    run = planned("A <b>|\x1b[31m[bold]_1$")
    ref = record.Reference(metrics={R10: 0.1}, source=HOSTILE, note=HOSTILE)
    return build_table(plan(run, *trivial()), {run.id: recorded(run, status=status("failed", HOSTILE * 50), reference=ref)})


def test_hostile_text_has_no_control_characters_and_an_end() -> None:
    for name, out in every_format(hostile_table()).items():
        assert not set(out) & {"\x1b", "\x00", "\r", "\x07", "\u202e"}, name
        assert len(out) < 20_000, name
    assert "[red]r[/red]" in printed(hostile_table(), 300)  # printed, not obeyed


def test_hostile_text_stays_text_in_html() -> None:
    class Tags(HTMLParser):
        found: set[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.add(tag)
            assert all(
                name in ("class", "id", "href", "colspan", "lang", "charset", "name", "content", "http-equiv", "title") for name, _ in attrs
            )
            assert all(value and value.startswith("#") for name, value in attrs if name == "href")

    parser = Tags()
    parser.found = set()
    parser.feed(to_html(hostile_table()))
    assert not parser.found & {"script", "b", "img", "iframe"}


def test_hostile_text_stays_text_in_markdown() -> None:
    out = to_markdown(hostile_table())
    assert "<script" not in out.replace(r"\<script", "")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    titled = next(line for line in rows if line.startswith("| A"))
    assert len(titled.replace(r"\|", "").split("|")) == len(rows[0].split("|"))
    assert markdown.escape("see https://e.com [a](b)") == r"see https\://e.com \[a\](b)"


def test_hostile_text_stays_text_in_latex() -> None:
    out = to_latex(hostile_table())
    assert r"\input" not in out
    assert r"\textbackslash{}input\{" in out
    assert latex.escape("50% of $x_1 & é–漢 #") == r"50\% of \$x\_1 \& e--{?} \#"


def test_csv_text_is_no_formula() -> None:
    run = planned("=cmd()")
    rows = list(csv.DictReader(io.StringIO(to_csv(build_table(plan(run), {run.id: recorded(run)})))))
    assert {row["title"] for row in rows} == {"'=cmd()"}


@pytest.mark.parametrize(
    ("dirty", "right"),
    [("a\x1b[31mb\x1b[0m", "ab"), ("a\n\tb  c", "a b c"), ("x" * 500, "x" * 199 + "…"), ("a\u202eb\u200b", "ab"), ("\x9b31m", "31m")],
)
def test_clean(dirty: str, right: str) -> None:
    assert text.clean(dirty) == right


# -------------------------------------------------------------------------------------------------------- formats


def test_csv_is_long_and_in_full_precision() -> None:
    third = 1 / 3
    runs, records = table_inputs({("A", "office"): [third, 0.1], ("A", "beauty"): [0.2, 0.2], ("B", "office"): [0.5, 0.5]})
    rows = list(csv.DictReader(io.StringIO(to_csv(build_table(runs, records)))))
    results = [row for row in rows if row["kind"] == "result"]
    assert len(results) == 2 * 2 * 2  # methods x domains x metrics
    a = next(row for row in results if (row["title"], row["domain"], row["metric"]) == ("A", "office", R10))
    assert float(a["mean"]) == (third + 0.1) / 2
    assert float(a["spread"]) == pytest.approx(stdev([third, 0.1]), rel=1e-14)
    assert a["seeds"] == f"1={third!r};2=0.1"
    unplanned = next(row for row in results if (row["title"], row["domain"]) == ("B", "beauty"))
    assert (unplanned["state"], unplanned["mean"]) == ("unplanned", "")
    fit = next(row for row in rows if row["kind"] == "cost" and row["metric"] == "fit_seconds")
    assert float(fit["mean"]) == 12.5
    assert [row["title"] for row in rows if row["kind"] == "average"] == ["A", "A"]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("domains", [1, 5])
def test_the_terminal_table_keeps_to_its_width(width: int, domains: int) -> None:
    names = [f"domain{number}" for number in range(domains)]
    runs, records = table_inputs({(title, name): [0.1, 0.2, 0.3] for title in ("A", "A very long title of a method") for name in names})
    runs = runs.model_copy(update={"metrics": ("recall_at_5", R10, "ndcg_at_5", "ndcg_at_10")})
    out = printed(build_table(runs, records), width)
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out  # nothing was cut off
    assert out.count("0.2000±.1000") == 2 * 4 * (domains + (domains > 1))


def test_many_metrics_are_cut_into_pieces() -> None:
    runs, records = table_inputs({("A", "office"): [0.1], ("B", "office"): [0.2]})
    names = tuple(f"{kind}_at_{k}" for kind in ("recall", "ndcg") for k in (1, 5, 10, 20, 50))
    part = only_part(build_table(runs.model_copy(update={"metrics": names}), records))
    shown = [name for grid in grids(part, 4) for group in grid.groups if group.kind == "metrics" for name in group.columns]
    assert shown == list(names)
    assert max(grid.columns for grid in grids(part, 4)) == 4


def test_every_grid_of_latex_has_the_columns_that_it_announces() -> None:
    runs, records = table_inputs({(title, name): [0.1] for title in "AB" for name in ("d1", "d2", "d3")})
    records.pop(runs.runs[0].id)
    columns = 0
    for line in to_latex(build_table(runs, records)).splitlines():
        if line.startswith(r"\begin{tabular}{lr"):
            columns = len(line.split("{")[2].strip("}"))
        elif columns and line.endswith(r"\\"):
            spans = sum(int(part.split("}")[0]) - 1 for part in line.split(r"\multicolumn{")[1:])
            assert line.count(" & ") + line.startswith("& ") + 1 + spans == columns
        elif line == r"\end{tabular}":
            columns = 0


def test_written_files_are_whole_and_stale_ones_go(tmp_path: Path) -> None:
    mixed = build_table(*table_inputs({("A", "office"): [0.1], ("A", "sim"): [0.2]}, simulated=("sim",)))
    assert len(write_tables(mixed, tmp_path)) == 8
    real = build_table(*table_inputs({("A", "office"): [0.1]}))
    files = write_tables(real, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.csv", "toy.html", "toy.md", "toy.tex"]
    assert files["md"].read_text() == to_markdown(real)


def test_whatever_a_method_claims_the_costs_stay_short() -> None:
    run = planned("A")
    cost = record.Cost(fit_seconds=1e300, users_per_second=1e-300, peak_memory=10**400, parameters=10**400)
    table = build_table(plan(run), {run.id: recorded(run, cost=cost)})
    for name, value in only_part(table).rows[0].blocks["office"].cost.items():
        assert len(text.cost(name, value)) <= 7


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("fit_seconds", 0, "0"),
        ("fit_seconds", 0.004, "<.01"),
        ("fit_seconds", 3.14159, "3.14"),
        ("fit_seconds", 3600, "3600"),
        ("users_per_second", 999_949, "1.00M"),
        ("users_per_second", 999_400, "999k"),
        ("peak_memory", 1 << 29, "0.500"),
        ("parameters", 64, "64"),
        ("parameters", 1_234_567, "1.23M"),
        ("parameters", None, "–"),
    ],
)
def test_costs_as_printed(name: str, value: float | None, shown: str) -> None:
    assert text.cost(name, value) == shown
