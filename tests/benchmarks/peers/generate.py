"""The usual way to decode semantic ids: Hugging Face ``generate`` with ``prefix_allowed_tokens_fn``. Peer and oracle.

In good faith: the KV cache, PyTorch's fused attention (``sdpa``), histories sorted by length into batches, no gradient, and a
callback that looks its answer up: by prefix in one dictionary of ready tensors (``dictionary``), or step by step in nested
dictionaries (``walk``). Both callbacks are measured by the benchmark, which takes the faster.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import transformers

from utgrec.recommender.data import Histories
from utgrec.recommender.decode import batches
from utgrec.recommender.model import PAD, T5, hugging_face_config, to_hugging_face


def hugging_face(model: T5, attention: str = "sdpa") -> transformers.T5ForConditionalGeneration:
    """The same weights as a T5ForConditionalGeneration."""
    config = transformers.T5Config(**hugging_face_config(model.shape), attn_implementation=attention)
    theirs = transformers.T5ForConditionalGeneration(config)
    theirs.load_state_dict({name: weight.clone() for name, weight in to_hugging_face(model).items()}, strict=False)
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


def dictionary(tokens_IL: np.ndarray) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A callback that looks up the whole prefix."""
    children: dict[tuple[int, ...], set[int]] = {}
    for row in tokens_IL.tolist():
        for length in range(len(row)):
            children.setdefault(tuple(row[:length]), set()).add(row[length])
    allowed = {prefix: torch.tensor(sorted(codes)) for prefix, codes in children.items()}
    nothing = torch.tensor([PAD])
    return lambda _, sent: allowed.get(tuple(sent[1:].tolist()), nothing)


def walk(tokens_IL: np.ndarray) -> Callable[[int, torch.Tensor], list[int]]:
    """A callback that walks nested dictionaries, as the public code of LC-Rec and LETTER does."""
    root: dict[int, dict] = {}
    for row in tokens_IL.tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})

    def allowed(_: int, sent: torch.Tensor) -> list[int]:
        node = root
        for token in sent[1:].tolist():
            node = node.get(token, {})
        return list(node) or [PAD]

    return allowed


@torch.no_grad()
def generate(
    theirs: transformers.T5ForConditionalGeneration,
    histories: Histories,
    length: int,
    beams: int,
    batch: int,
    allowed: Callable | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Token tuples [U, K, L] and their log-probabilities [U, K], best first."""
    tokens_UKL = np.zeros((len(histories), beams, length), np.int64)
    scores_UK = np.zeros((len(histories), beams), np.float32)
    for rows_B, _ in batches(histories.lengths, lambda _: batch):
        tokens_BS = histories.rows(rows_B)
        out = theirs.generate(
            input_ids=tokens_BS,
            attention_mask=(tokens_BS != PAD).long(),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            use_cache=True,
            prefix_allowed_tokens_fn=allowed,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens_UKL[rows_B] = out.sequences[:, 1:].view(len(rows_B), beams, length).numpy()
        scores_UK[rows_B] = out.sequences_scores.view(len(rows_B), beams).numpy()
    return tokens_UKL, scores_UK
