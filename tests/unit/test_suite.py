"""Suites and plans: what enters the fit key, what does not, and errors that name the mend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness import provenance
from harness.data.domain import write_domain
from harness.data.source import SourceDomain, ragged
from harness.data.split import Cuts
from harness.method import find_methods
from harness.paths import Paths
from harness.runspec import Plan
from harness.suite import BudgetFile, Entry, Suite, load_suite, make_plan
from harness.values import ConfigError
from tests.faults import lab


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = lab.make_paths(tmp_path, ["slow"])
    lab.make_domain(paths)
    lab.make_domain(paths, "other", seed=2)
    return paths


def plan(paths: Paths, environment: dict[str, str] | None = None, device: str = "cpu", **changes: object) -> Plan:
    values: dict = dict(
        name="s", title="S", domains=("small",), seeds=1, budget=BudgetFile(seconds=5), run=(Entry(method="slow", configs=("a",)),)
    )
    methods = find_methods(paths)
    digests = environment or provenance.environment_digests(tuple(methods.values()), provenance.environment())
    return make_plan(Suite(**(values | changes)), paths, methods, digests, device)


def key(made: Plan, index: int = 0) -> str:
    return made.runs[index].fit_key


def test_a_plan_is_the_product_of_its_axes(paths: Paths) -> None:
    made = plan(paths, domains=("small", "other"), seeds=3, run=(Entry(method="slow", configs=("a", "b")),))
    assert len(made.runs) == 2 * 2 * 3 == len({run.id for run in made.runs}) == len({run.fit_key for run in made.runs})
    assert [run.seed for run in made.runs[:3]] == [1, 2, 3]


def make_timed(paths: Paths, name: str = "timed") -> None:
    """Forty users whose last two items are one in the window and one after the test cut."""
    source = SourceDomain([f"u{u}" for u in range(40)], ragged([[u % 9, 9, 10, 11] for u in range(40)]), [f"i{i}" for i in range(12)])
    write_domain(paths.domain(name), replace(source, times=np.array([1, 2, 11, 21] * 40)), cuts=Cuts(10, 20))


def test_domains_of_two_protocols_are_never_planned_together(paths: Paths) -> None:
    make_timed(paths)
    with pytest.raises(ConfigError, match=r"domain 'timed' was prepared under the protocol time-v1, and the suite's is loo-v1.*suite of"):
        plan(paths, domains=("small", "timed"))
    with pytest.raises(ConfigError, match=r"domain 'small' .* loo-v1, and the suite's is time-v1.*prepare RAW CATEGORY --protocol time-v1"):
        plan(paths, domains=("timed", "small"), protocol="time-v1")


def test_a_method_that_does_not_know_the_protocol_is_skipped_with_the_reason(paths: Paths) -> None:
    make_timed(paths)
    made = plan(paths, domains=("timed",), protocol="time-v1")
    assert made.protocol == "time-v1"
    assert made.runs[0].missing == "cannot be run under time-v1; its method.toml says protocols = ['loo-v1']"
    file = paths.methods[0] / "slow" / "method.toml"
    file.write_text(file.read_text().replace('lineage = "trivial"', 'lineage = "trivial"\nprotocols = ["loo-v1", "time-v1"]'))
    assert plan(paths, domains=("timed",), protocol="time-v1").runs[0].missing == ""
    # saying so does not force what is trained under the other protocol to be trained again
    before = key(plan(paths))
    file.write_text(file.read_text().replace('protocols = ["loo-v1", "time-v1"]\n', ""))
    assert key(plan(paths)) == before


def test_an_unknown_protocol_of_a_suite_is_an_error() -> None:
    with pytest.raises(ValueError, match="protocol"):
        Suite(
            name="s", title="S", domains=("d",), seeds=1, budget=BudgetFile(seconds=5), run=(Entry(method="m", configs=("a",)),),
            protocol="time-v2",  # type: ignore[arg-type]
        )  # fmt: skip


def test_the_fit_key_is_stable(paths: Paths) -> None:
    assert key(plan(paths)) == key(plan(paths))


def test_titles_suite_names_and_metrics_do_not_force_retraining(paths: Paths) -> None:
    assert key(plan(paths)) == key(plan(paths, name="t", title="T", metrics=("mrr_at_50",)))


def test_everything_that_can_change_a_result_changes_the_fit_key(paths: Paths) -> None:
    before = key(plan(paths))
    keys = {
        "budget": key(plan(paths, budget=BudgetFile(seconds=6))),
        "precision": key(plan(paths, precision="bf16")),
        "device": key(plan(paths, device="cuda")),
        "packages": key(plan(paths, environment={"": "other"})),
        "configuration": key(plan(paths, run=(Entry(method="slow", configs=("b",)),))),
        "domain": key(plan(paths, domains=("other",))),
        "seed": key(plan(paths, seeds=2), 1),
    }
    (paths.methods[0] / "slow" / "more.py").write_text("x = 1\n")
    keys["source"] = key(plan(paths))
    assert before not in keys.values() and len(set(keys.values())) == len(keys)


def test_a_stage_that_uses_few_parameters_is_shared(paths: Paths) -> None:
    file = paths.methods[0] / "slow" / "method.toml"
    file.write_text(file.read_text().replace('name = "prepare"', 'name = "prepare"\nuses = []'))
    made = plan(paths, run=(Entry(method="slow", configs=("a", "b")),))
    first, second = (run.stages for run in made.runs)
    assert first[0].key == second[0].key and first[1].key != second[1].key


def test_a_stage_depends_on_the_stages_that_it_reads(paths: Paths) -> None:
    """UTGRec's ablation without a pre-trained recommender adapts the same tokenizer as the whole method: once."""
    configs = ("tiny", "tiny_recommender_from_scratch", "tiny_no_pretraining")
    made = plan(paths, run=(Entry(method="utgrec", configs=configs),), pretrain=("other",))
    whole, from_scratch, nothing = ({stage.name: stage for stage in run.stages} for run in made.runs)
    assert {name: stage.needs for name, stage in whole.items()} == {
        "pretrain_tokenizer": (),
        "pretrain_recommender": ("pretrain_tokenizer",),
        "adapt": ("pretrain_tokenizer",),
        "fit": ("pretrain_recommender", "adapt"),
    }
    assert whole["adapt"].key == from_scratch["adapt"].key != nothing["adapt"].key
    assert whole["fit"].key != from_scratch["fit"].key
    assert from_scratch["fit"].needs == ("adapt",)


def test_a_pretraining_stage_does_not_depend_on_the_target(paths: Paths) -> None:
    file = paths.methods[0] / "slow" / "method.toml"
    file.write_text(file.read_text().replace('name = "prepare"', 'name = "prepare"\nscope = "pretrain"'))
    assert "pre-training domains" in plan(paths).runs[0].missing
    made = plan(paths, domains=("small", "other"), pretrain=("other",))
    assert made.runs[0].stages[0].key == made.runs[1].stages[0].key
    assert made.runs[0].stages[1].key != made.runs[1].stages[1].key
    assert made.runs[0].missing == ""


def test_a_method_joins_a_suite_by_itself(paths: Paths) -> None:
    file = paths.methods[0] / "slow" / "method.toml"
    file.write_text(file.read_text().replace("[[stages]]", '[suites]\ns = ["a", "c"]\n[[stages]]', 1))
    assert {run.config for run in plan(paths).runs} == {"a", "c"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": (Entry(method="slo", configs=("a",)),)}, "Did you mean 'slow'"),
        ({"run": (Entry(method="slow", configs=("aa",)),)}, "Did you mean 'a'"),
        ({"domains": ("smal",)}, "Did you mean 'small'"),
        ({"run": (Entry(method="slow", configs=("a", "a")),)}, "planned twice"),
        ({"run": (Entry(method="slow", configs=("a",), domains=("other",)),)}, "domain 'other'"),
    ],
)
def test_errors_name_the_nearest_right_word(paths: Paths, changes: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(paths, **changes)
    assert words in str(error.value)


def test_the_suites_of_the_project_load() -> None:
    assert load_suite("smoke").simulate is not None
    assert load_suite("classic").seeds == 3
    assert load_suite("amazon2023").seeds == 5
    by_time = load_suite("amazon2023_time")
    assert (by_time.protocol, by_time.domains) == ("time-v1", tuple(f"{name}_time" for name in load_suite("amazon2023").domains))
    assert by_time.pretrain == tuple(f"{name}_time" for name in load_suite("amazon2023").pretrain)
    methods = find_methods(Paths.default())
    smoke = load_suite("smoke_time")
    assert smoke.simulate is not None and smoke.protocol == "time-v1"
    assert all(
        "time-v1" in methods[entry.method].file.protocols and methods[entry.method].config(c)
        for entry in (*by_time.run, *smoke.run)
        for c in entry.configs
    )


def test_an_unknown_suite_and_an_unknown_key_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'smoke'"):
        load_suite("smoek")
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ntitle = "M"\ndomain = ["a"]\nseeds = 1\n[budget]\nseconds = 1\n[[run]]\nmethod = "x"\nconfigs = ["y"]\n'
    )
    with pytest.raises(ConfigError, match="Did you mean 'domains'"):
        load_suite(str(path))
