"""A domain's card as one HTML page that needs nothing else: light, dark and on paper. No script, no address to fetch.

In: ``Card``. Out: the page. The look is that of the tables' pages (``harness/tables/style.css``) with a few rules for plots.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from harness.data import plots
from harness.data.card import WORDS, Card
from harness.data.card_view import Row, counts_rows, facts_rows, left_out, overlap_cells
from harness.data.source import DataError
from harness.tables.text import SIMULATED_LINE
from harness.tables.webpage import head

OWN_STYLE = Path(__file__).with_name("card.css")


def to_html(card: Card) -> str:
    suffix = " (SIMULATED)" if card.simulated else ""
    return f"""{head(card.name + suffix, OWN_STYLE)}
<body class="card">
{chr(10).join(_body(card))}
</body>
</html>
"""


def write_page(card: Card, path: Path) -> Path:
    """Write the page: whole, or what was there stays. Raises DataError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(to_html(card), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: the page cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _body(card: Card) -> Iterator[str]:
    if card.simulated:
        yield f'<p class="banner">{escape(SIMULATED_LINE)}</p>'
    yield f"<h1>{escape(card.name)}</h1>"
    title = f"{card.expected['title']} · " if card.expected and card.expected.get("title") else ""
    release = f"release {card.release} · " if card.release else ""
    yield f'<p class="soft">{escape(title)}{escape(release)}digest {card.digest[:12]} · protocol {escape(card.protocol)}.</p>'
    if card.differences:
        causes = "".join(f"<li>{_with_code(cause)}</li>" for cause in card.likely_causes)
        wrong = "; ".join(escape(line) for line in card.differences)
        yield f'<div class="banner warning"><b>Not what this domain must be.</b> {wrong}. Likely:<ul>{causes}</ul></div>'
    yield '<div class="columns"><div>'
    yield from _table("Counts", ("", "here", "expected" if card.expected else ""), counts_rows(card))
    if card.expected:
        yield f'<p class="soft">Expected: {escape(card.expected["source"])}.</p>'
    yield "</div><div>"
    yield from _table("What it is like", ("", "count", "share"), facts_rows(card))
    yield "</div></div>"
    yield '<div class="plots">'
    for heading, text, plot in _plots(card):
        yield f"<figure><figcaption><b>{escape(heading)}</b> {escape(text)}</figcaption>{plot}</figure>"
    yield "</div>"
    yield from _overlaps(card)
    lines = left_out(card)
    if lines:
        yield "<h2>Left out on the way</h2>"
        yield f'<p class="soft">{escape("; ".join(lines))}.</p>'
    yield "<footer><p>Made of the whole domain, test targets and source ids too: for its user, not for methods.</p></footer>"


def _with_code(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table(heading: str, columns: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    yield f'<h2>{escape(heading)}</h2><div class="scroll"><table><thead><tr>'
    yield "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr></thead><tbody>"
    for row in rows:
        mark = ' class="wrong"' if row.wrong else ""
        yield f"<tr><th>{escape(row.what)}</th><td{mark}>{escape(row.value)}</td><td>{escape(row.beside)}</td></tr>"
    yield "</tbody></table></div>"


def _plots(card: Card) -> Iterator[tuple[str, str, str]]:
    lengths = card.series["history_lengths"]
    low = next((place for place, count in enumerate(lengths) if count), 0)
    names = [*(str(length) for length in range(low, 41)), ">40"]
    shown = [place for place, name in enumerate(names) if name == ">40" or (int(name) % 5 == 0 and int(name) < 40)]
    text = f"median {card.history['median']:g}, mean {card.history['mean']:.2f}, longest {card.history['longest']:,.0f}."
    yield "History lengths.", f"Items before the test target, a user; {text}", plots.bars(lengths[low:], names, label="items", shown=shown)

    marks: list[tuple[int, str]] = []
    reached = 0
    for name in ("head", "mid"):
        reached += card.popularity[name]
        marks.append((reached, name))
    text = f"Head, mid, tail ({', '.join(f'{count:,}' for count in card.popularity.values())} items) hold 50, 30, 20 % of the training."
    yield "Popularity.", text, plots.curve(card.series["popularity"], label="items by rank; training interactions of each", marks=marks)

    if "interactions" in card.series:
        yield _over_time(card)
    counts = card.series["text_words"]
    ends = WORDS[1:-1]
    names = ["none", *(f"{low}-{high - 1}" for low, high in itertools.pairwise(ends)), f"≥{ends[-1]}"]
    text = f"{card.items_with_text:,} of {card.counts['items']:,} items have text"
    if card.text_words:
        text += f"; median {card.text_words['median']:,.0f} words, longest {card.text_words['longest']:,.0f}"
    yield "Text.", f"{text}.", plots.bars(counts, names, label="words of an item's text")


def _over_time(card: Card) -> tuple[str, str, str]:
    """Months, or years where there would be more than 120 bars."""
    year, month = map(int, card.series["first_month"].split("-"))
    everything, targets = card.series["interactions"], card.series["targets"]
    names = [f"{year + (month - 1 + place) // 12}-{(month - 1 + place) % 12 + 1:02}" for place in range(len(everything))]
    label = "month"
    if len(names) > 120:
        years = sorted({name[:4] for name in names})
        place = {name: [row for row, each in enumerate(names) if each[:4] == name] for name in years}
        everything = [sum(everything[row] for row in place[name]) for name in years]
        targets = [sum(targets[row] for row in place[name]) for name in years]
        names, label = years, "year"
    every = max(1, len(names) // 8)
    first, last, middle = (card.dates[f"{which}"] for which in ("first interaction", "last interaction", "median target"))
    text = f"{first} to {last}; half of the test targets are later than {middle}."
    series = plots.bars(
        everything, names, label=label, shown=range(0, len(names), every), second=targets, names=("interactions", "of these test targets")
    )
    return "Over time.", text, series


def _overlaps(card: Card) -> Iterator[str]:
    if not card.overlap:
        return
    yield '<h2>Beside other domains</h2><div class="scroll"><table><thead><tr><th>Domain</th><th>shared users</th><th>of ours</th>'
    yield "<th>shared items</th><th>from</th><th>to</th><th>interactions after our median test target</th></tr></thead><tbody>"
    for other in card.overlap:
        yield f"<tr><th>{escape(other.domain)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in overlap_cells(card, other))}</tr>"
    yield "</tbody></table></div>"
    yield '<p class="soft">What is pre-trained on another domain has seen the users they share, and the time that is tested here.</p>'
