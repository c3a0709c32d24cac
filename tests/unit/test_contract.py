"""The contract: histories, splits, jobs, and what is refused of a method's output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import contract
from harness.contract import Budget, ContractError, Domain, DomainRef, InvalidOutput, Job, Meta, Ragged, Stopping
from harness.paths import Paths
from tests.faults import lab

HISTORIES = [[1, 2, 3], [4, 5, 6, 7, 8], list(range(10, 40))]


@pytest.fixture
def domain() -> Domain:
    """Three users; the last item of each list is the validation target, the test target is not here."""
    train = [history[:-1] for history in HISTORIES]
    offsets = np.cumsum([0, *map(len, train)])
    return Domain(
        Path("x"), "x", 3, 40, Ragged(np.concatenate(train).astype(np.int32), offsets), np.array([h[-1] for h in HISTORIES], np.int32), {}
    )


def make_job(folder: Path, **changes: object) -> Job:
    for name in ("out", "cache", "scratch", "checkpoint"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    values: dict = dict(
        run_id="r",
        stage="fit",
        method="m",
        configuration={"lr": 0.1},
        domains=(DomainRef("d", folder / "d"),),
        inputs={"a": folder / "a"},
        output=folder / "out",
        cache=folder / "cache",
        scratch=folder / "scratch",
        checkpoint=folder / "checkpoint",
        seed=7,
        budget=Budget(seconds=10, deadline=20, memory=1 << 30, disk=1 << 30, threads=1),
    )
    return Job(**(values | changes))


def test_job_survives_the_file(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


@pytest.mark.parametrize(("change", "words"), [({"schema": 2}, "schema 2"), ({"tests": 1}, "unknown keys ['tests']")])
def test_a_wrong_job_is_named(tmp_path: Path, change: dict, words: str) -> None:
    raw = make_job(tmp_path).to_json() | change
    (tmp_path / "job.json").write_text(json.dumps(raw))
    with pytest.raises(ContractError, match=r"job\.json") as error:
        Job.read(tmp_path / "job.json")
    assert words in str(error.value)


def test_a_job_of_an_unknown_protocol_is_named(tmp_path: Path) -> None:
    make_job(tmp_path, protocol="time-v1").write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json").protocol == "time-v1"
    raw = make_job(tmp_path).to_json()
    (tmp_path / "job.json").write_text(json.dumps({**raw, "protocol": "time-v2"}))
    with pytest.raises(ContractError, match=r"protocol 'time-v2', this contract knows loo-v1, time-v1"):
        Job.read(tmp_path / "job.json")
    (tmp_path / "job.json").write_text(json.dumps({name: value for name, value in raw.items() if name != "protocol"}))
    assert Job.read(tmp_path / "job.json").protocol == "loo-v1"


def lists_of(*rows: list[int]) -> Ragged:
    return Ragged(np.array([value for row in rows for value in row], np.int32), np.cumsum([0, *map(len, rows)]))


def test_joining_and_taking_lists() -> None:
    joined = lists_of([1, 2], [], [3], []).join(lists_of([4], [5, 6], [], []))
    assert [row.tolist() for row in joined] == [[1, 2, 4], [5, 6], [3], []]
    assert [row.tolist() for row in joined.take(np.array([2, 0, 3]))] == [[3], [1, 2, 4], []]
    assert len(joined.take(np.array([], int))) == 0


@pytest.fixture
def by_time() -> Domain:
    """``time-v1``: user 0 is there all the time, 1 is not tested, 2 comes after the cut only, 3 is not validated."""
    train, window = lists_of([1, 2], [3, 4, 5], [], list(range(8, 33))), lists_of([6, 7], [2], [], [])
    valid = np.array([6, 2], np.int32)
    return Domain(Path("x"), "x", 4, 40, train, valid, {"protocol": "time-v1"}, window, np.array([True, False, True, True]))


def test_rows_under_time(by_time: Domain) -> None:
    assert (by_time.valid_users.tolist(), by_time.test_users.tolist()) == ([0, 1], [0, 2, 3])
    assert [row.tolist() for row in by_time.valid_inputs()] == [[1, 2], [3, 4, 5]]
    assert [row.tolist() for row in by_time.test_inputs()] == [[1, 2, 6, 7], [], list(range(13, 33))]
    assert [row.tolist() for row in by_time.test_inputs(1)] == [[7], [], [32]]
    inputs, targets = by_time.training_rows()  # nothing of the window
    assert [row.tolist() for row in inputs][:3] == [[1], [3], [3, 4]]
    assert targets.tolist() == [2, 4, 5, *range(9, 33)]
    assert by_time.popular(3).tolist() == [1, 2, 3]
    assert by_time.popular(41)[39:].tolist() == [39, -1]


def test_leave_one_out_validates_and_tests_everybody(domain: Domain) -> None:
    assert domain.valid_users.tolist() == domain.test_users.tolist() == [0, 1, 2]
    assert [row.tolist() for row in domain.window] == [[item] for item in domain.valid]


def test_predictions_under_time_are_for_the_users_of_their_part(tmp_path: Path, by_time: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Domain, "read", lambda path: by_time)
    job = make_job(tmp_path, protocol="time-v1")
    items_VK = np.stack([np.arange(50) % 40 + row for row in range(3)])
    items_VK[:, 40:] = -1
    items_VK %= 41  # item numbers 0..39
    items_VK[items_VK == 40] = -1
    contract.write_predictions(job, items_VK)
    contract.write_predictions(job, items_VK[:2], valid=True)
    for name, users, expected in (
        (contract.PREDICTIONS, by_time.test_users, items_VK),
        (contract.VALID_PREDICTIONS, by_time.valid_users, items_VK[:2]),
    ):
        assert np.load(job.output / name)["users"].tolist() == users.tolist()
        assert np.array_equal(contract.read_predictions(job.output / name, users, 40), expected)
    with pytest.raises(ContractError, match=r"4 lists for 3 users; write one for each of domain\.test_users"):
        contract.write_predictions(job, np.zeros((4, 50)))
    # the right number of lists, for other users: refused, never guessed at
    np.savez(tmp_path / "p.npz", users=np.array([0, 1, 2]), items=items_VK)
    with pytest.raises(InvalidOutput, match="each of the 3 users of this part once"):
        contract.read_predictions(tmp_path / "p.npz", by_time.test_users, 40)


def test_training_rows_are_every_prefix_and_nothing_else(domain: Domain) -> None:
    inputs, targets = domain.training_rows()
    expected = [(list(h[:i][-20:]), h[i]) for history in HISTORIES for h in [history[:-1]] for i in range(1, len(h))]
    assert [(list(row), target) for row, target in zip(inputs, targets, strict=True)] == expected


def test_inputs_are_cut_to_the_last_twenty(domain: Domain) -> None:
    assert [list(row) for row in domain.valid_inputs()] == [h[:-1][-20:] for h in HISTORIES]
    assert [list(row) for row in domain.test_inputs()] == [h[-20:] for h in HISTORIES]


def test_padding_left_and_right(domain: Domain) -> None:
    assert domain.valid_inputs().padded(4).tolist() == [[1, 2, -1, -1], [4, 5, 6, 7], [35, 36, 37, 38]]
    assert domain.valid_inputs().padded(4, left=True).tolist()[0] == [-1, -1, 1, 2]


def test_stopping_by_patience_and_by_budget(tmp_path: Path) -> None:
    stopping = Stopping(make_job(tmp_path), patience=2)
    assert [stopping.improved(value) for value in (0.1, 0.2, 0.2)] == [True, True, False]
    assert not stopping.stop
    stopping.improved(0.1)
    assert stopping.stop and stopping.meta == {"best_valid": 0.2, "stopped_by": "patience", "budget_bound": False}
    spent = Stopping(make_job(tmp_path, budget=Budget(seconds=0, deadline=20, memory=1, disk=1, threads=1)))
    spent.improved(0.1)
    assert spent.stop and spent.meta["budget_bound"]


def test_the_stopping_metric_is_the_harness_metric() -> None:
    from harness import metrics

    generator = np.random.default_rng(3)
    lists_UK = generator.permuted(np.tile(np.arange(60), (500, 1)), axis=1)[:, :50]
    targets_U = generator.integers(0, 60, 500)
    expected = metrics.means(metrics.ranks(lists_UK, targets_U))["ndcg_at_10"]
    assert contract.ndcg_at_10(lists_UK, targets_U) == pytest.approx(expected, abs=1e-12)


def test_predictions_survive_the_file_in_user_order(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    lists_UK = np.random.default_rng(1).permuted(np.tile(np.arange(90), (7, 1)), axis=1)[:, :50]
    lists_UK[2, 5] = -1
    lists_UK[2, 9] = -1
    contract.write_predictions(job, lists_UK)
    assert np.array_equal(contract.read_predictions(job.output / contract.PREDICTIONS, 7, 90), lists_UK)
    order = np.random.default_rng(2).permutation(7)
    np.savez(tmp_path / "shuffled.npz", users=order, items=lists_UK[order])
    assert np.array_equal(contract.read_predictions(tmp_path / "shuffled.npz", 7, 90), lists_UK)


@pytest.mark.parametrize(
    ("users", "items", "words"),
    [
        (np.array([0, 0, 1]), np.zeros((3, 50), int), "every user"),
        (np.arange(3), np.full((3, 50), -2), "outside -1"),
        (np.arange(3), np.tile(np.arange(50), (3, 1)).astype(float), "float64"),
        (np.arange(3), np.tile(np.arange(50), (3, 1))[:, :, None], "shape"),
        (np.arange(3), np.tile(np.arange(50), (3, 1)).astype(bool), "bool"),
    ],
)
def test_wrong_predictions_are_refused(tmp_path: Path, users: np.ndarray, items: np.ndarray, words: str) -> None:
    np.savez(tmp_path / "p.npz", users=users, items=items)
    with pytest.raises(InvalidOutput, match=words):
        contract.read_predictions(tmp_path / "p.npz", 3, 60)


def test_random_bytes_are_refused_and_never_raise_anything_else(tmp_path: Path) -> None:
    """Damage at every kind of place: the reader says InvalidOutput, or reads the same lists as before."""
    job = make_job(tmp_path)
    lists_UK = np.tile(np.arange(50), (20, 1))
    contract.write_predictions(job, lists_UK)
    whole = (job.output / contract.PREDICTIONS).read_bytes()
    generator = np.random.default_rng(5)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        if generator.random() < 0.3:
            del data[int(generator.integers(len(data))) :]
        for _ in range(int(generator.integers(1, 6))):
            if data:
                data[int(generator.integers(len(data)))] = int(generator.integers(256))
        (tmp_path / "p.npz").write_bytes(data)
        try:
            assert np.array_equal(contract.read_predictions(tmp_path / "p.npz", 20, 60), lists_UK)
        except InvalidOutput:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"epochs": -1}', "epochs"),
        ('{"epochs": true}', "epochs"),
        ('{"best_valid": NaN}', "NaN"),
        ('{"timings": {"fit": "long"}}', "timings"),
        ('{"stopped_by": "me"}', "stopped_by"),
        ('{"extra": {"a": [1]}}', "extra"),
        ('{"recall": 1}', "unknown keys"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_wrong_meta_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(InvalidOutput, match=words):
        contract.read_meta(tmp_path / "meta.json")


def test_meta_survives_the_file(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    meta = Meta(timings={"fit": 1.5}, parameters=10, best_valid=0.5, stopped_by="patience", extra={"beam": 50, "free": False})
    meta.write(job)
    assert contract.read_meta(job.output / contract.META) == meta


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    os.link(tmp_path / "real", tmp_path / "hard")
    for name in ("link", "pipe", "hard", "absent"):
        with pytest.raises(InvalidOutput):
            contract.read_regular(tmp_path / name, 100)


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    contract.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        contract.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_domain_is_read_as_it_was_written(tmp_path: Path) -> None:
    paths = lab.make_paths(tmp_path, [])
    lab.make_domain(paths)
    domain = Domain.read(paths.public("small"))
    assert (domain.n_users, domain.n_items, len(domain.texts)) == (120, 80, 80)
    assert domain.texts[0].startswith("title of item")
    assert domain.pictures[0] is None


def test_not_a_domain_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="not the public part of a domain"):
        Domain.read(tmp_path)


def test_the_contract_imports_nothing_but_numpy_and_pyarrow() -> None:
    """Also not pandas, which pyarrow loads when it is asked in the wrong way: half a second at the start of every method."""
    heavy = {"torch", "pandas", "mlflow", "polars", "pydantic", "typer", "rich"}
    code = f"import sys, harness.contract; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Paths.default().project, check=True)
    assert done.stdout.strip() == "[]"
