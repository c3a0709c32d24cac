"""Writing and reading a domain: content, whole-or-nothing, digests, damage."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.contract import Domain
from harness.data import text
from harness.data.card import make_card
from harness.data.domain import DataError, DomainExists, list_domains, ragged, read_private, read_summary, validate_domain, write_domain
from harness.data.text import clean, join, part
from harness.data.write import as_json_lines

PICTURES = {"E": b"picture of E", "A": b"A's", "C": b"see"}


@pytest.fixture
def written(tmp_path, source):
    return write_domain(tmp_path / "d", source, pictures=PICTURES)


def test_split_and_numbers(written, source):
    domain, private = Domain.read(written.path / "public"), read_private(written.path)
    assert private.item_ids == sorted("ABCDEF", key=lambda name: hashlib.sha256(name.encode()).digest())
    assert private.user_ids == sorted(["u1", "u2", "u3", "u5"], key=lambda name: hashlib.sha256(name.encode()).digest())
    assert private.info["dropped"] == {"users_below_3": 1}
    for number, user in enumerate(private.user_ids):
        full = [source.item_ids[row] for row in source.sequences[source.user_ids.index(user)]]
        assert [private.item_ids[item] for item in domain.train[number]] == full[:-2]
        assert private.item_ids[domain.valid[number]] == full[-2]
        assert private.item_ids[private.targets[number]] == full[-1]
    times = dict(zip(private.user_ids, private.times.tolist(), strict=True))
    assert times == {"u1": 2, "u2": 4, "u3": 5, "u5": 5}
    assert written.counts == {"users": 4, "items": 6, "interactions": 15, "train_interactions": 7}
    assert written.tie_rate == pytest.approx(3 / 11)  # u1: 1 1; u3: 5 5 5; of 2 + 3 + 2 + 4 steps


def test_items_keep_their_parts_and_their_row(written):
    private = read_private(written.path)
    items = dict(zip(private.item_ids, Domain.read(written.path / "public").items.to_pylist(), strict=True))
    assert items["A"]["title"] == "One & only"
    assert items["A"]["text"] == "One & only. a, b."
    assert items["A"]["codes_x"] == [1, 2]
    assert items["B"]["text"] == "Two."
    assert items["C"]["text"] == "third words"  # keywords stand in for a text only where there is none
    assert items["D"]["text"] == "Four x. c."
    assert items["E"]["text"] is None
    assert items["E"]["title"] is None
    assert all(row["description"] is None for row in items.values())
    asin = pq.read_table(written.path / "private" / "items.parquet")["asin"].to_pylist()
    assert asin == [name.lower() for name in private.item_ids]


def test_public_part_says_nothing_of_source_ids(written):
    table = pq.read_table(written.path / "public" / "items.parquet")
    assert not {"source_id", "asin", "item_id"} & set(table.column_names)
    assert {file.name for file in (written.path / "public").iterdir()} == {
        "domain.json", "users.parquet", "items.parquet", "pictures.bin", "pictures.parquet",
    }  # fmt: skip


def test_pictures_stand_in_order_of_the_item_number(written):
    numbers = {name: number for number, name in enumerate(read_private(written.path).item_ids)}
    pictures = Domain.read(written.path / "public").pictures
    assert {name: pictures[numbers[name]] for name in "ABCDEF"} == {**dict.fromkeys("ABCDEF"), **PICTURES}
    expected = b"".join(PICTURES[name] for name in sorted(PICTURES, key=numbers.__getitem__))
    assert (written.path / "public" / "pictures.bin").read_bytes() == expected


def test_modes(tmp_path, source):
    old = os.umask(0o077)
    try:
        folder = write_domain(tmp_path / "d", source).path
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert modes["d"] == modes["public"] == 0o755
    assert modes["domain.json"] == 0o644
    assert modes["private"] == 0o700
    assert modes["targets.parquet"] == 0o600


def test_texts_enter_the_digest_as_the_standard_library_writes_them():
    """The quick encoder must not change the digests that records hold: all characters that a file can hold, and no text at all."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = [None, "", *("".join(characters[at : at + 50]) for at in range(0, len(characters), 50))]
    expected = "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in texts).encode()
    assert as_json_lines(pa.array(texts, pa.string())) == expected
    assert as_json_lines(pa.array([[1, 20], [], None])) == b"[1, 20]\n[]\nnull\n"


def test_digest_is_of_the_content(tmp_path, source, written):
    public = written.path / "public"
    for file in ("users.parquet", "items.parquet"):  # other encoding, same content
        pq.write_table(pq.read_table(public / file), public / file, compression="gzip", row_group_size=2, use_dictionary=False)
    assert validate_domain(written.path).digest == written.digest

    def digest(name: str, **change) -> str:
        return write_domain(tmp_path / name, replace(source, **change.pop("source", {})), **{"pictures": PICTURES, **change}).digest

    same = digest("same", source={"release": "2018", "source": {"format": "other"}})
    assert same == written.digest
    changed = [
        digest("text", source={"columns": {**source.columns, "title": ["x"] * 6}}),
        digest("valid", source={"sequences": ragged([[0, 2, 2], [2, 1, 0, 3], [4, 4, 4], [0, 1], [3, 2, 1, 0, 4]])}),
        digest("boundary", source={"sequences": ragged([[0, 1, 2, 2], [1, 0, 3], [4, 4, 4], [0, 1], [3, 2, 1, 0, 4]])}),
        digest("codes", source={"columns": {**source.columns, "codes_x": [[2, 1]] * 6}}),
        digest("picture", pictures={**PICTURES, "A": b"other"}),
        digest("no_pictures", pictures=None),
    ]
    assert len({written.digest, *changed}) == len(changed) + 1
    target_only = write_domain(
        tmp_path / "target",
        replace(source, sequences=ragged([[0, 1, 3], [2, 1, 0, 3], [4, 4, 4], [0, 1], [3, 2, 1, 0, 4]])),
        pictures=PICTURES,
    )
    assert target_only.digest == written.digest  # the public digest says nothing of the targets
    assert read_private(target_only.path).info["digest"] != read_private(written.path).info["digest"]


def test_the_same_again_stays_and_another_is_refused(tmp_path, source, written):
    assert written.created
    again = write_domain(written.path, source, pictures=PICTURES)
    assert not again.created
    other = replace(source, sequences=ragged([[0, 1, 3], [2, 1, 0, 3], [4, 4, 4], [0, 1], [3, 2, 1, 0, 4]]))
    with pytest.raises(DomainExists, match="--replace"):
        write_domain(written.path, other, pictures=PICTURES)
    assert validate_domain(written.path).digest == written.digest
    assert write_domain(written.path, other, pictures=PICTURES, overwrite=True).created
    ids = read_private(written.path).item_ids
    assert sorted(ids[target] for target in read_private(written.path).targets) == ["D", "D", "E", "E"]  # was C, D, E, E
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []


def test_other_source_ids_are_another_domain(tmp_path, source):
    """Even where the public part is the same: here F, which nobody has, becomes another item at the same rank."""
    rank = sorted("ABCDEF", key=lambda name: hashlib.sha256(name.encode()).digest()).index("F")
    twin = next(
        name
        for name in map(str, range(1000))
        if sorted([*"ABCDE", name], key=lambda name: hashlib.sha256(name.encode()).digest()).index(name) == rank
    )
    first = write_domain(tmp_path / "d", source)
    other = replace(source, item_ids=[*"ABCDE", twin])
    assert write_domain(tmp_path / "e", other).digest == first.digest
    with pytest.raises(DomainExists):
        write_domain(tmp_path / "d", other)


def test_a_failure_leaves_nothing(tmp_path, source):
    with pytest.raises(FileNotFoundError):
        write_domain(tmp_path / "d", source, pictures={"A": Path("/does/not/exist")})
    assert not (tmp_path / "d").exists()
    assert list_domains(tmp_path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == [".d.lock"]


def test_what_a_killed_writer_left_is_cleared(tmp_path, source):
    stale = tmp_path / ".d.abc.tmp"
    (stale / "public").mkdir(parents=True)
    assert list_domains(tmp_path) == []
    write_domain(tmp_path / "d", source)
    assert not stale.exists()


def _write(folder, source, results):
    results.put(write_domain(folder, source).created)


def test_two_writers_at_once(tmp_path, source):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    writers = [context.Process(target=_write, args=(tmp_path / "d", source, results)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(results.get() for _ in writers) == [False, False, False, True]
    validate_domain(tmp_path / "d")


def _write_forever(folder, sources):
    while True:
        for source in sources:
            write_domain(folder, source, pictures=PICTURES, overwrite=True)


def test_killed_at_any_moment(tmp_path, source):
    """A killed writer leaves one of its two domains whole, also while it replaces one by the other."""
    other = replace(source, sequences=ragged([[0, 1, 3], [2, 1, 0, 3], [4, 4, 4], [0, 1], [3, 2, 1, 0, 5]]))
    write_domain(tmp_path / "d", source, pictures=PICTURES)
    rng = np.random.default_rng()
    context = multiprocessing.get_context("fork")
    for _ in range(25):
        writer = context.Process(target=_write_forever, args=(tmp_path / "d", (other, source)))
        writer.start()
        writer.join(float(rng.uniform(0.01, 0.08)))
        writer.kill()
        writer.join()
        validate_domain(tmp_path / "d")
    write_domain(tmp_path / "d", source, pictures=PICTURES, overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"d", ".d.lock"}


def test_folders_are_swapped_without_the_kernels_help(tmp_path, source, monkeypatch):
    write_domain(tmp_path / "d", source)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    other = replace(source, item_ids=list("ABCDEX"))
    assert write_domain(tmp_path / "d", other, overwrite=True).created
    assert "X" in read_private(tmp_path / "d").item_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": list("ABCDEA")}, "item 5: the id 'A' stands already at item 0"),
        ({"item_ids": ["A", "", "C", "D", "E", "F"]}, "item 1: the id ''"),
        ({"item_ids": ["A", "\ud800", "C", "D", "E", "F"]}, "UTF-8"),
        ({"user_ids": ["u", "u", "v", "w", "x"]}, "user 1"),
        ({"user_ids": ["u"]}, "1 user ids for 5 lists"),
        ({"sequences": ragged([[0, 1, 6]] * 5), "times": None}, "item row 6"),
        ({"sequences": ragged([[0, 1, -1]] * 5), "times": None}, "item row -1"),
        ({"sequences": ragged([[0, 1]] * 5), "times": None}, "no user has 3"),
        ({"times": np.zeros(3)}, "3 times for 17"),
        ({"columns": {"title": ["x"]}}, "'title' has 1 rows"),
        ({"item_ids": []}, "catalogue is empty"),
    ],
)
def test_wrong_input_is_refused(tmp_path, source, change, message):
    with pytest.raises(DataError, match=message):
        write_domain(tmp_path / "d", replace(source, **change))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "x" * 41, "sp ace"])
def test_names(tmp_path, source, name):
    with pytest.raises(DataError, match="no name for a domain"):
        write_domain(tmp_path / "d", source, name=name or "-")


def _edit(path: Path, column: str, values: list) -> None:
    table = pq.read_table(path)
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, pa.array(values, table.schema.field(column).type)), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "public" / "leak.txt").write_text("x"), "leak.txt"),
        (lambda d: _edit(d / "public" / "users.parquet", "valid", [0, 1, 2, 3]), "digest"),
        (lambda d: _edit(d / "public" / "users.parquet", "valid", [0, 1, 2, 9]), "outside 0..5"),
        (lambda d: _edit(d / "public" / "users.parquet", "user", [1, 0, 2, 3]), "not 0..3 in order"),
        (lambda d: _edit(d / "public" / "items.parquet", "title", ["x"] * 6), "digest"),
        (lambda d: _edit(d / "public" / "items.parquet", "item", [1, 0, 2, 3, 4, 5]), "in order"),
        (lambda d: (d / "public" / "pictures.bin").write_bytes(b"x" * 20), "damaged"),
        (lambda d: (d / "public" / "pictures.bin").write_bytes((d / "public" / "pictures.bin").read_bytes() + b"x"), "behind the last"),
        (lambda d: _edit(d / "private" / "targets.parquet", "target", [0, 1, 2, 3]), "private.json"),
        (lambda d: _edit(d / "private" / "users.parquet", "source_id", list("abcd")), "hash"),
        (lambda d: (d / "private" / "private.json").unlink(), "not the private part"),
        (lambda d: (d / "public" / "domain.json").unlink(), "not a domain"),
        (lambda d: os.chmod(d / "private", 0o755), "mode 755"),
    ],
)
def test_damage_is_named(written, damage, message):
    validate_domain(written.path)
    damage(written.path)
    with pytest.raises(DataError, match=message):
        validate_domain(written.path)


def test_targets_of_other_data_are_refused(tmp_path, source, written):
    other = write_domain(tmp_path / "other", source)
    os.rename(other.path / "private", tmp_path / "away")
    os.rename(written.path / "private", other.path / "private")
    with pytest.raises(DataError, match="belong to other public data"):
        read_private(other.path)


def test_list_names_broken_domains(tmp_path, source, written):
    write_domain(tmp_path / "b", source)
    (tmp_path / "c" / "public").mkdir(parents=True)
    found = {domain.name: domain for domain in list_domains(tmp_path)}
    assert list(found) == ["b", "c", "d"]
    assert found["c"].problem
    assert found["d"].problem is None
    assert found["d"].digest == written.digest == read_summary(written.path).digest
    assert list_domains(tmp_path / "nowhere") == []


def test_oracle_is_renumbered(tmp_path, source):
    rows = np.array([[0, 1, -1], [2, 3, 4], [4, 0, 1], [0, 0, 0], [5, -1, 2]])
    private = read_private(write_domain(tmp_path / "d", source, simulated=True, oracle=rows).path)
    for number, user in enumerate(private.user_ids):
        expected = [source.item_ids[row] if row >= 0 else None for row in rows[source.user_ids.index(user)]]
        assert [private.item_ids[item] if item >= 0 else None for item in private.oracle[number]] == expected


def test_card_counts_what_is_there(tmp_path, source):
    lists = ragged([[0, 1, 2], [2, 1, 0, 3], [4, 4, 4], [0, 1], [3, 2, 1, 0, 5]])
    card = make_card(write_domain(tmp_path / "d", replace(source, sequences=lists), pictures=PICTURES).path)
    assert card.cold_targets == 1  # F is nobody's training item
    assert card.repeated_targets == 1  # E after E, E
    assert card.items_without_training == 1
    assert card.items_with_picture == 3
    assert card.items_with_text == 5
    assert card.history == {"shortest": 2, "median": 2.5, "mean": 2.75, "longest": 4}
    assert card.history_bins == {"2-5": 4, "6-10": 0, "11-20": 0, ">20": 0}
    json.dumps(card.to_json())


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("a<br />b<BR>c", "a b c"),
        ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
        ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
        ("x<script>alert('<b>')</script>y<!-- no -->z", "x y z"),
        (" a\t\n\x00\x9f\u200b\ufeff  b ", "a b"),
        ("caf\u00e9 \u2013 \U0001f600", "caf\u00e9 \u2013 \U0001f600"),
        ("bad \ud800 half", "bad half"),
        ("<br>", ""),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned


def test_clean_by_the_long_way():
    """Printable texts take a short cut; every character there is, alone and between others, comes out as without it."""
    control, space = text._CONTROL, text._SPACE
    for start in range(0, 0x110000, 64):
        letters = [chr(code) for code in range(start, start + 64) if chr(code) not in "&<"]
        for value in ("".join(letters), *(f" a  {letter} b" for letter in letters if not letter.isalnum() and start < 0x10000)):
            assert clean(value) == space.sub(" ", control.sub(" ", value)).strip(), hex(start)


def test_text_joins_the_parts_in_order():
    assert part(["", None, "a", " <i> </i> ", "b"]) == "a, b"
    assert part([]) is None
    parts = {"description": "Is it? Yes!", "title": "T", "categories": "c", "features": "f.", "brand": "B", "keywords": "k"}
    assert join(parts) == "T. f. c. Is it? Yes!"
    assert join({"text": "given", "keywords": "k"}) == "given"
    assert join({"brand": "B"}) is None
