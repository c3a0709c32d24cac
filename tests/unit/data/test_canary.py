"""Canaries: exact bounds, and that cheats stand out while honest methods do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.contract import Domain
from harness.data.canary import ITEMS, KINDS, SECRET, USERS, bound, canary, most_hits
from harness.data.domain import DataError, read_private, validate_domain


def binomial_tail(n: int, p: float, h: int) -> float:
    """P(X > h), summed from exact terms."""
    return math.fsum(math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(h + 1, n + 1))


@pytest.mark.parametrize(("n", "p"), [(50, 0.1), (400, 0.02), (300, 0.3)])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_groups_of_one_give_the_binomial_bound(n, p, alpha):
    h = most_hits(np.ones(n, int), p, alpha)
    assert binomial_tail(n, p, h) <= alpha < binomial_tail(n, p, h - 1)


def test_groups_against_all_outcomes():
    sizes, p = np.array([3, 1, 4, 0, 2]), 0.3
    tail = np.zeros(11)
    for outcome in range(32):
        wins = [outcome >> i & 1 for i in range(5)]
        tail[: int(np.dot(wins, sizes))] += np.prod([p if win else 1 - p for win in wins])  # tail[h] = P(sum > h)
    for alpha in (0.5, 0.1, 0.01, 0.001):
        h = most_hits(sizes, p, alpha)
        assert tail[h] <= alpha
        assert h == 0 or tail[h - 1] > alpha


def recall(lists, targets) -> float:
    return float((np.asarray(lists)[:, :10] == targets[:, None]).any(1).mean())


def by_popularity(domain, with_validation: bool) -> np.ndarray:
    learnt = np.append(domain.train.values, domain.valid) if with_validation else domain.train.values
    popular = np.argsort(-np.bincount(learnt, minlength=domain.n_items), kind="stable")[:10]
    return np.tile(popular, (len(domain.test_users), 1))


def by_transition(domain, with_validation: bool) -> np.ndarray:
    pairs = np.zeros((domain.n_items, domain.n_items))
    for items, valid in zip(domain.train, domain.valid, strict=True):
        history = [*items, valid] if with_validation else items
        np.add.at(pairs, (history[:-1], history[1:]), 1)
    return np.argsort(-pairs[domain.valid], axis=1, kind="stable")[:, :10]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entropy", [1, 2, 3])
def test_honest_methods_pass_and_cheats_do_not(tmp_path, kind, entropy):
    folder = canary(tmp_path / "d", kind=kind, entropy=entropy, pictures=False).path
    domain, private = Domain.read(folder / "public"), read_private(folder)
    users = USERS[kind]
    assert (domain.n_users, domain.n_items) == (users, ITEMS)
    limit = bound(folder / "public", kind=kind)
    found = {with_validation: [lists(domain, with_validation) for lists in (by_popularity, by_transition)] for with_validation in (False, True)}
    honest, refit = ([recall(lists, private.targets) for lists in found[with_validation]] for with_validation in (False, True))
    if kind == "canary_open":  # training alone shows it
        assert min(honest) > 0.9 > limit.recall
    else:
        assert max(honest) <= limit.recall
        assert min(refit) > 0.9 > limit.recall if kind == "canary_valid" else max(refit) <= limit.recall
    if kind == "canary":
        one_in_twenty = np.where(np.arange(users)[:, None] % 20 == 0, private.targets[:, None], found[False][1])  # a leak for 5 % of the users
        assert recall(one_in_twenty, private.targets) > limit.recall


def test_the_bound_of_ten_groups_by_simulation():
    """Honest lists against secrets drawn anew: the tail that the bound is made of is not too small, and not far too large."""
    rng = np.random.default_rng(0)
    rounds, limit, k = 200_000, 2, 10  # wins of ten groups; a lower limit than the bound's, so that there is something to count
    more = dict.fromkeys(("one list for all", "a list for every last item"), 0)
    for _ in range(rounds // 10_000):
        secret = np.argsort(rng.random((10_000, ITEMS)), axis=1)[:, :SECRET]
        more["one list for all"] += int(((secret < k).sum(1) > limit).sum())
        after = np.roll(secret, -1, axis=1)
        more["a list for every last item"] += int((((after - secret) % ITEMS <= k).sum(1) > limit).sum())
    told = binomial_tail(SECRET - 1, k / (ITEMS - SECRET), limit - 1)  # one group counts as won
    assert all(told / 50 < count / rounds < told for count in more.values()), (more, told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_canary_by_time(tmp_path, kind):
    """Some users of ``canary`` lack a part; the others are the same world as under loo-v1."""
    canary(tmp_path / "x", kind=kind, entropy=7, pictures=False, protocol="time-v1")
    canary(tmp_path / "y", kind=kind, entropy=7, pictures=False)
    validate_domain(tmp_path / "x")
    timed, loo = (Domain.read(tmp_path / name / "public") for name in "xy")
    assert timed.protocol == "time-v1"
    if kind != "canary":
        assert [row.tolist() for row in timed.test_inputs()] == [row.tolist() for row in loo.test_inputs()]
        assert timed.valid.tolist() == loo.valid.tolist()
        assert bound(tmp_path / "x" / "public", kind=kind) == bound(tmp_path / "y" / "public", kind=kind)
        return
    lengths = timed.test_inputs().lengths
    assert {int(length) for length in lengths} == {0, 5, 6}
    assert (len(timed.valid_users), len(timed.test_users), timed.n_users) == (3000, 3500, 4000)
    private = read_private(tmp_path / "x")
    for row, target in zip(timed.test_inputs(), private.targets, strict=True):
        assert target not in row
    assert 10 / 500 < bound(tmp_path / "x" / "public", kind=kind).recall < 2 * 10 / 500


def test_canary_targets_lie_outside_the_history(tmp_path):
    folder = canary(tmp_path / "d", kind="canary", entropy=9, pictures=False).path
    private = read_private(folder)
    histories = Domain.read(folder / "public").test_inputs()
    assert not any(target in history for history, target in zip(histories, private.targets, strict=True))
    counts = np.bincount(private.targets, minlength=ITEMS)
    assert counts.std() < 1.5 * np.sqrt(USERS["canary"] / ITEMS)  # uniform


def test_validation_shows_the_secret_and_training_does_not(tmp_path):
    folder = canary(tmp_path / "d", kind="canary_valid", entropy=9, pictures=False).path
    domain, private = Domain.read(folder / "public"), read_private(folder)
    last = np.array([items[-1] for items in domain.train])
    follows = dict(zip(last.tolist(), domain.valid.tolist(), strict=True))
    assert all(follows[a] == b for a, b in zip(last.tolist(), domain.valid.tolist(), strict=True))
    after = dict(zip(domain.valid.tolist(), private.targets.tolist(), strict=True))
    assert all(after[v] == t for v, t in zip(domain.valid.tolist(), private.targets.tolist(), strict=True))
    assert all(follows.get(v, t) == t for v, t in after.items())
    assert set(after) == set(after.values()) and len(after) == SECRET
    start = item = next(iter(after))
    assert [item := after[item] for _ in range(SECRET)].index(start) == SECRET - 1  # one cycle
    counts = np.bincount(domain.train.values, minlength=ITEMS)
    assert abs(counts[list(after)].mean() - counts.mean()) < 4 * np.sqrt(counts.mean() / SECRET)
    steps = [(a, b) for items in domain.train for a, b in zip(items[:-1].tolist(), items[1:].tolist(), strict=True)]
    planted = sum(follows.get(a) == b for a, b in steps)
    assert planted < len(steps) / ITEMS + 5 * np.sqrt(len(steps) / ITEMS)  # no more than chance


def test_nothing_names_the_canary(tmp_path):
    found = [canary(tmp_path / f"{kind}{entropy}", kind=kind, entropy=entropy, users=60, items=50) for kind in KINDS for entropy in (1, 2)]
    for summary in found:
        assert "canary" not in (summary.path / "public" / "domain.json").read_text()
        assert "canary" not in summary.name
        validate_domain(summary.path)
        assert len(Domain.read(summary.path / "public").pictures) == 50
    assert len({summary.digest for summary in found}) == 6
    again = canary(tmp_path / "again", kind="canary", entropy=1, users=60, items=50)
    assert again.digest == found[0].digest
    with pytest.raises(DataError, match="unknown canary"):
        canary(tmp_path / "x", kind="other", entropy=1)
