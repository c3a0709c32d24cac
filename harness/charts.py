"""The comparison as a bar chart with error bars: domains are rows of panels, metrics columns, methods bars.

In: a plan and its groups (``harness.tracking.groups.groups``). Out: PNG and SVG bytes, the same for the same input.
A method without a value keeps its row, with the state in place of the bar. What the whiskers are is said in the caption:
the sample standard deviation over seeds where every bar has two seeds or more, else the 95 % interval over users.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from harness.runspec import Plan
from harness.tracking.groups import Group, Spread

BAR, BEST, PALE = "#7d9cc0", "#1f4e8c", "#999999"
MAX_INCHES = 60.0
DPI = 110


def comparison_charts(plan: Plan, groups: Sequence[Group]) -> dict[str, bytes]:
    """``comparison.png`` and ``.svg``; simulated domains get a chart of their own where there are real ones as well."""
    real, simulated = [g for g in groups if not g.simulated], [g for g in groups if g.simulated]
    if real and simulated:
        return {**_chart(plan, real, "comparison"), **_chart(plan, simulated, "comparison_simulated")}
    return _chart(plan, groups, "comparison")


def _chart(plan: Plan, groups: Sequence[Group], name: str) -> dict[str, bytes]:
    """Nothing where no group has a value."""
    metrics = [metric for metric in plan.metrics if any(metric in group.metrics for group in groups)]
    if not metrics:
        return {}
    import matplotlib

    style: Any = {"svg.hashsalt": "harness", "text.parse_math": False, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = _figure(plan, groups, metrics)
        out = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
            out[f"{name}.{kind}"] = buffer.getvalue()
    return out


def _figure(plan: Plan, groups: Sequence[Group], metrics: Sequence[str]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = dict.fromkeys(group.domain for group in groups)
    by_domain = {domain: [group for group in groups if group.domain == domain] for domain in domains}
    heights = [0.55 + 0.2 * len(rows) for rows in by_domain.values()]
    figure = Figure(figsize=(3.0 + 2.4 * len(metrics), min(MAX_INCHES, 1.1 + sum(heights))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(by_domain), len(metrics), squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights})
    over_seeds = _whiskers_over_seeds(groups)
    for row, (domain, members) in enumerate(by_domain.items()):
        for column, metric in enumerate(metrics):
            _panel(panels[row][column], members, metric, over_seeds)
        suffix = " (SIMULATED)" if any(group.simulated for group in members) else ""
        panels[row][0].set_title(domain + suffix, loc="left", fontweight="bold")
    for column, metric in enumerate(metrics):
        panels[-1][column].set_xlabel(label(metric))
    simulated = "SIMULATED DATA · " if any(group.simulated for group in groups) else ""
    figure.suptitle(f"{simulated}{plan.title or plan.suite}", fontsize=11, fontweight="bold")
    whiskers = "sample standard deviation over seeds" if over_seeds else "95 % interval over users"
    figure.supxlabel(f"Bars: mean over seeds, best of the panel dark. Whiskers: {whiskers}.", fontsize=7, color="#444444")
    return figure


def _panel(panel: Any, groups: Sequence[Group], metric: str, over_seeds: bool) -> None:
    spreads = [group.metrics.get(metric) for group in groups]
    best = max((spread.mean for spread in spreads if spread), default=0.0)
    for position, (group, spread) in enumerate(zip(groups, spreads, strict=True)):
        if spread is None:
            panel.text(0.01, position, group.state, transform=panel.get_yaxis_transform(), va="center", color=PALE, fontsize=7)
            continue
        panel.barh(position, spread.mean, height=0.7, color=BEST if spread.mean == best else BAR)
        below, above = _whisker(spread, over_seeds)
        if below or above:
            panel.errorbar(spread.mean, position, xerr=[[below], [above]], color="#222222", linewidth=0.9, capsize=2)
    panel.set_yticks(range(len(groups)), [group.title for group in groups])
    panel.set_ylim(len(groups) - 0.4, -0.6)
    panel.set_xlim(left=0.0)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=4)


def _whiskers_over_seeds(groups: Sequence[Group]) -> bool:
    """One meaning for all whiskers of a chart: over seeds only if all bars have more than one."""
    spreads = [spread for group in groups for spread in group.metrics.values()]
    return bool(spreads) and all(spread.sd is not None for spread in spreads)


def _whisker(spread: Spread, over_seeds: bool) -> tuple[float, float]:
    if over_seeds:
        return spread.sd or 0.0, spread.sd or 0.0
    if spread.low is None or spread.high is None:
        return 0.0, 0.0
    return max(0.0, spread.mean - spread.low), max(0.0, spread.high - spread.mean)


def label(metric: str) -> str:
    """``recall_at_10`` as ``Recall@10``."""
    name, _, k = metric.partition("_at_")
    name = {"ndcg": "NDCG", "mrr": "MRR"}.get(name, name.replace("_", " ").capitalize())
    return f"{name}@{k}" if k else name
