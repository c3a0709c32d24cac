"""README, "The paper's benchmark": its commands, word for word, on a small release that a local server plays.

The hub serves plain files behind redirects, the mirror gzipped ones, the picture host what the simulator drew. Everything goes through
the command line, each command a process of its own, as a user types it; only ``harness run`` is planned instead of run. The settings
that point to the server, its digests and its counts are those that the README and ``--help`` name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.data.release import GROUPS, REVISION, choose
from harness.data.simulate import simulate_raw
from harness.paths import PROJECT
from tests.web_server import WebServer

HUB = f"/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/{REVISION}/"
HARNESS = Path(sys.executable).with_name("harness")
PAPER = GROUPS["paper"]


def commands() -> list[str]:
    """The commands of the section's first block, without their comments."""
    section = (PROJECT / "README.md").read_text("utf-8").split("\n## The paper's benchmark\n")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block, "the section has no block of commands"
    lines = [line.split("  #")[0].strip() for line in block[1].splitlines() if line.strip()]
    assert all(line.startswith("harness ") for line in lines), lines
    return lines


def published(raw: Path, path: str) -> bytes:
    """A file of the release as the hub has it: plain."""
    plain, zipped = (raw / (path.removeprefix("raw/") + end) for end in ("", ".gz"))
    return plain.read_bytes() if plain.exists() else gzip.decompress(zipped.read_bytes())


def counts_of(files: list[bytes]) -> dict[str, int]:
    """What the card of a category must hold, counted in its three last-out files."""
    rows = [row for file in files for row in csv.DictReader(io.StringIO(file.decode()))]
    return {"users": len({row["user_id"] for row in rows}), "items": len({row["parent_asin"] for row in rows}), "interactions": len(rows)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str], dict[str, dict[str, int]], WebServer]]:
    """A folder to work in, the environment that points to the server, and what each domain must hold."""
    folder = tmp_path_factory.mktemp("walk")
    raw, cards, lock = folder / "published", folder / "cards", folder / "amazon2023.lock.json"
    simulate_raw(raw, seed=5, categories=PAPER, users=60, items=50)
    bodies = {wanted.path: published(raw, wanted.path) for wanted in choose()}
    counts: dict[str, dict[str, int]] = {}
    cards.mkdir()
    for category in PAPER:
        counts[category.lower()] = counts_of([body for path, body in bodies.items() if f"/last_out/{category}." in path])
        (cards / f"{category.lower()}.json").write_text(json.dumps({"counts": counts[category.lower()], "source": "the local release"}))
    digests = {path: hashlib.sha256(body).hexdigest() for path, body in bodies.items()}
    pinned = {path: {"sha256": digests[path], "size": len(body), "seen": "the local release"} for path, body in bodies.items()}
    head = {"schema": 1, "dataset": "McAuley-Lab/Amazon-Reviews-2023", "revision": REVISION}
    lock.write_text(json.dumps({**head, "files": pinned}))
    with WebServer() as web:
        for path, body in bodies.items():
            linked = {"X-Linked-Etag": f'"{digests[path]}"', "X-Linked-Size": str(len(body)), "X-Repo-Commit": REVISION}
            web.serve(HUB + path, b"", headers=linked, redirect=web.url(f"/store/{path}"))
            web.serve(f"/store/{path}", body)
            web.serve(f"/mirror/{path}.gz", gzip.compress(body, 1, mtime=0))
        for picture in raw.glob("pictures/*/*.jpg"):
            web.serve(f"/large/{picture.name}", picture.read_bytes())
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HARNESS_", "HF_"))} | {
            "HARNESS_AMAZON2023_HUB": web.url(),
            "HARNESS_AMAZON2023_MIRROR": web.url("/mirror"),
            "HARNESS_AMAZON2023_PICTURES": web.url(),
            "HARNESS_AMAZON2023_LOCK": str(lock),
            "HARNESS_CARDS": str(cards),
            "HARNESS_RAW": str(folder / "data" / "raw"),
            "HARNESS_DATA": str(folder / "data" / "domains"),
            "HARNESS_RESULTS": str(folder / "results"),
            "NO_PROXY": "*",
        }
        yield folder, environment, counts, web


def harness(line: str, folder: Path, environment: dict[str, str]) -> str:
    words = shlex.split(line)
    assert words[0] == "harness"
    done = subprocess.run([str(HARNESS), *words[1:]], capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_section_goes_from_nothing_to_a_plan() -> None:
    found = [line.split(" --")[0] for line in commands()]
    for needed in ("harness data fetch amazon2023", "harness data prepare data/raw paper", "harness data pictures paper"):
        assert needed in found
    assert any(line.startswith(("harness plan --suite amazon2023", "harness run --suite amazon2023")) for line in commands())


@pytest.mark.slow
def test_the_commands_work_word_for_word(world: tuple[Path, dict[str, str], dict[str, dict[str, int]], WebServer]) -> None:
    folder, environment, counts, web = world
    said: dict[str, str] = {}
    for line in commands():
        said[line] = harness(line.replace("harness run ", "harness plan ", 1), folder, environment)
        if line.endswith("--dry-run"):  # nothing is there after it that was not before
            assert not web.requests(method="GET")
    # every file of the release arrived once, whole, and from the hub
    for wanted in choose():
        assert (folder / "data" / "raw" / wanted.local).exists()
        assert len(web.requests(f"/store/{wanted.path}", "GET")) == 1
    # nine domains with the counts of their cards, and pictures from the local host
    for name, wanted_counts in counts.items():
        assert json.loads(harness(f"harness data card {name} --json", folder, environment))["counts"].items() >= wanted_counts.items()
        assert "its counts are the expected ones" in harness(f"harness data verify {name}", folder, environment)
    card = json.loads(harness("harness data card musical_instruments --json", folder, environment))
    assert card["items_with_picture"] >= 40
    assert sum(count for reason, count in card["dropped"].items() if reason.startswith("no_picture")) == 50 - card["items_with_picture"]
    assert {other["domain"] for other in card["overlap"]} == set(counts) - {"musical_instruments"}
    # the last command: every run of the suite with what it will cost
    plan = next(text for line, text in said.items() if "--suite amazon2023" in line)
    for word in ("musical_instruments", "industrial_and_scientific", "video_games", "office_products"):
        assert word in plan
    assert re.search(r"At most about [0-9,.]+ h of ", plan), plan[-1500:]


@pytest.mark.slow
def test_a_second_walk_asks_for_nothing(world: tuple[Path, dict[str, str], dict[str, dict[str, int]], WebServer]) -> None:
    folder, environment, _, web = world
    if not (folder / "data" / "domains").exists():
        pytest.skip("the first walk did not get that far")
    before = len(web.requests(method="GET"))
    outputs = [harness(line, folder, environment) for line in commands() if line.startswith("harness data ")]
    assert len(web.requests(method="GET")) == before
    assert any("there already" in output for output in outputs)


@pytest.mark.slow
def test_the_real_cards_refuse_the_local_release(world: tuple[Path, dict[str, str], dict[str, dict[str, int]], WebServer]) -> None:
    folder, environment, _, _ = world
    real = {name: value for name, value in environment.items() if name != "HARNESS_CARDS"} | {"HARNESS_DATA": str(folder / "other")}
    words = [str(HARNESS), "data", "prepare", str(folder / "published"), "Musical_Instruments"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=real)
    assert done.returncode == 2
    assert "users: 60, expected 57,439 (-57,379)" in done.stderr
    assert "Likely: the raw file is not whole" in done.stderr
    assert not (folder / "other" / "musical_instruments").exists()
