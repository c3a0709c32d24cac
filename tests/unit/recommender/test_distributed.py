"""Two processes, started by torchrun, against one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.contract import Domain, Job, read_meta, read_predictions
from tests.unit.recommender import small
from utgrec.recommender.run import recommend_with
from utgrec.recommender.settings import Settings

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--standalone")

CONFIGURATION = small.TINY | {"dropout": 0.0, "epochs": 3, "keep_model": True, "clip": 0.5, "accumulate": 2, "valid_beams": 20, "beams": 20}

FAILING = """
import os
from utgrec.recommender import train

step = train.Training.train_step

def failing(self):
    if self.step == 5 and self.processes.rank == 1:
        raise RuntimeError("no luck today")
    step(self)

train.Training.train_step = failing
"""


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return small.make_domain(tmp_path_factory.mktemp("domain"), users=61)  # odd: the shares of users differ


def rows(domain: Domain) -> int:
    return len(domain.training_rows()[1])


def finish(job: Job, process) -> str:
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out
    return out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_processes_train_what_one_does(tmp_path: Path, domain: Domain) -> None:
    n_rows = rows(domain)
    batch = next(size for size in range(8, n_rows) if n_rows % size == 1)  # the last batch has one row: nothing for the second process
    configuration = CONFIGURATION | {"batch": batch}
    one, two = (small.make_job(tmp_path / name, domain, configuration=configuration) for name in ("one", "two"))
    process = small.start(small.PROGRAM, two, *TORCHRUN)
    torch.set_num_threads(1)
    recommend_with(one, small.ids_of(domain.n_items), Settings.of(configuration)).write(one)
    finish(two, process)

    alone, together = (load_file(job.output / "model" / "model.safetensors") for job in (one, two))
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name], rtol=0, atol=1e-5)
    curves = small.curve(one), small.curve(two)
    assert curves[0].keys() == curves[1].keys()
    for step, point in curves[0].items():
        assert curves[1][step] == pytest.approx(point, rel=1e-5, abs=1e-5)
    metas = [read_meta(job.output / "meta.json") for job in (one, two)]
    assert [meta.extra["processes"] for meta in metas] == [1, 2]
    assert metas[0].steps == metas[1].steps
    for name in ("predictions.npz", "valid_predictions.npz"):  # each user ranked once, at its own place
        lists = [read_predictions(job.output / name, domain.n_users, domain.n_items, 10) for job in (one, two)]
        assert (lists[0] == lists[1]).mean() > 0.99
    lines = (two.output / "progress.jsonl").read_text().splitlines()
    assert len(lines) == len(curves[1])  # one process writes


def test_a_process_that_fails_ends_all(tmp_path: Path, domain: Domain) -> None:
    job = small.make_job(tmp_path, domain, configuration=CONFIGURATION | {"epochs": 10_000})
    start = time.monotonic()
    process = small.start(FAILING + small.PROGRAM, job, *TORCHRUN)
    out = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert "no luck today" in out
    assert time.monotonic() - start < 100
    assert not (job.output / "meta.json").exists()
