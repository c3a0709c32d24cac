"""Splits: whole histories -> what is trained on, validated on and hidden (the protocols of ``harness/contract.py``).

In: histories of numbered items, oldest first, and for ``time-v1`` their times and two cuts. Out: a ``Split``.

``loo-v1``   A user's last item is the test target, the one before it the validation target.
``time-v1``  Two moments cut all histories: events before the valid cut are trained on, those from there to before the test cut are
             the window of validation, and the first event at or after the test cut is the test target; what a user does after it is
             left out and counted. Every user and every item of the histories stays, so users may have no training part, and items
             that come up only later are candidates that nobody could have learned.

Legend: U users, R interactions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from harness.contract import PROTOCOL, TIME, Ragged
from harness.data.source import DataError

MIN_HISTORY = {PROTOCOL: 3, TIME: 1}
"""Shortest history that can be split: under ``loo-v1`` one item each for training, validation and test."""


@dataclass(frozen=True)
class Cuts:
    """The first moments of validation and of test, in the unit of the source's times."""

    valid: int
    test: int


AMAZON2023_CUTS = Cuts(valid=1_628_643_414_042, test=1_658_002_729_837)
"""In milliseconds: the two moments at which the authors of Amazon Reviews 2023 cut every category (10 August 2021, 16 July 2022)."""


@dataclass(frozen=True)
class Split:
    """``train`` and ``window`` hold one list a user; ``tested`` are the users with a target, ascending, ``targets`` theirs.

    ``kept`` [R] marks the interactions that are in one of the three; ``target_rows`` are the places of the targets.
    """

    protocol: str
    train: Ragged
    window: Ragged
    tested: np.ndarray
    targets: np.ndarray
    target_rows: np.ndarray
    kept: np.ndarray
    kept_offsets: np.ndarray
    cuts: Cuts | None = None
    dropped: dict[str, int] = field(default_factory=dict)

    def counts(self, items: int) -> dict[str, int]:
        """The counts of ``domain.json``."""
        return counts_of(self.protocol, self.train, self.window, len(self.tested), items)


def counts_of(protocol: str, train: Ragged, window: Ragged, n_tested: int, items: int) -> dict[str, int]:
    total = len(train.values) + len(window.values) + n_tested
    counts = {"users": len(train), "items": items, "interactions": total, "train_interactions": len(train.values)}
    if protocol == PROTOCOL:
        return counts
    trained, validated = (int((lists.lengths > 0).sum()) for lists in (train, window))
    return {**counts, "train_users": trained, "valid_users": validated, "test_users": n_tested}


def leave_one_out(histories: Ragged) -> Split:
    """``loo-v1``. Every history has at least three items."""
    users = np.arange(len(histories))
    last = histories.offsets[1:] - 1
    in_train = np.ones(len(histories.values), bool)
    in_train[last] = in_train[last - 1] = False
    return Split(
        protocol=PROTOCOL,
        train=_pick(histories, in_train),
        window=Ragged(histories.values[last - 1], np.arange(len(histories) + 1)),
        tested=users,
        targets=histories.values[last],
        target_rows=last,
        kept=np.ones(len(histories.values), bool),
        kept_offsets=histories.offsets,
    )


def split_by_time(histories: Ragged, times_R: np.ndarray | None, cuts: Cuts) -> Split:
    """``time-v1``. Raises DataError without times, for cuts in the wrong order, and where a part would be empty."""
    if times_R is None:
        raise DataError(f"{TIME} cuts histories by time, and this source has no times; prepare it from files that have them")
    if not cuts.valid < cuts.test:
        raise DataError(f"the valid cut {cuts.valid} is not before the test cut {cuts.test}")
    user_R = np.repeat(np.arange(len(histories)), histories.lengths)
    back = np.flatnonzero((np.diff(user_R) == 0) & (np.diff(times_R) < 0))
    if len(back):
        raise DataError(f"{TIME} needs histories in order of time; one goes back from {times_R[back[0]]} to {times_R[back[0] + 1]}")
    in_train, late = times_R < cuts.valid, np.flatnonzero(times_R >= cuts.test)
    in_window = ~in_train & (times_R < cuts.test)
    tested, first = np.unique(user_R[late], return_index=True)
    for there, what, moment in (
        (in_train.any(), "before the valid cut", cuts.valid),
        (in_window.any(), "between the two cuts", f"{cuts.valid} to {cuts.test}"),
        (len(late), "at or after the test cut", cuts.test),
    ):
        if not there:
            span = f"the times are {times_R.min()} to {times_R.max()}"
            raise DataError(f"no interaction lies {what} ({moment}); {span}. Is the unit milliseconds, and the data of that time?")
    kept = in_train | in_window
    kept[late[first]] = True
    return Split(
        protocol=TIME,
        train=_pick(histories, in_train),
        window=_pick(histories, in_window),
        tested=tested,
        targets=histories.values[late[first]],
        target_rows=late[first],
        kept=kept,
        kept_offsets=_pick(histories, kept).offsets,
        cuts=cuts,
        dropped={"interactions_after_the_test_target": int((~kept).sum())},
    )


def _pick(lists: Ragged, mask_R: np.ndarray) -> Ragged:
    """The marked values of every list, in their order."""
    before = np.concatenate([[0], np.cumsum(mask_R)]).astype(np.int64)
    return Ragged(lists.values[mask_R], before[lists.offsets])
