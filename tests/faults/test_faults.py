"""Faulty methods: each gets its status, all other runs finish, no process is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.method import load_method
from harness.paths import PROJECT
from harness.record import Record
from harness.suite import Entry
from tests.faults import lab

EXPECTED = {
    "fine": ("ok", ""),
    "crashes": ("failed", "broken on purpose"),
    "hangs": ("timeout", "still running"),
    "ignores_term": ("timeout", "still running"),
    "eats_memory": ("oom", "GiB of memory"),
    "fills_disk": ("failed", "wrote"),
    "floods_log": ("ok", ""),
    "no_output": ("invalid_output", "predictions.npz is missing"),
    "wrong_shape": ("invalid_output", "shape [120, 10]"),
    "duplicate_items": ("invalid_output", "stands twice in the list of user 3"),
    "out_of_range": ("invalid_output", "outside -1..79"),
    "missing_users": ("invalid_output", "shape [119]"),
    "not_a_number": ("invalid_output", "float64"),
    "bad_meta": ("invalid_output", "unknown keys ['recall_at_10']"),
    "leaves_daemon": ("ok", ""),
    "output_link": ("invalid_output", "not a regular file"),
    "output_hard_link": ("invalid_output", "hard link"),
    "output_fifo": ("invalid_output", "not a regular file"),
    "output_pickle": ("invalid_output", "plain array"),
    "output_gigabytes": ("failed", "File too large"),
    "output_megabytes": ("invalid_output", "at most"),
    "zip_bomb": ("invalid_output", "at most"),
    "segfault": ("failed", "SIGSEGV"),
    "nameless_signal": ("failed", "signal 40"),
    "prints_for_ever": ("timeout", "still running"),
    "meta_infinity": ("invalid_output", "not a finite number"),
    "kills_supervisor": ("ok", ""),
    "skips": ("skipped", "unicorn"),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    root = tmp_path_factory.mktemp("faults")
    paths = lab.make_paths(root, ["faulty"])
    lab.make_domain(paths)
    plan = lab.make_fake_plan(paths, [Entry(method="faulty", configs=tuple(EXPECTED))])
    found = lab.carry_out(plan, paths)
    assert leftovers(root) == []
    return found


def leftovers(root: Path) -> list[str]:
    """Processes that came from runs below ``root``, by working directory, program or the mark in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        if int(name) == os.getpid():
            continue
        try:
            texts = [os.readlink(f"/proc/{name}/cwd"), Path(f"/proc/{name}/environ").read_bytes().decode(errors="replace")]
            texts.append(Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
        if any(str(root) in text for text in texts):
            found.append(f"{name}: {texts[-1]!r}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_every_fault_gets_its_status(records: dict[str, Record], name: str) -> None:
    state, words = EXPECTED[name]
    status = records[name].status
    assert (status.state, words in status.reason) == (state, True), (status.reason, status.log_tail[-500:])
    assert bool(records[name].metrics) == (state == "ok")


def test_every_configuration_of_the_fake_is_expected() -> None:
    configs = set(load_method(lab.FAKES / "faulty", PROJECT).configs)
    assert configs == set(EXPECTED) | {"not_deterministic"}


def test_a_failed_run_keeps_its_log(records: dict[str, Record]) -> None:
    assert "RuntimeError: broken on purpose" in records["crashes"].status.log_tail
    assert records["crashes"].status.exit_code == 1


def test_a_failure_is_tried_again_and_a_success_is_not(tmp_path: Path) -> None:
    paths = lab.make_paths(tmp_path, ["faulty"])
    lab.make_domain(paths)
    plan = lab.make_fake_plan(paths, [Entry(method="faulty", configs=("fine", "crashes", "skips"))])
    first, second = lab.Silent(), lab.Silent()
    lab.carry_out(plan, paths, observer=first)
    lab.carry_out(plan, paths, observer=second)
    assert len(first.stages) == 3
    assert [run.split(".")[1] for run in second.stages] == ["crashes"]
