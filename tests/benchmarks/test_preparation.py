"""Raw files to prepared domain: rate, peak memory, and how near it comes to merely decompressing the files.

Run with ``make bench ARGS="-k preparation"``. The files (``raw_files.py``) have the shape of Office_Products; BENCH_REVIEWS sets how many
reviews (12,800,000 is its full size, 20,800,000 the largest category's), default 400,000 for about a minute. Every way runs in a process
of its own, from a warm page cache, all ways in turn in each of the rounds (BENCH_ROUNDS); imports are not counted, for anybody.

    decompress    the two .gz files and nothing else, by the fastest of the libraries that are installed
    usual         peers/usual_preparation.py: histories and the texts of their items; it checks, cleans and writes nothing
    prepare       ``prepare_raw``: checked, numbered, texts cleaned, written
    recompute     the part of it up to the histories, reviews only

Aims: 5 times ``usual`` from gzip, 6 times on plain files, under 4 GiB. They are held against processor time, of all threads and
processes together, which is against us: the usual script has one. Also 60 % of the rate of ``decompress`` by the wall clock,
held for ``recompute`` and only if the machine had two cores to give (FREE). Ratios are medians over the rounds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks import raw_files

REVIEWS = int(os.environ.get("BENCH_REVIEWS", 400_000))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", 3))
FOLDER = os.environ.get("BENCH_FOLDER")
"""Where files of this size are kept from one call to the next."""
LIMIT = 4 << 30
OFFICE = 5_000_000
"""From this many reviews on the ratios to ``usual`` are held to the aims; its tables cost it less with fewer."""
FREE = 0.3
"""Load of a machine that does nothing else."""

CHILD = """
import contextlib, importlib, json, resource, sys, threading, time
from pathlib import Path
way, folder, gz, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "gz", Path(sys.argv[4])
name, ending = sys.argv[5], ".jsonl.gz" if gz else ".jsonl"
files = folder / "review_categories" / (name + ending), folder / "meta_categories" / f"meta_{name}{ending}"
if way == "usual":
    from tests.benchmarks.peers.usual_preparation import prepare
    work = lambda: prepare(*files)
elif way == "prepare":
    import polars
    from harness.data.prepare import prepare_raw
    view = out / "raw"
    for file in files:
        (view / file.parent.name).mkdir(parents=True)
        (view / file.parent.name / file.name).symlink_to(file)
    work = lambda: prepare_raw(view, name, "bench_preparation", root=out)
elif way == "recompute":
    import polars
    from harness.data.prepare import recompute
    work = lambda: recompute(files[0])
else:
    marks = []
    def inflate(library):
        for file in files:
            marks.append(time.perf_counter())
            with open(file, "rb", buffering=0) as stream:
                member = library.decompressobj(31)
                while data := stream.read(1 << 18):
                    member.decompress(data)
    library = importlib.import_module(way)
    work = lambda: inflate(library)
def used():
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
beside = [0]
def look():  # not ru_maxrss, which holds what a child had of its parent before it was another program
    while True:
        for task in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError, StopIteration):
                beside.extend(high(pid) for pid in task.read_text().split())
        time.sleep(0.2)
def high(pid):
    return next(int(line.split()[1]) << 10 for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM"))
threading.Thread(target=look, daemon=True).start()
wall, cpu = time.perf_counter(), used()
work()
wall, cpu = time.perf_counter() - wall, used() - cpu
peak = max(beside)  # of the largest child, which may have had it at another moment
peak += high("self")
reviews = marks[1] - marks[0] if "marks" in globals() else wall
print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "reviews": reviews}))
"""
INFLATERS = ["isal.isal_zlib", *(["zlib_ng.zlib_ng"] if importlib.util.find_spec("zlib_ng") else []), "zlib"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(FOLDER) if FOLDER else tmp_path_factory.mktemp("pair")
    if not (folder / "meta_categories" / f"meta_{raw_files.CATEGORY}.jsonl.gz").exists():
        raw_files.write_pair(folder, REVIEWS)
    return folder


def measure(way: str, pair: Path, kind: str, out: Path) -> dict[str, float]:
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, str(pair), kind, str(out), raw_files.CATEGORY],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HARNESS_CARDS": str(out / "no cards")},
    )
    assert not done.returncode, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def size_of(pair: Path, part: str = "*") -> int:
    return sum(file.stat().st_size for file in pair.glob(f"{part}_categories/*.jsonl"))


def test_preparation(benchmark: BenchmarkFixture, pair: Path, tmp_path: Path) -> None:
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    ways = [(name, "gz") for name in INFLATERS]
    ways += [(way, kind) for kind in ("gz", "plain") for way in ("usual", "prepare", "recompute")]

    def one_round() -> None:
        for way, kind in ways:
            if way == "usual" and os.environ.get("BENCH_USUAL") == "no":
                continue
            out = tmp_path / f"{len(found.get((way, kind), []))} {way} {kind}"
            found.setdefault((way, kind), []).append(measure(way, pair, kind, out))

    for file in pair.glob("*_categories/*"):
        file.read_bytes() if file.stat().st_size < 1 << 30 else subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    load = os.getloadavg()[0]
    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)

    def ratio(way: tuple[str, str], peer: tuple[str, str], key: str = "wall") -> float:
        return statistics.median(theirs[key] / ours[key] for ours, theirs in zip(found[way], found[peer], strict=True))

    total, reviews = size_of(pair), size_of(pair, "review")
    floor = min(INFLATERS, key=lambda name: statistics.median(one["wall"] for one in found[name, "gz"]))
    info: dict[str, Any] = benchmark.extra_info
    info |= {
        "bytes": total,
        "bytes_of_reviews": reviews,
        "reviews": REVIEWS,
        "floor": floor,
        "load_before": load,
    }
    for (way, kind), rounds in found.items():
        size = reviews if way == "recompute" else total
        info[f"{way} {kind}"] = {
            "seconds": round(statistics.median(one["wall"] for one in rounds), 2),
            "cpu_s": round(statistics.median(one["cpu"] for one in rounds), 2),
            "MB_per_s": round(size / statistics.median(one["wall"] for one in rounds) / 1e6),
            "peak_MiB": round(max(one["peak"] for one in rounds) / 2**20),
        }
    info["of_decompression"] = round(ratio(("prepare", "gz"), (floor, "gz")), 2)
    info["of_decompression_reviews"] = round(ratio(("recompute", "gz"), (floor, "gz"), "reviews"), 2)
    if ("usual", "gz") in found:
        for kind in ("gz", "plain"):
            info[f"times_usual_{kind}"] = round(ratio(("prepare", kind), ("usual", kind)), 1)
            info[f"times_usual_{kind}_cpu"] = round(ratio(("prepare", kind), ("usual", kind), "cpu"), 1)
    print(json.dumps(info, indent=1))

    assert max(one["peak"] for rounds in (found["prepare", "gz"], found["prepare", "plain"]) for one in rounds) < LIMIT
    if ("usual", "gz") in found:
        assert info["times_usual_gz_cpu"] >= (5 if REVIEWS >= OFFICE else 2)
        assert info["times_usual_plain_cpu"] >= (6 if REVIEWS >= OFFICE else 2)
    if load < FREE:
        assert info["of_decompression_reviews"] >= 0.6
