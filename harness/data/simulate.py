"""The simulator: miniature raw files of Amazon Reviews 2023, and the domains that the real preparation makes of them.

In: a seed and sizes. Out: ``simulate_raw`` writes, for each of the nine categories,

    RAW/review_categories/CATEGORY.jsonl[.gz]       reviews with the fields of the 2023 release
    RAW/meta_categories/meta_CATEGORY.jsonl[.gz]    metadata, likewise
    RAW/benchmark/5core/last_out/CATEGORY.{train,valid,test}.csv[.gz]    what the authors' scripts make of the reviews
    RAW/pictures/CATEGORY/PARENT_ASIN.jpg           what a picture download would have left
    RAW/planted/CATEGORY.npz, .json                 the truth: oracle lists, histories, what was planted

and ``simulate`` runs ``prepare`` on them: domains ``sim_musical_instruments`` and so on, or under ``time-v1``
``sim_musical_instruments_time``. What is planted, and why the oracle is an upper bound, stands in ``planted.py``. Added as noise, which the preparation must remove: repeated and exact duplicate
reviews, users and items with at most four interactions, reviews without a user; kept by it: equal times, items
without text or picture, entities and tags in texts. The same seed gives the same bytes; a category looks the same
whether it is simulated alone or with others.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import PROTOCOL, TIME
from harness.data.domain import data_root, read_private, read_summary, write_domain
from harness.data.planted import Planted, Sample, check_sizes, draw, plant
from harness.data.prepare import cuts_of, default_name, read_raw
from harness.data.source import DataError, DomainSummary, SourceDomain
from harness.data.split import Cuts

CATEGORIES = {
    "Musical_Instruments": "Strap Capo Tuner Cable Stand Reed",
    "Industrial_and_Scientific": "Clamp Gauge Filament Beaker Bearing Valve",
    "Video_Games": "Controller Headset Cartridge Charger Console Grip",
    "Office_Products": "Stapler Binder Marker Folder Label Pen",
    "Arts_Crafts_and_Sewing": "Yarn Canvas Needle Brush Ribbon Bead",
    "Baby_Products": "Bottle Bib Blanket Stroller Teether Monitor",
    "CDs_and_Vinyl": "Album Single Record Concert Anthology Soundtrack",
    "Cell_Phones_and_Accessories": "Case Adapter Screen Holder Battery Earbud",
    "Software": "Editor Antivirus Course Planner Translator Suite",
}
"""The nine categories of the paper, with the product nouns of their simulated items."""

THEME_WORDS = (
    "oak walnut maple timber grain",
    "steel chrome iron alloy rivet",
    "linen cotton woven stitched canvas",
    "glass crystal clear prism lens",
    "leather hide saddle rugged tanned",
    "ocean wave coral sail tide",
    "forest moss fern pine meadow",
    "neon pixel laser retro arcade",
)
BRANDS = ("Acme", "Borealis", "Cobalt", "Dunmore", "Everly", "Fennick", "Grover", "Halden")
COLOURS = (
    (200, 30, 40),
    (30, 140, 50),
    (30, 60, 200),
    (230, 200, 30),
    (140, 50, 180),
    (20, 180, 190),
    (240, 120, 20),
    (110, 70, 30),
    (240, 120, 180),
    (50, 50, 60),
)
PHRASES = ("Works as described.", "Bought it twice.", "Not what I expected", "Great value &amp; fast delivery.", "ok")
START_MS = 1_514_764_800_000
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Catalogue:
    """Ids of one simulated category: items (planted rows first, then stray ones) and users."""

    items: list[str]
    users: list[str]


def sim_name(category: str, protocol: str = PROTOCOL) -> str:
    """The name of the simulated domain of a category: ``sim_video_games`` for ``Video_Games``, ``sim_video_games_time`` for ``time-v1``."""
    return "sim_" + default_name(category, protocol)


def simulate(
    root: Path | None = None,
    *,
    seed: int = 1,
    categories: Sequence[str] = tuple(CATEGORIES),
    users: int = 400,
    items: int = 160,
    raw: Path | None = None,
    protocol: str = PROTOCOL,
) -> list[DomainSummary]:
    """Simulate ``categories`` and prepare them as domains under ``root`` (default: the data root).

    What is there already, from the same code, seed and sizes, stays. ``raw`` keeps the raw files in that folder. Under ``time-v1`` the
    same histories are cut where four fifths and nine tenths of the domain's interactions have happened; such a domain has no oracle,
    because what is asked for is no longer the last step that the simulator took.
    """
    cuts_of(protocol)  # refuses one that does not exist
    root = root or data_root()
    recipe = {"simulator": _code_digest(), "seed": seed, "users": users, "items": items}
    found = {category: _made_by(root / sim_name(category, protocol), recipe) for category in _known(categories)}
    missing = [category for category, summary in found.items() if summary is None or raw]
    with tempfile.TemporaryDirectory() as temporary:
        folder = raw or Path(temporary)
        simulate_raw(folder, seed=seed, categories=missing, users=users, items=items)
        for category in missing:
            found[category] = _prepare(folder, category, root / sim_name(category, protocol), recipe, protocol)
    return [summary for summary in found.values() if summary]


def _prepare(raw: Path, category: str, folder: Path, recipe: dict[str, Any], protocol: str) -> DomainSummary:
    source, pictures = read_raw(raw, category)
    return write_domain(
        folder,
        replace(source, release=None, source={**source.source, **recipe}),
        pictures=pictures,
        simulated=True,
        oracle=_oracle(raw, category, source) if protocol == PROTOCOL else None,
        planted=json.loads((raw / "planted" / f"{category}.json").read_text()),
        overwrite=True,  # a simulated domain is derived: the newest simulator counts
        cuts=_late_cuts(source) if protocol == TIME else None,
    )


def _oracle(raw: Path, category: str, source: SourceDomain) -> np.ndarray:
    """The planted lists [U, K] in the order and the numbers of ``source``; -1 for an item that the preparation has removed."""
    with np.load(raw / "planted" / f"{category}.npz", allow_pickle=False) as truth:
        user_ids, item_ids, oracle = [str(u) for u in truth["users"]], [str(i) for i in truth["items"]], truth["oracle"]
    lists = dict(zip(user_ids, oracle, strict=True))
    row_of = {item: row for row, item in enumerate(source.item_ids)}
    rows = np.array([row_of.get(item, -1) for item in item_ids] + [-1])
    return np.stack([rows[lists[user]] for user in source.user_ids])


def _late_cuts(source: SourceDomain) -> Cuts:
    """Simulated times end before the moments at which the real release is cut."""
    assert source.times is not None
    valid, test = np.quantile(source.times, (0.8, 0.9), method="nearest")
    return Cuts(int(valid), int(test))


def _made_by(folder: Path, recipe: dict[str, Any]) -> DomainSummary | None:
    try:
        summary, source = read_summary(folder), read_private(folder).info["source"]
    except DataError:
        return None
    if not summary.simulated:
        raise DataError(f"{folder} is not a simulated domain; simulate into another folder (--root) or rename it")
    return summary if all(source.get(key) == value for key, value in recipe.items()) else None


def _code_digest() -> str:
    """What a simulated domain depends on: the code of this folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _known(categories: Sequence[str]) -> list[str]:
    for category in categories:
        if category not in CATEGORIES:
            raise DataError(f"unknown category {category!r}; known are {', '.join(CATEGORIES)}")
    return list(dict.fromkeys(categories))


# ---------------------------------------------------------------------------------------------------------- raw files


def simulate_raw(
    folder: Path,
    *,
    seed: int = 1,
    categories: Sequence[str] = tuple(CATEGORIES),
    users: int = 400,
    items: int = 160,
    compress: bool = True,
) -> None:
    """Write raw files of ``categories`` with ``users`` and ``items`` each (noise comes on top)."""
    for category in _known(categories):
        check_sizes(users, items)
        number = list(CATEGORIES).index(category) + 1
        model, sampling, noise, looks = (np.random.default_rng([seed, number, part]) for part in range(4))
        planted = plant(items, model, np.random.default_rng([seed, 0]))
        sample = draw(planted, users, sampling)
        stray, shallow = max(2, items // 20), max(2, users // 10)
        catalogue = Catalogue(_codes("B0", items + stray, 8, noise), _codes("A", users + shallow, 27, noise))
        ending = ".jsonl.gz" if compress else ".jsonl"
        reviews = _reviews(sample, catalogue, items, noise)
        _write_lines(folder / "review_categories" / (category + ending), reviews)
        _write_last_out(folder / "benchmark" / "5core" / "last_out", category, reviews, ".csv.gz" if compress else ".csv")
        records = _metadata(category, planted, catalogue, looks)
        _write_lines(folder / "meta_categories" / ("meta_" + category + ending), records)
        _draw_pictures(folder / "pictures" / category, planted, catalogue, looks)
        _write_truth(folder / "planted", category, planted, sample, catalogue)


def _codes(head: str, count: int, length: int, rng: np.random.Generator) -> list[str]:
    """Distinct random ids."""
    alphabet = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
    found: dict[str, None] = {}
    while len(found) < count:
        for letters in alphabet[rng.integers(0, len(alphabet), (count, length))]:
            found[head + "".join(letters)] = None
    return list(found)[:count]


def _reviews(sample: Sample, catalogue: Catalogue, n_items: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """All reviews of a category in order of the file: planted histories, then noise, shuffled; equal times keep their order."""
    events: list[tuple[int, int, int]] = []  # user, item, time
    for user, history in enumerate(sample.histories):
        steps = rng.integers(1, 60 * DAY_MS, len(history)) * (rng.random(len(history)) >= 0.15)  # 15 % of steps are ties
        times = START_MS + int(rng.integers(0, 1000 * DAY_MS)) + np.cumsum(steps)
        events += [(user, item, int(time)) for item, time in zip(history, times, strict=True)]
    planted = len(events)
    for user, item, time in [events[row] for row in rng.choice(planted, planted // 33, replace=False)]:
        events.append((user, item, time + int(rng.integers(1, 400 * DAY_MS))))  # reviewed again later
    events += [events[row] for row in rng.choice(planted, planted // 100, replace=False)]  # the very same line again
    for stray in range(n_items, len(catalogue.items)):
        for user in rng.choice(len(sample.histories), int(rng.integers(1, 5)), replace=False):
            events.append((int(user), stray, START_MS + int(rng.integers(0, 1000 * DAY_MS))))
    for shallow in range(len(sample.histories), len(catalogue.users)):
        for item in rng.choice(n_items, int(rng.integers(1, 5)), replace=False):
            events.append((shallow, int(item), START_MS + int(rng.integers(0, 1000 * DAY_MS))))
    place = rng.permutation(len(events))
    tied: dict[tuple[int, int], list[int]] = {}
    for row, (user, _, time) in enumerate(events):
        tied.setdefault((user, time), []).append(row)
    for rows in tied.values():
        place[rows] = np.sort(place[rows])
    lines = [_review(events[row], catalogue, rng) for row in np.argsort(place)]
    for row in rng.choice(len(lines), 3, replace=False):
        lines.append({key: value for key, value in lines[row].items() if key != "user_id"})
    return lines


def _review(event: tuple[int, int, int], catalogue: Catalogue, rng: np.random.Generator) -> dict[str, Any]:
    user, item, time = event
    variant, rating, phrase, helpful = (int(value) for value in rng.integers(0, (10, 5, len(PHRASES), 4)))
    parent = catalogue.items[item]
    return {
        "rating": float(rating + 1),
        "title": PHRASES[phrase][:20],
        "text": PHRASES[phrase],
        "images": [],
        "asin": parent if variant else "B1" + parent[2:],  # a variant of the product: only parent_asin counts
        "parent_asin": parent,
        "user_id": catalogue.users[user],
        "timestamp": time,
        "helpful_vote": helpful,
        "verified_purchase": bool(variant),
    }


def _metadata(category: str, planted: Planted, catalogue: Catalogue, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Metadata in random order. Of the planted items 2 % have no record and 3 % one without text; one record comes twice."""
    nouns = CATEGORIES[category].split()
    records = []
    for row, parent in enumerate(catalogue.items):
        if row % 50 == 49 and row < planted.n_items:
            continue
        theme = THEME_WORDS[planted.theme_I[row] if row < planted.n_items else 0].split()
        words = [theme[word] for word in rng.permutation(len(theme))]
        noun, brand = nouns[int(rng.integers(len(nouns)))], BRANDS[int(rng.integers(len(BRANDS)))]
        silent = row % 33 == 32
        image = {size: f"https://images.invalid/{size}/{parent}.jpg" for size in ("thumb", "large", "hi_res")}
        records.append(
            {
                "main_category": category.replace("_", " "),
                "title": "" if silent else f"{brand} {words[0].title()} &amp; {words[1].title()} {noun}",
                "average_rating": round(float(rng.uniform(2, 5)), 1),
                "rating_number": int(rng.integers(1, 5000)),
                "features": [] if silent else [f"{words[2].title()} finish", f"<b>{words[3]}</b> look"],
                "description": [] if silent else [f"A {words[4]} {noun.lower()}<br />made by {brand}.", "\tReady\u200b to use\n"],
                "price": round(float(rng.uniform(3, 90)), 2) if rng.random() < 0.7 else None,
                "images": [{**image, "variant": "MAIN" if row % 7 else "PT01"}],
                "videos": [],
                "store": None if silent else brand,
                "categories": [] if silent else [category.replace("_", " "), noun + "s"],
                "details": {"Item model number": parent[-4:]},
                "parent_asin": parent,
                "bought_together": None,
            }
        )
    records.append({**records[0], "title": "The same item, listed again"})
    first, *rest = records
    return [first, *(rest[row] for row in rng.permutation(len(rest)))]


def _draw_pictures(folder: Path, planted: Planted, catalogue: Catalogue, rng: np.random.Generator) -> None:
    """A coloured shape a product: the colour is planted, shape and size are not. 8 % have none; one file is truncated."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, parent in enumerate(catalogue.items[: planted.n_items]):
        data = product_picture(COLOURS[planted.colour_I[row]], rng)
        if row % 12 != 11:
            (folder / f"{parent}.jpg").write_bytes(data[: len(data) // 2] if row == 0 else data)


def product_picture(colour: tuple[int, int, int], rng: np.random.Generator, side: int = 64) -> bytes:
    """A JPEG of a circle, square or triangle of this colour on a light ground."""
    from PIL import Image, ImageDraw

    ground, shade = (int(value) for value in rng.integers(215, 256, 2))
    picture = Image.new("RGB", (side, side), (ground, shade, ground))
    x, y = (int(value) for value in rng.integers(side // 8, side // 3, 2))
    size, shape = int(rng.integers(side // 3, side // 2)), int(rng.integers(3))
    fill = tuple(int(value) for value in np.clip(np.array(colour) + rng.integers(-15, 16, 3), 0, 255))
    pen = ImageDraw.Draw(picture)
    if shape == 0:
        pen.ellipse((x, y, x + size, y + size), fill=fill)
    elif shape == 1:
        pen.rectangle((x, y, x + size, y + size), fill=fill)
    else:
        pen.polygon(((x, y + size), (x + size, y + size), (x + size // 2, y)), fill=fill)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(record) + "\n" for record in records))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data, 1, mtime=0) if path.suffix == ".gz" else data)


def _write_last_out(folder: Path, category: str, reviews: list[dict[str, Any]], ending: str) -> None:
    """The files of the release's own scripts: sorted, repeats out, 5-core, the last two interactions of a user apart.

    One step after the other with dictionaries, as it is done there; the preparation does not share a line with it.
    """
    by_user: dict[str, list[dict[str, Any]]] = {}
    for review in reviews:
        if "user_id" in review:
            by_user.setdefault(review["user_id"], []).append(review)
    for user, rows in by_user.items():
        first: dict[str, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: row["timestamp"]):
            first.setdefault(row["parent_asin"], row)
        by_user[user] = list(first.values())
    size = -1
    while size != (size := sum(map(len, by_user.values()))):
        count = Counter(row["parent_asin"] for rows in by_user.values() for row in rows)
        by_user = {user: [row for row in rows if count[row["parent_asin"]] >= 5] for user, rows in by_user.items() if len(rows) >= 5}
    lines: dict[str, list[str]] = {split: ["user_id,parent_asin,rating,timestamp\n"] for split in ("train", "valid", "test")}
    for rows in by_user.values():
        for split, part in (("train", rows[:-2]), ("valid", rows[-2:-1]), ("test", rows[-1:])):
            lines[split] += [f"{row['user_id']},{row['parent_asin']},{row['rating']},{row['timestamp']}\n" for row in part]
    for split, text in lines.items():
        _write(folder / f"{category}.{split}{ending}", "".join(text))


def _write_truth(folder: Path, category: str, planted: Planted, sample: Sample, catalogue: Catalogue) -> None:
    """What only the private part may know. ``oracle`` holds rows of ``items``."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    users, items = catalogue.users[: len(sample.histories)], catalogue.items[: planted.n_items]
    np.savez_compressed(folder / f"{category}.npz", users=np.array(users), items=np.array(items), oracle=sample.oracle_UK)
    truth = {
        **planted.describe(),
        "theme_words": list(THEME_WORDS),
        "items": {
            item: {"theme": int(theme), "colour": int(colour), "successors": [items[after] for after in successors]}
            for item, theme, colour, successors in zip(items, planted.theme_I, planted.colour_I, planted.successors_I3, strict=True)
        },
        "users": {user: {"taste": int(taste)} for user, taste in zip(users, sample.taste_U, strict=True)},
    }
    (folder / f"{category}.json").write_text(json.dumps(truth, indent=1) + "\n")
