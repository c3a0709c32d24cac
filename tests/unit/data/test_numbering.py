"""The skipped-number attack: numbers in order of first appearance betray test targets, numbers by hash do not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness.contract import Domain
from harness.data.domain import read_private
from harness.data.importers import FORMATS, import_domain
from harness.data.simulate import simulate


def skipped_number(public: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Guesses of every user's target from the numbers alone: the one after the user's highest, the one after the highest so far."""
    highest = np.array([items.max() for items in public])
    return {"after the user's highest": highest + 1, "after the highest so far": np.maximum.accumulate(highest) + 1}


def hits(public: list[np.ndarray], targets: np.ndarray) -> dict[str, int]:
    return {name: int((guess == targets).sum()) for name, guess in skipped_number(public).items()}


def limit_of_chance(public: list[np.ndarray], targets: np.ndarray, n_items: int) -> dict[str, float]:
    """What the attack reaches under 200 random numberings of users and items: the mean plus five deviations."""
    rng = np.random.default_rng(0)
    found: dict[str, list[int]] = {}
    for _ in range(200):
        items, users = rng.permutation(n_items), rng.permutation(len(public))
        for name, count in hits([items[public[user]] for user in users], items[targets[users]]).items():
            found.setdefault(name, []).append(count)
    return {name: float(np.mean(counts) + 5 * np.std(counts) + 1) for name, counts in found.items()}


def histories(folder: Path) -> tuple[list[np.ndarray], np.ndarray, int]:
    domain = Domain.read(folder / "public")
    return list(domain.test_inputs(10**6)), read_private(folder).targets, domain.n_items


def by_first_appearance(folder: Path, user_order: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """The same domain in the order of its source: users as in the file, items numbered when they first appear."""
    public, targets, _ = histories(folder)
    place = {user: number for number, user in enumerate(read_private(folder).user_ids)}
    number: dict[int, int] = {}
    ordered = [place[user] for user in user_order if user in place]
    full = [[number.setdefault(int(item), len(number)) for item in (*public[user], targets[user])] for user in ordered]
    return [np.array(items[:-1]) for items in full], np.array([items[-1] for items in full])


@pytest.mark.parametrize("name", FORMATS)
def test_attack_finds_nothing_in_an_imported_domain(name, tmp_path, lists, writers):
    assert name in writers, f"the format {name!r} has no writer in conftest.py: every importer must stand this attack"
    summary = import_domain(writers[name](tmp_path / "in", lists), "d", root=tmp_path, format=name)
    public, targets, n_items = histories(summary.path)
    limits = limit_of_chance(public, targets, n_items)
    for attack, count in hits(public, targets).items():
        assert count <= limits[attack], attack
    # the control: on the numbers of the source the same attack works, so a numbering that keeps them would be caught here
    control = hits(*by_first_appearance(summary.path, [str(user) for user in range(len(lists))]))
    for attack, count in control.items():
        assert count > 3 * limits[attack], attack


def test_attack_finds_nothing_in_simulated_domains(tmp_path):
    found, control, limit = 0, 0, 0.0
    for summary in simulate(tmp_path, users=320, items=320, categories=["Video_Games", "Software"]):
        public, targets, n_items = histories(summary.path)
        users = sorted(read_private(summary.path).user_ids)
        attack = "after the highest so far"
        found += hits(public, targets)[attack]
        control += hits(*by_first_appearance(summary.path, users))[attack]
        limit += limit_of_chance(public, targets, n_items)[attack]
    assert found <= limit < control


def test_attack_on_beauty(tmp_path, shared_data):
    summary = import_domain(shared_data / "beauty2014", "beauty2014", root=tmp_path)
    public, targets, _ = histories(summary.path)
    attack = "after the highest so far"
    assert hits(public, targets)[attack] / len(targets) < 0.001
    lists = pq.read_table(shared_data / "beauty2014" / "sequences.parquet")["item_ids"].to_pylist()
    published = hits([np.array(items[:-1]) for items in lists], np.array([items[-1] for items in lists]))
    assert published[attack] / len(lists) > 0.05  # the numbers of the published file give one target in twenty away


def test_numbers_are_ranks_of_the_hash(tmp_path, lists, writers):
    summary = import_domain(writers["s3rec"](tmp_path / "in", lists), "d", root=tmp_path)
    private = read_private(summary.path)
    for ids in (private.user_ids, private.item_ids):
        digests = [hashlib.sha256(name.encode()).hexdigest() for name in ids]
        assert digests == sorted(digests)
        assert len(set(ids)) == len(ids)


def test_order_of_the_source_does_not_show(tmp_path, lists, writers):
    """Other order of the lines, same public part byte by byte: nothing of that order is left in it."""
    first = writers["s3rec"](tmp_path / "in", lists)
    lines = (first / "x.txt").read_text().splitlines()
    shuffled = tmp_path / "shuffled.txt"
    shuffled.write_text("\n".join(lines[number] for number in np.random.default_rng(1).permutation(len(lines))) + "\n")
    one, two = import_domain(first, "d", root=tmp_path / "a"), import_domain(shuffled, "d", root=tmp_path / "b")
    for file in sorted((one.path / "public").iterdir()):
        assert file.read_bytes() == (two.path / "public" / file.name).read_bytes(), file.name
