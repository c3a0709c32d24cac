"""Draws utgrec.svg: what UTGRec is, from an item to a recommendation.   python results/figures/utgrec.py"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT = "#1f2933", "#7b8794"
FILL = {"data": "#eef2f6", "frozen": "#dbe4ee", "trained": "#fde8c8", "loss": "#fbd5d5", "book": "#d3f0dc", "t5": "#dcd6f7"}


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, kind: str, size: float = 9) -> tuple[float, ...]:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fc=FILL[kind], ec=INK, lw=0.9)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.35)
    return x, y, width, height


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", bend: float = 0.0, dashed: bool = False
) -> None:
    style = {"connectionstyle": f"arc3,rad={bend}", "linestyle": "--" if dashed else "-"}
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, lw=1.0, color=FAINT if dashed else INK, **style))
    if label:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.14, label, ha="center", va="bottom", fontsize=8, color=INK)


def tokenizer(axes: Axes) -> None:
    box(axes, 0.1, 6.3, 1.9, 0.9, "picture", "data")
    box(axes, 0.1, 4.9, 1.9, 1.1, "text:\ntitle, features,\ncategories, ...", "data")
    box(
        axes,
        2.7,
        4.9,
        2.3,
        2.3,
        "multimodal LLM\n(Qwen2-VL, LoRA)\nvision tower frozen\n\n... $\\langle c_1\\rangle\\langle c_2\\rangle\\langle c_3\\rangle$",
        "trained",
    )
    arrow(axes, (2.0, 6.75), (2.7, 6.5))
    arrow(axes, (2.0, 5.45), (2.7, 5.7))
    box(axes, 5.6, 5.55, 1.0, 1.0, "MLP", "trained")
    arrow(axes, (5.0, 6.05), (5.6, 6.05))
    box(axes, 7.5, 6.45, 2.7, 0.75, "root: 256 codes,  $t_1 = h_1$", "book")
    box(axes, 7.5, 4.9, 2.7, 1.15, "leaf: 512 codes, shared\n$t_l = h_l - h_{l-1}$\n$C = E\\,W$  (SimVQ)", "book")
    arrow(axes, (6.6, 6.2), (7.5, 6.8), "$h_1$", bend=-0.1)
    arrow(axes, (6.6, 5.9), (7.5, 5.5), "$h_2, h_3$", bend=0.1)
    box(axes, 10.9, 5.5, 1.9, 1.1, "item id\n$(c_1,\\ c_2,\\ c_3)$", "data", 10)
    arrow(axes, (10.2, 6.8), (10.9, 6.3))
    arrow(axes, (10.2, 5.5), (10.9, 5.8))

    box(axes, 7.5, 3.3, 1.25, 0.95, "text\ndecoder", "trained")
    box(axes, 8.95, 3.3, 1.25, 0.95, "picture\ndecoder", "trained")
    arrow(axes, (8.3, 4.9), (8.12, 4.25))
    arrow(axes, (9.4, 4.9), (9.57, 4.25))
    axes.text(9.95, 4.52, "$r = $ sum of codes", ha="left", fontsize=8, color=INK)
    box(axes, 10.9, 3.2, 1.9, 1.15, "masked tokens,\ndiffusion on VAE\nlatents: of the item\nand its neighbour", "loss", 8)
    arrow(axes, (10.2, 3.77), (10.9, 3.77))
    box(axes, 2.7, 3.2, 2.3, 1.0, "an item next to it in\nsomeone's history", "data")
    arrow(axes, (3.85, 4.2), (3.85, 4.9), dashed=True)
    box(axes, 5.5, 3.3, 1.4, 0.9, "InfoNCE\n$h,\\ h^{+}$", "loss")
    arrow(axes, (6.1, 5.55), (6.15, 4.2))


def recommender(axes: Axes) -> None:
    box(axes, 0.1, 0.55, 2.6, 1.1, "history of 20 items\n$c_1c_2c_3\\ c_1c_2c_3\\ \\ldots$", "data")
    box(axes, 3.4, 0.4, 2.2, 1.4, "T5\nencoder - decoder\n(one for all methods)", "t5")
    box(axes, 6.4, 0.4, 2.8, 1.4, "beam search over the\ntrie of real items\n(exact, 50 beams)", "t5")
    box(axes, 10.0, 0.55, 2.8, 1.1, "ranked items\n(scored blindly by the harness)", "data", 8.5)
    for start, end in ((2.7, 3.4), (5.6, 6.4), (9.2, 10.0)):
        arrow(axes, (start, 1.1), (end, 1.1))
    axes.plot([12.85, 13.05, 13.05, 1.4, 1.4], [6.05, 6.05, 2.6, 2.6, 1.95], color=FAINT, lw=1, ls="--")
    arrow(axes, (1.4, 2.0), (1.4, 1.65), dashed=True)


def main(path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "utgrec"
    figure, axes = plt.subplots(figsize=(12.4, 7.2))
    axes.set_xlim(-0.1, 13.3)
    axes.set_ylim(-0.5, 7.9)
    axes.axis("off")
    axes.text(0.1, 7.5, "Universal item tokenizer", fontsize=12, weight="bold", color=INK)
    axes.text(1.6, 2.08, "Transferable recommender", fontsize=12, weight="bold", color=INK)
    tokenizer(axes)
    recommender(axes)
    places = zip(("data", "trained", "book", "loss", "t5"), ("data", "trained", "codebooks", "losses", "recommender"), strict=True)
    for number, (kind, name) in enumerate(places):
        axes.add_patch(FancyBboxPatch((0.15 + 2.1 * number, -0.35), 0.25, 0.2, boxstyle="round,pad=0.02", fc=FILL[kind], ec=INK, lw=0.7))
        axes.text(0.55 + 2.1 * number, -0.25, name, va="center", fontsize=8.5, color=INK)
    note = "both are pre-trained on five domains, then trained on the target (E stays, W learns)"
    axes.text(13.0, 7.5, note, ha="right", fontsize=9, color=FAINT)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
