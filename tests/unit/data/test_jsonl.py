"""Reading raw files in blocks: what is accepted, skipped and refused, with both decoders, plain and gzipped, whatever the block size.

The quick decoder is held to the slow one, which goes line by line with the standard library: on a table of bad input, and on lines in
which bytes were changed, lost or doubled at random.
"""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pytest

from harness.data import jsonl
from harness.data.jsonl import json_lines
from harness.data.reviews import read_metadata, read_reviews
from harness.data.source import DataError

DECODERS = ("msgspec", "line by line")


def choose(decoder, monkeypatch):
    if decoder == "line by line":

        def refuse(schema):
            def decode(block, ends):
                raise jsonl.Refused

            return decode

        monkeypatch.setattr(jsonl, "columns", refuse)


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


def line(user="u", item="i", time=1, **more):
    return json.dumps({"rating": 5.0, "text": 'say "user_id": {', "user_id": user, "parent_asin": item, "timestamp": time, **more}).encode()


GOOD = line()
ROW = ("u", "i", 1)
ACCEPTED = {
    "one line": (GOOD + b"\n", [ROW], 0),
    "no line end after the last line": (GOOD + b"\n" + GOOD, [ROW, ROW], 0),
    "CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", [ROW, ROW], 0),
    "byte order mark": (jsonl.BOM + GOOD + b"\n" + GOOD + b"\n", [ROW, ROW], 0),
    "space around": (b" " + GOOD + b"\t\n" + GOOD + b"\n", [ROW, ROW], 0),
    "beyond ASCII": (line("ü€", "\U0001f600") + b"\n" + '{"user_id":"é","parent_asin":"ß","timestamp":2,"x":"漢"}\n'.encode(), None, 0),
    "escapes": (b'{"user\\u005fid": "\\u0041", "parent_asin": "\\"", "timestamp": -5}\n', [("A", '"', -5)], 0),
    "the last of a repeated key counts": (GOOD[:-1] + b', "user_id": "v"}\n', [("v", "i", 1)], 0),
    "repeated key, at last null": (GOOD + b"\n" + GOOD[:-1] + b', "user_id": null}\n', [ROW], 1),
    "half a surrogate pair elsewhere": (line(text="\ud800") + b"\n", [ROW], 0),
    "NaN elsewhere": (GOOD[:-1] + b', "x": NaN}\n', [ROW], 0),
    "unknown fields": (line(a={"user_id": "w", "parent_asin": 3}, images=[{"timestamp": "no"}]) + b"\n", [ROW], 0),
    "missing fields": (GOOD + b'\n{"user_id": "u", "timestamp": 1}\n{}\n', [ROW], 2),
    "null, empty": (GOOD + b"\n" + line(None) + b"\n" + line("") + b"\n" + line("u", "") + b"\n" + line("u", "i", None) + b"\n", [ROW], 4),
    "user is a number": (GOOD + b"\n" + line(7) + b"\n" + line("v") + b"\n", [ROW, ("v", "i", 1)], 1),
    "user is true": (GOOD + b"\n" + line(True) + b"\n", [ROW], 1),
    "user is a list": (GOOD + b"\n" + line(["u"]) + b"\n", [ROW], 1),
    "item is an object": (GOOD + b"\n" + line("u", {"a": 1}) + b"\n", [ROW], 1),
    "time is text": (GOOD + b"\n" + line("u", "i", "12") + b"\n", [ROW], 1),
    "time is true": (GOOD + b"\n" + line("u", "i", True) + b"\n", [ROW], 1),
    "time is a fraction": (GOOD + b"\n" + line("u", "i", 1.0) + b"\n" + line("u", "i", 1.5) + b"\n", [ROW], 2),
    "time is too large": (b"\n".join((GOOD, line("u", "i", 2**62), line("u", "i", 10**30), line("u", "i", -(2**62)))), [ROW], 3),
    "time is as large as it may be": (line("u", "i", 2**62 - 1) + b"\n", [("u", "i", 2**62 - 1)], 0),
    "a very long line": (line(text="x" * 300_000) + b"\n" + GOOD + b"\n", [ROW, ROW], 0),
}
REFUSED = {
    "empty": (b"", "is empty"),
    "only a byte order mark": (jsonl.BOM, "is empty"),
    "no review": (b'{"a": 1}\n', "no review with user_id"),
    "broken line": (GOOD + b"\n" + GOOD[:-1] + b"\n" + GOOD + b"\n", "line 2: broken JSON"),
    "broken last line": (GOOD + b"\n" + GOOD[:9], "line 2: broken JSON"),
    "blank line": (GOOD + b"\n\n" + GOOD + b"\n", "line 2: broken JSON"),
    "blank first line": (b"\n" + GOOD + b"\n", "line 1: broken JSON"),
    "blank line and two objects in another": (GOOD + b"\n\n" + GOOD + GOOD + b"\n", "line 2: broken JSON"),
    "two objects in a line": (GOOD + b"\n" + GOOD + GOOD + b"\n", "line 2: broken JSON .Extra data"),
    "an object over two lines": (GOOD + b'\n{"a": {}\n, "b": {}}\n', "line 2: broken JSON"),
    "not an object": (GOOD + b"\n[1]\n", "line 2: not a JSON object"),
    "null": (GOOD + b"\nnull\n", "line 2: not a JSON object"),
    "not UTF-8 in a field that is read": (GOOD + b"\n" + GOOD.replace(b'"u"', b'"\xff"') + b"\n", "line 2: not UTF-8"),
    "not UTF-8 elsewhere": (GOOD + b"\n" + GOOD.replace(b"say", b"s\xffy") + b"\n", "line 2: not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
    "byte order mark in the middle": (GOOD + b"\n" + jsonl.BOM + GOOD + b"\n", "line 2: broken JSON .Unexpected UTF-8 BOM"),
    "control character elsewhere": (GOOD + b"\n" + GOOD.replace(b"say", b"s\ty") + b"\n", "line 2: broken JSON .Invalid control"),
    "wrong escape elsewhere": (GOOD + b"\n" + GOOD.replace(b"say", b"s\\qy") + b"\n", r"line 2: broken JSON .Invalid \\escape"),
    "number with a zero before it": (GOOD + b"\n" + GOOD.replace(b"5.0", b"05") + b"\n", "line 2: broken JSON"),
    "comma too many": (GOOD + b"\n" + GOOD[:-1] + b",}\n", "line 2: broken JSON"),
    "half a surrogate pair in an id": (GOOD + b"\n" + line("\ud800") + b"\n", "line 2: .*half a surrogate pair"),
}


def outcome(path):
    """What reading a review file gives: rows and skipped, or the message."""
    try:
        reviews = read_reviews(path)
    except DataError as error:
        return str(error)
    return list(zip(reviews.users_R.to_pylist(), reviews.items_R.to_pylist(), reviews.times_R.tolist(), strict=True)), reviews.skipped


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(tmp_path, decoder, case, suffix):
    data, rows, skipped = ACCEPTED[case]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert outcome(path) == (rows or [("ü€", "\U0001f600", 1), ("é", "ß", 2)], skipped)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, decoder, case):
    data, message = REFUSED[case]
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    found = outcome(path)
    assert isinstance(found, str)
    assert found.startswith(str(path))
    assert re.search(message, found), found


def test_nesting_that_nobody_needs(tmp_path, decoder):
    """A thousand brackets too many: read past or refused, never a crash."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b'\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    found = outcome(path)
    assert found == ([ROW], 1) or "line 2: broken JSON (nested too deeply)" in found


@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
def test_line_numbers_and_order_over_many_blocks(tmp_path, decoder, monkeypatch, block):
    monkeypatch.setattr(jsonl, "BLOCK", block)
    lines = [line(f"u{n}", f"i{n * 7 % 90}", n, text="x" * (n % 50)) for n in range(400)]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    assert outcome(path) == ([(f"u{n}", f"i{n * 7 % 90}", n) for n in range(400)], 0)
    assert [number for number, _ in json_lines(path)] == list(range(1, 401))
    lines[311] = lines[311][:-2]
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    assert "line 312: broken JSON" in outcome(path)
    with pytest.raises(DataError, match="line 312: broken JSON"):
        list(json_lines(path))


def test_the_quick_decoder_never_differs_from_the_slow_one(tmp_path, monkeypatch):
    """Six lines with bytes changed, lost or doubled: the same rows and counts, or the same words of complaint."""
    monkeypatch.setattr(jsonl, "BLOCK", 700)
    rng = np.random.default_rng(3)
    letters = np.frombuffer(b'{}[]",:\\ \n\r\t0123eE+-.nutfalsr\x00\x80\xc3\xff/', np.uint8)
    path, kinds = tmp_path / "x.jsonl", {"rows": 0, "complaints": 0}
    for _ in range(400):
        lines = [line(f"u{n}", "é" * (n % 2) + "i", n, more=[{"a": None}, 1e5, [True]]) for n in range(6)]
        data = bytearray(b"\n".join(lines) + b"\n")
        for _ in range(int(rng.integers(1, 3))):
            at = int(rng.integers(len(data)))
            data[at : at + int(rng.integers(2))] = bytes(rng.choice(letters, int(rng.integers(2)))) or data[at : at + 1] * int(
                rng.integers(3)
            )
        path.write_bytes(data)
        with monkeypatch.context() as patch:
            choose("line by line", patch)
            expected = outcome(path)
        assert outcome(path) == expected, bytes(data)
        kinds["complaints" if isinstance(expected, str) else "rows"] += 1
    assert min(kinds.values()) > 50


def test_the_quick_decoder_is_used(tmp_path):
    """Ordinary lines do not end up with the slow decoder."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(line(f"u{n}", text="é") + b"\n" for n in range(100)))
    schema = pa.schema([("user_id", pa.string()), ("timestamp", pa.int64())])
    ((first, _, found),) = jsonl.decoded(path, jsonl.columns, schema)
    assert (first, found[0][99].as_py(), found[1].to_pylist()) == (1, "u99", [1] * 100)


# ---------------------------------------------------------------------------------------------------------------- gzip

MANY = b"".join(line(f"u{n}", text=f"{n * 7919 % 1000003}" * 9) + b"\n" for n in range(5000))


def test_gzip_members_and_padding(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl.gz"
    cut = len(MANY) // 2  # in the middle of a line
    for block in (997, 1 << 20):
        monkeypatch.setattr(jsonl, "BLOCK", block)
        path.write_bytes(gzip.compress(MANY[:cut]) + gzip.compress(b"") + gzip.compress(MANY[cut:]) + b"\0" * 5000)
        assert b"".join(jsonl.blocks(path)) == MANY


def test_one_byte_a_million_times_stays_small(tmp_path, monkeypatch):
    """Bytes that unfold to a thousand times their size come out in blocks, too."""
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 50_000_000))
    monkeypatch.setattr(jsonl, "BLOCK", 1 << 16)
    sizes = [len(chunk) for chunk in jsonl._gunzip(path)]
    assert sum(sizes) == 50_000_000
    assert max(sizes) <= 1 << 16
    monkeypatch.setattr(jsonl, "LONGEST", 1 << 20)
    with pytest.raises(DataError, match="after line 0: a line is longer than 1 MB"):
        read_reviews(path)


def damaged(whole: bytes) -> dict[str, bytes]:
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 255
    checksum = bytearray(whole)
    checksum[-6] ^= 1
    return {
        "cut": whole[:-2000],
        "without its last byte": whole[:-1],
        "a byte changed": bytes(middle),
        "wrong checksum": bytes(checksum),
        "something else behind": whole + b"something else",
        "second member cut": whole + whole[:-30],
        "not gzip": b"plain text",
        "one byte": b"\x1f",
    }


@pytest.mark.parametrize("case", damaged(gzip.compress(b"")))
def test_damaged_gzip(tmp_path, case, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK", 1 << 14)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damaged(gzip.compress(MANY))[case])
    for read in (read_reviews, lambda path: list(json_lines(path)), lambda path: read_metadata(path, ["i"])):
        with pytest.raises(DataError, match=r"x.jsonl.gz (after line|line) \d+: .*") as error:
            read(path)
        if case != "a byte changed":  # that may also give other text, which is then no JSON
            assert "the gzip file is truncated or damaged" in str(error.value)
        if case in ("cut", "without its last byte", "wrong checksum"):
            assert 4000 < int(re.findall(r"line (\d+)", str(error.value))[0]) <= 5000


def test_nothing_is_read_ahead_of_what_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(MANY)
    monkeypatch.setattr(jsonl, "BLOCK", 10_000)
    seen = []

    def count(block, ends):
        seen.append(len(ends))
        return len(ends)

    results = jsonl.decoded(path, lambda: count)
    next(results)
    results.close()
    assert len(seen) == 1
    assert len(list(jsonl.blocks(path))) > 50


# ------------------------------------------------------------------------------------------------------------ metadata


def test_metadata(tmp_path, decoder):
    records = [
        {"parent_asin": "i0", "title": "First", "features": ["f", "g"], "store": "S", "images": "odd", "unknown": {"x": 1}},
        {"parent_asin": "i0", "title": "Second"},
        {"parent_asin": "elsewhere", "title": 5},
        {"parent_asin": "i1", "title": 5, "description": [None], "categories": []},
        {"title": "no id"},
        {"parent_asin": 7, "title": "x"},
        {"parent_asin": "i2", "title": "half \ud800"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    texts, counts = read_metadata(path, ["i2", "i0", "i1", "i9"])
    columns = {name: column.to_pylist() for name, column in texts.parts.items()}
    assert counts == {"items_without_metadata": 1, "repeated_metadata": 1, "metadata_fields_of_wrong_type": 2}
    assert columns["title"] == ["half", "First", None, None]
    assert columns["features"] == [None, "f, g", None, None]
    assert columns["categories"] == [None] * 4
    assert columns["brand"][1] == "S"
    assert texts.texts.to_pylist() == ["half.", "First. f, g.", None, None]
    path.write_bytes(b'{"parent_asin": "i0"}\n{"parent_asin": "else", "title": "a\tb"}\n')
    with pytest.raises(DataError, match="line 2: broken JSON"):
        read_metadata(path, ["i0"])
