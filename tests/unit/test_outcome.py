"""What becomes of a method's end: states, reasons, and outputs that cannot be trusted."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.contract import PREDICTIONS, InvalidOutput
from harness.execute.outcome import classify, clean, list_outputs, read_stage_result
from harness.execute.stage import StageFolder
from tests.house import House, build_house

EXIT: dict[str, Any] = {"ended_by": "exit", "exit_code": 0, "signal": None, "reason": ""}


@pytest.mark.parametrize(
    ("outcome", "tail", "expected"),
    [
        ({}, "", ("ok", "")),
        ({"exit_code": 77}, "", ("skipped", "")),
        ({"exit_code": 1}, "Traceback\nValueError: no", ("failed", "exit status 1: ValueError: no")),
        ({"exit_code": 3}, "", ("failed", "exit status 3, without a word")),
        (
            {"exit_code": 1},
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
            ("oom", "torch.OutOfMemoryError: CUDA out of memory. Tried"),
        ),
        ({"exit_code": 1}, "MemoryError\nthen: ValueError: other", ("failed", "exit status 1: then: ValueError: other")),
        ({"exit_code": None, "signal": "SIGSEGV"}, "", ("failed", "ended by SIGSEGV")),
        ({"ended_by": "deadline", "reason": "slow"}, "", ("timeout", "slow")),
        ({"ended_by": "memory", "reason": "big"}, "", ("oom", "big")),
        ({"ended_by": "disk", "reason": "full"}, "", ("failed", "full")),
        ({"ended_by": "lifeline", "reason": "gone"}, "", ("interrupted", "gone")),
    ],
)
def test_states(outcome: dict[str, Any], tail: str, expected: tuple[str, str]) -> None:
    assert classify(EXIT | outcome, tail) == expected


def test_text_of_methods_is_made_harmless() -> None:
    assert clean("a\x1b[31mb\x00c\n", 100) == "a [31mb c\n"
    assert clean("x" * 100, 10) == "x" * 9 + "…"


def test_outputs_are_listed_with_digests(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_text("b")
    (tmp_path / "a").write_text("")
    assert [(entry["path"], entry["bytes"]) for entry in list_outputs(tmp_path)] == [("a", 0), ("deep/b", 1)]


@pytest.mark.parametrize("kind", ["link", "folder link", "fifo"])
def test_odd_files_are_refused(tmp_path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(tmp_path / "x")
    else:
        (tmp_path / "x").symlink_to("/" if kind == "folder link" else "/etc/passwd")
    with pytest.raises(InvalidOutput, match="x is not a regular file"):
        list_outputs(tmp_path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InvalidOutput, match="cannot be read"):
        list_outputs(tmp_path)
    (tmp_path / "closed").chmod(0o700)


# ------------------------------------------------------- what a hostile output must not do to the harness: cost other runs


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return build_house(tmp_path_factory.mktemp("outcome"))


def result_of(house: House, files: dict[str, bytes], name: str) -> dict[str, Any]:
    """The result of a stage that left right predictions and these files."""
    users = 8
    arrays = {"users": np.arange(users), "items": np.tile(np.arange(50), (users, 1))}
    data = io.BytesIO()
    np.savez(data, **arrays)
    with house.task("ok", name) as task:
        right = {PREDICTIONS: data.getvalue(), "valid_predictions.npz": data.getvalue(), "meta.json": b"{}"}
        for path, content in (right | files).items():
            (task.folder.out / path).write_bytes(content)
        outcome = EXIT | {"seconds": 1.0, "cpu_seconds": 1.0, "peak_memory": 1}
        result = read_stage_result(outcome, task.folder, task.job, house.paths, last=True)
        task.folder.finish(result)
    return result


def test_right_output_is_ok(house: House) -> None:
    assert (
        result_of(house, {"meta.json": json.dumps({"extra": {"beam": 50, "text": "näive", "rate": 0.5}}).encode()}, "right")["state"]
        == "ok"
    )


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ('{"extra": {"x": 1e999}}', "not a finite number"),
        ('{"extra": {"x": 1' + "0" * 400 + "}}", "larger than 2"),
        ('{"best_valid": 1' + "0" * 400 + "}", "cannot be read"),
        ('{"steps": 1' + "0" * 400 + "}", "larger than 2"),
        ('{"extra": {"x": "\\ud800"}}', "printable"),
        ('{"extra": {"\\u001b[2J": 1}}', "printable"),
        ('{"attention": "' + "x" * 5000 + '"}', "at most 1000"),
        ('{"timings": {"predict": 1e-320}}', "no clock"),
        ('{"timings": {"fit": 1e308, "more": 1e308}}', "no clock"),
        (json.dumps({"extra": {f"k{i}": 1 for i in range(300)}}), "at most 200"),
    ],
)
def test_meta_that_no_record_can_hold_is_an_invalid_output(house: House, meta: str, words: str) -> None:
    result = result_of(house, {"meta.json": meta.encode()}, "meta")
    assert result["state"] == "invalid_output" and words in result["reason"], result
    assert house.paths.stages.joinpath("fake", "meta", "stage.json").exists()


def test_a_packing_that_cannot_be_bounded_is_refused_unread(house: House) -> None:
    """500 bytes of bzip2 that would be 64 MiB: zipfile unpacks such data whole, whatever size was asked for."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("users.npy", bytes(1 << 26))
        archive.writestr("items.npy", b"")
    result = result_of(house, {PREDICTIONS: data.getvalue()}, "bzip2")
    assert (result["state"], "another way" in result["reason"]) == ("invalid_output", True)


def test_numbers_that_are_times_are_an_invalid_output(house: House) -> None:
    data = io.BytesIO()
    np.savez(data, users=np.arange(8), items=np.zeros((8, 50), "m8[s]"))
    assert result_of(house, {PREDICTIONS: data.getvalue()}, "times")["state"] == "invalid_output"


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff", "w"):
        pass
    with pytest.raises(InvalidOutput, match="printable"):
        list_outputs(tmp_path)


def test_a_second_name_of_a_file_is_refused(tmp_path: Path) -> None:
    """Under its other name, in the cache, a later run of the method could change a finished stage."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "cache" / "weights").write_text("1")
    os.link(tmp_path / "cache" / "weights", tmp_path / "out" / "weights")
    with pytest.raises(InvalidOutput, match="hard link"):
        list_outputs(tmp_path / "out")


def test_holes_count_as_bytes(tmp_path: Path) -> None:
    """A file of nothing but a hole takes no disk, but hashing it takes as long as if it did."""
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidOutput, match="disk budget"):
        list_outputs(tmp_path, 1 << 30)


def test_folders_too_deep_for_a_path_are_removed(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "stage")
    folder.path.mkdir()
    folder.clear()
    before = os.getcwd()
    try:
        os.chdir(folder.scratch)
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(before)
    folder.clear()
    assert list(folder.scratch.iterdir()) == []
