"""Canary domains: does a method see test targets, or train on validation items?

In: a folder and fresh entropy. Out: a domain with 4,000 users and 500 items, with text and pictures, whose name says nothing,
and the value that an honest method does not exceed. Both exist under both protocols: under ``time-v1`` the last item lies after the
test cut and the one before it between the cuts. There some users of ``canary`` have no validation item, some no test item, and some
nothing but a test item, so that it also proves which users a method writes lists for.

``canary``         The test item of every user is uniform over the items outside the user's history. Nothing that a method may see
                   says anything about it: hits@k of any honest method follow Binomial(4000, p) with p at most
                   k / (500 - 6), since histories have 6 items.

``canary_valid``   A random cyclic permutation pi of the items. Training items are uniform; the validation item is
                   pi(x_(n-2)), the test item pi(x_(n-1)). Training items say nothing about pi, but the 4,000 pairs
                   (x_(n-2), x_(n-1)) show all of it, eight times: a method that trains on validation items finds the
                   test item, one that trains on training items only cannot. Validation may still steer stopping.

For an honest method on ``canary_valid``, users with the same last item can win or lose together (its list may be a
function of that item alone). So the bound adds up whole groups: the hits are sum_i c_i B_i with c_i users whose last item is
i and B_i ~ Bernoulli(k / 498), since pi(i) is neither i nor the item that leads to i. That is the widest spread that
lists without knowledge of pi have (B_i and B_j depend on each other by 1/500 only). Choosing the best of up to
1,000 evaluations on validation is allowed and can lift the test value by luck, because validation is pi as well;
the bound therefore holds at 0.001 / 1000. It stays far from what training on validation gives (last_item: 1.0).
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

USERS = 4000
ITEMS = 500
TRAIN = 5
"""Training items of every user: one length for all keeps the number of hits binomial."""

KINDS = ("canary", "canary_valid")
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
    users: int = USERS,
    items: int = ITEMS,
    pictures: bool = True,
    protocol: str = PROTOCOL,
) -> DomainSummary:
    """Write a canary domain to ``folder``. ``entropy``: take it from ``secrets.randbits(128)`` and tell no method.

    The name in ``domain.json`` is drawn from the entropy and is the same sort of name for both kinds. Methods see the path of
    the public part, too: let ``folder`` say nothing either (``folder = root / name`` of any neutral name).
    """
    if kind not in KINDS:
        raise DataError(f"unknown canary {kind!r}; known are {', '.join(KINDS)}")
    rng = np.random.default_rng(entropy)
    name = f"store_{int(rng.integers(1000, 10000))}"
    if kind == "canary":
        histories = np.argsort(rng.random((users, items)), axis=1)[:, : TRAIN + 2]
    else:
        cycle = rng.permutation(items)
        follows = np.empty(items, np.int64)
        follows[cycle] = np.roll(cycle, -1)
        train = np.argsort(rng.random((users, items)), axis=1)[:, :TRAIN]
        valid = follows[train[:, -1]]
        histories = np.column_stack([train, valid, follows[valid]])
    lists, times = histories.tolist(), None
    if protocol == TIME:
        lists, times = _at_times(histories, uneven=kind == "canary")
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
    return write_domain(folder, source, name=name, pictures=drawn, simulated=True, cuts=CUTS if protocol == TIME else None)


CUTS = Cuts(valid=TRAIN, test=TRAIN + 1)
"""The i-th item of a canary's history is of the time i."""


def _at_times(histories: np.ndarray, uneven: bool) -> tuple[list[list[int]], np.ndarray]:
    """Every history as a list, and the times of them all. ``uneven``: of every eight users one has no validation item, one no test
    item, and one a test item only."""
    kept = np.ones(histories.shape, bool)
    if uneven:
        kept[5::8, TRAIN], kept[6::8, TRAIN + 1], kept[7::8, : TRAIN + 1] = False, False, False
    lists = [row[mask].tolist() for row, mask in zip(histories, kept, strict=True)]
    return lists, np.nonzero(kept)[1].astype(np.int64)


def bound(public: Path, *, kind: str, k: int = 10) -> Bound:
    """The bound for recall@k on a canary domain: a method above ``recall`` is not honest (``canary``) or trains on validation
    items (``canary_valid``)."""
    domain = Domain.read(public)
    if kind == "canary":
        known = int(domain.test_inputs().lengths.max())
        chance, groups, alpha = k / (domain.n_items - known), np.ones(len(domain.test_users), np.int64), FALSE_ALARM
    elif kind == "canary_valid":
        chance, groups = k / (domain.n_items - 2), np.bincount(domain.valid)
        alpha = FALSE_ALARM / EVALUATIONS
    else:
        raise DataError(f"unknown canary {kind!r}; known are {', '.join(KINDS)}")
    return Bound(k, chance, most_hits(groups, chance, alpha) / len(domain.test_users))


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
