"""The file of picture features: appended to, torn, shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utgrec.tokenizer.vision_cache import LINE, VisionCache, cache_bytes

WIDTH = 8


class Tower:
    """Features that can be told apart: one row for each byte of a picture; "bad" cannot be decoded."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def __call__(self, pictures: list[bytes]) -> list[tuple[np.ndarray, tuple[int, int, int]] | None]:
        self.asked += pictures
        return [None if data == b"bad" else (rows(data), (1, 2, 2 * len(data))) for data in pictures]


def rows(data: bytes) -> np.ndarray:
    return np.repeat(np.frombuffer(data, np.uint8)[:, None], WIDTH, 1).astype(np.float32)


def cache(folder: Path) -> VisionCache:
    return VisionCache(folder, "key", WIDTH, np.dtype(np.float32))


PICTURES = [b"one", None, b"three", b"bad", b"one", b"eleven"]


def check(found: VisionCache) -> None:
    assert len(found) == 4
    for data in (b"one", b"three", b"eleven"):
        features_ND, grid = found.get(data)
        assert np.array_equal(features_ND, rows(data))
        assert grid == (1, 2, 2 * len(data))
    assert b"bad" in found
    assert found.get(b"bad") is None
    assert b"other" not in found
    assert found.get(b"other") is None


def test_each_picture_is_computed_once(tmp_path: Path) -> None:
    tower, store = Tower(), cache(tmp_path)
    store.add(PICTURES, tower, batch=2)
    check(store)
    check(cache(tmp_path))
    cache(tmp_path).add(PICTURES, tower)
    assert tower.asked == [b"one", b"three", b"bad", b"eleven"]
    again = cache(tmp_path)
    again.add([b"four"], tower)
    assert tower.asked[4:] == [b"four"]
    assert len(again) == 5


@pytest.mark.parametrize("cut", [1, LINE - 1, LINE, LINE + 5, 3 * LINE])
def test_a_torn_index_goes_on_behind_the_last_whole_line(tmp_path: Path, cut: int) -> None:
    cache(tmp_path).add(PICTURES, Tower())
    index = next(tmp_path.glob("*.index"))
    index.write_bytes(index.read_bytes()[:-cut])
    tower, store = Tower(), cache(tmp_path)
    store.add(PICTURES, tower)
    assert len(tower.asked) == -(-cut // LINE)
    check(store)
    check(cache(tmp_path))


@pytest.mark.parametrize("cut", [1, 6 * WIDTH * 4, 7 * WIDTH * 4])
def test_torn_features_go_on_behind_the_last_whole_picture(tmp_path: Path, cut: int) -> None:
    cache(tmp_path).add(PICTURES, Tower())
    features = next(tmp_path.glob("*.features"))
    features.write_bytes(features.read_bytes()[:-cut])
    tower, store = Tower(), cache(tmp_path)
    assert len(store) < 4
    store.add(PICTURES, tower)
    assert b"eleven" in tower.asked
    check(store)
    check(cache(tmp_path))


def test_a_kill_in_the_middle_keeps_whole_batches(tmp_path: Path) -> None:
    def killed(pictures: list[bytes]) -> list:
        if b"eleven" in pictures:
            raise KeyboardInterrupt
        return Tower()(pictures)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).add(PICTURES, killed, batch=1)
    tower, store = Tower(), cache(tmp_path)
    store.add(PICTURES, tower)
    assert tower.asked == [b"eleven"]
    check(store)


def test_writers_have_a_file_each_and_read_all(tmp_path: Path) -> None:
    first, second = cache(tmp_path), cache(tmp_path)
    first.add(PICTURES[:3], Tower(), writer="0")
    tower = Tower()
    second.add(PICTURES[2:], tower, writer="1")
    assert len(list(tmp_path.glob("*.index"))) == 2
    first.open()
    check(first)
    check(second)


def test_its_size() -> None:
    assert cache_bytes(344_000, 324) == 344_000 * 324 * 1536 * 2
    assert round(cache_bytes(344_000, 324) / 1e9) == 342
    assert round(cache_bytes(344_000, 64) / 1e9) == 68
