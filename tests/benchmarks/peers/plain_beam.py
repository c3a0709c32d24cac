"""A beam search as one writes it in an afternoon: tensors, a trie in tables, cross-attention keys once a user, and no more.

It stands between ``generate`` and ours, to show what is left to gain once the Python callback and the repeated encoder
output are gone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utgrec.recommender.data import Histories
from utgrec.recommender.decode import batches
from utgrec.recommender.model import PAD, T5, padding_mask
from utgrec.recommender.trie import Trie


@torch.no_grad()
def plain(model: T5, trie: Trie, histories: Histories, beams: int, batch: int, first_code: int) -> np.ndarray:
    """Leaves [U, K], best first."""
    leaves_UK = np.full((len(histories), beams), -1)
    for rows_B, _ in batches(histories.lengths, lambda _: batch):
        leaves_UK[rows_B] = _search(model, trie, histories.rows(rows_B), beams, first_code).numpy()
    return leaves_UK


def _search(model: T5, trie: Trie, tokens_BS: Tensor, beams: int, first_code: int) -> Tensor:
    B, H, E = len(tokens_BS), model.shape.heads, model.shape.d_kv

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, E))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.einsum("bhks,bshe->bkhe", (torch.einsum("bkhe,bshe->bhks", q, k) + bias).softmax(-1), v).flatten(-2)

    memory_BSD, mask_B11S = model.encode(tokens_BS), padding_mask(tokens_BS)
    cross = [[heads(part) for part in layer.cross.kv(memory_BSD).chunk(2, -1)] for layer in model.decoder]
    past: list[tuple[Tensor, Tensor] | None] = [None] * len(model.decoder)
    state_BK, token_BK = torch.zeros(B, 1, dtype=torch.int64), torch.full((B, 1), PAD)
    score_BK = torch.zeros(B, 1)
    for step, level in enumerate(trie.levels):
        x = model.tokens(token_BK)
        bias_H1T = model.decoder_positions(step + 1, step + 1)[0, :, -1:]
        for n, layer in enumerate(model.decoder):
            q, k, v = (heads(part)[:, :, None] for part in layer.attention.qkv(layer.attention.norm(x)).chunk(3, -1))
            if past[n] is not None:
                k, v = (torch.cat(parts, 2) for parts in zip(past[n], (k, v), strict=True))
            past[n] = k, v
            own = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias_H1T)
            x = x + layer.attention.o(own.view(*x.shape[:2], -1))
            q = heads(layer.cross.q(layer.cross.norm(x)))
            x = x + layer.cross.o(attend(q, *cross[n], mask_B11S))
            x = x + layer.feed_forward.wo(layer.feed_forward.wi(layer.feed_forward.norm(x)).relu())
        logits = model.decoder_norm(x) * model.shape.d_model**-0.5 @ model.tokens.weight.T
        first = first_code + level.offset
        nodes = trie.children(step, state_BK)
        scores = logits.log_softmax(-1)[..., first : first + level.width].masked_fill(nodes < 0, -torch.inf) + score_BK[..., None]
        score_BK, place = scores.flatten(1).topk(min(beams, scores[0].numel()))
        parent, token_BK = place // level.width, place % level.width + first
        state_BK = nodes.flatten(1).gather(1, place).long()
        rows = torch.arange(B)[:, None]
        past = [(k[rows, parent], v[rows, parent]) for k, v in past]
    return state_BK
