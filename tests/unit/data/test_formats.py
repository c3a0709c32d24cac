"""Out and in again: what every format carries, what it cannot, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.contract import Domain
from harness.data import text
from harness.data.domain import read_private, read_summary, validate_domain, write_domain
from harness.data.export import export_domain
from harness.data.formats import FORMATS, lcrec, utgrec
from harness.data.formats.common import Whole, in_order
from harness.data.importers import import_domain
from harness.data.source import DataError, SourceDomain, ragged

ALL = ("parquet", "recbole", "s3rec", "utgrec", "lcrec")


def picture(colour: int, side: int = 12, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (colour, 40, 90)).save(out, kind)
    return out.getvalue()


PICTURES = {"A": picture(10), "D": picture(200, kind="PNG"), "F": picture(90, kind="WEBP")}


@pytest.fixture
def rich(source: SourceDomain) -> SourceDomain:
    """The shared example with everything that makes trouble on the way: entities, a lonely item, items without anything."""
    columns = {
        **source.columns,
        "title": ["One &amp; only", "R &amp;amp;amp; D", None, "5 &lt; 6 &amp;copy it", "", "Six"],
        "description": ["x < y", "a <b", None, None, None, 'quoted "text", and ünïcode 尺'],
        "codes_index": [[0, 12], [3, 3], None, [5, 250], [6, 1], [6, 2]],
    }
    return replace(source, user_ids=["ü1", "u 2", "u3", "u4", "5"], columns=columns)


@pytest.fixture
def domain(tmp_path: Path, rich: SourceDomain) -> Path:
    return write_domain(tmp_path / "domains" / "full", rich, pictures=PICTURES).path


def reduced(source: SourceDomain, pictures: dict[str, bytes], format: str, folder: Path) -> tuple[SourceDomain, dict[str, bytes]]:
    """What the format can carry of the example, put down by hand."""
    if format == "parquet":
        return source, pictures
    if format in ("recbole", "lcrec"):
        return source, {}
    if format == "s3rec":  # F is in no list
        return replace(source, columns={}, item_ids=source.item_ids[:-1], private_columns={}), {}
    texts = dict(zip(read_private(folder).item_ids, Domain.read(folder / "public").items["text"].to_pylist(), strict=True))
    codes = {name: column for name, column in source.columns.items() if name.startswith("codes_")}
    escaped = [value and value.replace("&", "&amp;") for value in (texts[item] for item in source.item_ids)]
    return replace(source, columns={"text": escaped, **codes}), pictures


@pytest.mark.parametrize("format", ALL)
def test_out_and_in_again_is_the_same_domain(format: str, tmp_path: Path, domain: Path, rich: SourceDomain) -> None:
    assert set(FORMATS) == set(ALL)
    if format == "s3rec":  # its separator is white space
        rich = replace(rich, user_ids=[user.replace(" ", "_") for user in rich.user_ids])
        domain = write_domain(tmp_path / "domains" / "plain", rich, pictures=PICTURES).path
    done = export_domain(domain, format, tmp_path / "out")
    back = import_domain(done.path, "back", root=tmp_path / "domains")
    validate_domain(back.path)
    source, pictures = reduced(rich, PICTURES, format, domain)
    right = write_domain(tmp_path / "by_hand" / "back", source, pictures=pictures)
    assert back.digest == right.digest
    assert (back.digest == read_summary(domain).digest) == (format == "parquet")
    assert np.array_equal(read_private(back.path).targets, read_private(right.path).targets)
    assert read_private(back.path).info["ids_digest"] == read_private(right.path).info["ids_digest"]
    again = import_domain(export_domain(back.path, format, tmp_path / "out2").path, "again", root=tmp_path / "domains")
    assert again.digest == back.digest
    assert not export_domain(back.path, format, tmp_path / "out3").lost
    if format in ("parquet", "recbole"):
        assert again.tie_rate == read_summary(domain).tie_rate
        assert read_private(again.path).history_times.values.tolist() == read_private(domain).history_times.values.tolist()
    assert again.release == "2014"


def test_what_is_lost_is_said(tmp_path: Path, rich: SourceDomain) -> None:
    rich = replace(rich, user_ids=["a", "b", "c", "d", "e"])
    folder = write_domain(tmp_path / "full", rich, pictures=PICTURES).path
    lost = {format: export_domain(folder, format, tmp_path / format).lost for format in ALL}
    assert lost == {
        "parquet": [],
        "recbole": ["3 pictures", "asin of the items (it is in the private part)"],
        "lcrec": ["3 pictures", "times, so the tie rate", "asin of the items (it is in the private part)"],
        "utgrec": [
            "the parts of the text by themselves (title, categories, description, keywords); the joined text is there",
            "times, so the tie rate",
            "asin of the items (it is in the private part)",
        ],
        "s3rec": [
            "text of 5 items", "codes (index, x)", "3 pictures", "times, so the tie rate", "asin of the items (it is in the private part)",
            "1 items that are in no list",
        ],
    }  # fmt: skip
    for format in ALL:
        about = json.loads((tmp_path / format / "exported.json").read_text())
        assert about["not_carried"] == lost[format]
        assert about["digest"] == read_summary(folder).digest


@pytest.mark.parametrize("format", ALL)
def test_simulated_data_stay_marked(format: str, tmp_path: Path, simulated: Path) -> None:
    done = export_domain(simulated, format, tmp_path / "out")
    back = import_domain(done.path, "back", root=tmp_path)
    assert back.simulated
    if format == "parquet":
        assert back.digest == read_summary(simulated).digest


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from harness.data.simulate import simulate

    return simulate(tmp_path_factory.mktemp("sim"), categories=["Software"], users=60, items=50)[0].path


@pytest.mark.parametrize("name", ["office2014", "scientific2018"])
@pytest.mark.parametrize("format", ["parquet", "recbole", "lcrec"])
def test_shared_sets_come_back(name: str, format: str, tmp_path: Path, shared_data: Path) -> None:
    """Real texts and codes: all that these sets have is in their parts and codes, so three formats give the very same domain."""
    first = import_domain(shared_data / name, name, root=tmp_path / "a")
    back = import_domain(export_domain(first.path, format, tmp_path / "out").path, name, root=tmp_path / "b")
    assert back.digest == first.digest


# --------------------------------------------------------------------------------------------------------- what it writes


def test_utgrec_files_are_what_its_code_reads(tmp_path: Path, domain: Path) -> None:
    export_domain(domain, "utgrec", tmp_path / "out")
    sequences, mapping, sentences = (
        json.loads((tmp_path / "out" / name).read_text()) for name in (utgrec.SEQUENCES, utgrec.MAPPING, utgrec.SENTENCES)
    )
    assert sequences == {"ü1": ["A", "B", "C"], "u 2": ["C", "B", "A", "D"], "u3": ["E", "E", "E"], "5": ["D", "C", "B", "A", "E"]}
    assert mapping["id2item"][0] == mapping["id2user"][0] == "[PAD]"
    assert sorted(mapping["id2item"][1:]) == list("ABCDEF")
    assert all(mapping["item2id"][item] == number for number, item in enumerate(mapping["id2item"]))
    assert set(sentences) == set("ABCDEF")  # its code looks every item up
    assert sentences["E"] == ""
    assert sentences["A"] == "One & only. a, b. x < y."
    assert {file.name for file in (tmp_path / "out" / "Images").iterdir()} == {"A.jpg", "D.jpg", "F.jpg"}
    assert (tmp_path / "out" / "Images" / "D.jpg").read_bytes() == PICTURES["D"]
    assert json.loads((tmp_path / "out" / "x.sem_ids").read_text())["A"] == [1, 2]


def test_lcrec_files_are_what_its_code_reads(tmp_path: Path, domain: Path) -> None:
    out = export_domain(domain, "lcrec", tmp_path / "out").path
    lists, facts, index = (json.loads((out / f"full.{end}.json").read_text()) for end in ("inter", "item", "index"))
    names = dict(line.split("\t")[::-1] for line in (out / "full.item2id").read_text().splitlines())
    users = dict(line.split("\t")[::-1] for line in (out / "full.user2id").read_text().splitlines())
    found = {users[user]: [names[str(item)] for item in items] for user, items in lists.items()}
    assert found == {"ü1": ["A", "B", "C"], "u 2": ["C", "B", "A", "D"], "u3": ["E", "E", "E"], "5": ["D", "C", "B", "A", "E"]}
    assert sorted(map(int, facts)) == list(range(6))
    assert all(isinstance(fact[name], str) for fact in facts.values() for name in ("title", "description", "brand", "categories"))
    assert {names[item]: tokens for item, tokens in index.items()} == {
        "A": ["<a_0>", "<b_12>"], "B": ["<a_3>", "<b_3>"], "D": ["<a_5>", "<b_250>"], "E": ["<a_6>", "<b_1>"], "F": ["<a_6>", "<b_2>"],
    }  # fmt: skip


def test_recbole_reads_what_we_export(tmp_path: Path, simulated: Path) -> None:
    """RecBole itself, in a process of its own (it loads torch): the same counts, and the same last item of every user."""
    out = export_domain(simulated, "recbole", tmp_path / "sim_software").path
    code = f"""
import json, sys, warnings
warnings.filterwarnings("ignore")
import numpy as np
np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_  # names of NumPy 1 that RecBole 1.2 looks up
from recbole.config import Config
from recbole.data import create_dataset
sys.argv = ["x"]
columns = {{"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}}
settings = {{"data_path": {str(out.parent)!r}, "load_col": columns, "train_neg_sample_args": None}}
data = create_dataset(Config(model="SASRec", dataset="sim_software", config_dict=settings))
data.inter_feat = data.inter_feat.sort_values("timestamp", kind="stable")
last = data.inter_feat.groupby("user_id")["item_id"].last()
names = {{data.id2token("user_id", user): data.id2token("item_id", item) for user, item in last.items()}}
print(json.dumps([data.user_num - 1, data.item_num - 1, data.inter_num, names]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    users, items, interactions, last = json.loads(done.stdout.splitlines()[-1])
    counts, private = read_summary(simulated).counts, read_private(simulated)
    assert {"users": users, "items": items, "interactions": interactions}.items() <= counts.items()
    assert last == {user: private.item_ids[target] for user, target in zip(private.user_ids, private.targets, strict=True)}


def test_recbole_keeps_the_order_of_lists_whose_times_go_back(tmp_path: Path, source: SourceDomain) -> None:
    folder = write_domain(tmp_path / "d", replace(source, times=source.times[::-1].copy())).path
    done = export_domain(folder, "recbole", tmp_path / "out")
    assert any("go backwards" in line for line in done.lost)
    assert import_domain(done.path, "back", root=tmp_path).digest == read_summary(folder).digest


def test_in_order_looks_inside_of_lists_only() -> None:
    assert in_order(np.array([5, 6, 1, 2]), np.array([0, 2, 4]))
    assert in_order(np.array([5, 6, 1, 1]), np.array([0, 2, 2, 4]))
    assert not in_order(np.array([5, 4, 1, 2]), np.array([0, 2, 4]))
    assert not in_order(np.array([1, 2, 3, 2]), np.array([0, 2, 4, 4]))


@given(st.text(alphabet=st.sampled_from("ab &;#xlgtamp<>/!-\x00\u200b\n1script"), max_size=40))
@example("<a<b>>")
@example("<a" * 9 + ">" * 9)
@settings(max_examples=400, deadline=None)
def test_a_clean_text_can_be_written_so_that_it_reads_back(raw: str) -> None:
    clean = text.clean(raw)
    assert text.clean(text.written(clean)) == clean


# ------------------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize(
    ("change", "format", "message"),
    [
        ({"user_ids": ["u 1", "2", "3", "4", "5"]}, "s3rec", "user id 'u 1' holds white space"),
        ({"item_ids": ["A\tB", *"BCDEF"]}, "recbole", r"item id 'A\\tB' begins or ends"),
        ({"item_ids": ["A\n", *"BCDEF"]}, "lcrec", "item id 'A\\\\n'"),
        ({"item_ids": ["../up", *"BCDEF"]}, "utgrec", r"item id '\.\./up' is no name of a file"),
        ({"item_ids": ["[PAD]", *"BCDEF"]}, "utgrec", "is .PAD., the padding"),
        ({"columns": {"codes_x": [[-1], [1], [1], [1], [1], [1]]}}, "lcrec", "codes_x of item 'A' are .-1.; LC-Rec"),
        ({"columns": {"codes_x": [[], [1], [1], [1], [1], [1]]}}, "recbole", "'A' has an empty list as codes_x"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, source: SourceDomain, change: dict[str, Any], format: str, message: str
) -> None:
    folder = write_domain(tmp_path / "d", replace(source, **change)).path
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=message):
        export_domain(folder, format, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_never_writes_into_something(tmp_path: Path, domain: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_domain(domain, "lcrec", out)  # an empty folder is fine
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for format in ("lcrec", "utgrec"):
        with pytest.raises(DataError, match="is there already; name a new folder"):
            export_domain(domain, format, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    with pytest.raises(DataError, match=r"unknown format 'lcrek' \(did you mean 'lcrec'"):
        export_domain(domain, "lcrek", tmp_path / "new")


def test_a_full_disk_leaves_nothing(tmp_path: Path, domain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, whole: Whole) -> None:
        lcrec.write(folder, whole)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(FORMATS, "lcrec", replace(FORMATS["lcrec"], write=full))
    with pytest.raises(DataError, match="out: No space left on device; nothing was written"):
        export_domain(domain, "lcrec", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith((".out", "out"))] == []


def test_a_kill_leaves_nothing_and_the_next_export_clears_up(tmp_path: Path, domain: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom harness.data import export\n"
        "export._to_disk = lambda folder: (print('here', flush=True), time.sleep(60))\n"
        f"export.export_domain(Path({str(domain)!r}), 'utgrec', Path({str(tmp_path / 'out')!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.tmp"))
    export_domain(domain, "utgrec", tmp_path / "out")
    assert not list(tmp_path.glob(".out.*.tmp"))


def test_two_exports_at_once_make_one_folder(tmp_path: Path, domain: Path) -> None:
    """Both write; who comes second finds the place taken. Neither clears the other's half away."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom harness.data import export\n"
        "real = export._to_disk\n"
        "export._to_disk = lambda folder: (print('here', flush=True), sys.stdin.readline(), real(folder))\n"
        f"export.export_domain(Path({str(domain)!r}), 'lcrec', Path({str(tmp_path / 'out')!r}))\n"
    )
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.stdout.readline() for process in started if process.stdout] == ["here\n", "here\n"]
    errors = [process.communicate("go\n", timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 1]
    assert "Directory not empty; nothing was written" in errors[1]
    assert import_domain(tmp_path / "out", "back", root=tmp_path / "domains")
    assert not list(tmp_path.glob(".out.*"))


def test_another_protocol_is_refused(tmp_path: Path, domain: Path) -> None:
    head = domain / "public" / "domain.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), "protocol": "time-v1"}))
    with pytest.raises(ValueError, match="time-v1"):
        export_domain(domain, "parquet", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- bad input


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(change(value) or value))

    return run


def put(file: str, data: bytes | None, *more: str) -> Callable[[Path], None]:
    """Write (or, without data, take away) a file; ``more`` get the same data."""

    def run(folder: Path) -> None:
        for name in (file, *more):
            (folder / name).unlink() if data is None else (folder / name).write_bytes(data)

    return run


UTGREC: list[tuple[Callable[[Path], None], str]] = [
    (put(utgrec.MAPPING, None), "id_mapping.json is missing: it holds the catalogue"),
    (put(utgrec.SENTENCES, None), "metadata.sentence.json is missing: it holds the item text"),
    (put(utgrec.SEQUENCES, b""), "all_item_seqs.json is empty"),
    (put(utgrec.SEQUENCES, b'{"u": ["A",\n "B"'), r"all_item_seqs.json line 2 column 5: broken JSON"),
    (put(utgrec.SEQUENCES, b'{"u": ["A"],\n "u": ["B"]}'), "'u' stands there twice as a key"),
    (put(utgrec.SEQUENCES, b'{"u":\n ["\xff"]}'), "all_item_seqs.json line 2: not UTF-8"),
    (put(utgrec.SEQUENCES, b"[1, 2]"), "must hold a JSON object"),
    (put(utgrec.SEQUENCES, b"{}"), "must hold a JSON object with at least one key"),
    (put(utgrec.SEQUENCES, b'{"u": [NaN]}'), "'NaN' is no number of JSON"),
    (put(utgrec.SEQUENCES, b"[" * 100_000), "nested too deeply"),
    (edit(utgrec.SEQUENCES, lambda lists: {**lists, "stranger": ["0"]}), "the user 'stranger' is not in user2id"),
    (edit(utgrec.SEQUENCES, lambda lists: {**lists, "0": ["0", "99"]}), "the user '0' has at place 1 the item '99', which"),
    (edit(utgrec.SEQUENCES, lambda lists: {**lists, "0": [0]}), "the user '0' has at place 0 the item 0"),
    (edit(utgrec.SEQUENCES, lambda lists: {**lists, "0": "0 1"}), "the user '0' has str, not a list"),
    (edit(utgrec.MAPPING, lambda m: {**m, "id2item": m["id2item"][1:]}), r"id2item\[0\] is '0'; number 0 is kept for padding"),
    (edit(utgrec.MAPPING, lambda m: {**m, "id2item": []}), r"id2item\[0\] is None"),
    (edit(utgrec.MAPPING, lambda m: {key: m[key] for key in ("item2id", "id2user")}), "user2id must be an object and id2user a list"),
    (edit(utgrec.MAPPING, lambda m: m["item2id"].update({"0": 7})), r"id2item\[1\] is '0', but item2id gives it 7"),
    (edit(utgrec.MAPPING, lambda m: m["item2id"].update({"0": True})), r"id2item\[1\] is '0', but item2id gives it True"),
    (edit(utgrec.MAPPING, lambda m: m["item2id"].update({"new": 6})), "item2id has 'new', which id2item lacks"),
    (edit(utgrec.MAPPING, lambda m: m["id2user"].append(["x"])), r"id2user\[5\] is \['x'\]"),
    (edit(utgrec.SENTENCES, lambda texts: texts.update({"0": ["a"]})), "the item '0' has list, not a sentence"),
    (put("a.sem_ids", b'{"99": [1]}'), "a.sem_ids: the item '99' is not in the catalogue"),
    (put("a.sem_ids", b'{"1": [1.5]}'), r"the codes of item '1' are '\[1.5\]'; they must be a list of whole numbers"),
    (put("a.sem_ids", b'{"1": 5}'), "the codes of item '1' are '5'"),
    (put("a b.sem_ids", b'{"1": [5]}', "a_b.sem_ids"), "another file gives the column 'codes_a_b'"),
]  # fmt: skip

LCREC: list[tuple[Callable[[Path], None], str]] = [
    (put("x.inter.json", b'{"0": [1, 2,\n3'), "x.inter.json line 2 column 2: broken JSON"),
    (put("x.inter.json", b'{"u0": [1, 2, 3]}'), "the user 'u0' is no number"),
    (put("x.inter.json", b'{"07": [1, 2, 3]}'), "the user '07' is no number"),
    (put("x.inter.json", b'{"0": {"1": 2}}'), "the user '0' has {'1': 2}; right is a list of item numbers"),
    (put("x.inter.json", b'{"0": [1, -2]}'), "the user '0' has -2; right is"),
    (put("x.inter.json", b'{"0": [1, 2.0]}'), "the user '0' has 2.0; right is"),
    (put("x.inter.json", b'{"0": [1, true]}'), "the user '0' has True; right is"),
    (put("x.inter.json", b'{"0": [1, 99, 2]}'), "the user '0' has the item 99, which x.item.json lacks"),
    (edit("x.item.json", lambda facts: facts.update({"B001": {}})), "'B001': dict; right is an item number"),
    (edit("x.item.json", lambda facts: facts.update({"2": "a title"})), "'2': str; right is"),
    (edit("x.item.json", lambda facts: facts["2"].update(titel="x")), r"item '2': unknown key 'titel'.*'title'.*--ignore titel"),
    (edit("x.item.json", lambda facts: facts["2"].update(title=3)), "item '2': 'title' is int; texts are strings"),
    (put("x.item2id", b"B0\t0\nB1 1\n"), "x.item2id line 2: 'B1 1'; right is an id, a tab, its number"),
    (put("x.item2id", b"B0\t0\nB1\t0\n"), "x.item2id line 2: the number 0 stands for 'B0' already"),
    (put("x.item2id", b"B0\t0\n"), "x.item2id: the number 1 of x.item.json is missing"),
    (put("x.user2id", b"R0\t0\n"), "x.user2id: the number 1 of x.inter.json is missing"),
    (put("x.item2id", b"".join(b"B\t%d\n" % n for n in range(5))), "item 1: the id 'B' stands already at item 0"),
    (put("x.index.json", b'{"1": ["<a_1>", "<a_2>"]}'), r"the codes of item '1' are .*; they must be tokens like <a_12>"),
    (put("x.index.json", b'{"1": "<a_1>"}'), "the codes of item '1'"),
    (put("x.index.json", b'{"99": ["<a_1>"]}'), "x.index.json: the item '99' is not in the catalogue"),
    (put("x.index.json", b'{"1": []}', "x.index_index.json"), "gives the column 'codes_index' already"),
    (put("y.inter.json", b"{}"), "has 2 files"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "damage", "message"), [("utgrec", *case) for case in UTGREC] + [("lcrec", *case) for case in LCREC])
def test_bad_files(format: str, damage: Callable[[Path], None], message: str, tmp_path: Path, writers: dict[str, Any]) -> None:
    folder = writers[format](tmp_path / "in", [[0, 1, 2], [2, 3, 4], [1, 2, 3], [4, 0, 1]])
    damage(folder)
    with pytest.raises(DataError, match=message):
        import_domain(folder, "d", root=tmp_path / "out", format=format)
    assert not (tmp_path / "out" / "d").exists()


def test_lcrec_numbers_stand_for_ids(tmp_path: Path, writers: dict[str, Any]) -> None:
    folder = writers["lcrec"](tmp_path / "in", [[0, 1, 2], [2, 1, 0]])
    plain = import_domain(folder, "plain", root=tmp_path)
    assert sorted(read_private(plain.path).item_ids) == ["0", "1", "2"]
    (folder / "x.item2id").write_text("B0\t0\nB1\t1\nB2\t2\nB3\t3\n")
    (folder / "x.user2id").write_text("R one\t0\nR two\t1\n")
    named = import_domain(folder, "named", root=tmp_path)
    assert sorted(read_private(named.path).item_ids) == ["B0", "B1", "B2", "B3"]  # item2id names one more
    assert sorted(read_private(named.path).user_ids) == ["R one", "R two"]
    titles = dict(zip(read_private(named.path).item_ids, Domain.read(named.path / "public").items["title"].to_pylist(), strict=True))
    assert titles == {"B0": "title 0", "B1": "title 1", "B2": "title 2", "B3": None}


def test_lcrec_without_texts_takes_the_items_of_the_lists(tmp_path: Path, writers: dict[str, Any]) -> None:
    folder = writers["lcrec"](tmp_path / "in", [[0, 7, 2], [2, 7, 0]])
    (folder / "x.item.json").unlink()
    assert import_domain(folder, "d", root=tmp_path).counts["items"] == 3


def test_lcrec_beside_its_own_atomic_files_is_told_from_recbole(tmp_path: Path, writers: dict[str, Any]) -> None:
    folder = writers["lcrec"](tmp_path / "in", [[0, 1, 2]])
    (folder / "x.train.inter").write_text("user_id:token\titem_id_list:token_seq\titem_id:token\n0\t0\t1\n")
    assert import_domain(folder, "d", root=tmp_path).counts["users"] == 1


def test_utgrec_pictures_are_checked_and_counted(tmp_path: Path, writers: dict[str, Any]) -> None:
    folder = writers["utgrec"](tmp_path / "in", [[0, 1, 2], [2, 3, 4]])
    (folder / "Images").mkdir()
    (folder / "Images" / "0.jpg").write_bytes(picture(7))
    (folder / "Images" / "1.jpg").write_bytes(picture(7)[:300])
    (folder / "Images" / "2.jpg").write_bytes(b"<html>gone</html>")
    (folder / "Images" / "3.jpg").write_bytes(picture(9, side=1500))
    (folder / "Images" / "99.jpg").write_bytes(b"of nobody")
    summary = import_domain(folder, "d", root=tmp_path)
    validate_domain(summary.path)
    pictures, ids = Domain.read(summary.path / "public").pictures, read_private(summary.path).item_ids
    assert {ids[item] for item in range(5) if item in pictures} == {"0", "3"}
    assert pictures[ids.index("0")] == picture(7)
    assert max(Image.open(io.BytesIO(pictures[ids.index("3")])).size) == 1024
    dropped = read_private(summary.path).info["dropped"]
    assert {key: count for key, count in dropped.items() if key.startswith("no_picture")} == {
        "no_picture_not_a_picture": 1, "no_picture_not_found": 1, "no_picture_truncated": 1,
    }  # fmt: skip


def test_recbole_codes(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\nu\ta\nu\tb\nu\ta\n")
    (tmp_path / "x.item").write_text("item_id:token\tcodes_q:token_seq\na\t1 2 3\nb\t\n")
    summary = import_domain(tmp_path, "d", root=tmp_path / "out")
    codes = dict(zip(read_private(summary.path).item_ids, Domain.read(summary.path / "public").items["codes_q"].to_pylist(), strict=True))
    assert codes == {"a": [1, 2, 3], "b": None}
    (tmp_path / "x.item").write_text("item_id:token\tcodes_q:token_seq\na\t1 x\n")
    with pytest.raises(DataError, match=r"x.item line 2: 'codes_q' is '1 x'; codes are whole numbers"):
        import_domain(tmp_path, "e", root=tmp_path / "out")


def test_times_of_whole_histories_are_kept_and_private(tmp_path: Path, source: SourceDomain) -> None:
    folder = write_domain(tmp_path / "d", source).path
    private = read_private(folder)
    times = dict(zip(private.user_ids, ([int(t) for t in row] for row in private.history_times), strict=True))
    assert times == {"u1": [1, 1, 2], "u2": [1, 2, 3, 4], "u3": [5, 5, 5], "u5": [1, 2, 3, 4, 5]}
    assert read_private(write_domain(tmp_path / "e", replace(source, times=None)).path).history_times is None
    (folder / "private" / "times.parquet").unlink()  # of a domain that was written before times were kept
    assert not write_domain(folder, source).created
    assert read_private(folder).history_times is not None


def test_times_of_other_histories_are_found(tmp_path: Path, source: SourceDomain) -> None:
    folder = write_domain(tmp_path / "d", source).path
    file = folder / "private" / "times.parquet"
    table = pq.read_table(file)
    validate_domain(folder)
    lists = table["times"].to_pylist()
    for wrong in ([lists[0][:-1], *lists[1:]], [[*lists[0][:-1], 99], *lists[1:]]):
        pq.write_table(table.set_column(1, "times", [wrong]), file)
        with pytest.raises(DataError, match=r"times.parquet: not the times of these histories"):
            validate_domain(folder)


def test_parquet_export_is_a_pair_of_plain_columns(tmp_path: Path) -> None:
    folder = write_domain(tmp_path / "d", SourceDomain(["u"], ragged([[0, 1, 0]]), ["b", "a"], columns={"title": ["Bee", "Ay"]})).path
    out = export_domain(folder, "parquet", tmp_path / "out").path
    assert pq.read_table(out / "sequences.parquet").to_pylist() == [{"user_id": "u", "item_ids": ["b", "a", "b"]}]
    rows = {row["item_id"]: row["title"] for row in pq.read_table(out / "items.parquet").to_pylist()}
    assert rows == {"b": "Bee", "a": "Ay"}
