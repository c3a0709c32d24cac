"""Fixtures for tests of methods: small domains and a runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.baselines.running import Runner, SmallDomain, markov_histories, write_domain


@pytest.fixture
def make_domain(tmp_path: Path) -> Callable[[list[list[int]], int], SmallDomain]:
    """Whole histories -> a domain on disk, without item text."""

    def make(histories: list[list[int]], n_items: int) -> SmallDomain:
        path = tmp_path / f"domain{len(list(tmp_path.iterdir()))}" / "public"
        return SmallDomain(path, write_domain(path, histories, n_items), len(histories), n_items)

    return make


@pytest.fixture(scope="session")
def small_domain(tmp_path_factory: pytest.TempPathFactory) -> SmallDomain:
    """80 users, 120 items, with category, brand and title; some items without text. Chance recall@10 is 0.083."""
    n_users, n_items = 80, 120
    path = tmp_path_factory.mktemp("domain") / "public"
    texts: list[dict[str, str | None]] = []
    for item in range(n_items):
        title, brand, category = f"Thing {item} of kind {item % 7}", f"Brand {item % 5}", f"Root > Kind {item % 7}"
        row = {"text": f"{title} {brand} {category}", "title": title, "brand": brand, "categories": category}
        texts.append(dict.fromkeys(row) if item % 11 == 0 else row)
    targets = write_domain(path, markov_histories(n_users, n_items), n_items, texts)
    return SmallDomain(path, targets, n_users, n_items)


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runs"))
