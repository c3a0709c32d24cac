"""The stages end to end, saved tokenizers, ids, the commands for a user's own items, and what method.toml promises."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from harness.contract import ContractError, Job, read_meta, read_predictions
from harness.method import load_method
from harness.paths import PROJECT
from tests.unit.utgrec.small import RECOMMENDER, TINY, domains, job, training, weights
from utgrec import run
from utgrec.semantic_ids import SemanticIds
from utgrec.tokenizer import memory, saved
from utgrec.tokenizer.settings import Settings

CONFIGURATION: dict[str, Any] = {**TINY, **RECOMMENDER, "keep_model": True}


def whole_run(folder: Path, configuration: dict[str, Any], stages: tuple[str, ...] = tuple(run.STAGES)) -> dict[str, Job]:
    """Pre-trained on one simulated domain, adapted to the other."""
    target, other = domains()[:1], domains()[1:]
    done: dict[str, Job] = {}
    for stage in stages:
        inputs = {name: task.output for name, task in done.items()}
        done[stage] = job(folder, stage, configuration, other if stage.startswith("pretrain") else target, inputs=inputs)
        run.STAGES[stage](done[stage])
        read_meta(done[stage].output / "meta.json")
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return whole_run(tmp_path_factory.mktemp("run"), CONFIGURATION)


def test_a_run_ends_with_lists_for_everyone_and_says_what_it_did(finished: dict[str, Job]) -> None:
    target, job = domains()[0], finished["fit"]
    for name in ("predictions.npz", "valid_predictions.npz"):
        items = read_predictions(job.output / name, target.n_users, target.n_items)
        assert (items[:, : min(50, target.n_items)] >= 0).all()
    said = read_meta(job.output / "meta.json").extra
    assert said["codes"] == "8 x 8 x 8"
    assert said["books"] == "0, 1, 1"
    assert said["started_from"] == "saved weights"
    assert said["collision_rate"] >= 0
    assert {"usage_1", "items_moved", "tokenizer_started_from"} <= said.keys()
    assert said["tokenizer_started_from"] == "pre-trained tokenizer"


def test_ids_name_one_item_each(finished: dict[str, Job]) -> None:
    ids = SemanticIds.load(finished["adapt"].output / "ids.npz")
    assert ids.unique
    assert ids.n_items == domains()[0].n_items
    assert ids.books == (0, 1, 1)


def test_adaptation_moved_w_and_not_e(finished: dict[str, Job]) -> None:
    before = saved.load(finished["pretrain_tokenizer"].output / "tokenizer").state_dict()
    after = saved.load(finished["adapt"].output / "tokenizer").state_dict()
    assert all((before[name] == after[name]).all() for name in before if name.endswith("E_KD"))
    assert not any((before[name] == after[name]).all() for name in before if name.endswith("W_DD"))


@pytest.mark.parametrize(
    ("changes", "stages", "says"),
    [
        ({"adapt": "none"}, tuple(run.STAGES), {"tokenizer_adapt": "none", "tokenizer_stopped_by": "not trained"}),
        ({"adapt": "all"}, tuple(run.STAGES), {"tokenizer_adapt": "all"}),
        ({}, ("pretrain_tokenizer", "adapt", "fit"), {"started_from": "random weights", "tokenizer_started_from": "pre-trained tokenizer"}),
        ({}, ("adapt", "fit"), {"started_from": "random weights", "tokenizer_started_from": "random weights"}),
        ({"tree": False}, ("adapt", "fit"), {"books": "0, 1, 2"}),
        ({"align_weight": 0.0, "cooccurrence_weight": 0.0}, ("adapt", "fit"), {}),
        ({"use_pictures": False, "picture_decoder": False}, ("adapt", "fit"), {"vae": "none"}),
        ({"use_text": False, "text_decoder": False}, ("adapt", "fit"), {}),
        ({"book_kind": "ema"}, ("adapt", "fit"), {}),
        ({"book_kind": "vq", "cache_pictures": True}, ("adapt", "fit"), {}),
    ],
)
def test_every_ablation_runs(tmp_path: Path, changes: dict[str, Any], stages: tuple[str, ...], says: dict[str, Any]) -> None:
    done = whole_run(tmp_path, CONFIGURATION | changes, stages)
    said = read_meta(done["adapt"].output / "meta.json").extra | read_meta(done["fit"].output / "meta.json").extra
    assert {name: said[name] for name in says} == says


def test_the_same_seed_gives_the_same_ids(finished: dict[str, Job], tmp_path: Path) -> None:
    again = whole_run(tmp_path, CONFIGURATION, ("pretrain_tokenizer", "pretrain_recommender", "adapt"))
    ids = [SemanticIds.load(task["adapt"].output / "ids.npz") for task in (finished, again)]
    assert np.array_equal(ids[0].codes_IL, ids[1].codes_IL)


def test_encoding_goes_on_after_a_kill(finished: dict[str, Job], tmp_path: Path) -> None:
    """Blocks that are done are read, and only then: a block that was changed shows in the ids."""
    inputs = {name: finished[name].output for name in ("pretrain_tokenizer", "pretrain_recommender")}
    task = job(tmp_path, "adapt", CONFIGURATION | {"adapt": "none"}, domains()[:1], inputs=inputs)
    run.adapt(task)
    first = SemanticIds.load(task.output / "ids.npz").codes_IL
    (block,) = (task.cache / "codes").glob("*.npz")
    with np.load(block) as archive:
        codes, vectors = archive["codes"], archive["vectors"]
    np.savez(block, codes=(codes + 1) % 8, vectors=vectors)
    shutil.rmtree(task.output)
    task.output.mkdir()
    run.adapt(task)
    assert not np.array_equal(SemanticIds.load(task.output / "ids.npz").codes_IL, first)


# ------------------------------------------------------------------------------------------------- saved tokenizers


def test_a_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    trained = training(tmp_path / "training")
    trained.run()
    saved.save(tmp_path / "model", trained.model, {"trained_on": ["x"]})
    again = saved.load(tmp_path / "model")
    before, after = weights(trained), {name: value.numpy() for name, value in again.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    prompts = trained.catalogue.prompts(np.arange(20))
    codes = [model.eval().codes(model.encoder.collate(prompts))[0] for model in (trained.model, again)]
    assert np.array_equal(*codes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "no saved tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "no saved tokenizer"),
        (lambda folder: _edit(folder, schema=7), "schema 7"),
        (lambda folder: _edit(folder, latents=[3, 1]), "not the weights"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    saved.save(tmp_path, training(tmp_path / "training").model, {})
    change(tmp_path)
    with pytest.raises(ContractError, match=says):
        saved.load(tmp_path)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_settings_that_do_not_fit_the_weights_are_refused_by_name(tmp_path: Path) -> None:
    saved.save(tmp_path, training(tmp_path / "training").model, {})
    with pytest.raises(ContractError, match=r"its leaf is 8, this configuration's is 16"):
        saved.load(tmp_path, Settings.of(TINY | {"leaf": 16}))


# ------------------------------------------------------------------------------------------------------------ memory


def test_too_little_memory_is_an_error_with_what_would_fit(tmp_path: Path) -> None:
    trained = training(tmp_path)
    needed = memory.estimate(trained.model, trained.settings, trained.processes, "fp32", 40)
    assert needed.moments == 2 * needed.gradients == 8 * sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    memory.check(needed, trained.settings, trained.processes, needed.total)
    little = needed.total - needed.activations + needed.activations // 3
    with pytest.raises(ContractError, match=r"tokenizer_micro = 5 .*checkpointing = true"):
        memory.check(needed, trained.settings, trained.processes, little)
    with pytest.raises(ContractError, match="zero3"):
        memory.check(needed, trained.settings, trained.processes, needed.weights // 2)


def test_smaller_parts_and_checkpointing_need_less(tmp_path: Path) -> None:
    trained = training(tmp_path)
    estimates = [
        memory.estimate(trained.model, Settings.of(TINY | changes), trained.processes, "fp32", 40).activations
        for changes in ({}, {"tokenizer_micro": 4}, {"checkpointing": True})
    ]
    assert estimates[1] < estimates[0] / 3
    assert estimates[2] < estimates[0]


# ---------------------------------------------------------------------------------------------- a user's own items


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "utgrec", *words], cwd=folder, env={"PYTHONPATH": str(PROJECT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_tokenize_and_recommend(finished: dict[str, Job], tmp_path: Path) -> None:
    texts = [f"Everly Oak Strap number {n}, timber look" for n in range(30)]
    table = pd.DataFrame({"item_id": [f"i{n}" for n in range(30)], "title": texts, "description": [["two", "parts"]] * 30})
    table.to_parquet(tmp_path / "items.parquet")
    said = command(tmp_path, "tokenize", "items.parquet", "--tokenizer", str(finished["adapt"].output / "tokenizer"))
    assert said.returncode == 0, said.stderr
    ids = pq.read_table(tmp_path / "ids.parquet")
    assert ids["item_id"].to_pylist() == table["item_id"].tolist()
    assert len(set(map(tuple, ids["codes"].to_pylist()))) == 30
    users = pd.DataFrame({"user_id": ["a", "b"], "item_ids": [["i1", "i2"], ["i3"]]})
    users.to_json(tmp_path / "histories.jsonl", orient="records", lines=True)
    model = str(finished["fit"].output / "model")
    said = command(tmp_path, "recommend", "histories.jsonl", "--ids", "ids.parquet", "--model", model, "--k", "5")
    assert said.returncode == 0, said.stderr
    lists = pd.read_parquet(tmp_path / "lists.parquet")
    assert lists["user_id"].tolist() == ["a", "b"]
    assert all(len(set(items)) == 5 for items in lists["item_ids"])
    assert all(np.diff(scores).max() <= 0 for scores in lists["scores"])

    users.loc[1, "item_ids"][0] = "unknown"
    users.to_json(tmp_path / "histories.jsonl", orient="records", lines=True)
    said = command(tmp_path, "recommend", "histories.jsonl", "--ids", "ids.parquet", "--model", model)
    assert said.returncode != 0
    assert "user b has item 'unknown'" in said.stderr
    said = command(tmp_path, "tokenize", "histories.jsonl", "--tokenizer", model)
    assert "no column 'item_id'" in said.stderr


# ------------------------------------------------------------------------------------------------------- method.toml


def test_stages_name_the_keys_that_decide_them() -> None:
    stages = tomllib.loads((PROJECT / "utgrec" / "method.toml").read_text())["stages"]
    assert {stage["name"]: tuple(stage["uses"]) for stage in stages if "uses" in stage} == run.STAGE_KEYS


def test_every_configuration_is_valid() -> None:
    method = load_method(PROJECT / "utgrec", PROJECT)
    for config in method.configs.values():
        tokenizer, rest = run.Settings.take(config.values)
        recommender, rest = run.RecommenderSettings.take(rest)
        _, rest = run.Pretraining.take(rest)
        assert not rest, config.name
        assert tokenizer.widths
        assert recommender.beams == 50
    paper = run.Settings.take(method.config("paper").values)[0]
    assert (paper.picture_weight, paper.code_weight, paper.align_weight, paper.cooccurrence_weight) == (5, 200, 0.01, 0.03)
