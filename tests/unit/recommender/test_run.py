"""From semantic ids to predictions: what a method gets from ``recommend_with``, and pre-training on several domains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness.contract import ContractError, Domain, Job, Meta, read_meta, read_predictions
from tests.unit.baselines.running import markov_histories, write_domain
from tests.unit.recommender import small
from utgrec.recommender.corpora import Corpus
from utgrec.recommender.run import pretrain_with, recommend_with
from utgrec.recommender.settings import Settings
from utgrec.semantic_ids import Keep, SemanticIds

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""The curve's file stays open for the life of a process, and this process sees many runs."""


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return small.make_domain(tmp_path_factory.mktemp("domain"))


def run(job: Job, ids: SemanticIds | None = None, **changes: Any) -> Meta:
    """What a method does after its tokenizer."""
    keywords = {name: changes.pop(name) for name in ("init", "extra") if name in changes}
    meta = recommend_with(job, ids or small.ids_of(job.domain.n_items), Settings.of(small.TINY | changes), **keywords)
    meta.write(job)
    return read_meta(job.output / "meta.json")


def lists(job: Job, name: str = "predictions.npz") -> np.ndarray:
    return read_predictions(job.output / name, job.domain.n_users, job.domain.n_items, job.k)


def test_from_ids_to_predictions(tmp_path: Path) -> None:
    users, items = 150, 20
    targets = write_domain(tmp_path / "public", markov_histories(users, items, length=(6, 14)), items)
    job = small.make_job(tmp_path / "job", Domain.read(tmp_path / "public"))
    meta = run(job, small.ids_of(items, width=20), extra={"encoder": "none"}, epochs=10, batch=64, learning_rate=0.02, dropout=0.0)
    recall = (lists(job)[:, :10] == targets[:, None]).any(1).mean()
    assert recall > 0.65  # chance is 10 of 20
    valid = (lists(job, "valid_predictions.npz")[:, :10] == job.domain.valid[:, None]).any(1).mean()
    assert valid > 0.65
    assert sorted(path.name for path in job.output.iterdir()) == ["meta.json", "predictions.npz", "progress.jsonl", "valid_predictions.npz"]
    assert meta.stopped_by == "epochs"
    assert meta.best_valid is not None
    assert meta.best_valid > 0.2
    assert meta.steps == 10 * -(-len(job.domain.training_rows()[1]) // 64)
    assert set(meta.timings) == {"fit", "predict", "predict_valid"}
    assert meta.parameters is not None
    assert meta.parameters > 63 * 16
    expected = {
        "encoder": "none", "codes": "20 x 20 x 20", "books": "0, 1, 2", "vocabulary": 2 + 1 + 60, "constrained": True, "sampling": False,
        "beams": 50, "beams_valid": 50, "beams_while_training": 10, "history": 20, "user_tokens": 1, "sliding_window": True,
        "schedule": "cosine, peak 0.02 over 10 epochs to 0, 0 steps of warm-up", "checkpoint_metric": "NDCG@10 of all users, beam 10",
        "started_from": "random weights", "invalid_share_at_10": 0.0, "compiled": False, "processes": 1,
    }  # fmt: skip
    assert meta.extra == expected


def test_free_decoding_reports_its_invalid_share(tmp_path: Path, domain: Domain) -> None:
    job = small.make_job(tmp_path, domain)
    meta = run(job, epochs=3, constrained=False)
    share = float((lists(job)[:, :10] < 0).mean())
    assert 0 < share < 1
    assert meta.extra["invalid_share_at_10"] == pytest.approx(share)
    assert meta.extra["constrained"] is False


def test_the_report_of_the_ids_is_in_the_record_and_shared_tuples_are_ranked(tmp_path: Path, domain: Domain) -> None:
    ids = Keep().repair(SemanticIds.of(small.ids_of(domain.n_items).codes_IL // 2))
    assert not ids.unique
    job = small.make_job(tmp_path, domain)
    meta = run(job, ids, epochs=1)
    assert meta.extra["repair"] == "none"
    assert meta.extra["collision_rate"] == ids.collisions.rate > 0
    assert (lists(job) >= 0).all()


def test_same_seed_same_lists_other_seed_other_lists(tmp_path: Path, domain: Domain) -> None:
    jobs = [small.make_job(tmp_path / str(n), domain, seed=seed) for n, seed in enumerate((1, 1, 2))]
    metas = [run(job, epochs=2) for job in jobs]
    first, second, other = map(lists, jobs)
    assert np.array_equal(first, second)
    assert metas[0].best_valid == metas[1].best_valid != metas[2].best_valid
    assert not np.array_equal(first, other)


def test_a_model_of_several_domains_is_fine_tuned_on_another(tmp_path: Path, domain: Domain) -> None:
    other, target = (small.make_domain(tmp_path / str(n), items=30, seed=n, name=f"domain{n}") for n in (1, 2))
    corpora = [Corpus(domain, small.ids_of(40)), Corpus(other, small.ids_of(30, seed=1))]
    job = small.make_job(tmp_path / "pretrain", domain, other)
    meta = pretrain_with(job, corpora, Settings.of(small.TINY | {"temperature": 3.0, "epochs": 2}))
    rows = [len(corpus.domain.training_rows()[1]) for corpus in corpora]
    assert meta.extra["rows_an_epoch_small"] + meta.extra["rows_an_epoch_domain1"] == sum(rows)
    assert meta.extra["temperature"] == 3.0
    assert not (job.output / "predictions.npz").exists()

    model = job.output / "model"
    tuned = small.make_job(tmp_path / "tuned", target)
    meta = run(tuned, init=model, epochs=1, learning_rate=1e-12, weight_decay=0, keep_model=True, dropout=0.3)
    assert meta.extra["started_from"] == "saved weights"
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tuned.output / "model"))
    assert before.keys() == after.keys()
    for name, value in before.items():  # with next to no learning rate: the saved weights, and not others
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-9)
    assert json.loads((tuned.output / "model" / "config.json").read_text())["widths"] == [4, 4, 4]


def test_saved_weights_that_do_not_fit(tmp_path: Path, domain: Domain) -> None:
    job = small.make_job(tmp_path / "first", domain)
    run(job, epochs=1, keep_model=True)
    model = job.output / "model"
    again = small.make_job(tmp_path / "again", domain)
    with pytest.raises(ContractError, match=r"config.json: its vocabulary is 15, this model's is 18; use weights and ids that fit"):
        run(again, small.ids_of(domain.n_items, width=5), init=model)
    with pytest.raises(ContractError, match=r"its d_ff is 32, this model's is 64"):
        run(again, init=model, d_ff=64)
    shared = SemanticIds.of(small.ids_of(domain.n_items).codes_IL, (4, 4, 4), (0, 1, 1))  # other tokens, for shared books
    with pytest.raises(ContractError, match=r"its vocabulary is 15, this model's is 11"):
        run(again, shared, init=model)
    with pytest.raises(ContractError, match="nowhere: no saved model"):
        run(again, init=tmp_path / "nowhere")
    (model / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ContractError, match="no saved model"):
        run(again, init=model)


def test_bad_input(tmp_path: Path, domain: Domain) -> None:
    job = small.make_job(tmp_path, domain)
    with pytest.raises(ContractError, match="beams = 9: the job wants lists of 10; use 10 beams or more"):
        run(job, beams=9)
    with pytest.raises(ContractError, match="small has 40 items, these semantic ids are of 41"):
        run(job, small.ids_of(41))
    several = dataclasses.replace(job, domains=job.domains * 2)
    with pytest.raises(ContractError, match="has 2 domains"):
        run(several)
