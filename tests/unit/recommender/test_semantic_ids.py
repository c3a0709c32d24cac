"""Semantic ids: the value, its file, given ids, and each way to repair collisions against slow or literal counterparts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.contract import Domain, Ragged
from harness.data.importers import import_domain
from utgrec import semantic_ids
from utgrec.semantic_ids import Collisions, ExtraDigit, IdsError, Keep, NearestLast, Repair, SemanticIds, packed

LEAVES = np.arange(8.0)[:, None]
"""The book of the parity vectors: rows are the numbers 0..7."""


def crowded(seed: int, n_items: int, width: int, prefixes: int, length: int = 3) -> tuple[SemanticIds, NearestLast]:
    """Random vectors on few prefixes: raw ids of a root book and a shared leaf book, and the strategy for them."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(length, n_items, 2))
    pool = rng.normal(size=(length, prefixes, 2))
    vectors[:-1] = pool[:-1, rng.integers(0, prefixes, n_items)]  # items of one prefix have equal vectors before the last
    root, leaf = rng.normal(size=(4, 2)), rng.normal(size=(width, 2))
    books = [root, *[leaf] * (length - 1)]
    codes = [((t[:, None] - book) ** 2).sum(2).argmin(1) for t, book in zip(vectors, books, strict=True)]
    raw = SemanticIds.of(np.stack(codes, 1), (4, *[width] * (length - 1)), (0, *[1] * (length - 1)))
    return raw, NearestLast.of(list(vectors), books)


def released_procedure(raw: SemanticIds, strategy: NearestLast) -> list[tuple[int, ...]] | None:
    """The rounds of the released code, step for step with dictionaries, over all rows; None if it would have to fall back."""
    codes = [tuple(map(int, row)) for row in raw.codes_IL]
    width = raw.widths[-1]
    distance = strategy.distances(np.arange(raw.n_items), raw.length - 1)
    rank = np.argsort(distance, axis=1, kind="stable")
    groups: dict[tuple[int, ...], list[int]] = {}
    for item, code in enumerate(codes):
        groups.setdefault(code, []).append(item)
    used = {code for code, items in groups.items() if len(items) == 1}
    pending = [(items, False) for items in groups.values() if len(items) > 1]
    for k in range(2, width + 1):
        pool: dict[tuple[int, ...], list[int]] = {}
        for items, taken in pending:
            keeper = None
            if not taken and len({rank[i, k - 2] for i in items}) == 1:
                keeper = min(items, key=lambda i: distance[i, rank[i, k - 2]])
            for item in items:
                candidate = (*codes[item][:-1], int(rank[item, k - 2 if item == keeper else k - 1]))
                if item == keeper and candidate not in used:
                    used.add(candidate)
                    codes[item] = candidate
                else:
                    pool.setdefault(candidate, []).append(item)
        pending = []
        for candidate, items in pool.items():
            if len(items) == 1 and candidate not in used:
                used.add(candidate)
                codes[items[0]] = candidate
            else:
                pending.append((items, candidate in used))
        if not pending:
            return codes
    return None


# ------------------------------------------------------------------------------------------------------- the value


def test_books_that_are_shared_share_their_tokens() -> None:
    ids = SemanticIds.of([[5, 0, 255], [0, 511, 3], [7, 9, 9]], (256, 512, 512), (0, 1, 1))
    assert ids.tokens_IL.tolist() == [[5, 256, 511], [0, 767, 259], [7, 265, 265]]
    assert ids.offset_L.tolist() == [0, 256, 256]
    assert (ids.n_codes, ids.n_items, ids.length, ids.capacity) == (768, 3, 3, 256 * 512 * 512)
    separate = SemanticIds.of(ids.codes_IL, ids.widths)
    assert separate.books == (0, 1, 2) and separate.n_codes == 1280 and separate.tokens_IL[1].tolist() == [0, 767, 771]
    assert ids.digest != separate.digest


def test_the_value_cannot_be_changed_from_outside() -> None:
    codes = np.array([[1, 2], [3, 4]])
    ids = SemanticIds.of(codes)
    codes[0, 0] = 99
    assert ids.codes_IL.tolist() == [[1, 2], [3, 4]] and ids.codes_IL.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        ids.codes_IL[0, 0] = 1


@pytest.mark.parametrize(
    ("codes", "widths", "books", "message"),
    [
        (np.zeros((0, 3), int), (4, 4, 4), (0, 1, 2), "0 items of 3 codes; a domain without items"),
        (np.zeros((3, 0), int), (), (), "3 items of 0 codes"),
        (np.zeros((2, 2)), (4, 4), (0, 1), "whole numbers"),
        (np.zeros(3, int), (4,), (0,), "whole numbers"),
        ([[1, 2], [1, 4]], (4, 4), (0, 1), r"item 1 has code 4 in position 2, whose codes are 0\.\.3"),
        ([[1, 2], [-1, 0]], (4, 4), (0, 1), "item 1 has code -1 in position 1"),
        ([[1, 2]], (4,), (0, 1), "2 codes an item, but 1 widths and 2 books"),
        ([[1, 2]], (4, 4), (1, 0), "must be numbered"),
        ([[1, 2, 3]], (4, 4, 8), (0, 1, 1), r"book 1 is shared by positions of different widths \[4, 8\]"),
        ([[1, 2]], (2**31, 4), (0, 1), "do not fit into int32"),
        ([[2**40, 2]], None, None, "do not fit into int32"),
    ],
)
def test_what_cannot_be_an_id_is_refused(codes: object, widths: object, books: object, message: str) -> None:
    with pytest.raises(IdsError, match=message):
        SemanticIds.of(codes, widths, books)  # type: ignore[arg-type]


def test_collisions_count_items_groups_and_the_largest() -> None:
    ids = SemanticIds.of([[0, 0], [0, 1], [0, 0], [1, 1], [1, 1], [1, 1], [1, 0], [0, 2]])
    assert ids.collisions == Collisions(items=5, rate=5 / 8, groups=2, largest=3)
    assert not ids.unique
    assert SemanticIds.of([[0, 0], [0, 1]]).collisions == Collisions(0, 0.0, 0, 1)


@pytest.mark.parametrize("widths", [(3, 5, 2), (2**31 - 10, 2**31 - 10, 7, 9), (2**20,) * 5])
def test_packed_numbers_order_like_tuples(widths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(widths))
    few = [rng.integers(0, width, 3) for width in widths]
    codes = np.stack([rng.choice(column, 300) for column in few], 1)
    key = packed(codes, widths)
    rank = {code: index for index, code in enumerate(sorted({tuple(row) for row in codes.tolist()}))}
    assert np.array_equal(np.unique(key, return_inverse=True)[1], [rank[tuple(row)] for row in codes.tolist()])


# ------------------------------------------------------------------------------------------------- nearest last code


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("targets", "raw", "expected"),
    [
        ([3.1, 3.3], [3, 3], [3, 4]),
        ([3.1, 3.3, 2.8], [3, 3, 3], [3, 4, 2]),
        ([3.1, 3.3, 4.1, 2.85], [3, 3, 4, 3], [3, 5, 4, 2]),
        ([3.1, 3.2, 4.4, 4.1, 1.9], [3, 3, 4, 4, 2], [3, 1, 5, 4, 2]),
    ],
    ids="ABCD",
)
def test_parity_with_the_released_repair(targets: list[float], raw: list[int], expected: list[int], dtype: type) -> None:
    t = np.array(targets, dtype)[:, None]
    codes = np.column_stack([np.zeros((len(t), 2), int), np.abs(t - LEAVES.T).argmin(1)])
    assert codes[:, 2].tolist() == raw
    strategy = NearestLast.of([np.zeros_like(t), np.zeros_like(t), t], [LEAVES.astype(dtype)] * 3)
    ids = strategy.repair(SemanticIds.of(codes, (8, 8, 8), (0, 1, 1)))
    assert ids.codes_IL.tolist() == [[0, 0, code] for code in expected]
    assert ids.report["moved_last"] == ids.report["items_moved"] == sum(a != b for a, b in zip(raw, expected, strict=True))
    assert ids.report["moved_code_2"] == ids.report["moved_root"] == 0


def test_equal_to_the_released_procedure_step_for_step() -> None:
    compared = 0
    for seed in range(120):
        raw, strategy = crowded(seed, n_items=60, width=(8, 16, 32)[seed % 3], prefixes=(4, 8, 40)[seed // 3 % 3])
        expected = released_procedure(raw, strategy)
        if expected is None:
            continue
        compared += 1
        ids = strategy.repair(raw)
        assert [tuple(row) for row in ids.codes_IL.tolist()] == expected
        assert ids.report["moved_code_2"] == ids.report["moved_root"] == 0
    assert compared > 60


@pytest.mark.parametrize("seed", range(40))
def test_properties_of_the_repair(seed: int) -> None:
    """Crowded problems, many beyond what the last position can hold: bijection, no needless change, counts, stability."""
    width, prefixes = (4, 8, 16)[seed % 3], (1, 3, 10)[seed // 3 % 3]
    raw, strategy = crowded(seed, n_items=60, width=width, prefixes=prefixes)
    ids = strategy.repair(raw)
    assert ids.unique and len({tuple(row) for row in ids.codes_IL.tolist()}) == 60
    assert (ids.widths, ids.books) == (raw.widths, raw.books)

    group, size = np.unique(raw.codes_IL, axis=0, return_inverse=True, return_counts=True)[1:]
    alone = size[group.ravel()] == 1
    assert np.array_equal(ids.codes_IL[alone], raw.codes_IL[alone])
    assert ids.report["collision_rate_before"] == pytest.approx((~alone).mean()) and ids.report["collision_rate"] == 0.0

    # An item leaves its prefix only if the prefix is full, and its root only if all below the root is full.
    full = {tuple(prefix) for prefix in np.unique(ids.codes_IL[:, :2], axis=0).tolist() if holds(ids, prefix) == width}
    left_root = ids.codes_IL[:, 0] != raw.codes_IL[:, 0]
    left_prefix = (ids.codes_IL[:, :2] != raw.codes_IL[:, :2]).any(1)
    assert {tuple(row) for row in raw.codes_IL[left_prefix, :2].tolist()} <= full
    assert all(holds(ids, row[:1]) == width**2 for row in raw.codes_IL[left_root].tolist())
    changed = (ids.codes_IL != raw.codes_IL).any(1)
    assert ids.report["moved_root"] == left_root.sum()
    assert ids.report["moved_code_2"] == (left_prefix & ~left_root).sum()
    assert ids.report["moved_last"] == (changed & ~left_prefix).sum()
    assert ids.report["items_moved"] == changed.sum()

    # Who went to another second code: every nearer one is full.
    distance = strategy.distances(np.arange(60), 1)
    for item in np.flatnonzero(left_prefix & ~left_root):
        root, second = ids.codes_IL[item, :2].tolist()
        nearer = np.flatnonzero(distance[item] < distance[item, second])
        assert {(root, int(code)) for code in nearer} <= full

    again = strategy.repair(ids)
    assert np.array_equal(again.codes_IL, ids.codes_IL) and again.report["items_moved"] == 0


def holds(ids: SemanticIds, prefix: list[int]) -> int:
    return int((ids.codes_IL[:, : len(prefix)] == prefix).all(1).sum())


def test_the_cases_above_reach_every_rule() -> None:
    reports = [strategy.repair(raw).report for raw, strategy in (crowded(seed, 60, 4, 1) for seed in range(6))]
    for rule in ("moved_last", "moved_code_2", "moved_root"):
        assert sum(int(report[rule]) for report in reports) > 0, rule


@pytest.mark.parametrize("cells", [1, 40, 300])
def test_chunks_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [crowded(seed, 200, 8, 12) for seed in range(6)]
    whole = [strategy.repair(raw) for raw, strategy in problems]
    monkeypatch.setattr(semantic_ids, "CELLS", cells)
    for (raw, strategy), expected in zip(problems, whole, strict=True):
        cut = strategy.repair(raw)
        assert cut.digest == expected.digest and cut.report == expected.report


def test_more_equal_items_than_rows_take_the_nearest_other_second_code() -> None:
    t = np.full((9, 1), 3.1)
    raw = SemanticIds.of(np.tile([0, 0, 3], (9, 1)), (8, 8, 8), (0, 1, 1))
    ids = NearestLast.of([np.zeros((9, 1)), np.full((9, 1), 0.2), t], [LEAVES] * 3).repair(raw)
    assert ids.codes_IL.tolist() == [[0, 0, code] for code in (3, 4, 2, 5, 1, 6, 0, 7)] + [[0, 1, 3]]
    assert (ids.report["moved_last"], ids.report["moved_code_2"], ids.report["moved_root"]) == (7, 1, 0)


def test_every_tuple_can_be_used_but_not_one_more() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(28, 1)) for _ in range(3)]
    books = [rng.normal(size=(width, 1)) for width in (3, 3, 3)]
    full = NearestLast.of([t[:27] for t in vectors], books).repair(SemanticIds.of(np.zeros((27, 3), int), (3, 3, 3)))
    assert full.unique and full.n_items == full.capacity == 27
    with pytest.raises(IdsError, match="28 items but only 27 ids"):
        NearestLast.of(vectors, books).repair(SemanticIds.of(np.zeros((28, 3), int), (3, 3, 3)))


def test_items_with_equal_vectors_are_told_apart_by_their_number() -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(size=(3, 1, 16))
    vectors = np.repeat(one, 50, axis=1)
    books = [rng.normal(size=(64, 16))] * 3
    codes = [((t[:, None] - book) ** 2).sum(2).argmin(1) for t, book in zip(vectors, books, strict=True)]
    ids = NearestLast.of(list(vectors), books).repair(SemanticIds.of(np.stack(codes, 1), (64,) * 3))
    by_distance = np.argsort(((one[2] - books[2]) ** 2).sum(1), kind="stable")
    assert ids.codes_IL[:, 2].tolist() == by_distance[:50].tolist()


def test_distances_are_asked_for_colliding_items_only() -> None:
    asked: list[tuple[list[int], int]] = []
    table = np.abs(np.array([3.1, 5.0, 3.3, 6.0])[:, None] - LEAVES.T)

    def distances(items: np.ndarray, position: int) -> np.ndarray:
        asked.append((items.tolist(), position))
        return table[items]

    ids = NearestLast(distances).repair(SemanticIds.of([[0, 3], [0, 5], [0, 3], [0, 6]], (1, 8)))
    assert ids.codes_IL[:, 1].tolist() == [3, 5, 4, 6] and asked == [([0, 2], 1)]


@pytest.mark.parametrize("table", [np.full((2, 8), np.nan), np.zeros((2, 7)), np.zeros(8)])
def test_distances_of_an_untrained_quantiser_are_refused(table: np.ndarray) -> None:
    with pytest.raises(IdsError, match=r"position 2: distances .* is the quantiser trained"):
        NearestLast(lambda items, position: table).repair(SemanticIds.of([[0, 3], [0, 3]], (1, 8)))


# ------------------------------------------------------------------------------------------------ extra digit, none


def test_extra_digit_numbers_the_items_of_a_tuple() -> None:
    raw = SemanticIds.of([[1, 1], [0, 2], [1, 1], [0, 2], [0, 0], [1, 1]], (2, 3), (0, 1))
    ids = ExtraDigit().repair(raw)
    assert ids.codes_IL.tolist() == [[1, 1, 0], [0, 2, 0], [1, 1, 1], [0, 2, 1], [0, 0, 0], [1, 1, 2]]
    assert ids.unique and ids.widths == (2, 3, 3) and ids.books == (0, 1, 2)
    assert ids.report == {
        "repair": "extra digit",
        "collision_rate_before": 5 / 6,
        "collision_groups_before": 2,
        "collision_largest_before": 3,
        "collision_rate": 0.0,
        "items_moved": 3,
        "extra_digit_width": 3,
    }
    wide = ExtraDigit(at_least=256).repair(raw)
    assert wide.widths == (2, 3, 256) and np.array_equal(wide.codes_IL, ids.codes_IL)


def test_extra_digit_after_shared_books_and_without_collisions() -> None:
    ids = ExtraDigit().repair(SemanticIds.of([[0, 1, 2], [0, 2, 1]], (4, 4, 4), (0, 1, 1)))
    assert ids.books == (0, 1, 1, 2) and ids.widths == (4, 4, 4, 1) and ids.n_codes == 9
    assert ids.codes_IL[:, 3].tolist() == [0, 0] and ids.report["items_moved"] == 0


def test_ids_that_collide_beyond_repair() -> None:
    with pytest.raises(IdsError, match=r"collide beyond repair: 5 of 6 items share one tuple.* at most 4 .*collapsed"):
        ExtraDigit(at_most=4).repair(SemanticIds.of([[0, 0]] * 5 + [[1, 1]]))


def test_keep_says_what_it_keeps() -> None:
    raw = SemanticIds.of([[0, 0], [0, 0], [1, 1]])
    ids = Keep().repair(raw)
    assert not ids.unique and ids.digest == raw.digest
    assert ids.report["repair"] == "none" and ids.report["collision_rate"] == ids.report["collision_rate_before"] == 2 / 3


def test_reports_are_what_meta_takes() -> None:
    raw, nearest = crowded(3, 60, 8, 4)
    for strategy in (Keep(), ExtraDigit(), nearest):
        report = strategy.repair(raw).report
        assert json.loads(json.dumps(report)) == report and all(type(value) in (str, int, float) for value in report.values())


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[SemanticIds, Path]]:
    ids = ExtraDigit().repair(SemanticIds.of(np.random.default_rng(0).integers(0, 9, (50, 3)), (9, 9, 9), (0, 1, 1)))
    ids.save(tmp_path / "ids.npz")
    yield ids, tmp_path / "ids.npz"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_ids_come_back_as_they_were_saved(saved: tuple[SemanticIds, Path]) -> None:
    ids, path = saved
    back = SemanticIds.load(path)
    assert back.digest == ids.digest and np.array_equal(back.codes_IL, ids.codes_IL)
    assert (back.widths, back.books, back.report) == (ids.widths, ids.books, ids.report)
    assert [file.name for file in path.parent.iterdir()] == ["ids.npz"]


def test_a_file_is_whole_or_absent(saved: tuple[SemanticIds, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ids, path = saved

    def full_disk(file: object, **arrays: np.ndarray) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space"):
        SemanticIds.of([[1, 2]]).save(path)
    with pytest.raises(OSError, match="no space"):
        ids.save(path.with_name("other.npz"))
    assert SemanticIds.load(path).digest == ids.digest and not path.with_name("other.npz").exists()


def test_a_damaged_file_is_never_taken(saved: tuple[SemanticIds, Path]) -> None:
    ids, path = saved
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(IdsError, match=r"ids\.npz: .*delete it and make the ids again"):
            SemanticIds.load(path)
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = SemanticIds.load(path)
        except IdsError:
            refused += 1
        else:  # a byte that means nothing: a time of the archive, say
            assert found.digest == ids.digest and np.array_equal(found.codes_IL, ids.codes_IL) and found.report == ids.report
    assert refused > len(whole) / 3 / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99, this program reads 1"),
        ({"digest": "0" * 64}, "digest .* its head says 000000000000"),
        ({"widths": [2, 9, 9, 9]}, "item .* has code"),
        ({"widths": [10, 9, 9, 4]}, "digest"),
        ({"books": None}, "damaged"),
    ],
)
def test_another_head_is_refused(saved: tuple[SemanticIds, Path], change: dict[str, object], message: str) -> None:
    ids, path = saved
    head = {"schema": 1, "digest": ids.digest, "widths": ids.widths, "books": ids.books, "report": ids.report} | change
    np.savez_compressed(path, codes=ids.codes_IL, head=np.frombuffer(json.dumps(head).encode(), np.uint8))
    with pytest.raises(IdsError, match=rf"ids\.npz: .*{message}.*delete it and make the ids again"):
        SemanticIds.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IdsError, match=r"ids\.npz: there are no semantic ids; run the stage"):
        SemanticIds.load(tmp_path / "ids.npz")
    np.savez(tmp_path / "ids.npz", users=np.arange(3))
    with pytest.raises(IdsError, match="not a whole file of semantic ids"):
        SemanticIds.load(tmp_path / "ids.npz")
    np.savez(tmp_path / "ids.npz", codes=np.zeros(3), head=np.frombuffer(b"[1]", np.uint8))
    with pytest.raises(IdsError, match="schema None"):
        SemanticIds.load(tmp_path / "ids.npz")


# --------------------------------------------------------------------------------------------------------- given ids


def domain_with(folder: Path, n_items: int, **columns: object) -> Domain:
    pq.write_table(pa.table({"item": pa.array(range(n_items), pa.int32()), **columns}), folder / "items.parquet")
    nothing = Ragged(np.empty(0, np.int32), np.zeros(1, np.int64))
    return Domain(folder, "small", 0, n_items, nothing, np.empty(0, np.int32), {})


@pytest.mark.parametrize("kind", [pa.list_(pa.int16()), pa.list_(pa.uint8()), pa.large_list(pa.int64()), pa.list_(pa.int32(), 3)])
def test_given_ids_are_read_from_a_list_column(tmp_path: Path, kind: pa.DataType) -> None:
    codes = [[7, 0, 5], [1, 2, 3], [7, 0, 4]]
    ids = SemanticIds.imported(domain_with(tmp_path, 3, codes_x=pa.array(codes, kind)), "codes_x")
    assert ids.codes_IL.tolist() == codes and ids.widths == (8, 3, 6) and ids.books == (0, 1, 2) and ids.unique
    assert ids.report["ids"] == "given: codes_x" and ids.report["repair"] == "none"


def test_given_ids_in_several_chunks(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).permutation(1000)[:90].reshape(30, 3)
    chunks = pa.chunked_array([pa.array(part.tolist(), pa.list_(pa.int16())) for part in np.split(codes, [7, 7, 20])])
    assert np.array_equal(SemanticIds.imported(domain_with(tmp_path, 30, codes_x=chunks), "codes_x").codes_IL, codes)


@pytest.mark.parametrize(("strategy", "length", "unique"), [(None, 3, True), (ExtraDigit(at_least=8), 3, True), (Keep(), 2, False)])
def test_given_ids_that_collide_are_repaired_as_chosen(tmp_path: Path, strategy: Repair | None, length: int, unique: bool) -> None:
    domain = domain_with(tmp_path, 4, codes_x=pa.array([[1, 1], [0, 0], [1, 1], [0, 1]], pa.list_(pa.int16())))
    ids = SemanticIds.imported(domain, "codes_x", repair=strategy)
    assert (ids.length, ids.unique) == (length, unique) and ids.report["collision_rate_before"] == 0.5
    if strategy is not None and unique:
        assert ids.widths == (2, 2, 8)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[1, 2], None, [3, 4]], "item 1 has no codes, most have 2"),
        ([[1, 2], [3, 4], []], "item 2 has no codes, most have 2"),
        ([[1, 2], [3, 4], [1, 2, 3]], r"item 2 has 3 codes, most have 2; all need as many \(1 differ\)"),
        ([[], [], []], "item 0 has no codes"),
        ([[1, 2], [3, None], [1, 2]], "1 codes are null"),
        ([[1, 2], [3, -4], [1, 2]], r"item 1 has the codes \[3, -4\]; codes count from 0"),
    ],
)
def test_given_ids_that_are_not_one_tuple_an_item(tmp_path: Path, codes: list[list[int | None] | None], message: str) -> None:
    domain = domain_with(tmp_path, 3, codes_x=pa.array(codes, pa.list_(pa.int16())))
    with pytest.raises(IdsError, match=rf"items\.parquet: column 'codes_x'.*{message}"):
        SemanticIds.imported(domain, "codes_x")


def test_a_column_that_is_not_there_or_not_ids(tmp_path: Path) -> None:
    lists = pa.array([[1], [2]], pa.list_(pa.int16()))
    domain = domain_with(tmp_path, 2, codes_rqvae=lists, codes_image=lists, codes_text=pa.array(["a", "b"]), words=lists)
    with pytest.raises(IdsError, match=r"did you mean 'codes_rqvae'.*codes_rqvae, codes_image, codes_text"):
        SemanticIds.imported(domain, "codes_rqva")
    with pytest.raises(IdsError, match="column 'codes_text' is string; ids are lists of whole numbers"):
        SemanticIds.imported(domain, "codes_text")
    with pytest.raises(IdsError, match=r"brings no ids \(no codes_\* column\)"):
        SemanticIds.imported(domain_with(tmp_path, 2), "codes_rqvae")
    empty = domain_with(tmp_path, 0, codes_x=pa.array([], pa.list_(pa.int16())))
    with pytest.raises(IdsError, match="without items there are no ids"):
        SemanticIds.imported(empty, "codes_x")


@pytest.mark.parametrize(("name", "column"), [("scientific2018", "codes_rqvae"), ("office2014", "codes_rqkmeans")])
def test_given_ids_of_real_domains(shared_data: Path, tmp_path: Path, name: str, column: str) -> None:
    """Real ids of other works, from the raw set to ids that name one item each; the collision rate by a plain count."""
    import_domain(shared_data / name, name, root=tmp_path)
    domain = Domain.read(tmp_path / name / "public")
    ids = SemanticIds.imported(domain, column)
    given = [tuple(codes) for codes in domain.items[column].to_pylist()]
    count = Counter(given)
    assert [tuple(codes) for codes in ids.codes_IL[:, :4].tolist()] == given
    assert ids.unique and ids.length == 5 and ids.widths[4] == max(count.values())
    shared = sum(size for size in count.values() if size > 1)
    assert shared > 0 and ids.report["collision_rate_before"] == pytest.approx(shared / domain.n_items)
    assert ids.report["items_moved"] == domain.n_items - len(count)
