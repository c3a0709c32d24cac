"""What becomes of a method's end: states, reasons, and outputs that cannot be trusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness.contract import InvalidOutput
from harness.execute.outcome import classify, clean, list_outputs

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
