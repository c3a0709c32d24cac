"""Importers: what they take as given, what they refuse, and what the shared sets hold."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.contract import Domain
from harness.data.card import make_card
from harness.data.domain import DataError, read_private, validate_domain
from harness.data.formats import FORMATS, parquet, recbole, s3rec
from harness.data.importers import import_domain


def named(folder) -> dict[str, list[str]]:
    """user -> whole history, in source ids, as the written domain holds it."""
    domain, private = Domain.read(folder / "public"), read_private(folder)
    inputs, ids = domain.test_inputs(10**6), private.item_ids
    return {user: [ids[i] for i in (*inputs[u], private.targets[u])] for u, user in enumerate(private.user_ids)}


@pytest.mark.parametrize("name", FORMATS)
def test_lists_are_taken_as_given(name, tmp_path, writers):
    given = [[0, 1, 2, 1], [2, 2, 2], [0, 1], [3, 4, 0], [1]]
    summary = import_domain(writers[name](tmp_path / "in", given), "d", root=tmp_path / "out")
    validate_domain(summary.path)
    assert named(summary.path) == {str(u): [str(i) for i in items] for u, items in enumerate(given) if len(items) >= 3}
    assert read_private(summary.path).info["dropped"]["users_below_3"] == 2
    assert summary.counts["items"] == 5


@pytest.mark.parametrize("name", FORMATS)
def test_prepare_keeps_the_earliest_and_the_five_core(name, tmp_path, writers):
    core = [[(u + k) % 6 for k in range(5)] for u in range(6)]  # 6 users x 5 items: every item five times
    given = [[*items, items[0]] for items in core] + [[0, 1, 2, 6], [6, 6, 6, 6, 6]]
    summary = import_domain(writers[name](tmp_path / "in", given), "d", root=tmp_path / "out", prepare=True)
    assert named(summary.path) == {str(u): [str(i) for i in items] for u, items in enumerate(core)}
    assert summary.counts["items"] == 6
    dropped = read_private(summary.path).info["dropped"]
    assert dropped["repeated_items"] == 10
    assert dropped["interactions_by_5_core"] == 5
    if name != "s3rec":  # text follows its item
        texts = Domain.read(summary.path / "public").texts
        end = "" if name == "utgrec" else "."  # a sentence is taken as it is, parts are joined
        assert texts == [f"title {item}{end}" for item in read_private(summary.path).item_ids]


def test_all_formats_give_the_same_lists(tmp_path, lists, writers):
    found = []
    for name in FORMATS:
        summary = import_domain(writers[name](tmp_path / name, lists), "d", root=tmp_path / ("out_" + name))
        found.append((named(summary.path), (summary.path / "public" / "users.parquet").read_bytes()))
    assert all(other == found[0] for other in found)


def test_recbole_orders_by_time_then_line(tmp_path):
    inter = tmp_path / "x.inter"
    inter.write_text(
        "item_id:token\tuser_id:token\trating:float\ttimestamp:float\n"
        "a\tu\t1\t20.5\nb\tu\t1\t10\nc\tu\t1\t20.5\nq\tv\t1\t3\nr\tv\t1\t2\ns\tv\t1\t1\nd\tu\t1\t5\n"
    )
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\na\tA a\nlonely\tno one\n")
    summary = import_domain(inter, "d", root=tmp_path)
    assert named(summary.path) == {"u": ["d", "b", "a", "c"], "v": ["s", "r", "q"]}
    assert summary.tie_rate == pytest.approx(1 / 5)
    texts = dict(zip(read_private(summary.path).item_ids, Domain.read(summary.path / "public").items["text"].to_pylist(), strict=True))
    assert texts.pop("a") == "A a."
    assert texts.pop("lonely") == "no one."  # a candidate although no one has it
    assert set(texts.values()) == {None}  # items of lists only: a row without text


def test_parquet_takes_text_ids_and_items_of_lists_only(tmp_path):
    pq.write_table(pa.table({"user_id": ["u", "v"], "item_ids": [["a", "b", "z"], ["b", "a", "b"]]}), tmp_path / "sequences.parquet")
    items = {"item_id": ["b", "a", "c"], "text": ["bee", None, "sea"], "codes_q": [[1, 2], [3, 4], [5, 6]], "asin": ["B", "A", "C"]}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    summary = import_domain(tmp_path, "d", root=tmp_path / "out")
    assert named(summary.path) == {"u": ["a", "b", "z"], "v": ["b", "a", "b"]}
    table = Domain.read(summary.path / "public").items
    rows = dict(zip(read_private(summary.path).item_ids, table.to_pylist(), strict=True))
    assert {name: row["text"] for name, row in rows.items()} == {"a": None, "b": "bee", "c": "sea", "z": None}
    assert {name: row["codes_q"] for name, row in rows.items()} == {"a": [3, 4], "b": [1, 2], "c": [5, 6], "z": None}
    assert "asin" not in table.column_names


def test_parquet_times_give_the_tie_rate(tmp_path):
    table = {"user_id": [1], "item_ids": [[0, 1, 2, 0]], "timestamps": [[5, 5, 6, 7]]}
    pq.write_table(pa.table(table), tmp_path / "sequences.parquet")
    pq.write_table(pa.table({"item_id": [0, 1, 2]}), tmp_path / "items.parquet")
    summary = import_domain(tmp_path, "d", root=tmp_path / "out")
    assert summary.tie_rate == pytest.approx(1 / 3)
    assert read_private(summary.path).times.tolist() == [7]


GOOD_ITEMS = {"item_id": [0, 1, 2], "title": ["a", "b", "c"]}
GOOD_LISTS = {"user_id": [0, 1], "item_ids": [[0, 1, 2], [2, 1, 0]]}


@pytest.mark.parametrize(
    ("sequences", "items", "message"),
    [
        ({**GOOD_LISTS, "item_ids": [[0, 1, 2], [2, 3, 0]]}, GOOD_ITEMS, r"sequences.parquet row 1: item 3 is outside 0\.\.2"),
        ({**GOOD_LISTS, "item_ids": [[0, 1, -1], [2, 1, 0]]}, GOOD_ITEMS, "row 0: item -1 is outside"),
        ({**GOOD_LISTS, "user_id": [7, 7]}, GOOD_ITEMS, "sequences.parquet row 1: user_id '7' stands already in row 0"),
        ({**GOOD_LISTS, "user_id": [7, None]}, GOOD_ITEMS, "sequences.parquet row 1: 'user_id' is null"),
        ({**GOOD_LISTS, "user_id": [0.5, 1.5]}, GOOD_ITEMS, "'user_id' has the type double"),
        ({**GOOD_LISTS, "item_ids": [[0, 1, 2], None]}, GOOD_ITEMS, "row 1: 'item_ids' is null"),
        ({**GOOD_LISTS, "item_ids": [[0, 1, 2], [0, None, 1]]}, GOOD_ITEMS, "row 1: 'item_ids' holds a null"),
        ({**GOOD_LISTS, "item_ids": [0, 1]}, GOOD_ITEMS, "must hold a list"),
        ({**GOOD_LISTS, "item_ids": [["0", "1", "2"], ["1"]]}, GOOD_ITEMS, "use one type for both"),
        ({"user_id": [0], "items": [[0, 1, 2]]}, GOOD_ITEMS, "the column 'item_ids' is missing; it has user_id, items"),
        (GOOD_LISTS, {**GOOD_ITEMS, "titel": ["x", "y", "z"]}, r"unknown column 'titel' \(did you mean 'title'\?\).*--ignore titel"),
        (GOOD_LISTS, {**GOOD_ITEMS, "item_id": [0, 1, 1]}, "items.parquet row 2: item_id '1' stands already in row 1"),
        (GOOD_LISTS, {**GOOD_ITEMS, "title": [1, 2, 3]}, "'title' has the type int64"),
        (GOOD_LISTS, {**GOOD_ITEMS, "codes_a": ["x", "y", "z"]}, "'codes_a' has the type string.*lists of integers"),
        (GOOD_LISTS, {"item_id": pa.array([], pa.int32())}, "items.parquet has no rows"),
        ({**GOOD_LISTS, "timestamps": [[1, 2, 3], [1, 2]]}, GOOD_ITEMS, "row 1: 'timestamps' and 'item_ids' differ in length"),
        ({**GOOD_LISTS, "timestamps": [[1.5, 2, 3], [1, 2, 3]]}, GOOD_ITEMS, "times are integers"),
    ],
)
def test_bad_parquet(tmp_path, sequences, items, message):
    pq.write_table(pa.table(sequences), tmp_path / "sequences.parquet")
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=message):
        import_domain(tmp_path, "d", root=tmp_path / "out")
    assert not (tmp_path / "out" / "d").exists()


def test_parquet_files_missing_or_damaged(tmp_path):
    pq.write_table(pa.table(GOOD_LISTS), tmp_path / "sequences.parquet")
    with pytest.raises(DataError, match=r"items.parquet is missing"):
        parquet.read(tmp_path)
    (tmp_path / "items.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"items.parquet: not a readable parquet file"):
        parquet.read(tmp_path)


def test_ignore_leaves_a_column_out(tmp_path):
    pq.write_table(pa.table(GOOD_LISTS), tmp_path / "sequences.parquet")
    pq.write_table(pa.table({**GOOD_ITEMS, "price": [1.0, 2.0, 3.0]}), tmp_path / "items.parquet")
    summary = import_domain(tmp_path, "d", root=tmp_path / "out", ignore=["price", "title"])
    table = Domain.read(summary.path / "public").items
    assert "price" not in table.column_names
    assert table["title"].null_count == 3


HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.inter is empty"),
        (HEAD.encode(), "has a header and nothing else"),
        (HEAD.encode() + b"u\ti\n", "line 2: 2 fields, the header has 3"),
        (HEAD.encode() + b"u\ti\t1\n\nu\tj\t1\n", "line 3 is empty"),
        (HEAD.encode() + b"u\ti\t1\nu\tj\tnoon\n", "line 3: the timestamp 'noon' is not a number"),
        (HEAD.encode() + b"u\ti\tnan\n", "line 2: the timestamp 'nan'"),
        (HEAD.encode() + b"u\t\xff\t1\n", "line 2: not UTF-8"),
        (HEAD.encode() + b"\ti\t1\n", "line 2: an empty user_id or item_id"),
        (b"user_id\titem_id\n1\t2\n", "line 1: 'user_id' is no column of an atomic file"),
        (b"user_id:token\titem_id:tokens\n1\t2\n", "'item_id:tokens' is no column"),
        (b"user_id:token\titem_id:token\tuser_id:token\n1\t2\t3\n", "'user_id' stands there twice"),
        (b"user_id:token\tartist_id:token\n1\t2\n", "the column 'item_id' is missing"),
        (b"user_id:token\titem_id:token\ttimestmp:float\n1\t2\t3\n", "unknown column 'timestmp' .did you mean 'timestamp'"),
    ],
)
def test_bad_recbole(tmp_path, content, message):
    (tmp_path / "x.inter").write_bytes(content)
    with pytest.raises(DataError, match=message):
        recbole.read(tmp_path / "x.inter")


def test_bad_recbole_items(tmp_path):
    (tmp_path / "x.inter").write_text(HEAD + "u\ti\t1\n")
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\ni\tone\ni\ttwo\n")
    with pytest.raises(DataError, match=r"x.item line 3: the item 'i' stands there twice"):
        recbole.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"1 2 3 4\n1 5 6 7\n", "line 2: the user '1' stands already in line 1"),
        (b"1 2 3 4\n2\n", "line 2: the user '2' without items"),
        (b"1 2 3 4\n\n2 3 4 5\n", "line 2 is empty"),
        (b"1 2 3 4\n2 \xfe 4 5\n", "line 2: not UTF-8"),
    ],
)
def test_bad_s3rec(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        s3rec.read(tmp_path / "x.txt")


def test_formats_that_cannot_be_told(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        import_domain(tmp_path / "no", "d", root=tmp_path)
    with pytest.raises(DataError, match="no format that is known"):
        import_domain(tmp_path, "d", root=tmp_path)
    with pytest.raises(DataError, match=r"unknown format 'recbol' \(did you mean 'recbole'"):
        import_domain(tmp_path, "d", root=tmp_path, format="recbol")
    (tmp_path / "a.txt").write_text("1 2 3 4\n")
    (tmp_path / "b.txt").write_text("1 2 3 4\n")
    with pytest.raises(DataError, match="has 2 files"):
        import_domain(tmp_path, "d", root=tmp_path)


@pytest.mark.parametrize(
    "name", ["beauty2014", "office2014", "scientific2018", "instruments2018_mql", "sports2014", "cell2014", "arts2018_mql"]
)
def test_shared_sets(name, tmp_path, shared_data):
    summary = import_domain(shared_data / name, name, root=tmp_path)
    counts = json.loads((shared_data / name / "dataset.json").read_text())["counts"]
    assert [summary.counts[key] for key in ("users", "items", "interactions")] == [counts[key] for key in ("users", "items", "inter")]
    card = make_card(summary.path)
    assert card.expected is not None
    assert card.differences == []
    codes = [name for name in counts["filled"] if name.startswith("codes_")]
    assert set(codes) <= set(Domain.read(summary.path / "public").items.column_names)


def test_every_candidate_of_a_catalogue_stays(tmp_path, shared_data):
    summary = import_domain(shared_data / "cds_agentcf", "cds", root=tmp_path)
    assert (summary.counts["users"], summary.counts["items"]) == (200, 64_031)
    assert make_card(summary.path).items_without_training > 60_000
