"""A method that brings its own packages: an environment of its own, made once, whole or not at all."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness import environments
from harness.method import find_methods
from harness.paths import PROJECT, Paths
from harness.suite import Entry
from harness.values import ConfigError
from tests.faults import lab

COWSAY = "cowsay==6.1 --hash=sha256:274b1e6fc1b966d53976333eb90ac94cb07a450a700b455af9fbdf882244b30a\n"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A method that needs a small package which the project does not have."""
    paths = lab.make_paths(tmp_path, ["instant"])
    folder = paths.methods[0] / "instant"
    pinned = (PROJECT / "docker" / "requirements" / "cpu.txt").read_text()
    needed = [re.search(rf"^{name}==.*?(?=^\w|\Z)", pinned, re.MULTILINE | re.DOTALL).group() for name in ("numpy", "pyarrow")]
    (folder / "requirements.txt").write_text("".join(needed) + COWSAY)
    (folder / "run.py").write_text("import cowsay\n" + (folder / "run.py").read_text())
    lab.make_domain(paths)
    return paths


@pytest.mark.slow
def test_a_method_runs_with_packages_of_its_own(paths: Paths) -> None:
    if subprocess.run(
        ["pip", "download", "-q", "--no-deps", "-d", str(paths.results / "try"), "cowsay==6.1"], capture_output=True
    ).returncode:
        pytest.skip("no package registry can be reached")
    records = lab.carry_out(lab.make_fake_plan(paths, [Entry(method="instant", configs=("default",))], seconds=30), paths)
    assert records["default"].ok, records["default"].status
    method = find_methods(paths)["instant"]
    folder = environments.folder_of(method, paths)
    assert folder is not None
    marker = folder / "kept"
    marker.touch()
    assert environments.pythons([method], paths, print)["instant"] == folder / "bin" / "python"
    assert marker.exists(), "a whole environment is taken as it is"
    (folder / environments.STAMP).unlink()
    environments.pythons([method], paths, print)
    assert not marker.exists(), "a half-made one is made again"


def test_requirements_without_hashes_are_an_error_that_says_so(paths: Paths) -> None:
    method = find_methods(paths)["instant"]
    assert method.requirements is not None
    method.requirements.write_text("cowsay==6.1\n")
    with pytest.raises(ConfigError, match=r"requirements.txt.*hash") as error:
        environments.pythons([method], paths, print)
    assert "uv pip compile --generate-hashes" in str(error.value)


def test_other_requirements_are_another_environment(paths: Paths) -> None:
    method = find_methods(paths)["instant"]
    assert method.requirements is not None
    first = environments.folder_of(method, paths)
    method.requirements.write_text(method.requirements.read_text() + "# a word\n")
    assert environments.folder_of(method, paths) != first
    shutil.rmtree(paths.results, ignore_errors=True)
