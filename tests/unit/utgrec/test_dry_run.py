"""The dry run: it says what a run then does, and needs neither data nor weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.paths import PROJECT, Paths
from harness.values import ConfigError
from tests.unit.utgrec import small
from utgrec import dry_run
from utgrec.recommender.corpora import Corpus, Mixture
from utgrec.semantic_ids import SemanticIds


def prepared() -> Paths:
    """Where the two simulated domains of these tests lie."""
    root = small.domains()[0].path.parent.parent
    return Paths(PROJECT, root, root / "results", ())


def suite(folder: Path) -> str:
    names = [domain.name for domain in small.domains()]
    text = f"""name = "two"\ntitle = "Two"\ndomains = ["{names[0]}"]\npretrain = {names!r}\nseeds = 1\n[budget]\nseconds = 60\n
[[run]]\nmethod = "utgrec"\nconfigs = ["tiny"]\n"""
    file = folder / "two.toml"
    file.write_text(text.replace("'", '"'))
    return str(file)


def test_steps_are_those_of_the_real_training(tmp_path: Path) -> None:
    plan = dry_run.make_plan("tiny", suite(tmp_path), device="cpu", paths=prepared())
    pretrain, pretrain_t5, adapt, fit = plan.work
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


def test_the_papers_size(tmp_path: Path) -> None:
    """Against counts by hand: two tables of 151,661 x 1536 are most of what is trained; LoRA on 7 linear layers of each of 28 layers."""
    plan = dry_run.make_plan("paper", "amazon2023", device="cuda", world=8, memory_gib=80, paths=prepared())
    tables = 2 * 151_661 * 1536
    lora = 28 * 8 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 2 * (1536 + 8960) + (8960 + 1536))
    assert 0 < plan.work[0].trained - tables - lora < 0.2 * tables  # decoders, MLP, codebooks
    assert [work.stage for work in plan.work] == ["pretrain_tokenizer", "pretrain_recommender", *["adapt", "fit"] * 4]
    assert plan.work[0].examples == sum(counts.items for counts in plan.work[0].domains)
    assert plan.work[3].examples == 511_836 - 3 * 57_439  # Musical_Instruments, all published
    assert not plan.problem
    assert any("Qwen2-VL-2B" in line for line in plan.assumed)
    less = dry_run.make_plan("paper", "amazon2023", device="cuda", memory_gib=24, paths=prepared())
    assert "tokenizer_micro = " in less.problem


def test_ablations_leave_their_stages_out(tmp_path: Path) -> None:
    scratch, none = (
        dry_run.make_plan(name, suite(tmp_path), device="cpu", paths=prepared())
        for name in ("tiny_recommender_from_scratch", "tiny_no_pretraining")
    )
    assert [work.stage for work in scratch.work] == ["pretrain_tokenizer", "adapt", "fit"]
    assert [work.stage for work in none.work] == ["adapt", "fit"]
    kept = dry_run.make_plan("tiny_not_adapted", suite(tmp_path), device="cpu", paths=prepared())
    assert [work.stage for work in kept.work] == ["pretrain_tokenizer", "pretrain_recommender", "fit"]


def test_an_unknown_domain_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sim_\w+.*neither prepared"):
        dry_run.make_plan("tiny", "smoke", device="cpu", paths=Paths(PROJECT, tmp_path, tmp_path, ()))


def test_the_command(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "utgrec", "dry-run", *words], cwd=PROJECT, capture_output=True, text=True)

    done = run("text", "--memory", "4")
    assert done.returncode == 0, done.stderr
    assert "pretrain_recommender" in done.stdout
    assert "tokenizer_micro = " in done.stdout
    wrong = run("papr")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("utgrec: ")
    assert "papr" in wrong.stderr
    assert "Traceback" not in wrong.stderr
