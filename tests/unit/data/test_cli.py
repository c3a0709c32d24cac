"""`harness data`: the verbs as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from harness.data.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def _pages_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_RESULTS", str(tmp_path / "results"))


def call(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_import_list_card_verify(tmp_path, lists, writers):
    folder = writers["s3rec"](tmp_path / "my-lists", lists)
    root = ("--root", tmp_path / "domains")
    assert "written my_lists: 700 users" in call("import", folder, *root)
    assert "there already" in call("import", folder, *root)
    assert "my_lists" in call("list", *root)
    assert "targets without training interaction" in call("card", "my_lists", *root)
    assert json.loads(call("card", "my_lists", "--json", *root))["counts"]["users"] == 700
    assert "complete and unchanged" in call("verify", "my_lists", *root)
    (folder / "x.txt").write_text("a 1 2 3\n")
    assert "--replace" in call("import", folder, *root, code=2)
    assert "written my_lists: 1 users" in call("import", folder, "--replace", *root)


def test_export_and_import_again(tmp_path):
    root = ("--root", tmp_path / "domains")
    call("simulate", "--category", "Software", "--users", 60, "--items", 50, *root)
    output = call("export", "sim_software", "utgrec", tmp_path / "out", *root)
    assert "written" in output
    assert "all_item_seqs.json" in output
    assert "not carried by utgrec: the parts of the text" in output
    assert "written again: 60 users, 50 items" in call("import", tmp_path / "out", "again", *root)
    assert "SIMULATED" in call("card", "again", *root)
    assert "is there already" in call("export", "sim_software", "utgrec", tmp_path / "out", *root, code=2)
    assert "did you mean 'lcrec'" in call("export", "sim_software", "lcreck", tmp_path / "new", *root, code=2)
    help_text = call("export", "--help")
    assert "test targets" in help_text


def test_simulate_and_prepare(tmp_path, monkeypatch):
    sizes = ("--users", 60, "--items", 50, "--root", tmp_path / "domains")
    output = call("simulate", "--category", "Software", "--raw", tmp_path / "raw", *sizes)
    assert "written sim_software: 60 users, 50 items" in output
    assert "SIMULATED" in call("list", "--root", tmp_path / "domains")
    output = call("prepare", tmp_path / "raw", "Software", "--root", tmp_path / "domains", code=2)
    assert "users: 60, expected 146,350 to 146,449" in output  # it is not the real one, and does not become it
    assert not (tmp_path / "domains" / "software").exists()
    monkeypatch.setenv("HARNESS_CARDS", str(tmp_path / "none"))
    output = call("prepare", tmp_path / "raw", "Software", "--route", "both", "--root", tmp_path / "domains")
    assert "written software: 60 users, 50 items" in output
    assert "repeated items" in output


def test_a_name_with_a_card_is_compared(tmp_path, lists, writers):
    output = call("import", writers["s3rec"](tmp_path / "x", lists), "beauty2014", "--root", tmp_path)
    assert "users: 700, expected 22,363" in output
    assert "expected 22,363" in call("card", "beauty2014", "--root", tmp_path)


@pytest.mark.parametrize("verb", ["card", "verify"])
def test_an_unknown_domain_is_one_line(tmp_path, verb):
    output = call(verb, "nothing", "--root", tmp_path, code=2)
    assert "not a domain" in output
    assert "Traceback" not in output


def test_reading_domains_imports_nothing_heavy(tmp_path, source):
    from harness.data.domain import write_domain

    folder = write_domain(tmp_path / "d", source).path
    code = (
        "import sys, harness.data.cli\n"
        "from pathlib import Path\n"
        "from harness.contract import Domain\n"
        "from harness.data.domain import list_domains, read_private\n"
        f"folder = Path({str(folder)!r}); list_domains(folder.parent); read_private(folder); Domain.read(folder / 'public').texts\n"
        "heavy = {'torch', 'polars', 'pandas', 'scipy', 'PIL', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
