"""What a domain of a known name must hold, and what is probably wrong where it does not.

In: counts of a domain and ``cards/NAME.json``:

    counts      users, items, interactions: exact where exact numbers are published
    between     [lowest, highest] where only rounded numbers are published: 17.6K items are 17,550 to 17,649
    reported    other published facts, shown beside ours and not enforced
    source      where the numbers are from

Out: one line a difference, and likely causes told from the domain itself. A domain that is prepared from the official release
under the name of a card is not written unless it agrees (``require``). HARNESS_CARDS names another folder of cards: for another
release, such as a test's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import PROTOCOL, Ragged
from harness.data.source import DataError

CARDS = Path(__file__).parent / "cards"
OFFICIAL = "amazon-reviews-2023"
"""``source["format"]`` of what is prepared from the official release begins with this."""

CORE = 5
KEYS = ("users", "items", "interactions")
HEADER = {"user_id", "parent_asin", "asin", "item_id", "reviewerID", "timestamp"}
PADDING = {"[PAD]", "<pad>", "PAD", "0"}


def expected_card(name: str, protocol: str = PROTOCOL) -> dict[str, Any] | None:
    """What a domain of this name must hold, if somebody has written it down. Cards count whole histories, so those of ``loo-v1``."""
    if protocol != PROTOCOL:
        return None
    file = Path(os.environ.get("HARNESS_CARDS") or CARDS) / f"{name}.json"
    if not file.exists():
        return None
    try:
        card: dict[str, Any] = json.loads(file.read_text("utf-8"))
        right = card["source"] and all(key in KEYS for key in (*card["counts"], *card.get("between", {})))
        ranges = [low <= high for low, high in card.get("between", {}).values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a card ({type(error).__name__}: {error}); it needs counts and source") from None
    if not right or not all(ranges):
        raise DataError(f"{file}: counts and between hold {', '.join(KEYS)} only, and between a lowest and a highest number")
    return card


def differences(counts: Mapping[str, int], expected: Mapping[str, Any] | None) -> list[str]:
    """One line for each count that is not the expected one."""
    if not expected:
        return []
    lines = []
    for key in KEYS:
        have = counts[key]
        if key in expected["counts"] and have != (wanted := expected["counts"][key]):
            lines.append(f"{key}: {have:,}, expected {wanted:,} ({have - wanted:+,})")
        elif key in expected.get("between", {}):
            low, high = expected["between"][key]
            if not low <= have <= high:
                lines.append(f"{key}: {have:,}, expected {low:,} to {high:,} (published rounded)")
    return lines


@dataclass(frozen=True)
class Facts:
    """What a domain tells of how it was made. ``repeats``: interactions whose item stands earlier in the same list. ``strange_ids``:
    ids that are names of columns or of padding. ``dropped``: what the preparation left out and counted."""

    repeats: int
    shortest_user: int
    rarest_item: int
    items_without_interaction: int
    strange_ids: tuple[str, ...]
    dropped: Mapping[str, int]


def facts_of(sequences: Ragged, user_ids: Sequence[str], item_ids: Sequence[str], dropped: Mapping[str, int]) -> Facts:
    """``sequences`` are whole histories in rows of ``item_ids``."""
    user = np.repeat(np.arange(len(sequences)), sequences.lengths)
    pair = user.astype(np.int64) * max(len(item_ids), 1) + sequences.values
    held = np.bincount(sequences.values, minlength=len(item_ids))
    strange = [name for name in (*user_ids, *item_ids) if name in HEADER or name in PADDING - {"0"}]
    return Facts(
        repeats=len(pair) - len(np.unique(pair)),
        shortest_user=int(sequences.lengths.min(initial=1 << 30)),
        rarest_item=int(held[held > 0].min(initial=1 << 30)),
        items_without_interaction=int((held == 0).sum()),
        strange_ids=tuple(dict.fromkeys(strange)),
        dropped=dict(dropped),
    )


def likely_causes(counts: Mapping[str, int], expected: Mapping[str, Any], facts: Facts) -> list[str]:
    """What explains the difference, the surest first; what can be seen in the domain itself comes before what is guessed from counts."""
    wanted = {key: expected["counts"].get(key) for key in KEYS}
    more = {key: None if (exact := wanted[key]) is None else counts[key] - exact for key in KEYS}
    users, items, interactions = (more[key] for key in KEYS)
    causes = []
    header = [name for name in facts.strange_ids if name in HEADER]
    padding = [name for name in facts.strange_ids if name in PADDING]
    if header:
        causes.append(f"the header line was counted: {header[0]!r} stands there as an id")
    if padding:
        causes.append(f"the padding row was counted: {padding[0]!r} stands there as an id")
    if facts.repeats:
        causes.append(
            f"repeats were kept: {facts.repeats:,} interactions are of an item that its user had already; only the earliest counts"
        )
    if facts.shortest_user < CORE or facts.rarest_item < CORE:
        causes.append(
            f"the {CORE}-core was applied once or not at all: a user has {facts.shortest_user} interactions, an item {facts.rarest_item};"
            " it is repeated until nothing changes"
        )
    if facts.items_without_interaction:
        causes.append(f"{facts.items_without_interaction:,} items are in no list: the whole metadata was taken for the catalogue")
    if users == items == 1 and not causes:
        causes.append("one user and one item too many: a header line or a padding row was counted")
    if interactions is not None and interactions < 0 and (expected_users := wanted["users"]):
        if -interactions == expected_users:
            causes.append("exactly one interaction a user is missing: the file of the test targets was left out")
        elif -interactions == 2 * expected_users:
            causes.append("exactly two interactions a user are missing: the files of validation and test targets were left out")
    if items is not None and users is not None and not causes:
        if items < 0 and -items <= 0.08 * wanted["items"] and users <= 0:
            causes.append("items without metadata or picture were left out; they belong to the catalogue")
        elif items < 0 or users < 0:
            causes.append("the raw file is not whole: `harness data fetch amazon2023 --verify` reads it again")
        elif items > 0:
            causes.append("items are not parent_asin but asin, so that variants of a product count as several")
    if not causes:
        causes.append("the raw file is not the pinned revision's: `harness data fetch amazon2023 --verify` compares its digest")
    if incomplete := facts.dropped.get("reviews_without_fields"):
        causes.append(f"{incomplete:,} reviews lack a user, an item or a time, and were left out")
    return causes


def problem(name: str, counts: Mapping[str, int], facts: Facts) -> str | None:
    """What is wrong with a domain of this name, in one text: the differences, where the numbers are from, the likely causes."""
    expected = expected_card(name)
    lines = differences(counts, expected)
    if not expected or not lines:
        return None
    return "; ".join(lines) + f" [{expected['source']}]. Likely: " + "; or ".join(likely_causes(counts, expected, facts))


def require(name: str, counts: Mapping[str, int], facts: Callable[[], Facts]) -> None:
    """Raise DataError if there is a card of this name and the counts are not its counts."""
    if differences(counts, expected_card(name)) and (wrong := problem(name, counts, facts())):
        raise DataError(f"{name} is not what it must be, and was not written: {wrong}. A variant on purpose needs another name")
