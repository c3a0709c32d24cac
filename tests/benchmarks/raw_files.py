"""A file pair at the size of a real category: reviews and metadata with the fields, lengths and repetition of the 2023 release.

In: how many reviews and records. Out: CATEGORY.jsonl and meta_CATEGORY.jsonl, and with ``gz`` the same gzipped (level 6, as published).
Shapes of Office_Products: 12.8 million reviews by 7.6 million users (most with one review, some with hundreds), 710,000 items,
lines of 300 to 700 bytes (text of 170 in the median, some of thousands), 3 % repeats, 15 % of a user's reviews at the time of the one
before, words beyond ASCII in every other line; metadata of 2 KB a record. At that size the 5-core keeps 217,000 users, 139,000 items and
2.6 million interactions (Office_Products: 223,308, 77,551 and 1.8 million); gzip makes the files a third (there about as much).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.random import Generator

CATEGORY = "Office_Products"
SLICE = 200_000
LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", np.uint8)
WORDS = 30_000
BODIES = 200_000
FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


def write_pair(folder: Path, reviews: int, items: int | None = None, *, gz: bool = True, seed: int = 0) -> None:
    """``folder/review_categories/CATEGORY.jsonl[.gz]`` and ``folder/meta_categories/meta_CATEGORY.jsonl[.gz]``; both kinds with ``gz``."""
    rng = np.random.default_rng(seed)
    n_items = items or max(reviews // 18, 50)
    item_ids = _ids(rng, n_items, 8, "B0")
    text = _text(rng)
    _write(folder / "review_categories" / f"{CATEGORY}.jsonl", _reviews(rng, reviews, item_ids, text), gz)
    _write(folder / "meta_categories" / f"meta_{CATEGORY}.jsonl", _records(rng, item_ids, text), gz)


def _write(path: Path, lines: Iterable[str], gz: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for part in lines:
            file.write(part)
    if gz:
        subprocess.run(["gzip", "-6", "-k", "-f", str(path)], check=True)


def _ids(rng: Generator, count: int, length: int, head: str) -> list[str]:
    width = LETTERS[rng.integers(0, 32, (count, length))]
    return [head + row.tobytes().decode() for row in np.ascontiguousarray(width)]


def _text(rng: Generator) -> str:
    """Eight million letters of words by Zipf's law; some are not ASCII, quotes and line ends are escaped as in a file."""
    lengths = rng.integers(2, 10, WORDS)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjxqz"))
    weights = 1 / np.arange(3, 29)
    words = ["".join(rng.choice(letters, length, p=weights / weights.sum())) for length in lengths]
    for row in range(0, WORDS, 97):
        words[row] = ("caf\u00e9", "it\u2019s", '\\"good\\"', "end.\\n\\n", "10/10!")[row % 5]
    chance = 1 / (np.arange(WORDS) + 4.0) ** 1.15
    return " ".join(words[row] for row in rng.choice(WORDS, 1_400_000, p=chance / chance.sum()))


def _reviews(rng: Generator, count: int, item_ids: list[str], text: str) -> Iterator[str]:
    """Lines of reviews, in slices. The first half of a line is one of BODIES, far enough apart for gzip not to see it again."""
    n_users = int(count * 0.594)
    activity = np.minimum(rng.zipf(2.5, n_users), 400)
    user = np.repeat(np.arange(n_users), activity)
    user = rng.permutation(np.concatenate([user, rng.integers(0, n_users, max(count - len(user), 0))]))[:count]
    popularity = 1 / (np.arange(len(item_ids)) + 60.0) ** 0.85
    item = rng.choice(len(item_ids), count, p=popularity / popularity.sum())
    order = np.argsort(user, kind="stable")
    after = np.diff(user[order]) == 0
    repeat = np.flatnonzero(after & (rng.random(count - 1) < 0.03)) + 1
    item[order[repeat]] = item[order[repeat - 1]]
    time = 1_300_000_000_000 + rng.integers(0, 4 * 10**11, count)
    tied = np.flatnonzero(after & (rng.random(count - 1) < 0.15)) + 1
    time[order[tied]] = time[order[tied - 1]]
    bodies = _bodies(rng, min(count, BODIES), text)
    ends = [f', "helpful_vote": {n // 2}, "verified_purchase": {"true" if n % 9 else "false"}}}\n' for n in range(20)]
    for at in range(0, count, SLICE):
        rows = slice(at, at + SLICE)
        users, items, times = _user_ids(user[rows]), [item_ids[row] for row in item[rows].tolist()], time[rows].tolist()
        body, end = rng.integers(0, len(bodies), len(times)).tolist(), rng.integers(0, len(ends), len(times)).tolist()
        yield "".join(
            f'{bodies[b]}"asin": "{i}", "parent_asin": "{i}", "user_id": "{u}", "timestamp": {t}{ends[e]}'
            for b, i, u, t, e in zip(body, items, users, times, end, strict=True)
        )


def _bodies(rng: Generator, count: int, text: str) -> list[str]:
    start = rng.integers(0, len(text) - 6000, count).tolist()
    length = np.clip(rng.lognormal(5.1, 0.95, count), 2, 5000).astype(int).tolist()
    bodies = []
    for number, (at, size) in enumerate(zip(start, length, strict=True)):
        picture = f'{{"small_image_url": "https://m.example/{at}._SL256_.jpg", "attachment_type": "IMAGE"}}' if number % 20 == 0 else ""
        title, said = _cut(text, at + 50, 4 + at % 36), _cut(text, at, size)
        bodies.append(f'{{"rating": {at % 5 + 1}.0, "title": "{title}", "text": "{said}", "images": [{picture}], ')
    return bodies


def _user_ids(numbers: np.ndarray) -> list[str]:
    """28 characters that look random, the same for the same number."""
    mixed = [(numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(factor) for factor in FACTORS]
    mixed = [value ^ value >> np.uint64(29) for value in mixed]
    letters = np.stack([value >> np.uint64(5 * place) & np.uint64(31) for value in mixed for place in range(3, 12)], axis=1)
    return [f"A{name.decode()}" for name in np.ascontiguousarray(LETTERS[letters]).view("S27")[:, 0].tolist()]


def _cut(text: str, start: int, length: int) -> str:
    """A piece that does not begin or end inside an escape."""
    return text[start : start + length].strip('\\n"').replace('"', "").replace("\\", "")


def _records(rng: Generator, item_ids: list[str], text: str) -> Iterator[str]:
    for at in range(0, len(item_ids), 10_000):
        lines = []
        for row in rng.permutation(np.arange(at, min(at + 10_000, len(item_ids)))).tolist():
            s = [int(value) for value in rng.integers(0, len(text) - 6000, 8)]
            n = [int(value) for value in np.clip(rng.lognormal(4.6, 0.7, 6), 10, 3000)]
            picture = {size: f"https://m.example/images/I/{s[0]:x}{row:x}._{size}_.jpg" for size in ("thumb", "large", "hi_res")}
            record = {
                "main_category": "Office Products",
                "title": _cut(text, s[0], 20 + n[0] % 150),
                "average_rating": 4.3,
                "rating_number": s[1] % 5000,
                "features": [_cut(text, place, length) for place, length in zip(s[1:6], n[1:6], strict=True)],
                "description": [_cut(text, s[6], 3 * n[0])],
                "price": None if s[2] % 3 else 12.5,
                "images": [picture | {"variant": "MAIN" if not number else f"PT0{number}"} for number in range(s[3] % 5 + 1)],
                "videos": [],
                "store": _cut(text, s[7], 12),
                "categories": ["Office Products", _cut(text, s[4], 20), _cut(text, s[5], 15)],
                "details": {"Manufacturer": _cut(text, s[6], 15), "Item model number": f"{row:x}", "Color": "Black"},
                "parent_asin": item_ids[row],
                "bought_together": None,
            }
            lines.append(json.dumps(record) + "\n")
        yield "".join(lines)
