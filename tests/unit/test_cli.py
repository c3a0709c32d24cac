"""The command line as a user starts it: help, errors that name the mend, a run, a second run, a new baseline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.paths import PROJECT
from tests.faults import lab

SUITE = """
name = "tiny"
title = "Tiny"
domains = ["small"]
seeds = 1
[budget]
seconds = 20
[[run]]
method = "popularity"
configs = ["default"]
[[run]]
method = "last_item"
configs = ["default"]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    lab.make_domain(lab.make_paths(tmp_path, ["faulty"]))
    (tmp_path / "tiny.toml").write_text(SUITE)
    return tmp_path


def harness(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HARNESS_DATA": str(home / "data"),
        "HARNESS_RESULTS": str(home / "results"),
        "HARNESS_METHODS": str(home / "methods"),
    }
    return subprocess.run([sys.executable, "-m", "harness.cli", *arguments], capture_output=True, text=True, env=environment, cwd=PROJECT)


def test_every_verb_has_help_with_an_example() -> None:
    verbs = ["run", "plan", "table", "score", "publish", "keep", "check", "new-baseline"]
    for verb in verbs:
        done = subprocess.run([sys.executable, "-m", "harness.cli", verb, "--help"], capture_output=True, text=True, cwd=PROJECT)
        assert done.returncode == 0 and "Example:" in done.stdout, verb


def test_help_and_run_import_nothing_heavy(home: Path) -> None:
    code = """
import sys
from harness.cli import main
try:
    main()
except SystemExit:
    pass
print("HEAVY", sorted({"torch", "mlflow", "polars"} & set(sys.modules)))
"""
    environment = os.environ | {"HARNESS_DATA": str(home / "data"), "HARNESS_RESULTS": str(home / "results")}
    for arguments in (["--help"], ["run", "--suite", str(home / "tiny.toml"), "--no-mlflow"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=PROJECT)
        assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr


def test_a_run_ends_with_a_table_and_a_second_run_does_nothing(home: Path) -> None:
    first = harness(home, "run", "--suite", str(home / "tiny.toml"), "--no-mlflow")
    assert first.returncode == 0, first.stderr
    assert "Popularity" in first.stdout and "Last item" in first.stdout and "2 runs" in first.stdout
    for suffix in ("md", "csv", "tex", "html"):
        assert (home / "results" / "tables" / "tiny" / f"tiny.{suffix}").exists()
    second = harness(home, "run", "--suite", str(home / "tiny.toml"), "--no-mlflow")
    assert second.returncode == 0 and "2 of 2 runs were finished before" in second.stdout
    dry = harness(home, "plan", "--suite", str(home / "tiny.toml"))
    assert dry.stdout.count("cached") == 2


@pytest.mark.slow
def test_a_suite_cut_by_time_makes_its_domains_and_runs(home: Path) -> None:
    done = harness(home, "run", "--suite", "smoke_time", "-m", "popularity", "-m", "last_item", "--no-mlflow")
    assert done.returncode == 0, done.stderr
    assert "simulating" in done.stdout and "4 of 4 runs ok" in done.stdout and "Last item" in done.stdout
    assert "Oracle" not in done.stdout  # the simulator's own ranking is for the step that it took last, which is not asked for here
    again = harness(home, "run", "--suite", "smoke_time", "-m", "popularity", "-m", "last_item", "--no-mlflow")
    assert again.returncode == 0 and "simulating" not in again.stdout and "4 of 4 runs were finished before" in again.stdout


def test_a_failed_run_makes_the_command_fail_and_the_table_all_the_same(home: Path) -> None:
    suite = SUITE + '[[run]]\nmethod = "faulty"\nconfigs = ["crashes"]\n'
    (home / "tiny.toml").write_text(suite)
    done = harness(home, "run", "--suite", str(home / "tiny.toml"), "--no-mlflow")
    assert done.returncode == 1
    assert "failed" in done.stdout and "broken on purpose" in done.stdout and "Last item" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--suite", "smoek"], "Did you mean 'smoke'"),
        (["run", "--suite", "HOME/tiny.toml", "-m", "popularty"], "Did you mean 'popularity'"),
        (["run", "--suite", "HOME/tiny.toml", "-d", "smal"], "Did you mean 'small'"),
        (["run", "--suite", "HOME/tiny.toml", "--executor", "dokcer"], "Did you mean 'docker'"),
        (["run", "--suite", "HOME/tiny.toml", "--device", "cuda"], "no GPU was found"),
        (["check", "popularty"], "Did you mean 'popularity'"),
        (["new-baseline", "My Model"], "lower case"),
        (["new-baseline", "popularity"], "exists already"),
    ],
)
def test_mistakes_get_one_line_with_the_mend(home: Path, arguments: list[str], words: str) -> None:
    if "cuda" in arguments and shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    done = harness(home, *(argument.replace("HOME", str(home)) for argument in arguments))
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_doctor_names_every_part(home: Path) -> None:
    done = harness(home, "doctor")
    assert done.returncode == 0, done.stdout
    for word in ("Python", "GPU", "memory", "disk", "Docker", "isolation", "methods"):
        assert word in done.stdout
