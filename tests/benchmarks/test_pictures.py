"""Pictures: what reading them costs while training, and how long a download of 2,000 takes from a server that answers late.

Run with ``make bench``. Reading: 60,000 pictures (bytes of their usual lengths, 28 KB in the median, 1.8 GB) lie once in a domain's
pack and once as single files in one folder; two processes read items in random order, warm (everything was read before) and cold
(page cache, directory entries and inodes dropped before every round: needs root). All ways take turns in each of five rounds.

    single files            peers/single_files.py, one read after the other
    single files, batches   the same, 64 at a time: all opened, all announced to the kernel, then read
    contract                harness.contract.Pictures, one after the other
    contract, batches       and 64 at a time (``Pictures.many``)

The aim, 1.5 times single files one after the other, which is how data loaders read them, is held against process CPU time for warm
reads (wall times depend on what else runs) and, for batches, against the wall clock for cold ones.

Download: the server stands in a process of its own and waits 50 ms before every answer.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from harness.contract import Pictures
from harness.data.pictures import Download
from tests.benchmarks.peers import single_files

N_PICTURES = int(os.environ.get("BENCH_PICTURES", 60_000))
READS = {"warm": 20_000, "cold": 3_000}
ROUNDS, WORKERS = 5, 2
FASTER = 1.5
DROP = Path("/proc/sys/vm/drop_caches")


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as a pack and as single files."""
    folder = tmp_path_factory.mktemp("shelves")
    rng = np.random.default_rng(0)
    noise = rng.bytes(1 << 22)
    lengths = np.clip(rng.lognormal(np.log(28_000), 0.5, N_PICTURES), 3_000, 200_000).astype(np.int64)
    starts = rng.integers(0, len(noise) - 200_000, N_PICTURES)
    (folder / "files").mkdir()
    with open(folder / "pictures.bin", "wb") as pack:
        for item, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            data = noise[start : start + length]
            pack.write(data)
            (folder / "files" / f"{item}.jpg").write_bytes(data)
    columns = {"item": np.arange(N_PICTURES, dtype=np.int32), "offset": np.cumsum(lengths) - lengths, "length": lengths}
    pq.write_table(pa.table({**columns, "sha256": [""] * N_PICTURES}), folder / "pictures.parquet")
    return folder


WAYS: dict[str, Callable[[Path], Any]] = {
    "single files": lambda folder: single_files.SingleFiles(folder / "files"),
    "single files, batches": lambda folder: single_files.SingleFiles(folder / "files"),
    "contract": Pictures,
    "contract, batches": Pictures,
}
BATCH = 64


def read(way: str, folder: Path, items: list[int], results: Any, gate: Any) -> None:
    """One worker: how long its reads took, and how much processor time."""
    shelf = WAYS[way](folder)
    gate.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    if way.endswith("batches"):
        total = sum(len(data) for start in range(0, len(items), BATCH) for data in shelf.many(items[start : start + BATCH]))
    else:
        total = sum(len(shelf[item]) for item in items)
    results.put((time.perf_counter() - wall, time.process_time() - cpu, total))


def rate(way: str, folder: Path, items: np.ndarray) -> tuple[float, float]:
    """Pictures a second by the wall clock and by processor time, over all workers."""
    context = multiprocessing.get_context("fork")
    results, gate = context.Queue(), context.Barrier(WORKERS)
    parts = np.array_split(items, WORKERS)
    workers = [context.Process(target=read, args=(way, folder, part.tolist(), results, gate)) for part in parts]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    return len(items) / max(wall for wall, _, _ in found), len(items) / sum(cpu for _, cpu, _ in found)


@pytest.mark.parametrize("cache", READS)
def test_random_reading(benchmark: BenchmarkFixture, shelves: Path, cache: str) -> None:
    if cache == "cold" and not os.access(DROP, os.W_OK):
        pytest.skip(f"cannot drop the page cache ({DROP} needs root)")
    if cache == "warm":
        for way in ("single files", "contract"):
            rate(way, shelves, np.arange(N_PICTURES))
    rates: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    rng = np.random.default_rng(1)

    def one_round() -> None:
        items = rng.permutation(N_PICTURES)[: READS[cache]]
        for way in WAYS:
            if cache == "cold":
                os.sync()
                DROP.write_text("3")
            rates[way].append(rate(way, shelves, items))

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)
    peers = rates["single files"]
    ratios = {
        way: [statistics.median(mine[kind] / peer[kind] for mine, peer in zip(rates[way], peers, strict=True)) for kind in (0, 1)]
        for way in WAYS
    }
    for way in WAYS:
        name = way.replace(",", "").replace(" ", "_")
        benchmark.extra_info[f"{name}_per_s"] = round(statistics.median(wall for wall, _ in rates[way]))
        benchmark.extra_info[f"{name}_per_cpu_s"] = round(statistics.median(cpu for _, cpu in rates[way]))
        benchmark.extra_info[f"{name}_ratio"] = [round(ratio, 2) for ratio in ratios[way]]
    if cache == "warm":
        assert ratios["contract"][1] >= FASTER
    else:
        assert ratios["contract, batches"][0] >= FASTER


# ------------------------------------------------------------------------------------------------------------ download

SERVED, ONE_AT_A_TIME = 2_000, int(os.environ.get("BENCH_ONE_AT_A_TIME", 100))
SERVER = """
import sys, threading
from pathlib import Path
from tests.web_server import WebServer
bodies = [file.read_bytes() for file in sorted(Path(sys.argv[1]).iterdir())]
with WebServer(delay=0.05) as server:
    for number in range(int(sys.argv[2])):
        server.serve(f"/{number}.jpg", bodies[number % len(bodies)])
    print(server.port, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def late_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """2,000 addresses of 100 pictures of 500 x 500 pixels, about 60 KB each."""
    folder = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(2)
    for number in range(100):
        coarse = Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8))
        coarse.resize((500, 500), Image.Resampling.BICUBIC).save(folder / f"{number:03}.jpg", quality=85)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder), str(SERVED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdin
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.stdin.close()
    process.wait(10)


def test_download_of_2000(benchmark: BenchmarkFixture, late_server: str, tmp_path: Path) -> None:
    """Both ways take turns; one at a time gets fewer pictures (BENCH_ONE_AT_A_TIME), and the time for one is compared."""
    ours, theirs, cpu = [], [], []

    def one_round() -> None:
        place = tmp_path / f"round {len(ours)}"
        (place / "meta_categories").mkdir(parents=True)
        (place / "files").mkdir()
        urls = [f"{late_server}/{number}.jpg" for number in range(SERVED)]
        with open(place / "meta_categories" / "meta_Software.jsonl", "w") as file:
            for number, url in enumerate(urls):
                file.write(json.dumps({"parent_asin": f"B{number}", "images": [{"large": url, "variant": "MAIN"}]}) + "\n")
        started, used = time.perf_counter(), time.process_time()
        outcomes = Download(place, "Software").run()
        ours.append((time.perf_counter() - started) / SERVED)
        cpu.append(time.process_time() - used)
        assert sum(outcome.kept for outcome in outcomes.values()) == SERVED
        started = time.perf_counter()
        single_files.download(urls[:ONE_AT_A_TIME], place / "files")
        theirs.append((time.perf_counter() - started) / ONE_AT_A_TIME)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)
    benchmark.extra_info |= {
        "seconds_for_2000": round(statistics.median(ours) * SERVED, 2),
        "cpu_s_for_2000": round(statistics.median(cpu), 2),
        "one_at_a_time_for_2000": round(statistics.median(theirs) * SERVED, 1),
        "times_faster": round(statistics.median(peer / mine for mine, peer in zip(ours, theirs, strict=True)), 1),
    }
    assert benchmark.extra_info["times_faster"] >= 8
