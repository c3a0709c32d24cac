"""Fetching Amazon Reviews 2023 from a local hub and mirror: the fault table, and what a stop at any moment leaves.

Each case asserts the message and the state of the folder: what has its final name is the published file, and nothing else has.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.data import fetch as fetching
from harness.data import transfer
from harness.data.cli import app
from harness.data.fetch import Fetch, Fetched, Planned, Show, in_words
from harness.data.release import PRETRAINING, REVISION, TARGETS, Wanted, choose, first_line_problem, sources
from harness.data.source import DataError
from harness.data.transfer import Answer, Damaged, DiskFull, Patience, digest_of
from tests.web_server import Content, Drop, Fault, Length, Slow, Stall, Status, WebServer

CATEGORY = "Baby_Products"  # the project's own lock file pins none of its files
REVIEWS = "raw/review_categories/Baby_Products.jsonl"
LOCAL = "review_categories/Baby_Products.jsonl"
HUB = f"/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/{REVISION}/"
QUICK = Patience(tries=3, first=0.01, longest=0.02, timeout=0.4)
PINNED: dict[str, Any] = {"schema": 1, "dataset": "McAuley-Lab/Amazon-Reviews-2023", "revision": REVISION}


def make_body(path: str, lines: int = 2000) -> bytes:
    if path.endswith(".csv"):
        rows = (f"U{i},B{i % 97},5.0,{1500000000000 + i}" for i in range(lines))
        return "\n".join(["user_id,parent_asin,rating,timestamp", *rows, ""]).encode()
    return b"".join(json.dumps({"parent_asin": f"B{i % 97}", "user_id": f"U{i}", "in": path}).encode() + b"\n" for i in range(lines))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Events(Show):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.waited: list[tuple[float, str]] = []
        self.plan: list[Planned] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def planned(self, plan: Any) -> None:
        self.plan = list(plan)

    def waits(self, wanted: Wanted, seconds: float, reason: str) -> None:
        self.waited.append((seconds, reason))


class World:
    """A hub (answers with a redirect to its store, as the real one) and a mirror on one server, and a folder to fetch to."""

    def __init__(self, web: WebServer, folder: Path) -> None:
        self.web, self.folder = web, folder
        self.bodies = {wanted.path: make_body(wanted.path) for wanted in choose([CATEGORY])}
        self.events = Events()
        for path in self.bodies:
            self.hub(path)
            self.mirror(path)

    def hub(self, path: str = REVIEWS, *faults: Fault, digest: str | None = None, linked: bool = True, **more: Any) -> None:
        body = self.bodies[path]
        headers = {"X-Linked-Etag": f'"{digest or sha(body)}"', "X-Linked-Size": str(len(body)), "X-Repo-Commit": REVISION}
        if linked:
            self.web.serve(HUB + path, b"", headers=headers, redirect=self.web.url(f"/store/{path}"))
            self.web.serve(f"/store/{path}", body, faults=faults, **more)
        else:
            self.web.serve(HUB + path, body, faults=faults, **more)

    def mirror(self, path: str = REVIEWS, *faults: Fault, **more: Any) -> None:
        self.web.serve(f"/mirror/{path}.gz", gzip.compress(self.bodies[path], 1, mtime=0), faults=faults, **more)

    def fetch(self, *paths: str, folder: Path | None = None, **more: Any) -> list[Fetched]:
        more = {"servers": sources(self.web.url(), self.web.url("/mirror")), "patience": QUICK, "show": self.events} | more
        with Fetch([Wanted(path) for path in paths or (REVIEWS,)], folder or self.folder, **{"lock": Path("none"), **more}) as fetch:
            return fetch.run()

    def fails(self, *words: str, **more: Any) -> str:
        with pytest.raises(DataError) as caught:
            self.fetch(**more)
        for word in words:
            assert word in str(caught.value), str(caught.value)
        return str(caught.value)

    def files(self) -> list[str]:
        """Everything in the folder but the fetcher's own two."""
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_dir())
        return sorted(name for name in found if name not in (".fetch.lock", ".fetch.json"))

    def gets(self, path: str = f"/store/{REVIEWS}") -> list[str]:
        """Every GET of a path: ``STATUS RANGE``."""
        return [f"{entry.status} {entry.headers.get('range', '')}".strip() for entry in self.web.requests(path, "GET")]

    def pin(self) -> dict[str, Any]:
        return json.loads((self.folder / "amazon2023.lock.json").read_text())["files"][REVIEWS]

    def whole(self, suffix: str = "") -> None:
        """The reviews are there and right, nothing else is."""
        assert self.files() == ["amazon2023.lock.json", LOCAL + suffix]
        data = (self.folder / (LOCAL + suffix)).read_bytes()
        assert (gzip.decompress(data) if suffix else data) == self.bodies[REVIEWS]
        assert (self.pin()["sha256"], self.pin()["size"]) == (sha(self.bodies[REVIEWS]), len(self.bodies[REVIEWS]))


@pytest.fixture
def world(web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("HF_ENDPOINT", "HARNESS_AMAZON2023_HUB", "HARNESS_AMAZON2023_MIRROR", "HARNESS_RAW"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "raw").mkdir()
    return World(web_server, tmp_path / "raw")


# -------------------------------------------------------------------------------------------------------------- good days


def test_a_category_arrives_from_the_hub_and_a_second_call_asks_for_nothing(world):
    fetched = world.fetch(*world.bodies)
    assert {entry.wanted.path: entry.how for entry in fetched} == dict.fromkeys(world.bodies, "fetched")
    assert [entry.source for entry in fetched] == ["hub"] * 5
    assert world.files() == sorted(["amazon2023.lock.json", *(path.removeprefix("raw/") for path in world.bodies)])
    for path, body in world.bodies.items():
        assert (world.folder / path.removeprefix("raw/")).read_bytes() == body
    assert world.pin() == {"sha256": sha(world.bodies[REVIEWS]), "size": len(world.bodies[REVIEWS]), "seen": "the hub"}
    before = len(world.web.log)
    again = world.fetch(*world.bodies)
    assert [(entry.how, entry.checked) for entry in again] == [("there", False)] * 5
    assert [entry.checked for entry in world.fetch(*world.bodies, verify=True)] == [True] * 5
    assert len(world.web.log) == before


def test_plain_from_the_hub_and_gzipped_from_the_mirror_are_one_file(world, tmp_path):
    world.fetch()
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(world.folder / "amazon2023.lock.json", other)
    (entry,) = world.fetch(folder=other, servers=sources("none", world.web.url("/mirror")))
    assert (entry.path, entry.source) == (other / f"{LOCAL}.gz", "mirror")
    assert digest_of(entry.path).sha256 == digest_of(world.folder / LOCAL).sha256 == sha(world.bodies[REVIEWS])


def test_what_the_mirror_gave_first_is_held_against_the_hub_later(world):
    mirror = sources("none", world.web.url("/mirror"))
    world.fetch(servers=mirror)
    world.whole(".gz")
    assert world.pin()["seen"] == "first seen at the mirror"
    (world.folder / f"{LOCAL}.gz").unlink()
    world.bodies[REVIEWS] = make_body("changed")
    world.hub()
    world.mirror()
    message = world.fails("hub: it is another file (sha256", "mirror: it is another file", "first seen at the mirror; if that was wrong,")
    assert "take its entry out of" in message
    assert world.files() == ["amazon2023.lock.json"]


def test_parallel_has_a_limit(world):
    for path in world.bodies:
        world.hub(path, delay=0.08)

    class Watch(Events):
        def planned(self, plan: Any) -> None:
            world.web.busiest = 0  # the questions for sizes are over

    world.fetch(*world.bodies, parallel=2, show=Watch())
    assert world.web.busiest == 2


# ---------------------------------------------------------------------------------------------------------- the fault table


def test_a_dropped_connection_goes_on_by_range(world):
    size = len(world.bodies[REVIEWS])
    world.hub(REVIEWS, Drop(50_000), Drop(30_000, reset=True), Stall(10_000))
    world.fetch()
    world.whole()
    answers = world.web.requests(f"/store/{REVIEWS}", "GET")
    assert [entry.status for entry in answers] == [200, 206, 206, 206]
    starts = [int(entry.headers["range"][6:-1]) for entry in answers[1:]]
    assert starts == sorted(starts) and starts[0] == 50_000  # (after a reset, what was under way may be lost)
    assert answers[-1].sent == size - starts[-1]
    assert len(world.events.waited) == 3


@pytest.mark.parametrize("status", [403, 404, 401, 410])
def test_a_refusal_is_not_tried_again_but_at_the_other_source(world, status):
    world.hub(always=Status(status, methods=("GET", "HEAD")))
    world.fetch()
    world.whole(".gz")
    assert world.gets() == [str(status)]
    assert world.events.waited == []


def test_refused_by_both(world):
    world.hub(always=Status(404))
    world.mirror(always=Status(403))
    world.fails("1 of 1 files are missing", f"{REVIEWS}: hub: 404 Not Found; mirror: 403 Forbidden", "the same command goes on")
    assert world.files() == []


def test_one_that_fails_does_not_stop_the_others(world):
    world.hub(always=Status(404))
    world.mirror(always=Status(404))
    with pytest.raises(DataError, match="1 of 5 files are missing"):
        world.fetch(*world.bodies)
    assert LOCAL not in world.files() and len(world.files()) == 5


def test_retry_after_is_obeyed(world):
    world.hub(REVIEWS, Status(429, retry_after="1"))
    begun = time.monotonic()
    world.fetch()
    assert time.monotonic() - begun >= 1.0
    assert world.events.waited == [(1.0, "hub: 429 Too Many Requests")]
    world.whole()


def test_a_server_that_asks_for_an_hour_is_not_waited_for(world):
    world.hub(always=Status(429, retry_after="3600"))
    world.fetch()
    world.whole(".gz")
    assert world.gets() == ["429"]


def test_server_errors_pass_or_end(world):
    world.hub(REVIEWS, Status(503), Status(500))
    world.fetch()
    world.whole()
    assert world.gets() == ["503", "500", "200"]
    world.mirror(always=Status(502))
    (world.folder / LOCAL).unlink()
    world.hub(always=Status(503))
    world.fails("hub: 503 Service Unavailable (3 tries); mirror: 502 Bad Gateway (3 tries)")
    assert world.files() == ["amazon2023.lock.json"]


def test_wrong_lengths(world):
    size = len(world.bodies[REVIEWS])
    world.hub(REVIEWS, Length(1000), Length(size + 500))  # the hub itself said how long the file is
    world.fetch()
    world.whole()
    assert world.gets() == ["200", "206 bytes=1000-"]


def test_a_mirror_that_cuts_the_file_short(world):
    mirror = sources("none", world.web.url("/mirror"))
    world.mirror(always=Length(1000))
    world.fails("mirror: the gzip file is truncated", servers=mirror)
    assert world.files() == []
    world.mirror(always=Length(10_000_000))
    world.fails("mirror: ", "(3 tries)", servers=mirror)
    assert [name for name in world.files() if not name.endswith((".part", ".part.json"))] == []
    world.mirror()
    world.fetch(servers=mirror)
    world.whole(".gz")


def test_a_slow_body_is_no_dead_one(world):
    world.hub(REVIEWS, Slow(pace=400_000.0))
    world.fetch()
    world.whole()
    assert world.gets() == ["200"] and world.events.waited == []


def test_wrong_content_is_never_taken(world):
    world.hub(always=Content(make_body(REVIEWS[::-1])))
    world.fetch()
    world.whole(".gz")
    world.mirror(always=Content(gzip.compress(b'{"parent_asin": "B"}\n')))
    (world.folder / f"{LOCAL}.gz").unlink()
    world.fails("hub: it is another file", f"expected {sha(world.bodies[REVIEWS])}", "mirror: it is another file")
    assert world.files() == ["amazon2023.lock.json"]


@pytest.mark.parametrize("page", [b"<html>Please log in</html>\n", b"", b'{"error": "quota"}\n'])
def test_a_login_page_is_not_written_down_as_the_file(world, page):
    world.hub(linked=False, always=Content(page))  # a server without digests: nothing to compare with
    world.fails("hub: it", servers=sources(world.web.url(), "none"))
    assert world.files() == []


def test_a_file_of_unknown_length_and_digest_is_not_trusted(world):
    world.hub(linked=False, length=False)
    world.fails("nobody says how long the file is", servers=sources(world.web.url(), "none"))
    assert world.files() == []
    world.fetch()  # gzip says where it ends
    world.whole(".gz")
    (world.folder / f"{LOCAL}.gz").unlink()
    world.fetch()  # and now the digest is known
    world.whole()


def test_a_body_that_was_compressed_on_the_way(world):
    world.hub(linked=False, headers={"Content-Encoding": "br"})
    world.fails("compresses what was asked for uncompressed (br)", servers=sources(world.web.url(), "none"))
    assert world.files() == []


def test_the_pinned_digest_stands_above_what_the_hub_says(world, tmp_path):
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps(PINNED | {"files": {REVIEWS: {"sha256": sha(b"x"), "size": None, "seen": "the authors"}}}))
    world.fails("hub: it is another file (sha256", f"expected {sha(b'x')}: the authors", "mirror: it is another file", lock=lock)
    assert world.files() == []
    lock.write_text(json.dumps(PINNED | {"files": {REVIEWS: {"sha256": sha(world.bodies[REVIEWS]), "size": None, "seen": "the authors"}}}))
    world.hub(digest=sha(b"y"))  # the hub has changed the file under the same revision
    world.fetch(lock=lock)
    world.whole(".gz")


def test_a_hub_that_cannot_be_reached(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    fetched = world.fetch(*world.bodies, servers=sources(dead, world.web.url("/mirror")), parallel=2)
    assert [entry.source for entry in fetched] == ["mirror"] * 5
    assert world.events.waited == []  # the plan found out
    world.fails("; mirror: ", "refused (3 tries)", folder=world.folder / "deeper", servers=sources(dead, dead))


def test_a_hub_that_goes_away(world, monkeypatch):
    monkeypatch.setattr(Fetch, "_ask", lambda self, source, wanted: Answer("x", 1000))  # it was there when it was asked
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    fetched = world.fetch(*world.bodies, servers=sources(dead, world.web.url("/mirror")), parallel=2)
    assert [entry.source for entry in fetched] == ["mirror"] * 5
    assert len(world.events.waited) <= 4  # two files at a time found out; the other three did not try


def test_sources_can_be_left_out(world):
    world.fails("it is not here, and no server is left to ask", servers=[], folder=world.folder)
    with pytest.raises(DataError, match=r"no address of a server"):
        sources("localhost:80")


# --------------------------------------------------------------------------------------------------------------- halves


def half(world: World, after: int = 60_000) -> Path:
    """A half file as a stop leaves it."""
    world.hub(REVIEWS, Drop(after), always=Status(500))
    world.fails("hub: 500", servers=sources(world.web.url(), "none"))
    part = world.folder / f"{LOCAL}.part"
    assert part.stat().st_size == after
    assert world.files() == [f"{LOCAL}.part", f"{LOCAL}.part.json"]
    world.web.log.clear()
    return part


def test_a_half_goes_on_in_the_next_call(world):
    half(world)
    world.hub()
    world.fetch()
    assert world.gets() == ["206 bytes=60000-"]
    assert (world.events.plan[0].state, world.events.plan[0].done) == ("half", 60_000)
    world.whole()


def test_a_half_of_an_older_version_begins_anew(world):
    half(world)
    world.bodies[REVIEWS] = make_body("newer", 2100)
    world.hub()
    world.fetch()
    assert world.gets() == ["206 bytes=60000-", "200"]
    assert "the file changed on the server; from the start again" in world.events.waited[-1][1]
    world.whole()


def test_a_server_without_ranges_gives_all_again(world):
    half(world)
    world.hub(ranges=False)
    world.fetch()
    assert world.gets() == ["200 bytes=60000-"]
    world.whole()


def test_a_spoilt_half_is_found_and_fetched_again(world):
    part = half(world)
    data = bytearray(part.read_bytes())
    data[100:200] = bytes(100)  # what a crash of the machine may leave
    part.write_bytes(data)
    world.hub()
    world.fetch()
    assert world.gets() == ["206 bytes=60000-", "200"]
    world.whole()


def test_a_half_longer_than_the_file_or_without_its_note(world):
    part = half(world)
    part.write_bytes(bytes(10_000_000))
    world.hub()
    world.fetch()
    world.whole()
    (world.folder / LOCAL).unlink()
    part = half(world_again := World(world.web, world.folder.with_name("again")))
    part.with_name(part.name + ".json").write_text("{")
    world_again.hub()
    world_again.fetch()
    assert world_again.gets() == ["200"]
    world_again.whole()


def test_stopped_between_the_last_byte_and_the_check(world):
    part = half(world)
    part.write_bytes(world.bodies[REVIEWS])
    world.hub()
    world.fetch()
    assert world.gets() == []
    world.whole()


def serve_slowly(world: World) -> list[str]:
    world.hub(REVIEWS, Stall(70_000))
    common = [sys.executable, "-c", "from harness.cli import main; main()", "data", "fetch", "amazon2023", CATEGORY, "--part", "reviews"]
    return [*common, "--to", str(world.folder), "--hub", world.web.url(), "--mirror", "none"]


def wait_until(true: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_loses_nothing(world, blow):
    part = world.folder / f"{LOCAL}.part"
    process = subprocess.Popen(serve_slowly(world), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: part.exists() and part.stat().st_size == 70_000)
    process.send_signal(blow)
    output, _ = process.communicate(timeout=10)
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped: what has arrived is kept; the same command goes on" in output
    assert world.files() == [f"{LOCAL}.part", f"{LOCAL}.part.json"]
    world.web.log.clear()
    world.fetch()
    assert world.gets() == ["206 bytes=70000-"]
    world.whole()


def test_two_processes_at_once(world):
    command = serve_slowly(world)
    world.hub(pace=300_000.0)
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=20)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("another fetch is at work" in output for output in outputs) <= 1
    assert sorted("fetched" in output for output in outputs) == [False, True]
    assert world.gets() == ["200"]
    world.whole()


def test_the_second_waits_while_the_first_works(world):
    world.hub(delay=0.3)
    first = threading.Thread(target=world.fetch, kwargs={"show": Show()})
    first.start()
    wait_until(lambda: (world.folder / ".fetch.lock").exists() and world.web.log)
    (entry,) = world.fetch()
    first.join()
    assert world.events.notes == [f"another fetch is at work in {world.folder}: waiting for it"]
    assert (entry.how, entry.checked) == ("there", False)
    assert world.gets() == ["200"]


# ------------------------------------------------------------------------------------------------------------- the disk


def test_the_disk_is_asked_before_the_start(world, monkeypatch):
    monkeypatch.setattr(fetching, "free_space", lambda folder: 1000)
    with pytest.raises(DiskFull, match=r"has 1 kB free, but 1 files need 187 kB more: free some space, name another folder"):
        world.fetch()
    assert world.files() == []
    assert world.gets() == []


def test_a_disk_that_fills_up(world, monkeypatch):
    real = open

    class Full:
        """A file on a disk that has room for 70,000 bytes: the last write is cut, the next refused."""

        def __init__(self, path: Path, *arguments: Any, **more: Any) -> None:
            self.file = real(path, *arguments, **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, data: memoryview) -> int:
            room = 70_000 - os.fstat(self.file.fileno()).st_size
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:room])

    def opened(path: Path, mode: str = "r", **more: Any) -> Any:
        return Full(path, mode, **more) if mode == "ab" else real(path, mode, **more)

    monkeypatch.setattr(transfer, "open", opened, raising=False)
    with pytest.raises(DiskFull, match=r"Baby_Products.jsonl.part: the disk is full; free some space and run the command again"):
        world.fetch()
    assert world.files() == [f"{LOCAL}.part", f"{LOCAL}.part.json"]
    with pytest.raises(DiskFull):  # stops the other files too: their turn comes when there is room
        world.fetch(*world.bodies, parallel=1)
    assert all(name.endswith((".part", ".part.json")) for name in world.files())
    monkeypatch.setattr(transfer, "open", real, raising=False)
    world.web.log.clear()
    world.fetch(*world.bodies)
    assert world.gets() == ["206 bytes=70000-"]
    assert len(world.files()) == 6 and (world.folder / LOCAL).read_bytes() == world.bodies[REVIEWS]


def test_a_folder_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    world.fails("file/x cannot be written: Not a directory", folder=tmp_path / "file" / "x")


# ---------------------------------------------------------------------------------------------------- what is there already


@pytest.mark.parametrize("name", ["Baby_Products.jsonl", "Baby_Products.jsonl.gz", LOCAL, f"{REVIEWS}.gz"])
def test_files_that_the_user_has_are_checked_and_linked(world, tmp_path, name):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    body = world.bodies[REVIEWS]
    mine.write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    (entry,) = world.fetch(raw=tmp_path / "mine")
    assert entry.how == "linked"
    assert world.gets() == []
    assert entry.path.samefile(mine)
    world.whole(".gz" if name.endswith(".gz") else "")
    assert world.pin()["seen"] == "the hub"


def test_a_link_across_file_systems(world, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "Baby_Products.jsonl").write_bytes(world.bodies[REVIEWS])

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    world.fetch(raw=tmp_path / "mine", servers=sources("none", "none"))  # also without any server
    assert (world.folder / LOCAL).is_symlink()
    assert world.pin()["seen"] == "first seen in --raw"
    world.whole()


def test_a_wrong_file_of_the_user_is_refused(world, tmp_path):
    mine = tmp_path / "mine" / "Baby_Products.jsonl"
    mine.parent.mkdir()
    mine.write_bytes(world.bodies[REVIEWS][:-5000])
    world.fails(f"{mine} cannot be taken: it is another file", "take it out of", raw=mine.parent)
    assert world.files() == []
    mine.rename(mine.with_suffix(".jsonl.gz")).write_bytes(gzip.compress(world.bodies[REVIEWS])[:-100])
    world.fails("Baby_Products.jsonl.gz cannot be taken: the gzip file is truncated", raw=mine.parent)
    world.fails("is no folder", raw=tmp_path / "nowhere")
    assert world.files() == []


def test_a_file_that_changed_after_it_was_fetched(world):
    world.fetch()
    (world.folder / LOCAL).write_bytes(world.bodies[REVIEWS][:-10])
    world.fails(f"{world.folder / LOCAL} is there, but it is another file", "move it away and run the command again")
    assert (world.folder / LOCAL).stat().st_size == len(world.bodies[REVIEWS]) - 10  # the user's: not ours to overwrite


def test_lock_files_that_do_not_fit(world, tmp_path):
    world.fetch()
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps(PINNED | {"files": {REVIEWS: {"sha256": "0" * 64, "size": None, "seen": "the authors"}}}))
    world.fails("(the hub), but lock.json of the project says 000000000000...", lock=lock)
    lock.write_text(json.dumps(PINNED | {"files": {}, "revision": "main"}))
    world.fails(f"is for revision main, this program for {REVISION}", lock=lock)
    lock.write_text("[]")
    world.fails("is not a lock file of McAuley-Lab/Amazon-Reviews-2023", lock=lock)


def test_the_projects_lock_file_names_files_of_the_release():
    raw = json.loads(fetching.LOCK.read_text())
    assert set(raw["files"]) <= {wanted.path for wanted in choose()}
    assert all(len(entry["sha256"]) == 64 for entry in raw["files"].values())
    assert raw["revision"] == REVISION


# --------------------------------------------------------------------------------------------------------- small pieces


@pytest.mark.parametrize("chunk", [1 << 12, 1 << 20])
def test_digest_of_plain_and_gzipped(tmp_path, chunk):
    data = os.urandom(3_000_000) + bytes(9_000_000)
    members = b"".join(gzip.compress(data[start : start + 5_000_000]) for start in range(0, len(data), 5_000_000))
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "gz").write_bytes(members)
    for name in ("plain", "gz"):
        content = digest_of(tmp_path / name)
        assert (content.sha256, content.size, content.head) == (sha(data), len(data), data[: 1 << 20])
    for name, broken, reason in (
        ("cut", members[:-chunk], "truncated"),
        ("tail", members[:-4], "truncated"),
        ("more", members + b"more", "damaged"),
        ("flip", members[:chunk] + b"\xff" * 64 + members[chunk + 64 :], "damaged"),
        ("two", b"\x1f\x8b", "truncated"),
    ):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(Damaged, match=reason):
            digest_of(tmp_path / name)
    (tmp_path / "empty").write_bytes(b"")
    assert digest_of(tmp_path / "empty").size == 0


def test_first_lines():
    train = Wanted("benchmark/5core/last_out/Software.train.csv")
    for wanted, line, good in (
        (train, b"user_id,parent_asin,rating,timestamp\r\n", True),
        (train, b"AFKZ,B0BH,5.0,1424334500000\n", True),
        (train, b"<!DOCTYPE html>\n", False),
        (Wanted(REVIEWS), b'{"parent_asin": "B", "x": "' + bytes(1 << 20), True),  # longer than what is looked at
        (Wanted(REVIEWS), b'{"parent_asin": "B", "x": "\n', False),
    ):
        assert bool(first_line_problem(wanted, line[: 1 << 20])) is not good


def test_choose():
    assert len(choose()) == 45
    assert choose(["paper"]) == choose() == choose([*TARGETS, *PRETRAINING, "targets"])
    assert [wanted.path for wanted in choose(["Software"], ["5core"])] == [
        f"benchmark/5core/last_out/Software.{split}.csv" for split in ("train", "valid", "test")
    ]
    assert [wanted.local for wanted in choose(["Software"], ["meta", "reviews"])] == [
        "review_categories/Software.jsonl",
        "meta_categories/meta_Software.jsonl",
    ]
    with pytest.raises(DataError, match=r"none of the nine categories. Did you mean 'Video_Games'"):
        choose(["VideoGames"])
    with pytest.raises(DataError, match=r"'metadata' is no part of the release. Did you mean 'meta'"):
        choose([], ["metadata"])


def test_sources_follow_the_settings(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("HARNESS_AMAZON2023_HUB", raising=False)
    monkeypatch.delenv("HARNESS_AMAZON2023_MIRROR", raising=False)
    path = Wanted("raw/meta_categories/meta_Software.jsonl")
    assert [source.url(path) for source in sources()] == [
        f"https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/{REVISION}/raw/meta_categories/meta_Software.jsonl",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/meta_categories/meta_Software.jsonl.gz",
    ]
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.one/")
    assert sources()[0].base.startswith("https://hub.one/datasets/")
    monkeypatch.setenv("HARNESS_AMAZON2023_HUB", "https://hub.two")
    monkeypatch.setenv("HARNESS_AMAZON2023_MIRROR", "none")
    assert [source.base.split("/datasets")[0] for source in sources()] == ["https://hub.two"]
    assert sources("none", "https://mirror")[0].base == "https://mirror"


def test_sizes_in_words():
    assert [in_words(size) for size in (0, 999, 1560, 632_000_000, 1_560_000_000, 61_200_000_000, None)] == [
        "0 bytes", "999 bytes", "1.56 kB", "632 MB", "1.56 GB", "61.2 GB", "unknown",
    ]  # fmt: skip


def test_pauses_grow_and_vary():
    patience = Patience(first=1.0, longest=8.0)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (9, 8.0)):
        pauses = [patience.pause(failures) for _ in range(200)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


# ----------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def call(world: World) -> Any:
    def invoke(*arguments: object, code: int = 0) -> str:
        settings = {"HARNESS_AMAZON2023_HUB": world.web.url(), "HARNESS_AMAZON2023_MIRROR": world.web.url("/mirror")}
        result = CliRunner().invoke(app, ["fetch", *map(str, arguments)], env={**settings, "HARNESS_RAW": str(world.folder)})
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def test_bars_and_lines(world, monkeypatch):
    from rich.console import Console

    from harness.data import fetch_view

    monkeypatch.setattr(fetch_view, "EVERY", 0.0)
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)
        world.hub(REVIEWS, Drop(50_000), delay=0.05, pace=1_000_000.0)
        with fetch_view.View(console, world.folder) as view:
            world.fetch(show=view)
        output = console.file.getvalue()
        assert "1 files: 0 here, 1 to fetch (187 kB); " in output
        assert f"{LOCAL}: hub: peer closed connection" in output and "; trying again in " in output
        assert f"fetched {LOCAL}  187 kB from the hub" in output
        if terminal:
            assert f"{LOCAL} hub" in output and "/s" in output and "all files" in output
        else:
            assert re.search(r"0 of 1 files, \S+ kB of 187 kB, \S+ .?B/s", output)
        (world.folder / LOCAL).unlink()


def test_dry_run_shows_and_writes_nothing(world, call):
    world.hub(linked=False, always=Status(503, methods=("HEAD",)))
    output = call("amazon2023", CATEGORY, "--dry-run")
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in output.splitlines() if "│" in line}
    size = in_words(len(world.bodies["raw/meta_categories/meta_Baby_Products.jsonl"]))
    assert rows["meta_categories/meta_Baby_Products.jsonl"] == ["to fetch", size, "-", "hub"]
    assert rows[LOCAL][0] == "to fetch" and rows[LOCAL][1].endswith(" gz") and rows[LOCAL][3] == "mirror"
    assert "1 file: hub: 503 Service Unavailable" in output
    assert "5 files: 0 here, 5 to fetch (" in output
    assert world.files() == [] and list(world.folder.iterdir()) == []
    assert {entry.method for entry in world.web.log} == {"HEAD"}


def test_dry_run_offline_says_so(world, call):
    world.web.__exit__()
    output = call("amazon2023", CATEGORY, "Software", "--dry-run")
    assert "unknown" in output and "256 MB" in output  # the one size that the project's lock file knows
    assert "cannot be reached" in output
    assert "10 files: 0 here, 10 to fetch (256 MB and 9 of unknown size)" in output


def test_the_command(world, call):
    output = call("amazon2023", CATEGORY, "--part", "reviews", "--part", "5core")
    assert f"fetched {LOCAL}  {in_words(len(world.bodies[REVIEWS]))} from the hub" in output
    assert f"complete: 4 files in {world.folder}" in output.replace("\n", "")
    assert "4 files: 4 here, 0 to fetch (0 bytes)" in call("amazon2023", CATEGORY, "--part", "reviews", "--part", "5core")
    world.hub("raw/meta_categories/meta_Baby_Products.jsonl", always=Status(404))
    world.mirror("raw/meta_categories/meta_Baby_Products.jsonl", always=Status(404))
    output = call("amazon2023", CATEGORY, code=2)
    assert "1 of 5 files are missing" in output and "hub: 404 Not Found; mirror: 404 Not Found" in output
    assert "Did you mean 'amazon2023'" in call("amazon2032", code=2)


def test_the_command_starts_without_heavy_modules():
    code = (
        "import sys; import harness.cli; import harness.data.release, harness.data.fetch, harness.data.fetch_view;"
        "print(sorted({'torch', 'pandas', 'polars', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
