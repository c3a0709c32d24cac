"""The two routes to a domain: the rules applied to reviews, and the authors' 5-core files. Both against a plain-Python oracle, digest
for digest, and against each other; files that are not what they must be are refused by name."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter

import numpy as np
import pytest

from harness.data import jsonl
from harness.data.domain import DataError, SourceDomain, ragged, read_private, validate_domain, write_domain
from harness.data.last_out import SPLITS, find_last_out, read_last_out
from harness.data.prepare import prepare_raw, read_raw
from harness.data.reviews import read_reviews, strong_rows
from harness.data.simulate import simulate_raw

CATEGORY = "Video_Games"
LAST_OUT = "benchmark/5core/last_out"
HEADER = "user_id,parent_asin,rating,timestamp\n"


@pytest.fixture(autouse=True)
def _no_cards(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CARDS", str(tmp_path / "no cards"))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    simulate_raw(folder, categories=[CATEGORY, "Software"], users=150, items=80)
    return folder


@pytest.fixture
def raw(simulated, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(simulated, tmp_path / "raw")


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def oracle(raw, category):
    """The source domain by the rules, one step after the other."""
    users: dict[str, list] = {}
    for place, row in enumerate(lines(raw / "review_categories" / f"{category}.jsonl.gz")):
        if "user_id" in row:
            users.setdefault(row["user_id"], []).append((row["timestamp"], place, row["parent_asin"]))
    kept: dict[str, dict[str, int]] = {}
    for user, rows in users.items():
        kept[user] = {}
        for time, _, item in sorted(rows):
            kept[user].setdefault(item, time)
    while True:
        count = Counter(item for items in kept.values() for item in items)
        smaller = {user: {item: time for item, time in items.items() if count[item] >= 5} for user, items in kept.items()}
        smaller = {user: items for user, items in smaller.items() if len(items) >= 5}
        if smaller == kept:
            break
        kept = smaller
    records: dict[str, dict] = {}
    for record in lines(raw / "meta_categories" / f"meta_{category}.jsonl.gz"):
        records.setdefault(record["parent_asin"], record)
    item_ids = sorted(count)
    row_of = {item: row for row, item in enumerate(item_ids)}
    fields = {"title": "title", "brand": "store", "features": "features", "categories": "categories", "description": "description"}
    return SourceDomain(
        user_ids=list(kept),
        sequences=ragged([[row_of[item] for item in items] for items in kept.values()]),
        item_ids=item_ids,
        columns={name: [records.get(item, {}).get(key) for item in item_ids] for name, key in fields.items()},
        times=np.array([time for items in kept.values() for time in items.values()]),
        release="2023",
    )


@pytest.mark.parametrize("category", [CATEGORY, "Software"])
def test_every_route_gives_the_digest_of_the_oracle(simulated, tmp_path, category, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK", 30_000)
    pictures = read_raw(simulated, category)[1]
    expected = write_domain(tmp_path / "oracle" / "d", oracle(simulated, category), pictures=pictures)
    for route in ("raw", "last-out", "both", "auto"):
        found = prepare_raw(simulated, category, "d", root=tmp_path / route, route=route)
        assert (found.digest, found.counts, found.tie_rate) == (expected.digest, expected.counts, expected.tie_rate), route
        assert validate_domain(found.path).digest == expected.digest
        hidden, right = read_private(found.path), read_private(expected.path)
        assert hidden.info["digest"] == right.info["digest"]
        assert (hidden.user_ids, hidden.item_ids) == (right.user_ids, right.item_ids)
        assert hidden.history_times.values.tolist() == right.history_times.values.tolist()
        assert hidden.info["source"]["route"] == ("last-out" if route == "auto" else route)
        # the same domain from the other route is the same domain: it stays
        assert not prepare_raw(simulated, category, "d", root=tmp_path / "oracle", route=route).created


def test_plain_files_without_names_and_with_windows_line_ends(raw, tmp_path):
    expected = prepare_raw(raw, CATEGORY, "a", root=tmp_path, route="raw").digest
    for split in SPLITS:
        path = raw / LAST_OUT / f"{CATEGORY}.{split}.csv.gz"
        text = gzip.decompress(path.read_bytes()).decode()
        assert text.startswith(HEADER)
        plain = text if split == "valid" else text.removeprefix(HEADER)
        path.with_suffix("").write_bytes(jsonl.BOM * (split == "test") + plain.replace("\n", "\r\n").encode())
        path.unlink()
    assert prepare_raw(raw, CATEGORY, "b", root=tmp_path, route="last-out").digest == expected


def test_auto_takes_what_is_there(raw, tmp_path):
    assert find_last_out(raw, CATEGORY) is not None
    (raw / LAST_OUT / f"{CATEGORY}.valid.csv.gz").unlink()
    for route in ("auto", "last-out", "both"):
        with pytest.raises(DataError, match=r"Video_Games.valid.csv \(or .gz\) is missing: .*--part 5core"):
            read_raw(raw, CATEGORY, route)
    shutil.rmtree(raw / "benchmark")
    assert read_raw(raw, CATEGORY, "auto")[0].source["route"] == "raw"
    with pytest.raises(DataError, match=r"train.csv, .*valid.csv, .*test.csv .or .gz. is missing"):
        read_raw(raw, CATEGORY, "last-out")
    with pytest.raises(DataError, match=r"'lastout' is no route.*last-out"):
        read_raw(raw, CATEGORY, "lastout")


def test_last_out_does_without_reviews(raw, tmp_path):
    expected = prepare_raw(raw, CATEGORY, "a", root=tmp_path).digest
    shutil.rmtree(raw / "review_categories")
    assert prepare_raw(raw, CATEGORY, "b", root=tmp_path, route="auto").digest == expected
    with pytest.raises(DataError, match=r"Video_Games.jsonl .*missing"):
        read_raw(raw, CATEGORY, "both")


# ---------------------------------------------------------------------------------------------------------- differences


def change_reviews(raw, change):
    path = raw / "review_categories" / f"{CATEGORY}.jsonl.gz"
    rows = change(lines(path))
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def without_a_user(rows):
    core_user = Counter(row.get("user_id") for row in rows).most_common(1)[0][0]
    return [row for row in rows if row.get("user_id") != core_user]


def last_review_first(rows):
    return rows[::-1]


def an_hour_later(rows):
    user = Counter(row.get("user_id") for row in rows).most_common(1)[0][0]
    return [row | ({"timestamp": row["timestamp"] + 3_600_000} if row.get("user_id") == user else {}) for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_user, r"only in the 5-core files .*Likely: .*not of one revision"),
        (last_review_first, r"users have another history .*of equal time in another order. Likely: the lines of the review file"),
        (an_hour_later, r"1 users have another history .*same items at other times. Likely: .*another review than the earliest"),
    ],
)
def test_both_refuses_a_difference(raw, change, message):
    read_raw(raw, CATEGORY, "both")
    change_reviews(raw, change)
    with pytest.raises(DataError, match=f"{CATEGORY}: the two routes disagree: .*{message}"):
        read_raw(raw, CATEGORY, "both")


def split_file(raw, split, change):
    path = raw / LAST_OUT / f"{CATEGORY}.{split}.csv.gz"
    text = change(gzip.decompress(path.read_bytes()).decode().splitlines())
    path.write_bytes(gzip.compress("".join(line + "\n" for line in text).encode()))


def edited(at, field, value):
    def change(text):
        fields = text[at].split(",")
        fields[field] = value(fields[field]) if callable(value) else value
        return [*text[:at], ",".join(fields), *text[at + 1 :]]

    return change


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", lambda text: text[:1], "has 2 interactions, in a 5-core at least 5"),
        ("test", lambda text: text[:-1], "test.csv.gz: the user .* has 0 lines, right is one"),
        ("valid", lambda text: [*text, text[-1]], "valid.csv.gz: the user .* has 2 lines"),
        ("test", lambda text: [text[0], "stranger,B0,5.0,9", *text[1:]], "valid.csv.gz: the user 'stranger' has 0 lines"),
        ("valid", edited(3, 3, "1"), "times of the user .* run backwards"),
        ("train", lambda text: [*text[:2], text[1], *text[2:]], "the user .* has the item .* twice"),
        ("train", edited(2, 1, "B0"), "the item 'B0' has 1 interactions"),
        ("train", edited(4, 3, "soon"), "train.csv.gz: .*[Rr]ow #5.*soon"),
        ("train", edited(4, 3, ""), "train.csv.gz line 5: timestamp is empty"),
        ("valid", edited(4, 0, ""), "valid.csv.gz line 5: user_id is empty"),
        ("test", lambda text: [*text[:6], text[6] + ",more", *text[7:]], "test.csv.gz: .*Row #7.*Expected 4 columns, got 5"),
        ("test", lambda text: [text[0].replace("timestamp", "time"), *text[1:]], "test.csv.gz: .*timestamp"),
        ("test", lambda text: [], "test.csv.gz is empty"),
    ],
)
def test_files_that_are_not_the_published_ones(raw, split, change, message):
    split_file(raw, split, change)
    with pytest.raises(DataError, match=message):
        read_raw(raw, CATEGORY, "last-out")


def test_truncated_and_foreign_bytes(raw):
    path = raw / LAST_OUT / f"{CATEGORY}.train.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"train.csv.gz: the gzip file is truncated"):
        read_raw(raw, CATEGORY, "last-out")
    path.write_bytes(gzip.compress(gzip.decompress(whole).replace(b"B0", b"B\xff", 1)))
    with pytest.raises(DataError, match=r"train.csv.gz: .*UTF8"):
        read_raw(raw, CATEGORY, "last-out")


def test_ids_stay_text(raw, tmp_path):
    """Ids that look like numbers, nothing or dates are ids."""
    for split in SPLITS:
        split_file(raw, split, lambda text: [line.replace(",B0", ",00") for line in text])
    found = read_last_out(find_last_out(raw, CATEGORY))
    assert all(name.startswith("00") and len(name) == 10 for name in found.item_ids)


# ----------------------------------------------------------------------------------------------------------- many rows


def test_nothing_of_the_core_is_lost_before_ids_are_numbers(tmp_path):
    """The rows thrown out by hash hold none of the core, and repeats are counted exactly: 60,000 rows with many of each."""
    rng = np.random.default_rng(5)
    user, item = rng.zipf(1.4, 60_000) % 20_000, rng.zipf(1.3, 60_000) % 3_000
    path = tmp_path / "x.jsonl"
    rows = [f'{{"user_id": "u{u}", "parent_asin": "i{i}", "timestamp": {n}}}\n' for n, (u, i) in enumerate(zip(user, item, strict=True))]
    path.write_text("".join(rows))
    reviews = read_reviews(path)
    strong, repeats = strong_rows(reviews, 5)
    assert repeats == 60_000 - len(set(zip(user.tolist(), item.tolist(), strict=True)))
    assert len(strong) < 54_000
    users, items = np.bincount(user), np.bincount(item)
    enough = np.flatnonzero((users[user] >= 5) & (items[item] >= 5))
    users, items = np.bincount(user[enough]), np.bincount(item[enough])
    needed = enough[(users[user[enough]] >= 5) & (items[item[enough]] >= 5)]
    assert set(needed) <= set(strong.tolist())
    numbers, user_ids, _, item_ids = reviews.take(strong)
    assert [user_ids[row] for row in numbers[:50]] == [f"u{u}" for u in user[strong[:50]]]
    assert set(item_ids) == {f"i{i}" for i in item[strong]}
