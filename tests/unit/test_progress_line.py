"""The line of progress that a terminal shows comes from a file that the method writes: it is read as hostile input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.commands.display import Running
from harness.execute.stage import StageFolder

LINE = '{"time": 1, "stage": "fit", "step": 3, "of": 9, "metrics": {"loss": 0.5}}\n'


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("kind", "shown"), [("file", "step 3/9  loss 0.5000"), ("fifo", ""), ("link", ""), ("nonsense", ""), ("folder", "")]
)
def test_the_last_line_of_progress(tmp_path: Path, kind: str, shown: str) -> None:
    """A FIFO would be waited for by the thread that draws, and with it by every run that wants to print its end."""
    folder = StageFolder(tmp_path)
    folder.out.mkdir()
    path = folder.out / "progress.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "elsewhere").write_text(LINE)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(LINE if kind == "file" else '{"metrics": {"loss": 1' + "0" * 400 + '}, "step": 1}')
    assert Running(run=None, folder=folder).latest() == shown  # type: ignore[arg-type]
