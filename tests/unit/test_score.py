"""Blind scoring on hand-made domains: every number below can be counted on fingers."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import contract, metrics, score

TRAIN = [[0, 1], [0, 1, 2], [0], [3, 0, 1, 2, 3, 0]]
VALID = [2, 0, 1, 1]
TARGETS = [1, 4, 0, 2]
N_ITEMS = 60


def make_domain(folder: Path, *, public_digest: str = "d1", targets: dict[str, list[int | None]] | None = None) -> Path:
    public, private = folder / "public", folder / "private"
    public.mkdir(parents=True)
    private.mkdir()
    users = list(range(len(TRAIN)))
    pq.write_table(pa.table({
        "user": pa.array(users, pa.int32()), "train": pa.array(TRAIN, pa.list_(pa.int32())), "valid": pa.array(VALID, pa.int32()),
    }), public / "users.parquet")  # fmt: skip
    info = {"schema": 1, "name": "toy", "counts": {"users": len(TRAIN), "items": N_ITEMS}, "digest": "d1", "protocol": "loo-v1"}
    (public / "domain.json").write_text(json.dumps(info))
    pq.write_table(pa.table(targets or {"user": users, "target": TARGETS}), private / "targets.parquet")
    (private / "private.json").write_text(json.dumps({"schema": 1, "public_digest": public_digest}))
    return folder


def lists(*starts: list[int]) -> np.ndarray:
    """[U, 50] lists that begin as given and are spent after that."""
    items = np.full((len(starts), contract.K), -1, np.int32)
    for row, start in zip(items, starts, strict=True):
        row[: len(start)] = start
    return items


def write(path: Path, items: np.ndarray) -> Path:
    np.savez_compressed(path, users=np.arange(len(items)), items=items)
    return path


def run(folder: Path, items: np.ndarray, valid: np.ndarray | None = None) -> score.Scored:
    valid_path = None if valid is None else write(folder / "valid_predictions.npz", valid)
    return score.score(write(folder / "predictions.npz", items), valid_path, contract.Domain.read(folder / "public"), folder / "private")


def test_metrics_over_all_users(tmp_path: Path) -> None:
    scored = run(make_domain(tmp_path), lists([1], [0, 4], [5, 6], []))
    assert scored.ranks.tolist() == [1, 2, 0, 0]
    assert scored.metrics["recall_at_1"].mean == 1 / 4
    assert scored.metrics["recall_at_5"].mean == 2 / 4
    assert scored.metrics["ndcg_at_5"].mean == pytest.approx((1 + 1 / np.log2(3)) / 4, rel=1e-15)
    assert scored.metrics["mrr_at_50"].mean == 1.5 / 4
    assert scored.metrics["coverage_at_10"].mean == 5 / N_ITEMS
    assert set(scored.metrics) == set(metrics.METRICS)
    assert {metric.n for metric in scored.metrics.values()} == {4}
    assert scored.valid_metrics == {}


def test_validation_is_scored_against_the_validation_items(tmp_path: Path) -> None:
    scored = run(make_domain(tmp_path), lists([], [], [], []), lists([2], [0], [0], [0]))
    assert scored.valid_metrics["recall_at_1"] == 2 / 4
    assert scored.metrics["recall_at_50"].mean == 0


def test_behaviour_counts_spent_slots(tmp_path: Path) -> None:
    items = lists([1], [0, 4], [5, 6], [])
    assert run(make_domain(tmp_path), items).behaviour == {
        "invalid_slots": 195 / 200,
        "empty_lists": 1 / 4,
        "coverage_at_10": 5 / N_ITEMS,
    }


def test_users_may_be_written_in_any_order(tmp_path: Path) -> None:
    folder = make_domain(tmp_path, targets={"user": [3, 0, 2, 1], "target": [2, 1, 0, 4]})
    path = folder / "predictions.npz"
    np.savez(path, users=np.array([2, 0, 3, 1]), items=lists([5, 6], [1], [], [0, 4]))
    scored = score.score(path, None, contract.Domain.read(folder / "public"), folder / "private")
    assert scored.ranks.tolist() == [1, 2, 0, 0]


def test_slices_by_hand(tmp_path: Path) -> None:
    # training counts: item 0: 5, item 1: 3, item 2: 2, item 3: 2, the rest 0; targets 1, 4, 0, 2; test inputs of 3, 4, 2 and 7 items
    slices = run(make_domain(tmp_path), lists([1], [0, 4], [5, 6], [])).slices
    assert {name: s.n for name, s in slices["warm_cold"].items()} == {"warm": 3, "cold": 1}
    assert slices["warm_cold"]["cold"].metrics["recall_at_5"] == 1
    assert slices["warm_cold"]["warm"].metrics["recall_at_5"] == pytest.approx(1 / 3)
    # falling counts 5 3 2 2 of 12: 0 and 1 begin before 6 (head); 2 begins at 8, before 9.6 (mid); 3 begins at 10 (tail)
    assert {name: s.n for name, s in slices["popularity_share"].items()} == {"head": 2, "mid": 1, "tail": 1}
    assert slices["popularity_share"]["tail"].metrics["mrr_at_50"] == 1 / 2
    assert {name: s.n for name, s in slices["history_length"].items()} == {"2-5": 3, "6-10": 1, "11-20": 0, ">20": 0}
    assert slices["history_length"][">20"].metrics == {}
    assert {name: s.n for name, s in slices["target_popularity"].items()} == {
        "[0,20)": 4, "[20,40)": 0, "[40,60)": 0, "[60,80)": 0, "[80,100)": 0, "[100,inf)": 0,
    }  # fmt: skip


def test_every_kind_of_slice_holds_every_user_once(tmp_path: Path) -> None:
    domain = contract.Domain.read(make_domain(tmp_path) / "public")
    rng = np.random.default_rng(0)
    lengths = np.concatenate([np.arange(1, 25), rng.integers(1, 60, 300)])
    train = contract.Ragged(rng.zipf(1.3, lengths.sum()) % N_ITEMS, np.concatenate([[0], np.cumsum(lengths)]))
    domain = contract.Domain(domain.path, "toy", len(lengths), N_ITEMS, train, np.zeros(len(lengths), int), domain.info)
    ranks, targets = rng.integers(0, 51, len(lengths)), rng.integers(0, N_ITEMS, len(lengths))
    for kind, parts in score.slices(ranks, targets, domain).items():
        assert sum(part.n for part in parts.values()) == len(lengths), kind
        total = sum(part.n * part.metrics["ndcg_at_10"] for part in parts.values() if part.n)
        assert total / len(lengths) == pytest.approx(metrics.means(ranks)["ndcg_at_10"], rel=1e-12)


def test_bins_end_where_they_say(tmp_path: Path) -> None:
    domain = contract.Domain.read(make_domain(tmp_path) / "public")
    counts = [0, 19, 20, 39, 40, 99, 100]
    values = np.repeat(np.arange(len(counts)), counts)
    lengths = np.array([1, 4, 5, 9, 10, 19, 20])  # test inputs of 2, 5, 6, 10, 11, 20 and 21 items
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets[-1] = len(values)  # the last user takes what is left: only its being over 20 matters
    domain = contract.Domain(domain.path, "toy", 7, len(counts), contract.Ragged(values, offsets), np.zeros(7, int), domain.info)
    slices = score.slices(np.ones(7, int), np.arange(7), domain)
    assert [part.n for part in slices["target_popularity"].values()] == [2, 2, 1, 0, 1, 1]
    assert [part.n for part in slices["history_length"].values()] == [2, 2, 2, 1]


def test_popularity_share_borders() -> None:
    assert score.popularity_share(np.array([1, 5, 3, 1, 0])).tolist() == [2, 0, 1, 2, 2]  # 5 of 10 is the first half exactly
    assert score.popularity_share(np.array([2, 2, 2, 2])).tolist() == [0, 0, 1, 1]
    assert score.popularity_share(np.array([2, 2, 2, 2, 2])).tolist() == [0, 0, 0, 1, 2]  # the third crosses 50 %; ties by number


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"user": [0, 1, 2], "target": [1, 4, 0]}, "each user of 0..3"),
        ({"user": [0, 1, 2, 2], "target": [1, 4, 0, 0]}, "each user of 0..3"),
        ({"user": [0, 1, 2, 3], "target": [1, 4, 0, N_ITEMS]}, "outside"),
        ({"user": [0, 1, 2, 3], "target": [1, 4, None, 0]}, "whole numbers"),
        ({"user": [0, 1, 2, 3], "item": [1, 4, 2, 0]}, "cannot be read"),
    ],
)
def test_targets_must_cover_every_user(tmp_path: Path, targets: dict[str, list[int | None]], message: str) -> None:
    folder = make_domain(tmp_path, targets=targets)
    with pytest.raises(contract.ContractError, match=message) as error:
        run(folder, lists([], [], [], []))
    assert "targets.parquet" in str(error.value)
    assert "prepare the domain again" in str(error.value)


def test_parts_of_different_preparations_are_not_scored(tmp_path: Path) -> None:
    with pytest.raises(contract.ContractError, match="another public part"):
        run(make_domain(tmp_path, public_digest="d0"), lists([], [], [], []))


def test_invalid_output_passes_through(tmp_path: Path) -> None:
    folder = make_domain(tmp_path)
    with pytest.raises(contract.InvalidOutput, match="twice"):
        run(folder, lists([1, 1], [], [], []))
    with pytest.raises(contract.InvalidOutput, match=r"valid_predictions\.npz"):
        run(folder, lists([], [], [], []), lists([N_ITEMS], [], [], []))
    with pytest.raises(contract.InvalidOutput, match="missing"):
        score.score(folder / "nothing.npz", None, contract.Domain.read(folder / "public"), folder / "private")


def test_score_key_follows_its_parts() -> None:
    one = score.score_key("fit", score.targets_digest(np.array([1, 2])))
    assert one == score.score_key("fit", score.targets_digest(np.array([1, 2], np.int64)))
    others = [
        score.score_key("fit2", score.targets_digest(np.array([1, 2]))),
        score.score_key("fit", score.targets_digest(np.array([2, 1]))),
        score.score_key("fit", score.targets_digest(np.array([1, 2])), "loo-masked-v1"),
    ]
    assert len({one, *others}) == 4


def test_score_key_follows_the_metric_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = score.score_key("fit", "targets")
    monkeypatch.setattr(metrics, "source_hash", lambda: "changed")
    assert score.score_key("fit", "targets") != before


def test_oracle_is_scored_like_a_method(tmp_path: Path) -> None:
    folder = make_domain(tmp_path)
    public = contract.Domain.read(folder / "public")
    assert score.oracle_metrics(public, folder / "private") is None
    write(folder / "private" / "oracle.npz", lists([1], [4], [0], [0, 2]))
    oracle = score.oracle_metrics(public, folder / "private")
    assert oracle is not None
    assert (oracle["recall_at_1"], oracle["recall_at_5"]) == (3 / 4, 1)


def test_ranks_are_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "private" / "ranks" / "run.npz"
    for ranks in (np.array([0, 1, 50]), np.array([3, 2, 1])):  # the second write replaces the first
        score.write_ranks(path, ranks)
        assert score.read_ranks(path).tolist() == ranks.tolist()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["run.npz"]
