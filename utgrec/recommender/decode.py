"""Exact constrained beam search over the set of real items.

In: a trained ``T5``, the ``Trie`` of a domain, the histories of its users. Out: ``Lists``: ranked item numbers and scores.

Textbook beam search of a fixed number of codes (design: rules of measurement). The score of a beam is the sum, in fp32, of
log-softmax values over the whole vocabulary, not renormalised over legal children. Of equal scores the one from the lower
beam comes first, then the lower code. A user starts with one beam, which widens to K; nothing is sampled, so beams are
distinct; a beam without legal child ends, and where a domain has fewer items than K the list ends with -1. Items that share a
leaf follow each other in the trie's order until the list is full.

Free decoding (``constrained=False``) may write any token; a tuple that no item has is a spent slot (-1).

``recommend`` streams the users through ``Search``, which does a batch; inference.py holds the model's side of it. Nothing
in a step waits for the device or depends on values there: the shapes of a batch follow from its number of users, the
length of their histories and the trie.

Legend: U users, B users of a batch, S encoder tokens, K beams, k items of a list, L codes an item, T start token and codes
written so far, F largest fan-out of a level, N nodes of a level, M = B x K, D width, I width of all heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from utgrec.recommender.data import FIRST_USER
from utgrec.recommender.inference import Inference, Past, Weights
from utgrec.recommender.model import PAD, T5
from utgrec.recommender.trie import Trie

ROWS_CPU, ROWS_GPU = 400, 1 << 16
"""Beams that are advanced together. On a CPU so few that their activations stay in the cache; on a GPU enough to fill it."""
OPENINGS = 1 << 16
"""A level of more nodes gets no table of openings: 34 MB at TIGER's size."""


class Histories(Protocol):
    """What decoding needs of ``data.Histories``."""

    user_tokens: int

    @property
    def lengths(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def rows(self, indices: np.ndarray) -> Tensor: ...


class Lists(NamedTuple):
    """Ranked lists of all users, in their order."""

    items_UK: np.ndarray
    """int32 [U, k], best first; -1 is a spent slot (free decoding) or the end of a list that no item is left for."""
    scores_UK: np.ndarray
    """float32 [U, k]: log-probability of the item's codes; -inf after the end of a list."""
    invalid_10: float
    """Share of the first 10 slots that free decoding spent on tuples that no item has."""
    invalid_k: float
    """The same of all k slots."""


def recommend(
    model: T5,
    trie: Trie,
    histories: Histories,
    *,
    k: int,
    beams: int,
    batch: int | None = None,
    constrained: bool = True,
    precision: str = "fp32",
) -> Lists:
    """The k best items of every user. ``batch``: users decoded together; None chooses. On a CPU as many threads as torch may use."""
    if not 1 <= k <= beams:
        raise ValueError(f"k = {k} items cannot come from {beams} beams; use a k from 1 to the beam width")
    users, device = len(histories), model.tokens.weight.device
    items_Uk = torch.empty(users, k, dtype=torch.int32, device=device)
    scores_Uk = torch.empty(users, k, device=device)
    with one_core_a_thread() as cores:
        threads = cores if device.type == "cpu" else 1
        weights = Weights.of(model, precision)
        search = Search(weights, trie.to(device), beams, FIRST_USER + histories.user_tokens, constrained, users)
        todo = iter(list(batches(histories.lengths, lambda length: batch or search.room(length, threads))))

        def work() -> None:
            inference = Inference(weights)
            for rows_B, padded in todo:
                tokens_BS, places_B = histories.rows(rows_B), torch.from_numpy(rows_B)
                if device.type == "cuda":
                    tokens_BS, places_B = (part.pin_memory().to(device, non_blocking=True) for part in (tokens_BS, places_B))
                leaf_BK, score_BK = search(inference, tokens_BS, padded)
                items_Bk, beam_Bk = search.trie.ranked(leaf_BK, k)
                items_Uk[places_B] = items_Bk
                scores_Uk[places_B] = torch.where(beam_Bk < 0, -torch.inf, score_BK.gather(1, beam_Bk.clamp(min=0).long()))

        in_threads(work, todo, threads)
    items, scores = items_Uk.cpu().numpy(), scores_Uk.cpu().numpy()
    spent = (items < 0) & np.isfinite(scores)
    return Lists(items, scores, *(float(part.mean()) if part.size else 0.0 for part in (spent[:, :10], spent)))


def exhaustive(model: T5, trie: Trie, histories: Histories, *, k: int) -> Lists:
    """The same with a beam as wide as the trie, which scores every item. Of a model's worth it says all; it takes its time."""
    return recommend(model, trie, histories, k=k, beams=max(k, trie.n_leaves))


def beam_recall(model: T5, trie: Trie, histories: Histories, *, beams: int, at: int = 10) -> float:
    """Share of the ``at`` best items of exhaustive scoring that beam search finds among its ``at`` best."""
    best_Uk, found_Uk = (
        lists.items_UK for lists in (exhaustive(model, trie, histories, k=at), recommend(model, trie, histories, k=at, beams=beams))
    )
    hit_Uk = (best_Uk[:, :, None] == found_Uk[:, None, :]).any(2)
    return float(hit_Uk[best_Uk >= 0].mean())


def batches(lengths_U: np.ndarray, size: Callable[[int], int]) -> Iterator[tuple[np.ndarray, bool]]:
    """Users of like length together, so that short histories do not pay for long ones, and whether any has to be padded.

    ``size`` says how many histories of a length fit together.
    """
    order_U = np.argsort(-lengths_U, kind="stable")
    start = 0
    while start < len(order_U):
        rows_B = order_U[start : start + size(int(lengths_U[order_U[start]]))]
        start += len(rows_B)
        yield rows_B, bool(lengths_U[rows_B[0]] != lengths_U[rows_B[-1]])


@contextmanager
def one_core_a_thread() -> Iterator[int]:
    """Products within use one core. Gives the number of cores torch may use: threads of our own use them better.

    Halves of the users never wait for each other; halves of a product do, and spin while they wait.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


def in_threads(work: Callable[[], None], todo: Iterator, threads: int) -> None:
    """``work``, which empties ``todo``, in so many threads."""
    if threads == 1:
        return work()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in as_completed([pool.submit(work) for _ in range(threads)]):
                done.result()
        finally:  # after an error or an interrupt nothing more is begun
            list(todo)


class Search:
    """Beam search of one batch of users: ``search(inference, tokens, padded) -> leaves, scores``."""

    def __init__(self, weights: Weights, trie: Trie, beams: int, first_code: int, constrained: bool, users: int):
        """``users`` in all: a table of openings has to pay for itself."""
        self.weights, self.trie, self.beams, self.constrained = weights, trie, beams, constrained
        self.rows = ROWS_CPU if trie.device.type == "cpu" else ROWS_GPU
        self.first_L = [first_code + level.offset for level in trie.levels]
        self.openings_L = self._openings(min(OPENINGS, users * beams)) if constrained else []

    @torch.inference_mode()
    def _openings(self, most: int) -> list[Tensor]:
        """What ``Inference.opening`` gives for each node of a level, x [N, D], as far down as levels have at most ``most`` nodes."""
        inference, tables = Inference(self.weights), []
        prefix_NT = torch.full((1, 1), PAD, device=self.trie.device)
        for level, first in zip(self.trie.levels, self.first_L, strict=True):
            if level.n_nodes > most:
                break
            tables.append(torch.cat([inference.opening(part) for part in prefix_NT.split(self.rows)]))
            parent_C = torch.arange(level.n_nodes, device=prefix_NT.device).repeat_interleave(level.count_N[:-1])
            prefix_NT = torch.cat([prefix_NT[parent_C], level.codes_C.long()[:, None] + first], 1)
        return tables

    def room(self, length: int, threads: int) -> int:
        """How many histories of so many tokens to decode together: what fills the device, and fits."""
        shape, device = self.weights.shape, self.trie.device
        wide = 2 * shape.vocabulary + shape.d_ff + 2 * shape.inner * (2 * self.trie.length * shape.decoder_layers + 3)
        numbers = self.beams * wide + length * (shape.d_ff + shape.inner * (2 * shape.decoder_layers + 5))
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
        return max(1, min(self.rows // self.beams, 2 * self.rows // length, free // 2 // threads // (4 * numbers)))

    @torch.inference_mode()
    def __call__(self, inference: Inference, tokens_BS: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        """Leaves [B, K] (-1 where there is none) and scores [B, K] of the best beams, best first."""
        memory, users, device = inference.read(tokens_BS, padded), len(tokens_BS), tokens_BS.device
        state_BK = torch.zeros(users, 1, dtype=torch.int32, device=device)
        score_BK = torch.zeros(users, 1, device=device)
        prefix_MT = torch.full((users, 1), PAD, device=device)
        past = Past(len(self.weights.decoder))
        for number in range(self.trie.length):
            if number < len(self.openings_L):
                x_MD = self.openings_L[number].index_select(0, state_BK.flatten().clamp(min=0))
            else:
                x_MD = inference.opening(prefix_MT)
            log_p_BKV = inference.step(x_MD, memory, past).view(*score_BK.shape, -1)
            widen = self._legal if self.constrained else self._free
            score_BK, state_BK, parent_BK, token_BK = widen(number, score_BK, state_BK, log_p_BKV)
            rows_M = (parent_BK + torch.arange(users, device=device)[:, None] * log_p_BKV.size(1)).flatten()
            prefix_MT = torch.cat([prefix_MT[rows_M], token_BK.view(-1, 1)], 1)
            past.descend(rows_M)
        return state_BK, score_BK

    def _legal(self, number: int, score_BK: Tensor, state_BK: Tensor, log_p_BKV: Tensor) -> tuple[Tensor, ...]:
        """The best children of all beams in the trie. Only legal ones are looked at: few, where a level has many codes."""
        codes_BKF, nodes_BKF = self.trie.candidates(number, state_BK)
        tokens_BKF = codes_BKF.long() + self.first_L[number]
        scores_BKF = score_BK[..., None] + log_p_BKV.gather(-1, tokens_BKF)
        score_BK, place_BK = best(scores_BKF.masked_fill_(nodes_BKF < 0, -torch.inf).flatten(1), self.beams)
        state_BK, token_BK = (of.flatten(1).gather(1, place_BK) for of in (nodes_BKF, tokens_BKF))
        return score_BK, state_BK, place_BK // codes_BKF.size(-1), token_BK

    def _free(self, number: int, score_BK: Tensor, state_BK: Tensor, log_p_BKV: Tensor) -> tuple[Tensor, ...]:
        """The best of all tokens. A beam that no item begins with goes on with state -1."""
        score_BK, place_BK = best((score_BK[..., None] + log_p_BKV).flatten(1), self.beams)
        parent_BK, token_BK = place_BK // log_p_BKV.size(-1), place_BK % log_p_BKV.size(-1)
        state_BK = self.trie.step(number, state_BK.gather(1, parent_BK), token_BK - self.first_L[number])
        return score_BK, state_BK, parent_BK, token_BK


def best(scores_BN: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """The ``beams`` highest scores of each row and their places; of equal scores the lower place comes first.

    ``topk`` leaves open which of equal scores it takes. So the place is made part of the key: no score is above 0, so the bits
    of its absolute value, read as a whole number, rise as the score falls.
    """
    place_N = torch.arange(scores_BN.size(1), device=scores_BN.device)
    key_BN = (scores_BN.abs().view(torch.int32).long() << 32) | place_N
    place_BK = key_BN.topk(min(beams, len(place_N)), largest=False).values & 0xFFFFFFFF
    return scores_BN.gather(1, place_BK), place_BK
