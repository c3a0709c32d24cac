"""Cards: what is counted, what is expected, why a domain is refused, and the page."""

from __future__ import annotations

import html.parser
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from harness.contract import Ragged
from harness.data import expected, plots
from harness.data.card import Card, make_card, neighbours_of, seen_transitions
from harness.data.card_page import to_html, write_page
from harness.data.card_view import counts_rows, facts_rows, show, spark
from harness.data.cli import app
from harness.data.domain import list_domains, write_domain
from harness.data.expected import differences, expected_card, facts_of, likely_causes
from harness.data.release import GROUPS
from harness.data.source import DataError, SourceDomain, ragged

DAY = 86_400_000
START = 1_500_000_000_000


@pytest.fixture
def dated() -> SourceDomain:
    """Four users over six items, milliseconds of the year 2017."""
    lists = ragged([[0, 1, 2, 3], [1, 2, 3, 0], [3, 0, 1, 2], [4, 0, 1, 3]])
    times = START + DAY * np.arange(16)
    return SourceDomain(
        ["ann", "bob", "cyd", "dan"], lists, list("ABCDEF"), columns={"title": ["one two", "x", None, "a b c", "", "z"]}, times=times
    )


@pytest.fixture
def card(tmp_path: Path, dated: SourceDomain) -> Card:
    return make_card(write_domain(tmp_path / "d", dated).path)


def test_counts(card: Card) -> None:
    """Training: 0 1 / 1 2 / 3 0 / 4 0; validation 2 3 1 1; targets 3 0 2 3."""
    assert card.counts == {"users": 4, "items": 6, "interactions": 16, "train_interactions": 8}
    assert card.targets_by_seen_transition == 2  # 3 -> 0 and 1 -> 2; not 2 -> 3 and 1 -> 3
    assert (card.cold_targets, card.repeated_targets) == (0, 0)
    assert (card.items_in_training, card.items_without_training) == (5, 1)
    assert card.items_with_text == 4
    assert card.text_words == {"median": 1.5, "mean": 1.75, "longest": 3}
    assert card.history == {"shortest": 3, "median": 3.0, "mean": 3.0, "longest": 3}
    assert card.popularity == {"head": 2, "mid": 2, "tail": 2}
    assert card.dates == {
        "first interaction": "2017-07-14", "first target": "2017-07-17", "median target": "2017-07-23", "last interaction": "2017-07-29",
    }  # fmt: skip
    assert card.series["interactions"] == [16]
    assert card.series["targets"] == [4]
    assert card.series["text_words"][:2] == [2, 4]
    assert card.series["history_lengths"][3] == 4
    assert json.loads(json.dumps(card.to_json()))["counts"]["users"] == 4


def test_seen_transitions_are_adjacent_pairs_of_one_list() -> None:
    train = Ragged(np.array([0, 1, 2, 3, 0]), np.array([0, 2, 2, 5]))  # 0 1 / (nothing) / 2 3 0
    last, target = np.array([0, 1, 2, 3, 3, 2]), np.array([1, 2, 3, 0, 1, 0])
    assert seen_transitions(train, last, target, 4) == 3  # 0->1, 2->3, 3->0; not 1->2, which two lists make


def test_seen_transitions_beside_counting_by_hand(tmp_path: Path, lists: list[list[int]]) -> None:
    pairs = {pair for items in lists for pair in itertools.pairwise(items[:-2])}
    by_hand = sum((items[-2], items[-1]) in pairs for items in lists)
    n_items = 1 + max(map(max, lists))
    source = SourceDomain([f"u{n}" for n in range(len(lists))], ragged(lists), [f"i{n}" for n in range(n_items)])
    assert 0 < by_hand == make_card(write_domain(tmp_path / "d", source).path).targets_by_seen_transition


def test_times_in_seconds_and_times_that_are_none(tmp_path: Path, dated: SourceDomain) -> None:
    seconds = make_card(write_domain(tmp_path / "s", replace(dated, times=dated.times // 1000)).path)
    assert seconds.dates["first interaction"] == "2017-07-14"
    for name, times in (("none", None), ("far", np.full(16, 2**61)), ("old", np.full(16, -5))):
        card = make_card(write_domain(tmp_path / name, replace(dated, times=times)).path)
        assert card.dates == {}
        assert "interactions" not in card.series
        assert to_html(card)


def test_overlap(tmp_path: Path, dated: SourceDomain) -> None:
    write_domain(tmp_path / "mine", dated)
    other = replace(dated, user_ids=["bob", "dan", "eve", "fay"], item_ids=list("EFGHIJ"), times=dated.times + 5 * DAY)
    write_domain(tmp_path / "other", other)
    write_domain(tmp_path / "older", replace(dated, release="2014"))
    write_domain(tmp_path / "fake", dated, simulated=True)
    assert [each.name for each in neighbours_of(tmp_path / "mine")] == ["other"]
    (found,) = make_card(tmp_path / "mine", neighbours_of(tmp_path / "mine")).overlap
    assert (found.domain, found.users, found.items, found.interactions) == ("other", 2, 2, 16)
    assert (found.first, found.last) == ("2017-07-19", "2017-08-03")
    assert found.in_test_time == 11  # our median target is of day 9, theirs are of days 5 to 20


def test_mere_numbers_are_no_overlap(tmp_path: Path, dated: SourceDomain) -> None:
    numbers = replace(dated, user_ids=["0", "1", "2", "3"], item_ids=list("012345"))
    write_domain(tmp_path / "one", replace(numbers, private_columns={"asin": ["B1", "B2", None, "B4", "B5", "B6"]}))
    write_domain(tmp_path / "two", replace(numbers, private_columns={"asin": ["B6", "B7", "B8", "B9", None, "B1"]}))
    write_domain(tmp_path / "three", numbers)
    found = {each.domain: (each.users, each.items) for each in make_card(tmp_path / "one", list_domains(tmp_path)).overlap}
    assert found == {"two": (None, 2), "three": (None, None)}


# ------------------------------------------------------------------------------------------------------- what is expected


def test_every_domain_of_the_paper_has_a_card() -> None:
    cards = {category: expected_card(category.lower()) for category in GROUPS["paper"]}
    assert all(cards.values())
    exact = {category: tuple(card["counts"].get(key) for key in expected.KEYS) for category, card in cards.items() if card}
    assert exact["Musical_Instruments"] == (57_439, 24_587, 511_836)
    assert exact["Industrial_and_Scientific"] == (50_985, 25_848, 412_947)
    assert exact["Video_Games"] == (94_762, 25_612, 814_586)
    assert exact["Office_Products"] == (223_308, 77_551, 1_800_878)
    for card in cards.values():
        assert card
        assert card["release"] == "2023"
        assert set(card["counts"]) | set(card.get("between", {})) == set(expected.KEYS)
        assert not set(card["counts"]) & set(card.get("between", {}))


def test_all_nine_together_have_the_interactions_that_the_paper_gives() -> None:
    """Five pre-training domains: about 344 thousand items and 8.61 million interactions."""
    low, high = dict.fromkeys(expected.KEYS, 0), dict.fromkeys(expected.KEYS, 0)
    for category in GROUPS["pretraining"]:
        card = expected_card(category.lower()) or {}
        for key in expected.KEYS:
            bounds = [card["counts"][key]] * 2 if key in card["counts"] else card["between"][key]
            low[key], high[key] = low[key] + bounds[0], high[key] + bounds[1]
    assert low["items"] <= 344_600
    assert high["items"] >= 343_500
    assert low["interactions"] <= 8_614_999
    assert high["interactions"] >= 8_605_000


@pytest.mark.parametrize(
    ("counts", "lines"),
    [
        ((100, 50, 900), []),
        ((101, 50, 900), ["users: 101, expected 100 (+1)"]),
        ((100, 44, 900), ["items: 44, expected 45 to 54 (published rounded)"]),
        ((100, 55, 1_900), ["items: 55, expected 45 to 54 (published rounded)", "interactions: 1,900, expected 900 (+1,000)"]),
        ((100, 45, 900), []),
        ((100, 54, 900), []),
    ],
)
def test_differences(counts: tuple[int, ...], lines: list[str]) -> None:
    wanted = {"counts": {"users": 100, "interactions": 900}, "between": {"items": [45, 54]}}
    assert differences(dict(zip(expected.KEYS, counts, strict=True)), wanted) == lines


def five_core() -> SourceDomain:
    """Nine users with five to seven of nine items each: a five-core."""
    lists = [[(user + step) % 9 for step in range(5 + user % 3)] for user in range(9)]
    return SourceDomain([f"R{n}" for n in range(9)], ragged(lists), [f"B{n}" for n in range(9)], source={"format": "amazon-reviews-2023"})


def lists_of(source: SourceDomain) -> list[list[int]]:
    return [row.tolist() for row in source.sequences]


def with_header(source: SourceDomain) -> SourceDomain:
    """One line of names, taken for an interaction; its user is too short for the split, its item stays."""
    return replace(
        source,
        user_ids=[*source.user_ids, "user_id"],
        item_ids=[*source.item_ids, "parent_asin"],
        sequences=ragged([*lists_of(source), [9]]),
    )


def with_padding(source: SourceDomain) -> SourceDomain:
    return replace(source, item_ids=["[PAD]", *source.item_ids], sequences=Ragged(source.sequences.values + 1, source.sequences.offsets))


def with_repeats(source: SourceDomain) -> SourceDomain:
    return replace(source, sequences=ragged([[*items, items[0]] for items in lists_of(source)]))


def with_one_pass(source: SourceDomain) -> SourceDomain:
    return replace(
        source, user_ids=[*source.user_ids, "R9"], item_ids=[*source.item_ids, "B9"], sequences=ragged([*lists_of(source), [0, 1, 2, 9]])
    )


def without_targets(source: SourceDomain) -> SourceDomain:
    return replace(source, sequences=ragged([items[:-1] for items in lists_of(source)]))


def with_all_metadata(source: SourceDomain) -> SourceDomain:
    return replace(source, item_ids=[*source.item_ids, "B100", "B101"])


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (with_header, "the header line was counted: 'user_id' stands there as an id"),
        (with_padding, "the padding row was counted: '.PAD.' stands there as an id"),
        (with_repeats, "repeats were kept: 9 interactions are of an item that its user had already"),
        (with_one_pass, "the 5-core was applied once or not at all: a user has 4 interactions, an item 1"),
        (without_targets, "exactly one interaction a user is missing: the file of the test targets was left out"),
        (with_all_metadata, "2 items are in no list: the whole metadata was taken for the catalogue"),
    ],
)
def test_a_wrong_preparation_is_refused_with_its_cause(wrong: Any, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = five_core()
    counts = {"users": 9, "items": 9, "interactions": len(right.sequences.values)}
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "toys.json").write_text(json.dumps({"title": "Toys", "counts": counts, "source": "the paper"}))
    monkeypatch.setenv("HARNESS_CARDS", str(tmp_path / "cards"))
    assert write_domain(tmp_path / "data" / "toys", right).created
    for name, source in (("toys", wrong(right)), ("other", wrong(right))):
        if name == "other":  # no card of this name: a variant on purpose
            assert write_domain(tmp_path / "data" / name, source).created
            continue
        with pytest.raises(DataError, match=rf"toys is not what it must be, and was not written: .*\[the paper\].*Likely: .*{cause}"):
            write_domain(tmp_path / "data" / name, source, overwrite=True)
    assert make_card(tmp_path / "data" / "toys").differences == []
    # an import under that name is taken as given, and `verify` says what is wrong with it
    write_domain(tmp_path / "given" / "toys", replace(wrong(right), source={"format": "parquet"}))
    result = CliRunner().invoke(app, ["verify", "toys", "--root", str(tmp_path / "given")])
    assert result.exit_code == 2
    assert "is not what a domain of this name must be" in result.output
    assert CliRunner().invoke(app, ["verify", "toys", "--root", str(tmp_path / "data")]).exit_code == 0


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ((1, 1, 1), "one user and one item too many: a header line or a padding row was counted"),
        ((0, 0, -200), "exactly two interactions a user are missing: the files of validation and test targets"),
        ((-3, -2, -90), "items without metadata or picture were left out"),
        ((-30, -20, -90), "the raw file is not whole"),
        ((2, 9, 30), "items are not parent_asin but asin"),
        ((0, 0, 7), "the raw file is not the pinned revision's"),
    ],
)
def test_causes_told_from_counts_alone(more: tuple[int, ...], cause: str) -> None:
    wanted = {"counts": {"users": 100, "items": 50, "interactions": 900}, "source": "x"}
    counts = {key: wanted["counts"][key] + extra for key, extra in zip(expected.KEYS, more, strict=True)}
    clean = expected.Facts(0, 5, 5, 0, (), {})
    assert any(cause in line for line in likely_causes(counts, wanted, clean))


def test_damaged_reviews_are_a_cause() -> None:
    facts = facts_of(ragged([[0, 1]]), ["u"], ["a", "b"], {"reviews_without_fields": 3})
    wanted = {"counts": {"users": 2, "items": 2, "interactions": 9}}
    assert any("3 reviews lack a user" in line for line in likely_causes({"users": 1, "items": 2, "interactions": 2}, wanted, facts))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "x.json: not a card .JSONDecodeError"),
        ('{"counts": {"users": 1}}', "not a card .KeyError: 'source'"),
        ('{"counts": {"user": 1}, "source": "s"}', "counts and between hold users, items, interactions only"),
        ('{"counts": {}, "between": {"users": [3, 2]}, "source": "s"}', "between a lowest and a highest"),
        ('{"counts": {}, "between": {"users": 3}, "source": "s"}', "not a card .TypeError"),
    ],
)
def test_a_card_that_is_none(content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text(content)
    monkeypatch.setenv("HARNESS_CARDS", str(tmp_path))
    with pytest.raises(DataError, match=message):
        expected_card("x")
    assert expected_card("beauty2014") is None


# ----------------------------------------------------------------------------------------------------------- how it looks


class Balance(html.parser.HTMLParser):
    """Every tag is closed, in order; and nothing is fetched or run."""

    VOID = ("meta", "br", "line", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "style", "onclick"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("kind", ["plain", "simulated", "wrong", "hostile"])
def test_the_page_stands_by_itself(kind: str, tmp_path: Path, dated: SourceDomain, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"users": 4 if kind != "wrong" else 5, "items": 6, "interactions": 16}
    about = {
        "title": "<b>T</b>",
        "counts": counts,
        "source": "a <paper> & more",
        "reported": {"seen_transitions": {"value": 0.069, "source": "s"}},
    }
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "d.json").write_text(json.dumps(about))
    monkeypatch.setenv("HARNESS_CARDS", str(tmp_path / "cards"))
    if kind == "hostile":
        dated = replace(dated, dropped={"<script>alert(1)</script>": 3}, release="<i>2023")
    write_domain(tmp_path / "data" / "d", dated, simulated=kind == "simulated")
    write_domain(tmp_path / "data" / "e", dated, simulated=kind == "simulated")
    card = make_card(tmp_path / "data" / "d", neighbours_of(tmp_path / "data" / "d"))
    page = to_html(card)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    text = " ".join(parser.text)
    assert ("SIMULATED data" in text) == (kind == "simulated")
    assert ("Not what this domain must be" in text) == (kind == "wrong")
    assert "a <paper> & more" in text
    assert "(published 6.9 %)" in text
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 4
    assert "Beside other domains" in text
    assert len(page) < 60_000


def test_the_page_is_whole_or_absent(tmp_path: Path, card: Card) -> None:
    path = write_page(card, tmp_path / "deep" / "er" / "card.html")
    assert path.read_text("utf-8") == to_html(card)
    assert [file.name for file in path.parent.iterdir()] == ["card.html"]
    with pytest.raises(DataError, match="the page cannot be written"):
        write_page(card, path / "below" / "a file.html")


def test_the_terminal_shows_the_same_numbers(card: Card) -> None:
    console = Console(record=True, width=140)
    show(replace(card, name="[bold]d"), console)
    text = console.export_text()
    assert "[bold]d" in text
    for row in (*counts_rows(card), *facts_rows(card)):
        assert row.value in text


def test_the_command_writes_a_page_and_says_where(tmp_path: Path, dated: SourceDomain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_RESULTS", str(tmp_path / "results"))
    write_domain(tmp_path / "data" / "d", dated)
    done = CliRunner().invoke(app, ["card", "d", "--root", str(tmp_path / "data")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "results" / "cards" / "d.html").exists()
    done = CliRunner().invoke(app, ["card", "d", "--alone", "--html", str(tmp_path / "here.html"), "--root", str(tmp_path / "data")])
    assert "here.html" in done.output
    assert (tmp_path / "here.html").exists()
    done = CliRunner().invoke(app, ["card", "d", "--json", "--root", str(tmp_path / "data")])
    assert json.loads(done.output)["targets_by_seen_transition"] == 2


@pytest.mark.parametrize(
    ("highest", "top", "ticks"), [(0, 1, 2), (1, 1, 2), (3, 3, 4), (305, 400, 5), (512, 600, 4), (999_999, 1_000_000, 5), (4, 4, 5)]
)
def test_round_ticks(highest: int, top: float, ticks: int) -> None:
    found, marks = plots.nice(highest)
    assert (found, len(marks)) == (top, ticks)
    assert marks[0] == 0
    assert marks[-1] == found >= highest


def test_small_plots() -> None:
    assert plots.bars([], [], label="none").count("<rect") == 0
    assert plots.curve([], label="none").count("<circle") == 0
    assert plots.bars([3, 0, 6], ["a", "<b>", "c"], label="x", second=[1, 0, 6], names=("all", "some")).count("<rect") == 8
    assert "&lt;b&gt;: 0" in plots.bars([3, 0], ["a", "<b>"], label="x")
    assert spark([]) == ""
    assert spark([0, 1, 1000]) == " ▁█"
    assert len(spark(list(range(500)))) == 48
    assert plots.compact(1500) == "1.5k"
    assert plots.compact(2_000_000) == "2M"
