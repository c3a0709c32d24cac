"""A domain's card on the terminal, and the rows that terminal and page share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from harness.data.card import Card, Overlap

if TYPE_CHECKING:
    from rich.console import Console

DASH = "–"
BLOCKS = " ▁▂▃▄▅▆▇█"
NO_PICTURE = "no_picture_"


@dataclass(frozen=True)
class Row:
    """One line: what, its value here, and beside it a share or what is expected."""

    what: str
    value: str
    beside: str = ""
    wrong: bool = False


def share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.2f} %"


def counts_rows(card: Card) -> Iterator[Row]:
    exact = (card.expected or {}).get("counts", {})
    between = (card.expected or {}).get("between", {})
    for key in ("users", "items", "interactions"):
        wanted = f"{exact[key]:,}" if key in exact else "{:,} to {:,}".format(*between[key]) if key in between else ""
        wrong = any(line.startswith(f"{key}:") for line in card.differences)
        yield Row(key, f"{card.counts[key]:,}", wanted and f"{wanted} {'✗' if wrong else '✓'}", wrong)
    yield Row("training interactions", f"{card.counts['train_interactions']:,}")
    for part, what in (("train", "training"), ("valid", "validation"), ("test", "test")):
        if f"{part}_users" in card.counts:
            count = card.counts[f"{part}_users"]
            yield Row(f"users in {what}", f"{count:,}", share(count / card.counts["users"]))
    for part, moment in card.cuts.items():
        yield Row("validation from" if part == "valid" else f"{part} from", moment)
    yield Row("interactions a user", f"{card.counts['interactions'] / card.counts['users']:.2f}")
    yield Row("density", share(card.density))
    yield Row("ties in time", share(card.tie_rate))
    if card.dates:
        yield Row("first interaction", card.dates["first interaction"])
        yield Row("last interaction", card.dates["last interaction"])


def facts_rows(card: Card) -> Iterator[Row]:
    """Counts with their share; what is published of the same goes beside it."""
    reported = (card.expected or {}).get("reported", {})
    for key, what, published in (
        ("targets_by_seen_transition", "targets by a transition seen in training", "seen_transitions"),
        ("cold_targets", "targets without training interaction", ""),
        ("repeated_targets", "targets that are in the history already", ""),
        ("items_in_training", "items in the training", "items_in_training"),
        ("items_with_text", "items with text", ""),
        ("items_with_picture", "items with picture", ""),
    ):
        beside = share(card.share(key))
        if published in reported:
            value = reported[published]["value"]
            beside += f" (published {100 * value:g} %)" if isinstance(value, float) else f" (published {value:,})"
        yield Row(what, f"{getattr(card, key):,}", beside)
    for name, count in card.history_bins.items():
        yield Row(f"histories of {name} items", f"{count:,}", share(count / card.tested))
    for name, count in card.popularity.items():
        yield Row(f"{name} items", f"{count:,}", share(count / card.counts["items"]))


def overlap_cells(card: Card, other: Overlap) -> list[str]:
    users = DASH if other.users is None else f"{other.users:,}"
    of_ours = DASH if other.users is None else share(other.users / max(card.counts["users"], 1))
    items = DASH if other.items is None else f"{other.items:,}"
    late = DASH
    if other.in_test_time is not None:
        late = f"{other.in_test_time:,} ({share(other.in_test_time / max(other.interactions, 1))})"
    return [users, of_ours, items, other.first or DASH, other.last or DASH, late]


def left_out(card: Card) -> list[str]:
    """What the preparation counted, in words."""
    lines = []
    for key, count in card.dropped.items():
        if count:
            words = key.removeprefix(NO_PICTURE).replace("_", " ")
            lines.append(f"{count:,} {words}" if not key.startswith(NO_PICTURE) else f"{count:,} without picture: {words}")
    return lines


def spark(values: list[int], width: int = 48) -> str:
    """A row of bars, for a first look on a terminal."""
    if len(values) > width:
        step = len(values) / width
        pieces = [values[int(place * step) : int((place + 1) * step)] for place in range(width)]
        values = [round(sum(piece) / len(piece)) for piece in pieces]
    top = max(values, default=0)
    return "".join(BLOCKS[0 if not value else max(1, round(value / top * 8))] for value in values) if top else ""


def show(card: Card, console: Console) -> None:
    name = f"{card.name}{' (SIMULATED)' if card.simulated else ''}"
    title = f"{escape(name)}   release {card.release or DASH}   protocol {escape(card.protocol)}   digest {card.digest[:12]}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("beside", justify="right")
    for rows in (counts_rows(card), facts_rows(card)):
        for row in rows:
            value = f"[bold red]{row.value}[/]" if row.wrong else row.value
            table.add_row(row.what, value, row.beside)
        table.add_section()
    for line in left_out(card):
        count, _, what = line.partition(" ")
        table.add_row(f"left out: {what}" if not what.startswith("without picture") else what, count)
    console.print(table)
    lengths = card.series["history_lengths"]
    console.print(
        f"history lengths  1 {spark(lengths[1:])} >40   median {card.history['median']:g}, longest {card.history['longest']:,.0f}",
        highlight=False,
    )
    if "interactions" in card.series:
        first, last = (card.dates[f"{end} interaction"][:7] for end in ("first", "last"))
        console.print(f"interactions     {first} {spark(card.series['interactions'])} {last}", highlight=False)
    if card.overlap:
        other_table = Table(title="Beside other domains", title_justify="left")
        other_table.add_column("domain", no_wrap=True)
        for heading in ("shared users", "of ours", "shared items", "from", "to", "after our median target"):
            other_table.add_column(heading, justify="right")
        for other in card.overlap:
            other_table.add_row(escape(other.domain), *overlap_cells(card, other))
        console.print(other_table)
    if card.expected:
        source = escape(card.expected["source"])
        if card.differences:
            console.print(f"[bold red]not what it must be[/] by {source}:", highlight=False)
            for line in card.differences:
                console.print(f"  [red]{escape(line)}[/]", highlight=False)
            for line in card.likely_causes:
                console.print(f"  likely: {escape(line)}", highlight=False)
        else:
            console.print(f"[green]as expected[/] by {source}", highlight=False)
