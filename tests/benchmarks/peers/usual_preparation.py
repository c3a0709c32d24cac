"""What the preparation is measured against: the usual script, in its good form.

``json.loads`` a line, lists of the three fields, a pandas table for the rules, dictionaries for the metadata. In: a review file and a
metadata file, plain or gzipped. Out: the same histories and item texts as ``harness.data.prepare``, as Python lists and dictionaries;
nothing is checked, counted or written.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import IO, Any

import pandas as pd

FIELDS = ("title", "features", "categories", "description", "store")


def lines(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def histories(reviews: Path, k: int = 5) -> dict[str, list[str]]:
    """Items of every user, oldest first: earliest of repeats, iterative k-core."""
    users, items, times = [], [], []
    with lines(reviews) as file:
        for line in file:
            review = json.loads(line)
            users.append(review["user_id"])
            items.append(review["parent_asin"])
            times.append(review["timestamp"])
    table = pd.DataFrame({"user": users, "item": items, "time": times})
    table = table.sort_values("time", kind="stable").drop_duplicates(["user", "item"])
    while True:
        enough = table["user"].map(table["user"].value_counts()).ge(k) & table["item"].map(table["item"].value_counts()).ge(k)
        if enough.all():
            break
        table = table[enough]
    return table.groupby("user", sort=False)["item"].agg(list).to_dict()


def texts(metadata: Path, items: set[str]) -> dict[str, dict[str, Any]]:
    """The fields of the text of these items; the first record of an item counts."""
    found: dict[str, dict[str, Any]] = {}
    with lines(metadata) as file:
        for line in file:
            record = json.loads(line)
            item = record["parent_asin"]
            if item in items and item not in found:
                found[item] = {name: record.get(name) for name in FIELDS}
    return found


def prepare(reviews: Path, metadata: Path) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    found = histories(reviews)
    return found, texts(metadata, {item for items in found.values() for item in items})
