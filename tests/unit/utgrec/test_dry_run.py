"""The dry run: it says what a run then does, and needs neither data nor weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.method import load_method
from harness.paths import PROJECT
from tests.unit.utgrec import small
from utgrec.dry_run import Counts, Plan, Request, make_plan
from utgrec.recommender.corpora import Corpus, Mixture
from utgrec.semantic_ids import SemanticIds

METHOD = load_method(PROJECT / "utgrec", PROJECT)


def planned(config: str, **changes: Any) -> Plan:
    """On the two simulated domains of these tests; the first is the target."""
    of = METHOD.config(config)
    counts = tuple(Counts(d.name, d.n_users, d.n_items, len(d.train.values)) for d in small.domains())
    stages = tuple(stage.name for stage in of.stages)
    request = Request("two domains", of.values, stages, counts[:1], counts, "cpu", 1, "fp32", None)
    return make_plan(dataclasses.replace(request, **changes))


def test_steps_are_those_of_the_real_training(tmp_path: Path) -> None:
    pretrain, pretrain_t5, adapt, fit = planned("tiny").work
    both = small.training(tmp_path, tokenizer_epochs=pretrain.epochs, tokenizer_batch=pretrain.batch)
    assert len(both.catalogue.train_X) <= pretrain.examples == len(both.catalogue)  # some items are in no training interaction
    assert both.total <= pretrain.steps <= both.total + pretrain.epochs
    domains = small.domains()
    assert [work.domains[0].name for work in (adapt, fit)] == [domains[0].name] * 2
    corpora = [Corpus(domain, some_ids(domain.n_items)) for domain in domains]
    for work, of in ((pretrain_t5, corpora), (fit, corpora[:1])):
        mixture = Mixture(of, user_tokens=1, temperature=1.0, batch=work.batch, seed=1)
        assert work.examples == int(mixture.sizes_D.sum())
        assert work.steps == work.epochs * mixture.steps_per_epoch


def some_ids(items: int) -> SemanticIds:
    return SemanticIds.of(np.stack(np.unravel_index(np.arange(items), (8, 8, 8)), 1), (8, 8, 8), (0, 1, 1))


def test_the_papers_size() -> None:
    """Against counts by hand: two tables of 151,661 x 1536 are most of what is trained; LoRA on 7 linear layers of each of 28 layers."""
    on_gpus = {"device": "cuda", "devices": 8, "precision": "bf16"}
    plan = planned("paper", **on_gpus, memory=80 << 30)
    tables = 2 * 151_661 * 1536
    lora = 28 * 8 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 2 * (1536 + 8960) + (8960 + 1536))
    assert 0 < plan.work[0].trained - tables - lora < 0.2 * tables  # decoders, MLP, codebooks
    assert [work.stage for work in plan.work] == ["pretrain_tokenizer", "pretrain_recommender", "adapt", "fit"]
    assert not plan.problem
    assert "Qwen2-VL-2B" in plan.assumed[0]
    assert "tokenizer_micro = " in planned("paper", **on_gpus, memory=24 << 30).problem


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        ("tiny_recommender_from_scratch", ["pretrain_tokenizer", "adapt", "fit"]),
        ("tiny_no_pretraining", ["adapt", "fit"]),
        ("tiny_not_adapted", ["pretrain_tokenizer", "pretrain_recommender", "fit"]),
    ],
)
def test_ablations_leave_their_stages_out(config: str, stages: list[str]) -> None:
    assert [work.stage for work in planned(config).work] == stages


# ---------------------------------------------------------------------------------------------------------- the command


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.cli", "dry-run", *words]
    environment = {"HARNESS_DATA": str(folder), "COLUMNS": "100", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)


def test_the_command_takes_published_counts_where_nothing_is_prepared(tmp_path: Path) -> None:
    done = run(tmp_path, "utgrec/text", "--memory", "4")
    assert done.returncode == 0, done.stderr
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in done.stdout.splitlines()}
    assert lines["fit", "musical_instruments"][0] == f"{511_836 - 3 * 57_439:,}"
    assert lines["adapt", "musical_instruments"][0] == "24,587"
    assert "tokenizer_micro = " in done.stdout
    assert "Published counts" in done.stdout


def test_the_command_counts_what_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "video_games" / "public").mkdir(parents=True)
    counts = {"users": 10, "items": 77, "interactions": 70, "train_interactions": 50}
    (tmp_path / "video_games" / "public" / "domain.json").write_text(json.dumps({"counts": counts}))
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in run(tmp_path, "utgrec/text").stdout.splitlines()}
    assert (lines["adapt", "video_games"][0], lines["fit", "video_games"][0]) == ("77", "40")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["utgrec/papr"], "'papr'"),
        (["utgrek/paper"], "'utgrek'"),
        (["popularity"], "popularity has no dry_run.py"),
        (["utgrec/tiny", "--suite", "smoke"], "neither prepared"),
    ],
)
def test_a_wrong_request_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    done = run(tmp_path, *words)
    assert done.returncode != 0
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
