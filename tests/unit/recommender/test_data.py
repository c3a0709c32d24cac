"""Token batches against rows written one by one, and what a batch may not change: rows, labels, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.contract import HISTORY, Domain, Ragged
from utgrec.recommender.data import END, FIRST_USER, Batch, Histories, stairs
from utgrec.recommender.model import IGNORED
from utgrec.semantic_ids import SemanticIds

rng = np.random.default_rng(5)
IDS = SemanticIds.of(rng.integers(0, 9, (40, 3)), (9, 9, 9), (0, 1, 1))


def domain(lengths: np.ndarray, n_items: int = 40) -> Domain:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    train = Ragged(rng.integers(0, n_items, offsets[-1]).astype(np.int32), offsets)
    valid = rng.integers(0, n_items, len(lengths)).astype(np.int32)
    return Domain(Path("nowhere"), "made_up", len(lengths), n_items, train, valid, {})


def written(items: np.ndarray, user: int, user_tokens: int) -> list[int]:
    """A row's tokens, the slow way."""
    tokens = [FIRST_USER + user % user_tokens] if user_tokens else []
    for item in items[-HISTORY:]:
        tokens += [FIRST_USER + user_tokens + int(token) for token in IDS.tokens_IL[item]]
    return tokens


def unpacked(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The (tokens, codes) of every row, without padding, in no order."""
    rows, place = [], 0
    lengths = [length for count, length in batch.layout for _ in range(count)]
    for length, codes in zip(lengths, batch.codes_BL.tolist(), strict=True):
        tokens = [token for token in batch.tokens_N[place : place + length].tolist() if token]
        place += length
        if codes[0] != IGNORED:
            rows.append((tokens, codes))
    assert place == len(batch.tokens_N)
    return sorted(rows)


@pytest.mark.parametrize("user_tokens", [0, 1, 5])
def test_training_rows_are_windows_into_the_lists_of_the_users(user_tokens: int) -> None:
    made = domain(np.array([1, 2, 30, 7, 3]))
    histories = Histories.training(made, IDS, user_tokens=user_tokens)
    inputs, targets = made.training_rows()
    users = np.repeat(np.arange(5), [0, 1, 29, 6, 2])
    expected = [
        (written(items, user, user_tokens), (IDS.tokens_IL[target] + FIRST_USER + user_tokens).tolist())
        for items, user, target in zip(inputs, users, targets, strict=True)
    ]
    assert len(histories) == len(expected) == 38
    assert histories.lengths.tolist() == [len(tokens) for tokens, _ in expected]
    assert unpacked(histories.batch(np.arange(38))) == sorted(expected)
    some = rng.permutation(38)[:11]
    assert unpacked(histories.batch(torch.from_numpy(some))) == sorted(expected[i] for i in some)
    padded = histories.rows(some)
    assert [[token for token in row if token] for row in padded.tolist()] == [expected[i][0] for i in some]
    assert padded.dtype == torch.int64 and padded.shape[1] == max(len(expected[i][0]) for i in some)
    assert np.shares_memory(histories.values, made.train.values)


def test_validation_and_test_rows_read_what_the_protocol_allows() -> None:
    made = domain(np.array([1, 25, 4]))
    valid, test = Histories.validation(made, IDS), Histories.test(made, IDS)
    for user in range(3):
        items = made.train[user]
        assert [t for t in valid.rows(np.array([user]))[0].tolist() if t] == written(items, user, 1)
        assert [t for t in test.rows(np.array([user]))[0].tolist() if t] == written(np.append(items, made.valid[user]), user, 1)
    assert valid.targets_R is not None and (valid.targets_R == made.valid).all()
    with pytest.raises(ValueError, match="no targets"):
        test.batch(np.arange(3))


def test_the_tokens_stay_inside_the_vocabulary() -> None:
    for user_tokens in (0, 1, 7):
        histories = Histories.training(domain(np.full(50, 9)), IDS, user_tokens=user_tokens)
        tokens_N, codes_BL, _ = histories.batch(np.arange(len(histories)))
        assert tokens_N.min() == (FIRST_USER if user_tokens else tokens_N.min()) and tokens_N.max() < histories.vocabulary
        assert codes_BL.min() >= FIRST_USER + user_tokens and codes_BL.max() < histories.vocabulary
        assert histories.vocabulary == 2 + user_tokens + 18


def test_a_million_rows_take_few_bytes() -> None:
    histories = Histories.training(domain(np.full(100_000, 11)), IDS)
    arrays = (histories.start_R, histories.count_R, histories.users_R, histories.targets_R)
    assert len(histories) == 1_000_000
    assert sum(array.nbytes for array in arrays if array is not None) / len(histories) <= 17


def test_batches_of_several_domains_join() -> None:
    parts = [Histories.training(domain(np.array([3, 30, 8])), IDS) for _ in range(3)]
    batches = [part.batch(rng.permutation(len(part))[:9]) for part in parts]
    joined = Batch.join(batches)
    assert unpacked(joined) == sorted(row for batch in batches for row in unpacked(batch))
    lengths = [length for _, length in joined.layout]
    assert lengths == sorted(set(lengths)), "one group a length, so that attention meets few groups"
    alone = Batch.join(batches[:1])
    assert alone.layout == batches[0].layout and torch.equal(alone.tokens_N, batches[0].tokens_N)


def test_a_given_layout_keeps_the_rows() -> None:
    histories = Histories.training(domain(rng.integers(2, 40, 300)), IDS)
    layout = stairs(histories.lengths, 64)
    assert sum(rows for rows, _ in layout) == 64 and layout[-1][1] == 61
    fixed = 0
    for _ in range(50):
        batch = histories.batch(rng.integers(0, len(histories), 64))
        assert unpacked(batch.into(layout)) == unpacked(batch)
        fixed += batch.into(layout).layout == layout
    assert fixed == 50
    fewer = histories.batch(np.arange(40))
    filled = fewer.into(layout)
    assert filled.layout == layout and unpacked(filled) == unpacked(fewer)
    assert (filled.codes_BL == IGNORED).all(1).sum() == 24
    assert (filled.tokens_N == END).sum() == 24, "a row to spare has one token"


def test_rows_too_long_for_a_layout_get_the_longest_length() -> None:
    histories = Histories.training(domain(np.array([40])), IDS)
    batch = histories.batch(np.arange(30, 39))  # nine rows of 61 tokens
    assert batch.into(((8, 4), (1, 61))).layout == ((9, 61),)
    assert unpacked(batch.into(((8, 4), (1, 61)))) == unpacked(batch)
    with pytest.raises(ValueError, match="do not fit"):
        batch.into(((8, 61),))
    with pytest.raises(ValueError, match="do not fit"):
        batch.into(((9, 60),))


def test_stairs_pad_less_with_more_steps() -> None:
    lengths = 1 + 4 * np.minimum(rng.geometric(0.12, 20_000), 20)
    tokens = [sum(rows * length for rows, length in stairs(lengths, 256, steps)) for steps in (1, 2, 3, 4)]
    assert tokens[0] == 256 * 81 and tokens == sorted(tokens, reverse=True) and tokens[-1] < 0.7 * tokens[0]
    assert stairs(np.full(10, 5), 8) == ((8, 5),)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="item 60 has no semantic id: the ids cover 40 items"):
        Histories(Ragged(np.array([60]), np.array([0, 1])), IDS, np.array([0]))
    with pytest.raises(ValueError, match="row 1 has no items and no user token"):
        Histories(Ragged(np.array([6]), np.array([0, 1, 1])), IDS, np.array([0, 1]), user_tokens=0)
    with pytest.raises(ValueError, match="2 histories, but 3 users"):
        Histories(Ragged(np.array([6]), np.array([0, 1, 1])), IDS, np.arange(3))
