"""The set of real items as a trie over code tokens, in torch tensors: what decoding may walk on.

In: the semantic ids of a domain (``utgrec.semantic_ids.SemanticIds``), any fixed length, any width per position.
Out: for states (nodes of a level) their legal children, for a leaf its items, for code tuples their item numbers.

A node of level l is a prefix of l codes that at least one item has; level 0 has the root alone, level L the leaves.
The nodes of a level are numbered in lexicographic order of their prefixes. So the children of a node are contiguous
and sorted by code, and the child of rank r is node ``first + r`` of the next level. -1 is the dead state (a spent beam,
an illegal prefix): it has no children, and every accessor takes it and gives it back.

Each level holds its edges as CSR (``first``, ``count``, ``codes``), and where that is small as a dense table too:

======================  ====================================================  ===========================
form                    one step for B x K states                             bytes
======================  ====================================================  ===========================
dense [nodes, width]    one gather                                            4 x nodes x width a level
CSR                     a gather of fan-out entries; a binary search where    8 x nodes + 8 x children
                        the code is given                                     a level
======================  ====================================================  ===========================

Memory (``Trie.bytes``; a test holds these figures), random ids of 4 x 256 codes: 12,000 items take 0.5 MB as CSR, 24 MB as
dense tables and 0.1 MB from leaf to item; 1,000,000 items 25 MB, 67 MB (three levels; the fourth alone would take 1 GB)
and 12 MB. The largest fan-out of the four levels is 256, 59, 4, 2 there and 256, 256, 34, 4 here.

Items that share a tuple share a leaf. They are ordered by a seeded hash of the item number, so that neither the number
nor the file decides which one comes first (design: rules of measurement).

Shapes: I items, L codes an item, W width of a level, F largest fan-out of a level, N nodes of a level, ... any batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from utgrec.semantic_ids import SemanticIds, packed

DENSE_BYTES = 64 << 20
"""A level gets a dense table if that takes at most this: 65,536 nodes x 256 codes, the third level of 4 x 256 codes."""


@dataclass(frozen=True)
class Level:
    """The edges from the nodes of level l to those of level l+1.

    ``first_N`` and ``count_N`` have one entry more than there are nodes, a node without children: index -1 means that one.
    ``codes_C`` and ``keys_C`` have an entry a child, in order; a key is node x width + code, ascending.
    """

    width: int
    """Codes of this position."""
    offset: int
    """First token of this position's book, counted from the first code token."""
    n_nodes: int
    fan_out: int
    """Children of the node that has most."""
    first_N: Tensor
    count_N: Tensor
    codes_C: Tensor
    keys_C: Tensor
    dense_NW: Tensor | None
    """[nodes + 1, width] int32: child node, or -1. The last row, and so index -1, is the dead state's. None if too large."""

    @property
    def n_children(self) -> int:
        return len(self.codes_C)

    def tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("first_N", "count_N", "codes_C", "keys_C", "dense_NW")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Trie:
    """See the head of this file. ``Trie.of(ids, device)`` builds one, ``to(device)`` moves it."""

    levels: tuple[Level, ...]
    items_I: Tensor
    """Item numbers, leaf after leaf, and a -1 at the end. With one item a leaf, ``items_I[leaf]`` is the item (-1 for -1)."""
    item_first_N: Tensor
    item_count_N: Tensor
    """Items of each leaf: ``items_I[first : first + count]``; one entry more, for the dead state."""
    max_items: int
    """Items of the leaf that has most: 1 if the ids are unique."""

    @classmethod
    def of(cls, ids: SemanticIds, device: torch.device | str = "cpu", *, seed: int = 0, dense_bytes: int = DENSE_BYTES) -> Trie:
        """Build the trie of these ids. ``seed`` orders items that share a leaf; levels above ``dense_bytes`` stay CSR only."""
        order_I, new_IL = _sort(ids, seed)
        node_I, levels = np.zeros(ids.n_items, np.int64), []  # of the sorted items; the root is node 0
        n_nodes = 1
        for position, (width, offset) in enumerate(zip(ids.widths, ids.offset_L, strict=True)):
            starts = np.flatnonzero(new_IL[:, position])  # the first item of every node of the next level
            codes_C = ids.codes_IL[order_I[starts], position].astype(np.int64)
            levels.append(_level(node_I[starts], codes_C, n_nodes, width, int(offset), dense_bytes))
            node_I = np.cumsum(new_IL[:, position]) - 1
            n_nodes = len(starts)
        count_N = np.bincount(node_I, minlength=n_nodes)
        trie = cls(
            levels=tuple(levels),
            items_I=_int32(np.append(order_I, -1)),
            item_first_N=_int32(np.append(np.cumsum(count_N) - count_N, 0)),
            item_count_N=_int32(np.append(count_N, 0)),
            max_items=int(count_N.max()),
        )
        return trie.to(device)

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def length(self) -> int:
        return len(self.levels)

    @property
    def n_items(self) -> int:
        return len(self.items_I) - 1

    @property
    def n_leaves(self) -> int:
        return len(self.item_count_N) - 1

    @property
    def unique(self) -> bool:
        """Every leaf holds one item."""
        return self.max_items == 1

    @property
    def device(self) -> torch.device:
        return self.items_I.device

    @property
    def bytes(self) -> dict[str, int]:
        """Memory by form: ``csr`` (edges), ``dense`` (tables), ``items`` (leaf to items), ``dense_all`` (if every level were dense)."""
        sizes = {"csr": 0, "dense": 0, "items": sum(_size(t) for t in (self.items_I, self.item_first_N, self.item_count_N))}
        for level in self.levels:
            for name, tensor in level.tensors().items():
                sizes["dense" if name == "dense_NW" else "csr"] += _size(tensor)
        return sizes | {"dense_all": sum(4 * (level.n_nodes + 1) * level.width for level in self.levels)}

    def to(self, device: torch.device | str) -> Trie:
        moved = [replace(level, **{name: t.to(device) for name, t in level.tensors().items()}) for level in self.levels]
        names = ("items_I", "item_first_N", "item_count_N")
        return replace(self, levels=tuple(moved), **{name: getattr(self, name).to(device) for name in names})

    # ------------------------------------------------------------------------------------------- steps from a state

    def children(self, level: int, state: Tensor) -> Tensor:
        """The child of each state for every code of the position: [...] -> [..., W] int32, -1 where no item goes on."""
        edges = self.levels[level]
        if edges.dense_NW is not None:
            return edges.dense_NW[state]
        codes, nodes = self.candidates(level, state)
        column = torch.where(nodes >= 0, codes, edges.width).long()  # what pads goes to a column that is cut off
        out = nodes.new_full((*state.shape, edges.width + 1), -1)
        return out.scatter_(-1, column, nodes)[..., :-1]

    def candidates(self, level: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """The legal children alone: [...] -> codes [..., F] and child nodes [..., F], int32, codes ascending.

        F is the level's largest fan-out; what pads has node -1 and code 0. On deep levels F is far below W.
        """
        edges = self.levels[level]
        first, count = edges.first_N[state].unsqueeze(-1), edges.count_N[state].unsqueeze(-1)
        rank = torch.arange(edges.fan_out, device=first.device, dtype=torch.int32)
        legal = rank < count
        nodes = torch.where(legal, first + rank, -1)
        codes = torch.where(legal, edges.codes_C[nodes.clamp(min=0)], 0)
        return codes, nodes

    def step(self, level: int, state: Tensor, code: Tensor) -> Tensor:
        """The child of each state for one code each: [...] -> [...] int32, -1 if no item goes on so or the code is none."""
        edges = self.levels[level]
        known = (state >= 0) & (code >= 0) & (code < edges.width)
        if edges.dense_NW is not None:
            return edges.dense_NW[torch.where(known, state, -1), torch.where(known, code, 0)]
        key = torch.where(known, state.long() * edges.width + code, -1).to(edges.keys_C.dtype)
        node = torch.searchsorted(edges.keys_C, key.contiguous()).clamp(max=edges.n_children - 1)
        return torch.where(edges.keys_C[node] == key, node, -1).int()

    # ------------------------------------------------------------------------------------------------- leaves, items

    def leaves(self, codes_NL: Tensor) -> Tensor:
        """Code tuples to leaves: [..., L] -> [...] int32, -1 where no item has the tuple. Any integers are taken."""
        state = torch.zeros(codes_NL.shape[:-1], dtype=torch.int32, device=codes_NL.device)
        for level in range(self.length):
            state = self.step(level, state, codes_NL[..., level])
        return state

    def lookup(self, codes_NL: Tensor) -> Tensor:
        """Code tuples to item numbers: [..., L] -> [...] int32, -1 where there is none; of several the first by hash."""
        leaf = self.leaves(codes_NL)
        return self.items_I[torch.where(leaf >= 0, self.item_first_N[leaf], -1)]

    def items_of(self, leaf: Tensor) -> Tensor:
        """The items of each leaf: [...] -> [..., max_items] int32 in the order of the hash, filled with -1."""
        first, count = self.item_first_N[leaf].unsqueeze(-1), self.item_count_N[leaf].unsqueeze(-1)
        rank = torch.arange(self.max_items, device=first.device, dtype=torch.int32)
        return self.items_I[torch.where(rank < count, first + rank, -1)]

    def ranked(self, leaf_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Beams, best first, as ranked items: [B, K] -> items [B, k], and the beam each slot comes from [B, k].

        A leaf fills as many slots as it has items, a dead beam one with item -1. Slots after the last beam: item -1, beam -1.
        """
        beams, slot_k = leaf_BK.shape[1], torch.arange(k, device=leaf_BK.device)
        end_BK = self.item_count_N[leaf_BK].clamp(min=1).cumsum(1)
        beam_Bk = torch.searchsorted(end_BK, slot_k.expand(len(leaf_BK), k).contiguous(), right=True)
        last_Bk = beam_Bk.clamp(max=beams - 1)
        leaf_Bk = leaf_BK.gather(1, last_Bk)
        back_Bk = end_BK.gather(1, last_Bk) - slot_k  # 1 for the last slot of a beam, its number of items for the first
        index_Bk = self.item_first_N[leaf_Bk] + self.item_count_N[leaf_Bk] - back_Bk
        spent_Bk = beam_Bk >= beams
        items_Bk = self.items_I[torch.where(spent_Bk | (leaf_Bk < 0), -1, index_Bk)]
        return items_Bk, torch.where(spent_Bk, -1, beam_Bk)


def _level(parent_C: np.ndarray, codes_C: np.ndarray, n_nodes: int, width: int, offset: int, dense_bytes: int) -> Level:
    """One level from the parent and the code of every child, both in order."""
    count_N = np.bincount(parent_C, minlength=n_nodes)
    keys_C = parent_C * width + codes_C
    dense_NW = None
    if 4 * n_nodes * width <= dense_bytes:
        dense_NW = np.full((n_nodes + 1, width), -1, np.int32)
        dense_NW[parent_C, codes_C] = np.arange(len(codes_C))
    return Level(
        width=width,
        offset=offset,
        n_nodes=n_nodes,
        fan_out=int(count_N.max()),
        first_N=_int32(np.append(np.cumsum(count_N) - count_N, 0)),
        count_N=_int32(np.append(count_N, 0)),
        codes_C=_int32(codes_C),
        keys_C=torch.from_numpy(keys_C) if n_nodes * width > np.iinfo(np.int32).max else _int32(keys_C),
        dense_NW=None if dense_NW is None else torch.from_numpy(dense_NW),
    )


def _sort(ids: SemanticIds, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items in lexicographic order of their codes, equal ones by the hash, and where a new prefix of 1..L codes begins."""
    key_I = packed(ids.codes_IL, ids.widths)
    order_I = np.argsort(key_I, kind="stable")
    same_I = np.zeros(ids.n_items, bool)  # as the one before; equal tuples are few, so they are ordered apart
    same_I[1:] = (sorted_I := key_I[order_I])[1:] == sorted_I[:-1]
    tied_I = same_I | np.append(same_I[1:], False)
    tied = order_I[tied_I]
    order_I[tied_I] = tied[np.lexsort((hashed(tied, seed), key_I[tied]))]
    codes_IL = ids.codes_IL[order_I]
    new_IL = np.ones(codes_IL.shape, bool)
    new_IL[1:] = np.logical_or.accumulate(codes_IL[1:] != codes_IL[:-1], axis=1)
    return order_I, new_IL


def hashed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A seeded hash of item numbers as uint64, alike on every machine (two rounds of the finaliser of SplitMix64)."""

    def mixed(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    start = mixed(np.array([seed % 2**64], np.uint64) + step)
    return mixed((numbers.astype(np.uint64) + np.uint64(1)) * step + start)


def _int32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
