"""What the simulator plants: an explicit model of the next item, its samples, and the oracle.

The next item j of a user with last item i, hidden taste z and history H is drawn from

    p(j | i, z, H)  =  [j not in H] * score(j | i, z) / (sum of score over the items not in H)
    score(j | i, z) =  0.30 * transition(j | i)    three successors of the item, known from other users' histories only
                     + 0.20 * text(j | i)          items whose theme follows the theme of i; themes are words of the text
                     + 0.20 * picture(j | i)       items of the colour of i; colours are seen in pictures only
                     + 0.20 * taste(j | z)         the items that a group of users likes; only a whole history hints at z
                     + 0.10 * popularity(j)

where each part is a distribution over all items, weighted by popularity inside. The order of themes and the colour
rule hold in all domains, so that a model trained on some domains can use them in another; successors, tastes and
popularity belong to one domain.

**The oracle is an upper bound.** The test item of every user is drawn last, after all other interactions of all users are
fixed, from exactly p(. | x_(n-1), z, H). Given everything that a method could ever know (all training and validation
items, all parameters, even z), the test items are independent and distributed by p. Recall, NDCG and MRR give a list
the sum of a weight that falls with the rank, so ranking by p has the highest expectation that any list can have. A
method can beat the oracle's value on one sample by chance only. For this to survive the preparation, it must
neither remove nor reorder anything of a planted history:

* x_1..x_(n-1) of all users together hold every item at least five times (rare items are put in front of histories
  before the test items are drawn), and every user has at least five items: the 5-core leaves planted histories alone
  whatever the test items are;
* a history never repeats an item, and the repeated reviews added later are later than the first one of the same item;
* users and items added as noise have at most four interactions: the first round of the 5-core removes them.

In: seed, sizes. Out: ``Planted`` (parameters) and ``Sample`` (histories as item rows, tastes, oracle lists).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.contract import K
from harness.data.source import DataError

WEIGHTS = {"transition": 0.30, "text": 0.20, "picture": 0.20, "taste": 0.20, "popularity": 0.10}
THEMES = 8
COLOURS = 10
TASTES = 5
SUCCESSORS = np.array([0.6, 0.25, 0.15])
SHORTEST, MEAN_EXTRA, LONGEST = 6, 4.0, 40
CORE = 5
CHUNK = 512
"""Users scored at a time: bounds the memory for large catalogues."""


@dataclass(frozen=True)
class Planted:
    """The parameters of one domain. I items, T themes, C colours, Z tastes."""

    popularity_I: np.ndarray
    theme_I: np.ndarray
    colour_I: np.ndarray
    successors_I3: np.ndarray
    theme_next_T: np.ndarray
    by_theme_TI: np.ndarray
    by_colour_CI: np.ndarray
    by_taste_ZI: np.ndarray

    @property
    def n_items(self) -> int:
        return len(self.popularity_I)

    def score(self, last_B: np.ndarray, taste_B: np.ndarray) -> np.ndarray:
        """score(j | i, z) of the module docstring for B users: [B, I], rows sum to 1."""
        out: np.ndarray = WEIGHTS["text"] * self.by_theme_TI[self.theme_next_T[self.theme_I[last_B]]]
        out += WEIGHTS["picture"] * self.by_colour_CI[self.colour_I[last_B]]
        out += WEIGHTS["taste"] * self.by_taste_ZI[taste_B]
        out += WEIGHTS["popularity"] * self.popularity_I
        rows = np.arange(len(last_B))
        for place, share in enumerate(SUCCESSORS):  # the three successors of an item differ, so += meets each cell once
            out[rows, self.successors_I3[last_B, place]] += WEIGHTS["transition"] * share
        return out

    def probability(self, histories: list[list[int]], taste_B: np.ndarray) -> np.ndarray:
        """p(j | i, z, H) for B users with these histories: [B, I]."""
        out = self.score(np.array([history[-1] for history in histories]), taste_B)
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        out[rows, np.concatenate(histories)] = 0.0
        return np.asarray(out / out.sum(1, keepdims=True))

    def describe(self) -> dict[str, Any]:
        return {
            "model": "p(next) = sum of weight * part over items outside the history, normalised; see harness/data/planted.py",
            "weights": WEIGHTS,
            "successor_shares": SUCCESSORS.tolist(),
            "theme_follows": {str(theme): int(after) for theme, after in enumerate(self.theme_next_T)},
            "oracle": "the 50 most probable items given x_(n-1), the history and the hidden taste",
        }


@dataclass(frozen=True)
class Sample:
    """Histories x_1..x_n as item rows, the taste of every user, and the oracle's lists for x_n (-1 = no item left)."""

    histories: list[list[int]]
    taste_U: np.ndarray
    oracle_UK: np.ndarray


def plant(n_items: int, rng: np.random.Generator, world: np.random.Generator) -> Planted:
    """Draw the parameters of a domain; ``world`` must be the same generator state for all domains of a simulation."""
    popularity = 1.0 / (np.arange(n_items) + 4.0)
    popularity = rng.permutation(popularity / popularity.sum())
    theme, colour = (np.concatenate([rng.permutation(k), rng.integers(0, k, n_items - k)]) for k in (THEMES, COLOURS))
    rng.shuffle(theme)
    rng.shuffle(colour)
    successors = np.stack([_others(n_items, item, rng) for item in range(n_items)])
    cycle = world.permutation(THEMES)
    theme_next = np.empty(THEMES, np.int64)
    theme_next[cycle] = np.roll(cycle, -1)

    liked = rng.random((TASTES, n_items)) < 0.2
    liked[np.arange(TASTES), rng.choice(n_items, TASTES, replace=False)] = True
    return Planted(
        popularity_I=popularity,
        theme_I=theme,
        colour_I=colour,
        successors_I3=successors,
        theme_next_T=theme_next,
        by_theme_TI=_within(theme[None] == np.arange(THEMES)[:, None], popularity),
        by_colour_CI=_within(colour[None] == np.arange(COLOURS)[:, None], popularity),
        by_taste_ZI=_within(liked, popularity),
    )


def _others(n_items: int, item: int, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.choice(n_items - 1, len(SUCCESSORS), replace=False)
    return np.asarray(drawn + (drawn >= item))


def _within(mask: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    weights = mask * popularity
    return np.asarray(weights / weights.sum(1, keepdims=True))


def draw(planted: Planted, n_users: int, rng: np.random.Generator) -> Sample:
    """Histories of ``n_users``: prefixes, then rare items in front, then every user's test item, last of all."""
    check_sizes(n_users, planted.n_items)
    longest = min(LONGEST, planted.n_items // 2)
    prefix = np.minimum(SHORTEST - 1 + rng.geometric(1 / (1 + MEAN_EXTRA), n_users) - 1, longest - 1)
    taste = rng.integers(0, TASTES, n_users)
    histories = [[int(item)] for item in rng.choice(planted.n_items, n_users, p=planted.popularity_I)]
    for length in range(1, int(prefix.max())):
        _extend(planted, histories, np.flatnonzero(prefix > length), taste, rng)
    _cover(histories, planted.n_items, rng)

    oracle = np.full((n_users, K), -1, np.int64)
    for start in range(0, n_users, CHUNK):
        users = np.arange(start, min(start + CHUNK, n_users))
        chances = planted.probability([histories[user] for user in users], taste[users])
        best = np.argsort(-chances, axis=1, kind="stable")[:, :K]
        possible = np.take_along_axis(chances, best, 1) > 0
        oracle[users, : best.shape[1]] = np.where(possible, best, -1)
    _extend(planted, histories, np.arange(n_users), taste, rng)
    return Sample(histories, taste, oracle)


def check_sizes(n_users: int, n_items: int) -> None:
    """Small catalogues cannot hold the histories; few users cannot hold every item five times."""
    if n_items < 40 or n_users < 40 or n_items > n_users * (SHORTEST - 1) // CORE:
        raise DataError(f"cannot simulate {n_users} users with {n_items} items: at least 40 of each, and at most as many items as users")


def _extend(planted: Planted, histories: list[list[int]], users: np.ndarray, taste: np.ndarray, rng: np.random.Generator) -> None:
    """One more item for each of ``users``, drawn from p."""
    for start in range(0, len(users), CHUNK):
        chunk = users[start : start + CHUNK]
        cumulated = planted.probability([histories[user] for user in chunk], taste[chunk]).cumsum(1)
        level = (1.0 - rng.random(len(chunk))) * cumulated[:, -1]  # in (0, total]: an item of probability 0 is never met
        drawn = (cumulated < level[:, None]).sum(1)
        for user, item in zip(chunk, drawn, strict=True):
            histories[user].append(int(item))


def _cover(histories: list[list[int]], n_items: int, rng: np.random.Generator) -> None:
    """Put rare items in front of histories that lack them, until every item stands five times."""
    count = np.bincount(np.concatenate(histories), minlength=n_items)
    for item in np.flatnonzero(count < CORE):
        while count[item] < CORE:
            history = histories[rng.integers(len(histories))]
            if item not in history:
                history.insert(0, int(item))
                count[item] += 1
