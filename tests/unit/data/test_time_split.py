"""``time-v1`` from raw reviews to a score: every step against a slow second implementation with dictionaries, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from harness.contract import PREDICTIONS, VALID_PREDICTIONS, Domain, Ragged, ndcg_at_10, read_predictions
from harness.data.card import make_card, neighbours_of, require_expected
from harness.data.cli import app
from harness.data.domain import list_domains, read_private, replace_pictures, validate_domain, write_domain
from harness.data.export import export_domain
from harness.data.prepare import prepare_raw
from harness.data.source import DataError, SourceDomain, ragged
from harness.data.split import AMAZON2023_CUTS, Cuts, leave_one_out, split_by_time
from harness.method import find_methods
from harness.paths import PROJECT, Paths
from harness.provenance import environment, environment_digests
from harness.record import Record, read_records
from harness.runspec import Plan
from harness.schedule import stage_folder
from harness.suite import BudgetFile, Entry, Suite, make_plan
from harness.tables.build import build_table
from tests.faults import lab

CATEGORY = "Video_Games"
CUTS = Cuts(valid=10, test=20)
DAY = 86_400_000

Event = tuple[int, str]
Histories = dict[str, list[Event]]


# --------------------------------------------------------------------------------------------------------- by hand


def split(histories: list[list[int]], times: list[list[int]], cuts: Cuts = CUTS):
    return split_by_time(ragged(histories), np.array([time for row in times for time in row]), cuts)


def lists(found: Ragged) -> list[list[int]]:
    return [row.tolist() for row in found]


def test_a_split_by_hand() -> None:
    # u0 is everywhere; u1 never comes back; u2 comes for the first time after the cut; u3 is seen at the cuts' very moments only
    histories = [[1, 2, 3, 4, 5, 6], [1, 2], [7, 8], [3, 4]]
    times = [[1, 9, 11, 19, 21, 22], [2, 3], [30, 31], [10, 20]]
    found = split(histories, times)
    assert lists(found.train) == [[1, 2], [1, 2], [], []]
    assert lists(found.window) == [[3, 4], [], [], [3]]
    assert (found.tested.tolist(), found.targets.tolist(), found.target_rows.tolist()) == ([0, 2, 3], [5, 7, 4], [4, 8, 11])
    assert found.dropped == {"interactions_after_the_test_target": 2}
    assert found.counts(9) == {
        "users": 4, "items": 9, "interactions": 10, "train_interactions": 4, "train_users": 2, "valid_users": 2, "test_users": 3,
    }  # fmt: skip
    assert found.kept_offsets.tolist() == [0, 5, 7, 8, 10]


def test_leave_one_out_is_what_it_was() -> None:
    found = leave_one_out(ragged([[1, 2, 3], [4, 5, 6, 7]]))
    assert (lists(found.train), lists(found.window)) == ([[1], [4, 5]], [[2], [6]])
    assert (found.tested.tolist(), found.targets.tolist()) == ([0, 1], [3, 7])
    assert found.counts(8) == {"users": 2, "items": 8, "interactions": 7, "train_interactions": 3}


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([[10, 11], [21, 22]], "no interaction lies before the valid cut"),
        ([[1, 2], [21, 22]], "between the two cuts"),
        ([[1, 2], [11, 19]], "at or after the test cut.*milliseconds"),
        ([[1, 11], [22, 21]], "goes back from 22 to 21"),
    ],
)
def test_what_cannot_be_cut_is_named(times: list[list[int]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        split([[1, 2], [3, 4]], times)


def test_cuts_in_the_wrong_order_and_missing_times_are_named() -> None:
    with pytest.raises(DataError, match="valid cut 20 is not before the test cut 10"):
        split([[1, 2]], [[1, 2]], Cuts(20, 10))
    with pytest.raises(DataError, match="no times"):
        split_by_time(ragged([[1, 2]]), None, CUTS)


# ------------------------------------------------------------------------------------------------- from raw reviews


def raw_events(seed: int = 3, users: int = 70, items: int = 30) -> list[tuple[str, str, int]]:
    """About 700 reviews over the cuts: of every ten users two are gone before the valid cut, two come after the test cut only."""
    rng = np.random.default_rng(seed)
    weights = 1 / (np.arange(items) + 3.0)
    events = []
    for user in range(users):
        low, high = {0: (-900, -1), 1: (-900, -1), 2: (340, 700), 3: (340, 700)}.get(user % 10, (-500, 600))
        for item in rng.choice(items, int(rng.integers(7, 13)), replace=False, p=weights / weights.sum()):
            time = AMAZON2023_CUTS.valid + int(rng.integers(low * DAY, high * DAY))
            if user % 10 == 5 and item % 4 == 0:  # an event at a cut's very moment lies after it
                time = AMAZON2023_CUTS.valid if item % 8 else AMAZON2023_CUTS.test
            events.append((f"u{user}", f"i{item}", time))
    rng.shuffle(events)
    return [(str(user), str(item), int(time)) for user, item, time in events]


def write_raw(folder: Path, events: list[tuple[str, str, int]]) -> Path:
    reviews = [{"user_id": user, "parent_asin": item, "asin": "v", "timestamp": time} for user, item, time in events]
    metadata = [{"parent_asin": item, "title": f"title of {item}"} for item in sorted({item for _, item, _ in events})]
    for kind, stem, records in (("review", CATEGORY, reviews), ("meta", f"meta_{CATEGORY}", metadata)):
        path = folder / f"{kind}_categories" / f"{stem}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def slow_histories(events: list[tuple[str, str, int]]) -> Histories:
    """Per user in order of time, then of the file; 5-core. Every pair is there once."""
    histories: Histories = {}
    for user, item, time in sorted(events, key=lambda event: event[2]):
        histories.setdefault(user, []).append((time, item))
    while True:
        count = Counter(item for rows in histories.values() for _, item in rows)
        smaller = {user: kept for user, rows in histories.items() if len(kept := [row for row in rows if count[row[1]] >= 5]) >= 5}
        if smaller == histories:
            return histories
        histories = smaller


class World:
    """The protocol once more, in source ids."""

    def __init__(self, events: list[tuple[str, str, int]]):
        histories = slow_histories(events)
        valid, test = AMAZON2023_CUTS.valid, AMAZON2023_CUTS.test
        self.train = {user: [item for time, item in rows if time < valid] for user, rows in histories.items()}
        self.window = {user: [item for time, item in rows if valid <= time < test] for user, rows in histories.items()}
        late = {user: [item for time, item in rows if time >= test] for user, rows in histories.items()}
        self.target = {user: items[0] for user, items in late.items() if items}
        self.total = sum(map(len, histories.values()))
        self.items = {item for rows in histories.values() for _, item in rows}
        by_hash = sorted(self.items, key=lambda name: hashlib.sha256(name.encode()).digest())
        self.number = {item: place for place, item in enumerate(by_hash)}
        self.count = Counter(item for items in self.train.values() for item in items)
        self.popular = sorted(self.items, key=lambda item: (-self.count[item], self.number[item]))

    def input(self, user: str) -> list[str]:
        return self.train[user] + self.window[user]

    def following(self, history: list[str]) -> list[str]:
        """What came after the last item in somebody's training part, then by popularity."""
        if not history:
            return self.popular
        pairs = Counter(b for items in self.train.values() for a, b in itertools.pairwise(items) if a == history[-1])
        return sorted(self.popular, key=lambda item: -pairs[item])  # stable: equal counts stay in order of popularity

    def ndcg_at_10(self, ranked: dict[str, list[str]], targets: dict[str, str]) -> float:
        ranks = [ranked[user].index(target) + 1 for user, target in targets.items()]
        return sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / len(ranks)


@pytest.fixture(scope="module")
def world() -> World:
    return World(raw_events())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with both domains of one raw file. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("time")
    raw = write_raw(folder / "raw", raw_events())
    for options in ([], ["--protocol", "time-v1"]):
        runner = CliRunner(env={"HARNESS_CARDS": str(folder)})  # there are no cards: this is not the real Video_Games
        done = runner.invoke(app, ["prepare", str(raw), CATEGORY, "--root", str(folder / "domains"), *options])
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def timed(root: Path) -> Path:
    return root / "domains" / "video_games_time"


def test_the_domain_is_the_slow_one(timed: Path, world: World) -> None:
    domain, private = Domain.read(timed / "public"), read_private(timed)
    assert domain.protocol == "time-v1"
    assert domain.info["cuts"] == {"valid": 1628643414042, "test": 1658002729837}
    assert set(private.item_ids) == world.items
    assert set(private.user_ids) == set(world.train)

    def named(rows: Ragged) -> list[list[str]]:
        return [[private.item_ids[item] for item in row] for row in rows]

    users = private.user_ids
    assert named(domain.train) == [world.train[user] for user in users]
    assert named(domain.window) == [world.window[user] for user in users]
    tested, validated = [users[row] for row in domain.test_users], [users[row] for row in domain.valid_users]
    assert tested == [user for user in users if user in world.target]
    assert validated == [user for user in users if world.window[user]]
    assert [private.item_ids[item] for item in private.targets] == [world.target[user] for user in tested]
    assert [private.item_ids[item] for item in domain.valid] == [world.window[user][0] for user in validated]
    assert named(domain.test_inputs()) == [world.input(user)[-20:] for user in tested]
    assert named(domain.valid_inputs()) == [world.train[user] for user in validated]
    # the world holds what the protocol must deal with
    assert any(not world.input(user) for user in tested)
    assert len(tested) < len(users)
    assert world.items - set(world.count) or any(not world.train[user] for user in validated)


def test_the_counts_say_who_is_where(timed: Path, world: World) -> None:
    summary = validate_domain(timed)
    kept = sum(len(world.input(user)) for user in world.train) + len(world.target)
    assert summary.counts == {
        "users": len(world.train), "items": len(world.items), "interactions": kept,
        "train_interactions": sum(map(len, world.train.values())), "train_users": sum(map(bool, world.train.values())),
        "valid_users": sum(map(bool, world.window.values())), "test_users": len(world.target),
    }  # fmt: skip
    assert read_private(timed).info["dropped"]["interactions_after_the_test_target"] == world.total - kept > 0
    assert summary.protocol == "time-v1"


def test_nothing_public_tells_what_comes_after_the_cut(root: Path, timed: Path, tmp_path: Path) -> None:
    """Other items and another number of events after the test cut, but the same users and catalogue: the same public part."""
    source = SourceDomain(
        user_ids=["a", "b", "c"],
        sequences=ragged([[0, 1, 2, 3], [1, 0, 3, 2], [3, 0]]),
        item_ids=list("ABCD"),
        times=np.array([1, 11, 20, 21, 2, 12, 25, 26, 3, 13]),
    )
    other = SourceDomain(
        user_ids=["a", "b", "c"],
        sequences=ragged([[0, 1, 3], [1, 0, 2, 3, 3], [3, 0]]),
        item_ids=list("ABCD"),
        times=np.array([1, 11, 29, 2, 12, 20, 21, 30, 3, 13]),
    )
    one = write_domain(tmp_path / "one", source, cuts=CUTS)
    two = write_domain(tmp_path / "two", other, cuts=CUTS)
    assert one.digest == two.digest
    users = [(tmp_path / name / "public" / "users.parquet").read_bytes() for name in ("one", "two")]
    assert users[0] == users[1]
    assert read_private(tmp_path / "one").targets.tolist() != read_private(tmp_path / "two").targets.tolist()


def test_the_protocol_enters_the_digest(tmp_path: Path) -> None:
    """Every user with one item between the cuts and one after: both protocols hold the same items, and are not the same domain."""
    source = SourceDomain(["a", "b"], ragged([[0, 1, 2], [2, 1, 0]]), list("ABC"), times=np.array([1, 11, 21] * 2))
    one, two = write_domain(tmp_path / "loo", source), write_domain(tmp_path / "time", source, cuts=CUTS)
    assert one.digest != two.digest
    assert lists(Domain.read(one.path / "public").test_inputs()) == lists(Domain.read(two.path / "public").test_inputs())


def carry_out(root: Path, folder: Path, entries: dict[str, str]) -> tuple[Paths, Plan, dict[str, Record]]:
    """Run methods (name -> configuration) on the domain. Records by method."""
    paths = lab.make_paths(folder, [])
    shutil.copytree(root / "domains", paths.data)
    if "slow" in entries:
        shutil.copytree(lab.FAKES / "slow", paths.methods[0] / "slow")
    paths = dataclasses.replace(paths, methods=(PROJECT / "baselines", *paths.methods))
    suite = Suite(
        name="by_time",
        title="By time",
        domains=("video_games_time",),
        protocol="time-v1",
        seeds=1,
        budget=BudgetFile(seconds=60),
        run=tuple(Entry(method=name, configs=(config,)) for name, config in entries.items()),
    )
    methods = find_methods(paths)
    plan = make_plan(suite, paths, methods, environment_digests(tuple(methods.values()), environment()), "cpu")
    lab.carry_out(plan, paths)
    return paths, plan, {record.method.name: record for record in read_records(paths.records).values()}


def test_popularity_and_last_item_score_what_the_slow_protocol_says(root: Path, world: World, tmp_path: Path) -> None:
    _, plan, records = carry_out(root, tmp_path, {"popularity": "default", "last_item": "default", "slow": "a"})
    inputs = {user: world.input(user) for user in world.target}
    firsts = {user: items[0] for user, items in world.window.items() if items}
    for name, ranked, validated in (
        ("popularity", dict.fromkeys(world.train, world.popular), dict.fromkeys(world.train, world.popular)),
        (
            "last_item",
            {user: world.following(inputs[user]) for user in inputs},
            {user: world.following(world.train[user]) for user in firsts},
        ),
    ):
        record = records[name]
        assert record.ok, record.status
        assert (record.protocol.version, record.metrics["ndcg_at_10"].n) == ("time-v1", len(world.target))
        assert record.metrics["ndcg_at_10"].mean == pytest.approx(world.ndcg_at_10(ranked, world.target), abs=1e-12)
        assert record.valid_metrics["ndcg_at_10"] == pytest.approx(world.ndcg_at_10(validated, firsts), abs=1e-12)
        edges = {"0": 0, "1": 1, "2-5": 5, "6-10": 10, "11-20": 20}
        bins = Counter(next(part for part, high in edges.items() if len(items) <= high) for items in inputs.values())
        assert {part: found.n for part, found in record.slices["history_length"].items() if found.n} == bins
        assert bins["0"] > 0
    # who does not say that it can is skipped, with the reason, and the table says under which protocol it is
    assert (records["slow"].status.state, records["slow"].protocol.version) == ("skipped", "time-v1")
    assert "cannot be run under time-v1" in records["slow"].status.reason
    table = build_table(plan, {record.run.id: record for record in records.values()})
    assert table.parts[0].title == "By time (protocol time-v1)"


def trained(root: Path, folder: Path, method: str, config: str) -> tuple[Domain, Record, np.ndarray, np.ndarray]:
    """A run's record and lists: of test users, of validation users."""
    paths, plan, records = carry_out(root, folder, {method: config})
    assert records[method].ok, records[method].status
    domain = Domain.read(paths.public("video_games_time"))
    out = stage_folder(paths, method, plan.runs[0].stages[-1]).out
    items_VK = read_predictions(out / PREDICTIONS, domain.test_users, domain.n_items)
    valid_VK = read_predictions(out / VALID_PREDICTIONS, domain.valid_users, domain.n_items)
    assert (domain.test_inputs().lengths == 0).any()
    return domain, records[method], items_VK, valid_VK


@pytest.mark.slow
@pytest.mark.parametrize(("method", "config"), [("recbole", "sasrec_small"), ("fmlprec", "small")])
def test_a_trained_method_gives_newcomers_the_most_popular_items(root: Path, tmp_path: Path, method: str, config: str) -> None:
    domain, record, items_VK, valid_VK = trained(root, tmp_path, method, config)
    new = domain.test_inputs().lengths == 0
    assert (items_VK[new] == domain.popular(50)).all()
    assert (items_VK[~new] != domain.popular(50)).any(1).all()
    assert record.training.best_valid == pytest.approx(ndcg_at_10(valid_VK, domain.valid), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "config"), [("tiger", "tiny"), ("letter", "tiny")])
def test_a_generative_method_writes_for_newcomers_from_nothing(root: Path, tmp_path: Path, method: str, config: str) -> None:
    """An empty history is read as the users' token alone, and the trie is that of all items: those of nobody yet, too."""
    domain, _, items_VK, valid_VK = trained(root, tmp_path, method, config)
    new = domain.test_inputs().lengths == 0
    for lists_VK in (items_VK, valid_VK):
        assert (np.sort(lists_VK[:, : domain.n_items]) == np.arange(domain.n_items)).all()  # every item once: there are fewer than K
    assert (items_VK[new] == items_VK[new][0]).all()
    assert (items_VK[~new] != items_VK[new][0]).any(1).mean() > 0.9


# ------------------------------------------------------------------------------------------------ cards, exports, misuse


def test_the_card_says_protocol_cuts_and_users(root: Path, timed: Path, world: World) -> None:
    card = make_card(timed, neighbours_of(timed))
    assert (card.protocol, card.overlap) == ("time-v1", [])  # the same data under another protocol is no neighbour
    assert card.cuts == {"valid": "2021-08-11 00:56:54 UTC", "test": "2022-07-16 20:18:49 UTC"}
    assert card.cold_targets == sum(world.count[item] == 0 for item in world.target.values())
    last = {user: world.input(user)[-1:] for user in world.target}
    pairs = {pair for items in world.train.values() for pair in itertools.pairwise(items)}
    assert card.targets_by_seen_transition == sum((*last[user], target) in pairs for user, target in world.target.items())
    assert card.history_bins["0"] == sum(not world.input(user) for user in world.target) > 0
    assert sum(card.history_bins.values()) == len(world.target)
    page = root / "card.html"
    said = CliRunner().invoke(app, ["card", "video_games_time", "--root", str(timed.parent), "--html", str(page)])
    assert said.exit_code == 0, said.output
    for words in ("protocol time-v1", "validation from", "2022-07-16 20:18:49 UTC", "users in training", "users in test"):
        assert words in said.output, words
    assert "validation from" in page.read_text()
    assert {domain.name: domain.protocol for domain in list_domains(timed.parent)} == {
        "video_games": "loo-v1",
        "video_games_time": "time-v1",
    }


def test_the_card_of_the_category_holds_before_the_cut(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """NAME_time is held to the card NAME with its whole histories; the card says nothing of the domain once it is cut."""
    monkeypatch.setenv("HARNESS_CARDS", str(tmp_path))
    counts = {"users": len(world.train), "items": len(world.items), "interactions": world.total}
    card = tmp_path / "video_games.json"
    card.write_text(json.dumps({"source": "a test", "counts": counts}))
    made = prepare_raw(root / "raw", CATEGORY, "video_games_time", root=tmp_path / "d", protocol="time-v1")
    require_expected(made.path)
    card.write_text(json.dumps({"source": "a test", "counts": {**counts, "interactions": world.total + 1}}))
    with pytest.raises(DataError, match=r"interactions: .* expected .*\(-1\)"):
        prepare_raw(root / "raw", CATEGORY, "video_games_time", root=tmp_path / "e", protocol="time-v1")
    assert not (tmp_path / "e" / "video_games_time").exists()


def test_an_export_is_refused_with_the_mend(timed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its protocol is time-v1; .* Export the loo-v1 domain"):
        export_domain(timed, "recbole", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_protocol_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'time-v2' is no protocol.*time-v1"):
        prepare_raw(root / "raw", CATEGORY, "x", root=tmp_path, protocol="time-v2")


def test_pictures_put_in_later_keep_the_protocol(timed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(timed, tmp_path / "video_games_time")
    before = validate_domain(folder)
    item = read_private(folder).item_ids[3]
    after = replace_pictures(folder, {item: b"not looked at here"}, {})
    assert after.digest != before.digest
    found = Domain.read(folder / "public")
    assert (found.protocol, found.pictures[3]) == ("time-v1", b"not looked at here")
    assert validate_domain(folder).counts == before.counts


@pytest.mark.parametrize("change", ["target of another user", "flag", "time"])
def test_a_damaged_domain_is_refused(timed: Path, tmp_path: Path, change: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = shutil.copytree(timed, tmp_path / "video_games_time")
    file, column = {
        "target of another user": ("private/targets.parquet", "user"), "flag": ("public/users.parquet", "test"),
        "time": ("private/targets.parquet", "time"),
    }[change]  # fmt: skip
    table = pq.read_table(folder / file)
    values = table[column].to_pylist()
    values[0] = {"user": next(u for u in range(99) if u not in values), "test": 1 - values[0], "time": values[0] + 1}[column]
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, table[column].type)), folder / file)
    with pytest.raises(DataError, match=r"import or simulate the domain again|prepare the domain again"):
        validate_domain(folder)
