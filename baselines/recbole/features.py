"""Item features from text, for the models that want attributes (FDSA, S3-Rec).

In: the item text of a domain. Out: for each item a list of attribute numbers. Attributes are category names, the brand
and title words. An attribute that one item has alone, or more than half of all items have, says nothing and is left
out; of the rest the most frequent are kept. Words are counted, not hashed: a hash would merge unrelated ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from harness.contract import Domain

MOST_PER_ITEM = 24
"""RecBole embeds every attribute of every position, so that one verbose item would make all batches as wide as itself."""


def attributes(row: dict[str, str | None]) -> Iterator[str]:
    """The attributes of one item, the telling ones first."""
    if categories := row.get("categories"):
        yield from (f"category {name.strip().lower()}" for name in re.split(r"[>|;,/]", categories) if name.strip())
    if brand := row.get("brand"):
        yield f"brand {brand.strip().lower()}"
    words = row.get("title") or row.get("text") or ""
    yield from (f"word {word}" for word in re.findall(r"[^\W_]{2,}", words.lower()))


def item_features(domain: Domain, size: int) -> list[list[int]]:
    """Attribute numbers 0..size-1 of every item; an item without known attribute has an empty list."""
    columns = [name for name in ("categories", "brand", "title", "text") if name in domain.items.column_names]
    found = [list(dict.fromkeys(attributes(row))) for row in domain.items.select(columns).to_pylist()]
    count = Counter(name for own in found for name in own)
    telling = [name for name, n in count.items() if 2 <= n <= len(found) / 2]
    vocabulary = {name: i for i, name in enumerate(sorted(telling, key=lambda name: (-count[name], name))[:size])}
    return [[vocabulary[name] for name in own if name in vocabulary][:MOST_PER_ITEM] for own in found]
