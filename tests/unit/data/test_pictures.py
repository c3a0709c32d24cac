"""Pictures: which URL, what a host may do wrong, what a stop or a full disk leaves, and how a domain gets its pack."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.contract import Domain, Pictures
from harness.data import domain as domain_module
from harness.data.card import make_card
from harness.data.domain import DataError, read_private, validate_domain
from harness.data.images import Refused, kept_bytes
from harness.data.picture_fetch import HostRefuses, Job, Manners, fetch, retry_after
from harness.data.picture_store import LEDGER, PACK, Outcome, PicturePack, open_store, read_ledger
from harness.data.pictures import SERVER, Download, find_pictures, items_of, picture_url, put_into_domain, read_urls, resolve
from harness.data.prepare import prepare_raw
from tests.web_server import Content, Drop, Length, Slow, Stall, Status, WebServer, web_server  # noqa: F401 (a fixture)

CATEGORY = "Video_Games"
QUICK = Manners(tries=3, connect=2.0, stall=0.5, deadline=1.0, backoff=0.01, longest_wait=5.0)


def encoded(side: int | tuple[int, int] = 24, kind: str = "JPEG", seed: int = 0, mode: str = "RGB", **options) -> bytes:
    width, height = (side, side) if isinstance(side, int) else side
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def picture(name: str) -> bytes:
    """Another one for every name."""
    return encoded(seed=int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))


def record(item: str, url: str | None, **more) -> dict:
    images = [] if url is None else [{"thumb": None, "large": url, "variant": "MAIN", "hi_res": None}]
    return {"parent_asin": item, "title": f"Title of {item}", "images": images, **more}


def write_metadata(raw: Path, records: list[dict]) -> None:
    path = raw / "meta_categories" / f"meta_{CATEGORY}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))


def raw_folder(tmp_path: Path, server: WebServer, names: list[str]) -> Path:
    """Metadata of items that the server has pictures of."""
    for name in names:
        server.serve(f"/I/{name}.jpg", picture(name))
    write_metadata(tmp_path, [record(name, server.url(f"/I/{name}.jpg")) for name in names])
    return tmp_path


def pack(raw: Path) -> PicturePack:
    return PicturePack(raw / "pictures" / CATEGORY)


# ---------------------------------------------------------------------------------------------------------------- URLs

L, H, T = "https://m.media-amazon.com/images/I/41++pw.jpg", "https://x/hi.jpg", "https://x/thumb.jpg"


@pytest.mark.parametrize(
    ("images", "url"),
    [
        ([{"thumb": T, "large": L, "variant": "MAIN", "hi_res": H}], L),
        ([{"large": "https://x/a.jpg", "variant": "PT01"}, {"large": L, "variant": "MAIN"}], L),
        ([{"large": L, "variant": "PT01"}, {"large": H, "variant": "PT02"}], L),  # no MAIN: the first
        ([{"thumb": T, "large": None, "variant": "MAIN", "hi_res": H}], H),  # large is no URL: the nearest size
        ([{"thumb": T, "large": "", "variant": "MAIN", "hi_res": None}], T),
        ([{"large": "MAIN", "hi_res": 7, "thumb": "ftp://x/y.jpg", "variant": "MAIN"}, {"large": L}], L),  # MAIN has no URL at all
        ([{"large": "https://x/a b.jpg", "hi_res": "https:///a.jpg", "thumb": "http://[::1/a.jpg"}], None),
        ({"hi_res": [None, H], "large": [L, H], "thumb": [T, T], "variant": ["PT01", "PT02"]}, L),  # as the hub's loader gives it
        ({"hi_res": [H, None], "large": [H, L], "thumb": [T, T], "variant": ["PT01", "MAIN"]}, L),
        ({"large": "odd"}, None),
        ([None, "https://x/y.jpg", {}], None),
        ([], None),
        (None, None),
        ("https://x/y.jpg", None),
    ],
)
def test_choice_of_the_url(images, url):
    assert picture_url(images) == url


def test_the_first_record_of_an_item_counts(tmp_path):
    records = [record("a", L), record("a", H), record("b", None), {"title": "no id"}, record("c", T)]
    write_metadata(tmp_path, records)
    path = tmp_path / "meta_categories" / f"meta_{CATEGORY}.jsonl"
    assert read_urls(path) == {"a": L, "b": None, "c": T}
    assert read_urls(path, ["a", "b", "z"]) == {"a": L, "b": None}


# ------------------------------------------------------------------------------------------------------- what is kept


def test_bytes_are_kept_or_made_a_jpeg():
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded((1024, 7), kind)
        assert kept_bytes(data) is data
    for data, size in [
        (encoded((2048, 512)), (1024, 256)),
        (encoded(20, "GIF"), (20, 20)),
        (encoded((1500, 300), "PNG", mode="I;16"), (1024, 205)),
        (encoded((1500, 300), "JPEG", mode="CMYK"), (1024, 205)),
    ]:
        with Image.open(io.BytesIO(kept_bytes(data))) as made:
            assert (made.format, made.mode, made.size) == ("JPEG", "RGB", size)


def test_film_becomes_its_first_frame():
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue", "lime")]
    for kind in ("GIF", "WEBP", "PNG"):
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True, append_images=frames[1:])
        with Image.open(io.BytesIO(kept_bytes(out.getvalue()))) as made:
            assert made.format == "JPEG"
            assert made.getpixel((15, 15)) == pytest.approx((254, 0, 0), abs=3)


def test_what_is_encoded_anew_looks_the_same():
    clear = Image.new("RGBA", (1400, 700), (0, 0, 0, 0))
    out = io.BytesIO()
    clear.save(out, "PNG")
    with Image.open(io.BytesIO(kept_bytes(out.getvalue()))) as made:
        assert made.getpixel((500, 200)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    with Image.open(io.BytesIO(kept_bytes(encoded((1400, 700), exif=exif)))) as made:
        assert made.size == (512, 1024)


def bomb(kind: str) -> bytes:
    """Few bytes that claim to be 30,000 x 30,000 pixels."""
    data, side = bytearray(encoded(20, kind)), 30_000
    if kind == "PNG":
        struct.pack_into(">II", data, 16, side, side)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif kind == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, side, side)
    else:
        struct.pack_into("<HH", data, 6, side, side)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_a_picture"),
        (b"<!DOCTYPE html><html>Sorry</html>", "not_a_picture"),
        (encoded(20, "BMP"), "not_a_picture"),
        (encoded(1, "GIF"), "tiny"),
        (encoded((800, 2)), "tiny"),
        (bomb("PNG"), "bomb"),
        (bomb("JPEG"), "bomb"),
        (bomb("GIF"), "bomb"),
        (encoded()[:16].ljust(200, b"\0"), "not_a_picture"),
        (bytes((32 << 20) + 1), "too_large"),
    ],
)
def test_what_is_no_picture_is_refused(data, reason):
    with pytest.raises(Refused) as refused:
        kept_bytes(data)
    assert refused.value.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_picture_without_its_end_is_refused(kind):
    whole = encoded(40, kind)
    for cut in (len(whole) // 10, len(whole) // 2, *((1, 2, 9) if kind != "GIF" else ())):  # a GIF may lack its last byte
        with pytest.raises(Refused):
            kept_bytes(whole[:-cut])


# ---------------------------------------------------------------------------------------------------------- the fault table

GOOD = picture("good")
LARGE = encoded((1300, 40))

FAULTS = {
    # name: (faults, always, what comes of it, requests)
    "good": ([], None, "", 1),
    "403": ([], Status(403), "http_403", 1),
    "404": ([], Status(404), "http_404", 1),
    "410": ([], Status(410), "http_410", 1),
    "429 once": ([Status(429, retry_after="0")], None, "", 2),
    "429 with a date": ([Status(429, retry_after=formatdate(time.time() - 5, usegmt=True))], None, "", 2),
    "429 without Retry-After": ([Status(429)], None, "", 2),
    "429 always": ([], Status(429, retry_after="0"), "http_429", 3),
    "429 for an hour": ([], Status(429, retry_after="3600"), "http_429", 1),
    "500 twice": ([Status(500), Status(500)], None, "", 3),
    "502, 503": ([Status(502), Status(503, retry_after="0")], None, "", 3),
    "504 always": ([], Status(504), "http_504", 3),
    "dropped": ([Drop(100)], None, "", 2),
    "reset": ([Drop(100, reset=True)], None, "", 2),
    "dropped always": ([], Drop(100), "wrong_length", 3),
    "length too large": ([Length(len(GOOD) + 10)], None, "", 2),
    "length always too large": ([], Length(len(GOOD) + 10), "wrong_length", 3),
    "length too small": ([], Length(len(GOOD) - 10), "truncated", 1),
    "stalls": ([Stall(100)], None, "", 2),
    "stalls always": ([], Stall(100), "timeout", 3),
    "slow body": ([], Slow(len(GOOD) * 0.4), "timeout", 3),
    "truncated picture": ([], Content(GOOD[:-200]), "truncated", 1),
    "bomb": ([], Content(bomb("PNG")), "bomb", 1),
    "HTML": ([], Content(b"<html>" + b"x" * 500), "not_a_picture", 1),
    "nothing": ([], Content(b""), "not_a_picture", 1),
    "a dot": ([], Content(encoded(1, "GIF")), "tiny", 1),
    "too large to keep as it is": ([], Content(LARGE), "", 1),
    "35 MB": ([], Length(35 << 20), "too_large", 1),
}


def test_faults_of_a_host(tmp_path, web_server):  # noqa: F811
    """All at once, as they come; nothing but the item itself is hurt."""
    for name, (faults, always, _, _) in FAULTS.items():
        web_server.serve(f"/{name}.jpg", GOOD, faults=faults, always=always)
    web_server.serve("/moved.jpg", b"", redirect=web_server.url("/good.jpg"))
    web_server.serve("/circle.jpg", b"", redirect=web_server.url("/circle.jpg"))
    urls = {name: web_server.url(f"/{name}.jpg".replace(" ", "%20")) for name in [*FAULTS, "absent", "moved", "circle"]}
    write_metadata(tmp_path, [*(record(name, url) for name, url in urls.items()), record("no url", None)])
    outcomes = Download(tmp_path, CATEGORY, [*urls, "no url", "no record"], manners=QUICK).run()
    assert {name: outcomes[name].reason for name in FAULTS} == {name: reason for name, (_, _, reason, _) in FAULTS.items()}
    asked = Counter(entry.path for entry in web_server.log)
    assert {name: asked[f"/{name}.jpg"] for name in FAULTS if name != "good"} == {
        name: requests for name, (_, _, _, requests) in FAULTS.items() if name != "good"
    }
    assert all(outcomes[name].tries == requests for name, (_, _, _, requests) in FAULTS.items())
    others = {"absent": "http_404", "moved": "", "circle": "bad_url", "no url": "no_url", "no record": "no_metadata"}
    assert {name: outcomes[name].reason for name in others} == others
    assert outcomes["429 for an hour"].detail.endswith("Retry-After 3600 s")
    found = pack(tmp_path)
    assert found["429 once"] == found["stalls"] == found["moved"] == GOOD
    assert outcomes["good"].source_sha256 == ""
    assert outcomes["too large to keep as it is"].source_sha256 == hashlib.sha256(LARGE).hexdigest()
    assert Image.open(io.BytesIO(found["too large to keep as it is"])).size[0] == 1024
    assert dict(found) == {name: found[name] for name, outcome in outcomes.items() if not outcome.reason}


def test_429_stops_the_whole_host_for_as_long_as_it_says(tmp_path, web_server):  # noqa: F811
    names = [f"i{n}" for n in range(12)]
    raw_folder(tmp_path, web_server, names)
    web_server.serve("/I/i0.jpg", picture("i0"), faults=[Status(429, retry_after="1")])
    for name in names[1:]:
        web_server.serve(f"/I/{name}.jpg", picture(name), delay=0.05)
    outcomes = Download(tmp_path, CATEGORY, manners=Manners(per_host=2, backoff=0.01)).run()
    assert all(outcome.kept for outcome in outcomes.values())
    refused = next(entry.started for entry in web_server.log if entry.status == 429)
    during = [entry for entry in web_server.log if 0 < entry.started - refused < 1.0]
    assert len(during) <= 1  # what was under way already
    assert len(web_server.log) == 13


def test_no_more_requests_at_once_than_allowed_and_hosts_do_not_wait_for_each_other(tmp_path, web_server):  # noqa: F811
    with WebServer(delay=0.03) as other:
        names = [f"i{n}" for n in range(24)]
        raw_folder(tmp_path, web_server, names)
        web_server.delay = 0.03
        web_server.serve("/I/i0.jpg", picture("i0"), faults=[Status(503, retry_after="1")])
        write_metadata(tmp_path, [record(name, (other if n % 2 else web_server).url(f"/I/{name}.jpg")) for n, name in enumerate(names)])
        for name in names[1::2]:
            other.serve(f"/I/{name}.jpg", picture(name))
        outcomes = Download(tmp_path, CATEGORY, manners=Manners(per_host=3)).run()
        assert all(outcome.kept for outcome in outcomes.values())
        assert web_server.busiest == other.busiest == 3
        assert max(entry.started for entry in other.log) < max(entry.started for entry in web_server.log) - 0.5


def test_retry_after():
    now = time.time()
    assert retry_after(None) is None
    assert retry_after("soon") is None
    assert retry_after(" 12 ") == 12
    assert retry_after(formatdate(now + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert retry_after(formatdate(now - 30, usegmt=True)) == 0


@pytest.mark.parametrize(("fault", "message"), [(Status(403), "x http_403"), (Content(b"<html>robot?"), "x not_a_picture")])
def test_a_host_that_refuses_everything_is_left_alone(tmp_path, web_server, fault, message):  # noqa: F811
    names = [f"i{n}" for n in range(300)]
    raw_folder(tmp_path, web_server, names)
    for name in names[20:]:
        web_server.serve(f"/I/{name}.jpg", picture(name), always=fault)
    manners = Manners(per_host=4)
    with pytest.raises(HostRefuses, match=message):
        Download(tmp_path, CATEGORY, manners=manners).run()
    kept = [outcome.kept for outcome in pack(tmp_path).outcomes.values()]  # in order of arrival
    failed = kept[::-1].index(True)  # since the last success, which begins the count anew
    end = manners.patience + manners.per_host  # each of the other workers may have had one more on its way
    assert manners.patience <= failed < end
    assert len(web_server.log) < len(kept) - failed + end
    assert set(names[:20]) <= set(pack(tmp_path))


def test_a_host_that_is_not_there(tmp_path):
    write_metadata(tmp_path, [record(f"i{n}", f"http://127.0.0.1:9/{n}.jpg") for n in range(300)])
    with pytest.raises(HostRefuses, match="8 x connection"):
        Download(tmp_path, CATEGORY, manners=Manners(per_host=8, tries=2, backoff=0.01)).run()
    with pytest.raises(DataError, match="no address of a server"):
        Download(tmp_path, CATEGORY, server="somewhere").run()


@pytest.mark.parametrize("count", [5, 400])
def test_what_cannot_be_kept_ends_the_download(web_server, count):  # noqa: F811
    raised = []

    def keep(results: object) -> None:
        raised.append(results)
        raise DataError("no room")

    web_server.serve("/a.jpg", GOOD)
    with pytest.raises(DataError, match="no room"):
        fetch([Job(str(n), web_server.url("/a.jpg")) for n in range(count)], kept_bytes, keep)
    assert 1 <= len(raised) <= 3  # a batch may be on its way already
    assert len(web_server.log) < 300


# ------------------------------------------------------------------------------------------------------------ going on


def test_a_second_run_asks_only_for_what_is_missing(tmp_path, web_server):  # noqa: F811
    names = ["a", "b", "c", "d++e", "gone", "later"]
    raw = raw_folder(tmp_path, web_server, names)
    web_server.serve("/I/gone.jpg", b"", always=Status(404))
    web_server.serve("/I/later.jpg", picture("later"), faults=[Status(403)])

    def run(**options) -> list[str]:
        web_server.log.clear()
        Download(raw, CATEGORY, manners=QUICK, **options).run()
        return sorted(entry.path for entry in web_server.log)

    assert run(items=["a", "b", "no record"]) == ["/I/a.jpg", "/I/b.jpg"]
    assert run() == [f"/I/{name}.jpg" for name in names[2:]]
    assert run() == []
    lines = (raw / "pictures" / CATEGORY / LEDGER).read_text().splitlines()
    assert run(retry_failed=True) == ["/I/gone.jpg", "/I/later.jpg"]
    assert (raw / "pictures" / CATEGORY / LEDGER).read_text().splitlines()[: len(lines)] == lines
    assert {item: outcome.reason for item, outcome in read_ledger(raw / "pictures" / CATEGORY).items() if outcome.reason} == {
        "gone": "http_404",
        "no record": "no_metadata",
    }
    web_server.serve("/I/new.jpg", picture("new"))
    write_metadata(raw, [record("gone", web_server.url("/I/new.jpg")), record("a", None), record("no record", None)])
    assert run() == ["/I/new.jpg"]
    outcomes = read_ledger(raw / "pictures" / CATEGORY)
    assert (outcomes["gone"].kept, outcomes["a"].kept, outcomes["no record"].reason) == (True, True, "no_url")
    assert pack(raw)["gone"] == picture("new")


def test_another_server_with_the_same_paths(tmp_path, web_server, monkeypatch):  # noqa: F811
    raw = raw_folder(tmp_path, web_server, ["a", "b"])
    write_metadata(raw, [record(name, f"https://images.invalid/I/{name}.jpg?x=1") for name in ("a", "b")])
    Download(raw, CATEGORY, ["a"], server=web_server.url("/")).run()
    monkeypatch.setenv(SERVER, web_server.url())
    outcomes = Download(raw, CATEGORY).run()
    assert {item: outcome.url for item, outcome in outcomes.items()} == {
        name: f"https://images.invalid/I/{name}.jpg?x=1" for name in ("a", "b")
    }
    assert [entry.path for entry in web_server.log] == ["/I/a.jpg", "/I/b.jpg"]


def test_no_room_is_said_before_the_start(tmp_path, web_server, monkeypatch):  # noqa: F811
    raw = raw_folder(tmp_path, web_server, ["a", "b"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 80_000})())
    with pytest.raises(DataError, match="2 pictures need about"):
        Download(raw, CATEGORY).run()
    assert not web_server.log


# ----------------------------------------------------------------------------------------------------------- the store


def fill(folder: Path, names: list[str]) -> None:
    with open_store(folder) as store:
        for name in names:
            store.commit([(Outcome(name, f"https://x/{name}"), picture(name)), (Outcome("not " + name, None, reason="no_url"), None)])


def test_a_torn_tail_is_cut(tmp_path):
    """Whatever part of the two files had reached the disk: what the ledger names is whole, and the store goes on."""
    fill(tmp_path / "whole", ["a", "b", "c"])
    ledger, data = (tmp_path / "whole" / LEDGER).read_bytes(), (tmp_path / "whole" / PACK).read_bytes()
    assert data == b"".join(picture(name) for name in "abc")
    ends = [0, *np.cumsum([len(picture(name)) for name in "abc"])]
    marks = [len(b"".join(ledger.splitlines(True)[: 1 + 2 * n])) for n in range(4)]
    for n in range(3):
        cuts = {(marks[n] + 5, ends[n + 1]), (marks[n + 1] - 1, ends[n + 1]), (marks[n], ends[n] + 7), (marks[n], len(data))}
        for mark, end in cuts:
            folder = tmp_path / f"cut {mark} {end}"
            folder.mkdir()
            (folder / LEDGER).write_bytes(ledger[:mark])
            (folder / PACK).write_bytes(data[:end])
            there = dict(PicturePack(folder))
            assert there == {name: picture(name) for name in "abc"[: n + (mark == marks[n + 1] - 1)]}
            fill(folder, ["d"])
            assert dict(PicturePack(folder)) == {**there, "d": picture("d")}
            assert (folder / PACK).stat().st_size == sum(map(len, there.values())) + len(picture("d"))


def test_a_pack_that_lost_its_end(tmp_path):
    """It cannot come from a stop; a copy that broke off, say. What is lost is noted, and new pictures are not taken for it."""
    fill(tmp_path, ["a", "b", "c"])
    os.truncate(tmp_path / PACK, len(picture("a") + picture("b")) - 1)
    assert dict(PicturePack(tmp_path)) == {"a": picture("a")}
    fill(tmp_path, ["d", "e"])
    assert dict(PicturePack(tmp_path)) == {name: picture(name) for name in "ade"}
    assert {read_ledger(tmp_path)[item].reason for item in "bc"} == {"damaged"}


def test_a_ledger_that_is_none(tmp_path):
    fill(tmp_path, ["a", "b"])
    lines = (tmp_path / LEDGER).read_bytes().splitlines(True)
    for broken, line in (([b'{"ledger": "wine"}\n', *lines[1:]], 1), ([*lines[:2], b"{oops\n", *lines[3:]], 3), ([lines[0], b"[1]\n"], 2)):
        (tmp_path / LEDGER).write_bytes(b"".join(broken))
        with pytest.raises(DataError, match=f"{LEDGER} line {line}: "):
            read_ledger(tmp_path)


def test_damage_on_the_disk_is_found_and_mended(tmp_path, web_server):  # noqa: F811
    raw = raw_folder(tmp_path, web_server, ["a", "b", "c"])
    Download(raw, CATEGORY).run()
    with open(raw / "pictures" / CATEGORY / PACK, "r+b") as file:
        file.seek(pack(raw).outcomes["b"].offset + 30)
        file.write(b"X")
    with pytest.raises(DataError, match="the picture of b is damaged"):
        pack(raw)["b"]
    assert Download(raw, CATEGORY).verify() == ["b"]
    assert set(pack(raw)) == {"a", "c"}
    Download(raw, CATEGORY).run()
    assert Download(raw, CATEGORY).verify() == []
    assert pack(raw)["b"] == picture("b")
    assert len(web_server.log) == 4


# --------------------------------------------------------------------------------- stops, full disks, two processes at once


def start(raw: Path, *options: str, limit: int | None = None) -> subprocess.Popen[str]:
    """The command itself, for all items of the metadata. ``limit``: no file may get longer, as on a full disk."""
    command = [
        sys.executable,
        "-m",
        "harness.cli",
        "data",
        "pictures",
        CATEGORY,
        "--all",
        "--raw",
        str(raw),
        "--root",
        str(raw / "domains"),
    ]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stop_in_the_middle(tmp_path, web_server, how):  # noqa: F811
    names = [f"i{n}" for n in range(400)]
    raw = raw_folder(tmp_path, web_server, names)
    for name in names[250:]:
        web_server.serve(f"/I/{name}.jpg", picture(name), delay=30.0)
    process = start(raw)
    deadline = time.monotonic() + 20
    while len(web_server.log) < 250 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    there = dict(pack(raw))
    assert there == {name: picture(name) for name in there}
    assert len(there) >= (64 if how == signal.SIGKILL else 250 - 16), output  # 16 may not have been looked at yet
    for name in names[250:]:
        web_server.serve(f"/I/{name}.jpg", picture(name))
    web_server.log.clear()
    Download(raw, CATEGORY).run()
    assert dict(pack(raw)) == {name: picture(name) for name in names}
    assert {entry.path for entry in web_server.log} == {f"/I/{name}.jpg" for name in names if name not in there}


def test_a_full_disk(tmp_path, web_server):  # noqa: F811
    names = [f"i{n}" for n in range(300)]
    raw = raw_folder(tmp_path, web_server, names)
    process = start(raw, limit=150_000)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "pictures that are there are safe: make room and run the command again" in output
    there = dict(pack(raw))
    assert 0 < len(there) < 300
    assert there == {name: picture(name) for name in there}
    assert (raw / "pictures" / CATEGORY / PACK).stat().st_size == sum(map(len, there.values()))
    Download(raw, CATEGORY).run()
    assert dict(pack(raw)) == {name: picture(name) for name in names}


def test_two_processes_at_once(tmp_path, web_server):  # noqa: F811
    names = [f"i{n}" for n in range(100)]
    raw = raw_folder(tmp_path, web_server, names)
    web_server.delay = 0.05
    outputs = [process.communicate(timeout=30)[0] for process in [start(raw), start(raw)]]
    assert all("100 of 100 items have a picture (100.00 %)" in output for output in outputs)
    assert sum("another process is fetching pictures" in output for output in outputs) == 1
    assert len(web_server.log) == 100


# --------------------------------------------------------------------------------------------------------- into a domain


def prepared(raw: Path, root: Path, name: str = "games") -> Path:
    """Five users, five items i0..i4."""
    path = raw / "review_categories" / f"{CATEGORY}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    reviews = [{"user_id": f"u{u}", "parent_asin": f"i{i}", "timestamp": 10 * u + i} for u in range(5) for i in range(5)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in reviews))
    return prepare_raw(raw, CATEGORY, name, root=root, overwrite=True).path


def test_a_domain_takes_its_pictures_and_a_new_preparation_downloads_nothing(tmp_path, web_server, capsys):  # noqa: F811
    from harness.data.cli import app

    raw, root = raw_folder(tmp_path / "raw", web_server, [f"i{n}" for n in range(7)]), tmp_path / "domains"
    web_server.serve("/I/i3.jpg", b"", always=Status(404))
    write_metadata(raw, [record(f"i{n}", web_server.url(f"/I/i{n}.jpg") if n != 4 else None) for n in range(7)])
    folder = prepared(raw, root)
    before = validate_domain(folder).digest
    assert read_private(folder).info["dropped"]["no_picture_not_fetched"] == 5
    assert resolve(["games", CATEGORY], root) == {CATEGORY: [folder]}

    app(["pictures", "games", "--raw", str(raw), "--root", str(root), "--dry-run"], standalone_mode=False)
    assert not web_server.log
    assert not (raw / "pictures").exists()
    app(["pictures", "games", "--raw", str(raw), "--root", str(root)], standalone_mode=False)
    output = capsys.readouterr().out
    assert "3 of 5 items have a picture (60.00 %), 1 http 404, 1 no url" in output
    assert "  without picture: 1 http 404, 1 no url" in output
    assert {entry.path for entry in web_server.log} == {f"/I/i{n}.jpg" for n in range(4)}  # the domain's items only

    summary = validate_domain(folder)
    assert summary.digest != before
    ids = read_private(folder).item_ids
    pictures = Pictures(folder / "public")
    assert {ids[item]: pictures[item] for item in range(5) if item in pictures} == {f"i{n}": picture(f"i{n}") for n in range(3)}
    assert pictures[ids.index("i4")] is None
    card = make_card(folder)
    assert (card.items_with_picture, card.picture_coverage) == (3, 0.6)
    assert {key: count for key, count in card.dropped.items() if key.startswith("no_picture")} == {
        "no_picture_http_404": 1,
        "no_picture_no_url": 1,
    }
    again = prepared(raw, root, "again")
    assert read_private(again).info == read_private(folder).info | {"public_digest": read_private(again).info["public_digest"]}
    one, other = (json.loads((path / "public" / "domain.json").read_text()) for path in (folder, again))
    assert {**one, "name": ""} == {**other, "name": ""}
    stamp = (folder / "public" / "pictures.bin").stat()
    assert put_into_domain(raw, folder).created is False
    assert (folder / "public" / "pictures.bin").stat().st_ino == stamp.st_ino  # not even written
    assert len(web_server.log) == 4


def test_files_beside_the_store_fill_its_gaps(tmp_path, web_server):  # noqa: F811
    raw = raw_folder(tmp_path, web_server, ["a", "b"])
    Download(raw, CATEGORY, manners=QUICK).run()
    for name, data in {"a.jpg": b"never looked at", "c.png": encoded(30, "PNG"), "d.jpg": b"no picture"}.items():
        (raw / "pictures" / CATEGORY / name).write_bytes(data)
    found, counts = find_pictures(raw, CATEGORY, ["d", "c", "b", "a", "e"])
    assert dict(found) == {"a": picture("a"), "b": picture("b"), "c": encoded(30, "PNG")}
    assert counts == {"no_picture_not_a_picture": 1, "no_picture_not_fetched": 1}
    assert dict(find_pictures(raw, CATEGORY, ["c"])[0]) == {"c": encoded(30, "PNG")}


def test_damage_never_gets_into_a_domain(tmp_path, web_server):  # noqa: F811
    raw = raw_folder(tmp_path / "raw", web_server, [f"i{n}" for n in range(5)])
    folder = prepared(raw, tmp_path / "domains")
    Download(raw, CATEGORY).run()
    summary = put_into_domain(raw, folder)
    with open(raw / "pictures" / CATEGORY / PACK, "r+b") as file:
        file.write(b"X")
    with pytest.raises(DataError, match="is damaged"):
        prepared(raw, tmp_path / "domains")
    assert validate_domain(folder) == summary.__class__(**{**summary.__dict__, "created": False})


def test_a_full_disk_while_a_domain_gets_its_pictures(tmp_path, web_server, monkeypatch):  # noqa: F811
    raw = raw_folder(tmp_path / "raw", web_server, [f"i{n}" for n in range(5)])
    folder = prepared(raw, tmp_path / "domains")
    Download(raw, CATEGORY).run()
    before = validate_domain(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(domain_module, "write_pictures", full)
        with pytest.raises(DataError, match="No space left on device while its pictures were written; it is as it was"):
            put_into_domain(raw, folder)
    assert validate_domain(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["games"]
    assert Domain.read(put_into_domain(raw, folder).path / "public").pictures[0] is not None


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda public: (public / "pictures.bin").unlink(), "one is missing"),
        (lambda public: (public / "pictures.parquet").unlink(), "one is missing"),
        (lambda public: (public / "pictures.bin").write_bytes((public / "pictures.bin").read_bytes()[:-1]), "is damaged"),
        (lambda public: (public / "pictures.bin").write_bytes((public / "pictures.bin").read_bytes() + b"x"), "bytes behind"),
    ],
)
def test_verify_sees_a_damaged_pack(tmp_path, web_server, harm, message):  # noqa: F811
    raw = raw_folder(tmp_path / "raw", web_server, [f"i{n}" for n in range(5)])
    folder = prepared(raw, tmp_path / "domains")
    Download(raw, CATEGORY).run()
    put_into_domain(raw, folder)
    harm(folder / "public")
    with pytest.raises(DataError, match=message):
        validate_domain(folder)


def test_names_that_mean_nothing(tmp_path, source):
    domain_module.write_domain(tmp_path / "mine", source)
    with pytest.raises(DataError, match=r"neither a domain in .* Did you mean 'Video_Games'"):
        resolve(["Video_Game"], tmp_path)
    with pytest.raises(DataError, match="was not prepared from raw files"):
        resolve(["mine"], tmp_path)
    assert resolve(["Software"], tmp_path) == {"Software": []}
    with pytest.raises(DataError, match="no domain is prepared from Software yet"):
        items_of("Software", [])
    with pytest.raises(DataError, match=r"meta_Software.jsonl.gz \(or .jsonl\) is missing.*--part meta"):
        Download(tmp_path, "Software").run()
