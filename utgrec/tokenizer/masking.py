"""Which tokens of an item's text the text decoder must predict, and what it sees in their place (UTGRec section 3.3).

Up to ``limit`` tokens are selected at random, all of a shorter text; special tokens never. Of the selected 80 % become the mask token,
10 % any ordinary token, 10 % stay as they are (BERT's shares, Devlin et al., 2019, as in the authors' released training; the paper
speaks of masks only).

Legend: T tokens of a text.
"""

from __future__ import annotations

import numpy as np

MASKED, REPLACED = 0.8, 0.1
"""Shares of the selected tokens; the rest stays visible."""


def mask_tokens(
    tokens_T: np.ndarray, special: np.ndarray, ordinary: np.ndarray, mask_token: int, rng: np.random.Generator, limit: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """The text with some tokens replaced, and which ones are to be predicted (bool), both [T].

    ``special``: tokens that are never selected. ``ordinary``: what a random replacement may be.
    """
    places = np.flatnonzero(~np.isin(tokens_T, special))
    if len(places) > limit:
        places = rng.choice(places, limit, replace=False, shuffle=False)
    selected_T = np.zeros(len(tokens_T), bool)
    selected_T[places] = True
    fate = rng.random(len(places))
    masked_T = tokens_T.copy()
    masked_T[places[fate < MASKED]] = mask_token
    replaced = places[(fate >= MASKED) & (fate < MASKED + REPLACED)]
    masked_T[replaced] = rng.choice(ordinary, len(replaced))
    return masked_T, selected_T
