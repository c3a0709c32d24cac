"""Decoding in a process beside this one: the same results in the same order, whatever becomes of that process."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness.data import jsonl
from harness.data.decoder_process import SLOT, DecoderProcess
from harness.data.reviews import read_metadata, read_reviews
from harness.data.source import DataError
from harness.paths import PROJECT


def review(number: int) -> bytes:
    fields = {"user_id": f"u{number % 700}", "parent_asin": f"i{number * 7 % 90}", "timestamp": number, "text": "x" * (number % 900)}
    return json.dumps(fields).encode() + b"\n"


LINES = [review(number) for number in range(6000)]
LINES[1234] = b'{"user_id": 7, "parent_asin": "i"}\n'  # the block goes line by line
LINES[2345] = b' {"user_id": "\\ud800"}\n'


@pytest.fixture
def beside(monkeypatch):
    """One process beside this one, blocks of 20 KB, all worth handing over."""
    monkeypatch.setattr(jsonl, "LARGE", 0)
    monkeypatch.setattr(jsonl, "PROCESSES", 1)
    monkeypatch.setattr(jsonl, "SMALL", 0)
    monkeypatch.setattr(jsonl, "BLOCK", 20_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def rows(path):
    found = read_reviews(path)
    columns = (found.users_R.to_pylist(), found.items_R.to_pylist(), found.times_R.tolist(), found.user_hashes_R.tolist())
    return [*zip(*columns, strict=True)], found.item_hashes_R.tolist(), found.skipped


def parent_and_lines(seconds: float = 0.0):
    """A decoder that says in which process it ran."""

    def decode(block, ends):
        time.sleep(seconds)
        return os.getpid(), bytes(block)

    return decode


def dies(at: bytes):
    def decode(block, ends):
        if at in bytes(block) and os.getpid() != int(os.environ["TEST_PARENT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(block)

    return decode


def long_result():
    return lambda block, ends: b"x" * (SLOT + 1)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_same_as_in_one_process(tmp_path, monkeypatch, suffix, beside):
    path = tmp_path / f"x.jsonl{suffix}"
    data = b"".join(LINES)
    path.write_bytes(gzip.compress(data) if suffix else data)
    with monkeypatch.context() as alone:
        alone.setattr(jsonl, "PROCESSES", 0)
        expected = rows(path)
    assert len(expected[0]) == 5998
    assert expected[2] == 2
    assert rows(path) == expected


def test_both_processes_decode(tmp_path, beside):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(LINES[:1000] * 20))
    found = list(jsonl.decoded(path, parent_and_lines, 0.01))
    assert b"".join(result[1] for _, _, result in found) == path.read_bytes()
    assert len({result[0] for _, _, result in found}) == 2
    assert [first for first, _, _ in found] == np.cumsum([1, *(bytes(block).count(b"\n") for _, block, _ in found)])[:-1].tolist()


def test_a_broken_line_in_a_block_of_the_other_process_is_named(tmp_path, beside):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join([*LINES[:1000] * 5, b"{broken}\n", *LINES[:1000]]))
    with pytest.raises(DataError, match="line 5001: broken JSON"):
        read_reviews(path)


def test_its_death_loses_nothing(tmp_path, monkeypatch, beside):
    monkeypatch.setenv("TEST_PARENT", str(os.getpid()))
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(LINES[:1000] * 20))
    found = list(jsonl.decoded(path, dies, b'"timestamp": 500,'))
    assert b"".join(result for _, _, result in found) == path.read_bytes()


def test_without_one_to_be_had(tmp_path, monkeypatch, beside):
    def none(*_, **__):
        raise OSError(11, "no process to be had")

    monkeypatch.setattr(subprocess, "Popen", none)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(LINES))
    assert len(rows(path)[0]) == 5998


def test_a_result_longer_than_its_slot(beside, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(LINES[:1000] * 5))
    assert all(len(result) == SLOT + 1 for _, _, result in jsonl.decoded(path, long_result))


def test_it_ends_with_whoever_stops_taking(tmp_path, beside):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(LINES[:1000] * 100))
    results = jsonl.decoded(path, parent_and_lines, 0.01)
    pids = set()
    while len(pids) < 2:
        pids.add(next(results)[2][0])
    results.close()
    (child,) = pids - {os.getpid()}
    assert not Path(f"/proc/{child}").exists()


def test_it_ends_with_a_killed_parent(tmp_path):
    """Nothing else ends it: no signal reaches it, and its standard input is empty from the start."""
    script = (
        "import sys, time\n"
        "from harness.data.decoder_process import DecoderProcess\n"
        "from harness.data import jsonl\n"
        "process = DecoderProcess(jsonl._worker, jsonl.columns, (jsonl.pa.schema([]),))\n"
        "process.collect(wait=True)\n"
        "print(process._child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert parent.stdout
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)


def test_a_script_without_a_guard(tmp_path):
    """A user's script that prepares at its top level is not run again by the other process."""
    path = tmp_path / "meta.jsonl"
    path.write_bytes(b"".join(json.dumps({"parent_asin": f"i{number}", "title": f"T{number}"}).encode() + b"\n" for number in range(5000)))
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom pathlib import Path\n"
        "from harness.data import jsonl\nfrom harness.data.reviews import read_metadata\n"
        "print('once')\njsonl.LARGE = jsonl.SMALL = 0\njsonl.BLOCK = 10_000\nos.sched_getaffinity = lambda _: {0, 1}\n"
        f"texts, counts = read_metadata(Path({str(path)!r}), ['i4999', 'i0', 'none'])\n"
        "print(texts.texts.to_pylist(), counts['items_without_metadata'])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout == "once\n['T4999.', 'T0.', None] 1\n"


def test_metadata_of_both_processes(tmp_path, beside):
    path = tmp_path / "x.jsonl"
    records = [{"parent_asin": f"i{n % 4000}", "title": f"T{n}", "store": 5 if n % 10 == 0 else "S"} for n in range(6000)]
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    texts, counts = read_metadata(path, [f"i{n}" for n in range(5000)])
    assert texts.texts.to_pylist() == [f"T{n}." if n < 4000 else None for n in range(5000)]
    assert counts == {"items_without_metadata": 1000, "repeated_metadata": 2000, "metadata_fields_of_wrong_type": 400}


def test_what_it_cannot_be_given_is_said_at_once():
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        DecoderProcess(lambda: len)
