"""The bar chart: what it shows for holes, what its whiskers mean, and that it is the same for the same records."""

from __future__ import annotations

from harness import charts
from harness.record import Record
from harness.runspec import Plan
from harness.tracking.groups import groups
from tests.unit.tracking import examples as ex


def drawn(plan: Plan, records: dict[str, Record]) -> dict[str, str]:
    """The SVG charts, with their texts searchable as comments (matplotlib writes each text beside its outline)."""
    return {name: data.decode() for name, data in charts.comparison_charts(plan, groups(plan, records)).items() if name.endswith(".svg")}


def records_of(plan: Plan, simulated: str = "") -> dict[str, Record]:
    return {run.id: ex.record_of(run, value=0.1 + i / 70, simulated=run.domain == simulated) for i, run in enumerate(plan.runs)}


def test_whiskers_are_over_seeds_only_where_every_bar_has_seeds() -> None:
    many, one = ex.plan_of("many", seeds=2), ex.plan_of("one", seeds=1)
    assert "sample standard deviation over seeds" in drawn(many, records_of(many))["comparison.svg"]
    assert "95 % interval over users" in drawn(one, records_of(one))["comparison.svg"]
    mixed = Plan(suite="mixed", title="", runs=(*many.runs[:2], one.runs[1]))
    assert "95 % interval over users" in drawn(mixed, records_of(mixed))["comparison.svg"]


def test_a_hole_is_named_and_has_no_bar() -> None:
    plan = ex.plan_of("hole", seeds=2)
    whole = records_of(plan)
    hole = {**whole, plan.runs[0].id: ex.record_of(plan.runs[0], "oom")}
    assert "<!-- oom -->" in drawn(plan, hole)["comparison.svg"]
    assert "<!-- oom -->" not in drawn(plan, whole)["comparison.svg"]
    assert drawn(plan, {}) == {}, "nothing to draw at all"


def test_simulated_domains_have_a_chart_of_their_own() -> None:
    plan = ex.plan_of("both", domains=("real", "made_up"))
    found = drawn(plan, records_of(plan, simulated="made_up"))
    assert set(found) == {"comparison.svg", "comparison_simulated.svg"}
    assert "SIMULATED" not in found["comparison.svg"]
    assert "made_up" not in found["comparison.svg"]
    assert "SIMULATED DATA" in found["comparison_simulated.svg"]


def test_titles_are_not_formulas_and_charts_do_not_change() -> None:
    plan = ex.plan_of("odd $x_1", methods=("$\\frac{", "<script>"))
    records = records_of(plan)
    assert charts.comparison_charts(plan, groups(plan, records)) == charts.comparison_charts(plan, groups(plan, records))
    assert "<script>" not in drawn(plan, records)["comparison.svg"].lower().replace("<!-- <script> -->", "")
