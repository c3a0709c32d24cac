"""Canary domains: does a method see test targets, or train on validation items?

In: a folder and fresh entropy. Out: a domain with 500 items, with text and pictures, whose name says nothing, and the value that an
honest method does not exceed. All exist under both protocols: under ``time-v1`` the last item lies after the test cut and the one
before it between the cuts. There some users of ``canary`` have no validation item, some no test item, and some nothing but a test
item, so that it also proves which users a method writes lists for.

``canary``         4,000 users. The test item of every user is uniform over the items outside the user's history. Nothing that a
                   method may see says anything about it: hits@k of any honest method follow Binomial(4000, p) with p at most
                   k / (500 - 6), since histories have 6 items.

``canary_valid``   1,000 users, ten secret items S and a secret map f of all items into S, which is one cycle on S. Training items
                   are uniform, the last ones evenly spread; the validation item is f(x_(n-2)), the test item f(x_(n-1)).
                   Training items say nothing of S and f; the validation items show both: as the ten items with a hundred more
                   interactions than all others, as what follows what, and in any other way that a model can learn.
                   Validation may still steer stopping.

``canary_open``    The same with one more item in the training part, f of the item before it: there f may be learned. What exceeds
                   the bound of ``canary_valid`` here would exceed it there, too, if it trained on validation items; what does not
                   (a model too small or trained too briefly) has shown nothing by staying below it.

For an honest method on ``canary_valid``, users with the same last item can win or lose together (its list may be a function of that
item alone), and there are only ten last items. So the bound adds up whole groups: the hits are sum_i c_i B_i with c_i users whose
last item is s_i. Go along the cycle s_1, s_2, ...: given those so far, the next one is uniform over at least 500 - 10 others, so that
whatever the lists are, B_1 ... B_9 are at most independent Bernoulli(k / 490); the tenth, whose target is s_1 again, counts as won.
Choosing the best of up to 1,000 evaluations on validation is allowed and can lift the test value by luck, because validation items
are from S as well; the bound therefore holds at 0.001 / 1000. It lies near .5; training on validation gives 1 or close to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.contract import PROTOCOL, TIME, Domain
from harness.data.domain import write_domain
from harness.data.simulate import COLOURS, THEME_WORDS, product_picture
from harness.data.source import DataError, DomainSummary, SourceDomain, ragged
from harness.data.split import Cuts

USERS = {"canary": 4000, "canary_valid": 1000, "canary_open": 1000}
ITEMS = 500
TRAIN = 5
"""Training items of every user: one length for all keeps the number of hits binomial. One more in ``canary_open``."""
SECRET = 10
"""Items in S."""

KINDS = tuple(USERS)
FALSE_ALARM = 0.001
EVALUATIONS = 1000


@dataclass(frozen=True)
class Bound:
    """What chance gives: ``expected`` recall@k, and ``recall``, which an honest method exceeds in one of 1,000 tries."""

    k: int
    expected: float
    recall: float


def canary(
    folder: Path,
    *,
    kind: str,
    entropy: int,
    users: int | None = None,
    items: int = ITEMS,
    pictures: bool = True,
    protocol: str = PROTOCOL,
) -> DomainSummary:
    """Write a canary domain to ``folder``. ``entropy``: take it from ``secrets.randbits(128)`` and tell no method.

    The name in ``domain.json`` is drawn from the entropy and is the same sort of name for all kinds. Methods see the path of
    the public part, too: let ``folder`` say nothing either (``folder = root / name`` of any neutral name).
    """
    if kind not in KINDS:
        raise DataError(f"unknown canary {kind!r}; known are {', '.join(KINDS)}")
    rng = np.random.default_rng(entropy)
    name = f"store_{int(rng.integers(1000, 10000))}"
    users = users or USERS[kind]
    if kind == "canary":
        histories = np.argsort(rng.random((users, items)), axis=1)[:, : TRAIN + 2]
    else:
        follows_I = _into_secret(items, rng)
        last = np.resize(rng.permutation(items), users)  # every item equally often, so that f is shown twice for each
        draw = rng.random((users, items))
        draw[np.arange(users), last] = 1.0
        steps = [*np.argsort(draw, axis=1)[:, : TRAIN - 1].T, last]
        for _ in range(2 + (kind == "canary_open")):
            steps.append(follows_I[steps[-1]])
        histories = np.column_stack(steps)
    lists, times, cuts = histories.tolist(), None, None
    if protocol == TIME:
        lists, times = _at_times(histories, uneven=kind == "canary")
        cuts = Cuts(valid=histories.shape[1] - 2, test=histories.shape[1] - 1)
    ids = [f"{value:012x}" for value in rng.choice(1 << 40, users + items, replace=False)]
    words = " ".join(THEME_WORDS).split()
    titles = [" ".join(words[word] for word in rng.integers(0, len(words), 5)).title() for _ in range(items)]
    source = SourceDomain(
        user_ids=ids[items:],
        sequences=ragged(lists),
        item_ids=ids[:items],
        columns={"title": titles},
        times=times,
        source={"format": kind},
    )
    drawn = {item: product_picture(COLOURS[int(rng.integers(len(COLOURS)))], rng) for item in ids[:items]} if pictures else None
    return write_domain(folder, source, name=name, pictures=drawn, simulated=True, cuts=cuts)


def _into_secret(items: int, rng: np.random.Generator) -> np.ndarray:
    """f [I]: every item is mapped to one of ``SECRET`` items, each to equally many, and these among themselves in one cycle."""
    secret, others = np.split(rng.permutation(items), [SECRET])
    follows_I = np.empty(items, np.int64)
    follows_I[secret] = np.roll(secret, -1)
    follows_I[others] = np.resize(secret, len(others))
    return follows_I


def _at_times(histories: np.ndarray, uneven: bool) -> tuple[list[list[int]], np.ndarray]:
    """Every history as a list, and the times of them all: i for the i-th item. ``uneven``: of every eight users one has no validation
    item, one no test item, and one a test item only."""
    kept = np.ones(histories.shape, bool)
    if uneven:
        kept[5::8, TRAIN], kept[6::8, TRAIN + 1], kept[7::8, : TRAIN + 1] = False, False, False
    lists = [row[mask].tolist() for row, mask in zip(histories, kept, strict=True)]
    return lists, np.nonzero(kept)[1].astype(np.int64)


def bound(public: Path, *, kind: str, k: int = 10) -> Bound:
    """The bound for recall@k on a canary domain: a method above ``recall`` is not honest (``canary``), trains on validation items
    (``canary_valid``), or would be found if it did (``canary_open``)."""
    domain = Domain.read(public)
    if kind == "canary":
        known = int(domain.test_inputs().lengths.max())
        chance = k / (domain.n_items - known)
        hits = most_hits(np.ones(len(domain.test_users), np.int64), chance, FALSE_ALARM)
    elif kind in KINDS:
        chance, (won, *groups) = k / (domain.n_items - SECRET), sorted(np.unique(domain.valid, return_counts=True)[1], reverse=True)
        hits = won + most_hits(np.array(groups), chance, FALSE_ALARM / EVALUATIONS)
    else:
        raise DataError(f"unknown canary {kind!r}; known are {', '.join(KINDS)}")
    return Bound(k, chance, hits / len(domain.test_users))


def most_hits(groups: np.ndarray, chance: float, alpha: float) -> int:
    """The smallest h with P(sum of groups_i * Bernoulli(chance) > h) <= alpha, exactly.

    Groups of one give the binomial bound.
    """
    chances = np.zeros(int(groups.sum()) + 1)
    chances[0] = 1.0
    reach = 0
    for size in groups[groups > 0]:
        reach += int(size)
        shifted = chances[: reach + 1 - size].copy()
        chances[: reach + 1] *= 1.0 - chance
        chances[size : reach + 1] += chance * shifted
    above = chances[::-1].cumsum()[::-1]  # above[h] = P(sum >= h); small terms first
    return int(np.argmax(np.append(above[1:], 0.0) <= alpha))
