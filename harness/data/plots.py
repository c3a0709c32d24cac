"""Small plots as SVG inside of a page: bars, and a line on two logarithmic axes.

In: numbers. Out: SVG text that takes its colours from the page's style (classes bar, second, curve, axis, grid), so that it is as light or
dark as the page is. No script, no font, no address to fetch; values show as tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 14, 40
HEAD = 20
"""Of a legend, above the plot: no bar reaches it."""
LETTER = 7.5
"""Width of a letter, at most."""


def bars(
    values: Sequence[int],
    labels: Sequence[str],
    *,
    label: str,
    shown: Sequence[int] | None = None,
    second: Sequence[int] | None = None,
    names: tuple[str, str] = ("", ""),
) -> str:
    """One bar a value. ``shown``: places whose labels are written (all without it). ``second``: part of each value, drawn over it,
    with the ``names`` of both in a legend. ``label``: what the horizontal axis is."""
    top, ticks = nice(max(values, default=0))
    step = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    gap = min(2.0, step * 0.15)
    parts = list(_grid(top, ticks))
    for place, (value, name) in enumerate(zip(values, labels, strict=True)):
        x = LEFT + place * step + gap / 2
        tip = f"{name}: {value:,}" + (f", {names[1]} {second[place]:,}" if second else "")
        inner = _bar(x, step - gap, value, top, "bar") + (_bar(x, step - gap, second[place], top, "second") if second else "")
        parts.append(f"<g><title>{escape(tip)}</title>{inner}</g>")
    for place in range(len(values)) if shown is None else shown:
        parts.append(_text(LEFT + (place + 0.5) * step, HEIGHT - BOTTOM + 16, labels[place], "middle"))
    if second:
        parts.append(_legend(names))
    return _svg(parts, label, HEAD if second else 0)


def curve(points: Sequence[Sequence[int]], *, label: str, marks: Sequence[tuple[int, str]] = ()) -> str:
    """A line through points [x, y], both from 1, on logarithmic axes. ``marks``: upright lines at x with a word at each."""
    right = max((x for x, _ in points), default=1)
    high = max((y for _, y in points), default=1)
    x_decades, y_decades = (max(1.0, math.log10(max(value, 2))) for value in (right, high))

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log10(max(x, 1)) / x_decades * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - math.log10(max(y, 1)) / y_decades * (HEIGHT - TOP - BOTTOM)

    parts = []
    for power in range(int(y_decades) + 1):
        y = at(1, 10**power)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, compact(10**power), "end"))
    parts += [_text(at(10**power, 1)[0], HEIGHT - BOTTOM + 16, compact(10**power), "middle") for power in range(int(x_decades) + 1)]
    for x, name in marks:
        across = at(x, 1)[0]
        parts.append(f'<line class="mark" x1="{across:.1f}" y1="{TOP}" x2="{across:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(across - 4, TOP + 10, name, "end"))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    parts.append(f'<polyline class="curve" points="{line}"/>')
    parts += [
        f'<circle class="dot" cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="5"><title>{x:,}: {y:,}</title></circle>' for x, y in points
    ]
    return _svg(parts, label)


def nice(highest: float) -> tuple[float, list[float]]:
    """A round number at or above ``highest``, and the ticks from 0 to it."""
    if highest <= 0:
        return 1.0, [0.0, 1.0]
    rough = highest / 4
    power = 10 ** math.floor(math.log10(rough))
    step = max(1.0, next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough))
    count = math.ceil(highest / step - 1e-9)
    return count * step, [step * tick for tick in range(count + 1)]


def compact(value: float) -> str:
    """1500 as 1.5k, 2000000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _grid(top: float, ticks: Sequence[float]) -> Iterator[str]:
    for tick in ticks:
        y = HEIGHT - BOTTOM - tick / top * (HEIGHT - TOP - BOTTOM)
        yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        yield _text(LEFT - 6, y + 4, compact(tick), "end")


def _bar(x: float, width: float, value: int, top: float, kind: str) -> str:
    height = value / top * (HEIGHT - TOP - BOTTOM)
    return f'<rect class="{kind}" x="{x:.2f}" y="{HEIGHT - BOTTOM - height:.2f}" width="{max(width, 0.5):.2f}" height="{height:.2f}"/>'


def _legend(names: tuple[str, str]) -> str:
    places = (LEFT, LEFT + 35 + LETTER * len(names[0]))
    return "".join(
        f'<rect class="{kind}" x="{at:.0f}" y="{4 - HEAD}" width="10" height="10"/>{_text(at + 15, 13 - HEAD, name, "start")}'
        for kind, at, name in zip(("bar", "second"), places, names, strict=True)
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], label: str, head: int = 0) -> str:
    base = f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>'
    title = _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label, "middle")
    return f'<svg viewBox="0 {-head} {WIDTH} {HEIGHT + head}" role="img" aria-label="{escape(label)}">{"".join(parts)}{base}{title}</svg>'
