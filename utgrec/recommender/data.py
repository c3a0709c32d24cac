"""Item histories as token batches: what the encoder reads and which codes the decoder learns.

In: item histories, the semantic ids of the items, the users' numbers.
Out: ``Batch`` for the training step, or padded rows for the decoder.

The tokens of a row are the user's token, then the codes of at most 20 items, oldest first. Token numbers, shared by encoder
and decoder: 0 padding and start of the decoder, 1 end (kept for parity with T5, unused), the user tokens, the code tokens.

No row lies in memory as tokens: a training row is three numbers (where its history starts, how many items, whose it is),
and a batch is gathered from them by indexing.

Legend: R rows, B batch, S tokens of the longest row, N tokens of all rows of a batch, I items, L codes an item.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from harness.contract import HISTORY, Domain, Ragged
from utgrec.recommender.fused import Layout
from utgrec.recommender.model import IGNORED
from utgrec.semantic_ids import SemanticIds

END, FIRST_USER = 1, 2
"""The token of the end, and the first user token."""


class Batch(NamedTuple):
    """One batch of the training step: ``model(*batch)`` is its loss.

    The tokens of all rows lie one after the other, without padding, in order of length; ``layout`` says how many rows of
    which length there are. The rows of ``codes_BL``, the next item's code tokens, have the same order.
    """

    tokens_N: torch.Tensor
    codes_BL: torch.Tensor
    layout: Layout

    @property
    def rows(self) -> int:
        return len(self.codes_BL)

    def to(self, device: torch.device | str) -> Batch:
        tensors = self.tokens_N, self.codes_BL
        if torch.device(device).type == "cuda":  # only from pinned memory can the copy run beside the work before it
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), self.layout)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """Batches of several domains as one."""
        parts = []
        for tokens_N, codes_BL, layout in batches:
            rows = [count for count, _ in layout]
            tokens = tokens_N.split([count * length for count, length in layout])
            parts += zip((length for _, length in layout), tokens, codes_BL.split(rows), strict=True)
        parts.sort(key=lambda part: part[0])
        rows_of: dict[int, int] = {}
        for length, _, codes in parts:
            rows_of[length] = rows_of.get(length, 0) + len(codes)
        layout = tuple((count, length) for length, count in rows_of.items())
        return Batch(torch.cat([tokens for _, tokens, _ in parts]), torch.cat([codes for *_, codes in parts]), layout)

    def into(self, layout: Layout) -> Batch:
        """The same rows in a given layout (``stairs``), padded: for compiled programs, which are made for one shape.

        Rows to spare are filled up and ignored by the loss. Where rows are too long for it, all get the longest length.
        """
        slots = torch.cat([torch.full((rows,), length) for rows, length in layout])
        lengths = torch.cat([torch.full((rows,), length) for rows, length in self.layout])
        if len(lengths) > len(slots) or lengths.max() > slots.max():
            raise ValueError(f"{len(lengths)} rows of up to {int(lengths.max())} tokens do not fit into the layout {layout}")
        spare = len(slots) - len(lengths)
        if (lengths > slots[spare:]).any():
            return self.into(((len(slots), int(slots.max())),))
        place = slots.cumsum(0) - slots
        tokens_N = self.tokens_N.new_zeros(int(slots.sum()))
        tokens_N[place[:spare]] = END  # attention must have something to look at
        first = lengths.cumsum(0) - lengths
        tokens_N[torch.repeat_interleave(place[spare:] - first, lengths) + torch.arange(len(self.tokens_N))] = self.tokens_N
        filler_BL = self.codes_BL.new_full((spare, self.codes_BL.size(1)), IGNORED)
        return Batch(tokens_N, torch.cat([filler_BL, self.codes_BL]), layout)


def stairs(lengths_R: np.ndarray, batch: int, steps: int = 4) -> Layout:
    """The layout of ``batch`` rows in at most ``steps`` groups that has the least padding and that nearly every batch fits into.

    Of rows longer than a step a batch drawn from ``lengths_R`` has more than the layout takes once in 30,000 (4 sigma).
    """
    lengths, counts = np.unique(lengths_R, return_counts=True)
    longer = 1.0 - np.cumsum(counts) / counts.sum()  # share of rows longer than each length
    need = np.minimum(batch, np.ceil(batch * longer + 4 * np.sqrt(batch * longer * (1 - longer)) - 1e-9)).astype(int)

    def layout(cuts: Sequence[int]) -> Layout:
        edges = [batch, *need[list(cuts)].tolist(), 0]
        groups = zip(edges, edges[1:], lengths[[*cuts, -1]].tolist(), strict=False)
        return tuple((above - rest, length) for above, rest, length in groups if above > rest)

    choices = [cuts for n in range(steps) for cuts in itertools.combinations(range(len(lengths) - 1), n)]
    return min((layout(cuts) for cuts in choices), key=lambda groups: sum(rows * length for rows, length in groups))


class Histories:
    """Rows of (history, next item) of one domain."""

    def __init__(
        self,
        inputs: Ragged,
        ids: SemanticIds,
        users: np.ndarray,
        targets: np.ndarray | None = None,
        *,
        user_tokens: int = 1,
    ):
        """The last 20 items of each list in ``inputs``, with the number of the user it belongs to and the next item.

        ``user_tokens``: 0 none; 1 one token that all users share; n > 1 token number user % n.
        """
        count_R = np.minimum(inputs.lengths, HISTORY)
        self._set(inputs.values, inputs.offsets[1:] - count_R, count_R, users, targets, ids, user_tokens)

    @classmethod
    def training(cls, domain: Domain, ids: SemanticIds, *, user_tokens: int = 1) -> Histories:
        """Every x_i with 2 <= i <= n-2 from the items before it, by user, then by i (``Domain.training_rows``).

        The prefixes are windows into the users' lists: none is copied.
        """
        rows_U = np.maximum(domain.train.lengths - 1, 0)
        users_R = np.repeat(np.arange(domain.n_users), rows_U)
        before_U = np.cumsum(rows_U) - rows_U
        position_R = np.arange(len(users_R)) - before_U[users_R] + 1  # of the target in the user's list, from 0
        target_R = domain.train.offsets[users_R] + position_R
        count_R = np.minimum(position_R, HISTORY)
        self = cls.__new__(cls)
        self._set(domain.train.values, target_R - count_R, count_R, users_R, domain.train.values[target_R], ids, user_tokens)
        return self

    @classmethod
    def validation(cls, domain: Domain, ids: SemanticIds, *, user_tokens: int = 1) -> Histories:
        return cls(domain.valid_inputs(), ids, domain.valid_users, domain.valid, user_tokens=user_tokens)

    @classmethod
    def test(cls, domain: Domain, ids: SemanticIds, *, user_tokens: int = 1) -> Histories:
        return cls(domain.test_inputs(), ids, domain.test_users, user_tokens=user_tokens)

    def _set(
        self,
        values: np.ndarray,
        start_R: np.ndarray,
        count_R: np.ndarray,
        users_R: np.ndarray,
        targets_R: np.ndarray | None,
        ids: SemanticIds,
        user_tokens: int,
    ) -> None:
        if len(users_R) != len(count_R) or (targets_R is not None and len(targets_R) != len(count_R)):
            targets = "no" if targets_R is None else len(targets_R)
            raise ValueError(f"{len(count_R)} histories, but {len(users_R)} users and {targets} targets; give one of each a history")
        highest = max((int(part.max()) for part in (values, targets_R) if part is not None and len(part)), default=-1)
        if highest >= ids.n_items:
            raise ValueError(f"item {highest} has no semantic id: the ids cover {ids.n_items} items; use the ids of this domain")
        if user_tokens == 0 and len(count_R) and count_R.min() == 0:
            raise ValueError(f"row {int(count_R.argmin())} has no items and no user token: nothing to read; use user_tokens = 1")
        self.user_tokens, self.ids = user_tokens, ids
        self.values, self.start_R, self.count_R = values.astype(np.int32, copy=False), start_R, count_R.astype(np.uint8)
        self.users_R = users_R.astype(np.int32)
        self.targets_R = None if targets_R is None else targets_R.astype(np.int32, copy=False)
        self.tokens_IL = ids.tokens_IL.astype(np.int32) + FIRST_USER + user_tokens

    def __len__(self) -> int:
        return len(self.count_R)

    @property
    def vocabulary(self) -> int:
        return FIRST_USER + self.user_tokens + self.ids.n_codes

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row."""
        return self._lengths(slice(None))

    def _lengths(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.count_R[rows].astype(np.int64) * self.ids.length + (self.user_tokens > 0)

    def rows(self, indices: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Tokens [B, S], padded with 0 at the right, in the order of ``indices``."""
        rows_B = np.asarray(indices)
        longest = int(self._lengths(rows_B).max(initial=0))
        return self._written(rows_B, np.arange(len(rows_B)) * longest, len(rows_B) * longest).view(-1, longest)

    def batch(self, indices: np.ndarray | torch.Tensor) -> Batch:
        rows_B = np.asarray(indices)
        if self.targets_R is None:
            raise ValueError("these histories have no targets: there is nothing to train on; use rows()")
        rows_B = rows_B[self.count_R[rows_B].argsort(kind="stable")]
        length_B = self._lengths(rows_B)
        lengths, counts = np.unique(length_B, return_counts=True)
        layout = tuple(zip(counts.tolist(), lengths.tolist(), strict=True))
        tokens_N = self._written(rows_B, length_B.cumsum() - length_B, int(length_B.sum()))
        return Batch(tokens_N, torch.from_numpy(self.tokens_IL[self.targets_R[rows_B]].astype(np.int64)), layout)

    def _written(self, rows_B: np.ndarray, place_B: np.ndarray, size: int) -> torch.Tensor:
        """A flat array of ``size`` tokens with row b written from ``place_B[b]`` on."""
        tokens, length = np.zeros(size, np.int64), self.ids.length
        if self.user_tokens:
            tokens[place_B] = FIRST_USER + self.users_R[rows_B] % self.user_tokens
        count_B = self.count_R[rows_B].astype(np.int64)
        before_B = np.cumsum(count_B) - count_B
        nth_item = np.arange(count_B.sum())
        item = self.values[np.repeat(self.start_R[rows_B] - before_B, count_B) + nth_item]
        place = np.repeat(place_B + (self.user_tokens > 0) - length * before_B, count_B) + length * nth_item
        tokens[place[:, None] + np.arange(length)] = self.tokens_IL[item]
        return torch.from_numpy(tokens)
