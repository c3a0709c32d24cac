"""The card of a domain: what it holds, what a domain of this name should hold, and how it overlaps with its neighbours.

In: a domain's folder, and the domains beside it. Out: ``Card``. It counts test targets and reads source ids and times: a card is for
the user, methods never see one. Expected counts stand in ``cards/NAME.json`` (``expected.py``).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.contract import PROTOCOL, Domain, Ragged, read_columns
from harness.data import expected
from harness.data.domain import Private, list_domains, read_private, read_summary
from harness.data.source import DataError, DomainSummary
from harness.score import SHARES, popularity_share

BINS = (("2-5", 2, 5), ("6-10", 6, 10), ("11-20", 11, 20), (">20", 21, 1 << 30))
SHORT_BINS = (("0", 0, 0), ("1", 1, 1))
"""Under ``time-v1`` only, as in the slices of a record."""
WORDS = (0, 1, 5, 10, 20, 50, 100, 200, 500, 1000, 1 << 30)
"""Borders of the bins of text lengths; the first is no text at all."""


@dataclass(frozen=True)
class Overlap:
    """One other domain: how many of its users and items are also ours (None where ids are mere numbers, which say nothing outside of
    their own data set), and how much of it is later than half of our test targets (None without times)."""

    domain: str
    users: int | None
    items: int | None
    first: str | None
    last: str | None
    interactions: int
    in_test_time: int | None


@dataclass(frozen=True)
class Card:
    """``history`` is about test inputs (``loo-v1``: x_1..x_(n-1)). Of the targets, ``cold_targets`` are without any training interaction,
    ``repeated_targets`` stand in their user's history already, ``targets_by_seen_transition`` follow the last item of their input
    also somewhere in the training part. ``popularity``: items holding the first 50, next 30, last 20 % of the training interactions.
    ``dates``: of the first and the last interaction and target. ``cuts``: where ``time-v1`` splits (UTC). ``dropped`` says why items
    have no picture. ``series`` is for plots."""

    name: str
    digest: str
    release: str | None
    protocol: str
    cuts: dict[str, str]
    simulated: bool
    counts: dict[str, int]
    density: float
    tie_rate: float | None
    history: dict[str, float]
    history_bins: dict[str, int]
    popularity: dict[str, int]
    dates: dict[str, str]
    cold_targets: int
    repeated_targets: int
    targets_by_seen_transition: int
    items_in_training: int
    items_without_training: int
    items_with_text: int
    text_words: dict[str, float]
    items_with_picture: int
    picture_coverage: float
    dropped: dict[str, int]
    overlap: list[Overlap]
    expected: dict[str, Any] | None
    differences: list[str]
    likely_causes: list[str]
    series: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def share(self, key: str) -> float:
        """A count of targets as a share of the tested users, of items as a share of the items."""
        of = self.counts["items"] if key.startswith("items") else self.tested
        return float(getattr(self, key)) / of if of else 0.0

    @property
    def tested(self) -> int:
        """How many users are tested: each has one target."""
        return self.counts.get("test_users", self.counts["users"])


def make_card(folder: Path, neighbours: Sequence[DomainSummary] = ()) -> Card:
    """Count a domain, and compare it with ``neighbours``. Raises DataError or ContractError for a folder that is not a domain."""
    summary = read_summary(folder)
    domain = Domain.read(folder / "public")
    private = read_private(folder)
    trained = np.bincount(domain.train.values, minlength=domain.n_items)
    inputs = domain.test_inputs(int(1e9))
    lengths = inputs.lengths
    owner = np.repeat(np.arange(len(inputs)), lengths)
    repeated = np.unique(owner[inputs.values == private.targets[owner]])
    words = np.array([len(text.split()) for text in domain.texts])
    texts = words[words > 0]
    wanted = expected.expected_card(summary.name, summary.protocol)
    differences = expected.differences(summary.counts, wanted)
    bins = BINS if summary.protocol == PROTOCOL else (*SHORT_BINS, *BINS)
    moments = _moments(private)
    return Card(
        name=summary.name,
        digest=summary.digest,
        release=summary.release,
        protocol=summary.protocol,
        cuts={name: _moment(int(time), private) for name, time in domain.info.get("cuts", {}).items()},
        simulated=summary.simulated,
        counts=summary.counts,
        density=summary.counts["interactions"] / (domain.n_users * domain.n_items),
        tie_rate=summary.tie_rate,
        history={
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
        },
        history_bins={name: int(((lengths >= low) & (lengths <= high)).sum()) for name, low, high in bins},
        popularity=_popularity(trained),
        dates={name: _day(value) for name, value in moments.items()},
        cold_targets=int((trained[private.targets] == 0).sum()),
        repeated_targets=len(repeated),
        targets_by_seen_transition=seen_transitions(domain.train, inputs.padded(1)[:, 0], private.targets, domain.n_items),
        items_in_training=int((trained > 0).sum()),
        items_without_training=int((trained == 0).sum()),
        items_with_text=len(texts),
        text_words={"median": float(np.median(texts)), "mean": float(texts.mean()), "longest": int(texts.max())} if len(texts) else {},
        items_with_picture=len(domain.pictures),
        picture_coverage=len(domain.pictures) / domain.n_items,
        dropped=private.info.get("dropped", {}),
        overlap=[_overlap(private, moments.get("median target"), other) for other in neighbours if other.name != summary.name],
        expected=wanted,
        differences=differences,
        likely_causes=expected.likely_causes(summary.counts, wanted, facts(folder)) if wanted and differences else [],
        series=_series(lengths, trained, words, private),
    )


def neighbours_of(folder: Path) -> list[DomainSummary]:
    """The domains beside it that are of the same kind: the same release and protocol, and simulated or not."""
    mine = read_summary(folder)
    return [
        other
        for other in list_domains(folder.parent)
        if not other.problem
        and (other.release, other.protocol, other.simulated) == (mine.release, mine.protocol, mine.simulated)
        and other.name != mine.name
    ]


def facts(folder: Path) -> expected.Facts:
    """What tells how a written ``loo-v1`` domain was made."""
    domain, private = Domain.read(folder / "public"), read_private(folder)
    histories = domain.train.append(domain.valid).append(private.targets)
    return expected.facts_of(histories, private.user_ids, private.item_ids, private.info.get("dropped", {}))


def require_expected(folder: Path) -> None:
    """Raise DataError if the domain does not have the counts of its card."""
    summary = read_summary(folder)
    if expected.differences(summary.counts, expected.expected_card(summary.name, summary.protocol)):
        wrong = expected.problem(summary.name, summary.counts, facts(folder))
        raise DataError(f"{summary.path} is not what a domain of this name must be: {wrong}. Make it again, or give it another name")


def seen_transitions(train: Ragged, last_U: np.ndarray, target_U: np.ndarray, n_items: int) -> int:
    """How many targets follow their user's last item (-1: there is none) also in the training part of somebody (adjacent pairs)."""
    inside = np.ones(len(train.values), bool)
    inside[train.offsets[1:][train.lengths > 0] - 1] = False
    first = np.flatnonzero(inside)
    pairs = np.unique(train.values[first].astype(np.int64) * n_items + train.values[first + 1])
    return int(np.isin(last_U.astype(np.int64) * n_items + target_U, pairs).sum())


def _popularity(trained_I: np.ndarray) -> dict[str, int]:
    """Items that hold the first 50, next 30, last 20 % of the training interactions, as in the slices of a record."""
    counts = np.bincount(popularity_share(trained_I), minlength=len(SHARES))
    return {name: int(count) for (name, _), count in zip(SHARES, counts, strict=True)}


# ---------------------------------------------------------------------------------------------------------------- times


def _unit(times: np.ndarray) -> int:
    """Ticks a second: the releases have seconds (2014, 2018) or milliseconds (2023)."""
    return 1000 if len(times) and np.median(np.abs(times)) > 1e11 else 1


def _day(time: float) -> str:
    return (datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=float(time))).date().isoformat()


def _moment(time: int, private: Private) -> str:
    """A moment in the unit of the domain's times, to the second."""
    unit = _unit(private.times) if private.times is not None else 1
    return (datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=time // unit)).isoformat(" ") + " UTC"


def _all_times(private: Private) -> np.ndarray:
    """Seconds of every interaction (of the targets only, where no more is kept); empty without times or with ones that are no dates."""
    lists = private.history_times
    times = lists.values if lists is not None else private.times if private.times is not None else np.empty(0, np.int64)
    seconds = times / _unit(times)
    return seconds if len(seconds) and seconds.min() >= 0 and seconds.max() < 4.1e9 else np.empty(0)


def _moments(private: Private) -> dict[str, float]:
    times = _all_times(private)
    if not len(times) or private.times is None:
        return {}
    targets = private.times / _unit(private.times)
    return {
        "first interaction": float(times.min()), "first target": float(targets.min()),
        "median target": float(np.median(targets)), "last interaction": float(times.max()),
    }  # fmt: skip


def _overlap(private: Private, median_target: float | None, other: DomainSummary) -> Overlap:
    theirs = read_private(other.path)
    times = _all_times(theirs)
    shared = [_shared(_names(private, what), _names(theirs, what)) for what in ("users", "items")]
    known = len(times) == other.counts["interactions"]
    return Overlap(
        domain=other.name,
        users=shared[0],
        items=shared[1],
        first=_day(times.min()) if len(times) else None,
        last=_day(times.max()) if len(times) else None,
        interactions=other.counts["interactions"],
        in_test_time=int((times > median_target).sum()) if known and median_target is not None else None,
    )


def _names(private: Private, what: str) -> pa.Array | None:
    """The ids that mean something outside of the data set: source ids, else ASINs, else None."""
    table = read_columns(private.path / f"{what}.parquet")
    ids = table["source_id"].combine_chunks()
    if not pc.all(pc.match_substring_regex(ids, "^[0-9]{1,7}$")).as_py():
        return ids
    return table["asin"].combine_chunks().drop_null() if "asin" in table.column_names else None


def _shared(ours: pa.Array | None, theirs: pa.Array | None) -> int | None:
    if ours is None or theirs is None:
        return None
    return int(pc.sum(pc.is_in(pc.unique(theirs.cast(pa.string())), value_set=ours.cast(pa.string()))).as_py() or 0)


# ---------------------------------------------------------------------------------------------------------------- plots


def _series(lengths_U: np.ndarray, trained_I: np.ndarray, words_I: np.ndarray, private: Private) -> dict[str, Any]:
    held = np.sort(trained_I[trained_I > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(len(held), 1), 120).astype(np.int64)) if len(held) else np.empty(0, np.int64)
    counts, _ = np.histogram(words_I, [*WORDS[:-1], WORDS[-1]])
    return {
        "history_lengths": np.bincount(np.minimum(lengths_U, 41), minlength=42).tolist(),
        "popularity": [[int(rank), int(held[rank - 1])] for rank in ranks],
        "text_words": counts.tolist(),
        **_months(private),
    }


def _months(private: Private) -> dict[str, Any]:
    """Interactions a month, all and test targets."""
    times = _all_times(private)
    if not len(times) or private.times is None:
        return {}
    month, targets = (_month(seconds) for seconds in (times, private.times / _unit(private.times)))
    first, n = int(month.min()), int(month.max() - month.min()) + 1
    return {
        "first_month": f"{1970 + first // 12}-{first % 12 + 1:02}",
        "interactions": np.bincount(month - first, minlength=n).tolist(),
        "targets": np.bincount(targets - first, minlength=n).tolist(),
    }


def _month(seconds: np.ndarray) -> np.ndarray:
    """Months since January 1970."""
    return seconds.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
