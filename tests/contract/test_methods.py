"""Every method that is found keeps the contract: the same checks as `harness check NAME`, leak tests included."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from harness.commands.check import CheckFailed, _Nobody, check_imports, check_method
from harness.method import find_methods, load_method
from harness.paths import PROJECT, Paths
from tests.faults import lab

METHODS = sorted(find_methods(Paths.default(), broken={}))
SLOW_TO_CHECK = {name for name in METHODS if name not in ("popularity", "last_item")}


def check(name: str, **options: bool) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    status = check_method(name, options.get("config"), options.get("quick", False), console)
    return status, console.file.getvalue()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_CHECK else name for name in METHODS])
def test_a_method_of_the_project_keeps_the_contract(name: str) -> None:
    status, said = check(name)
    assert status == 0, said


def test_a_method_that_is_not_deterministic_is_caught() -> None:
    status, said = check(str(lab.FAKES / "faulty"), config="not_deterministic", quick=True)
    assert status == 1 and "differ between two runs with one seed" in said
    assert "better than random" in said


def test_a_method_that_trains_on_validation_items_is_caught() -> None:
    status, said = check(str(lab.FAKES / "peeks"))
    assert status == 1
    failed = [line for line in said.splitlines() if "FAILS" in line]
    assert len(failed) == 2 and all("validation items" in line for line in failed), said  # under both protocols
    assert "time-v1" in failed[1]


def test_pre_training_is_cut_as_the_targets_are_and_done_once_for_the_canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = 'protocols = ["loo-v1", "time-v1"]\n[[stages]]\nname = "learn"\nscope = "pretrain"\n[[stages]]\nname = "fit"\n'
    folder = write_method(tmp_path / "transfers", stages, TRANSFERS)
    ran: list[tuple[str, str]] = []
    monkeypatch.setattr(_Nobody, "stage_started", lambda _, run, stage, folder: ran.append((stage.name, run.domain)))
    status, said = check(str(folder))
    assert status == 0, said
    assert said.count("does not see the test targets") == 2
    fitted = [domain for stage, domain in ran if stage == "fit"]
    assert len(fitted) == 8 and len(set(fitted)) == 6  # first, second and hurried on one domain, then five canaries
    # Anew for each of the first three, for none of the canaries under loo-v1, and once for those under time-v1.
    assert [stage for stage, _ in ran].count("learn") == 4


TRANSFERS = """
import json
from harness.contract import Domain, Meta, main, write_predictions
import numpy as np

def learn(job):
    (reference,) = job.domains
    domain = Domain.read(reference.path)
    (job.output / "learnt.json").write_text(json.dumps({"protocol": domain.protocol, "interactions": len(domain.train.values)}))

def fit(job):
    learnt = json.loads((job.inputs["learn"] / "learnt.json").read_text())
    assert learnt["protocol"] == job.domain.protocol and learnt["interactions"] > 100, learnt
    list_K = job.domain.popular(job.k)
    write_predictions(job, np.broadcast_to(list_K, (len(job.domain.test_users), job.k)))
    write_predictions(job, np.broadcast_to(list_K, (len(job.domain.valid_users), job.k)), valid=True)
    Meta(timings={"fit": 0.0}, stopped_by="closed form").write(job)

if __name__ == "__main__":
    main(lambda job: {"learn": learn, "fit": fit}[job.stage](job))
"""


def write_method(folder: Path, more: str, program: str) -> Path:
    folder.mkdir()
    (folder / "method.toml").write_text(f'name = "{folder.name}"\ntitle = "M"\nlineage = "trivial"\n{more}[configs.default]\n')
    (folder / "run.py").write_text(program)
    return folder


def test_a_method_that_would_not_be_found_is_told_so(tmp_path: Path) -> None:
    """One that learns nothing stays below the bound of every leak test, whatever it trains on."""
    program = (PROJECT / "baselines" / "popularity" / "run.py").read_text().replace("domain.popular(job.k)", "np.arange(job.k)")
    status, said = check(str(write_method(tmp_path / "dull", "", program)))
    assert status == 1
    told = next(line for line in said.splitlines() if "could be found" in line)
    assert "FAILS" in told and "does not learn what training shows here" in told
    assert "holds  does not train on validation items" in said


def test_a_failing_method_is_reported_with_its_log() -> None:
    status, said = check(str(lab.FAKES / "faulty"), config="crashes", quick=True)
    assert status == 1 and "broken on purpose" in said


def test_an_undeclared_import_is_caught(tmp_path: Path) -> None:
    folder = write_method(tmp_path / "greedy", "", "from harness.contract import main\nfrom harness.data import simulate\n")
    with pytest.raises(CheckFailed, match=r"run.py:2 imports harness.data"):
        check_imports(load_method(folder, PROJECT), PROJECT)
    (folder / "run.py").write_text("import utgrec.semantic_ids\n")
    with pytest.raises(CheckFailed, match="declare it"):
        check_imports(load_method(folder, PROJECT), PROJECT)


def test_no_module_of_the_harness_imports_torch() -> None:
    for path in (PROJECT / "harness").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(name.split(".")[0] == "torch" for name in names), path
