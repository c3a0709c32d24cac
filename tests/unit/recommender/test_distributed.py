"""Two processes, started by torchrun, against one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from harness.contract import Job, read_meta, read_predictions
from tests.unit.recommender import small
from utgrec.recommender.run import recommend_with
from utgrec.recommender.settings import Settings

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--standalone")

PROGRAM = """
import os, sys
from harness.contract import Job
from tests.unit.recommender import small
from utgrec.recommender import run, settings, train

whole, failing = Job.read(sys.argv[1]), Job.read(sys.argv[2])


def work(job):
    run.recommend_with(job, small.ids_of(job.domain.n_items), settings.Settings.of(job.configuration)).write(job)


def fails(self):
    if self.step == 5 and self.processes.rank == 1:
        raise RuntimeError("no luck today")
    step(self)


work(whole)
step, train.Training.train_step = train.Training.train_step, fails
work(failing)
"""


@dataclass(frozen=True)
class Launched:
    one: Job
    two: Job
    failing: Job
    status: int
    output: str


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """One process in here; two by torchrun, which do the same, and then a job on which the second of them fails."""
    base = tmp_path_factory.mktemp("launched")
    domain = small.make_domain(base, users=61)  # odd: the shares of users differ
    rows = len(domain.training_rows()[1])
    batch = next(size for size in range(8, rows) if rows % size == 1)  # the last batch has one row: nothing for the second process
    configuration = small.TINY | {"dropout": 0.0, "keep_model": True, "clip": 0.5, "accumulate": 2, "batch": batch}
    one, two = (small.make_job(base / name, domain, configuration=configuration) for name in ("one", "two"))
    failing = small.make_job(base / "failing", domain, configuration=configuration | {"epochs": 100_000})
    failing.write(base / "failing.json")
    process = small.start(PROGRAM, two, *TORCHRUN, arguments=[str(base / "failing.json")])
    torch.set_num_threads(1)
    recommend_with(one, small.ids_of(domain.n_items), Settings.of(configuration)).write(one)
    output = small.finish(process)  # the failing job would take hours if nobody ended it
    return Launched(one, two, failing, process.returncode, output)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_processes_train_what_one_does(launched: Launched) -> None:
    jobs = launched.one, launched.two
    assert (launched.two.output / "meta.json").exists(), launched.output
    alone, together = (load_file(job.output / "model" / "model.safetensors") for job in jobs)
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name], rtol=0, atol=1e-5)
    curves = [small.curve(job) for job in jobs]
    assert curves[0].keys() == curves[1].keys()
    for step, point in curves[0].items():
        assert curves[1][step] == pytest.approx(point, rel=1e-5, abs=1e-5)
    metas = [read_meta(job.output / "meta.json") for job in jobs]
    assert [meta.extra["processes"] for meta in metas] == [1, 2]
    assert metas[0].steps == metas[1].steps
    domain = launched.one.domain
    for name in ("predictions.npz", "valid_predictions.npz"):  # each user ranked once, at its own place
        lists = [read_predictions(job.output / name, domain.n_users, domain.n_items, 10) for job in jobs]
        assert (lists[0] == lists[1]).mean() > 0.99
    lines = (launched.two.output / "progress.jsonl").read_text().splitlines()
    assert len(lines) == len(curves[1])  # one process writes


def test_a_process_that_fails_ends_all(launched: Launched) -> None:
    assert launched.status != 0
    assert "no luck today" in launched.output
    assert not (launched.failing.output / "meta.json").exists()
