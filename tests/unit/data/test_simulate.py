"""The simulator: what is planted survives the real preparation, and the oracle is what it says."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from harness.contract import Domain
from harness.data.domain import DataError, list_domains, read_private, validate_domain, write_domain
from harness.data.planted import SUCCESSORS, WEIGHTS, draw, plant
from harness.data.prepare import read_raw
from harness.data.simulate import CATEGORIES, COLOURS, sim_name, simulate, simulate_raw

FOUR = list(CATEGORIES)[:4]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, categories=FOUR)
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    simulate_raw(folder, categories=["Software"])
    return folder


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


# ------------------------------------------------------------------------------------------ hand-made methods to compare


def ranked(scores_UI: np.ndarray) -> np.ndarray:
    return np.argsort(-scores_UI, axis=1, kind="stable")[:, :50]


def hand_made(folder) -> dict[str, np.ndarray]:
    """Lists of simple methods. The last two use what an honest method may use, in the best way we know."""
    domain = Domain.read(folder / "public")
    shape = (domain.n_users, domain.n_items)
    popularity = np.bincount(domain.train.values, minlength=domain.n_items).astype(float)
    inputs, targets = domain.training_rows()
    pairs = np.zeros((domain.n_items, domain.n_items))
    np.add.at(pairs, (np.array([items[-1] for items in inputs]), targets), 1.0)
    together = np.zeros_like(pairs)
    for items in domain.train:
        together[np.ix_(items, items)] += 1
    seen = np.zeros(shape, bool)
    last = domain.valid
    tastes = np.zeros(shape)
    for user, items in enumerate(domain.test_inputs()):
        seen[user, items] = True
        tastes[user] = together[items].sum(0)
    small = popularity / popularity.sum() / 10
    smooth = pairs[last] / np.maximum(pairs[last].sum(1, keepdims=True), 1) + small
    lists = {
        "random": np.random.default_rng(0).random(shape),
        "popularity": np.broadcast_to(popularity, shape),
        "last_item": pairs[last] + small,
        "last_item without history": np.where(seen, -1.0, smooth),
        "blend": np.where(seen, -1.0, smooth + 0.3 * tastes / tastes.sum(1, keepdims=True)),
    }
    return {name: ranked(scores) for name, scores in lists.items()}


def measures(lists_UK: np.ndarray, targets_U: np.ndarray) -> dict[str, np.ndarray]:
    hit = lists_UK == targets_U[:, None]
    rank = np.where(hit.any(1), hit.argmax(1) + 1, 1000)
    return {"recall_at_10": (rank <= 10) * 1.0, "ndcg_at_10": (rank <= 10) / np.log2(rank + 1), "mrr_at_50": (rank <= 50) / rank}


def test_baselines_stand_in_the_right_order(root):
    found: dict[str, list[float]] = {}
    for category in FOUR:
        folder = root / sim_name(category)
        private = read_private(folder)
        for name, lists in {**hand_made(folder), "oracle": private.oracle}.items():
            found.setdefault(name, []).append(float(measures(lists, private.targets)["recall_at_10"].mean()))
    for worse, better in (("random", "popularity"), ("popularity", "last_item"), ("last_item", "oracle")):
        assert all(b > w + 0.03 for w, b in zip(found[worse], found[better], strict=True)), (worse, better, found)


def test_no_method_beats_the_oracle(root):
    for category in FOUR:
        folder = root / sim_name(category)
        private = read_private(folder)
        oracle = measures(private.oracle, private.targets)
        for name, lists in hand_made(folder).items():
            for metric, values in measures(lists, private.targets).items():
                gain = values - oracle[metric]
                assert gain.mean() <= 1.96 * gain.std() / np.sqrt(len(gain)), (category, name, metric)


def test_signal_is_in_text_picture_and_taste():
    """Each planted part adds to what can be known: without it the expected recall of the best list falls."""
    planted = plant(150, np.random.default_rng(1), np.random.default_rng(0))
    sample = draw(planted, 2000, np.random.default_rng(2))
    prefixes = [history[:-1] for history in sample.histories]
    truth = planted.probability(prefixes, sample.taste_U)

    def best(view) -> float:
        return float(np.take_along_axis(truth, ranked(view.probability(prefixes, sample.taste_U))[:, :10], 1).sum(1).mean())

    whole = best(planted)
    flat = np.full((1, 150), 1 / 150)
    blind = {
        "text": replace(planted, by_theme_TI=np.repeat(flat, len(planted.by_theme_TI), 0)),
        "picture": replace(planted, by_colour_CI=np.repeat(flat, len(planted.by_colour_CI), 0)),
        "taste": replace(planted, by_taste_ZI=np.repeat(flat, len(planted.by_taste_ZI), 0)),
        "transition": replace(planted, successors_I3=(np.arange(150)[:, None] + np.arange(1, 4)) % 150),
    }
    for part, view in blind.items():
        assert best(view) < whole - 0.02, part


# --------------------------------------------------------------------------------------------------- the explicit model


def test_probability_is_what_the_docstring_says():
    planted = plant(60, np.random.default_rng(3), np.random.default_rng(0))
    history, taste = [5, 9, 17], 2
    expected = np.zeros(60)
    for j in range(60):
        if j in history:
            continue
        for place, share in enumerate(SUCCESSORS):
            expected[j] += WEIGHTS["transition"] * share * (planted.successors_I3[17, place] == j)
        weight = planted.popularity_I
        follows = planted.theme_I == planted.theme_next_T[planted.theme_I[17]]
        colour = planted.colour_I == planted.colour_I[17]
        expected[j] += WEIGHTS["text"] * follows[j] * weight[j] / weight[follows].sum()
        expected[j] += WEIGHTS["picture"] * colour[j] * weight[j] / weight[colour].sum()
        expected[j] += WEIGHTS["taste"] * planted.by_taste_ZI[taste, j] + WEIGHTS["popularity"] * weight[j]
    found = planted.probability([history], np.array([taste]))[0]
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    np.testing.assert_allclose(planted.score(np.arange(60), np.zeros(60, int)).sum(1), 1)


def test_test_items_follow_the_probability():
    """The share of users whose test item is among the oracle's first k equals the probability of these, summed."""
    planted = plant(100, np.random.default_rng(4), np.random.default_rng(0))
    sample = draw(planted, 6000, np.random.default_rng(5))
    chance = planted.probability([history[:-1] for history in sample.histories], sample.taste_U)
    target = np.array([history[-1] for history in sample.histories])
    for k in (1, 5, 10, 50):
        top = sample.oracle_UK[:, :k]
        expected = np.where(top >= 0, np.take_along_axis(chance, np.maximum(top, 0), 1), 0).sum(1)
        found = (top == target[:, None]).any(1)
        assert abs(found.mean() - expected.mean()) < 4 * np.sqrt((expected * (1 - expected)).sum()) / len(target)
        best = np.sort(chance, axis=1)[:, ::-1][:, :k].sum(1)
        np.testing.assert_allclose(expected, best)  # no other list of k items holds more probability


def test_histories_keep_what_the_upper_bound_needs():
    sample = draw(plant(120, np.random.default_rng(6), np.random.default_rng(0)), 200, np.random.default_rng(7))
    known = Counter(item for history in sample.histories for item in history[:-1])
    assert min(known.values()) >= 5
    assert len(known) == 120
    assert all(len(set(history)) == len(history) >= 6 for history in sample.histories)
    assert not any(item in history[:-1] for history, items in zip(sample.histories, sample.oracle_UK, strict=True) for item in items)


# --------------------------------------------------------------------------------------------- through the preparation


def test_preparation_returns_the_planted_histories(raw):
    planted = plant(160, np.random.default_rng([1, 9, 0]), np.random.default_rng([1, 0]))  # Software is number nine, seed 1
    sample = draw(planted, 400, np.random.default_rng([1, 9, 1]))
    source, _ = read_raw(raw, "Software")
    with np.load(raw / "planted" / "Software.npz") as truth:
        users, items = truth["users"].tolist(), truth["items"].tolist()
    expected = {user: [items[row] for row in history] for user, history in zip(users, sample.histories, strict=True)}
    found = {user: [source.item_ids[row] for row in source.sequences[place]] for place, user in enumerate(source.user_ids)}
    assert found == expected
    assert set(source.item_ids) == set(items)


def test_raw_files_hold_what_the_preparation_must_stand(raw):
    reviews = lines(raw / "review_categories" / "Software.jsonl.gz")
    metadata = lines(raw / "meta_categories" / "meta_Software.jsonl.gz")
    assert set(reviews[0]) == {
        "rating", "title", "text", "images", "asin", "parent_asin", "user_id", "timestamp", "helpful_vote", "verified_purchase",
    }  # fmt: skip
    assert {"main_category", "features", "description", "images", "store", "categories", "details", "parent_asin"} <= set(metadata[0])
    assert set(metadata[0]["images"][0]) == {"thumb", "large", "hi_res", "variant"}
    complete = [row for row in reviews if "user_id" in row]
    pairs = Counter((row["user_id"], row["parent_asin"]) for row in complete)
    assert sum(count > 1 for count in pairs.values()) > 50  # repeated items
    assert len({json.dumps([row[key] for key in ("user_id", "parent_asin", "timestamp")]) for row in complete}) < len(complete)
    source, pictures = read_raw(raw, "Software")
    assert all(source.dropped[key] > 0 for key in source.dropped if key != "metadata_fields_of_wrong_type")
    titles = [title for title in source.columns["title"].to_pylist() if title]
    assert 0.9 < len(titles) / 160 < 1
    assert 0.85 < len(pictures) / 160 < 0.95
    counts = np.sort(np.bincount(source.sequences.values))[::-1]
    assert counts[:16].sum() > 2.5 * 16 / 160 * counts.sum()  # popularity is skewed


def test_domains_are_complete(root):
    for category in FOUR:
        summary = validate_domain(root / sim_name(category))
        assert summary.simulated
        assert summary.release is None
        assert 0.05 < summary.tie_rate < 0.3
        assert (summary.counts["users"], summary.counts["items"]) == (400, 160)
        domain, private = Domain.read(summary.path / "public"), read_private(summary.path)
        assert private.oracle.shape == (400, 50)
        planted = json.loads((summary.path / "private" / "planted.json").read_text())
        assert set(planted["items"]) == set(private.item_ids)
        assert "planted.json" not in [file.name for file in (summary.path / "public").iterdir()]
        for item, name in enumerate(private.item_ids):
            data = domain.pictures[item]
            if data is None:
                continue
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3).astype(int)
            distance = np.stack([np.abs(pixels - colour).sum(1) for colour in COLOURS])
            seen = int(np.bincount(distance.argmin(0)[distance.min(0) < 90], minlength=len(COLOURS)).argmax())
            assert seen == planted["items"][name]["colour"]  # the planted colour is what the picture shows
            words = planted["theme_words"][planted["items"][name]["theme"]].split()
            text = domain.texts[item].lower()
            assert not text or sum(word in text.split() for word in words) >= 2


def test_same_seed_same_bytes(tmp_path):
    for name, categories in (("a", ["Software", "Video_Games"]), ("b", ["Video_Games"])):
        simulate_raw(tmp_path / name, categories=categories, users=60, items=50)
        simulate(tmp_path / ("domains_" + name), categories=categories, users=60, items=50)
    raw_files = [file for file in (tmp_path / "a").rglob("*") if file.is_file() and "Video_Games" in str(file)]
    assert len(raw_files) > 40
    for file in raw_files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file
    one, two = (tmp_path / f"domains_{name}" / "sim_video_games" for name in "ab")
    for file in one.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (two / file.relative_to(one)).read_bytes(), file
    other = simulate(tmp_path / "c", seed=2, categories=["Video_Games"], users=60, items=50)[0]
    assert other.digest != validate_domain(one).digest


def test_what_is_there_stays(tmp_path):
    settings = {"categories": ["Software"], "users": 60, "items": 50}
    first = simulate(tmp_path, **settings)[0]
    written = (first.path / "public" / "domain.json").stat().st_mtime_ns
    again = simulate(tmp_path, **settings)[0]
    assert not again.created
    assert (first.path / "public" / "domain.json").stat().st_mtime_ns == written
    assert simulate(tmp_path, **{**settings, "seed": 5})[0].created  # other settings replace it
    assert [domain.name for domain in list_domains(tmp_path)] == ["sim_software"]


def test_a_real_domain_is_never_replaced(tmp_path, source):
    write_domain(tmp_path / "sim_software", source)
    with pytest.raises(DataError, match="not a simulated domain"):
        simulate(tmp_path, categories=["Software"], users=60, items=50)
    assert validate_domain(tmp_path / "sim_software").counts["items"] == 6


def test_wrong_sizes_and_names(tmp_path):
    with pytest.raises(DataError, match="unknown category 'Games'"):
        simulate(tmp_path, categories=["Games"])
    for sizes in ({"users": 39, "items": 40}, {"users": 100, "items": 20}, {"users": 60, "items": 61}):
        with pytest.raises(DataError, match="cannot simulate"):
            simulate(tmp_path, categories=["Software"], **sizes)


def test_cut_by_time_the_histories_are_the_same(tmp_path):
    settings = {"categories": ["Software"], "users": 60, "items": 50}
    whole, cut = simulate(tmp_path, **settings)[0], simulate(tmp_path, **settings, protocol="time-v1")[0]
    assert (cut.name, cut.protocol) == ("sim_software_time", "time-v1")
    assert whole.path.exists() and cut.path != whole.path
    domain, private = Domain.read(cut.path / "public"), read_private(cut.path)
    assert private.oracle is None
    assert (private.user_ids, private.item_ids) == (read_private(whole.path).user_ids, read_private(whole.path).item_ids)
    interactions = cut.counts["interactions"] + private.info["dropped"]["interactions_after_the_test_target"]
    assert interactions == whole.counts["interactions"]
    assert len(domain.train.values) == pytest.approx(0.8 * interactions, rel=0.02)
    assert not simulate(tmp_path, **settings, protocol="time-v1")[0].created
    with pytest.raises(DataError, match="is no protocol"):
        simulate(tmp_path, **settings, protocol="time")
