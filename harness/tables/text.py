"""Words and numbers as tables print them, the same in every format. Escaping is each format's own business.

Reasons, titles and notes may come from methods: ``clean`` takes out what could move a cursor, turn the reading order or
fill a page.
"""

from __future__ import annotations

import re
import unicodedata

from harness.tables.values import Published

MAX_TEXT = 200
DASH = "–"
ORACLE_TITLE = "Oracle (upper bound)"
AVERAGE = "Average"
SIMULATED_LINE = "SIMULATED data: it shows that the machinery works, nothing about real shops."
LEGEND = (
    f"Mean ± sample deviation over seeds ({DASH}: one seed). Best in bold, second underlined, among complete cells only;"
    " averages over complete rows only."
)
COST_HEADINGS = {
    "fit_seconds": "fit s",
    "users_per_second": "users/s",
    "peak_memory": "peak GiB",
    "peak_device_memory": "GPU GiB",
    "parameters": "params",
}
_SHORT = {"recall": "R", "ndcg": "N", "mrr": "MRR", "coverage": "Cov"}
_LONG = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR", "coverage": "Coverage"}
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """One line of printable text: control, direction and private characters out, white space joined, at most ``limit`` long."""
    text = str(text)[: 4 * limit]
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?)", "", text)  # whole escape sequences, not only their first byte
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def metric_heading(name: str, *, short: bool = False) -> str:
    """``recall_at_10`` -> ``R@10`` or ``Recall@10``."""
    kind, _, cutoff = name.partition("_at_")
    return f"{(_SHORT if short else _LONG).get(kind, kind)}@{cutoff}" if cutoff else name


def value(number: float) -> str:
    return f"{number:.4f}"


def spread(number: float | None) -> str:
    """Without the leading zero, as it stands behind a ±; a dash for one seed."""
    return DASH if number is None else value(number).removeprefix("0")


def superscript(numbers: tuple[int, ...]) -> str:
    return "·".join(str(number).translate(_SUPERSCRIPT) for number in numbers)


def cost(name: str, number: float | None) -> str:
    """A cost with about three digits; whatever a method claims, the text stays short."""
    if number is None:
        return DASH
    if name.startswith("peak"):
        number /= 1 << 30
    if name == "parameters" and number < 1e4:
        return f"{number:.0f}"
    return _three_digits(number)


def _three_digits(number: float) -> str:
    if number >= 999.5e9:
        return f"{number:.0e}"
    if number >= 1e4:
        unit, factor = next((unit, factor) for unit, factor in (("k", 1e3), ("M", 1e6), ("G", 1e9)) if number < 999.5 * factor)
        return f"{number / factor:#.3g}".rstrip(".") + unit
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:#.3g}" if number >= 0.01 else "<.01" if number else "0"


def counts(states: dict[str, int]) -> str:
    """``22 of 24 runs ok, 1 n/a, 1 timeout``."""
    total = sum(states.values())
    others = [f"{number} {state_word(state)}" for state, number in states.items() if state != "ok" and number]
    return ", ".join([f"{states.get('ok', 0)} of {total} runs ok", *others])


def state_word(state: str) -> str:
    return "n/a" if state == "skipped" else state.replace("_", " ")


def seeds_listed(seeds: tuple[tuple[int, float], ...]) -> str:
    """Every seed's value in full precision: ``1=0.0659;2=0.0661``."""
    return ";".join(f"{seed}={number!r}" for seed, number in seeds)


PUBLISHED_HEADINGS = ("Method", "Domain", "Metric", "Published", "Ours", "Comparable", "Source")


def published_row(entry: Published) -> tuple[str, ...]:
    """A published value as it stands in its own section: beside ours, and whether the two may be compared."""
    ours = DASH if entry.ours.mean is None else f"{value(entry.ours.mean)} ±{spread(entry.ours.spread)}"
    source = f"{entry.source} ({entry.note})" if entry.note else entry.source
    comparable = "yes" if entry.comparable else "no"
    return entry.title, entry.domain, metric_heading(entry.metric), value(entry.published), ours, comparable, source
