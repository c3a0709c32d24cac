"""Our beam search against Hugging Face's ``generate`` on the same weights: rank for rank, constrained and free."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.generative import TINY, World, world
from utgrec.recommender.decode import recommend

pytest.importorskip("transformers")
from tests.benchmarks.peers import generate as peer

EVEN = TINY | {"decoder_layers": 2}
"""``generate`` of transformers 5.23 fails where encoder and decoder differ in depth."""


def tokens_of(made: World) -> np.ndarray:
    return made.ids.tokens_IL + made.first_code


CASES = {
    "one code": dict(items=40, widths=(64,), beams=8),
    "three codes": dict(items=200, beams=12, widths=(8, 8, 8)),
    "five codes": dict(items=300, beams=10, widths=(4, 4, 4, 4, 4)),
    "shared books": dict(items=200, beams=20, widths=(8, 16, 16), books=(0, 1, 1)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_same_beams_as_generate(name: str) -> None:
    settings = dict(CASES[name])
    beams = settings.pop("beams")
    callback = peer.walk if name == "shared books" else peer.dictionary
    equal_to_generate(world(users=9, seed=4, **settings, **EVEN), beams, callback, batch=4)


def test_same_beams_as_generate_at_the_size_of_tiger() -> None:
    equal_to_generate(world(items=12_000, users=6, widths=(256,) * 4), 50, peer.dictionary, batch=6)


def equal_to_generate(made: World, beams: int, callback: object, batch: int) -> None:
    codes_UKL, scores_UK = peer.generate(
        peer.hugging_face(made.model), made.histories, made.ids.length, beams, batch, callback(tokens_of(made))
    )
    expected_UK = made.trie.lookup(torch.from_numpy(codes_UKL - made.first_code - made.ids.offset_L)).numpy()
    lists = recommend(made.model, made.trie, made.histories, k=beams, beams=beams, batch=batch)
    assert (expected_UK >= 0).all()
    assert np.abs(lists.scores_UK - scores_UK).max() < 2e-5
    np.testing.assert_array_equal(lists.items_UK, expected_UK)


def test_free_decoding_is_generate_without_a_callback() -> None:
    made = world(items=100, users=9, widths=(6, 5, 4), seed=2, **EVEN)
    codes_UKL, scores_UK = peer.generate(peer.hugging_face(made.model), made.histories, 3, 10, 4)
    expected_UK = made.trie.lookup(torch.from_numpy(codes_UKL - made.first_code - made.ids.offset_L)).numpy()
    lists = recommend(made.model, made.trie, made.histories, k=10, beams=10, constrained=False)
    assert np.abs(lists.scores_UK - scores_UK).max() < 2e-5
    np.testing.assert_array_equal(lists.items_UK, expected_UK)
    assert lists.invalid_k == (expected_UK < 0).mean() > 0.1
