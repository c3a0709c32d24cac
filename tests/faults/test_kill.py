"""Kill the harness at any moment, run it twice at once: nothing is lost, nothing is done twice, nothing is left behind."""

from __future__ import annotations

import collections
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.paths import PROJECT
from harness.record import read_records
from tests.faults import lab
from tests.faults.drive import paths_of, plan_of
from tests.faults.test_faults import leftovers

KILLS = 50


def start(root: Path, slots: int = 2) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.faults.drive", str(root), str(slots)]
    with open(root / "complaints.txt", "ab") as complaints:
        return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=complaints, start_new_session=True)


def said(root: Path) -> str:
    return (root / "complaints.txt").read_text()[-3000:]


def make(root: Path) -> Path:
    lab.make_domain(lab.make_paths(root, ["slow"]))
    return root


def lasting(root: Path) -> dict[str, Any]:
    """What must not depend on when and how often the harness was killed: records without times, and the per-user ranks."""
    found: dict[str, Any] = {}
    for run_id, record in read_records(paths_of(root).records).items():
        value = record.model_dump(mode="json")
        for name in ("cost", "provenance", "environment"):
            del value[name]
        found[run_id] = value
    return found


def wait_until_nothing_lives(root: Path, seconds: float = 15) -> list[str]:
    """Processes of ``root`` that still live after a while: a killed harness's supervisors need a moment to end theirs."""
    limit = time.monotonic() + seconds
    while (alive := leftovers(root)) and time.monotonic() < limit:
        time.sleep(0.05)
    return alive


@pytest.mark.slow
@pytest.mark.faults
def test_kill_the_harness_fifty_times(tmp_path: Path) -> None:
    undisturbed, killed = make(tmp_path / "undisturbed"), make(tmp_path / "killed")
    assert start(undisturbed).wait(120) == 0
    chance = random.Random(20_241_121)
    finished: dict[str, bytes] = {}
    interrupted = 0
    for _ in range(KILLS):
        process = start(killed)
        try:
            process.wait(chance.uniform(0.3, 1.6))
        except subprocess.TimeoutExpired:
            interrupted += 1
        process.kill()
        process.wait()
        for path in paths_of(killed).records.glob("*.json"):
            data = path.read_bytes()
            json.loads(data)
            assert finished.setdefault(path.name, data) == data, f"{path.name}: a finished record changed"
    process = start(killed)
    assert process.wait(120) == 0, said(killed)
    assert wait_until_nothing_lives(killed) == []
    for name, data in finished.items():
        assert (paths_of(killed).records / name).read_bytes() == data
    assert len(lasting(killed)) == len(plan_of(killed).runs)
    assert lasting(killed) == lasting(undisturbed)
    assert ends_per_stage(killed) == dict.fromkeys(ends_per_stage(undisturbed), 1)
    assert interrupted >= KILLS // 4, "the kills came too late to test anything"


@pytest.mark.slow
@pytest.mark.faults
def test_two_harnesses_on_one_folder_run_everything_once(tmp_path: Path) -> None:
    root = make(tmp_path)
    both = [start(root), start(root)]
    for process in both:
        assert process.wait(120) == 0, said(root)
    assert set(starts_per_stage(root).values()) == {1}
    assert len(starts_per_stage(root)) == 2 * len(plan_of(root).runs)
    assert wait_until_nothing_lives(root) == []


@pytest.mark.slow
@pytest.mark.faults
def test_sigint_keeps_what_is_finished_and_leaves_nothing_running(tmp_path: Path) -> None:
    root = make(tmp_path)
    process = start(root)
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert wait_until_nothing_lives(root) == []
    assert start(root).wait(120) == 0
    assert len(lasting(root)) == len(plan_of(root).runs)


def starts_per_stage(root: Path) -> dict[str, int]:
    return notes(root, "start")


def ends_per_stage(root: Path) -> dict[str, int]:
    """How often each stage came to its end. A stage that ended just before the kill, unnoticed, is run again: at most that."""
    return {stage: min(count, 1) for stage, count in notes(root, "end").items()}


def notes(root: Path, word: str) -> dict[str, int]:
    lines = (paths_of(root).caches / "slow" / "notes.txt").read_text().splitlines()
    return dict(collections.Counter(line.partition(" ")[2] for line in lines if line.startswith(f"{word} ")))
