"""The preparation of raw reviews: rules against a slow second implementation, counted skips, errors with their line."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from harness.contract import Domain
from harness.data.domain import DataError, read_private
from harness.data.images import check_picture, local_pictures
from harness.data.prepare import core, earliest, json_lines, prepare_raw, read_raw

CATEGORY = "Video_Games"


def write_raw(folder, reviews, metadata=(), gz=False):
    for kind, stem, records in (("review", CATEGORY, reviews), ("meta", f"meta_{CATEGORY}", metadata)):
        path = folder / f"{kind}_categories" / (stem + ".jsonl" + ".gz" * gz)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(record) + "\n" for record in records or [{"parent_asin": "none"}]).encode()
        path.write_bytes(gzip.compress(data) if gz else data)
    return folder


def review(user, item, time, **more):
    return {"user_id": user, "parent_asin": item, "asin": "variant", "timestamp": time, **more}


def slow_histories(reviews):
    """The rules once more, one step after the other, with dictionaries."""
    users: dict[str, list] = {}
    for place, row in enumerate(reviews):
        users.setdefault(row["user_id"], []).append((row["timestamp"], place, row["parent_asin"]))
    histories = {}
    for user, rows in users.items():
        histories[user] = list(dict.fromkeys(item for _, _, item in sorted(rows)))
    while True:
        count = Counter(item for items in histories.values() for item in items)
        smaller = {user: [item for item in items if count[item] >= 5] for user, items in histories.items()}
        smaller = {user: items for user, items in smaller.items() if len(items) >= 5}
        if smaller == histories:
            return histories
        histories = smaller


@pytest.mark.parametrize("seed", range(5))
def test_rules_equal_a_slow_implementation(tmp_path, seed):
    rng = np.random.default_rng(seed)
    weights = 1 / (np.arange(60) + 3.0)
    reviews = [review(f"u{rng.integers(90)}", f"i{rng.choice(60, p=weights / weights.sum())}", int(rng.integers(40))) for _ in range(900)]
    expected = slow_histories(reviews)
    assert 10 < len(expected) < 90  # the core removes some and leaves some
    source, _ = read_raw(write_raw(tmp_path, reviews, gz=bool(seed % 2)), CATEGORY)
    found = {user: [source.item_ids[row] for row in source.sequences[place]] for place, user in enumerate(source.user_ids)}
    assert found == expected
    assert set(source.item_ids) == {item for items in expected.values() for item in items}
    dropped = source.dropped
    kept = sum(map(len, expected.values()))
    assert kept + dropped["repeated_items"] + dropped["interactions_by_5_core"] + dropped["reviews_without_fields"] == 900


def test_ties_keep_the_order_of_the_file():
    user, item, time = np.array([1, 0, 1, 1, 0, 1]), np.array([5, 1, 3, 4, 2, 3]), np.array([7, 9, 7, 6, 9, 1])
    assert earliest(user, item, time).tolist() == [1, 4, 5, 3, 0]  # user 1: item 3 at 1, 4 at 6, 5 at 7; the later 3 is gone


def test_core_takes_several_rounds():
    user, item = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1])
    assert core(user, item, 2).tolist() == [0, 1, 2, 3]
    assert core(user, item, 3).tolist() == []
    assert core(np.array([], int), np.array([], int)).tolist() == []


def five_core():
    return [review(f"u{u}", f"i{i}", 100 * u + i) for u in range(5) for i in range(5)]


def test_skips_are_counted(tmp_path):
    broken = [
        {"parent_asin": "i1", "timestamp": 1},
        {"user_id": "u1", "timestamp": 1},
        review("u1", "i1", None),
        review("u1", "i1", "2020"),
        review("u1", "i1", True),
        review("", "i1", 1),
        review(7, "i1", 1),
    ]
    metadata = [
        {"parent_asin": "i0", "title": "First", "features": ["f", "g"], "store": "S", "images": "odd", "unknown": {"x": 1}},
        {"parent_asin": "i0", "title": "Second"},
        {"parent_asin": "i1", "title": 5, "description": [None]},
        {"parent_asin": "elsewhere", "title": "x"},
        {"title": "no id"},
    ]
    summary = prepare_raw(write_raw(tmp_path / "raw", five_core() + broken, metadata), CATEGORY, "games", root=tmp_path)
    dropped = read_private(summary.path).info["dropped"]
    assert dropped["reviews_without_fields"] == len(broken)
    assert dropped["repeated_metadata"] == 1
    assert dropped["metadata_fields_of_wrong_type"] == 2
    assert dropped["items_without_metadata"] == 3
    rows = dict(zip(read_private(summary.path).item_ids, Domain.read(summary.path / "public").items.to_pylist(), strict=True))
    assert (rows["i0"]["title"], rows["i0"]["brand"], rows["i0"]["features"]) == ("First", "S", "f, g")
    assert rows["i1"]["text"] is None
    assert summary.release == "2023"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b'{"user_id": "u"}\n{"user_id": \n', "line 2: broken JSON"),
        (b'{"user_id": "u"}\n{"user_id": "\xff"}\n', "line 2: not UTF-8"),
        (b'{"user_id": "u"}\n[1]\n', "line 2: not a JSON object"),
        (b'{"user_id": "u"}\n', "no review with user_id"),
    ],
)
def test_bad_review_files(tmp_path, data, message):
    raw = write_raw(tmp_path, five_core())
    (raw / "review_categories" / f"{CATEGORY}.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_raw(raw, CATEGORY)


def test_truncated_gzip_names_the_line(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    lines = "".join(json.dumps({"n": n, "text": f"{n * 7919 % 1000003}" * 9}) + "\n" for n in range(5000)).encode()
    path.write_bytes(gzip.compress(lines)[:-2000])
    with pytest.raises(DataError, match=r"x.jsonl.gz after line [1-9]\d*: the gzip file is truncated"):
        list(json_lines(path))
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match="truncated or damaged"):
        list(json_lines(path))


def test_missing_files_and_empty_cores(tmp_path):
    with pytest.raises(DataError, match=r"Video_Games.jsonl \(or .jsonl.gz\) is missing"):
        read_raw(tmp_path, CATEGORY)
    with pytest.raises(DataError, match="5-core"):
        read_raw(write_raw(tmp_path, five_core()[:-1]), CATEGORY)


def picture(side: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(out, kind)
    return out.getvalue()


def test_pictures_are_checked(tmp_path):
    good = picture(50)
    assert check_picture(good) == good
    assert check_picture(picture(50, "PNG")) == picture(50, "PNG")
    assert check_picture(good[: len(good) // 2]) is None
    assert check_picture(b"<html>not found</html>") is None
    assert check_picture(b"") is None
    assert check_picture(picture(20, "BMP")) is None
    smaller = check_picture(picture(1500))
    assert smaller is not None
    assert Image.open(io.BytesIO(smaller)).size == (1024, 1024)
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    assert check_picture(bomb.getvalue()) is None
    for name, data in {"a.jpg": good, "b.png": b"no", "other.jpg": good, "a.txt": b"x"}.items():
        (tmp_path / name).write_bytes(data)
    assert local_pictures(tmp_path, ["a", "b", "c"]) == ({"a": good}, {"b": "not_a_picture"})
    assert local_pictures(tmp_path / "absent", ["a"]) == ({}, {})
