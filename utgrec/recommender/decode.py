"""Exact constrained beam search over the set of real items.

In: a trained ``T5``, the ``Trie`` of a domain, the histories of its users. Out: ``Lists``: ranked item numbers and scores.

Textbook beam search of a fixed number of codes (design: rules of measurement). The score of a beam is the sum, in fp32, of
log-softmax values over the whole vocabulary, not renormalised over legal children. Of equal scores the one from the lower
beam comes first, then the lower code. A user starts with one beam, which widens to K; nothing is sampled; a beam that
has no legal child ends, and where a domain has fewer items than K the list ends with -1. Items that share a leaf follow each
other in the trie's order until the list is full.

Free decoding (``constrained=False``) may write any token; a tuple that no item has is a spent slot (-1).

Legend: U users, B users of a batch, S encoder tokens, K beams, k items of a list, L codes an item, F fan-out, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from utgrec.recommender.data import FIRST_USER
from utgrec.recommender.inference import Inference, KeysValues
from utgrec.recommender.model import PAD, T5
from utgrec.recommender.trie import Trie

ROWS = {"cpu": 400, "cuda": 1 << 16}
"""Beams that are advanced together. On a CPU so few that their activations stay in the cache; on a GPU many to fill it."""


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


@torch.inference_mode()
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
    """The k best items of every user by beam search. ``batch``: users decoded together; None chooses."""
    if not 1 <= k <= beams:
        raise ValueError(f"k = {k} items cannot come from {beams} beams; use k between 1 and the beam width")
    inference = Inference(model, precision)
    device = inference.device
    trie = trie.to(device)
    first_code = FIRST_USER + histories.user_tokens
    items_Uk = torch.empty(len(histories), k, dtype=torch.int32, device=device)
    scores_Uk = torch.empty(len(histories), k, device=device)
    for rows_B, padded in batches(histories.lengths, batch or users_together(histories.lengths, beams, device.type)):
        tokens_BS = histories.rows(rows_B)
        leaves_BK, scores_BK = search(inference, trie, tokens_BS.to(device), padded, beams, first_code, constrained)
        items_Bk, beam_Bk = trie.ranked(leaves_BK, k)
        rows_B = torch.from_numpy(rows_B).to(device)
        items_Uk[rows_B] = items_Bk
        scores_Uk[rows_B] = scores_BK.gather(1, beam_Bk.clamp(min=0).long()).masked_fill_(beam_Bk < 0, -torch.inf)
    items, scores = items_Uk.cpu().numpy(), scores_Uk.cpu().numpy()
    spent = (items < 0) & np.isfinite(scores)
    return Lists(items, scores, *(float(part.mean()) if part.size else 0.0 for part in (spent[:, :10], spent)))


def users_together(lengths_U: np.ndarray, beams: int, device: str) -> int:
    return max(1, ROWS[device] // max(beams, int(lengths_U.max(initial=1))))


def batches(lengths_U: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Users of like length together, so that short histories do not pay for long ones; and whether any has to be padded."""
    order_U = np.argsort(lengths_U, kind="stable")
    for start in range(0, len(order_U), size):
        rows_B = order_U[start : start + size]
        yield rows_B, bool(lengths_U[rows_B[0]] != lengths_U[rows_B[-1]])


def search(
    model: Inference, trie: Trie, tokens_BS: Tensor, padded: bool, beams: int, first_code: int, constrained: bool
) -> tuple[Tensor, Tensor]:
    """Leaves [B, K] (-1 where there is none) and scores [B, K] of the best beams, best first."""
    memory = model.read(tokens_BS, padded)
    users, device = len(tokens_BS), tokens_BS.device
    state_BK = torch.zeros(users, 1, dtype=torch.int32, device=device)
    score_BK = torch.zeros(users, 1, device=device)
    prefix_BKT = torch.full((users, 1, 1), PAD, device=device)
    past: list[list[KeysValues]] = [[] for _ in model.decoder[1:]]
    for number, level in enumerate(trie.levels):
        x, q = model.opening(prefix_BKT.flatten(0, 1))
        log_p_BKV = model.step(x, q, memory, past).log_softmax(-1).view(users, state_BK.size(1), -1)
        if constrained:
            codes_BKF, nodes_BKF = trie.candidates(number, state_BK)
            tokens_BKF = codes_BKF.long() + (first_code + level.offset)
            scores_BKF = (score_BK[..., None] + log_p_BKV.gather(-1, tokens_BKF)).masked_fill_(nodes_BKF < 0, -torch.inf)
            score_BK, place_BK = best(scores_BKF.flatten(1), beams)
            parent_BK = place_BK // codes_BKF.size(-1)
            state_BK, token_BK = (of.flatten(1).gather(1, place_BK) for of in (nodes_BKF, tokens_BKF))
        else:
            score_BK, place_BK = best((score_BK[..., None] + log_p_BKV).flatten(1), beams)
            parent_BK, token_BK = place_BK // log_p_BKV.size(-1), place_BK % log_p_BKV.size(-1)
            state_BK = trie.step(number, state_BK.gather(1, parent_BK), token_BK - (first_code + level.offset))
        prefix_BKT = torch.cat([prefix_BKT.gather(1, parent_BK[..., None].expand(-1, -1, number + 1)), token_BK[..., None]], -1)
        past = [[reordered(part, parent_BK) for part in layer] for layer in past]
    return state_BK, score_BK


def best(scores_BN: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """The ``beams`` highest scores of each row and their places; of equal scores the lower place comes first.

    ``topk`` leaves open which of equal scores it takes. So the place is made part of the key: a score is not above 0, so the
    bits of its absolute value, read as a whole number, rise as the score falls.
    """
    place_N = torch.arange(scores_BN.size(1), device=scores_BN.device)
    key_BN = (scores_BN.abs().view(torch.int32).long() << 32) | place_N
    place_BK = key_BN.topk(min(beams, len(place_N)), largest=False).values & 0xFFFFFFFF
    return scores_BN.gather(1, place_BK), place_BK


def reordered(keys_values: KeysValues, parent_BK: Tensor) -> KeysValues:
    """Keys and values of a step before, as the beams of now need them. What all beams share stays as it is."""
    k, v = keys_values
    users, beams = k.shape[:2]
    if beams == 1:
        return keys_values
    rows_M = (parent_BK + torch.arange(users, device=parent_BK.device)[:, None] * beams).flatten()
    return tuple(part.reshape(-1, *part.shape[2:]).index_select(0, rows_M).view(users, -1, *part.shape[2:]) for part in (k, v))
