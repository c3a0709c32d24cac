"""What a run shows: lines with the method's own words made harmless, and signs of life where there is no terminal."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from harness.commands import display
from harness.execute.stage import StageFolder
from harness.suite import Entry
from tests.faults import lab


@pytest.fixture
def plan(tmp_path: Path) -> lab.Plan:
    paths = lab.make_paths(tmp_path, ["slow"])
    lab.make_domain(paths)
    return lab.make_fake_plan(paths, [Entry(method="slow", configs=("a",))])


def test_signs_of_life_in_a_log(plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "HEARTBEAT", 0.02)
    folder = StageFolder(tmp_path / "stage")
    folder.out.mkdir(parents=True)
    line = {"step": 3, "of": 9, "metrics": {"loss [red]": 0.5, "valid_ndcg_at_10": 0.25}}
    (folder.out / "progress.jsonl").write_text(json.dumps(line) + "\n")
    console = Console(file=io.StringIO(), width=200)
    with display.Display(plan, console) as shown:
        shown.run_started(plan.runs[0])
        shown.stage_started(plan.runs[0], plan.runs[0].stages[1], folder)
        limit = time.monotonic() + 10
        while "running" not in console.file.getvalue() and time.monotonic() < limit:
            time.sleep(0.01)
    said = console.file.getvalue()
    assert "Slow (a) · small · seed 1" in said and "step 3/9" in said and "loss [red] 0.5000" in said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1, "metrics": {"a": "b"}}', "\x00" * 50, '{"step": 1}'])
def test_broken_progress_is_shown_as_nothing(plan: lab.Plan, tmp_path: Path, text: str) -> None:
    folder = StageFolder(tmp_path / "stage")
    folder.out.mkdir(parents=True)
    (folder.out / "progress.jsonl").write_text(text)
    assert display.Running(plan.runs[0], "fit", folder).latest() == ""
