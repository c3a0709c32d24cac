"""Progress files are written by methods: every line may be a lie, and the file itself may be no file."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from pathlib import Path

import pytest

from harness.tracking import curves
from harness.tracking.curves import Curve, Point
from tests.unit.tracking.examples import SECOND, progress_line


def read(path: Path, stage: str = "fit") -> list[Point]:
    curve = Curve(path, stage)
    try:
        return [point for piece in curve.read_all() for point in piece]
    finally:
        curve.close()


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "progress.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_points(tmp_path: Path) -> None:
    path = write(tmp_path, progress_line(3, loss=0.5, valid_ndcg_at_10=0.25))
    moment = (SECOND + 3) * 1000
    assert read(path) == [Point("fit/loss", 0.5, 3, moment), Point("fit/valid_ndcg_at_10", 0.25, 3, moment)]


def test_names_cannot_pass_for_the_harness_s(tmp_path: Path) -> None:
    """The stage's prefix keeps them apart, and MLflow refuses ``@`` and odd paths."""
    names = {"recall_at_10": 1, "ndcg@10": 2, "../../x": 3, "a b/c": 4, "é\n": 5, "": 6, "x" * 500: 7}
    found = {point.name: point.value for point in read(write(tmp_path, progress_line(1, **names)), "pre train/1")}
    prefix = "pre_train_1/"
    assert found == {prefix + n: v for n, v in {"recall_at_10": 1, "ndcg_10": 2, "______x": 3, "a_b_c": 4, "__": 5, "x" * 100: 7}.items()}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "[]",
        "null",
        "{}",
        '{"step": 1}',
        '{"step": 1, "metrics": [1]}',
        '{"step": "1", "metrics": {"loss": 1}}',
        '{"step": true, "metrics": {"loss": 1}}',
        '{"step": 1.5, "metrics": {"loss": 1}}',
        '{"step": 1e400, "metrics": {"loss": 1}}',
        '{"step": 99999999999999999999, "metrics": {"loss": 1}}',
        '{"step": 1, "metrics": {"loss": NaN}}',
        '{"step": 1, "metrics": {"loss": Infinity}}',
        '{"step": 1, "metrics": {"loss": 1e999}}',
        '{"step": 1, "metrics": {"loss": ' + "9" * 400 + "}}",
        '{"step": 1, "metrics": {"loss": ' + "9" * 5000 + "}}",
        '{"step": 1, "metrics": {"loss": "1"}}',
        '{"step": 1, "metrics": {"loss": true}}',
        '{"step": 1, "metrics": {"loss": null}}',
        "[" * 5000,
        '{"step": 1, "metrics": {"loss": 1}, "x": "' + "y" * 9000 + '"}',
    ],
)
def test_bad_lines_are_skipped(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, progress_line(1, loss=1), line + "\n", b"\xff\xfe\x00\n", progress_line(2, loss=2))
    assert [point.step for point in read(path)] == [1, 2]


@pytest.mark.parametrize("moment", ["0", "-5", "1e30", "NaN", '"now"', "null", "true"])
def test_times_that_cannot_be_are_replaced(tmp_path: Path, moment: str) -> None:
    """By the one before: MLflow wants whole milliseconds, and reading twice must give the same."""
    line = f'{{"time": {moment}, "step": 2, "metrics": {{"loss": 1}}}}\n'
    known = (SECOND + 1) * 1000
    found = read(write(tmp_path, line, progress_line(1, loss=1), line))
    assert [point.time for point in found] == [1, known, known]


def test_the_middle_of_a_long_line_is_not_a_line(tmp_path: Path) -> None:
    inner = progress_line(66, loss=6).strip()
    line = "x" * (3 * curves.MAX_CHUNK) + inner
    assert [point.step for point in read(write(tmp_path, progress_line(1, loss=1), line, "\n", progress_line(2, loss=2)))] == [1, 2]


def test_a_file_that_grows_gives_the_same_as_a_finished_one(tmp_path: Path) -> None:
    """Whatever the pieces: cut anywhere, in lines and in characters."""
    lines = [progress_line(step, loss=step / 7) for step in range(5000)] + ["junk\n", "y" * 20000 + "\n", progress_line(9999, loss=1)]
    data = "".join(lines).encode()
    whole = read(write(tmp_path, data))
    generator = random.Random(1)
    path = tmp_path / "growing.jsonl"
    curve, found, at = Curve(path, "fit"), [], 0
    assert curve.read() == [], "it is not there yet"
    with open(path, "wb", buffering=0) as file:
        while at < len(data):
            piece = data[at : at + generator.choice([1, 50, 3000, 40000])]
            at += file.write(piece)
            found += curve.read()
    curve.close()
    assert found == whole


def test_a_flood_is_thinned_and_keeps_its_shape(tmp_path: Path) -> None:
    """40,000 lines: some thousands of points, the last of them near the end."""
    path = write(tmp_path, *(progress_line(step, loss=step) for step in range(40_000)))
    steps = [point.step for point in read(path)]
    assert 5_000 < len(steps) < 20_000
    assert steps[:2000] == list(range(2000))
    assert steps[-1] > 39_900
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 32


def test_endless_metric_names_are_capped(tmp_path: Path) -> None:
    path = write(tmp_path, *(progress_line(step, loss=1, **{f"m{step}": 1}) for step in range(500)))
    found = read(path)
    assert len({point.name for point in found}) == curves.MAX_NAMES
    assert sum(point.name == "fit/loss" for point in found) == 500


def test_gigabytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, progress_line(1, loss=1))
    with open(path, "r+b") as file:
        file.truncate(1 << 33)
        file.seek(1 << 33)
        file.write(b"\n" + progress_line(2, loss=1).encode())
    pread, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: sizes.append(size) or pread(handle, size, offset))
    assert [point.step for point in read(path)] == [1]
    assert sum(sizes) <= curves.MAX_BYTES


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "folder", "device link", "linked folder"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    """The private targets could be behind it, or nothing at all for ever."""
    secret = write(tmp_path, progress_line(1, loss=1))
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "progress.jsonl"
    match kind:
        case "link":
            path.symlink_to(secret)
        case "hard link":
            os.link(secret, path)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device link":
            path.symlink_to("/dev/zero")
        case "linked folder":
            (tmp_path / "out").rmdir()
            (tmp_path / "out").symlink_to(tmp_path)
    assert read(path) == []


def test_a_file_that_vanishes_ends_in_peace(tmp_path: Path) -> None:
    path = write(tmp_path, progress_line(1, loss=1))
    curve = Curve(path, "fit")
    assert len(curve.read()) == 1
    path.unlink()
    assert curve.read() == []
    curve.close()
    assert curve.read() == []


def test_lines_of_the_contract_s_progress_are_read(tmp_path: Path) -> None:
    """What ``harness.contract.Progress`` writes is what is read here."""
    from types import SimpleNamespace

    from harness.contract import PROGRESS, Progress

    progress = Progress(SimpleNamespace(output=tmp_path, stage="fit"))  # type: ignore[arg-type]
    progress.log(7, of=9, loss=0.5, bad=float("nan"))
    found = read(tmp_path / PROGRESS)
    assert [(point.name, point.value, point.step) for point in found] == [("fit/loss", 0.5, 7)]
    assert abs(found[0].time / 1000 - time.time()) < 60
    assert json.loads((tmp_path / PROGRESS).read_text())["of"] == 9
