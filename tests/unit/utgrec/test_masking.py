"""Which tokens are masked, and what stands in their place."""

from __future__ import annotations

import numpy as np
import pytest

from utgrec.tokenizer.masking import mask_tokens

SPECIAL, ORDINARY, MASK = np.array([0, 1, 2]), np.arange(3, 1000), 1000


def masked(tokens_T: np.ndarray, seed: int = 0, limit: int = 512) -> tuple[np.ndarray, np.ndarray]:
    return mask_tokens(tokens_T, SPECIAL, ORDINARY, MASK, np.random.default_rng(seed), limit)


def text(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 1000, length).astype(np.int32)


def test_a_short_text_is_selected_whole_but_for_special_tokens() -> None:
    tokens_T = np.concatenate([[1], text(50), [2, 0]]).astype(np.int32)
    masked_T, selected_T = masked(tokens_T)
    assert np.array_equal(selected_T, ~np.isin(tokens_T, SPECIAL))
    assert np.array_equal(masked_T[~selected_T], tokens_T[~selected_T])
    assert masked_T.dtype == tokens_T.dtype


def test_a_long_text_is_selected_up_to_the_limit_and_evenly() -> None:
    tokens_T = text(60)
    times_T = sum(masked(tokens_T, seed, limit=15)[1].astype(int) for seed in range(4000))
    assert times_T.sum() == 4000 * 15
    expected = 4000 / 4
    assert np.abs(times_T - expected).max() < 5 * np.sqrt(expected * 0.75)  # five deviations of a binomial


def test_shares_of_masked_replaced_and_kept_tokens() -> None:
    tokens_T = text(200_000)
    masked_T, selected_T = masked(tokens_T, limit=100_000)
    was, now = tokens_T[selected_T], masked_T[selected_T]
    share_masked, share_kept = (now == MASK).mean(), (now == was).mean()
    assert abs(share_masked - 0.8) < 0.006
    assert abs(share_kept - (0.1 + 0.1 / len(ORDINARY))) < 0.005
    replaced = now[(now != MASK) & (now != was)]
    assert np.isin(replaced, ORDINARY).all()
    counts = np.bincount(replaced, minlength=1000)[3:]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi_square - len(ORDINARY)) < 6 * np.sqrt(2 * len(ORDINARY))  # all ordinary tokens alike
    assert np.array_equal(masked_T[~selected_T], tokens_T[~selected_T])


@pytest.mark.parametrize("tokens", [[], [0, 1, 2]])
def test_nothing_to_select(tokens: list[int]) -> None:
    tokens_T = np.array(tokens, np.int32)
    masked_T, selected_T = masked(tokens_T)
    assert np.array_equal(masked_T, tokens_T)
    assert selected_T.shape == tokens_T.shape and not selected_T.any()


def test_the_text_itself_is_untouched_and_draws_repeat() -> None:
    tokens_T = text(300)
    before = tokens_T.copy()
    first, again, other = masked(tokens_T, 7), masked(tokens_T, 7), masked(tokens_T, 8)
    assert np.array_equal(tokens_T, before)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
