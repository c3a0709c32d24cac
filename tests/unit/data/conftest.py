"""What the tests of domains share: lists numbered in order of first appearance, and writers of every input format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.data.source import SourceDomain, ragged

Lists = list[list[int]]
Writer = Callable[[Path, Lists], Path]


@pytest.fixture
def lists() -> Lists:
    """700 users over a long-tailed catalogue, items numbered in order of first appearance, as published files have them."""
    rng = np.random.default_rng(5)
    weights = 1 / (np.arange(4000) + 20.0)
    number: dict[int, int] = {}
    drawn = [rng.choice(4000, int(rng.integers(3, 12)), replace=False, p=weights / weights.sum()) for _ in range(700)]
    return [[number.setdefault(int(item), len(number)) for item in items] for items in drawn]


@pytest.fixture
def source() -> SourceDomain:
    """Five users, six items; user four is too short, item F is in no list."""
    return SourceDomain(
        user_ids=["u1", "u2", "u3", "u4", "u5"],
        sequences=ragged([[0, 1, 2], [2, 1, 0, 3], [4, 4, 4], [0, 1], [3, 2, 1, 0, 4]]),
        item_ids=list("ABCDEF"),
        columns={
            "title": ["One &amp; only", "<b>Two</b>", None, "Four\t\x00 x", "", "Six"],
            "categories": [["a", "b"], None, None, ["c"], [], None],
            "keywords": [None, None, "third words", "no", None, None],
            "codes_x": [[1, 2], [3], [4], [5], [6], None],
        },
        times=np.array([1, 1, 2, 1, 2, 3, 4, 5, 5, 5, 1, 2, 1, 2, 3, 4, 5]),
        private_columns={"asin": ["a", "b", "c", "d", "e", "f"]},
        release="2014",
        source={"format": "test"},
    )


def write_parquet(folder: Path, lists: Lists) -> Path:
    folder.mkdir()
    n_items = 1 + max(max(items) for items in lists)
    users = pa.array(range(len(lists)), pa.int32())
    pq.write_table(pa.table({"user_id": users, "item_ids": pa.array(lists, pa.list_(pa.int32()))}), folder / "sequences.parquet")
    titles = pa.array([f"title {item}" for item in range(n_items)])
    pq.write_table(pa.table({"item_id": pa.array(range(n_items), pa.int32()), "title": titles}), folder / "items.parquet")
    return folder


def write_recbole(folder: Path, lists: Lists) -> Path:
    folder.mkdir()
    rows = [f"{user}\t{item}\t{place}" for user, items in enumerate(lists) for place, item in enumerate(items)]
    (folder / "x.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n")
    n_items = 1 + max(max(items) for items in lists)
    names = [f"{item}\ttitle {item}" for item in range(n_items)]
    (folder / "x.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *names]) + "\n")
    return folder


def write_s3rec(folder: Path, lists: Lists) -> Path:
    folder.mkdir()
    (folder / "x.txt").write_text("".join(f"{user} {' '.join(map(str, items))}\n" for user, items in enumerate(lists)))
    return folder


def write_utgrec(folder: Path, lists: Lists) -> Path:
    folder.mkdir()
    items = [str(item) for item in range(1 + max(max(items) for items in lists))]
    users = [str(user) for user in range(len(lists))]
    mapping: dict[str, object] = {}
    for what, ids in (("user", users), ("item", items)):
        mapping |= {f"{what}2id": {name: number for number, name in enumerate(["[PAD]", *ids])}, f"id2{what}": ["[PAD]", *ids]}
    (folder / "id_mapping.json").write_text(json.dumps(mapping))
    sequences = {user: [str(item) for item in items] for user, items in zip(users, lists, strict=True)}
    (folder / "all_item_seqs.json").write_text(json.dumps(sequences))
    (folder / "metadata.sentence.json").write_text(json.dumps({item: f"title {item}" for item in items}))
    return folder


def write_lcrec(folder: Path, lists: Lists) -> Path:
    folder.mkdir()
    (folder / "x.inter.json").write_text(json.dumps(dict(enumerate(lists))))
    n_items = 1 + max(max(items) for items in lists)
    facts = {item: {"title": f"title {item}", "description": "", "brand": "", "categories": ""} for item in range(n_items)}
    (folder / "x.item.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def writers() -> dict[str, Writer]:
    """One writer a format of ``importers.FORMATS``."""
    return {"parquet": write_parquet, "recbole": write_recbole, "s3rec": write_s3rec, "utgrec": write_utgrec, "lcrec": write_lcrec}
