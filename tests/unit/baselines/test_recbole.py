"""RecBole's models as programs under the contract."""

from __future__ import annotations

import tomllib
from typing import Any

import numpy as np
import pytest

from tests.unit.baselines.running import BASELINES, Outcome, Runner, SmallDomain, load_configuration

CHANCE = 10 / 120  # recall@10 of a random list on the small domain
CONFIGS = sorted(tomllib.loads((BASELINES / "recbole" / "method.toml").read_text())["configs"])


def small(name: str, **changes: Any) -> dict[str, Any]:
    """A configuration shrunk for the small domain."""
    values = load_configuration("recbole", name)
    values |= {"epochs": 10, "train_batch_size": 64, "learning_rate": 0.005}
    for key in ("hidden_size", "embedding_size", "inner_size"):
        if key in values:
            values[key] = 32
    return {**values, **changes}


def run(runner: Runner, domain: SmallDomain, configuration: dict[str, Any]) -> Outcome:
    """One run with all stages of its model."""
    if configuration["model"] != "S3Rec":
        return runner.run("recbole", domain, configuration)
    job, job_file = runner.job("recbole", domain.path, {**configuration, "pretrain_epochs": 3}, stage="pretrain_s3")
    runner.wait(runner.start(job, job_file), job_file)
    assert sorted(path.name for path in job.output.iterdir()) == ["meta.json", "pretrained.pth", "progress.jsonl"]
    return runner.run("recbole", domain, configuration, inputs={"pretrain_s3": job.output})


@pytest.mark.slow
def test_sasrec_learns_and_repeats_itself(small_domain: SmallDomain, runner: Runner) -> None:
    configuration = small("sasrec_ce", hidden_dropout_prob=0.1, attn_dropout_prob=0.1)
    first, second = (runner.run("recbole", small_domain, configuration) for _ in range(2))
    assert np.array_equal(first.items, second.items)
    assert np.array_equal(first.valid_items, second.valid_items)
    assert small_domain.recall_at_10(first.items) > 3 * CHANCE
    assert first.meta.best_valid is not None
    assert first.meta.best_valid > 0.1
    assert first.meta.stopped_by in ("epochs", "patience")
    assert (first.output / "progress.jsonl").read_text().count("valid_ndcg_at_10") == first.meta.epochs
    assert sorted(p.name for p in first.output.iterdir()) == ["meta.json", "predictions.npz", "progress.jsonl", "valid_predictions.npz"]


@pytest.mark.slow
def test_s3rec_starts_from_its_pretraining(small_domain: SmallDomain, runner: Runner) -> None:
    outcome = run(runner, small_domain, small("s3rec", hidden_dropout_prob=0.1, attn_dropout_prob=0.1))
    assert small_domain.recall_at_10(outcome.items) > 3 * CHANCE


@pytest.mark.slow
def test_every_configuration_runs(small_domain: SmallDomain, runner: Runner) -> None:
    jobs = {}
    for name in CONFIGS:
        configuration, inputs = small(name, epochs=2, pretrain_epochs=2), {}
        if configuration["model"] == "S3Rec":
            jobs["pretraining"] = runner.job("recbole", small_domain.path, configuration, stage="pretrain_s3")
            inputs = {"pretrain_s3": jobs["pretraining"][0].output}
        else:
            del configuration["pretrain_epochs"]
        jobs[name] = runner.job("recbole", small_domain.path, configuration, inputs=inputs)
    first_file = next(iter(jobs.values()))[1]
    runner.wait(runner.start_many(list(jobs.values())), first_file)
    del jobs["pretraining"]
    assert len(jobs) >= 13
    for name, (job, _) in jobs.items():
        outcome = runner.outcome(job, small_domain)
        assert (outcome.items >= 0).all(), name
        assert outcome.meta.epochs == 2, name


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_lists(small_domain: SmallDomain, runner: Runner) -> None:
    """SASRec with BCE: its negatives come from numpy's generator, its dropout from torch's, its order from the loader's."""
    configuration = small("sasrec_bce", epochs=20)
    whole = runner.run("recbole", small_domain, configuration)
    job, job_file = runner.job("recbole", small_domain.path, configuration)
    cut = runner.cut(job, job_file, small_domain)
    assert np.array_equal(whole.items, cut.items)
    assert whole.meta.best_valid == cut.meta.best_valid
    assert (whole.meta.epochs, whole.meta.steps) == (cut.meta.epochs, cut.meta.steps)


@pytest.mark.slow
def test_the_budget_ends_training(small_domain: SmallDomain, runner: Runner) -> None:
    outcome = runner.run("recbole", small_domain, small("sasrec_ce", epochs=100_000, learning_rate=1e-6), budget=runner.budget(seconds=8))
    assert outcome.meta.stopped_by in ("budget", "patience")
    assert outcome.meta.timings["fit"] < 12


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), [({"hiden_size": 3}, "'hidden_size'?"), ({"MAX_ITEM_LIST_LENGTH": 50}, "use 1..20")])
def test_a_wrong_key_or_value_is_named(change: dict[str, Any], message: str, small_domain: SmallDomain, runner: Runner) -> None:
    job, job_file = runner.job("recbole", small_domain.path, small("sasrec_ce", **change))
    assert runner.start(job, job_file).wait(timeout=120) == 1
    assert message in job_file.with_name("log").read_text()
