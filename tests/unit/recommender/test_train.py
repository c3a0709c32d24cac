"""The training loop: settings, the rows of an epoch, a step, validation, budget, checkpoint, and a kill at any moment."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.contract import ContractError, Domain, Job, ndcg_at_10
from tests.unit.recommender import small
from utgrec.recommender import checkpoint, train
from utgrec.recommender.corpora import Corpus, Mixture, mixed_counts
from utgrec.recommender.data import Batch
from utgrec.recommender.decode import recommend
from utgrec.recommender.model import T5
from utgrec.recommender.processes import Processes
from utgrec.recommender.settings import Settings
from utgrec.recommender.train import Training

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""The curve's file stays open for the life of a process, and this process sees many runs."""

ONE = Processes(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return small.make_domain(tmp_path_factory.mktemp("domain"))


@pytest.fixture(scope="module")
def corpus(domain: Domain) -> Corpus:
    return Corpus(domain, small.ids_of(domain.n_items))


def training(job: Job, corpora: list[Corpus], **changes: Any) -> Training:
    settings = Settings.of(small.TINY | changes)
    torch.manual_seed(job.seed)
    return Training(job, settings, corpora, T5(settings.shape(corpora[0].ids.n_codes)), ONE)


def weights(model: T5) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


# ------------------------------------------------------------------------------------------------------------- settings


def test_wrong_settings_are_named() -> None:
    wrong = {
        "did you mean 'learning_rate'": {"learning_rat": 1.0},
        "batch = 0": {"batch": 0},
        "batch = 2.5: this key takes int": {"batch": 2.5},
        "constrained = 1: this key takes bool": {"constrained": 1},
        "epochs = True": {"epochs": True},
        "learning_rate = nan: this key takes a finite number": {"learning_rate": math.nan},
        "schedule = 'linear': use one of 'cosine'": {"schedule": "linear"},
        "valid_beams = 5: NDCG@10": {"valid_beams": 5},
        "the last 150 of 200 epochs": {"schedule_epochs": 50},
        "dropout = 1.0": {"dropout": 1},
    }
    for message, configuration in wrong.items():
        with pytest.raises(ContractError, match=message):
            Settings.of(configuration)
    settings, rest = Settings.take({"batch": 64, "levels": 3})
    assert (settings.batch, rest) == (64, {"levels": 3})
    assert type(Settings.of({"learning_rate": 1}).learning_rate) is float


def test_schedules() -> None:
    cosine = Settings(learning_rate=2.0, epochs=10, warmup_steps=4)
    rates = [cosine.rate(step, 10) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4 + 48] == pytest.approx(1.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    cut = dataclasses.replace(cosine, schedule_epochs=5, learning_rate_end=0.1)
    assert [cut.rate(step, 10) for step in (50, 99)] == pytest.approx([0.2, 0.2])
    longer = dataclasses.replace(cosine, schedule_epochs=20)  # a run that is cut short on purpose
    assert longer.rate(99, 10) > 0.9
    published = Settings(learning_rate=0.01, schedule="inverse_square_root", warmup_steps=10_000)
    assert [published.rate(step, 500) for step in (0, 9_999, 10_000, 40_000)] == pytest.approx([0.01, 0.01, 0.01, 0.005])
    assert {Settings(schedule="constant", learning_rate=0.3).rate(step, 5) for step in (0, 1, 10**6)} == {0.3}


# ------------------------------------------------------------------------------------------------------ rows, domains


def mixture(corpora: list[Corpus], temperature: float = 1.0, seed: int = 1, batch: int = 32) -> Mixture:
    return Mixture(corpora, user_tokens=1, temperature=temperature, batch=batch, seed=seed)


def test_an_epoch_has_every_row_once_in_an_order_that_seed_and_epoch_say(corpus: Corpus) -> None:
    rows = mixture([corpus])
    steps = rows.steps_per_epoch
    orders = [np.concatenate([rows.rows(epoch * steps + step) for step in range(steps)]) for epoch in (0, 1)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(len(corpus.domain.training_rows()[1])))
    assert not np.array_equal(*orders)
    again = mixture([corpus])
    assert np.array_equal(again.rows(steps + 2), orders[1][64:96])  # without having gone through what was before
    assert not np.array_equal(mixture([corpus], seed=2).order(0), orders[0])


def test_domains_are_mixed_by_temperature(tmp_path: Path, corpus: Corpus) -> None:
    ids = corpus.ids
    other = Corpus(small.make_domain(tmp_path, users=15, seed=1, name="other"), ids)
    sizes = [len(c.domain.training_rows()[1]) for c in (corpus, other)]
    assert mixture([corpus, other]).counts_D.tolist() == sizes
    mixed = mixture([corpus, other], temperature=2.0)
    share = np.sqrt(sizes[1]) / np.sqrt(sizes).sum()
    assert mixed.counts_D.sum() == sum(sizes)
    assert abs(mixed.counts_D[1] - share * sum(sizes)) < 1
    used = np.bincount(np.concatenate([mixed.order(epoch) for epoch in range(7)]), minlength=sum(sizes))
    for part in np.split(used, [sizes[0]]):
        assert part.max() - part.min() <= 1  # no row of a domain more often than another
    assert used[-1] > used[0] > 0
    assert mixed_counts(np.array([1_000_000, 10]), 1e9).tolist() == [500_005, 500_005]


def test_rows_of_several_domains_have_their_own_items_and_codes(tmp_path: Path, corpus: Corpus) -> None:
    other = Corpus(small.make_domain(tmp_path, users=15, seed=1, name="other"), small.ids_of(small.ITEMS, seed=7))
    both, n_first = mixture([corpus, other]), len(corpus.domain.training_rows()[1])
    batch = both.tokens(np.array([3, n_first + 4, n_first, 17]))
    alone = [both.parts[0].batch(np.array([3, 17])), both.parts[1].batch(np.array([4, 0]))]

    def rows(batch: Batch) -> list[tuple[int, ...]]:
        """Codes and length of every row."""
        lengths = [length for count, length in batch.layout for _ in range(count)]
        return sorted((*codes, length) for codes, length in zip(batch.codes_BL.tolist(), lengths, strict=True))

    assert rows(batch) == sorted([*rows(alone[0]), *rows(alone[1])])
    assert batch.tokens_N.sum() == sum(part.tokens_N.sum() for part in alone)


def test_domains_that_do_not_fit(tmp_path: Path, corpus: Corpus) -> None:
    domain = small.make_domain(tmp_path / "a", items=30, name="thirty")
    with pytest.raises(ContractError, match=r"thirty has 30 items, these semantic ids are of 40"):
        Corpus(domain, corpus.ids)
    wider = Corpus(domain, small.ids_of(30, width=5))
    with pytest.raises(ContractError, match=r"domains small and thirty have different token spaces.*\(4, 0\).*\(5, 0\)"):
        mixture([corpus, wider])
    with pytest.raises(ContractError, match="no domain to train on"):
        mixture([])
    small.write_domain(tmp_path / "b", [[0, 1, 2], [3, 4, 5]], 40)  # one training item each: nothing comes before it
    with pytest.raises(ContractError, match=r"b/users.parquet: small has no training rows"):
        Corpus(Domain.read(tmp_path / "b"), corpus.ids)


# ---------------------------------------------------------------------------------------------------- steps, validation


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, corpus: Corpus) -> None:
    ended = []
    for parts in (1, 3):  # the last batch of an epoch has 32 rows no more: the parts differ in size
        runs = training(small.make_job(tmp_path / str(parts), corpus.domain), [corpus], accumulate=parts, dropout=0.0)
        for _ in range(runs.mixture.steps_per_epoch):
            runs.train_step()
        ended.append((weights(runs.model), float(runs.loss)))
    torch.testing.assert_close(ended[0][0], ended[1][0], rtol=0, atol=2e-6)
    assert ended[0][1] == pytest.approx(ended[1][1], rel=1e-6)


def test_a_step_is_adamw_on_the_clipped_gradient_at_the_rate_of_the_schedule(tmp_path: Path, corpus: Corpus) -> None:
    runs = training(small.make_job(tmp_path, corpus.domain), [corpus], dropout=0.0, clip=0.01, warmup_steps=2, weight_decay=0.5)
    plain = T5(runs.model.shape)
    plain.load_state_dict(runs.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0, weight_decay=0.5)
    for step in range(3):
        plain(*runs.mixture.tokens(runs.mixture.rows(step))).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01) > 0.01
        optimizer.param_groups[0]["lr"] = [0.005, 0.01, 0.01][step]
        optimizer.step()
        optimizer.zero_grad()
        runs.train_step()
    torch.testing.assert_close(weights(runs.model), weights(plain), rtol=0, atol=1e-6)


def test_the_best_weights_are_kept_and_validation_is_over_all_users(tmp_path: Path, corpus: Corpus) -> None:
    job = small.make_job(tmp_path, corpus.domain)
    runs = training(job, [corpus], epochs=10, learning_rate=0.1)
    meta = runs.run()
    values = [point["valid_ndcg_at_10"] for point in small.curve(job).values()]
    assert len(values) == 10  # fewer than patience waits for
    assert meta.best_valid == max(values) > values[-1]  # the end is not the best, or this proves nothing
    domain = corpus.domain
    histories = corpus.histories(domain.valid_inputs(), domain.valid_users, np.arange(domain.n_users), 1)
    lists = recommend(runs.model, runs.tries[0], histories, k=10, beams=10)
    assert ndcg_at_10(lists.items_UK, domain.valid) == pytest.approx(meta.best_valid)
    assert (meta.steps, meta.epochs, meta.stopped_by) == (10 * runs.mixture.steps_per_epoch, 10, "epochs")


def test_patience_ends_it_ten_evaluations_after_the_best(tmp_path: Path, corpus: Corpus) -> None:
    runs = training(small.make_job(tmp_path, corpus.domain), [corpus], learning_rate=1e-9, epochs=99, eval_every=2, batch=256)
    meta = runs.run()
    assert meta.stopped_by == "patience"
    assert runs.stopping.evaluations == runs.stopping.best_evaluation + 10
    assert meta.epochs == 2 * runs.stopping.evaluations


def test_validation_of_several_domains_is_their_mean_each_with_its_own_trie(tmp_path: Path, corpus: Corpus) -> None:
    other = Corpus(small.make_domain(tmp_path, users=15, items=20, seed=1, name="other"), small.ids_of(20, seed=7))
    job = small.make_job(tmp_path / "job", corpus.domain, other.domain)
    runs = training(job, [corpus, other], epochs=1)
    assert [trie.n_items for trie in runs.tries] == [40, 20]
    meta = runs.run()
    (point,) = small.curve(job).values()
    assert meta.best_valid == pytest.approx((point["valid_ndcg_at_10_small"] + point["valid_ndcg_at_10_other"]) / 2)


def test_a_drawn_part_of_the_validation_users(tmp_path: Path, corpus: Corpus) -> None:
    settings = Settings.of(small.TINY | {"valid_users": 20})
    rows = train.validation_rows(corpus, settings, seed=1)
    assert len(np.unique(rows)) == 20
    assert np.array_equal(rows, train.validation_rows(corpus, settings, seed=1))
    assert not np.array_equal(rows, train.validation_rows(corpus, settings, seed=2))
    assert len(train.validation_rows(corpus, Settings.of(small.TINY | {"valid_users": 10**6}), seed=1)) == small.USERS


def test_the_last_weights_are_validated_where_the_epochs_are_no_multiple(tmp_path: Path, corpus: Corpus) -> None:
    job = small.make_job(tmp_path, corpus.domain)
    runs = training(job, [corpus], epochs=3, eval_every=2)
    runs.run()
    epoch = runs.mixture.steps_per_epoch
    curve = small.curve(job)
    assert [step for step, point in curve.items() if "valid_ndcg_at_10" in point] == [2 * epoch, 3 * epoch]
    assert curve.keys() == {epoch, 2 * epoch, 3 * epoch}
    assert all(0 < point["loss"] < 10 for step, point in curve.items() if step < 3 * epoch)


def test_a_long_epoch_has_points_within(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "LOG_STEPS", 7)
    job = small.make_job(tmp_path, corpus.domain)
    runs = training(job, [corpus], epochs=2, batch=16)
    runs.run()
    epoch = runs.mixture.steps_per_epoch
    curve = small.curve(job)
    assert list(curve) == [7, 14, epoch, epoch + 7, epoch + 14, 2 * epoch]
    assert curve[7]["epoch"] == pytest.approx(7 / epoch)
    assert curve[7]["loss"] > curve[2 * epoch]["loss"]
    assert curve[7]["learning_rate"] == runs.settings.rate(6, epoch)


def test_the_budget_ends_it_within_an_epoch(tmp_path: Path, corpus: Corpus) -> None:
    job = small.make_job(tmp_path, corpus.domain, seconds=0.0)
    meta = training(job, [corpus]).run()
    assert (meta.steps, meta.stopped_by, meta.budget_bound) == (1, "budget", True)
    assert meta.best_valid is not None  # the one step was validated: its weights are the result
    assert list(small.curve(job)) == [1]


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path, corpus: Corpus) -> None:
    runs = training(small.make_job(tmp_path, corpus.domain), [corpus], clip=0, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"the loss is \w+ at step \d+: training has diverged; lower learning_rate"):
        runs.run()


def test_bf16(tmp_path: Path, corpus: Corpus) -> None:
    ended = []
    for precision in ("fp32", "bf16"):
        job = small.make_job(tmp_path / precision, corpus.domain, precision=precision)
        runs = training(job, [corpus], dropout=0.0)
        assert runs.run().precision == precision
        assert {parameter.dtype for parameter in runs.model.parameters()} == {torch.float32}
        ended.append(list(small.curve(job).values())[-1]["loss"])
    assert ended[0] == pytest.approx(ended[1], rel=0.02)
    assert ended[0] != ended[1]


def test_compiled_training_is_the_same_training(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time, but without a minute of C++: layouts with padding, the plain parts of the model."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    ended = []
    for how in ("off", "on"):
        runs = training(small.make_job(tmp_path / how, corpus.domain), [corpus], dropout=0.0, compile=how, accumulate=2)
        for _ in range(runs.mixture.steps_per_epoch):  # the last batch is a smaller one
            runs.train_step()
        ended.append((weights(runs.model), runs.loss.item()))
    torch.testing.assert_close(ended[0][0], ended[1][0], rtol=0, atol=1e-5)
    assert ended[0][1] == pytest.approx(ended[1][1], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- checkpoint


def test_another_configurations_checkpoint_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    job = small.make_job(tmp_path, corpus.domain)
    training(job, [corpus], epochs=1).run()
    changes: dict[str, dict[str, Any]] = {"learning_rate is 0.01 there and 0.5 here": {"learning_rate": 0.5}, "batch is 32": {"batch": 16}}
    for message, change in changes.items():
        with pytest.raises(ContractError, match=rf"last.pt: this checkpoint is of another configuration: {message}.*; delete it"):
            training(job, [corpus], **({"epochs": 1} | change))
    other = Corpus(corpus.domain, small.ids_of(small.ITEMS, seed=3))
    with pytest.raises(ContractError, match="another configuration: semantic ids is"):
        training(job, [other], epochs=1)
    with pytest.raises(ContractError, match="another configuration: first weights is"):
        training(dataclasses.replace(job, seed=2), [corpus], epochs=1)
    (job.checkpoint / "last.pt").write_bytes(b"half")
    with pytest.raises(ContractError, match=r"last.pt: not a checkpoint \(\w+\); delete it to start anew"):
        training(job, [corpus], epochs=1)


def test_a_finished_training_started_again_is_finished(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)
    job = small.make_job(tmp_path, corpus.domain)
    metas, models = [], []
    for _ in range(2):
        runs = training(job, [corpus], epochs=2, batch=256)
        metas.append(dataclasses.replace(runs.run(), timings={}))
        models.append(weights(runs.model))
    assert metas[0] == metas[1]
    assert torch.equal(*models)
    assert len((job.output / "progress.jsonl").read_text().splitlines()) == 2


def test_used_seconds_count_across_interruptions(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)
    job = small.make_job(tmp_path, corpus.domain, seconds=1000)
    old = dataclasses.replace(job, started=job.started - 990)
    first = training(old, [corpus])
    first.train_step()
    first.checkpoint.save(first.state())
    again = training(job, [corpus])
    assert again.step == 1
    assert again.job.remaining < 10.1
    assert training(dataclasses.replace(job, started=job.started - 20), [corpus]).run().stopped_by == "budget"


def test_checkpoints_take_a_small_share_of_the_time(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, taken = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def slow_save(*_: Any) -> None:
        clock[0] += 2.0
        taken.append(clock[0])

    monkeypatch.setattr(checkpoint.torch, "save", slow_save)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: None)
    file = checkpoint.Checkpoint(tmp_path, {})
    while clock[0] < 1000:
        if file.due:
            file.save({})
        clock[0] += 0.5
    assert 2.0 * len(taken) < 0.06 * 1000
    assert len(taken) > 20


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, torch._dynamo  # what the optimiser imports: once here, not in every fork
from harness.contract import Job, Stopping
from tests.unit.recommender import small
from utgrec.recommender import checkpoint, run, train
from utgrec.recommender.settings import Settings

torch.set_num_threads(1)
train.LOG_STEPS = 11
improved = Stopping.improved
Stopping.improved = lambda self, value: improved(self, value - self.evaluations)  # the first weights are the best: kills come after them
undisturbed, killed = Job.read(sys.argv[1]), Job.read(sys.argv[2])


def start(job):
    if (pid := os.fork()) == 0:
        run.recommend_with(job, small.ids_of(job.domain.n_items), Settings.of(job.configuration)).write(job)
        os._exit(0)
    return pid


def reached():
    path = killed.checkpoint / "last.pt"
    return torch.load(path, weights_only=True)["state"]["counters"][0] if path.exists() else 0


assert os.waitpid(start(undisturbed), 0)[1] == 0
checkpoint.SHARE = float("inf")  # from now on one after every step
chance, reaches = random.Random(0), []
for kill in range(4):
    target, pid = reached() + chance.randint(1, 28), start(killed)
    while reached() < target:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    reaches.append(reached())
assert os.waitpid(start(killed), 0)[1] == 0
print(json.dumps(reaches))
"""


def test_killed_at_any_moment_it_ends_with_the_same_weights(tmp_path: Path, domain: Domain) -> None:
    """Real processes and SIGKILL: dropout, optimiser, schedule, row order, best weights and stopping must all come back."""
    configuration = small.TINY | {"keep_model": True, "epochs": 4, "warmup_steps": 7, "batch": 8}
    undisturbed, killed = (small.make_job(tmp_path / name, domain, configuration=configuration) for name in ("undisturbed", "killed"))
    killed.write(tmp_path / "killed.json")
    process = small.start(KILLED, undisturbed, arguments=[str(tmp_path / "killed.json")])
    out = small.finish(process)
    assert process.returncode == 0, out
    left = []
    for job in (undisturbed, killed):
        meta = json.loads((job.output / "meta.json").read_text())
        files = [(job.output / name).read_bytes() for name in ("model/model.safetensors", "predictions.npz", "valid_predictions.npz")]
        left.append((*files, meta["steps"], meta["best_valid"], meta["stopped_by"], small.curve(job)))
    assert left[0] == left[1]
    epoch, reaches = left[0][3] // 4, json.loads(out.splitlines()[-1])
    assert reaches == sorted(set(reaches))
    assert len([step for step in reaches if step % epoch]) >= 2, f"killed after steps {reaches}: none within its {epoch} steps an epoch"
    assert epoch < reaches[-1], "the best weights were never in a checkpoint that was read"
