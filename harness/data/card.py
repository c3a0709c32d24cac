"""The card of a domain: what it holds, and what a domain of this name should hold.

In: a domain's folder. Out: ``Card``. Test targets are counted here, in the harness; only counts come out. Expected counts stand in
``cards/NAME.json`` with the source they are from.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import Domain
from harness.data.domain import read_private, read_summary

CARDS = Path(__file__).parent / "cards"
BINS = (("2-5", 2, 5), ("6-10", 6, 10), ("11-20", 11, 20), (">20", 21, 1 << 30))


@dataclass(frozen=True)
class Card:
    """``history`` is about test inputs (x_1..x_(n-1)); ``cold_targets`` counts targets without any training interaction,
    ``repeated_targets`` those that stand in their user's history already. ``dropped`` says why items have no picture."""

    name: str
    digest: str
    release: str | None
    simulated: bool
    counts: dict[str, int]
    density: float
    tie_rate: float | None
    history: dict[str, float]
    history_bins: dict[str, int]
    cold_targets: int
    repeated_targets: int
    items_without_training: int
    items_with_text: int
    items_with_picture: int
    picture_coverage: float
    dropped: dict[str, int]
    expected: dict[str, Any] | None
    differences: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_card(folder: Path) -> Card:
    """Count a domain. Raises DataError or ContractError for a folder that is not one."""
    summary = read_summary(folder)
    domain = Domain.read(folder / "public")
    private = read_private(folder)
    trained = np.zeros(domain.n_items, bool)
    trained[domain.train.values] = True
    inputs = domain.train.append(domain.valid)
    lengths = inputs.lengths
    owner = np.repeat(np.arange(domain.n_users), lengths)
    repeated = np.unique(owner[inputs.values == private.targets[owner]])
    expected = expected_card(summary.name)
    return Card(
        name=summary.name,
        digest=summary.digest,
        release=summary.release,
        simulated=summary.simulated,
        counts=summary.counts,
        density=summary.counts["interactions"] / (domain.n_users * domain.n_items),
        tie_rate=summary.tie_rate,
        history={
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
        },
        history_bins={name: int(((lengths >= low) & (lengths <= high)).sum()) for name, low, high in BINS},
        cold_targets=int((~trained[private.targets]).sum()),
        repeated_targets=len(repeated),
        items_without_training=int((~trained).sum()),
        items_with_text=domain.n_items - domain.items["text"].null_count,
        items_with_picture=len(domain.pictures),
        picture_coverage=len(domain.pictures) / domain.n_items,
        dropped=private.info.get("dropped", {}),
        expected=expected,
        differences=differences(summary.counts, expected),
    )


def expected_card(name: str) -> dict[str, Any] | None:
    """What a domain of this name must hold, if somebody has written it down."""
    file = CARDS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def differences(counts: dict[str, int], expected: dict[str, Any] | None) -> list[str]:
    """One line for each count that is not the expected one."""
    wanted = expected["counts"] if expected else {}
    return [f"{key}: {counts[key]:,}, expected {value:,}" for key, value in wanted.items() if counts[key] != value]
