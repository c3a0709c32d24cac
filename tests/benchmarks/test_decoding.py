"""Decoding at the issue's setting: at least half of the matrix-product floor, equal ranks, below half of the peer's memory.

Run with ``make bench``; all figures, with the search for the peer's best settings: ``python -m tests.benchmarks.decoding``.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("transformers")
from tests.benchmarks.decoding import measure_cpu, memory_apart

PEER = {"batch": 2, "attention": "eager", "callback": "dictionary", "threads": 1}
"""The settings at which ``generate`` costs least CPU time (results/performance/decoding.md)."""
TIMES_GENERATE = 6.0
"""Held against the peer at its best. See results/performance/decoding.md for why the products alone are at about ten."""


@pytest.mark.parametrize("lengths", ["full", "mixed"])
def test_decoding(benchmark: BenchmarkFixture, lengths: str) -> None:
    found = benchmark.pedantic(measure_cpu, args=(lengths, 256, 8, 5, PEER), rounds=1)
    benchmark.extra_info.update(found)
    assert found["equal_ranks"] == 1
    assert found["share_of_floor"] >= 0.5
    assert found["times_generate"] >= TIMES_GENERATE
    assert found["bf16"]["shared_10"] > 0.9


def test_memory(benchmark: BenchmarkFixture) -> None:
    ours, theirs = benchmark.pedantic(lambda: (memory_apart("ours"), memory_apart("generate", PEER["batch"])), rounds=1)
    benchmark.extra_info.update(ours=ours, generate=theirs)
    assert ours < 0.5 * theirs
