"""Beam search against exhaustive scoring and against a beam search written out in plain Python."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from harness.contract import Ragged
from tests.generative import TINY, World, world
from utgrec.recommender.data import Histories
from utgrec.recommender.decode import Lists, Search, batches, beam_recall, best, exhaustive, recommend
from utgrec.recommender.inference import Inference, Weights
from utgrec.recommender.trie import Trie
from utgrec.semantic_ids import SemanticIds

WORLDS = {
    "one code": dict(items=30, widths=(40,)),
    "three codes": dict(items=60, widths=(6, 5, 4)),
    "four codes": dict(items=80, widths=(4, 4, 4, 4)),
    "five codes": dict(items=60, widths=(3, 3, 3, 3, 3)),
    "shared books": dict(items=70, widths=(4, 8, 8), books=(0, 1, 1)),
    "shared leaves": dict(items=70, widths=(4, 4, 3), unique=False),
    "one item": dict(items=1, widths=(4, 3)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decoded(made: World, k: int, beams: int, **how: object) -> Lists:
    return recommend(made.model, made.trie, made.histories, k=k, beams=beams, **how)


@torch.no_grad()
def log_probabilities(made: World) -> np.ndarray:
    """[U, I, L, V]: teacher forcing of every item, through the model's training forward. The oracle."""
    out = []
    for user in range(len(made.histories)):
        tokens_IS = made.histories.rows(np.array([user])).expand(made.ids.n_items, -1)
        codes_IL = torch.from_numpy(made.ids.tokens_IL.astype(np.int64)) + made.first_code
        out.append(made.model.logits(tokens_IS, codes_IL).log_softmax(-1).numpy())
    return np.stack(out)


def written_out(made: World, log_p_ILV: np.ndarray, beams: int) -> list[tuple[float, tuple[int, ...]]]:
    """Textbook beam search of one user: (score, codes), best first; ties to the lower beam, then the lower code."""
    first_item = {tuple(row[:length]): item for item, row in enumerate(made.ids.codes_IL.tolist()) for length in range(len(row))}
    alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for position, (width, offset) in enumerate(zip(made.ids.widths, made.ids.offset_L, strict=True)):
        legal = {tuple(row[: position + 1]) for row in made.ids.codes_IL.tolist()}
        wider = [
            (np.float32(score) + log_p_ILV[first_item[prefix], position, made.first_code + offset + code], place, (*prefix, code))
            for place, (score, prefix) in enumerate(alive)
            for code in range(width)
            if (*prefix, code) in legal
        ]
        alive = [(score, codes) for score, _, codes in sorted(wider, key=lambda beam: (-beam[0], beam[1], beam[2][-1]))[:beams]]
    return alive


@pytest.mark.parametrize("name", WORLDS)
def test_a_beam_as_wide_as_the_trie_is_exhaustive_scoring(name: str) -> None:
    made = world(users=5, seed=1, **WORLDS[name], **TINY)
    n = made.ids.n_items
    steps_L = np.arange(made.ids.length)
    scores_UI = log_probabilities(made)[:, np.arange(n)[:, None], steps_L, made.ids.tokens_IL + made.first_code].sum(-1)
    lists = exhaustive(made.model, made.trie, made.histories, k=n)
    assert (np.sort(lists.items_UK, 1) == np.arange(n)).all()
    found_UI = np.take_along_axis(scores_UI, lists.items_UK.astype(np.int64), 1)
    assert np.abs(found_UI - lists.scores_UK).max() < 1e-5
    assert (found_UI[:, :-1] - found_UI[:, 1:] > -1e-5).all()  # where a gap is larger, the ranks are those of the oracle


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("beams", [1, 3, 12])
def test_narrow_beams_equal_a_search_written_out(name: str, beams: int) -> None:
    made = world(users=4, seed=2, **WORLDS[name], **TINY)
    lists = decoded(made, beams, beams, batch=3)
    for user, log_p_ILV in enumerate(log_probabilities(made)):
        expected = written_out(made, log_p_ILV, beams)
        items = [item for _, codes in expected for item in made.trie.items_of(made.trie.leaves(torch.tensor(codes))) if item >= 0]
        scores = [score for score, codes in expected for _ in range((made.ids.codes_IL == codes).all(1).sum())]
        filled = min(beams, len(items))
        assert lists.items_UK[user].tolist() == [*map(int, items[:filled]), *[-1] * (beams - filled)]
        assert np.abs(lists.scores_UK[user, :filled] - scores[:filled]).max() < 1e-5
        assert np.isneginf(lists.scores_UK[user, filled:]).all()


def test_fewer_items_than_beams_leave_empty_slots_at_the_end() -> None:
    made = world(items=7, users=3, **TINY)
    lists = decoded(made, 20, 25)
    assert (np.sort(lists.items_UK[:, :7], 1) == np.arange(7)).all()
    assert (lists.items_UK[:, 7:] == -1).all() and np.isneginf(lists.scores_UK[:, 7:]).all()
    assert lists.invalid_10 == lists.invalid_k == 0


def test_items_of_a_leaf_follow_each_other_and_fill_the_list() -> None:
    codes = [[0, 0]] * 5 + [[1, 1]] * 4
    made = world(items=9, users=4, widths=(2, 2), unique=False, **TINY)
    made.ids = SemanticIds.of(codes, (2, 2))
    made.trie = Trie.of(made.ids)
    lists = decoded(made, 6, 6)
    orders = [made.trie.items_of(torch.tensor(leaf))[: 5 - leaf].tolist() for leaf in (0, 1)]
    for row, scores in zip(lists.items_UK.tolist(), lists.scores_UK, strict=True):
        first = 0 if row[0] in orders[0] else 1
        assert row == (orders[first] + orders[1 - first])[:6]
        assert len(set(scores.tolist())) == 2


def test_equal_scores_go_to_the_lower_beam_and_then_to_the_lower_code() -> None:
    made = world(items=100, users=2, widths=(5, 5, 5), **TINY)
    with torch.no_grad():  # all tokens alike: every tuple has the same score
        made.model.tokens.weight[:] = made.model.tokens.weight[0]
    in_order = np.lexsort(made.ids.codes_IL.T[::-1])
    lists = decoded(made, 30, 30)
    assert (lists.items_UK == in_order[:30]).all()
    assert np.unique(lists.scores_UK).size == 1


def test_best_is_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    values = np.array([-0.0, 0.0, -1e-30, -1.5, -1.5000001, -3.25, -np.inf], np.float32)
    scores = torch.from_numpy(rng.choice(values, (50, 40)))
    for beams in (1, 7, 40, 90):
        found, place = best(scores, beams)
        expected = torch.sort(scores + 0.0, dim=1, descending=True, stable=True).indices[:, :beams]
        assert torch.equal(place, expected) and torch.equal(found, scores.gather(1, expected))


def test_a_users_result_depends_neither_on_the_batch_nor_on_the_threads() -> None:
    made = world(items=400, users=37, widths=(8, 8, 8, 8), **TINY)
    whole = decoded(made, 10, 10, batch=37)
    for batch, threads in ((1, 1), (5, 2), (None, 1)):
        torch.set_num_threads(threads)
        lists = decoded(made, 10, 10, batch=batch)
        assert torch.get_num_threads() == threads
        assert np.abs(lists.scores_UK - whole.scores_UK).max() < 1e-5
        np.testing.assert_array_equal(lists.items_UK, whole.items_UK)
    torch.set_num_threads(1)
    again = decoded(made, 10, 10, batch=37)
    assert (again.scores_UK == whole.scores_UK).all()


def test_a_table_of_openings_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(items=200, users=60, widths=(8, 8, 8), **TINY)
    assert made.trie.levels[2].n_nodes < 60 * 12
    with_tables = decoded(made, 12, 12)
    monkeypatch.setattr("utgrec.recommender.decode.OPENINGS", 0)
    without = decoded(made, 12, 12)
    assert np.abs(with_tables.scores_UK - without.scores_UK).max() < 1e-5
    np.testing.assert_array_equal(with_tables.items_UK, without.items_UK)


def test_batches_hold_every_user_once_and_like_lengths_together() -> None:
    lengths = np.random.default_rng(1).integers(1, 82, 101)
    made = list(batches(lengths, lambda length: 300 // length))
    assert sorted(np.concatenate([rows for rows, _ in made]).tolist()) == list(range(101))
    for rows, padded in made:
        assert padded == (len(set(lengths[rows])) > 1)
        assert len(rows) * lengths[rows].max() <= 300
    assert all(lengths[one].min() >= lengths[two].max() for (one, _), (two, _) in itertools.pairwise(made))


def test_free_decoding_spends_slots_on_tuples_that_no_item_has() -> None:
    made = world(items=40, users=6, widths=(8, 8), **TINY)
    tuples = made.model.shape.vocabulary**2
    lists = decoded(made, tuples, tuples, constrained=False)  # wide enough for all: every item is somewhere
    bound = decoded(made, 40, 64)
    assert np.isfinite(lists.scores_UK).all() and (np.diff(lists.scores_UK, axis=1) <= 0).all()
    assert np.exp(lists.scores_UK.astype(np.float64)).sum(1) == pytest.approx(1)
    for items, scores, legal, of_legal in zip(*lists[:2], *bound[:2], strict=True):
        assert items[items >= 0].tolist() == legal.tolist()
        assert np.abs(scores[items >= 0] - of_legal).max() < 1e-5
    assert lists.invalid_k == pytest.approx((tuples - 40) / tuples)
    assert lists.invalid_10 == pytest.approx((lists.items_UK[:, :10] < 0).mean())
    assert bound.invalid_10 == bound.invalid_k == 0


def test_bf16_finds_nearly_the_same_items() -> None:
    made = world(items=2_000, users=20, widths=(16, 16, 16, 16), **TINY)
    exact, fast = decoded(made, 10, 50), decoded(made, 10, 50, precision="bf16")
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.items_UK, fast.items_UK, strict=True)])
    assert shared > 0.8
    assert np.abs(exact.scores_UK - fast.scores_UK).max() < 0.5
    assert (exact.scores_UK != fast.scores_UK).any()


def test_a_million_items() -> None:
    made = world(items=1_000_000, users=3, widths=(256,) * 4, longest=4, **TINY)
    assert made.trie.bytes["csr"] < 30e6 and made.trie.levels[3].dense_NW is None
    lists = decoded(made, 20, 20)
    codes_UKL = torch.from_numpy(made.ids.codes_IL[lists.items_UK])
    assert (made.trie.lookup(codes_UKL).numpy() == lists.items_UK).all()
    with torch.no_grad():
        for user in range(3):
            tokens_KS = made.histories.rows(np.array([user])).expand(20, -1)
            tokens_KL = codes_UKL[user].long() + torch.from_numpy(made.ids.offset_L).long() + made.first_code
            scores_K = made.model.logits(tokens_KS, tokens_KL).log_softmax(-1).gather(-1, tokens_KL[..., None]).sum((1, 2))
            assert np.abs(scores_K.numpy() - lists.scores_UK[user]).max() < 1e-5


def test_recall_of_a_beam_against_exhaustive_scoring() -> None:
    made = world(items=300, users=8, widths=(8, 8, 8), **TINY)
    recalls = [beam_recall(made.model, made.trie, made.histories, beams=beams, at=5) for beams in (5, 20, 300)]
    assert recalls[0] < 1 and recalls == sorted(recalls) and recalls[-1] == 1


@pytest.mark.parametrize("constrained", [True, False])
def test_no_step_looks_at_values(constrained: bool) -> None:
    """Tensors without values (device ``meta``) go through: on a GPU nothing waits, and a graph could be captured."""
    made = world(items=50, users=4, widths=(8, 8, 8), unique=False, **TINY)
    weights, trie = Weights.of(made.model.to("meta")), made.trie.to("meta")
    search = Search(weights, trie, 12, made.first_code, constrained, users=0)
    for padded in (True, False):
        leaf_BK, score_BK = search(Inference(weights), torch.empty(4, 21, dtype=torch.int64, device="meta"), padded)
        assert leaf_BK.shape == score_BK.shape == (4, 12)
        assert trie.ranked(leaf_BK, 10)[0].shape == (4, 10)


def test_an_error_in_one_thread_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows, asked = world(items=50, users=40, **TINY), Histories.rows, []

    def failing(histories: Histories, indices: np.ndarray) -> torch.Tensor:
        asked.append(indices)
        if len(asked) == 3:
            raise OSError("gone")
        return rows(histories, indices)

    monkeypatch.setattr(Histories, "rows", failing)
    torch.set_num_threads(2)
    with pytest.raises(OSError, match="gone"):
        decoded(made, 5, 5, batch=1)
    assert torch.get_num_threads() == 2 and len(asked) < 40


def test_bad_input() -> None:
    made = world(items=20, users=2, **TINY)
    with pytest.raises(ValueError, match="k = 11 items cannot come from 10 beams"):
        decoded(made, 11, 10)
    with pytest.raises(ValueError, match="precision 'fp8' is unknown; use one of fp32, bf16"):
        decoded(made, 5, 10, precision="fp8")


def test_no_users_no_lists() -> None:
    made = world(items=20, users=2, **TINY)
    nobody = Histories(Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64)), made.ids, np.zeros(0, np.int64))
    lists = recommend(made.model, made.trie, nobody, k=5, beams=10)
    assert lists.items_UK.shape == lists.scores_UK.shape == (0, 5)
