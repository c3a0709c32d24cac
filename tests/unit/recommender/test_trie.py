"""The trie against a plain dictionary of prefixes: children, steps, leaves, items; both of its forms; its memory."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from utgrec.recommender.trie import Trie, hashed
from utgrec.semantic_ids import ExtraDigit, SemanticIds

Prefix = tuple[int, ...]

SHAPES = {
    "one code": ((7,), (0,)),
    "two codes": ((5, 9), (0, 1)),
    "shared books": ((4, 8, 8), (0, 1, 1)),
    "uneven": ((3, 11, 2, 6), (0, 1, 2, 3)),
    "a digit of one": ((6, 6, 1), (0, 1, 2)),
    "six codes": ((3,) * 6, (0, 1, 2, 3, 4, 5)),
    "longer than one number": ((2**20, 2**20, 2**20, 2**20), (0, 1, 2, 3)),
}


def random_ids(shape: str, seed: int = 0) -> SemanticIds:
    widths, books = SHAPES[shape]
    rng = np.random.default_rng(seed)
    few = [rng.integers(0, width, 6) for width in widths]  # so that prefixes branch and some items share a tuple
    return SemanticIds.of(np.stack([rng.choice(column, 80) for column in few], 1), widths, books)


class Slow:
    """The same set as a dictionary: the children of every prefix, the items of every tuple."""

    def __init__(self, ids: SemanticIds):
        self.codes = [tuple(row) for row in ids.codes_IL.tolist()]
        self.children: dict[Prefix, set[int]] = defaultdict(set)
        self.items: dict[Prefix, set[int]] = defaultdict(set)
        for item, codes in enumerate(self.codes):
            self.items[codes].add(item)
            for level, code in enumerate(codes):
                self.children[codes[:level]].add(code)

    def prefixes(self, level: int) -> list[Prefix]:
        """The nodes of a level, in the order that the trie promises."""
        return sorted({codes[:level] for codes in self.codes})


@pytest.fixture(params=SHAPES)
def ids(request: pytest.FixtureRequest) -> SemanticIds:
    return random_ids(request.param)


@pytest.fixture(params=["dense", "csr", "mixed"])
def trie(request: pytest.FixtureRequest, ids: SemanticIds) -> Trie:
    limit = {"dense": 1 << 30, "csr": 0, "mixed": 4 * max(ids.widths) * 2}[request.param]
    if request.param == "dense" and max(ids.widths) > 1000:
        limit = 1 << 26
    made = Trie.of(ids, dense_bytes=limit)
    forms = {level.dense_NW is not None for level in made.levels}
    assert request.param != "csr" or forms == {False}
    assert request.param != "dense" or True in forms
    return made


def test_every_node_has_the_children_of_its_prefix(ids: SemanticIds, trie: Trie) -> None:
    slow = Slow(ids)
    for level in range(ids.length):
        prefixes, below = slow.prefixes(level), {prefix: node for node, prefix in enumerate(slow.prefixes(level + 1))}
        edges = trie.levels[level]
        assert (edges.n_nodes, edges.n_children, edges.width) == (len(prefixes), len(below), ids.widths[level])
        assert edges.offset == ids.offset_L[level] and edges.fan_out == max(len(slow.children[prefix]) for prefix in prefixes)
        state = torch.arange(-1, len(prefixes))  # the dead state first
        codes, nodes = trie.candidates(level, state)
        assert codes.dtype == nodes.dtype == torch.int32 and codes.shape == nodes.shape == (len(state), edges.fan_out)
        assert (nodes[0] == -1).all() and (codes[nodes < 0] == 0).all()
        for prefix, row_codes, row_nodes in zip(prefixes, codes[1:].tolist(), nodes[1:].tolist(), strict=True):
            legal = [code for code, node in zip(row_codes, row_nodes, strict=True) if node >= 0]
            assert legal == sorted(slow.children[prefix]) and row_nodes[: len(legal)] == [below[(*prefix, code)] for code in legal]
        if edges.width > 1000:
            continue  # [nodes, width] would be large; step() below looks at all children
        children = trie.children(level, state)
        assert children.dtype == torch.int32 and (children[0] == -1).all()
        expected = [[below.get((*prefix, code), -1) for code in range(edges.width)] for prefix in prefixes]
        assert children[1:].tolist() == expected


def test_steps_along_and_beside_every_item(ids: SemanticIds, trie: Trie) -> None:
    slow = Slow(ids)
    codes = torch.tensor(ids.codes_IL)
    state = torch.zeros(ids.n_items, dtype=torch.int32)
    for level in range(ids.length):
        node = {prefix: index for index, prefix in enumerate(slow.prefixes(level))}
        assert state.tolist() == [node[row[:level]] for row in slow.codes]
        for wrong in (-1, ids.widths[level], 2**31 - 1, -(2**31)):
            assert (trie.step(level, state, torch.full_like(state, wrong)) == -1).all()
        assert (trie.step(level, torch.full_like(state, -1), codes[:, level]) == -1).all()
        beside = trie.step(level, state, (codes[:, level] + 1) % ids.widths[level])
        legal = [
            (code + 1) % ids.widths[level] in slow.children[row[:level]]
            for row, code in zip(slow.codes, codes[:, level].tolist(), strict=True)
        ]
        assert (beside >= 0).tolist() == legal
        state = trie.step(level, state, codes[:, level])
    assert torch.equal(state, trie.leaves(codes))


def test_leaves_hold_their_items_and_lookup_finds_them(ids: SemanticIds, trie: Trie) -> None:
    slow = Slow(ids)
    tuples = slow.prefixes(ids.length)
    assert (trie.n_items, trie.n_leaves, trie.length) == (80, len(tuples), ids.length)
    items = trie.items_of(torch.arange(-1, len(tuples)))
    assert items.shape[1] == trie.max_items == max(len(slow.items[codes]) for codes in tuples)
    assert (items[0] == -1).all() and trie.unique == ids.unique
    for codes, row in zip(tuples, items[1:].tolist(), strict=True):
        held = [item for item in row if item >= 0]
        assert set(held) == slow.items[codes] and row == held + [-1] * (len(row) - len(held))
        assert held == sorted(held, key=lambda item: int(hashed(np.array([item]), seed=0)[0]))
    assert trie.lookup(torch.tensor(tuples)).tolist() == items[1:, 0].tolist()


def test_lookup_of_tuples_that_no_item_has(ids: SemanticIds, trie: Trie) -> None:
    slow = Slow(ids)
    rng = np.random.default_rng(1)
    near = ids.codes_IL[rng.integers(0, 80, 500)].astype(np.int64)
    near[np.arange(500), rng.integers(0, ids.length, 500)] += rng.integers(-3, 4, 500)
    far = rng.integers(-(2**40), 2**40, (100, ids.length))
    codes = np.concatenate([near, far])
    expected = [tuple(row) in slow.items for row in codes.tolist()]
    assert 0 < sum(expected) < 500
    found = trie.lookup(torch.from_numpy(codes).reshape(2, 300, ids.length)).reshape(-1)
    assert (found >= 0).tolist() == expected
    for row, item in zip(codes.tolist(), found.tolist(), strict=True):
        assert item < 0 or item in slow.items[tuple(row)]


def test_unique_ids_come_back_as_their_items() -> None:
    ids = ExtraDigit().repair(random_ids("shared books"))
    trie = Trie.of(ids)
    assert trie.unique and trie.n_leaves == ids.n_items
    assert trie.lookup(torch.tensor(ids.codes_IL)).tolist() == list(range(ids.n_items))
    assert trie.items_I[trie.leaves(torch.tensor(ids.codes_IL))].tolist() == list(range(ids.n_items))


def test_items_of_one_leaf_follow_the_seed() -> None:
    ids = SemanticIds.of(np.zeros((200, 2), int))
    orders = [Trie.of(ids, seed=seed).items_of(torch.tensor([0]))[0].tolist() for seed in (0, 0, 1, 2**63)]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert all(abs(np.corrcoef(order, np.arange(200))[0, 1]) < 0.25 for order in orders)  # 3.5 standard errors


def test_the_hash_is_alike_everywhere() -> None:
    """Whole-number arithmetic, written a second time with Python's numbers."""

    def slow(number: int, seed: int) -> int:
        def mixed(x: int) -> int:
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
            return x ^ (x >> 31)

        step = 0x9E3779B97F4A7C15
        return mixed(((number + 1) * step + mixed((seed + step) % 2**64)) % 2**64)

    for seed in (0, 1, 12345678901234567890):
        assert hashed(np.arange(5), seed).tolist() == [slow(number, seed) for number in range(5)]


def slow_ranked(trie: Trie, leaves: list[int], k: int) -> tuple[list[int], list[int]]:
    items, beams = [], []
    for beam, leaf in enumerate(leaves):
        held = [item for item in trie.items_of(torch.tensor([leaf]))[0].tolist() if item >= 0] or [-1]
        items += held
        beams += [beam] * len(held)
    return (items + [-1] * k)[:k], (beams + [-1] * k)[:k]


@pytest.mark.parametrize("k", [1, 4, 10, 40])
@pytest.mark.parametrize("repaired", [False, True])
def test_beams_become_ranked_items(k: int, repaired: bool) -> None:
    raw = random_ids("two codes")
    trie = Trie.of(ExtraDigit().repair(raw) if repaired else raw)
    rng = np.random.default_rng(k)
    leaves = np.stack([rng.permutation(trie.n_leaves)[:10] for _ in range(30)])
    leaves[rng.random(leaves.shape) < 0.2] = -1
    leaves[0] = -1
    items, beams = trie.ranked(torch.from_numpy(leaves), k)
    assert items.shape == beams.shape == (30, k)
    for row, row_items, row_beams in zip(leaves.tolist(), items.tolist(), beams.tolist(), strict=True):
        assert (row_items, row_beams) == slow_ranked(trie, row, k)


def test_memory_of_12_thousand_items_and_of_a_million() -> None:
    """The figures that the head of trie.py states: random ids of 4 x 256 codes."""
    rng = np.random.default_rng(0)
    for n_items, csr, dense, items, dense_all, fan_out in (
        (12_000, 0.5e6, 24e6, 0.14e6, 24e6, [256, 59, 4, 2]),
        (1_000_000, 25e6, 67e6, 12e6, 1062e6, [256, 256, 34, 4]),
    ):
        ids = SemanticIds.of(rng.integers(0, 256, (n_items, 4)), (256,) * 4)
        trie = Trie.of(ids)
        assert trie.bytes == pytest.approx({"csr": csr, "dense": dense, "items": items, "dense_all": dense_all}, rel=0.1)
        assert [level.dense_NW is not None for level in trie.levels] == [True] * 3 + [n_items == 12_000]
        assert [level.fan_out for level in trie.levels] == pytest.approx(fan_out, rel=0.3)
        found = trie.leaves(torch.tensor(ids.codes_IL[:1000]))
        assert trie.lookup(torch.tensor(ids.codes_IL[:1000])).ge(0).all() and found.max() < trie.n_leaves


def test_keys_beyond_32_bits() -> None:
    """Nodes x width above 2^31: the keys are int64, and steps still find every item and no other."""
    widths = (2**12, 2**20, 2**10)
    rng = np.random.default_rng(0)
    ids = SemanticIds.of(np.stack([rng.integers(0, width, 5000) for width in widths], 1), widths)
    trie = Trie.of(ids)
    assert [level.keys_C.dtype for level in trie.levels] == [torch.int32, torch.int64, torch.int32]
    codes = torch.tensor(ids.codes_IL)
    assert trie.lookup(codes).tolist() == list(range(5000))
    assert (trie.lookup(codes.flip(0).roll(1, 1)) == -1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dense_bytes", [0, 1 << 26])
def test_the_same_on_a_gpu(dense_bytes: int) -> None:
    ids = random_ids("uneven")
    here = Trie.of(ids, dense_bytes=dense_bytes)
    there = Trie.of(ids, "cuda", dense_bytes=dense_bytes)
    assert there.device.type == "cuda" and here.to("cuda").device == there.device
    state, codes = torch.zeros(80, dtype=torch.int32), torch.tensor(ids.codes_IL)
    for level in range(ids.length):
        assert torch.equal(there.children(level, state.cuda()).cpu(), here.children(level, state))
        for mine, other in zip(here.candidates(level, state), there.candidates(level, state.cuda()), strict=True):
            assert torch.equal(mine, other.cpu())
        state = here.step(level, state, codes[:, level])
    assert torch.equal(there.lookup(codes.cuda()).cpu(), here.lookup(codes))
    for mine, other in zip(here.ranked(state[None], 30), there.ranked(state[None].cuda(), 30), strict=True):
        assert torch.equal(mine, other.cpu())
