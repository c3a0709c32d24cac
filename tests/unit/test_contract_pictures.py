"""The reader of the picture pack: content, batches, threads, forked and spawned workers, damage, what it holds on to."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.contract import ContractError, Pictures


def write_pack(folder: Path, pictures: dict[int, bytes]) -> Path:
    lengths = np.array([len(data) for data in pictures.values()], np.int64)
    (folder / "pictures.bin").write_bytes(b"".join(pictures.values()))
    columns = {"item": pa.array(list(pictures), pa.int32()), "offset": np.cumsum(lengths) - lengths, "length": lengths}
    pq.write_table(pa.table({**columns, "sha256": [""] * len(pictures)}), folder / "pictures.parquet")
    return folder


def picture(item: int) -> bytes:
    return np.random.default_rng(item).bytes(500 + item * 37 % 4000)


@pytest.fixture
def pictures() -> dict[int, bytes]:
    """Two of three items have one."""
    return {item: picture(item) for item in range(300) if item % 3}


@pytest.fixture
def folder(tmp_path: Path, pictures: dict[int, bytes]) -> Path:
    return write_pack(tmp_path, pictures)


def test_every_item_and_none_for_the_others(folder: Path, pictures: dict[int, bytes]) -> None:
    shelf = Pictures(folder)
    assert len(shelf) == 200
    for item in (-301, -300, -1, *range(310), 1 << 40):
        assert shelf[item] == pictures.get(item)
        assert (item in shelf) == (item in pictures)
    assert shelf[np.int32(4)] == pictures[4]  # type: ignore[index]  # as it comes out of an array


def test_a_batch_is_in_the_order_asked_for(folder: Path, pictures: dict[int, bytes]) -> None:
    shelf = Pictures(folder)
    items = [250, 3, 1, 250, -1, 299, 2, 100_000]
    assert shelf.many(items) == [pictures.get(item) for item in items]
    assert shelf.many(np.array(items)) == [pictures.get(item) for item in items]  # type: ignore[arg-type]
    assert shelf.many([]) == []


def test_no_pictures_and_an_empty_pack(tmp_path: Path) -> None:
    shelf = Pictures(tmp_path)
    assert (len(shelf), shelf[0], shelf.many([0, 1]), 0 in shelf) == (0, None, [None, None], False)
    shelf = Pictures(write_pack(tmp_path, {}))
    assert (len(shelf), shelf[0], shelf.many([0, 1])) == (0, None, [None, None])


def test_an_empty_picture_is_one(tmp_path: Path) -> None:
    shelf = Pictures(write_pack(tmp_path, {0: b"", 1: b"x"}))
    assert (shelf[0], shelf[1], len(shelf)) == (b"", b"x", 2)


def test_many_threads_read_at_once(folder: Path, pictures: dict[int, bytes]) -> None:
    shelf = Pictures(folder)

    def read(seed: int) -> bool:
        items = np.random.default_rng(seed).integers(0, 300, 400).tolist()
        alone = all(shelf[item] == pictures.get(item) for item in items)
        return alone and shelf.many(items) == [pictures.get(item) for item in items]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(16)))


def read_in_worker(shelf: Pictures, seed: int, answers: Queue[bool]) -> None:
    items = np.random.default_rng(seed).integers(0, 300, 500).tolist()
    answers.put(all(shelf[item] == (picture(item) if item % 3 else None) for item in items) and shelf.many([4])[0] == picture(4))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_they_were_given(method: str, folder: Path, pictures: dict[int, bytes]) -> None:
    shelf = Pictures(folder)
    assert shelf[1] == pictures[1]  # used before the fork
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    workers = [context.Process(target=read_in_worker, args=(shelf, seed, answers)) for seed in range(3)]
    for worker in workers:
        worker.start()
    items = np.random.default_rng(9).integers(0, 300, 2000).tolist()
    assert all(shelf[item] == pictures.get(item) for item in items)  # meanwhile
    assert all(answers.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(10)
    assert shelf[2] == pictures[2]  # their end closed nothing here


def test_copies_open_for_themselves(folder: Path, pictures: dict[int, bytes]) -> None:
    shelf = Pictures(folder)
    others = [pickle.loads(pickle.dumps(shelf)), copy.copy(shelf), copy.deepcopy(shelf)]
    assert len(pickle.dumps(shelf)) < 1000  # a path, not the index
    del shelf
    assert all(other[1] == pictures[1] for other in others)


def test_nothing_stays_open(folder: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    shelves = [Pictures(folder) for _ in range(20)]
    for shelf in shelves:
        shelf.many(range(300))
    assert open_files() == before + 20
    del shelf, shelves
    assert open_files() == before


def test_the_index_of_500_000_is_small(tmp_path: Path) -> None:
    items = np.arange(500_000, dtype=np.int32)
    pq.write_table(
        pa.table({"item": items, "offset": items.astype(np.int64), "length": np.ones(500_000, np.int64)}), tmp_path / "pictures.parquet"
    )
    (tmp_path / "pictures.bin").write_bytes(bytes(500_000))
    shelf = Pictures(tmp_path)
    held = [value for value in vars(shelf).values() if not isinstance(value, int | Path)]
    assert sum(array.nbytes for array in held) <= 12 * 500_000
    assert shelf[499_999] == b"\0"


def test_a_torn_tail_is_found_at_the_start(folder: Path) -> None:
    with open(folder / "pictures.bin", "r+b") as pack:
        pack.truncate(pack.seek(0, os.SEEK_END) - 1)
    with pytest.raises(ContractError, match=r"pictures.bin has [0-9,]+ bytes and lacks some that its index names"):
        Pictures(folder)


def test_a_pack_that_is_cut_later_is_found_when_it_is_read(folder: Path) -> None:
    shelf = Pictures(folder)
    os.truncate(folder / "pictures.bin", 1000)
    assert shelf[1] == picture(1)
    for read in (lambda: shelf[299], lambda: shelf.many([1, 299])):
        with pytest.raises(ContractError, match=r"pictures.bin ends within the picture of item 299"):
            read()


def test_a_pack_without_its_file_or_with_a_strange_index(folder: Path) -> None:
    (folder / "pictures.bin").rename(folder / "elsewhere")
    with pytest.raises(ContractError, match="its pictures cannot be read"):
        Pictures(folder)
    (folder / "elsewhere").rename(folder / "pictures.bin")
    pq.write_table(pa.table({"item": [0], "offset": [0]}), folder / "pictures.parquet")
    with pytest.raises(ContractError, match="has no column 'length'"):
        Pictures(folder)
    for row in ((-1, 0, 5), (0, -5, 5), (0, 0, -5)):
        pq.write_table(
            pa.table(dict(zip(("item", "offset", "length"), ([value] for value in row), strict=True))), folder / "pictures.parquet"
        )
        with pytest.raises(ContractError, match="its index names"):
            Pictures(folder)


def test_a_domain_replaced_meanwhile_does_not_mix(tmp_path: Path, folder: Path, pictures: dict[int, bytes]) -> None:
    shelf = Pictures(folder)
    (tmp_path / "new").mkdir()
    write_pack(tmp_path / "new", dict.fromkeys(range(300), b"other"))
    for name in ("pictures.bin", "pictures.parquet"):
        os.replace(tmp_path / "new" / name, folder / name)
    assert shelf[299] == pictures[299]
    assert Pictures(folder)[299] == b"other"
